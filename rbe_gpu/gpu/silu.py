"""silu: y = t / (1 + exp(-t)), t = x + bias."""

from __future__ import annotations

from typing import Any

from ._elements import map_plan
from ._launch import Launch, run


def plan(x: Any, bias: Any, out: Any) -> Launch:
    """The launch of `silu`, from shapes, dtypes and addresses."""
    return map_plan("silu", "", x, bias, out)


def silu(x: Any, bias: Any, out: Any) -> None:
    """Write silu(x + bias) to `out`.

    Parameters
    ----------
    x, out : (rows, cols) float32/float16/bfloat16, C-contiguous; `out` may be `x`
    bias : (cols,) of any of the three dtypes, or None
    """
    run(plan(x, bias, out))

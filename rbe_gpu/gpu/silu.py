"""silu: y = t / (1 + exp(-t)), t = x + bias."""

from __future__ import annotations

from typing import Any

from ._elements import map_elements
from ._execute import run
from ._launch import Launch


def launches(x: Any, bias: Any, out: Any) -> tuple[Launch, ...]:
    """The launch of `silu`, from shapes, dtypes and addresses."""
    return map_elements("silu", "", x, bias, out)


def silu(x: Any, bias: Any, out: Any) -> None:
    """Write silu(x + bias) to `out`.

    Parameters
    ----------
    x, out : (rows, cols) float32/float16/bfloat16, C-contiguous; `out` may be `x`
    bias : (cols,) of any of the three dtypes, or None
    """
    run(*launches(x, bias, out))

"""swiglu: y = gate / (1 + exp(-gate)) * up, x + bias = [gate | up] along the last axis."""

from __future__ import annotations

from typing import Any

from ._elements import map_elements
from ._execute import run
from ._launch import Launch


def launches(x: Any, bias: Any, out: Any) -> tuple[Launch, ...]:
    """The launch of `swiglu`, from shapes, dtypes and addresses."""
    return map_elements("swiglu", "", x, bias, out)


def swiglu(x: Any, bias: Any, out: Any) -> None:
    """Write silu(gate) * up to `out`.

    Parameters
    ----------
    x : (rows, 2n) float32/float16/bfloat16, C-contiguous: n gates, then n ups
    bias : (2n,) of any of the three dtypes, or None
    out : (rows, n), dtype of x, C-contiguous, no memory shared with x
    """
    run(*launches(x, bias, out))

"""add: y[i] = x[i] + residual[i]."""

from __future__ import annotations

from typing import Any

from ._elements import BLOCK, grid, vector
from ._execute import run
from ._launch import SUFFIX, Launch, aligned
from ._params import ADD


def launches(x: Any, residual: Any, out: Any) -> tuple[Launch, ...]:
    """The launch of `add`, from shapes, dtypes and addresses."""
    chunk, single = (vector(x), "") if aligned(x, residual, out) else (1, "_single")
    params = ADD.fill(x=x, residual=residual, out=out, count=x.size)
    return (Launch("add", f"add_{SUFFIX[x.dtype]}{single}", grid(x.size, chunk), BLOCK, params),)


def add(x: Any, residual: Any, out: Any) -> None:
    """Write x + residual to `out`.

    Parameters
    ----------
    x, residual, out : (count,) float32/float16/bfloat16, one dtype; `out` may be one of the others
    """
    run(*launches(x, residual, out))

"""add: y[i] = x[i] + residual[i]."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._elements import BLOCK, grid, vector
from ._launch import SUFFIX, Launch, aligned, run


def plan(x: Any, residual: Any, out: Any) -> Launch:
    """The launch of `add`, from shapes, dtypes and addresses."""
    chunk, single = (vector(x), "") if aligned(x, residual, out) else (1, "_single")
    args = (x, residual, out, np.int64(x.size))
    return Launch("add", f"add_{SUFFIX[x.dtype]}{single}", grid(x.size, chunk), BLOCK, args)


def add(x: Any, residual: Any, out: Any) -> None:
    """Write x + residual to `out`.

    Parameters
    ----------
    x, residual, out : (count,) float32/float16/bfloat16, one dtype; `out` may be one of the others
    """
    run(plan(x, residual, out))

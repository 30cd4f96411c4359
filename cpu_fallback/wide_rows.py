"""Rows whose sums leave the range of float32: the norms take such a row once more, in float64.

The squares of values from 1.8e19 on overflow float32, those below 1e-19 underflow. Scaling every row first would cost
every row a pass for its largest value; looking at what a row's sum became costs nothing, and float64 holds the square
of every float32, subnormals included.
"""

from __future__ import annotations

import numpy as np

from ._jit import cpu_inline
from .simd import element, widen

#: A float32 mean of squares (with eps) below this may have lost more than it rounds off: squares lose up to 2^-150
#: each. Above the second, or NaN, something overflowed.
SMALLEST, LARGEST = 2.0**-100, 2.0**127


@cpu_inline(exact=True)
def in_range(mean_square):
    """Whether float32 sums of squares with this mean are as exact as float32 allows; False for NaN."""
    return SMALLEST <= mean_square <= LARGEST


@cpu_inline(exact=True)
def wide_value(x, residual, at):
    """s = x + residual at a flat offset, in float64; `residual` may be None."""
    s = np.float64(widen(element(x, at)))
    return s if residual is None else s + np.float64(widen(element(residual, at)))

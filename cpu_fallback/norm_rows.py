"""Elements s = x + residual of the rows of norms, and rows whose sums leave the range of float32.

The squares of values from 1.8e19 on overflow float32, those below 1e-19 underflow. Scaling every row first would cost
every row a pass for its absmax. A row's sum is checked instead, which costs nothing, and where it is out of range the
norm computes the row again in float64, which holds the square of every float32, subnormals included.
"""

from __future__ import annotations

import numpy as np

from ._jit import cpu_inline
from .simd import element, vadd, vload, vload_n, widen

#: A float32 mean of squares (with eps) below this may have lost more than it rounds off: squares lose up to 2^-150
#: each. Above the second, or NaN, something overflowed.
SMALLEST, LARGEST = 2.0**-100, 2.0**127


@cpu_inline
def load_16(x, residual, at):
    """A vector of s = x + residual from a flat offset on; `residual` may be None."""
    if residual is None:
        return vload(x, at)
    return vadd(vload(x, at), vload(residual, at))


@cpu_inline
def load_partial(x, residual, at, count):
    """As `load_16`, of the first `count` values; the others are 0."""
    if residual is None:
        return vload_n(x, at, count)
    return vadd(vload_n(x, at, count), vload_n(residual, at, count))


@cpu_inline(exact=True)
def in_range(mean_square):
    """Whether float32 sums of squares with this mean are as exact as float32 allows; False for NaN."""
    return SMALLEST <= mean_square <= LARGEST


@cpu_inline(exact=True)
def wide_value(x, residual, at):
    """s = x + residual at a flat offset, in float64; `residual` may be None."""
    s = np.float64(widen(element(x, at)))
    return s if residual is None else s + np.float64(widen(element(residual, at)))

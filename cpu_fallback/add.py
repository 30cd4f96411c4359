"""add: y = x + residual."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from ._parts import LINE, in_parts
from ._pool import num_threads
from .simd import bits, vadd, vload, vload_n, vstore, vstore_n

_PARALLEL_FROM = 65536  # elements: 8/14 us with one/two threads at 32768, 18/15 us at 65536


def _span(x, residual, out, start, stop):
    whole = start + (stop - start) // 16 * 16
    for i in range(start, whole, 16):
        vstore(out, i, vadd(vload(x, i), vload(residual, i)))
    if whole < stop:
        count = stop - whole
        vstore_n(out, whole, vadd(vload_n(x, whole, count), vload_n(residual, whole, count)), count)


_in_parts = in_parts(_span, LINE)


def add(x: NDArray[Any], residual: NDArray[Any], out: NDArray[Any]) -> None:
    """Write x + residual to `out`.

    Parameters
    ----------
    x, residual, out : (count,) float32/float16/bfloat16, one dtype, C-contiguous; `out` may be one of the others
    """
    arrays = (bits(x), bits(residual), bits(out))
    parts = num_threads() if x.size >= _PARALLEL_FROM else 1
    _in_parts(x.size, parts, *arrays)

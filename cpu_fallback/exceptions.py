"""Exceptions of grid codes: what an integer of the weight has beyond its packed code (`rbe_gpu.codecs.cut`).

`w` is a record of `params.WEIGHT` of a weight that has some. Where codes are unpacked to memory, exceptions are added
there; where they are multiplied in registers, the products of exceptions are added to the sum of a row.
"""

from __future__ import annotations

import numpy as np

from ._jit import cpu_inline
from .arrays import bytes_at, halves_at, ints_at
from .simd import element

_COUNTED = 64  # exceptions that are counted instead of searched


@cpu_inline
def _start(w, row):
    """The first exception of a row."""
    if w.start_bits == 16:
        return np.int64(element(halves_at(w.exception_start), row))
    return np.int64(element(ints_at(w.exception_start), row))


@cpu_inline
def exceptions_from(w, row, column):
    """The first exception of a row from a column on, and the end of the row's."""
    columns = halves_at(w.exception_column)
    low, high = _start(w, row), _start(w, row + 1)
    stop = high
    while high - low > _COUNTED:
        middle = (low + high) // 2
        if np.int64(element(columns, middle)) < column:
            low = middle + 1
        else:
            high = middle
    first = low
    # counted, not searched for: the processor would guess the branch wrong, which takes as long as all of this
    for e in range(low, high):
        first += np.int64(element(columns, e)) < column
    return first, stop


@cpu_inline
def exception_column(w, e):
    return np.int64(element(halves_at(w.exception_column), e))


@cpu_inline
def exception_delta(w, e):
    """What is added to the packed code, int32."""
    return np.int32(np.int8(element(bytes_at(w.exception_delta), e)))


@cpu_inline
def times_floats(w, row, x, x_at):
    """sum_e delta[e] x[x_at + column[e]] over the exceptions of a row."""
    total = np.float32(0)
    for e in range(_start(w, row), _start(w, row + 1)):
        total += np.float32(exception_delta(w, e)) * element(x, x_at + exception_column(w, e))
    return total


@cpu_inline
def times_bytes(w, row, z, z_at):
    """The same for int8 activations, whose bits are uint8: int32, exact."""
    total = np.int32(0)
    for e in range(_start(w, row), _start(w, row + 1)):
        total += exception_delta(w, e) * np.int32(np.int8(element(z, z_at + exception_column(w, e))))
    return total

"""dropout: y[i] = x[i] / (1 - p) where element i is kept, else 0; plus residual[i].

Element i is kept when word i % 4 of the Philox4x32-10 block with counter offset + i // 4 and key seed is at
least floor(p * 2^32). Words are made 256 blocks at a time: four words of 256 counters each, so that the ten
rounds run on vectors of counters.

Source: Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._jit import cpu_inline
from ._parts import in_parts
from ._pool import num_threads
from .simd import bits, vadd, vload, vload_n, vstore, vstore_n, widen
from .stack import stack_array

_BLOCKS = 256  # words and values of a chunk: 8 KB, in the L1 cache
_CHUNK = 4 * _BLOCKS
_PARALLEL_FROM = 16384  # elements: 7/7 us with one/two threads at 8192, 12/10 us at 16384

_M0 = np.uint64(0xD2511F53)
_M1 = np.uint64(0xCD9E8D57)
_W0 = np.uint32(0x9E3779B9)
_W1 = np.uint32(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_ZERO = np.float32(0.0)


@cpu_inline(
    inline=False
)  # a function of its own: inlined, it spills three constants of its loop with AVX-512
def _philox_words(words, counter, key0, key1):
    """words[4b + lane] = lane of the Philox4x32-10 block with counter `counter` + b, b < 256."""
    for b in range(_BLOCKS):
        n = counter + np.uint64(b)
        c0 = np.uint32(n & _LOW)
        c1 = np.uint32(n >> _32)
        c2 = np.uint32(0)
        c3 = np.uint32(0)
        k0 = key0
        k1 = key1
        for _ in range(10):
            p0 = _M0 * np.uint64(c0)
            p1 = _M1 * np.uint64(c2)
            c0 = np.uint32(p1 >> _32) ^ c1 ^ k0
            c1 = np.uint32(p1 & _LOW)
            c2 = np.uint32(p0 >> _32) ^ c3 ^ k1
            c3 = np.uint32(p0 & _LOW)
            k0 = np.uint32(k0 + _W0)
            k1 = np.uint32(k1 + _W1)
        words[4 * b] = c0
        words[4 * b + 1] = c1
        words[4 * b + 2] = c2
        words[4 * b + 3] = c3


def _span(x, threshold, scale, key0, key1, offset, residual, out, start, stop):
    """Elements start..stop; `start` is a multiple of 4."""
    words = stack_array(_CHUNK, np.uint32)
    values = stack_array(_CHUNK, np.float32)
    for at in range(start, stop, _CHUNK):
        count = min(_CHUNK, stop - at)
        _philox_words(words, offset + np.uint64(at >> 2), key0, key1)
        # A slice, because Numba guards a computed index against being negative, and a buffer, because `out`
        # may be `x`: LLVM vectorises neither a guarded index nor arrays that may overlap.
        chunk = x[at : at + count]
        for i in range(count):
            value = widen(chunk[i]) * scale
            values[i] = value if words[i] >= threshold else _ZERO
        whole = count - count % 16
        for i in range(0, whole, 16):
            y = vload(values, i)
            if residual is not None:
                y = vadd(y, vload(residual, at + i))
            vstore(out, at + i, y)
        if whole < count:
            y = vload(values, whole)
            if residual is not None:
                y = vadd(y, vload_n(residual, at + whole, count - whole))
            vstore_n(out, at + whole, y, count - whole)


_in_parts = in_parts(_span, _CHUNK)


def dropout(
    x: NDArray[Any], p: float, seed: int, offset: int, residual: NDArray[Any] | None, out: NDArray[Any]
) -> None:
    """Write x / (1 - p) where kept, else 0, plus residual, to `out`.

    Parameters
    ----------
    x, residual, out : (count,) float32/float16/bfloat16, one dtype; `out` may be one of the others
    p : 0 <= p <= 1
    seed, offset : 0 <= value < 2^64
    """
    if p == 1.0:  # the threshold would be 2^32, which no word reaches and 32 bits cannot hold
        out[...] = 0 if residual is None else residual
        return
    arguments = (
        bits(x),
        np.uint32(int(p * 2**32)),
        np.float32(1.0 / (1.0 - p)),
        np.uint32(seed & 0xFFFFFFFF),
        np.uint32(seed >> 32),
        np.uint64(offset),
        None if residual is None else bits(residual),
        bits(out),
    )
    parts = num_threads() if x.size >= _PARALLEL_FROM else 1
    _in_parts(x.size, parts, *arguments)

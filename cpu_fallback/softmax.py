"""softmax: y[r,c] = exp(s[r,c] - max s[r]) / sum_c exp(s[r,c] - max s[r]), s = scale * x + mask.

A row is read in chunks of 2048: the chunk's scores go to a float32 buffer, the largest so far is the base of
the exponentials, and an earlier sum is scaled to the new base. A row of one chunk is finished from the
buffer; a longer one is read a second time. Sums are float32 in 32 lanes within a chunk, float64 between
chunks.
Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax".
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import get_num_threads, prange
from numpy.typing import NDArray

from ._jit import cpu_inline, cpu_kernel
from .simd import bits, vadd, vexp, vload, vload_n, vmax, vmaxval, vmul, vsplat, vstore, vstore_n, vsub, vsum

_CHUNK = 2048  # 8 KB of scores: a quarter of a 32 KB L1 cache, and a whole row of most models
_PARALLEL_FROM = 32768  # elements: 7/7 us with one/two threads at 16384, 25/19 us at 65536
_ZERO = np.float32(0.0)
_MINUS_INF = np.float32(-np.inf)


@cpu_inline
def _scores(x, scale, added, keep, row, col, count, s):
    """s[:count] = scale * x[row, col:] + mask, then -inf to a multiple of 32; returns the largest score."""
    at = row * x.shape[1] + col
    factor = vsplat(scale)
    whole = count - count % 16
    for i in range(0, whole, 16):
        vstore(s, i, vmul(vload(x, at + i), factor))
    if whole < count:
        vstore(s, whole, vmul(vload_n(x, at + whole, count - whole), factor))
    padded = (count + 31) // 32 * 32
    for i in range(count, padded):
        s[i] = _MINUS_INF
    if added is not None:  # slices: Numba guards a computed index, which keeps LLVM from vectorising
        terms = added[row, col : col + count]
        for i in range(count):
            s[i] += terms[i]
    if keep is not None:
        kept = keep[row, col : col + count]
        for i in range(count):
            s[i] = s[i] if kept[i] else _MINUS_INF
    top0 = vsplat(_MINUS_INF)
    top1 = vsplat(_MINUS_INF)
    for i in range(0, padded, 32):  # vmax gives its second argument where the first is NaN
        top0 = vmax(vload(s, i), top0)
        top1 = vmax(vload(s, i + 16), top1)
    return vmaxval(vmax(top0, top1))


@cpu_inline
def _exponentials(s, count, base):
    """s = exp(s - base), in place; returns the sum. The padding of -inf adds 0."""
    shift = vsplat(base)
    sum0 = vsplat(_ZERO)
    sum1 = vsplat(_ZERO)
    for i in range(0, count, 32):
        e0 = vexp(vsub(vload(s, i), shift))
        e1 = vexp(vsub(vload(s, i + 16), shift))
        vstore(s, i, e0)
        vstore(s, i + 16, e1)
        sum0 = vadd(sum0, e0)
        sum1 = vadd(sum1, e1)
    return vsum(vadd(sum0, sum1))


@cpu_inline
def _write(s, count, inverse, out, at):
    """out[at:] = s[:count] * inverse."""
    factor = vsplat(inverse)
    whole = count - count % 16
    for i in range(0, whole, 16):
        vstore(out, at + i, vmul(vload(s, i), factor))
    if whole < count:
        vstore_n(out, at + whole, vmul(vload(s, whole), factor), count - whole)


@cpu_kernel
def _rows(x, scale, added, keep, out, start, stop):
    cols = x.shape[1]
    s = np.empty(_CHUNK, np.float32)
    for row in range(start, stop):
        top = _MINUS_INF
        base = _ZERO
        total = 0.0
        for col in range(0, cols, _CHUNK):
            count = min(_CHUNK, cols - col)
            top = max(top, _scores(x, scale, added, keep, row, col, count, s))
            if top != _MINUS_INF:  # a row of -inf keeps the base 0, and sums to 0
                total *= np.exp(np.float64(base) - np.float64(top)) if total != 0.0 else 1.0
                base = top
            total += _exponentials(s, count, base)
        inverse = np.float32(1.0 / total if total != 0.0 else 0.0)
        if cols <= _CHUNK:
            _write(s, cols, inverse, out, row * cols)
            continue
        for col in range(0, cols, _CHUNK):
            count = min(_CHUNK, cols - col)
            _scores(x, scale, added, keep, row, col, count, s)
            _exponentials(s, count, base)
            _write(s, count, inverse, out, row * cols + col)


@cpu_kernel(parallel=True)
def _parallel_rows(x, scale, added, keep, out, parts):
    rows = x.shape[0]
    for part in prange(parts):
        _rows(x, scale, added, keep, out, rows * part // parts, rows * (part + 1) // parts)


def softmax(x: NDArray[Any], scale: float, mask: NDArray[Any] | None, out: NDArray[Any]) -> None:
    """Write softmax(scale * x + mask) of every row to `out`.

    Parameters
    ----------
    x, out : (rows, cols) float32/float16/bfloat16, C-contiguous; `out` may be `x`
    mask : (rows, cols) float32 (added) or bool (True keeps), any strides, or None
    """
    added = keep = None
    if mask is not None and mask.dtype == np.bool_:
        keep = mask
    else:
        added = mask
    parts = min(get_num_threads(), x.shape[0]) if x.size >= _PARALLEL_FROM else 1
    if parts > 1:
        _parallel_rows(bits(x), np.float32(scale), added, keep, bits(out), parts)
    else:
        _rows(bits(x), np.float32(scale), added, keep, bits(out), 0, x.shape[0])

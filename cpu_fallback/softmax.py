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
from numpy.typing import NDArray

from ._jit import cpu_inline
from ._parts import in_parts
from ._pool import num_threads
from .simd import (
    bits,
    vadd,
    vlanes,
    vload,
    vload_n,
    vmax,
    vmaxval,
    vmul,
    vsplat,
    vstore,
    vstore_n,
    vsub,
    vsum,
)
from .simd_math import vexp_narrow
from .stack import stack_array

_CHUNK = 2048  # 8 KB of scores: a quarter of a 32 KB L1 cache, and a whole row of most models
_PARALLEL_FROM = 32768  # elements: 7/7 us with one/two threads at 16384, 25/19 us at 65536
_GROUP = 32  # short rows at a time
_SCRATCH = _CHUNK + _GROUP
_ZERO = np.float32(0.0)
_MINUS_INF = np.float32(-np.inf)


@cpu_inline
def _scores(x, scale, added, keep, row, col, count, s, s_at):
    """s[s_at:][:count] = scale * x[row, col:] + mask, then -inf to a multiple of 32; returns the largest score."""
    at = row * x.shape[1] + col
    factor = vsplat(scale)
    whole = count - count % 16
    padded = (count + 31) // 32 * 32
    top0 = vsplat(_MINUS_INF)
    top1 = vsplat(_MINUS_INF)
    # vmax gives its second argument where the first is NaN
    if added is None and keep is None:
        pairs = count - count % 32
        for i in range(0, pairs, 32):
            s0 = vmul(vload(x, at + i), factor)
            s1 = vmul(vload(x, at + i + 16), factor)
            vstore(s, s_at + i, s0)
            vstore(s, s_at + i + 16, s1)
            top0 = vmax(s0, top0)
            top1 = vmax(s1, top1)
        for i in range(pairs, padded, 16):
            left = max(0, min(16, count - i))
            s0 = vlanes(vmul(vload_n(x, at + i, left), factor), 0, left, _MINUS_INF)
            vstore(s, s_at + i, s0)
            top0 = vmax(s0, top0)
        return vmaxval(vmax(top0, top1))
    for i in range(0, whole, 16):
        vstore(s, s_at + i, vmul(vload(x, at + i), factor))
    if whole < count:
        vstore(s, s_at + whole, vmul(vload_n(x, at + whole, count - whole), factor))
    for i in range(s_at + count, s_at + padded):
        s[i] = _MINUS_INF
    # slices: Numba guards a computed index, which keeps LLVM from vectorising
    scores = s[s_at : s_at + count]
    if added is not None:
        terms = added[row, col : col + count]
        for i in range(count):
            scores[i] += terms[i]
    if keep is not None:
        kept = keep[row, col : col + count]
        for i in range(count):
            scores[i] = scores[i] if kept[i] else _MINUS_INF
    for i in range(s_at, s_at + padded, 32):
        top0 = vmax(vload(s, i), top0)
        top1 = vmax(vload(s, i + 16), top1)
    return vmaxval(vmax(top0, top1))


@cpu_inline
def _exponentials(s, s_at, count, base):
    """s = exp(s - base), in place; returns the sum. The padding of -inf adds 0."""
    shift = vsplat(base)
    sum0 = vsplat(_ZERO)
    sum1 = vsplat(_ZERO)
    for i in range(s_at, s_at + count, 32):
        e0 = vexp_narrow(vsub(vload(s, i), shift))
        e1 = vexp_narrow(vsub(vload(s, i + 16), shift))
        vstore(s, i, e0)
        vstore(s, i + 16, e1)
        sum0 = vadd(sum0, e0)
        sum1 = vadd(sum1, e1)
    return vsum(vadd(sum0, sum1))


@cpu_inline
def _write(s, s_at, count, inverse, out, at):
    """out[at:] = s[s_at:][:count] * inverse."""
    factor = vsplat(inverse)
    whole = count - count % 16
    for i in range(0, whole, 16):
        vstore(out, at + i, vmul(vload(s, s_at + i), factor))
    if whole < count:
        vstore_n(out, at + whole, vmul(vload(s, s_at + whole), factor), count - whole)


@cpu_inline
def _inverse(total):
    """1 / the sum of a row; 0 for a row of -inf, whose sum is 0."""
    return np.float32(1.0 / total if total != 0.0 else 0.0)


@cpu_inline
def _short_rows(x, scale, added, keep, out, start, stop, s):
    """Rows that fit the buffer, as many at a time as fit, step by step: a step's end in one row (a maximum, a
    sum, a division) is waited for while the others go on."""
    cols = x.shape[1]
    padded = (cols + 31) // 32 * 32
    most = min(_GROUP, _CHUNK // padded)
    for first in range(start, stop, most):
        rows = min(most, stop - first)
        for r in range(rows):
            # s[_CHUNK:] holds what is known of a row: its base, then its sum
            top = _scores(x, scale, added, keep, first + r, 0, cols, s, r * padded)
            s[_CHUNK + r] = top if top != _MINUS_INF else _ZERO
        for r in range(rows):
            s[_CHUNK + r] = _exponentials(s, r * padded, cols, s[_CHUNK + r])
        for r in range(rows):
            _write(s, r * padded, cols, _inverse(np.float64(s[_CHUNK + r])), out, (first + r) * cols)


def _rows(x, scale, added, keep, out, start, stop):
    cols = x.shape[1]
    scale = np.float32(scale)
    s = stack_array(_SCRATCH, np.float32)
    if cols <= _CHUNK:
        _short_rows(x, scale, added, keep, out, start, stop, s)
        return
    for row in range(start, stop):
        top = _MINUS_INF
        base = _ZERO
        total = 0.0
        for col in range(0, cols, _CHUNK):
            count = min(_CHUNK, cols - col)
            top = max(top, _scores(x, scale, added, keep, row, col, count, s, 0))
            if top != _MINUS_INF:  # a row of -inf keeps the base 0, and sums to 0
                total *= np.exp(np.float64(base) - np.float64(top)) if total != 0.0 else 1.0
                base = top
            total += _exponentials(s, 0, count, base)
        inverse = _inverse(total)
        for col in range(0, cols, _CHUNK):
            count = min(_CHUNK, cols - col)
            _scores(x, scale, added, keep, row, col, count, s, 0)
            _exponentials(s, 0, count, base)
            _write(s, 0, count, inverse, out, row * cols + col)


_in_parts = in_parts(_rows)


def softmax(x: NDArray[Any], scale: float, mask: NDArray[Any] | None, out: NDArray[Any]) -> None:
    """Write softmax(scale * x + mask) of every row to `out`.

    Parameters
    ----------
    x, out : (rows, cols) float32/float16/bfloat16, C-contiguous; `out` may be `x`
    mask : (rows, cols) float32 (added) or bool (True keeps), any strides, or None
    """
    added, keep = (None, mask) if mask is not None and mask.dtype == np.bool_ else (mask, None)
    parts = min(num_threads(), x.shape[0]) if x.size >= _PARALLEL_FROM else 1
    _in_parts(x.shape[0], parts, bits(x), scale, added, keep, bits(out))

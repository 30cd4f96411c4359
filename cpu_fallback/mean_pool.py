"""mean_pool: y[b,c] = sum_t x[t,c] / n[b] over the n[b] tokens t of sequence b; zeros where n[b] = 0.

A column is summed token by token in float32, by one thread: the result of a sequence depends neither on the other
sequences of the batch nor on the number of threads, and a padded sequence has the bits of a packed one. Columns whose
float32 sum overflows are summed once more in float64, so that the mean of finite values is finite.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._jit import cpu_inline
from ._parts import in_parts
from ._pool import num_threads
from .norm_rows import wide_value
from .simd import bits, store_element, vadd, vdiv, vfma, vload, vload_n, vmul, vsplat, vstore, vstore_n, vsum

_STRIP = 64  # columns that a thread sums at once: whole cache lines of every dtype, four float32 vectors
_PARALLEL_FROM = 131072  # elements: 12/28 us with one/two threads at 98304, 19/16 us at 196608
_NONE = np.empty(0, np.int64)
_ZERO = np.float32(0.0)


@cpu_inline(exact=True, inline=False)
def _wide_strip(x, start, tokens, row, out, place, cols):
    """The mean in `cols` columns, in float64."""
    for col in range(cols):
        total = 0.0
        for i in range(start + col, start + col + tokens * row, row):
            total += wide_value(x, None, i)
        store_element(out, place + col, np.float32(total / tokens))


@cpu_inline
def _strip(x, start, tokens, row, count, out, place):
    """The mean of `tokens` rows of `row` elements from x[start] on, in 64 columns. Returns whether all are finite."""
    s0, s1, s2, s3 = vload(x, start), vload(x, start + 16), vload(x, start + 32), vload(x, start + 48)
    for i in range(start + row, start + tokens * row, row):
        s0, s1 = vadd(s0, vload(x, i)), vadd(s1, vload(x, i + 16))
        s2, s3 = vadd(s2, vload(x, i + 32)), vadd(s3, vload(x, i + 48))
    vstore(out, place, vdiv(s0, count))
    vstore(out, place + 16, vdiv(s1, count))
    vstore(out, place + 32, vdiv(s2, count))
    vstore(out, place + 48, vdiv(s3, count))
    zero = vsplat(_ZERO)  # 0 * s is NaN where s is not finite
    return vsum(vfma(s0, zero, vfma(s1, zero, vfma(s2, zero, vmul(s3, zero))))) == _ZERO


@cpu_inline
def _narrow_strip(x, start, tokens, row, count, out, place, cols):
    """The same in up to 16 columns."""
    s = vload_n(x, start, cols)
    for i in range(start + row, start + tokens * row, row):
        s = vadd(s, vload_n(x, i, cols))
    vstore_n(out, place, vdiv(s, count), cols)
    return vsum(vmul(s, vsplat(_ZERO))) == _ZERO


def _units(x, seq, lengths, cu_seqlens, cols, out, first, stop):
    """Units first .. stop - 1: unit b * strips + s is strip s of sequence b."""
    strips = (cols + _STRIP - 1) // _STRIP
    for unit in range(first, stop):
        b, col = unit // strips, unit % strips * _STRIP
        start, tokens = b * seq, seq
        if cu_seqlens.size:
            start, tokens = cu_seqlens[b], cu_seqlens[b + 1] - cu_seqlens[b]
        elif lengths.size:
            tokens = lengths[b]
        width = min(_STRIP, cols - col)
        at, place = start * cols + col, b * cols + col
        if tokens == 0:
            for i in range(0, width, 16):
                vstore_n(out, place + i, vsplat(np.float32(0.0)), min(16, width - i))
            continue
        count = vsplat(np.float32(tokens))
        if width == _STRIP:
            finite = _strip(x, at, tokens, cols, count, out, place)
        else:
            finite = True
            for i in range(0, width, 16):
                finite &= _narrow_strip(x, at + i, tokens, cols, count, out, place + i, min(16, width - i))
        if not finite:
            _wide_strip(x, at, tokens, cols, out, place, width)


_in_parts = in_parts(_units)


def mean_pool(
    x: NDArray[Any],
    lengths: NDArray[np.int64] | None,
    cu_seqlens: NDArray[np.int64] | None,
    out: NDArray[Any],
) -> None:
    """Write the mean of each sequence's tokens to `out`.

    Parameters
    ----------
    x : (batch, seq, cols), or packed (tokens, cols), float32/float16/bfloat16, C-contiguous
    lengths : (batch,) tokens of each padded sequence, 0 to seq; None: seq
    cu_seqlens : (batch + 1,) packed sequence b has the tokens cu_seqlens[b] to cu_seqlens[b + 1] - 1; None: padded
    out : (batch, cols) of any of the three dtypes, C-contiguous
    """
    batch, cols = out.shape
    arguments = (
        bits(x).reshape(-1),
        x.shape[1] if cu_seqlens is None else 0,
        _NONE if lengths is None else lengths,
        _NONE if cu_seqlens is None else cu_seqlens,
        cols,
        bits(out).reshape(-1),
    )
    units = batch * -(-cols // _STRIP)
    parts = min(num_threads(), units) if x.size >= _PARALLEL_FROM else 1
    _in_parts(units, parts, *arguments)

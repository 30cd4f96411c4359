"""Attention of a few queries a head: o[i] = sum_j softmax_j(scale * q[i].k[j]) v[j], as in generation.

A tile of 16 queries (`attention`) would be mostly empty, so here lanes are head dimensions throughout. All query
heads that share a key head are computed together: its keys and values are read once for them, 64 keys at a time, with
a running maximum and sum (Milakov and Gimelshein 2018).

In the kernel `p` is a record of `params.ATTENTION_FEW`. A unit of work is a key head of a sequence.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from . import params
from ._jit import cpu_inline
from ._parts import part_kernel, pointer_like, run_parts
from ._pool import num_threads
from .arrays import address, floats_at, longs_at
from .simd import (
    store_sums,
    vadd,
    vfma,
    vload,
    vload_n,
    vmax,
    vmaxval,
    vmul,
    vselect_less,
    vsplat,
    vstore,
    vstore_n,
    vsub,
    vsum,
)
from .simd_math import vexp_narrow, vtanh
from .unpack import vbroadcast

#: Queries of a key head. At 512 keys of 64 dimensions 1 takes 0.30 of the time of a tile, 4 take 0.54, 8 0.86.
MOST_QUERIES = 8
KEYS = 64  # whose scores are in scratch memory
#: Elements of all keys: below, threads take longer to meet than to compute.
PARALLEL_FROM = 16_384
_ATTENTION = params.ATTENTION_FEW.dtype
_ZERO, _ONE = np.float32(0), np.float32(1)
_LOWEST, _MINUS_INF = np.finfo(np.float32).min, np.float32(-np.inf)
# as in `attention`: a weight that underflows is still positive
_TINY = np.finfo(np.float32).tiny


def scratch_floats(queries: int, head_dim: int) -> int:
    """float32 values of scratch memory of a part: queries and sums of head_dim, scores, and the sums of weights."""
    width = -(-head_dim // 16) * 16
    return queries * (2 * width + KEYS + 32)


@cpu_inline
def _load(source, at, d, head_dim):
    """Sixteen values from dimension d on, zeros behind the last."""
    return vload(source, at + d) if d + 16 <= head_dim else vload_n(source, at + d, head_dim - d)


@cpu_inline
def _scores(p, k, k0, first, count, buf, scaled, scores, queries, width):
    """scores[i, j] = q[i].k[first + j], j < count; KEYS scores apart."""
    head_dim, row = p.head_dim, p.k_row
    fours = count // 4 * 4
    for j in range(0, fours, 4):
        at = k0 + (first + j) * row
        for i in range(queries):
            a, b, c, d = vsplat(_ZERO), vsplat(_ZERO), vsplat(_ZERO), vsplat(_ZERO)
            for x in range(0, head_dim, 16):
                line = vload(buf, scaled + i * width + x)
                a = vfma(line, _load(k, at, x, head_dim), a)
                b = vfma(line, _load(k, at + row, x, head_dim), b)
                c = vfma(line, _load(k, at + 2 * row, x, head_dim), c)
                d = vfma(line, _load(k, at + 3 * row, x, head_dim), d)
            store_sums(a, b, c, d, buf, scores + i * KEYS + j)
    for j in range(fours, count):
        at = k0 + (first + j) * row
        for i in range(queries):
            a = vsplat(_ZERO)
            for x in range(0, head_dim, 16):
                a = vfma(vload(buf, scaled + i * width + x), _load(k, at, x, head_dim), a)
            buf[scores + i * KEYS + j] = vsum(a)


@cpu_inline(inline=False)
def cap_scores(buf, start, stop, cap):
    """cap tanh(s / cap) of the scores s from start to stop, a multiple of 16 of them."""
    c, inverse = vsplat(cap), vsplat(_ONE / cap)
    for at in range(start, stop, 16):
        vstore(buf, at, vmul(c, vtanh(vmul(vload(buf, at), inverse))))


@cpu_inline
def _softmax_step(buf, scores, count, top, total):
    """`count` scores, up to KEYS of them, become weights.

    Returns (maximum, sum of weights, factor of what was summed before, whether a score was -inf, whose weight is 0).
    """
    largest = vsplat(top)
    for at in range(0, count, 16):
        x = vload(buf, scores + at)
        if at + 16 > count:  # what is behind them weighs nothing
            for i in range(count, at + 16):
                buf[scores + i] = _MINUS_INF
            x = vload(buf, scores + at)
        largest = vmax(x, largest)
    new = vmaxval(largest)
    factor = vmaxval(vexp_narrow(vsub(vsplat(top), vsplat(new))))
    sums, positive = vsplat(_ZERO), vsplat(_ZERO)
    for at in range(scores, scores + count, 16):
        x = vload(buf, at)
        weight = vexp_narrow(vsub(x, vsplat(new)))
        weight = vselect_less(vsplat(_MINUS_INF), x, vmax(vsplat(_TINY), weight), weight)
        sums = vadd(sums, weight)
        positive = vadd(positive, vselect_less(vsplat(_ZERO), weight, vsplat(_ONE), vsplat(_ZERO)))
        vstore(buf, at, weight)
    return new, total * factor + vsum(sums), max(factor, _TINY), vsum(positive) < np.float32(count)


@cpu_inline
def _add_values(p, v, v0, first, count, buf, weights, output, factor):
    """o = factor o + sum_j weights[j] v[first + j]: four vectors at a time, whose sums do not wait for each other."""
    head_dim, row = p.head_dim, p.v_row
    f, start = vsplat(factor), v0 + first * row
    whole = head_dim // 64 * 64
    for x in range(0, whole, 64):
        a, b = vmul(vload(buf, output + x), f), vmul(vload(buf, output + x + 16), f)
        c, d = vmul(vload(buf, output + x + 32), f), vmul(vload(buf, output + x + 48), f)
        at = start + x
        for j in range(count):
            weight = vbroadcast(buf, weights + j)
            a, b = vfma(weight, vload(v, at), a), vfma(weight, vload(v, at + 16), b)
            c, d = vfma(weight, vload(v, at + 32), c), vfma(weight, vload(v, at + 48), d)
            at += row
        vstore(buf, output + x, a)
        vstore(buf, output + x + 16, b)
        vstore(buf, output + x + 32, c)
        vstore(buf, output + x + 48, d)
    for x in range(whole, head_dim, 16):
        a, at = vmul(vload(buf, output + x), f), start
        for j in range(count):
            a = vfma(vbroadcast(buf, weights + j), _load(v, at, x, head_dim), a)
            at += row
        vstore(buf, output + x, a)


@cpu_inline
def _add_values_that_weigh(p, v, v0, first, count, buf, weights, output, factor):
    """The same without keys of weight 0: their values, if not finite, would become NaN."""
    head_dim = p.head_dim
    for x in range(0, head_dim, 16):
        a, at = vmul(vload(buf, output + x), vsplat(factor)), v0 + first * p.v_row
        for j in range(count):
            if buf[weights + j] != _ZERO:
                a = vfma(vbroadcast(buf, weights + j), _load(v, at, x, head_dim), a)
            at += p.v_row
        vstore(buf, output + x, a)


@cpu_inline
def _unit(p, q, q0, k, k0, v, v0, out, out0, buf, queries, width, keys):
    """The queries of one key head of a sequence."""
    head_dim, seq_q = p.head_dim, p.seq_q
    scaled, output = 0, queries * width
    scores = output + queries * width
    tops = scores + queries * KEYS
    totals = tops + queries
    for i in range(queries):
        at = q0 + i % seq_q * p.q_row + i // seq_q * p.q_head
        for x in range(0, head_dim, 16):
            vstore(buf, scaled + i * width + x, vmul(_load(q, at, x, head_dim), vsplat(p.scale)))
            vstore(buf, output + i * width + x, vsplat(_ZERO))
        buf[tops + i], buf[totals + i] = _LOWEST, _ZERO
    for first in range(p.first_key, keys, KEYS):
        count = min(KEYS, keys - first)
        _scores(p, k, k0, first, count, buf, scaled, scores, queries, width)
        if p.softcap != _ZERO:
            for i in range(scores, scores + queries * KEYS, KEYS):
                cap_scores(buf, i, i + (count + 15) // 16 * 16, p.softcap)
        for i in range(queries):
            weights, into = scores + i * KEYS, output + i * width
            top, total, factor, zeros = _softmax_step(buf, weights, count, buf[tops + i], buf[totals + i])
            buf[tops + i], buf[totals + i] = top, total
            if zeros:
                _add_values_that_weigh(p, v, v0, first, count, buf, weights, into, factor)
            else:
                _add_values(p, v, v0, first, count, buf, weights, into, factor)
    for i in range(queries):
        at = out0 + i % seq_q * p.out_row + i // seq_q * p.out_head
        total = buf[totals + i]
        f = vsplat(_ONE / total if total != _ZERO else _ZERO)
        for x in range(0, head_dim, 16):
            y = vmul(vload(buf, output + i * width + x), f)
            vstore_n(out, at + x, y, min(16, head_dim - x))


def _heads(part, p, like):
    """A part's share of the units."""
    q = carray(pointer_like(p.q, like), 1)
    k = carray(pointer_like(p.k, like), 1)
    v = carray(pointer_like(p.v, like), 1)
    out = carray(pointer_like(p.out, like), 1)
    head_dim, group, seq_q = p.head_dim, p.group, p.seq_q
    queries = group * seq_q
    width = (head_dim + 15) // 16 * 16
    buf = floats_at(p.scratch + 4 * p.scratch_stride * part)
    for unit in range(p.units * part // p.parts, p.units * (part + 1) // p.parts):
        b, h = unit // p.num_kv_heads, unit % p.num_kv_heads
        keys = min(p.keys, longs_at(p.lengths)[b]) if p.lengths != 0 else p.keys
        q0 = b * p.q_sequence + h * group * p.q_head
        k0 = b * p.k_sequence + h * p.k_head
        v0 = b * p.v_sequence + h * p.v_head
        out0 = b * p.out_sequence + h * group * p.out_head
        _unit(p, q, q0, k, k0, v, v0, out, out0, buf, queries, width, keys)


HEADS = part_kernel(_heads, _ATTENTION)


def attention_few_queries(
    q: Any, k: Any, v: Any, scale: float, lengths: Any, out: Any, workspace: Any, element: Any, softcap: float
) -> None:
    """o[i] = sum_j softmax_j(scale * q[i].k[j]) v[j] over all keys, or those up to `lengths`.

    Parameters
    ----------
    q, out : (batch, seq_q, num_heads, head_dim), any strides but that of the last axis
    k, v : (batch, seq_k, num_kv_heads, head_dim); num_heads / num_kv_heads * seq_q is at most MOST_QUERIES
    lengths : (batch,) int64, or None
    element : Numba's type of a stored value
    softcap : as of `attention`
    """
    batch, seq_q, num_heads, head_dim = q.shape
    _, seq_k, num_kv_heads, _ = k.shape
    size, group = q.itemsize, num_heads // num_kv_heads
    units = batch * num_kv_heads
    parts = min(num_threads(), units) if units * seq_k * head_dim >= PARALLEL_FROM else 1
    floats = scratch_floats(group * seq_q, head_dim)
    shape = parts, floats
    scratch = np.empty(shape, np.float32) if workspace is None else workspace.get("attention", shape)
    record = np.frombuffer(
        params.pack_attention_few(
            *_places(q, size), *_places(k, size), *_places(v, size), *_places(out, size),
            num_kv_heads, group, head_dim, seq_q, 0, seq_k, address(lengths), address(scratch), floats, units, parts,
            scale, softcap,
        ),
        np.uint8,
    )  # fmt: skip
    run_parts(HEADS(element), parts, address(record))


def _places(a: Any, size: int) -> tuple[int, int, int, int]:
    """Address, and distances between sequences, rows and heads in elements."""
    sequence, row, head, _ = a.strides
    return address(a), sequence // size, row // size, head // size

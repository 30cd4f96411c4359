"""o[i] = sum_j softmax_j(scale * q[i].k[j] + mask[i,j]) v[j], one tile of queries at a time.

The running maximum m, sum l and output o of every query are rescaled as tiles of keys go by (Milakov and
Gimelshein 2018; Dao 2023, "FlashAttention-2"), so no score matrix exists. Per thread, the scratch holds
one tile of queries, of keys, of values and of scores; nothing in it depends on the sequence lengths.

Within a tile, 16 queries are the lanes of a vector: s^T[j, :] = sum_d k[j,d] q^T[d, :] with the query tile
transposed once. A query's maximum and sum then never cross lanes, and p^T[j, i] is at hand, element by
element, for o[i, :] += p^T[j, i] v[j, :], where lanes are head dimensions and nothing is transposed.

Packed sequences and padded ones differ in where a sequence begins, and in nothing else.

Keys no query of the tile sees are never read. Keys that only some see cost what is seen, in blocks of 8.
A key's value that is not finite reaches the queries that see the key and no others.
"""

from __future__ import annotations

from functools import partial
from math import ceil
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numba import carray, types
from numpy.typing import NDArray

from . import params
from ._atomics import atomic_add
from ._jit import cpu_inline, cpu_kernel
from ._parts import part_kernel, pointer, pointer_like, record_at, run_parts
from ._pool import num_threads
from .arrays import address, floats_at, longs_at
from .attention_few_queries import MOST_QUERIES, attention_few_queries, cap_scores
from .simd import (
    element,
    vadd,
    vblock,
    vfma,
    vlanes,
    vload,
    vload_keep,
    vload_n,
    vmax,
    vmul,
    vselect_less,
    vsplat,
    vstore,
    vstore_n,
    vsub,
    vsum,
    vtranspose,
    wide_registers,
)
from .simd_math import vexp_narrow

# 128 queries share a copied tile of 64 keys: 5 to 10% faster at 2048 tokens than 64; 192 gain nothing.
QUERY_TILE = 128
KEY_TILE = 64

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_MINUS_INF = np.float32(-np.inf)
_LOWEST = np.finfo(np.float32).min
# A weight or a rescaling that underflows is still positive: an infinite value it multiplies stays infinite.
_TINY = np.finfo(np.float32).tiny
_NO_LIMIT = 1 << 40
_ADDED, _KEPT = 1, 2  # kinds of masks
_ATTENTION, _SEQUENCE = params.ATTENTION.dtype, params.SEQUENCE.dtype
_WORDS = _ATTENTION.itemsize // 8


@cpu_inline(inline=False)
def _matmul(rows, vectors, add, depth, buf, a0, a_row, a_step, b0, b_step, c0, c_row):
    """c[r, :] (+)= sum_t a[r, t] b[t, :] in `buf`: a multiple of 8 rows, 16 * `vectors` columns."""
    v = 0
    if wide_registers():
        while vectors - v >= 4:
            for r in range(0, rows, 4):
                a, b, c = a0 + r * a_row, b0 + 16 * v, c0 + r * c_row + 16 * v
                vblock(4, 4, add, depth, buf, a, a_row, a_step, buf, b, b_step, buf, c, c_row)
            v += 4
        for r in range(0, rows, 8):
            a, b, c = a0 + r * a_row, b0 + 16 * v, c0 + r * c_row + 16 * v
            if vectors - v == 3:
                vblock(8, 3, add, depth, buf, a, a_row, a_step, buf, b, b_step, buf, c, c_row)
            elif vectors - v == 2:
                vblock(8, 2, add, depth, buf, a, a_row, a_step, buf, b, b_step, buf, c, c_row)
            elif vectors - v == 1:
                vblock(8, 1, add, depth, buf, a, a_row, a_step, buf, b, b_step, buf, c, c_row)
    else:
        for r in range(0, rows, 4):
            for v in range(vectors):
                a, b, c = a0 + r * a_row, b0 + 16 * v, c0 + r * c_row + 16 * v
                vblock(4, 1, add, depth, buf, a, a_row, a_step, buf, b, b_step, buf, c, c_row)


@cpu_inline(inline=False)
def _copy_rows(source, start, row, rows, padded_rows, head_dim, buf, buf_at, width, factor):
    """Rows of q, k or v as float32 times `factor`, zeros where padded. Returns whether all are finite."""
    zero = vsplat(_ZERO)
    nonfinite = zero  # 0 * x is NaN where x is not finite
    f = vsplat(factor)
    whole = head_dim // 16 * 16
    for r in range(rows):
        for d in range(0, whole, 16):
            x = vload(source, start + r * row + d)
            nonfinite = vfma(x, zero, nonfinite)
            vstore(buf, buf_at + r * width + d, vmul(x, f))
        if whole < head_dim:
            x = vload_n(source, start + r * row + whole, head_dim - whole)
            nonfinite = vfma(x, zero, nonfinite)
            vstore(buf, buf_at + r * width + whole, vmul(x, f))
    for i in range(buf_at + rows * width, buf_at + padded_rows * width, 16):
        vstore(buf, i, zero)
    return vsum(nonfinite) == _ZERO


@cpu_inline
def _add_bias(bias, start, query_stride, key_stride, buf, scores, queries, keys, tile, spare):
    """s^T[j, i] += bias[i, j]. `spare` is the offset of room for 256 floats."""
    if query_stride == 0:
        for j in range(keys):
            x = vsplat(element(bias, start + j * key_stride))
            for i in range(scores + j * tile, scores + (j + 1) * tile, 16):
                vstore(buf, i, vadd(vload(buf, i), x))
        return
    for i0 in range(0, queries, 16):
        for j0 in range(0, keys, 16):
            corner = start + i0 * query_stride + j0 * key_stride
            scores_at = scores + j0 * tile + i0
            if key_stride == 1 and i0 + 16 <= queries and j0 + 16 <= keys:
                vtranspose(bias, corner, query_stride, buf, spare, 16)
                for j in range(16):
                    x = vload(buf, spare + 16 * j)
                    vstore(buf, scores_at + j * tile, vadd(vload(buf, scores_at + j * tile), x))
            else:
                for i in range(min(16, queries - i0)):
                    for j in range(min(16, keys - j0)):
                        buf[scores_at + j * tile + i] += element(
                            bias, corner + i * query_stride + j * key_stride
                        )


@cpu_inline
def _hide(keep, start, query_stride, key_stride, buf, scores, queries, keys, tile, spare):
    """s^T[j, i] = -inf where keep[i, j] is False. `spare` is the offset of room for 512 floats."""
    hidden = vsplat(_MINUS_INF)
    if query_stride == 0:
        for j in range(keys):
            if not element(keep, start + j * key_stride):
                for i in range(scores + j * tile, scores + (j + 1) * tile, 16):
                    vstore(buf, i, hidden)
        return
    for i0 in range(0, queries, 16):
        for j0 in range(0, keys, 16):
            corner = start + i0 * query_stride + j0 * key_stride
            scores_at = scores + j0 * tile + i0
            if key_stride == 1 and i0 + 16 <= queries and j0 + 16 <= keys:
                for i in range(16):
                    vstore(buf, spare + 256 + 16 * i, vload_keep(keep, corner + i * query_stride))
                vtranspose(buf, spare + 256, 16, buf, spare, 16)
                for j in range(16):
                    kept = vload(buf, spare + 16 * j)
                    x = vselect_less(vsplat(_ZERO), kept, vload(buf, scores_at + j * tile), hidden)
                    vstore(buf, scores_at + j * tile, x)
            else:
                for i in range(min(16, queries - i0)):
                    for j in range(min(16, keys - j0)):
                        if not element(keep, corner + i * query_stride + j * key_stride):
                            buf[scores_at + j * tile + i] = _MINUS_INF


@cpu_inline
def _add_nonfinite_values(buf, scores, tile, values, width, keys, head_dim, output):
    """o[i, d] += p[i, j] v[j, d] for the values that are not finite, which then become 0."""
    for j in range(keys):
        for d in range(head_dim):
            x = buf[values + j * width + d]
            if not np.isfinite(x):
                for i in range(tile):
                    p = buf[scores + j * tile + i]
                    if p != _ZERO:
                        buf[output + i * width + d] += p * x
                buf[values + j * width + d] = _ZERO


@cpu_inline
def _softmax_step(buf, scores, tile, i, start, stop, low, high, partial, finite, top, total, shrink):
    """One tile of keys for the 16 queries from `i` on: scores become weights, maximum and sum move on.

    Returns whether a maximum grew; then what has been summed up so far counts `shrink` times.
    """
    old = vload(buf, top + i)
    new = old
    for at in range(scores + start * tile + i, scores + stop * tile + i, tile):
        x = vload(buf, at)
        if partial:
            j = (at - scores) // tile
            x = vlanes(x, j - high - i, j - low - i + 1, _MINUS_INF)
            vstore(buf, at, x)
        new = vmax(x, new)
    factor = vexp_narrow(vsub(old, new))
    sums = vmul(vload(buf, total + i), factor)
    for at in range(scores + start * tile + i, scores + stop * tile + i, tile):
        x = vload(buf, at)
        p = vexp_narrow(vsub(x, new))
        if not finite:
            p = vselect_less(vsplat(_MINUS_INF), x, vmax(p, vsplat(_TINY)), p)
        sums = vadd(sums, p)
        vstore(buf, at, p)
    vstore(buf, top + i, new)
    vstore(buf, total + i, sums)
    vstore(buf, shrink + i, vmax(factor, vsplat(_TINY)))
    return vsum(vselect_less(old, new, vsplat(_ONE), vsplat(_ZERO))) != _ZERO


@cpu_inline
def _keys_seen(first, queries, length, off, left, right):
    """The keys, from .. to, that any of `queries` queries from `first` on sees."""
    start = max(0, first + off - left) if left >= 0 else 0
    stop = min(length, first + queries + off + right) if right >= 0 else length
    return start, stop


@cpu_kernel
def _schedule(addresses, strides, mask_strides, cu_q, cu_k, lengths, shape, options, scale, softcap, scratch):
    """What there is to do: the `params.ATTENTION` that `_tiles` reads, and the arrays that it points to.

    Parameters
    ----------
    addresses : of q, k, v, out, the mask that is added, the mask that keeps, and lse
    strides : in bytes, of sequences, rows, heads and elements of q, k, v and out in turn, then bytes of an element
    mask_strides : in elements
    shape : batch, seq_q, num_heads, seq_k, heads of a group, head_dim
    options : left, right, kind of mask

    Returns
    -------
    params_at : address of the struct
    memory, sequences, tasks : arrays that must live as long as it is used. Tasks are (sequence * num_heads + head) *
        max_tiles + tile, the costliest first; `max_tiles` is the number of tiles of the longest sequence
    """
    batch, seq_q, num_heads, seq_k, group, head_dim = shape
    left, right, mask_kind = options
    sequences = np.empty(batch, _SEQUENCE)
    max_tiles = 1
    count = 0
    for b in range(batch):
        start_q, queries, start_k, keys = 0, seq_q, 0, seq_k
        if cu_q.size:
            start_q, queries = cu_q[b], cu_q[b + 1] - cu_q[b]
            start_k, keys = cu_k[b], cu_k[b + 1] - cu_k[b]
        # tiles of equal size: a full one and a small rest would share the work of two threads badly
        tiles = (queries + QUERY_TILE - 1) // QUERY_TILE
        s = sequences[b]
        s.first_query, s.first_key, s.queries = start_q, start_k, queries
        s.keys = min(keys, lengths[b]) if lengths.size else keys
        s.offset = keys - queries
        s.tile = (queries + 16 * tiles - 1) // (16 * tiles) * 16 if tiles else 16
        max_tiles = max(max_tiles, tiles)
        count += tiles
    # Buckets by the logarithm of the cost, four to a doubling; within one, neighbours share keys and values.
    starts = np.zeros(257, np.int64)
    buckets = np.empty(count, np.int64)
    at = 0
    for b in range(batch):
        s = sequences[b]
        for first in range(0, s.queries, s.tile):
            queries = min(s.tile, s.queries - first)
            start, stop = _keys_seen(first, queries, s.keys, s.offset, left, right)
            buckets[at] = 255 - min(255, int(4.0 * np.log2(1.0 + queries * max(0, stop - start))))
            starts[buckets[at] + 1] += num_heads
            at += 1
    for i in range(256):
        starts[i + 1] += starts[i]
    tasks = np.empty(count * num_heads, np.int64)
    at = 0
    for b in range(batch):
        s = sequences[b]
        tiles = (s.queries + s.tile - 1) // s.tile
        for h in range(num_heads):
            for t in range(tiles):
                bucket = buckets[at + t]
                tasks[starts[bucket]] = (b * num_heads + h) * max_tiles + t
                starts[bucket] += 1
        at += tiles
    memory = np.zeros(_WORDS + 1, np.int64)
    params_at = memory.ctypes.data
    p = record_at(params_at, _ATTENTION)
    p.counter = params_at + 8 * _WORDS
    p.q, p.k, p.v, p.out, p.bias, p.keep, p.lse = addresses
    size = strides[16]
    p.q_sequence, p.q_row, p.q_head = strides[0] // size, strides[1] // size, strides[2] // size
    p.k_sequence, p.k_row, p.k_head = strides[4] // size, strides[5] // size, strides[6] // size
    p.v_sequence, p.v_row, p.v_head = strides[8] // size, strides[9] // size, strides[10] // size
    p.out_sequence, p.out_row, p.out_head = strides[12] // size, strides[13] // size, strides[14] // size
    p.mask_kind = mask_kind
    p.mask_sequence, p.mask_head, p.mask_query, p.mask_key = mask_strides
    p.lse_sequence, p.lse_head = 0 if cu_q.size else num_heads * seq_q, seq_q
    p.batch, p.num_heads, p.group, p.head_dim, p.left, p.right = (
        batch,
        num_heads,
        group,
        head_dim,
        left,
        right,
    )
    p.sequences, p.tasks, p.num_tasks, p.max_tiles = (
        sequences.ctypes.data,
        tasks.ctypes.data,
        tasks.size,
        max_tiles,
    )
    p.scratch, p.scratch_stride = scratch.ctypes.data, scratch.shape[1]
    p.scale, p.softcap = np.float32(scale), np.float32(softcap)
    return params_at, memory, sequences, tasks


def _tiles(part, p, like):
    """Tiles of queries, until none is left to claim. `part` is this thread's row of the scratch."""
    q = carray(pointer_like(p.q, like), 1)
    k = carray(pointer_like(p.k, like), 1)
    v = carray(pointer_like(p.v, like), 1)
    out = carray(pointer_like(p.out, like), 1)
    bias, lse = floats_at(p.bias), floats_at(p.lse)
    keep = carray(pointer(p.keep), 1, np.bool_)
    q_sequence, q_row, q_head = p.q_sequence, p.q_row, p.q_head
    k_sequence, k_row, k_head = p.k_sequence, p.k_row, p.k_head
    v_sequence, v_row, v_head = p.v_sequence, p.v_row, p.v_head
    out_sequence, out_row, out_head = p.out_sequence, p.out_row, p.out_head
    mask_kind, mask_sequence, mask_head = p.mask_kind, p.mask_sequence, p.mask_head
    mask_query, mask_key = p.mask_query, p.mask_key
    num_heads, group, head_dim, left, right = p.num_heads, p.group, p.head_dim, p.left, p.right
    count, max_tiles, scale = p.num_tasks, p.max_tiles, p.scale
    sequences = carray(pointer(p.sequences), p.batch, _SEQUENCE)
    tasks = longs_at(p.tasks)
    buf = floats_at(p.scratch + 4 * p.scratch_stride * part)
    counter = longs_at(p.counter)
    width = (head_dim + 15) // 16 * 16
    # Threads take the next tile when they are done with one: tiles differ in size, and cores in what else they do.
    while True:
        turn = atomic_add(counter, 0, np.int64(1))
        if turn >= count:
            break
        task = tasks[turn]
        b = task // (num_heads * max_tiles)
        h = task // max_tiles % num_heads
        s = sequences[b]
        first = task % max_tiles * s.tile
        queries = min(s.tile, s.queries - first)
        length, off = s.keys, s.offset
        q0 = b * q_sequence + (s.first_query + first) * q_row + h * q_head
        k0 = b * k_sequence + s.first_key * k_row + h // group * k_head
        v0 = b * v_sequence + s.first_key * v_row + h // group * v_head
        out0 = b * out_sequence + (s.first_query + first) * out_row + h * out_head
        mask0 = b * mask_sequence + h * mask_head + first * mask_query
        lse0 = b * p.lse_sequence + h * p.lse_head + s.first_query + first
        tile = (queries + 15) // 16 * 16
        transposed = 0
        output = transposed + width * tile
        top = output + width * tile
        total = top + tile
        shrink = total + tile
        keys0 = shrink + tile
        values = keys0 + KEY_TILE * width
        scores = values + KEY_TILE * width
        spare = scores + KEY_TILE * tile

        # The query tile, scaled and then transposed, passes through the room of the output.
        _copy_rows(q, q0, q_row, queries, tile, head_dim, buf, output, width, scale)
        for i in range(0, tile, 16):
            for d in range(0, width, 16):
                vtranspose(buf, output + i * width + d, width, buf, transposed + d * tile + i, tile)
        for i in range(output, output + tile * width, 16):
            vstore(buf, i, vsplat(_ZERO))
        for i in range(0, tile, 16):
            vstore(buf, top + i, vsplat(_LOWEST))
            vstore(buf, total + i, vsplat(_ZERO))

        first_key, last_key = _keys_seen(first, queries, length, off, left, right)
        for j0 in range(first_key, last_key, KEY_TILE):
            keys = min(KEY_TILE, last_key - j0)
            # Query first + i sees key j0 + j when i + low <= j <= i + high.
            low = first + off - left - j0 if left >= 0 else -_NO_LIMIT
            high = first + off + right - j0 if right >= 0 else _NO_LIMIT
            partial = high < keys - 1 or low + queries > 1
            padded = (keys + 7) // 8 * 8
            _copy_rows(k, k0 + j0 * k_row, k_row, keys, padded, head_dim, buf, keys0, width, _ONE)
            finite = _copy_rows(v, v0 + j0 * v_row, v_row, keys, keys, head_dim, buf, values, width, _ONE)

            for j in range(0, padded, 8):
                # vectors of queries that all come before key j
                hidden = min(max(0, (j - high) // 16), tile // 16)
                ks, qs, at = keys0 + j * width, transposed + 16 * hidden, scores + j * tile + 16 * hidden
                _matmul(8, tile // 16 - hidden, False, head_dim, buf, ks, width, 1, qs, tile, at, tile)
            if p.softcap != _ZERO:
                cap_scores(buf, scores, scores + keys * tile, p.softcap)
            mask_at = mask0 + j0 * mask_key
            if mask_kind == _ADDED:
                _add_bias(bias, mask_at, mask_query, mask_key, buf, scores, queries, keys, tile, spare)
            elif mask_kind == _KEPT:
                _hide(keep, mask_at, mask_query, mask_key, buf, scores, queries, keys, tile, spare)

            for i in range(0, tile, 16):
                start, stop = 0, keys
                if partial and finite:
                    start, stop = max(0, i + low), min(keys, i + 16 + high)
                if _softmax_step(
                    buf, scores, tile, i, start, stop, low, high, partial, finite, top, total, shrink
                ):
                    for r in range(i, i + 16):
                        f = vsplat(buf[shrink + r])
                        for d in range(output + r * width, output + (r + 1) * width, 16):
                            vstore(buf, d, vmul(vload(buf, d), f))

            if not finite:
                _add_nonfinite_values(buf, scores, tile, values, width, keys, head_dim, output)
            for i in range(0, queries, 8):
                start, stop = 0, keys
                if partial:
                    start, stop = max(0, i + low), min(keys, i + 8 + high)
                if start < stop:
                    ps, vs, at = scores + start * tile + i, values + start * width, output + i * width
                    _matmul(8, width // 16, True, stop - start, buf, ps, 1, tile, vs, width, at, width)

        whole = head_dim // 16 * 16
        for i in range(queries):
            weight = buf[total + i]
            f = vsplat(_ONE / weight if weight != _ZERO else _ZERO)
            for d in range(0, whole, 16):
                vstore(out, out0 + i * out_row + d, vmul(vload(buf, output + i * width + d), f))
            if whole < head_dim:
                x = vmul(vload(buf, output + i * width + whole), f)
                vstore_n(out, out0 + i * out_row + whole, x, head_dim - whole)
        if p.lse != 0:
            for i in range(queries):
                lse[lse0 + i] = np.float64(buf[top + i]) + np.log(np.float64(buf[total + i]))


_tiles_of = part_kernel(_tiles, _ATTENTION)
#: how a dtype's elements are stored
_ELEMENTS = {
    np.dtype(np.float32): types.float32,
    np.dtype(np.float16): types.uint16,
    np.dtype(ml_dtypes.bfloat16): types.int16,
}


_NONE = np.empty(0, np.int64)


def attention(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    causal: bool,
    scale: float,
    mask: NDArray[Any] | None,
    lengths: NDArray[Any] | None,
    window: tuple[int, int],
    out: NDArray[Any],
    workspace: Any,
    cu_seqlens: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
    lse: NDArray[np.float32] | None = None,
    softcap: float = 0.0,
) -> None:
    """o[i] = sum_j softmax_j(scale * q[i].k[j] + mask[i,j]) v[j] over the keys j that query i may see.

    Parameters
    ----------
    q, out : (batch, seq_q, num_heads, head_dim) float32/float16/bfloat16; last axis contiguous
    k, v : (batch, seq_k, num_kv_heads, head_dim), dtype of q; last axis contiguous
    causal : query i sees keys up to i + seq_k - seq_q, instead of what `window`'s right side says
    scale : factor of the scores
    mask : (batch, num_heads, seq_q, seq_k) of any strides, float32 (added) or bool (True: attend), or None
    lengths : (batch,) int64, keys from there on are not seen, or None
    window : (left, right), -1 for no limit: query i sees keys i + off - left .. i + off + right, where
        off = seq_k - seq_q
    workspace : object with `get(name, shape, dtype)`, or None to allocate
    cu_seqlens : (batch + 1,) int64 twice: sequence b has queries cu_q[b] .. cu_q[b + 1] and keys cu_k[b] ..
        cu_k[b + 1]; then q and out are (total_q, num_heads, head_dim), k and v (total_k, num_kv_heads,
        head_dim), `lengths` is None, and `mask` (batch, num_heads, rows, columns)
    lse : receives ln sum_j exp(scale * q[i].k[j] + mask[i,j]), -inf where nothing is seen; (batch, num_heads,
        seq_q) float32, packed (num_heads, total_q), C-contiguous
    softcap : c > 0: c tanh(s / c) in the place of s = scale * q[i].k[j]; 0: none
    """
    num_heads = q.shape[-2]
    seq_q, seq_k = q.shape[-3], k.shape[-3]
    if 0 in q.shape:
        return
    if seq_k == 0:
        out[...] = 0
        if lse is not None:
            lse[...] = -np.inf
        return
    few = num_heads // k.shape[-2] * seq_q <= MOST_QUERIES
    # a causal query at the end of its keys sees all of them
    sees_all = window[0] < 0 and (seq_q == 1 if causal else window[1] < 0)
    if few and sees_all and cu_seqlens is mask is lse is None:
        attention_few_queries(q, k, v, scale, lengths, out, workspace, _ELEMENTS[q.dtype], softcap)
        return
    kernel, parts, params_at, _kept = prepare(
        q, k, v, causal, scale, mask, lengths, window, out, workspace, cu_seqlens, lse, softcap
    )
    run_parts(kernel, parts, params_at)


class Prepared(NamedTuple):
    """A call of the tiles' kernel: `run_parts(kernel, parts, params_at)`.

    Attributes
    ----------
    params_at : address of its `params.ATTENTION`, whose `counter` must be 0
    kept : what must live until then
    """

    kernel: int
    parts: int
    params_at: int
    kept: tuple[Any, ...]


def prepare(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    causal: bool,
    scale: float,
    mask: NDArray[Any] | None,
    lengths: NDArray[Any] | None,
    window: tuple[int, int],
    out: NDArray[Any],
    workspace: Any,
    cu_seqlens: tuple[NDArray[np.int64], NDArray[np.int64]] | None,
    lse: NDArray[np.float32] | None = None,
    softcap: float = 0.0,
) -> Prepared:
    """The call that computes `attention` of arrays with elements."""
    num_heads, head_dim = q.shape[-2:]
    seq_q, seq_k = q.shape[-3], k.shape[-3]
    if cu_seqlens is None:
        batch, (cu_q, cu_k) = q.shape[0], (_NONE, _NONE)
        tile = ceil(seq_q / ceil(seq_q / QUERY_TILE) / 16) * 16
        packed: tuple[int, ...] = ()
    else:
        cu_q, cu_k = cu_seqlens
        batch = cu_q.size - 1
        tile = min(QUERY_TILE, ceil(seq_q / 16) * 16)
        packed = (0,)  # the rows say where a sequence is
    width = ceil(head_dim / 16) * 16
    size = 2 * width * tile + 3 * tile + KEY_TILE * (2 * width + tile) + 512
    get = np.empty if workspace is None else partial(workspace.get, "attention")
    scratch = get((num_threads(), size), np.float32)
    keeps = mask is not None and mask.dtype == bool
    mask_strides = (0, 0, 0, 0) if mask is None else tuple(s // mask.itemsize for s in mask.strides)
    left, right = window
    # the struct holds the addresses of the arrays
    params_at, *arrays = _schedule(
        (
            *map(address, (q, k, v, out)),
            0 if keeps else address(mask),
            address(mask) if keeps else 0,
            address(lse),
        ),
        (*packed, *q.strides, *packed, *k.strides, *packed, *v.strides, *packed, *out.strides, q.itemsize),
        mask_strides,
        cu_q,
        cu_k,
        _NONE if lengths is None else lengths,
        (batch, seq_q, num_heads, seq_k, num_heads // k.shape[-2], head_dim),
        (
            left,
            0 if causal else right,
            0 if mask is None else _KEPT if keeps else _ADDED,
        ),
        float(scale),
        float(softcap),
        scratch,
    )
    return Prepared(_tiles_of(_ELEMENTS[q.dtype]), scratch.shape[0], params_at, (*arrays, scratch))

"""attention: o[i] = sum_j softmax_j(scale * q[i].k[j] + mask[i,j]) v[j] over the keys j that query i sees."""

from __future__ import annotations

from math import log
from typing import Any

import numpy as np

from . import attention_wgmma
from ._execute import run
from ._launch import SUFFIX, Launch, aligned, ceil_div
from ._params import ATTENTION
from .attention_wgmma import Tile

_CHUNK = 16  # bytes of a copy
_MAX_LENGTH = 2**31 - 1024  # queries or keys: the kernels count them, and tiles of them, in 32 bits
_LOG2_E = 1 / log(2)
_MAX_BATCH = 65535  # of the grid's second side

# how scores are masked: MASK_... of attention.cuh
_NONE, _SCALED, _ADDED, _KEEP = range(4)
_ALIGNED_INPUT, _ALIGNED_OUTPUT = 1, 2


def _halves(head_dim: int, queries: int, keys: int) -> Tile:
    return Tile(queries, keys, (queries + 2 * keys) * head_dim * 2)


def _floats(head_dim: int, queries: int, keys: int) -> Tile:
    return Tile(queries, keys, 4 * ((queries + 2 * keys) * head_dim + queries * (keys + 4)))


#: The kernels by the most values of a row that they take: a head_dim between two takes the wider one.
HALVES = {d: _halves(d, *tile) for d, tile in {32: (128, 64), 64: (128, 64), 96: (128, 64)}.items()}
HALVES |= {128: _halves(128, 128, 48), 256: _halves(256, 64, 32)}
FLOATS = {d: _floats(d, *tile) for d, tile in {32: (64, 64), 64: (64, 48), 96: (64, 32)}.items()}
FLOATS |= {128: _floats(128, 48, 32), 256: _floats(256, 24, 16)}


def _rows_aligned(*arrays: Any) -> bool:
    """Whether every row of every array is whole chunks at multiples of a chunk."""
    return all(
        aligned(a, to=_CHUNK)
        and a.shape[-1] * a.itemsize % _CHUNK == 0
        and all(s % _CHUNK == 0 or n == 1 for s, n in zip(a.strides[:-1], a.shape[:-1], strict=True))
        for a in arrays
    )


def _strides(name: str, array: Any) -> dict[str, int]:
    """Of batch, row and head, in elements; packed sequences are of one batch."""
    steps = array.strides[:3] if array.ndim == 4 else (0, *array.strides[:2])
    return {
        f"{name}_{axis}_stride": step // array.itemsize
        for axis, step in zip(("batch", "row", "head"), steps, strict=True)
    }


def launches(
    q: Any,
    k: Any,
    v: Any,
    causal: bool,
    scale: float,
    mask: Any,
    lengths: Any,
    window: tuple[int, int],
    out: Any,
    cu_seqlens: tuple[Any, Any] | None = None,
    lse: Any = None,
    softcap: float = 0.0,
) -> tuple[Launch, ...]:
    """The launch of `attention`, from shapes, strides, dtypes and addresses."""
    seq_q, num_heads, head_dim = q.shape[-3:]
    seq_k, num_kv_heads = k.shape[-3:-1]
    cu_q, cu_k = (None, None) if cu_seqlens is None else cu_seqlens
    batch = q.shape[0] if cu_q is None else cu_q.shape[0] - 1
    tiles = FLOATS if q.itemsize == 4 else HALVES
    if head_dim > max(tiles):
        raise ValueError(f"head_dim={head_dim} is not supported on the GPU; use 1 to {max(tiles)}")
    if max(seq_q, seq_k) > _MAX_LENGTH:
        raise ValueError(
            f"{seq_q} queries and {seq_k} keys: the GPU kernels take up to {_MAX_LENGTH} of each"
        )
    left, right = window
    if mask is not None:
        kind, factor = _KEEP if mask.dtype == np.bool_ else _ADDED, scale
    elif not softcap and scale * _LOG2_E >= np.finfo(np.float32).tiny:
        kind, factor = _NONE, scale * _LOG2_E
    else:
        kind, factor = _SCALED, scale
    alignment = _ALIGNED_INPUT * _rows_aligned(q, k, v) + _ALIGNED_OUTPUT * _rows_aligned(out)
    op = "attention"
    if kind == _NONE and alignment == _ALIGNED_INPUT | _ALIGNED_OUTPUT and attention_wgmma.runs(q):
        op, tiles = "attention_wgmma", attention_wgmma.TILES
    width = next(d for d in tiles if head_dim <= d)
    tile = tiles[width]
    mask_strides = (0, 0, 0, 0) if mask is None else mask.strides
    params = ATTENTION.fill(
        q=q,
        k=k,
        v=v,
        out=out,
        mask=mask,
        lengths=lengths,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        lse=lse,
        **_strides("q", q),
        **_strides("k", k),
        **_strides("v", v),
        **_strides("out", out),
        mask_batch_stride=mask_strides[0],
        mask_head_stride=mask_strides[1],
        mask_row_stride=mask_strides[2],
        mask_key_stride=mask_strides[3],
        batch=batch,
        num_heads=num_heads,
        group=num_heads // num_kv_heads,
        seq_q=seq_q,
        seq_k=seq_k,
        head_dim=head_dim,
        scale=factor,
        window_left=min(left, _MAX_LENGTH),
        window_right=0 if causal else min(right, _MAX_LENGTH),
        mask_kind=kind,
        mask_queries=0 if mask is None else mask.shape[2],
        alignment=alignment,
        capped=int(softcap > 0),
        softcap=softcap,
        cap_unit=2 * _LOG2_E / softcap if softcap else 0.0,
    )
    if cu_q is None:
        rows = min(batch, _MAX_BATCH)
        grid = (ceil_div(seq_q, tile.queries) * num_heads, rows, ceil_div(batch, rows))
    else:
        grid = ((seq_q // tile.queries + batch) * num_heads, 1, 1)
    entry = f"{op}_{SUFFIX[q.dtype]}_{width}"
    return (Launch(op, entry, grid, (tile.threads, 1, 1), params, tile.shared),)


def attention(
    q: Any,
    k: Any,
    v: Any,
    causal: bool,
    scale: float,
    mask: Any,
    lengths: Any,
    window: tuple[int, int],
    out: Any,
    workspace: Any,
    cu_seqlens: tuple[Any, Any] | None = None,
    lse: Any = None,
    softcap: float = 0.0,
) -> None:
    """Write attention of `q` over `k` and `v` to `out`.

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
    workspace : not needed
    cu_seqlens : (batch + 1,) int64 twice: sequence b has queries cu_q[b] .. cu_q[b + 1] and keys cu_k[b] ..
        cu_k[b + 1]; then q and out are (total_q, num_heads, head_dim), k and v (total_k, num_kv_heads,
        head_dim), `lengths` is None, and `mask` (batch, num_heads, rows, columns). Their values are not read on
        the host before the kernel runs,
        which takes them as if cut to the rows there are
    lse : receives ln sum_j exp(scale * q[i].k[j] + mask[i,j]), -inf where nothing is seen; (batch, num_heads,
        seq_q) float32, packed (num_heads, total_q), C-contiguous
    softcap : c > 0: c tanh(s / c) in the place of s = scale * q[i].k[j]; 0: none. Kernels are compiled with it or
        without
    """
    if 0 in q.shape:
        return
    if k.shape[-3] == 0:
        out[...] = 0
        if lse is not None:
            lse[...] = -np.inf
        return
    run(*launches(q, k, v, causal, scale, mask, lengths, window, out, cu_seqlens, lse, softcap))

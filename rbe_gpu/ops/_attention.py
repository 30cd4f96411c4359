"""attention over padded or packed sequences."""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np

from ..blocks import Array
from ..dispatch import Backend, backend_of, module_of
from ..workspace import Workspace
from ._checks import check_float, check_shape, int64_cu_seqlens, int64_lengths, op, output, scratch_of


@op
def attention(
    q: Array,
    k: Array,
    v: Array,
    causal: bool = False,
    scale: float | None = None,
    mask: Array | None = None,
    lengths: Array | None = None,
    window: tuple[int, int] | None = None,
    out: Array | None = None,
    workspace: Workspace | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    return_lse: bool = False,
    softcap: float | None = None,
) -> Any:
    """o[i] = sum_j softmax_j(scale * q[i].k[j] + mask[i,j]) v[j], in O(seq) memory.

    With off = seq_k - seq_q, query i sees key j when j < lengths[batch], j <= i + off if `causal`, and
    i + off - left <= j <= i + off + right for `window=(left, right)`, -1 being no limit (FlashAttention's
    conventions). A query that sees no key gives zeros.

    Sequences of different lengths may be packed end to end, without padding: sequence b has the queries
    cu_seqlens_q[b] to cu_seqlens_q[b + 1] - 1, and its keys correspondingly (FlashAttention's varlen convention).
    seq_q and seq_k are then those of each sequence.

    Parameters
    ----------
    q : (batch, seq_q, num_heads, head_dim); the last axis contiguous, the others of any stride. Packed:
        (total_q, num_heads, head_dim)
    k, v : (batch, seq_k, num_kv_heads, head_dim), dtype of q; num_heads is a multiple of num_kv_heads
        (1: multi-query, fewer than num_heads: grouped-query attention). Packed: (total_k, num_kv_heads, head_dim)
    scale : 1/sqrt(head_dim) by default
    mask : broadcastable to (batch, num_heads, seq_q, seq_k); float32 is added to the scores, bool keeps
        where True. Packed: to (batch, num_heads, rows, columns), with rows and columns for the longest sequence;
        query i and key j of every sequence read row i and column j. On a GPU that they are enough is not checked
    lengths : (batch,) integers, valid keys of each sequence, 0 to seq_k; on a GPU they are clamped, not checked
    cu_seqlens_q, cu_seqlens_k : (batch + 1,) int32/int64 from 0 to total_q and total_k, nondecreasing; by default
        cu_seqlens_k is cu_seqlens_q. Not with `lengths`. On a GPU they are not checked
    return_lse : also return the log-sum-exp of the scores
    softcap : c > 0: c tanh(scale * q[i].k[j] / c) in the place of scale * q[i].k[j], before the mask (Gemma 2)

    Returns
    -------
    Like q; with `return_lse` a pair (like q, lse): lse[b, h, i] = ln sum_j exp(scale * q[i].k[j] + mask[i,j]) over
    the keys that query i sees, -inf where it sees none, float32 (batch, num_heads, seq_q), packed (num_heads,
    total_q).

    Notes
    -----
    Scores are float32. One is off by at most head_dim 2^-24 scale sum_d |q[i,d] k[j,d]|, typically by 2^-24 of its
    own size, and a weight by e to that power: 6e-7 of it at scores of 10, 6e-4 at 10,000. No later step makes it
    larger, and none can mend it. Scores above 3.4e38 are infinite, and give NaN.

    References
    ----------
    Dao 2023, "FlashAttention-2"; Milakov and Gimelshein 2018, "Online normalizer calculation for softmax".
    """
    backend = backend_of(
        q=q,
        k=k,
        v=v,
        mask=mask,
        lengths=lengths,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        out=out,
    )
    check_float(q=q)
    axes = ("batch", "seq", "heads", "head_dim") if cu_seqlens_q is None else ("total", "heads", "head_dim")
    for name, a in (("q", q), ("k", k), ("v", v)):
        if a.ndim != len(axes):
            raise ValueError(f"{name} has {a.ndim} axes, needs ({', '.join(axes)})")
        if a.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {a.dtype}, q has {q.dtype}; use one dtype")
        if a.size and a.shape[-1] > 1 and a.strides[-1] != a.itemsize:
            module = module_of(a).__name__
            raise ValueError(f"{name}'s last axis is not contiguous; pass {module}.ascontiguousarray({name})")
    *lead, seq_q, num_heads, head_dim = q.shape
    seq_k, num_kv_heads = k.shape[-3:-1]
    check_shape("k", k, (*lead, seq_k, num_kv_heads, head_dim), "batch and head_dim of q")
    check_shape("v", v, k.shape, "the shape of k")
    if not 1 <= head_dim <= 256:
        raise ValueError(f"head_dim={head_dim} is not supported; use 1 to 256")
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_heads={num_heads} is not a multiple of num_kv_heads={num_kv_heads}")
    cu_seqlens = None
    if cu_seqlens_q is not None:
        if lengths is not None:
            raise ValueError("lengths is for padded sequences; packed ones have cu_seqlens_q")
        cu_seqlens = _packed_ends(backend, cu_seqlens_q, cu_seqlens_k, seq_q, seq_k)
    elif cu_seqlens_k is not None:
        raise ValueError("cu_seqlens_k is given without cu_seqlens_q; packed sequences need cu_seqlens_q")
    if mask is not None and cu_seqlens is None:
        mask = _scores_mask(backend, mask, (*lead, num_heads, seq_q, seq_k))
    elif mask is not None and cu_seqlens is not None:
        mask = _packed_mask(backend, mask, num_heads, cu_seqlens)
    if lengths is not None:
        lengths = int64_lengths(backend, lengths, lead[0], "seq_k", seq_k)
    left, right = (-1, -1) if window is None else (int(window[0]), int(window[1]))
    if left < -1 or right < -1:
        raise ValueError(f"window={window} is not valid; use (left, right), each -1 (no limit) or more")
    out = output(backend, out, q.shape, q.dtype)
    if softcap is not None and not 1e-6 <= softcap <= 1e6:
        raise ValueError(f"softcap={softcap} is not supported; use a number from 1e-6 to 1e6, or None")
    scale = 1.0 / sqrt(head_dim) if scale is None else float(scale)
    lse = backend.xp.empty((*lead, num_heads, seq_q), np.float32) if return_lse else None
    scratch = scratch_of(workspace, out)
    backend.attention(
        q, k, v, bool(causal), scale, mask, lengths, (left, right), out, scratch, cu_seqlens, lse,
        0.0 if softcap is None else float(softcap),
    )  # fmt: skip
    return out if lse is None else (out, lse)


def _packed_ends(
    backend: Backend, cu_seqlens_q: Array, cu_seqlens_k: Array | None, total_q: int, total_k: int
) -> tuple[Array, Array]:
    """cu_seqlens of queries and of keys, int64, checked."""
    cu_q = int64_cu_seqlens(backend, "cu_seqlens_q", cu_seqlens_q, "q", total_q)
    if cu_seqlens_k is not None:
        cu_k = int64_cu_seqlens(backend, "cu_seqlens_k", cu_seqlens_k, "k", total_k)
        check_shape("cu_seqlens_k", cu_k, cu_q.shape, "the shape of cu_seqlens_q")
        return cu_q, cu_k
    if total_k != total_q:
        raise ValueError(f"k has {total_k} rows, q has {total_q}; pass cu_seqlens_k too")
    return cu_q, cu_q


def _packed_mask(backend: Backend, mask: Array, num_heads: int, cu_seqlens: tuple[Array, Array]) -> Array:
    """`mask` broadcast to (batch, num_heads, rows, columns)."""
    if mask.ndim < 2:
        raise ValueError(f"mask has {mask.ndim} axes; packed sequences need (..., rows, columns)")
    mask = _scores_mask(backend, mask, (cu_seqlens[0].size - 1, num_heads, *mask.shape[-2:]))
    if backend.checks_values:
        _check_longest(mask, cu_seqlens)
    return mask


def _check_longest(mask: Array, cu_seqlens: tuple[Array, Array]) -> None:
    """Raise a ValueError unless a mask has rows and columns for the longest of packed sequences."""
    longest = tuple(int(np.diff(ends).max(initial=0)) for ends in cu_seqlens)
    if mask.shape[-2] < longest[0] or mask.shape[-1] < longest[1]:
        raise ValueError(
            f"mask has {mask.shape[-2]} rows and {mask.shape[-1]} columns, but the longest sequence has {longest[0]} "
            f"queries and {longest[1]} keys"
        )


def _scores_mask(backend: Backend, mask: Array, shape: tuple[int, ...]) -> Array:
    """`mask` broadcast to (batch, num_heads, seq_q, seq_k)."""
    if mask.dtype != np.float32 and mask.dtype != np.bool_:
        raise TypeError(f"mask has dtype {mask.dtype}; use float32 (added) or bool (True keeps)")
    try:
        return backend.xp.broadcast_to(mask, shape)
    except ValueError:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, which does not broadcast to (batch, num_heads, seq_q, "
            f"seq_k) = {shape}"
        ) from None

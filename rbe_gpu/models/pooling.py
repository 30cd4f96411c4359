"""Vectors of texts from their hidden states by ops alone, so that a GPU has nothing to wait for.

mean[b] = sum_j softmax_j(0) state[j] over the tokens of text b;  cls[b] = the state of its first token
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import ops
from ..blocks import Array
from ..workspace import Workspace


def pool_by_kernels(
    states: Array,
    lengths: Array | None,
    cu_seqlens: Array | None,
    modes: tuple[str, ...],
    num_heads: int,
    out: Array,
    ws: Workspace,
) -> None:
    """Write the modes ("mean", "cls") of every text side by side to `out`.

    Parameters
    ----------
    states : (batch, seq, hidden) with `lengths` (batch,) or None, or packed (tokens, hidden) with `cu_seqlens`
    num_heads : parts of `hidden` that the attention kernels take at once
    out : (batch, modes * hidden), dtype of states
    ws : where states are
    """
    if "max" in modes:
        raise ValueError("pooling by the maximum is not done by kernels; use embed or pool")
    batch, hidden = out.shape[0], states.shape[-1]
    for i, mode in enumerate(modes):
        target = out if len(modes) == 1 else ws.get("pooling.mode", (batch, hidden), out.dtype)
        if mode == "mean":
            _mean(states, lengths, cu_seqlens, num_heads, target, ws)
        else:
            ops.embedding(
                _first(states, cu_seqlens, ws), states.reshape(-1, hidden), out=target, workspace=ws
            )
        if target is not out:
            out.reshape(batch, len(modes), hidden)[:, i] = target


def _mean(
    states: Array, lengths: Array | None, cu_seqlens: Array | None, num_heads: int, out: Array, ws: Workspace
) -> None:
    """Attention with queries of zero gives every token the same weight."""
    batch, hidden = out.shape
    shape = (batch, hidden)
    zeros = ws.constant("pooling.zeros", (*shape, out.dtype), lambda: np.zeros(shape, out.dtype))
    lead = (batch, 1) if cu_seqlens is None else (batch,)
    query = zeros.reshape(*lead, num_heads, -1)
    x = states.reshape(*states.shape[:-1], num_heads, -1)
    places: dict[str, Any] = {"lengths": lengths}
    if cu_seqlens is not None:
        each = ws.constant("pooling.each", batch, lambda: np.arange(batch + 1))
        places = {"cu_seqlens_q": each, "cu_seqlens_k": cu_seqlens}
    ops.attention(query, x, x, scale=1.0, out=out.reshape(query.shape), workspace=ws, **places)


def _first(states: Array, cu_seqlens: Array | None, ws: Workspace) -> Array:
    """The row of each text's first token."""
    if cu_seqlens is not None:
        return cu_seqlens[:-1]
    batch, seq = states.shape[:2]
    found: Array = ws.constant("pooling.first", (batch, seq), lambda: np.arange(batch) * seq)
    return found


def normalize_by_kernels(vectors: Array, ws: Workspace) -> None:
    """v / ||v||, row by row in place; 0 stays 0. As v / sqrt(mean(v^2)) / sqrt(size)."""
    size = vectors.shape[-1]
    unit = ws.constant("pooling.unit", size, lambda: np.full(size, size**-0.5, np.float32))
    ops.rms_norm(vectors, unit, 1e-24 / size, out=vectors)

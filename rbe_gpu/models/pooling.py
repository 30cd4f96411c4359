"""Pooling: one vector per text from the hidden states of its tokens.

mean[b] = mean of the states of text b;  cls[b] = the state of its first token;  max[b] = their maximum, by column
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .. import ops
from ..blocks import Array
from ..dispatch import module_of
from ..workspace import Workspace


def cu_seqlens_of(lengths: NDArray[Any]) -> NDArray[np.int64]:
    """Where texts of these lengths begin and end when packed: (batch + 1,) from 0 to their sum."""
    ends = np.zeros(lengths.size + 1, np.int64)
    np.cumsum(lengths, out=ends[1:])
    return ends


def to_host(a: Any) -> Any:
    """A CuPy array as a NumPy array; any other value unchanged."""
    return a.get() if hasattr(a, "__cuda_array_interface__") and hasattr(a, "get") else a


def pool_into(
    states: Array,
    lengths: Array | None,
    cu_seqlens: Array | None,
    modes: tuple[str, ...],
    out: Array,
    ws: Workspace,
) -> None:
    """Write the pooled vectors of every text, one mode after the other, to `out`.

    Parameters
    ----------
    states : (batch, seq, hidden) with `lengths` (batch,) or None, or packed (tokens, hidden) with `cu_seqlens`
    modes : of "mean", "cls" and "max"; "max" reads lengths on the host
    out : (batch, modes * hidden), float32 or dtype of states
    ws : on the device of states
    """
    batch, hidden = out.shape[0], states.shape[-1]
    for i, mode in enumerate(modes):
        columns = out[:, i * hidden : (i + 1) * hidden]
        if mode == "max":
            _max(states, lengths, cu_seqlens, columns)
            continue
        dtype = out.dtype if mode == "mean" else states.dtype
        in_place = len(modes) == 1 and dtype == out.dtype
        vectors = out if in_place else ws.get("pooling", (batch, hidden), dtype)
        if mode == "mean":
            ops.mean_pool(states, lengths, cu_seqlens, out=vectors)
        elif states.size:
            first = _first_tokens(states, cu_seqlens, ws)
            ops.embedding(first, states.reshape(-1, hidden), out=vectors, workspace=ws)
        if not in_place:
            _assign(columns, vectors)


def _first_tokens(states: Array, cu_seqlens: Array | None, ws: Workspace) -> Array:
    """The row of each text's first token; any row for a text without tokens."""
    if cu_seqlens is not None:
        return module_of(states).minimum(cu_seqlens[:-1], len(states) - 1)
    batch, seq = states.shape[:2]
    rows: Array = ws.constants.get("pooling.first", (batch, seq), lambda: np.arange(batch) * seq)
    return rows


def _max(states: Array, lengths: Array | None, cu_seqlens: Array | None, out: Array) -> None:
    xp = module_of(states)
    if cu_seqlens is None:
        lengths = np.full(len(states), states.shape[1]) if lengths is None else to_host(lengths)
        texts = [text[:length] for text, length in zip(states, lengths.tolist(), strict=True)]
    else:
        ends = to_host(cu_seqlens).tolist()
        texts = [states[start:stop] for start, stop in pairwise(ends)]
    for row, tokens in zip(out, texts, strict=True):
        if len(tokens):
            _assign(row, xp.max(tokens, axis=0))
        else:
            row[...] = 0


def _assign(target: Array, source: Array) -> None:
    """target[...] = source; float32 from bfloat16 through bits, which CuPy 13 cannot convert."""
    if source.dtype == ml_dtypes.bfloat16 and target.dtype == np.float32:
        target.view(np.uint32)[...] = source.view(np.uint16).astype(np.uint32) << 16
    else:
        target[...] = source

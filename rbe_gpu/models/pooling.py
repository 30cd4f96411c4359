"""Pooling: one vector per text from the hidden states of its tokens.

mean[b] = mean of the n states of text b;  mean_sqrt_len_tokens[b] = mean[b] sqrt(n)
weightedmean[b] = mean of its states, the i-th weighted by its position i = 1, 2, ...
cls[b], lasttoken[b] = the state of its first, last token;  max[b] = the maximum of its states, by column
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .. import ops
from ..blocks import Array
from ..dispatch import module_of, to_host
from ..workspace import Workspace


def cu_seqlens_of(lengths: NDArray[Any]) -> NDArray[np.int64]:
    """Where texts of these lengths begin and end when packed: (batch + 1,) from 0 to their sum."""
    ends = np.zeros(lengths.size + 1, np.int64)
    np.cumsum(lengths, out=ends[1:])
    return ends


def pool_into(
    states: Array,
    lengths: Array | None,
    cu_seqlens: Array | None,
    modes: tuple[str, ...],
    out: Array,
    ws: Workspace,
    skipped: int = 0,
) -> None:
    """Write the pooled vectors of every text, one mode after the other, to `out`.

    Parameters
    ----------
    states : (batch, seq, hidden) with `lengths` (batch,) or None, or packed (tokens, hidden) with `cu_seqlens`
    modes : names as in 1_Pooling/config.json; "max" reads lengths on the host
    out : (batch, modes * hidden), float32 or dtype of states
    ws : on the device of states
    skipped : positions before the first of `states`, for "weightedmean"
    """
    batch, hidden = out.shape[0], states.shape[-1]
    for i, mode in enumerate(modes):
        columns = out[:, i * hidden : (i + 1) * hidden]
        if mode == "max":
            _max(states, lengths, cu_seqlens, columns)
        elif mode in ("mean", "mean_sqrt_len_tokens", "weightedmean"):
            in_place = len(modes) == 1
            vectors = out if in_place else ws.get("pooling", (batch, hidden), out.dtype)
            _mean(mode, states, lengths, cu_seqlens, vectors, skipped)
            if not in_place:
                _assign(columns, vectors)
        else:
            in_place = len(modes) == 1 and states.dtype == out.dtype
            vectors = out if in_place else ws.get("pooling", (batch, hidden), states.dtype)
            if states.size:
                ends = _first_tokens if mode == "cls" else _last_tokens
                rows = ends(states, lengths, cu_seqlens, ws)
                ops.embedding(rows, states.reshape(-1, hidden), out=vectors, workspace=ws)
            if not in_place:
                _assign(columns, vectors)


def _mean(
    mode: str,
    states: Array,
    lengths: Array | None,
    cu_seqlens: Array | None,
    out: Array,
    skipped: int,
) -> None:
    """The mean, or a multiple of it: with weights w, sum(w x) / sum(w) = mean(w x) n / sum(w)."""
    if mode == "mean":
        ops.mean_pool(states, lengths, cu_seqlens, out=out)
        return
    xp = module_of(states)
    n = _lengths(states, lengths, cu_seqlens)
    factor = xp.sqrt(n.astype(np.float32))
    if mode == "weightedmean":
        # sum(w) = n (2 skipped + n + 1) / 2 for w = skipped + 1 ... skipped + n
        factor = (2.0 / (2 * skipped + n + 1)).astype(np.float32)
        if cu_seqlens is None:
            position = xp.arange(states.shape[1])[None, :, None]
        else:
            position = (xp.arange(len(states)) - xp.repeat(cu_seqlens[:-1], _counts(n)))[:, None]
        widened = xp.empty(states.shape, np.float32)
        _assign(widened, states)
        states = widened * (position + 1 + skipped).astype(np.float32)
    vectors = ops.mean_pool(states, lengths, cu_seqlens, out=xp.empty(out.shape, np.float32))
    out[...] = vectors * factor[:, None]


def _lengths(states: Array, lengths: Array | None, cu_seqlens: Array | None) -> Array:
    """Tokens of each text, (batch,), on the device of states."""
    xp = module_of(states)
    if cu_seqlens is not None:
        return cast(Array, cu_seqlens[1:] - cu_seqlens[:-1])
    full = xp.full(states.shape[0], states.shape[1])
    return cast(Array, full if lengths is None else xp.minimum(xp.asarray(lengths), full))


def _counts(n: Array) -> Any:
    """Repeats for xp.repeat: CuPy takes them from the host."""
    return n if isinstance(n, np.ndarray) else to_host(n).tolist()


def _first_tokens(states: Array, lengths: Array | None, cu_seqlens: Array | None, ws: Workspace) -> Array:
    """The row of each text's first token; any row for a text without tokens."""
    if cu_seqlens is not None:
        return module_of(states).minimum(cu_seqlens[:-1], len(states) - 1)
    batch, seq = states.shape[:2]
    rows: Array = ws.constants.get("pooling.first", (batch, seq), lambda: np.arange(batch) * seq)
    return rows


def _last_tokens(states: Array, lengths: Array | None, cu_seqlens: Array | None, ws: Workspace) -> Array:
    """The row of each text's last token; any row for a text without tokens."""
    xp = module_of(states)
    if cu_seqlens is not None:
        return xp.maximum(cu_seqlens[1:] - 1, 0)
    first = _first_tokens(states, lengths, cu_seqlens, ws)
    return first + xp.maximum(_lengths(states, lengths, cu_seqlens) - 1, 0)


def without_first(
    skipped: int, states: Array, lengths: NDArray[np.int64]
) -> tuple[Array, NDArray[np.int64], NDArray[np.int64]]:
    """Packed states without the first `skipped` tokens of each text.

    Parameters
    ----------
    states : (tokens, hidden)
    lengths : (batch,) on the host

    Returns
    -------
    states, lengths, cu_seqlens : of the remaining tokens
    """
    starts = cu_seqlens_of(lengths)[:-1]
    positions = np.arange(len(states)) - np.repeat(starts, lengths)
    rows = module_of(states).asarray(np.flatnonzero(positions >= skipped))
    remaining = np.maximum(lengths - skipped, 0)
    return states[rows], remaining, cu_seqlens_of(remaining)


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

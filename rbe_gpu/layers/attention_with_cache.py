"""Causal attention of new tokens to those of a `KVCache` and to themselves."""

from __future__ import annotations

from math import sqrt

import numpy as np
from numpy.typing import NDArray

from .. import ops
from ..blocks import Array
from ..dispatch import module_of
from ..workspace import Workspace
from .kv_cache import KVLayer


def attend_with_cache(
    q: Array,
    k: Array,
    v: Array,
    cache: KVLayer,
    cu_seqlens: NDArray[np.int64],
    scale: float | None,
    window: tuple[int, int] | None,
    out: Array,
    workspace: Workspace,
    softcap: float | None,
) -> None:
    """Write k and v behind the tokens of the cache, and what every query sees to `out`.

    Parameters
    ----------
    q, out : (tokens, num_heads, head_dim), packed
    k, v : (tokens, num_kv_heads, head_dim)
    cu_seqlens : (batch + 1,) on the host
    window : as in `rbe_gpu.attention`; of it the left side counts
    softcap : as in `rbe_gpu.attention`
    """
    keys, values, lengths = cache
    scale = 1.0 / sqrt(q.shape[-1]) if scale is None else scale
    left = -1 if window is None else window[0]
    counts = np.diff(cu_seqlens)
    if counts.size and (counts == 1).all():
        _write_one_each(k, v, cache)
        _attend_one_each(q, keys, values, lengths + 1, scale, left, out, workspace, softcap)
        return
    for b, (start, count, past) in enumerate(zip(cu_seqlens, counts, lengths, strict=False)):
        new = slice(start, start + count)
        keys[b, past : past + count], values[b, past : past + count] = k[new], v[new]
    if not lengths.any():  # what the cache holds is k and v themselves
        ends = module_of(q).asarray(cu_seqlens)
        ops.attention(
            q,
            k,
            v,
            True,
            scale,
            window=(left, 0),
            out=out,
            workspace=workspace,
            cu_seqlens_q=ends,
            softcap=softcap,
        )
        return
    for b, (start, count, past) in enumerate(zip(cu_seqlens, counts, lengths, strict=False)):
        if not count:
            continue
        new, seen = slice(start, start + count), slice(max(0, past - left) if left >= 0 else 0, past + count)
        ops.attention(
            q[None, new], keys[b : b + 1, seen], values[b : b + 1, seen], True, scale, window=(left, 0),
            out=out[None, new], workspace=workspace, softcap=softcap,
        )  # fmt: skip


def _write_one_each(k: Array, v: Array, cache: KVLayer) -> None:
    keys, values, lengths = cache
    if lengths.size == 1:  # a tenth of the time of indexing by arrays
        keys[0, lengths[0]], values[0, lengths[0]] = k[0], v[0]
        return
    rows = np.arange(lengths.size)
    xp = module_of(k)
    at = xp.asarray(rows), xp.asarray(lengths)
    keys[at], values[at] = k, v


def _attend_one_each(
    q: Array,
    keys: Array,
    values: Array,
    lengths: NDArray[np.int64],
    scale: float,
    left: int,
    out: Array,
    workspace: Workspace,
    softcap: float | None,
) -> None:
    """One query of each sequence, which sees all its keys, or the last left + 1.

    The query heads that share a key head are passed as queries of one head: the keys are read once for all of them.
    """
    batch, num_heads, head_dim = q.shape
    kv_heads = keys.shape[2]
    group = num_heads // kv_heads
    shortest, longest = int(lengths.min()), int(lengths.max())
    first = 0 if left < 0 else max(0, shortest - 1 - left)
    seen = slice(first, longest)
    grouped = (batch, kv_heads, group, head_dim)
    mask, limits = None, None
    if shortest != longest and left < 0:
        limits = module_of(q).asarray(lengths)
    elif shortest != longest:
        column = np.arange(first, longest)
        visible = (column < lengths[:, None]) & (column >= lengths[:, None] - 1 - left)
        mask = module_of(q).asarray(visible[:, None, None, :])
    mixed = workspace.get("layer.attention.grouped", (batch, group, kv_heads, head_dim), out.dtype)
    ops.attention(
        q.reshape(grouped).swapaxes(1, 2), keys[:, seen], values[:, seen], False, scale, mask, limits,
        out=mixed, workspace=workspace, softcap=softcap,
    )  # fmt: skip
    out.reshape(grouped)[...] = mixed.swapaxes(1, 2)

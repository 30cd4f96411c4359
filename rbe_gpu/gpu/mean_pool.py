"""mean_pool: y[b,c] = sum_t x[t,c] / n[b] over the n[b] tokens t of sequence b; zeros where n[b] = 0."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._launch import SUFFIX, TYPE, WARP, Launch, aligned, ceil_div, grid_1d, run

_WARPS = 8  # of a block: every warp sums every eighth token


def plan(x: Any, lengths: Any, cu_seqlens: Any, out: Any) -> Launch:
    """The launch of `mean_pool`, from shapes, dtypes and addresses."""
    batch, cols = out.shape
    chunk, single = 16 // x.itemsize, ""
    if cols % chunk or not aligned(x, out):
        chunk, single = 1, "_single"
    args = (
        x,
        np.int64(x.shape[1] if cu_seqlens is None else 0),
        lengths,
        cu_seqlens,
        out,
        TYPE[out.dtype],
        np.int64(batch),
        np.int64(cols),
    )
    grid = grid_1d(batch * ceil_div(cols, chunk * WARP))
    return Launch("mean_pool", f"mean_pool_{SUFFIX[x.dtype]}{single}", grid, (WARP, _WARPS, 1), args)


def mean_pool(x: Any, lengths: Any, cu_seqlens: Any, out: Any) -> None:
    """Write the mean of each sequence's tokens to `out`.

    Parameters
    ----------
    x : (batch, seq, cols), or packed (tokens, cols), float32/float16/bfloat16, C-contiguous
    lengths : (batch,) int64, tokens of each padded sequence, clamped to 0 ... seq; None: seq
    cu_seqlens : (batch + 1,) int64, packed sequence b has the tokens cu_seqlens[b] to cu_seqlens[b + 1] - 1; None:
        padded
    out : (batch, cols) of any of the three dtypes, C-contiguous
    """
    run(plan(x, lengths, cu_seqlens, out))

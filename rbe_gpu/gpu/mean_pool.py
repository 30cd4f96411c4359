"""mean_pool: y[b,c] = sum_t x[t,c] / n[b] over the n[b] tokens t of sequence b; zeros where n[b] = 0."""

from __future__ import annotations

from typing import Any

from ._execute import run
from ._launch import SUFFIX, TYPE, WARP, Launch, aligned, ceil_div, grid_1d
from ._params import MEAN_POOL

_WARPS = 8  # of a block: every warp sums every eighth token


def launches(x: Any, lengths: Any, cu_seqlens: Any, out: Any) -> tuple[Launch, ...]:
    """The launch of `mean_pool`, from shapes, dtypes and addresses."""
    batch, cols = out.shape
    chunk, single = 16 // x.itemsize, ""
    if cols % chunk or not aligned(x, out):
        chunk, single = 1, "_single"
    params = MEAN_POOL.fill(
        x=x,
        seq=x.shape[1] if cu_seqlens is None else 0,
        lengths=lengths,
        cu_seqlens=cu_seqlens,
        out=out,
        out_type=TYPE[out.dtype],
        batch=batch,
        cols=cols,
    )
    grid = grid_1d(batch * ceil_div(cols, chunk * WARP))
    return (Launch("mean_pool", f"mean_pool_{SUFFIX[x.dtype]}{single}", grid, (WARP, _WARPS, 1), params),)


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
    run(*launches(x, lengths, cu_seqlens, out))

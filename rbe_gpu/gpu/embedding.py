"""embedding: y[i, :] = W[ids[i], :], decoding only the rows asked for."""

from __future__ import annotations

from typing import Any

import numpy as np

from rbe_gpu.blocks import RBEBlocks

from . import decode
from ._launch import TYPE, Launch, aligned, ceil_div, grid_1d, run

_THREADS = 256  # of the copy of dense rows


def _plan_dense(ids: Any, weight: Any, out: Any) -> Launch:
    rows, cols = weight.shape
    row_bytes = cols * weight.itemsize
    unit = next(n for n in (4, 2, 1) if row_bytes % (1 << n) == 0 and aligned(weight, out, to=1 << n))
    units = row_bytes >> unit
    numbers = (ids, np.int32(ids.itemsize == 8), np.int64(0), np.int64(rows))
    args = (*numbers, weight, np.int64(ids.size), np.int64(units), np.int32(unit), out)
    grid = grid_1d(ceil_div(ids.size * units, _THREADS))
    return Launch("embedding", "embedding_rows", grid, (_THREADS, 1, 1), args)


def plan(ids: Any, weight: Any, out: Any, ws: Any) -> tuple[Launch, ...]:
    """The launches of `embedding` for at least one id and one column."""
    if not isinstance(weight, RBEBlocks):
        return (_plan_dense(ids, weight, out),)
    if weight.row_block == 1:
        return decode.plan(weight, out, ws, ids)
    if not weight.col_transformed:
        raise TypeError(
            "the column transform of weight is switched off; look rows up in the RBEMatrix it was made from"
        )
    starts, launches = None, []
    if weight.codes.kind == "sparse":
        starts = decode.get_starts(weight, weight.rows_pad, ws)
        launches.append(decode.plan_starts(weight, None, 0, weight.rows_pad, starts))
    block = weight.block
    tiles = decode.TILES[block]
    args = (
        *decode.codes_arguments(weight),
        starts,
        *decode.row_numbers(weight, ids, 0),
        np.int64(ids.size),
        np.int64(weight.cols),
        decode.TRANSFORM[weight.transform],
        weight.basis,
        np.float32(weight.gain),
        out,
        TYPE[out.dtype],
    )
    grid = grid_1d(ids.size * ceil_div(weight.cols_pad // block, tiles))
    shared = 4 * block * block * tiles
    launches.append(
        Launch("embedding", f"embedding_{block}", grid, (decode.THREADS[block], 1, 1), args, shared)
    )
    return tuple(launches)


def embedding(ids: Any, weight: Any, out: Any, ws: Any) -> None:
    """Write row ids[i] of `weight` to out[i]; a row of NaN where `weight` has no such row.

    Parameters
    ----------
    ids : (n,) int64 or int32
    weight : RBEVectors, RBEMatrix, or a dense (rows, cols) array of the dtype of `out`
    out : (n, cols) float32, float16 or bfloat16, C-contiguous
    ws : workspace; sparse codes take 8 bytes a block and row, of vectors a row asked for, of a matrix any row
    """
    if out.size:
        run(*plan(ids, weight, out, ws))

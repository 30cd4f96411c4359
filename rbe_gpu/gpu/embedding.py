"""embedding: y[i, :] = W[ids[i], :], decoding only the rows asked for."""

from __future__ import annotations

from typing import Any

from rbe_gpu.blocks import RBEBlocks

from . import decode
from ._elements import divider
from ._execute import run
from ._launch import TYPE, Launch, aligned, ceil_div, grid_1d
from ._params import COPY_ROWS, EMBEDDING, ROWS

_THREADS = 256  # of the copy of dense rows


def _copy_rows(ids: Any, weight: Any, out: Any) -> Launch:
    """The launch for a dense weight."""
    rows, cols = weight.shape
    row_bytes = cols * weight.itemsize
    unit = next(n for n in (4, 2, 1) if row_bytes % (1 << n) == 0 and aligned(weight, out, to=1 << n))
    units = row_bytes >> unit
    numbers = ROWS.fill(ids=ids, wide=ids.itemsize == 8, first=0, stored=rows)
    params = COPY_ROWS.fill(numbers=numbers, table=weight, count=ids.size, units=units, unit=unit, out=out)
    grid = grid_1d(ceil_div(ids.size * units, _THREADS))
    return Launch("embedding", "embedding_rows", grid, (_THREADS, 1, 1), params)


def launches(ids: Any, weight: Any, out: Any, ws: Any) -> tuple[Launch, ...]:
    """The launches of `embedding` for at least one id and one column."""
    if not isinstance(weight, RBEBlocks):
        return (_copy_rows(ids, weight, out),)
    if weight.row_block == 1:
        return decode.launches(weight, out, ws, ids)
    if not weight.col_transformed:
        raise TypeError(
            "the column transform of weight is switched off; look rows up in the RBEMatrix it was made from"
        )
    before: tuple[Launch, ...] = ()
    starts = None
    if weight.codes.kind == "sparse":
        starts = decode.get_starts(weight, weight.rows_pad, ws)
        before = (decode.find_starts(weight, None, 0, weight.rows_pad, starts),)
    block = weight.block
    tiles = decode.TILES[block]
    pieces = ceil_div(weight.cols_pad // block, tiles)
    params = EMBEDDING.fill(
        codes=decode.codes_params(weight),
        starts=starts,
        numbers=decode.row_numbers(weight, ids, 0),
        count=ids.size,
        cols=weight.cols,
        by_pieces=divider(pieces),
        transform=decode.TRANSFORM[weight.transform],
        with_basis=weight.basis is not None,
        basis=weight.basis,
        gain=weight.gain,
        out=out,
        type=TYPE[out.dtype],
    )
    grid = grid_1d(ids.size * pieces)
    threads, shared = (decode.THREADS[block], 1, 1), 4 * block * block * tiles
    return (*before, Launch("embedding", f"embedding_{block}", grid, threads, params, shared))


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
        run(*launches(ids, weight, out, ws))

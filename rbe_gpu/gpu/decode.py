"""decode: W = gain * (S_r C S_c^T + sum_k p_k Phi_k), all rows, some panel of rows, or rows by number."""

from __future__ import annotations

from typing import Any

import numpy as np

from rbe_gpu.blocks import RBEBlocks
from rbe_gpu.codecs import DenseCodes, GridCodes, SparseCodes

from ..kernel_struct import Params
from ._elements import divider
from ._execute import run
from ._launch import TYPE, WARP, Launch, aligned, ceil_div, grid_1d
from ._params import CODES, DECODE, ROWS, STARTS

#: Constants of codes.cuh and transforms.cuh.
CODE_KINDS = {"dense": 0, "grid": 1, "sparse": 2}
INDEX_KINDS = {"full": 0, "bitmap": 1, "delta": 2}
TRANSFORM = {
    name: i for i, name in enumerate(("none", "dct", "hadamard", "dwt-haar", "dwt-db2", "dwt-bior3.1"))
}
ALIGNMENT = 16

TILES = {32: 4, 64: 2, 128: 1}  # of a block of threads, side by side
THREADS = {32: 128, 64: 128, 128: 256}
_PLAIN_THREADS = 256
_PLAIN_STEPS = 4


def codes_params(weight: RBEBlocks, bitmap: Any = None) -> Params:
    """The coefficients of a weight; `bitmap` in the place of the positions of sparse codes."""
    codes = weight.codes
    stored: dict[str, Any] = {
        "col_scale": None,
        "index": None,
        "row_start": None,
        "group": 0,
        "index_kind": 0,
    }
    if isinstance(codes, DenseCodes):
        stored |= {"group": codes.group, "scale": codes.scale, "offset": 0.0}
    elif isinstance(codes, GridCodes):
        if codes.exceptions is not None:
            raise ValueError("no CUDA kernel reads exceptions; move the weight with rbe_gpu.to")
        stored |= {"scale": codes.row_scale, "col_scale": codes.col_scale, "offset": codes.shrink}
    elif isinstance(codes, SparseCodes):
        stored |= {
            "group": codes.group,
            "index_kind": INDEX_KINDS[codes.index_kind if bitmap is None else "bitmap"],
            "scale": codes.scale,
            "index": codes.index if bitmap is None else bitmap,
            "row_start": codes.row_start,
            "offset": codes.dead_zone,
        }
    else:
        raise NotImplementedError(f"no CUDA kernel decodes {codes.kind} codes; cuda_src/codes.cuh has none")
    width = codes.base_bits if isinstance(codes, GridCodes) else codes.bits
    return CODES.fill(
        kind=CODE_KINDS[codes.kind], bits=width, value=codes.value, cols=weight.cols_pad, **stored
    )


def rows_are_wide(out: Any) -> bool:
    """Whether every row of `out` starts at a multiple of 16 bytes."""
    return aligned(out, to=ALIGNMENT) and out.shape[1] * out.itemsize % ALIGNMENT == 0


def find_starts(weight: RBEBlocks, ids: Any, first: int, rows: int, starts: Any) -> Launch:
    """The launch that finds where the entries of `rows` rows begin in each block. starts: see `get_starts`."""
    params = STARTS.fill(
        codes=codes_params(weight),
        numbers=row_numbers(weight, ids, first),
        rows=rows,
        block=weight.block,
        starts=starts,
    )
    grid = grid_1d(ceil_div(rows, _PLAIN_THREADS // WARP))
    return Launch("decode", "decode_starts", grid, (_PLAIN_THREADS, 1, 1), params)


def get_starts(weight: RBEBlocks, rows: int, ws: Any) -> Any:
    """Scratch for `find_starts`: (rows, blocks + 1) pairs of uint32."""
    return ws.get("decode.starts", (rows, weight.cols_pad // weight.block + 1), np.uint64)


def row_numbers(weight: RBEBlocks, ids: Any, first: int) -> Params:
    """Rows of a weight from `first` on, or those in `ids`."""
    return ROWS.fill(ids=ids, wide=ids is not None and ids.itemsize == 8, first=first, stored=weight.rows)


def launches(
    weight: RBEBlocks, out: Any, ws: Any, ids: Any = None, first: int = 0, gain: float | None = None
) -> tuple[Launch, ...]:
    """The launches that decode rows first, first + 1, ... of `weight`, or the rows `ids` of vectors.

    Parameters
    ----------
    out : (n, cols) float32/float16/bfloat16, C-contiguous, n at least 1
    ws : workspace; takes 8 bytes a row and block for sparse codes
    ids : (n,) int64 or int32, or None
    first : a multiple of the row block
    gain : in the place of the weight's own
    """
    n, cols = out.shape
    block = weight.block
    gain = weight.gain if gain is None else gain
    sparse = weight.codes.kind == "sparse"
    before: tuple[Launch, ...] = ()
    starts = None
    if sparse:
        starts = get_starts(weight, ceil_div(n, weight.row_block) * weight.row_block, ws)
        before = (find_starts(weight, ids, first, starts.shape[0], starts),)
    plain = not sparse and weight.transform == "none" and weight.basis is None
    part = _PLAIN_STEPS * WARP * (ALIGNMENT // out.itemsize)
    pieces = ceil_div(cols, part) if plain else ceil_div(weight.cols_pad // block, TILES[block])
    params = DECODE.fill(
        codes=codes_params(weight),
        starts=starts,
        numbers=row_numbers(weight, ids, first),
        rows=n,
        cols=cols,
        by_pieces=divider(pieces),
        sides=2 * weight.row_transformed + weight.col_transformed,  # ALONG_ROWS, DOWN_COLUMNS of decode.cu
        transform=TRANSFORM[weight.transform],
        with_basis=weight.basis is not None,
        basis=weight.basis,
        gain=gain,
        out=out,
        type=TYPE[out.dtype],
        wide=rows_are_wide(out),
    )
    if plain:
        blocks = ceil_div(n * pieces, _PLAIN_THREADS // WARP)
        return (Launch("decode", "decode_plain", grid_1d(blocks), (_PLAIN_THREADS, 1, 1), params),)
    grid = grid_1d(ceil_div(n, block) * pieces)
    shared = 4 * block * block * TILES[block]
    return (*before, Launch("decode", f"decode_{block}", grid, (THREADS[block], 1, 1), params, shared))


def decode(weight: RBEBlocks, out: Any, ws: Any) -> None:
    """Write all rows of `weight` to `out`.

    Parameters
    ----------
    weight : RBEMatrix or RBEVectors, its arrays aligned to 16 bytes
    out : (rows, cols) float32, float16 or bfloat16, C-contiguous
    """
    run(*launches(weight, out, ws))

"""decode: W = gain * (S_r C S_c^T + sum_k p_k Phi_k), all rows, some panel of rows, or rows by number."""

from __future__ import annotations

from typing import Any

import numpy as np

from rbe_gpu.blocks import RBEBlocks
from rbe_gpu.codecs import DenseCodes, GridCodes, SparseCodes

from ._launch import TYPE, WARP, Launch, aligned, ceil_div, grid_1d, run

#: Constants of codes.cuh and transforms.cuh.
CODES = {"dense": np.int32(0), "grid": np.int32(1), "sparse": np.int32(2)}
INDEX = {"full": np.int32(0), "bitmap": np.int32(1), "delta": np.int32(2)}
TRANSFORM = {
    name: np.int32(i)
    for i, name in enumerate(("none", "dct", "hadamard", "dwt-haar", "dwt-db2", "dwt-bior3.1"))
}
ALIGNMENT = 16

TILES = {32: 4, 64: 2, 128: 1}  # of a block of threads, side by side
THREADS = {32: 128, 64: 128, 128: 256}
_PLAIN_THREADS = 256
_PLAIN_STEPS = 4


def codes_arguments(weight: RBEBlocks) -> tuple[Any, ...]:
    """What CODES_PARAMETERS of codes.cuh takes."""
    codes = weight.codes
    cols = np.int64(weight.cols_pad)
    none = np.int32(0)
    if isinstance(codes, DenseCodes):
        stored = (codes.value, codes.scale, None, None, None)
        return CODES["dense"], np.int32(codes.bits), np.int32(codes.group), none, *stored, np.float32(0), cols
    if isinstance(codes, GridCodes):
        stored = (codes.value, codes.row_scale, codes.col_scale, None, None)
        return CODES["grid"], np.int32(codes.bits), none, none, *stored, np.float32(codes.shrink), cols
    assert isinstance(codes, SparseCodes)
    group, index_kind = np.int32(codes.group), INDEX[codes.index_kind]
    stored = (codes.value, codes.scale, None, codes.index, codes.row_start)
    offset = np.float32(codes.dead_zone)
    return CODES["sparse"], np.int32(codes.bits), group, index_kind, *stored, offset, cols


def rows_are_wide(out: Any) -> bool:
    """Whether every row of `out` starts at a multiple of 16 bytes."""
    return aligned(out, to=ALIGNMENT) and out.shape[1] * out.itemsize % ALIGNMENT == 0


def plan_starts(weight: RBEBlocks, ids: Any, first: int, rows: int, starts: Any) -> Launch:
    """The launch that finds where the entries of `rows` rows begin in each block. starts: see `get_starts`."""
    warps = _PLAIN_THREADS // WARP
    args = (
        *codes_arguments(weight),
        *row_numbers(weight, ids, first),
        np.int64(rows),
        np.int32(weight.block),
        starts,
    )
    return Launch("decode", "decode_starts", grid_1d(ceil_div(rows, warps)), (_PLAIN_THREADS, 1, 1), args)


def get_starts(weight: RBEBlocks, rows: int, ws: Any) -> Any:
    """Scratch for `plan_starts`: (rows, blocks + 1) pairs of uint32."""
    return ws.get("decode.starts", (rows, weight.cols_pad // weight.block + 1), np.uint64)


def row_numbers(weight: RBEBlocks, ids: Any, first: int) -> tuple[Any, ...]:
    """What RowNumbers of codes.cuh takes."""
    wide = ids is not None and ids.itemsize == 8
    return ids, np.int32(wide), np.int64(first), np.int64(weight.rows)


def plan(
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
    # bits, as SIDES of decode.cu
    sides = 2 * weight.row_transformed + weight.col_transformed
    codes = codes_arguments(weight)
    rows = row_numbers(weight, ids, first)
    size = (np.int64(n), np.int64(cols))
    target = (np.float32(gain), out, TYPE[out.dtype], np.int32(rows_are_wide(out)))
    if weight.codes.kind != "sparse" and weight.transform == "none" and weight.basis is None:
        part = _PLAIN_STEPS * WARP * (ALIGNMENT // out.itemsize)
        blocks = ceil_div(n * ceil_div(cols, part), _PLAIN_THREADS // WARP)
        args = (*codes, *rows, *size, *target)
        return (Launch("decode", "decode_plain", grid_1d(blocks), (_PLAIN_THREADS, 1, 1), args),)
    starts, launches = None, []
    if weight.codes.kind == "sparse":
        starts = get_starts(weight, ceil_div(n, weight.row_block) * weight.row_block, ws)
        launches.append(plan_starts(weight, ids, first, starts.shape[0], starts))
    tiles = ceil_div(n, block) * ceil_div(weight.cols_pad // block, TILES[block])
    args = (
        *codes, starts, *rows, *size, np.int32(sides), TRANSFORM[weight.transform], weight.basis, *target
    )  # fmt: skip
    shared = 4 * block * block * TILES[block]
    launches.append(Launch("decode", f"decode_{block}", grid_1d(tiles), (THREADS[block], 1, 1), args, shared))
    return tuple(launches)


def decode(weight: RBEBlocks, out: Any, ws: Any) -> None:
    """Write all rows of `weight` to `out`.

    Parameters
    ----------
    weight : RBEMatrix or RBEVectors, its arrays aligned to 16 bytes
    out : (rows, cols) float32, float16 or bfloat16, C-contiguous
    """
    run(*plan(weight, out, ws))

"""linear with W never decoded, many tokens: y_I = gain * (S sum_J C_IJ (S^T x_J) + psi g_I)."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rbe_gpu import transforms
from rbe_gpu.blocks import RBEBlocks
from rbe_gpu.codecs import SparseCodes

from . import decode
from ._launch import TYPE, WARP, aligned, ceil_div

if TYPE_CHECKING:
    from .linear import Call

TILE = 128  # of a product, tokens and outputs
FUNCTIONS = 16  # of a coordinate, with room: 13 to 15 are used
_BASIS_ROWS = 4  # blocks of rows of a thread of linear_transform_basis
_STEP = 64  # of k, of the products of f16; two of those of float
_SHARED = 64 << 10  # stages, then the sums of a tile
_BLOCKS_WANTED = 264  # of threads: two a multiprocessor of a large GPU
_LEAST_DEPTH = 256  # of k, that a split is worth
_OP = "linear_transform"


@lru_cache
def functions(block: int) -> NDArray[np.float32]:
    """phi and psi: (2, block, FUNCTIONS) float32, zeros behind the last function.

    sum_k p_k Phi_k(r, c) = sum_ab q_ab psi[r, a] phi[c, b], where q are the parameters as linear_transform_basis
    places them: functions 0 to 3 are 1, t^2, cos(pi t), cos(2 pi t), the others belong to d; its factors are in psi.
    """
    terms = transforms.basis_terms(block)
    count = len(terms.functions)
    found = np.zeros((2, block, FUNCTIONS), np.float32)
    factor = np.ones(count)
    of_d = terms.param == 1
    factor[terms.row[of_d]] = terms.factor[of_d]
    found[0, :, :count] = terms.functions.T
    found[1, :, :count] = (terms.functions * factor[:, None]).T
    found.flags.writeable = False
    return found


def splits(tokens: int, rows: int, depth: int) -> tuple[int, int]:
    """Values of k a split, and splits: more than one where tiles of results are too few to fill a GPU."""
    tiles = ceil_div(tokens, TILE) * ceil_div(rows, TILE)
    steps = ceil_div(depth, _STEP)
    wanted = max(1, min(_BLOCKS_WANTED // tiles, depth // _LEAST_DEPTH))
    each = ceil_div(steps, wanted)
    return each * _STEP, ceil_div(steps, each)


def _bitmaps(call: Call, weight: RBEBlocks) -> tuple[Any, ...]:
    """The codes as the products read them: sparse ones with bitmaps in the place of delta positions."""
    given = decode.codes_arguments(weight)
    codes = weight.codes
    if not isinstance(codes, SparseCodes) or codes.index_kind != "delta":
        return given
    rows, cols = weight.rows_pad, weight.cols_pad
    words = call.ws.get("linear.bitmap", (rows, cols // 32), np.uint32)
    args = (codes.index, codes.row_start, np.int64(rows), np.int64(cols), words)
    call.add("bitmap", ceil_div(rows, 256 // WARP), 256, *args, op=_OP)
    kind, bits, group, _, value, scale, col_scale, _, row_start, *rest = given
    return kind, bits, group, decode.INDEX["bitmap"], value, scale, col_scale, words, row_start, *rest


def _float_inputs(call: Call, weight: RBEBlocks) -> Any:
    """x^ in float32: (groups, cols_pad, TILE)."""
    tokens, cols = call.x.shape
    padded, groups = weight.cols_pad, ceil_div(tokens, TILE)
    out = call.ws.get("linear.x", (groups, padded, TILE))
    parts = 2 if weight.block == 128 else 1
    transform = decode.TRANSFORM[weight.col_transform]
    if call.made("x", out, "float", weight.block, int(transform)):
        return out
    call.add(
        "inputs",
        groups * parts * (padded // weight.block),
        128,
        call.x,
        TYPE[call.x.dtype],
        np.int32(cols % 8 == 0 and aligned(call.x)),
        np.int64(tokens),
        np.int64(cols),
        np.int64(padded),
        np.int32(weight.block),
        transform,
        out,
        op=_OP,
    )
    return out


def _basis(call: Call, weight: RBEBlocks) -> tuple[Any, ...]:
    """Parameters, sums and functions of the basis: what ENDING_PARAMETERS takes."""
    if weight.basis is None:
        return None, None, None, np.int64(0), np.int64(0)
    blocks, row_blocks = weight.cols_pad // weight.block, weight.rows_pad // weight.row_block
    counts = np.int64(blocks), np.int64(row_blocks)
    if weight.row_block == 1:
        return weight.basis, call.features(weight), None, *counts
    tokens, cols = call.x.shape
    groups, block = ceil_div(tokens, TILE), weight.block
    tables = call.ws.constant(f"linear.functions.{block}", block, lambda: functions(block))
    features = call.ws.get("linear.functions", (groups, blocks, FUNCTIONS, TILE))
    call.add(
        "features",
        groups * (2 if block == 128 else 1) * blocks,
        128,
        call.x,
        TYPE[call.x.dtype],
        np.int32(cols % 8 == 0 and aligned(call.x)),
        np.int64(tokens),
        np.int64(cols),
        np.int64(blocks),
        np.int32(block),
        tables[0],
        features,
        op=_OP,
    )
    sums = call.ws.get("linear.basis", (tokens, row_blocks, FUNCTIONS))
    args = (features, weight.basis, np.int64(tokens), counts[1], counts[0], sums)
    call.add("basis", groups * ceil_div(row_blocks, _BASIS_ROWS), TILE, *args, op=_OP)
    return weight.basis, sums, tables[1], *counts


def plan(call: Call, weight: RBEBlocks, half: bool) -> None:
    """Add the launches of a product to `call`.

    half : x^ and C in float16, on tensor cores; else in float32
    """
    rows, depth, tokens = weight.rows_pad, weight.cols_pad, call.tokens
    sparse = isinstance(weight.codes, SparseCodes)
    if half:
        x, peaks = call.half_inputs(weight)
    else:
        peaks = call.peaks() if sparse else None
        x = _float_inputs(call, weight)
    codes, basis = _bitmaps(call, weight), _basis(call, weight)
    transform, scaled = decode.TRANSFORM[weight.row_transform], np.int32(half and peaks is not None)
    ending = (
        np.int32(weight.block), transform, np.float32(weight.gain), peaks, scaled, *basis, *call.finish
    )  # fmt: skip
    each, count = splits(tokens, rows, depth)
    ld = ceil_div(rows, 8) * 8
    parts = None if count == 1 else call.ws.get("linear.parts", (count, tokens, ld))
    tiles = ceil_div(tokens, TILE) * ceil_div(rows, TILE)
    name = ("entries" if sparse else "codes") if half else ("sparse" if sparse else "dense")
    own = (np.int64(rows), np.int64(each), np.int64(ld), parts)
    call.add(name, tiles * count, 256, x, *codes, *own, *ending, shared=_SHARED, op=_OP)
    if count > 1:
        call.add("finish", tiles, 256, parts, np.int32(count), np.int64(ld), *ending, shared=_SHARED, op=_OP)

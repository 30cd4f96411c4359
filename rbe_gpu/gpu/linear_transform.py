"""linear with W never decoded, many tokens: y_I = gain * (S sum_J C_IJ (S^T x_J) + psi g_I)."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rbe_gpu import transforms
from rbe_gpu.blocks import RBEBlocks
from rbe_gpu.codecs import SparseCodes

from ..kernel_struct import Params
from . import decode
from ._launch import WARP, ceil_div
from ._params import (
    BASIS,
    BITMAP,
    TRANSFORM_EPILOGUE,
    TRANSFORM_FEATURES,
    TRANSFORM_INPUTS,
    TRANSFORM_MATMUL,
    TRANSFORM_SUM,
)

if TYPE_CHECKING:
    from .linear import Call

TILE = 128  # of a matmul, tokens and outputs
FUNCTIONS = 16  # of a coordinate, with room: 13 to 15 are used
_BASIS_ROWS = 4  # blocks of rows of a thread of linear_transform_basis
_STEP = 64  # of k, in f16; two steps in float
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
    tables = np.zeros((2, block, FUNCTIONS), np.float32)
    factor = np.ones(count)
    of_d = terms.param == 1
    factor[terms.row[of_d]] = terms.factor[of_d]
    tables[0, :, :count] = terms.functions.T
    tables[1, :, :count] = (terms.functions * factor[:, None]).T
    tables.flags.writeable = False
    return tables


def splits(tokens: int, rows: int, depth: int) -> tuple[int, int]:
    """Values of k a split, and splits: more than one where tiles of results are too few to fill a GPU."""
    tiles = ceil_div(tokens, TILE) * ceil_div(rows, TILE)
    steps = ceil_div(depth, _STEP)
    wanted = max(1, min(_BLOCKS_WANTED // tiles, depth // _LEAST_DEPTH))
    each = ceil_div(steps, wanted)
    return each * _STEP, ceil_div(steps, each)


def _codes(call: Call, weight: RBEBlocks) -> Params:
    """The codes as the kernels read them: sparse ones with bitmaps in the place of delta positions."""
    codes = weight.codes
    if not isinstance(codes, SparseCodes) or codes.index_kind != "delta":
        return decode.codes_params(weight)
    rows, cols = weight.rows_pad, weight.cols_pad
    words = call.ws.get("linear.bitmap", (rows, cols // 32), np.uint32)
    params = BITMAP.fill(index=codes.index, row_start=codes.row_start, rows=rows, cols=cols, words=words)
    call.add("bitmap", ceil_div(rows, 256 // WARP), 256, params, op=_OP)
    return decode.codes_params(weight, words)


def _float_inputs(call: Call, weight: RBEBlocks) -> Any:
    """x^ in float32: (groups, cols_pad, TILE)."""
    padded, groups = weight.cols_pad, ceil_div(call.tokens, TILE)
    out = call.ws.get("linear.x", (groups, padded, TILE))
    transform = decode.TRANSFORM[weight.col_transform]
    if call.is_computed("linear.x", out, "float", weight.block, transform):
        return out
    params = TRANSFORM_INPUTS.fill(
        x=call.activations(), padded=padded, block=weight.block, transform=transform, out=out
    )
    blocks = groups * (2 if weight.block == 128 else 1) * (padded // weight.block)
    call.add("inputs", blocks, 128, params, op=_OP)
    return out


def _basis(call: Call, weight: RBEBlocks) -> dict[str, Any]:
    """Parameters, sums and functions of the basis, for the epilogue."""
    if weight.basis is None:
        return {
            "with_basis": False,
            "basis": None,
            "sums": None,
            "functions": None,
            "blocks": 0,
            "row_blocks": 0,
        }
    blocks, row_blocks = weight.cols_pad // weight.block, weight.rows_pad // weight.row_block
    counts = {"with_basis": True, "basis": weight.basis, "blocks": blocks, "row_blocks": row_blocks}
    if weight.row_block == 1:
        return {**counts, "sums": call.features(weight), "functions": None}
    tokens, block = call.tokens, weight.block
    groups = ceil_div(tokens, TILE)
    tables = call.ws.constants.get(f"linear.functions.{block}", block, lambda: functions(block))
    features = call.ws.get("linear.functions", (groups, blocks, FUNCTIONS, TILE))
    params = TRANSFORM_FEATURES.fill(
        x=call.activations(), blocks=blocks, block=block, functions=tables[0], out=features
    )
    call.add("features", groups * (2 if block == 128 else 1) * blocks, 128, params, op=_OP)
    sums = call.ws.get("linear.basis", (tokens, row_blocks, FUNCTIONS))
    params = BASIS.fill(
        features=features, basis=weight.basis, tokens=tokens, row_blocks=row_blocks, blocks=blocks, sums=sums
    )
    call.add("basis", groups * ceil_div(row_blocks, _BASIS_ROWS), TILE, params, op=_OP)
    return {**counts, "sums": sums, "functions": tables[1]}


def add_launches(call: Call, weight: RBEBlocks, half: bool) -> None:
    """Add the launches of a matmul to `call`.

    half : x^ and C in float16, on tensor cores; else in float32
    """
    rows, depth, tokens = weight.rows_pad, weight.cols_pad, call.tokens
    sparse = isinstance(weight.codes, SparseCodes)
    if half:
        x, absmax = call.half_inputs(weight)
    else:
        absmax = call.absmax() if sparse else None
        x = _float_inputs(call, weight)
    codes = _codes(call, weight)
    epilogue = TRANSFORM_EPILOGUE.fill(
        block=weight.block,
        transform=decode.TRANSFORM[weight.row_transform],
        gain=weight.gain,
        absmax=absmax,
        scaled=half and absmax is not None,
        **_basis(call, weight),
        epilogue=call.epilogue(),
    )
    each, count = splits(tokens, rows, depth)
    ld = ceil_div(rows, 8) * 8
    parts = None if count == 1 else call.ws.get("linear.parts", (count, tokens, ld))
    tiles = ceil_div(tokens, TILE) * ceil_div(rows, TILE)
    name = ("entries" if sparse else "codes") if half else ("sparse" if sparse else "dense")
    params = TRANSFORM_MATMUL.fill(
        x=x, codes=codes, rows=rows, k_each=each, ld=ld, parts=parts, epilogue=epilogue
    )
    call.add(name, tiles * count, 256, params, shared=_SHARED, op=_OP)
    if count > 1:
        params = TRANSFORM_SUM.fill(parts=parts, splits=count, ld=ld, epilogue=epilogue)
        call.add("epilogue", tiles, 256, params, shared=_SHARED, op=_OP)

"""linear with int8 activations: dense and grid codes of 2 to 8 bits, integer sums on tensor cores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rbe_gpu.blocks import RBEBlocks
from rbe_gpu.codecs import GridCodes

from ..kernel_struct import address
from . import decode
from ._launch import TYPE, WARP, aligned, ceil_div
from ._params import ACTIVATIONS, INT8_FEW, INT8_INPUTS, INT8_MMA
from ._splits import splits_of

if TYPE_CHECKING:
    from .linear import Call

TILE = 128  # outputs
_TOKENS = {"tiles": TILE, "groups": 64}  # of a tile
_FEW = 16  # the same of few tokens
_STEP = 128  # columns of a tile
_SHARED = 2 * (TILE + TILE) * _STEP
_SCALES = 2 * 2 * TILE * _STEP // 32  # of dense codes, float16
_FEW_SHARED = 2 * (_FEW + TILE) * _STEP + _SCALES
_THREADS = 256  # of a block; of linear_integers_inputs at most
_OP = "linear_integers"
_INT8, _F32 = np.dtype(np.int8), np.dtype(np.float32)


def inputs(call: Call, weight: RBEBlocks) -> tuple[Any, Any]:
    """z (tokens, cols_pad) int8 and the scales (tokens,) float32 of `reference.int8_activations`."""
    tokens, padded = call.tokens, weight.cols_pad
    codes = weight.codes
    col_scale = codes.col_scale if isinstance(codes, GridCodes) else None
    z = call.ws.get("linear.z", (tokens, padded), _INT8)
    scale = call.ws.get("linear.z_scale", (tokens,))
    of = None if col_scale is None else address(col_scale)
    if call.is_computed("linear.z", z, weight.block, weight.col_transform, of, address(scale)):
        return z, scale
    if weight.col_transform == "none":
        x = call.activations()
    else:
        rows = call.float_rows(weight)
        x = ACTIVATIONS.fill(data=rows, type=TYPE[_F32], wide=aligned(rows), tokens=tokens, cols=padded)
    params = INT8_INPUTS.fill(x=x, padded=padded, col_scale=col_scale, out=z, scale=scale)
    threads = min(_THREADS, ceil_div(padded, 4 * WARP) * WARP)
    call.add("inputs", tokens, threads, params, op=_OP)
    return z, scale


def add_few(call: Call, weight: RBEBlocks) -> None:
    """Up to 64 tokens, 16 at a time, k split over blocks; the last block of a tile of results finishes it."""
    rows, cols = weight.rows_pad, weight.cols_pad
    z, scale = inputs(call, weight)
    blocks = ceil_div(rows, TILE) * ceil_div(call.tokens, _FEW)
    each, splits = splits_of(ceil_div(cols, _STEP), 2 * blocks)
    parts = call.parts(splits, rows)
    params = INT8_FEW.fill(
        x=z,
        scale=scale,
        codes=decode.codes_params(weight),
        rows=rows,
        tokens=call.tokens,
        each=each * _STEP,
        splits=splits,
        ld=parts.shape[2],
        parts=parts,
        finish=call.finish(weight, blocks, splits),
    )
    call.add("few", blocks * splits, _THREADS, params, shared=_FEW_SHARED, op=_OP)


def add_tiles(call: Call, weight: RBEBlocks) -> None:
    """More tokens: tiles of results, finished in one launch."""
    z, scale = inputs(call, weight)
    params = INT8_MMA.fill(
        x=z,
        scale=scale,
        codes=decode.codes_params(weight),
        rows=weight.rows_pad,
        block=weight.block,
        transform=decode.TRANSFORM[weight.row_transform],
        gain=weight.gain,
        epilogue=call.epilogue(),
    )
    name = "tiles" if weight.codes.kind == "grid" else "groups"
    blocks = ceil_div(call.tokens, _TOKENS[name]) * ceil_div(weight.rows_pad, TILE)
    call.add(name, blocks, _THREADS, params, shared=_SHARED, op=_OP)

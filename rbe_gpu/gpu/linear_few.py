"""linear of few tokens, dense and grid codes: input transform, matmul, sums of splits and epilogue in one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rbe_gpu.blocks import RBEBlocks

from . import decode
from ._launch import aligned, ceil_div
from ._params import DOT, FEW_MMA
from ._splits import splits_of

if TYPE_CHECKING:
    from .linear import Call

_OP = "linear_few"
_DOT_THREADS = 128
_DOT_ROWS = 64  # of a block; of blocks of 128 rows under S: 128
_SPAN = 1024  # columns that a warp of linear_few_dot takes at once
_BLOCKS_WANTED = 256  # of threads, two a multiprocessor of a large GPU: each makes the x^ of its columns anew
_GROUPS = (1, 4, 8)  # tokens at once: T of linear_few_dot_T
_MMA_THREADS = 256
_MMA_ROWS = 128
_MMA_TOKENS = 16
_STEP = 64  # along k
_MOST_STEPS = 8  # of x^ that a block makes: CHUNK of linear_few.cu
_CODES_SHARED = 2 * 2 * _MMA_ROWS * _STEP
_X_SHARED = 2 * _MMA_TOKENS * _STEP  # a step


def group_of(tokens: int) -> int:
    """Tokens that a kernel of dot products takes at once."""
    return next((t for t in _GROUPS if tokens <= t), _GROUPS[-1])


def _input_block(weight: RBEBlocks) -> int:
    return weight.block if weight.col_transform != "none" else 64


def add_dot(call: Call, weight: RBEBlocks) -> None:
    """Dot products in float32."""
    rows, tokens = weight.rows_pad, call.tokens
    group = group_of(tokens)
    finished = weight.block if weight.row_transform != "none" else _DOT_ROWS
    tiles = ceil_div(rows, max(_DOT_ROWS, finished)) * ceil_div(tokens, group)
    each, splits = splits_of(ceil_div(weight.cols_pad, _SPAN), tiles, _BLOCKS_WANTED)
    parts = call.parts(splits, rows) if splits > 1 else None
    basis: dict[str, Any] = {"basis": None, "features": None, "blocks": 0}
    if weight.basis is not None:
        features, blocks = call.features(weight), weight.cols_pad // weight.block
        basis = {"basis": weight.basis, "features": features, "blocks": blocks}
    params = DOT.fill(
        x=call.activations(),
        in_block=_input_block(weight),
        in_transform=decode.TRANSFORM[weight.col_transform],
        codes=decode.codes_params(weight),
        rows=rows,
        each=each,
        splits=splits,
        ld=0 if parts is None else parts.shape[2],
        parts=parts,
        finish=call.finish(weight, tiles, splits),
        with_basis=weight.basis is not None,
        matrix=weight.row_block > 1,
        basis_block=weight.block,
        **basis,
    )
    call.add(f"dot_{group}", tiles * splits, _DOT_THREADS, params, op=_OP)


def add_mma(call: Call, weight: RBEBlocks) -> None:
    """Tensor cores, 16 tokens at a time."""
    rows, cols, x = weight.rows_pad, weight.cols_pad, call.x
    direct = weight.col_transform == "none" and x.dtype == np.float16 and x.shape[1] == cols and aligned(x)
    tiles = ceil_div(rows, _MMA_ROWS) * ceil_div(call.tokens, _MMA_TOKENS)
    steps, block = ceil_div(cols, _STEP), _input_block(weight)
    each, splits = splits_of(steps, tiles, _BLOCKS_WANTED)
    if not direct:
        whole = max(1, block // _STEP)  # steps of a block
        each = min(ceil_div(each, whole) * whole, _MOST_STEPS)
        splits = ceil_div(steps, each)
    parts = call.parts(splits, rows) if splits > 1 else None
    params = FEW_MMA.fill(
        x=call.activations(),
        direct=direct,
        in_block=block,
        in_transform=decode.TRANSFORM[weight.col_transform],
        codes=decode.codes_params(weight),
        rows=rows,
        each=each * _STEP,
        splits=splits,
        ld=0 if parts is None else parts.shape[2],
        parts=parts,
        finish=call.finish(weight, tiles, splits),
    )
    shared = _CODES_SHARED + _X_SHARED * (2 if direct else each)
    call.add("mma", tiles * splits, _MMA_THREADS, params, shared=shared, op=_OP)

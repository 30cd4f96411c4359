"""x^[tile, k, t] = S^T x for every block of columns of x: activations as the tiled matmuls read them.

    x : (tokens, in_features), any storage type
    x^ : (tiles, depth, width) float32, depth = columns padded to blocks + blocks * features

The matmul that reads x^ first computes it, in the same run of threads: `TRANSFORM_IN` is called by its part kernel.
Transforms work on blocks of features (`fast_transform`); a block's basis features follow all coefficients.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from rbe_gpu import transforms

from . import params
from ._atomics import call_address
from ._jit import cpu_inline
from ._parts import SHARE, count_up, next_unit, part_kernel
from .arrays import ENCODING, F32, address, floats_at, load_any, longs_at
from .fast_transform import apply_transform, transform_address
from .matmul_rows import SPARSE_ROWS, TILE
from .simd import vadd, vfma, vload, vmul, vsplat, vstore, vsum, vtranspose

_ZERO = np.float32(0)
#: What codes and transforms may multiply activations by before scales: twelve bits, blocks of 128, long sums.
HEADROOM = np.float32(2.0**40)
#: Elements of `TRANSFORM_IN.state`, zeros before a run: units done, whether a value is not finite, counters of parts.
DONE, NOT_FINITE, _COUNTERS = 0, 1, SHARE

SparseRows = tuple[Any, Any, Any]  # start (rows + 1) int64, position (entries) int32, value (entries) float32


def sparse_rows_of(a: Any) -> SparseRows:
    """The non-zeros of a matrix, row by row."""
    row, column = np.nonzero(a)
    start = np.zeros(len(a) + 1, np.int64)
    np.cumsum(np.bincount(row, minlength=len(a)), out=start[1:])
    return start, column.astype(np.int32), a[row, column].astype(np.float32)


NO_ROWS: SparseRows = (np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))


@cache
def _features(basis: tuple[int, bool] | None) -> tuple[SparseRows, dict[str, int]]:
    """Rows that turn a block of activations into its basis features, and their fields of `params.TRANSFORM_IN`.

    basis : (block, is it of vectors)
    """
    rows = NO_ROWS if basis is None else sparse_rows_of(transforms.basis_terms(*basis).functions)
    names = ("feature_start", "feature_offset", "feature_value")
    return rows, {"features": len(rows[0]) - 1, **dict(zip(names, map(address, rows), strict=True))}


@cpu_inline
def _transpose_load(
    x, kind, first, tokens, cols, in_features, column, vectors, c, at, width, corner, corner_at
):
    """c[k, t] = x[first + t, column + k] for a block of `cols` columns; zero beyond the tokens and features.

    x : address of rows of `in_features` values
    """
    for v in range(vectors):
        for k in range(0, cols, 16):
            token, feature = first + 16 * v, column + k
            if kind == F32 and 16 * v + 16 <= tokens and feature + 16 <= in_features:
                x_at = token * in_features + feature
                vtranspose(floats_at(x), x_at, in_features, c, at + k * width + 16 * v, width)
            else:
                for i in range(16):
                    count = min(16, in_features - feature) if 16 * v + i < tokens else 0
                    line = load_any(x, kind, (token + i) * in_features + feature, count)
                    vstore(corner, corner_at + 16 * i, line)
                vtranspose(corner, corner_at, 16, c, at + k * width + 16 * v, width)


@cpu_inline
def _finite(c, at, rows, vectors, width):
    """Whether every value of a block is finite, and stays so times HEADROOM: then times 0 is 0, and NaN otherwise."""
    zero, room = vsplat(_ZERO), vsplat(HEADROOM)
    a, b = zero, zero
    for v in range(vectors):
        c_at = at + 16 * v
        for r in range(0, rows, 2):  # a block has an even number of rows
            a = vfma(vmul(vload(c, c_at + r * width), room), zero, a)
            b = vfma(vmul(vload(c, c_at + (r + 1) * width), room), zero, b)
    return vsum(vadd(a, b)) == _ZERO


@cpu_inline
def _transform_block(p, tile, j, part):
    """Block j of one tile; whether its values are finite."""
    x, kind, n, in_features = p.input.x, p.input.kind, p.tokens, p.in_features
    block, features, width, depth, transform = p.block, p.features, p.width, p.depth, p.transform
    blocks = (in_features + block - 1) // block
    tokens = min(width, n - tile * width)
    vectors = (tokens + 15) // 16
    out, scratch = floats_at(p.out), floats_at(p.scratch)
    own = part * p.scratch_stride
    corner = own + block * width
    out_at = (tile * depth + j * block) * width
    first, column = tile * width, j * block
    if transform == 0 and features == 0:
        _transpose_load(
            x, kind, first, tokens, block, in_features, column, vectors, out, out_at, width, scratch, corner
        )
        return _finite(out, out_at, block, vectors, width)
    _transpose_load(
        x, kind, first, tokens, block, in_features, column, vectors, scratch, own, width, scratch, corner
    )
    if features > 0:
        features_at = (tile * depth + blocks * block + j * features) * width
        call_address(
            p.feature_rows,
            (features, p.feature_start, np.int64(1), p.feature_offset, width, p.feature_value, p.scratch + 4 * own,
             vectors, np.int64(1), p.out + 4 * features_at, width),
        )  # fmt: skip
    if transform != 0:
        apply_transform(transform, scratch, own, width, out, out_at, width, vectors)
    else:
        for k in range(block):
            for v in range(vectors):
                vstore(out, out_at + k * width + 16 * v, vload(scratch, own + k * width + 16 * v))
    return _finite(scratch, own, block, vectors, width)


def _transform_in_part(part, p, like):
    """Blocks of tiles, as long as there are some."""
    blocks = (p.in_features + p.block - 1) // p.block
    state, counters = longs_at(p.state), longs_at(p.state + 8 * _COUNTERS)
    unit = next_unit(counters, p.units, part, p.parts)
    while unit < p.units:
        if not _transform_block(p, unit // blocks, unit % blocks, part):
            state[NOT_FINITE] = 1
        count_up(state, DONE)
        unit = next_unit(counters, p.units, part, p.parts)


TRANSFORM_IN = part_kernel(_transform_in_part, params.TRANSFORM_IN.dtype)
_INPUT_AT = params.TRANSFORM_IN.offset("input")


class Activations:
    """Activations as the tiled matmuls read them: feature by feature, tiles of `width` tokens, blocks transformed.

    While they are `pending`, the next matmul transforms them; then `finite` is False where some value is NaN, Inf, or
    too large (`HEADROOM`).
    """

    __slots__ = (
        "_bytes", "address", "buffer", "columns", "depth", "finite", "n", "params", "params_at", "pending", "state",
        "transform", "width",
    )  # fmt: skip

    def __init__(
        self,
        n: int,
        in_features: int,
        transform: str,
        block: int,
        basis: tuple[int, bool] | None,
        threads: int,
        buffer: Any,
    ) -> None:
        self.n, self.transform = n, transform
        self.width = min(TILE, -(-n // 16) * 16)
        blocks = -(-in_features // block)
        features = _features(basis)[1]
        self.columns = blocks * block
        self.depth = blocks * (block + features["features"])
        self.finite, self.pending = True, True
        scratch_stride = block * self.width + 256
        tiles = -(-n // self.width)
        floats = tiles * self.depth * self.width
        scratch_end = 4 * (floats + threads * scratch_stride)
        state_end = scratch_end + 8 * (threads + 1) * SHARE
        self.buffer = buffer(state_end)
        self.address = address(self.buffer)
        self.state = self.buffer[scratch_end:state_end].view(np.int64)
        self.params = params.TRANSFORM_IN.record(
            tokens=n,
            in_features=in_features,
            block=block,
            transform=transform_address(transform, block, True),
            feature_rows=0 if basis is None else SPARSE_ROWS(),
            **features,
            out=self.address,
            depth=self.depth,
            width=self.width,
            scratch=self.address + 4 * floats,
            scratch_stride=scratch_stride,
            units=tiles * blocks,
            parts=threads,
            state=self.address + scratch_end,
        )
        self._bytes = self.params.view(np.uint8)
        self.params_at = address(self._bytes)

    def set_input(self, x: Any) -> None:
        """Read x (n, in_features) at the next matmul."""
        params.pack_input(self._bytes, _INPUT_AT, address(x), ENCODING[x.dtype])
        self.pending = True

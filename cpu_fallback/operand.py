"""A weight as the product kernels read it: addresses and sizes in one table, and the transform's sparse
factors."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from rbe_gpu import transforms
from rbe_gpu.blocks import RBEBlocks, RBEMatrix
from rbe_gpu.codecs import DenseCodes, GridCodes, SparseCodes

from . import codes as kinds
from ._jit import cpu_kernel
from .fast_transform import transform_address
from .matmul_costs import DENSE_ROWS_DENSITY, MatmulCosts
from .product import BF16, F16, F32, GELU, GELU_TANH, GRID, INT, NONE, RELU, SILU

#: Places of the table: first what the weight says, then what a call fills in.
(
    VALUE, SCALE, COLUMN_SCALE, INDEX, ROW_START, KIND, INDEX_KIND, BITS, GROUP, ROWS, ROWS_PAD, ROW_VALUES,
    ROW_BYTES, PARAMS,
    PARAM_BLOCKS, PARAM_COUNT, FEATURES, SUM_FEATURES, ROW, TERMS, T_ROW, T_COLUMN, T_PARAM, T_FACTOR,
    PSI_START, PSI_OFFSET,
    PSI_VALUE, _WEIGHT_PLACES,
) = range(28)  # fmt: skip
(
    UNIT_ROWS, PANEL, PANELS, GROUP_TILES, BLOCK, TRANSFORM, X, TOKENS, DEPTH, COLUMNS, WIDTH, ACTIVATION,
    BIAS, RESIDUAL,
    RESIDUAL_KIND, OUT, OUT_KIND, OUT_FEATURES, SUMS,
    SUM_ROOM, LINES, LINE_ROOM, E_VALUE, E_OFFSET, E_ROOM, E_START, E_START_ROOM, B_VALUE, B_OFFSET, B_ROOM,
    B_START, B_START_ROOM, CORNER, CORNER_ROOM, REALS, COUNTERS, PARTS, IN_TABLE, IN_PART,
    PLACES,
) = range(_WEIGHT_PLACES, _WEIGHT_PLACES + 40)  # fmt: skip
#: How the values of an array of this dtype are encoded.
ENCODING = {
    np.dtype(np.float32): F32,
    np.dtype(np.float16): F16,
    np.dtype(ml_dtypes.bfloat16): BF16,
}
_ACTIVATION = {None: NONE, "relu": RELU, "gelu": GELU, "gelu_tanh": GELU_TANH, "silu": SILU}
_INDEX = {"full": kinds.FULL, "bitmap": kinds.BITMAP, "delta": kinds.DELTA}
_FLOAT32 = np.dtype(np.float32)
_SLACK = 64  # entries that unpacking whole runs and vectors writes around a unit's own

Rows = tuple[Any, Any, Any]  # start (rows + 1) int64, position (entries) int32, value (entries) float32


def _rows_of(a: Any) -> Rows:
    """The non-zeros of a matrix, row by row."""
    row, column = np.nonzero(a)
    start = np.zeros(len(a) + 1, np.int64)
    np.cumsum(np.bincount(row, minlength=len(a)), out=start[1:])
    return start, column.astype(np.int32), a[row, column].astype(np.float32)


_NO_ROWS: Rows = (np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))


@lru_cache(maxsize=64)
def feature_arrays(basis: tuple[int, bool] | None) -> Rows:
    """Rows that turn a block of activations into its basis features; basis = (block, is it of vectors)."""
    return _NO_ROWS if basis is None else _rows_of(transforms.basis_terms(*basis).functions)


@lru_cache(maxsize=64)
def _sum_arrays(basis: tuple[int, bool] | None) -> Rows:
    """Rows that turn the basis sums of a block row into its results."""
    return _NO_ROWS if basis is None or basis[1] else _rows_of(transforms.basis_terms(*basis).functions.T)


@lru_cache(maxsize=64)
def _term_arrays(basis: tuple[int, bool] | None) -> tuple[Any, Any, Any, Any]:
    if basis is None:
        none = np.zeros(0, np.int64)
        return none, none, none, np.zeros(0, np.float32)
    terms = transforms.basis_terms(*basis)
    return terms.row, terms.column, terms.param, terms.factor.astype(np.float32)


@dataclass(frozen=True)
class Operand:
    """What the kernels get. The arrays whose addresses are in `codes` belong to the weight, which must live
    on."""

    codes: Any
    reals: Any
    sparse: bool
    plain: bool
    block: int
    rows_pad: int
    columns: int
    entries: int
    features: int
    sum_features: int
    basis: tuple[int, bool] | None
    transform_in: str
    outward: str
    transform_out: int
    row_start: Any
    choices: dict[Any, tuple[Callable[..., bool], MatmulCosts]] = field(default_factory=dict)

    @property
    def laid_out(self) -> bool:
        """Whether sparse rows are laid out densely for many tokens: zeros are few, and easy to find."""
        return (
            self.sparse
            and int(self.codes[INDEX_KIND]) != kinds.DELTA
            and self.entries > DENSE_ROWS_DENSITY * self.rows_pad * self.columns
        )

    @property
    def key(self) -> int:
        """Tells operands apart for as long as this one lives."""
        return id(self)

    def entry_room(self, rows: int) -> int:
        """The most entries that `rows` rows of a unit have, and what is written around them."""
        known = self.__dict__.setdefault("_rooms", {})
        if rows not in known:
            ends = np.append(self.row_start[: self.rows_pad : rows], self.row_start[self.rows_pad])
            known[rows] = -(-(int(np.diff(ends).max(initial=0)) + 2 * _SLACK) // 16) * 16
        return int(known[rows])

    def basis_room(self, rows: int) -> tuple[int, int]:
        """Entries and starts of the basis part of `rows` rows."""
        if self.basis is None:
            return 0, 0
        per_row = int(self.codes[TERMS]) * int(self.codes[PARAM_BLOCKS])
        groups = rows if self.basis[1] else rows // self.block
        return -(-groups * per_row // 16) * 16, -(-(groups * max(self.sum_features, 1) + 1) // 8) * 8


@intrinsic
def _data(typingctx, a):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(data, ir.IntType(64))

    return types.int64(a), codegen


@cpu_kernel
def _pointer(a):  # type: ignore[no-untyped-def]
    return _data(a)


def address(a: Any) -> int:
    """Where an array's values begin; 0 for None.

    NumPy takes a microsecond to say so, and a product asks three times; Numba takes a sixth of it.
    """
    if a is None:
        return 0
    if a.dtype is _FLOAT32 and type(a) is np.ndarray:
        return int(_pointer(a))
    return int(a.__array_interface__["data"][0])


def set_output(table: Any, bias: Any, activation: str | None, residual: Any, out: Any) -> None:
    """Fill in what changes from call to call. The arrays must live until the kernel has run.

    bias : float32 or None
    """
    table[BIAS], table[ACTIVATION] = address(bias), _ACTIVATION[activation]
    table[OUT], table[OUT_KIND], table[OUT_FEATURES] = address(out), ENCODING[out.dtype], out.shape[1]
    table[RESIDUAL] = address(residual)
    if residual is not None:
        table[RESIDUAL_KIND] = ENCODING[residual.dtype]


class Plain:
    """A dense weight (rows, in_features), C-contiguous, that makes the results from row `first` on."""

    __slots__ = ("first", "key", "weight")

    def __init__(self, weight: Any, first: int) -> None:
        self.weight, self.first = weight, first
        # all that the table says: another array at the same place is as good
        self.key = (address(weight), weight.shape, weight.dtype.char, first)

    def operand(self) -> Operand:
        rows, cols = self.weight.shape
        codes = np.zeros(_WEIGHT_PLACES, np.int64)
        codes[[VALUE, KIND, ROWS, ROWS_PAD, ROW_VALUES, ROW]] = (
            address(self.weight), ENCODING[self.weight.dtype], rows, rows, cols, self.first
        )  # fmt: skip
        plain = self.weight.dtype == np.float32
        return Operand(
            codes,
            np.ones(3, np.float32),
            False,
            plain,
            64,
            rows,
            cols,
            0,
            0,
            0,
            None,
            "none",
            "none",
            0,
            None,
        )


def _operand(weight: RBEBlocks) -> Operand:
    stored = weight.codes
    codes = np.zeros(_WEIGHT_PLACES, np.int64)
    reals = np.array([weight.gain, 0, 0], np.float32)
    codes[[VALUE, ROWS, ROWS_PAD, ROW_VALUES]] = (
        address(stored.value),
        weight.rows,
        weight.rows_pad,
        weight.cols_pad,
    )
    entries, row_start = 0, None
    if isinstance(stored, SparseCodes):
        codes[KIND] = {"f32": F32, "f16": F16}.get(stored.value_kind, INT)
        codes[INDEX_KIND] = _INDEX[stored.index_kind]
        codes[[SCALE, INDEX, ROW_START, BITS, GROUP, ROW_BYTES]] = (
            address(stored.scale), address(stored.index), address(stored.row_start), stored.bits,
            stored.group,
            weight.cols_pad // 8,
        )  # fmt: skip
        reals[1] = stored.dead_zone
        entries, row_start = stored.entries, stored.row_start
    elif isinstance(stored, DenseCodes):
        codes[[KIND, SCALE, BITS, GROUP]] = INT, address(stored.scale), stored.bits, stored.group
    else:
        assert isinstance(stored, GridCodes)
        codes[[KIND, SCALE, COLUMN_SCALE, BITS]] = (
            GRID, address(stored.row_scale), address(stored.col_scale), stored.bits
        )  # fmt: skip
        reals[2] = stored.shrink
    matrix = isinstance(weight, RBEMatrix)
    basis, features = None, 0
    if weight.basis is not None:
        basis = (weight.block, not matrix)
        features = len(transforms.basis_terms(*basis).functions)
        codes[[PARAMS, PARAM_BLOCKS, PARAM_COUNT, FEATURES]] = (
            address(weight.basis), weight.basis.shape[1], weight.basis.shape[2], features
        )  # fmt: skip
        codes[SUM_FEATURES] = features if matrix else 0
        terms, sums = _term_arrays(basis), _sum_arrays(basis)
        codes[TERMS] = len(terms[0])
        codes[[T_ROW, T_COLUMN, T_PARAM, T_FACTOR]] = [address(a) for a in terms]
        codes[[PSI_START, PSI_OFFSET, PSI_VALUE]] = [address(a) for a in sums]
    return Operand(
        codes, reals, isinstance(stored, SparseCodes), False, weight.block, weight.rows_pad,
        weight.cols_pad, entries,
        features, int(codes[SUM_FEATURES]), basis, weight.col_transform, weight.row_transform,
        transform_address(weight.row_transform, weight.block, False), row_start,
    )  # fmt: skip


_KNOWN: dict[int, tuple[weakref.ref[RBEBlocks], Operand]] = {}


def operand_of(weight: RBEBlocks) -> Operand:
    """The operand of a compressed weight, made once; it goes when the weight goes."""
    key = id(weight)
    known = _KNOWN.get(key)
    if known is not None and known[0]() is weight:
        return known[1]
    operand = _operand(weight)
    _KNOWN[key] = weakref.ref(weight, lambda _: _KNOWN.pop(key, None)), operand
    return operand

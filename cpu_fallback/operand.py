"""A weight as the matmul kernels read it: a struct of addresses and sizes (`params.WEIGHT`), and what the driver asks
of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from rbe_gpu import transforms
from rbe_gpu.blocks import RBEBlocks, RBEMatrix
from rbe_gpu.codecs import Codes, DenseCodes, GridCodes, SparseCodes
from rbe_gpu.codecs.grid import GridPlanes
from rbe_gpu.kernel_struct import Struct

from . import codes, params
from .arrays import ENCODING, F16, F32, GRID, INT, address
from .bit_planes import PLANES_OF_ROWS
from .epilogue import ACTIVATIONS
from .fast_transform import transform_address
from .int8_exceptions import Exceptions, find_exceptions
from .matmul_costs import DENSE_ROWS_DENSITY, MatmulCosts
from .transform_in import NO_ROWS, SparseRows, sparse_rows_of

_INDEX = {"full": codes.FULL, "bitmap": codes.BITMAP, "delta": codes.DELTA}
_SLACK = 64  # entries that unpacking whole runs and vectors writes around a unit's own


@lru_cache(maxsize=64)
def _sum_rows(basis: tuple[int, bool] | None) -> SparseRows:
    """Rows that turn the basis sums of a block row into its results."""
    return (
        NO_ROWS if basis is None or basis[1] else sparse_rows_of(transforms.basis_terms(*basis).functions.T)
    )


@lru_cache(maxsize=64)
def _basis_terms(basis: tuple[int, bool]) -> tuple[Any, Any, Any, Any]:
    """Row, column, parameter (int64) and factor (float32) of every term."""
    terms = transforms.basis_terms(*basis)
    return terms.row, terms.column, terms.param, terms.factor.astype(np.float32)


@dataclass(frozen=True)
class Operand:
    """What the kernels get. The arrays whose addresses are in `params` belong to the weight, which must live on.

    bits : of the codes with their exceptions; `params` has those of the packed codes
    """

    params: Any
    sparse: bool
    block: int
    rows_padded: int
    columns: int
    entries: int = 0
    bits: int = 0
    features: int = 0
    sum_features: int = 0
    basis: tuple[int, bool] | None = None
    transform_in: str = "none"
    synthesis_out: str = "none"
    transform_out: int = 0
    row_start: Any = None
    choices: dict[Any, tuple[Callable[..., bool], MatmulCosts]] = field(default_factory=dict)
    _exceptions: list[Exceptions] = field(default_factory=list)
    _entry_rooms: dict[int, int] = field(default_factory=dict)

    def __getitem__(self, name: str) -> int:
        """An integer field of `params`."""
        return int(self.params[name][0])

    @property
    def read_in_place(self) -> bool:
        """Whether tiles are multiplied with the stored rows themselves: a dense float32 weight."""
        return not self.sparse and self["kind"] == F32

    @property
    def densified(self) -> bool:
        """Whether sparse rows are written out with their zeros for many tokens: zeros are few, and easy to find."""
        return (
            self.sparse
            and self["index_kind"] != codes.DELTA
            and self.entries > DENSE_ROWS_DENSITY * self.rows_padded * self.columns
        )

    def int8_exceptions(self, panel: int) -> Exceptions:
        """What the int8 matmul, which takes `panel` columns at a time, adds to cut codes; found once."""
        if not self._exceptions:
            self._exceptions.append(find_exceptions(self.params, self.rows_padded, self.columns, panel))
        return self._exceptions[0]

    @property
    def key(self) -> int:
        """Tells operands apart for as long as this one lives."""
        return id(self)

    def entry_room(self, rows: int) -> int:
        """The most entries that `rows` rows of a unit have, and what is written around them."""
        if rows not in self._entry_rooms:
            ends = np.append(self.row_start[: self.rows_padded : rows], self.row_start[self.rows_padded])
            self._entry_rooms[rows] = -(-(int(np.diff(ends).max(initial=0)) + 2 * _SLACK) // 16) * 16
        return self._entry_rooms[rows]

    def basis_room(self, rows: int) -> tuple[int, int]:
        """Entries and starts of the basis part of `rows` rows."""
        if self.basis is None:
            return 0, 0
        per_row = self["terms"] * self["basis_blocks"]
        groups = rows if self.basis[1] else rows // self.block
        return -(-groups * per_row // 16) * 16, -(-(groups * max(self.sum_features, 1) + 1) // 8) * 8


class DenseWeight:
    """A dense weight (rows, in_features), C-contiguous, that makes the results from row `first` on."""

    __slots__ = ("first", "key", "weight")

    def __init__(self, weight: Any, first: int) -> None:
        self.weight, self.first = weight, first
        # all that the struct says: another array at the same address is as good
        self.key = (address(weight), weight.shape, weight.dtype.char, first)

    def operand(self) -> Operand:
        rows, columns = self.weight.shape
        fields = params.WEIGHT.record(
            value=address(self.weight),
            kind=ENCODING[self.weight.dtype],
            rows=rows,
            rows_padded=rows,
            row_values=columns,
            first_row=self.first,
            gain=1,
        )
        return Operand(fields, sparse=False, block=64, rows_padded=rows, columns=columns)


def _sparse_fields(weight: RBEBlocks, stored: Any) -> dict[str, Any]:
    return {
        "kind": {"f32": F32, "f16": F16}.get(stored.value_kind, INT),
        "index_kind": _INDEX[stored.index_kind],
        "scale": address(stored.scale),
        "index": address(stored.index),
        "row_start": address(stored.row_start),
        "bits": stored.bits,
        "group": stored.group,
        "row_bytes": weight.cols_pad // 8,
        "dead_zone": stored.dead_zone,
    }


def _dense_fields(weight: RBEBlocks, stored: Any) -> dict[str, Any]:
    return {"kind": INT, "scale": address(stored.scale), "bits": stored.bits, "group": stored.group}


def grid_fields(stored: Any) -> dict[str, Any]:
    """The fields of `params.WEIGHT` that say how grid codes are stored, but for `value`."""
    fields = {
        "kind": GRID,
        "scale": address(stored.row_scale),
        "column_scale": address(stored.col_scale),
        "bits": stored.base_bits,
        "shrink": stored.shrink,
    }
    if stored.exceptions is not None:
        fields["exception_start"] = address(stored.exceptions.row_start)
        fields["start_bits"] = 8 * stored.exceptions.row_start.itemsize
        fields["exception_column"] = address(stored.exceptions.column)
        fields["exception_delta"] = address(stored.exceptions.delta)
    return fields


def planes_fields(stored: Any) -> dict[str, Any]:
    """The same of `GridPlanes`."""
    return grid_fields(stored) | {
        "planes_of_rows": PLANES_OF_ROWS(),
        "planes": stored.planes,
        "fours": int(stored.fours),
        "chunk_start": address(stored.chunk_start),
        "chunk_bytes": address(stored.chunk_bytes),
    }


#: codec -> the fields of `params.WEIGHT` that say how the coefficients are stored: (weight, codes). A codec that is
#: not here is multiplied with decoded panels
CODE_FIELDS: dict[type[Codes], Callable[[RBEBlocks, Any], dict[str, Any]]] = {
    DenseCodes: _dense_fields,
    GridCodes: lambda _, stored: grid_fields(stored),
    SparseCodes: _sparse_fields,
}
#: and of codes that only the int8 matmuls read
_FIELDS = {**CODE_FIELDS, GridPlanes: lambda _, stored: planes_fields(stored)}


def _basis_fields(weight: RBEBlocks, basis: tuple[int, bool], features: int) -> dict[str, Any]:
    """The fields of the basis, whose functions sum over a block of activations to `features` values."""
    terms, sums = _basis_terms(basis), _sum_rows(basis)
    fields = {
        "basis": address(weight.basis),
        "basis_blocks": weight.basis.shape[1],
        "basis_params": weight.basis.shape[2],
        "features": features,
        "sum_features": 0 if basis[1] else features,
        "terms": len(terms[0]),
    }
    fields.update(
        zip(("term_row", "term_column", "term_param", "term_factor"), map(address, terms), strict=True)
    )
    fields.update(zip(("psi_start", "psi_offset", "psi_value"), map(address, sums), strict=True))
    return fields


def _operand(weight: RBEBlocks) -> Operand:
    code_fields = _FIELDS.get(type(weight.codes))
    fields = {} if code_fields is None else code_fields(weight, weight.codes)
    basis, features = None, 0
    if weight.basis is not None:
        basis = (weight.block, not isinstance(weight, RBEMatrix))
        features = len(transforms.basis_terms(*basis).functions)
        fields.update(_basis_fields(weight, basis, features))
    sparse = isinstance(weight.codes, SparseCodes)
    return Operand(
        params.WEIGHT.record(
            value=address(weight.codes.value),
            rows=weight.rows,
            rows_padded=weight.rows_pad,
            row_values=weight.cols_pad,
            gain=weight.gain,
            **fields,
        ),
        sparse=sparse,
        block=weight.block,
        rows_padded=weight.rows_pad,
        columns=weight.cols_pad,
        entries=weight.codes.entries if sparse else 0,
        bits=weight.codes.bits if isinstance(weight.codes, GridCodes) else fields.get("bits", 0),
        features=features,
        sum_features=fields.get("sum_features", 0),
        basis=basis,
        transform_in=weight.col_transform,
        synthesis_out=weight.row_transform,
        transform_out=transform_address(weight.row_transform, weight.block, False),
        row_start=weight.codes.row_start if sparse else None,
    )


_OPERANDS: dict[int, tuple[weakref.ref[RBEBlocks], Operand]] = {}


def operand_of(weight: RBEBlocks) -> Operand:
    """The operand of a compressed weight, made once; it goes when the weight goes."""
    key = id(weight)
    known = _OPERANDS.get(key)
    if known is not None and known[0]() is weight:
        return known[1]
    operand = _operand(weight)
    _OPERANDS[key] = weakref.ref(weight, lambda _: _OPERANDS.pop(key, None)), operand
    return operand


class MatmulCall:
    """The filled struct of a matmul kernel, and the memory that it points to.

    Parameters
    ----------
    operand : of the weight
    struct, record : of `params`
    buffer : scratch memory

    Attributes
    ----------
    params_at : address of the record
    """

    __slots__ = ("_bytes", "_output_at", "buffer", "operand", "params", "params_at")

    def __init__(self, operand: Operand, struct: Struct, record: Any, buffer: Any) -> None:
        self.operand = operand  # kept: its id is part of the key of the call
        self.params, self.buffer = record, buffer
        self._bytes, self._output_at = record.view(np.uint8), struct.offset("output")
        self.params_at = address(self._bytes)

    def set_output(self, bias: Any, activation: str | None, residual: Any, out: Any) -> None:
        """What the next run adds and where it stores; the arrays must live until then. bias : float32 or None"""
        params.pack_output(
            self._bytes, self._output_at, address(bias), ACTIVATIONS[activation], address(residual),
            0 if residual is None else ENCODING[residual.dtype], address(out), ENCODING[out.dtype], out.shape[1],
        )  # fmt: skip

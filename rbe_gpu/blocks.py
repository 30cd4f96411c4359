"""RBEMatrix and RBEVectors: what a compressed weight is, in memory.

A weight W of `rows x cols` is, block by block,

    W = gain * ( S_r C S_c^T  +  sum_k p_k Phi_k )

with S the synthesis matrix of the transform, C the coefficient matrix (the size of W, edges padded with
zeros to whole blocks), Phi_k the basis functions and p_k the basis parameters of a block. `RBEMatrix` uses
B x B blocks; `RBEVectors` uses runs of B values of one row (S_r is the identity), so that any single row
can be decoded by itself. C is stored as `DenseCodes` (every coefficient, low-bit), `SparseCodes` (some
positions kept) or `GridCodes` (small integers, entropy-coded in a file). `FORMAT.md` has the byte layout.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from . import packing, transforms
from .dispatch import device_of

Array = Any  # numpy.ndarray or cupy.ndarray

GROUPS = (32, 64, 128)
DENSE_BITS = tuple(range(2, packing.MAX_BITS + 1))
SPARSE_BITS = tuple(range(1, 9))
GRID_BITS = tuple(range(2, 9))
INDEX_KINDS = ("full", "bitmap", "delta")
MAX_GAP = 256  # delta index: two kept positions of a row, or the row's start, are at most this far apart


@dataclass(frozen=True)
class DenseCodes:
    """Every coefficient as a b-bit code with a scale per group of its row.

    c = scale[row, col // group] * (u - (2**bits - 1) / 2), u the unsigned code: 2**bits levels, symmetric
    around zero.

    Attributes
    ----------
    bits : 2 to 12
    group : 32, 64 or 128 coefficients of a row share a scale
    value : (rows_pad, cols_pad * bits / 8) uint8, packed (see `packing`)
    scale : (rows_pad, ceil(cols_pad / group)) float16
    """

    bits: int
    group: int
    value: Array
    scale: Array
    kind: ClassVar[str] = "dense"

    @property
    def name(self) -> str:
        return f"dense-int{self.bits}"

    @property
    def arrays(self) -> dict[str, Array]:
        return {"value": self.value, "scale": self.scale}

    @property
    def resident_nbytes(self) -> int:
        """Bytes in memory."""
        return _total(self.arrays)


@dataclass(frozen=True)
class SparseCodes:
    """The kept coefficients of each row, in column order, and where they stand.

    Entries are stored row after row. Their columns are given by `index_kind`:

    - "full": every coefficient is kept; no index is stored
    - "bitmap": bit (c % 8) of index[row, c // 8] is 1 where column c is kept
    - "delta": one byte per entry, the number of columns skipped since the previous entry of the row
      (since the row's start for the first), and `count` entries per row

    Values are float32, float16, or b-bit codes with a scale per group of 32/64/128 consecutive entries:
    with u the code and h = 2**(bits-1), m = u - h if u >= h else h - 1 - u,
    c = sign * (dead_zone + scale * (m + 1/2)), sign = +1 if u >= h else -1.

    Attributes
    ----------
    value_kind : "f32", "f16" or "int<b>", b = 1 to 8
    index_kind : "full", "bitmap" or "delta"
    group : entries per scale; 0 for f32 and f16
    value : (entries,) float32/float16, or (packed_bytes,) uint8
    scale : (ceil(entries / group),) float16, or None
    index : (rows_pad, cols_pad / 8) uint8, (entries,) uint8, or None
    count : (rows_pad,) uint16 or uint32 for "delta", else None
    dead_zone : float, integer values only
    row_start : (rows_pad + 1,) int64; derived, not stored
    """

    value_kind: str
    index_kind: str
    group: int
    value: Array
    scale: Array | None
    index: Array | None
    count: Array | None
    dead_zone: float
    row_start: Array = field(repr=False)
    kind: ClassVar[str] = "sparse"

    @property
    def name(self) -> str:
        return f"sparse-{self.value_kind}"

    @property
    def bits(self) -> int:
        """Bits of one value."""
        return {"f32": 32, "f16": 16}.get(self.value_kind) or int(self.value_kind[3:])

    @property
    def entries(self) -> int:
        """Number of kept coefficients."""
        return int(self.row_start[-1])

    @property
    def arrays(self) -> dict[str, Array]:
        named = {"value": self.value, "scale": self.scale, "index": self.index, "count": self.count}
        return {k: v for k, v in named.items() if v is not None}

    @property
    def resident_nbytes(self) -> int:
        """Bytes in memory: the arrays and `row_start`."""
        return _total(self.arrays) + int(self.row_start.nbytes)


@dataclass(frozen=True)
class GridCodes:
    """Every coefficient as a small signed integer on a grid whose steps are row scale times column scale.

    c[r, k] = row_scale[r] * col_scale[k] * (q - sign(q) * shrink), q = u[r, k] - 2**(bits - 1), u the code.
    Coefficients are peaked, so within a step most lie nearer to zero; `shrink` moves the value there.

    In memory the integers have `bits` bits each; in a file they are a `stream`,
    entropy-coded (see `entropy`).
    Make them with `entropy.grid_codes`.

    Attributes
    ----------
    bits : 2 to 8
    shrink : float32 value, 0 <= shrink < 0.5
    value : (rows_pad, cols_pad * bits / 8) uint8, packed (see `packing`)
    row_scale : (rows_pad,) float16; a file leaves it out where every row's is 1
    col_scale : (cols_pad,) float16
    stored : (bytes,) uint8, the stream that `value` was read from, a view of the file; None: made when needed
    """

    bits: int
    shrink: float
    value: Array
    row_scale: Array
    col_scale: Array
    stored: Array | None = field(default=None, repr=False)
    kind: ClassVar[str] = "grid"

    @property
    def name(self) -> str:
        return f"grid-int{self.bits}"

    @cached_property
    def stream(self) -> NDArray[np.uint8]:
        """The integers as a file holds them, (bytes,) uint8 on the host. Made once."""
        if self.stored is not None:
            return np.asarray(self.stored)
        from . import entropy

        value = self.value if device_of(self.value) == "cpu" else self.value.get()
        return entropy.encode(entropy.integers(value, self.bits, self.col_scale.shape[0]))

    @cached_property
    def has_row_scale(self) -> bool:
        """Whether a row's scale is other than 1."""
        return bool((self.row_scale != 1).any())

    @property
    def arrays(self) -> dict[str, Array]:
        rows = {"row_scale": self.row_scale} if self.has_row_scale else {}
        return {"stream": self.stream, **rows, "col_scale": self.col_scale}

    @property
    def resident_nbytes(self) -> int:
        """Bytes in memory: packed integers and scales. (The stream of a loaded file stays in the file.)"""
        return int(self.value.nbytes + self.row_scale.nbytes + self.col_scale.nbytes)


Codes = DenseCodes | SparseCodes | GridCodes


def _total(arrays: dict[str, Array]) -> int:
    return int(sum(a.nbytes for a in arrays.values()))


@dataclass(frozen=True)
class ErrorReport:
    """How far a decoded weight is from the original.

    relative_error is ||W - W'|| / ||W|| (Frobenius), 0 for two zero matrices; snr_db = -20 log10 of it.
    """

    relative_error: float
    rmse: float
    max_error: float
    snr_db: float


def error_report(original: NDArray[Any], decoded: NDArray[Any]) -> ErrorReport:
    """Compare a weight with its decoded form, in float64, a slice of rows at a time."""
    if original.shape != decoded.shape:
        raise ValueError(f"shapes differ: original {original.shape}, decoded {decoded.shape}")
    a = original.reshape(-1)
    b = decoded.reshape(-1)
    err = energy = worst = 0.0
    for start in range(0, a.size, 1 << 20):
        x = a[start : start + (1 << 20)].astype(np.float64)
        diff = x - b[start : start + (1 << 20)].astype(np.float64)
        err += float(diff @ diff)
        energy += float(x @ x)
        worst = max(worst, float(np.abs(diff).max()))
    relative = float(np.sqrt(err / energy)) if energy else (0.0 if err == 0 else float("inf"))
    snr = float("inf") if relative == 0 else -20.0 * float(np.log10(relative))
    return ErrorReport(relative, float(np.sqrt(err / max(a.size, 1))), worst, snr)


@dataclass(frozen=True)
class RBEBlocks:
    """What `RBEMatrix` and `RBEVectors` share. Make them with `rbe_gpu.compress` or `rbe_gpu.load_file`.

    Attributes
    ----------
    shape : the weight's shape: (rows, cols), or (n,) for one vector
    block : B = 32, 64 or 128
    transform : a concrete name of `transforms.TRANSFORMS`
    gain : a power of two that multiplies everything decoded, so that float16 scales hold any magnitude
    basis : basis parameters, float16, or None: (row blocks, column blocks, 8) for a matrix,
        (rows, column blocks, 5) for vectors
    codes : DenseCodes, SparseCodes or GridCodes of the coefficient matrix
    """

    shape: tuple[int, ...]
    block: int
    transform: str
    gain: float
    basis: Array | None
    codes: Codes
    kind: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if self.block not in transforms.BLOCK_SIZES:
            raise ValueError(f"block={self.block} is not supported; use one of {transforms.BLOCK_SIZES}")
        if self.transform not in transforms.TRANSFORMS:
            raise ValueError(f"unknown transform {self.transform!r}; use one of {transforms.TRANSFORMS}")
        if min(self.shape, default=0) < 1:
            raise ValueError(f"shape {self.shape} is empty; only arrays with at least one value compress")

    @property
    def rows(self) -> int:
        return self.shape[0] if len(self.shape) == 2 else 1

    @property
    def cols(self) -> int:
        return self.shape[-1]

    @property
    def row_block(self) -> int:
        """Rows that are decoded together: B, but 1 for vectors."""
        return 1 if self.kind == "vectors" else self.block

    @property
    def rows_pad(self) -> int:
        return -(-self.rows // self.row_block) * self.row_block

    @property
    def cols_pad(self) -> int:
        return -(-self.cols // self.block) * self.block

    @property
    def inward(self) -> str:
        """The transform that activations go through before they meet the codes."""
        return "none" if self.kind == "columns" else self.transform

    @property
    def outward(self) -> str:
        """The transform that what the codes make of activations goes through."""
        return "none" if self.kind == "vectors" else self.transform

    @property
    def arrays(self) -> dict[str, Array]:
        """The stored arrays by their name in a file."""
        out = self.codes.arrays
        return out if self.basis is None else {"basis": self.basis, **out}

    @property
    def device(self) -> str:
        return device_of(self.codes.value)

    @property
    def nbytes(self) -> int:
        """All bytes stored: values, positions, scales, basis parameters and padding."""
        return _total(self.arrays)

    @property
    def resident_nbytes(self) -> int:
        """Bytes in memory: more than `nbytes` where a file is entropy-coded, or something is derived."""
        return self.codes.resident_nbytes + (0 if self.basis is None else int(self.basis.nbytes))

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the same weight as dense float32."""
        return 4 * prod(self.shape)

    @property
    def ratio(self) -> float:
        """dense float32 bytes / stored bytes."""
        return self.dense_nbytes / self.nbytes

    @property
    def bits_per_weight(self) -> float:
        return 8.0 * self.nbytes / prod(self.shape)

    def decode(self, dtype: Any = np.float32, out: Array | None = None) -> Array:
        """The dense weight, of `shape`; see `rbe_gpu.decode`."""
        from . import ops

        return ops.decode(self, dtype=dtype, out=out)

    def error_report(self, original: NDArray[Any]) -> ErrorReport:
        """Compare with the weight that was compressed."""
        return error_report(original, self.decode())

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.shape))
        basis = "" if self.basis is None else ", basis"
        return (
            f"{type(self).__name__}({shape}, {self.transform}, block={self.block}, {self.codes.name}{basis}, "
            f"{self.bits_per_weight:.2f} bits/weight, ratio {self.ratio:.1f})"
        )


@dataclass(frozen=True, repr=False)
class RBEMatrix(RBEBlocks):
    """A matrix in B x B blocks with a two-dimensional transform."""

    kind: ClassVar[str] = "matrix"


@dataclass(frozen=True, repr=False)
class RBEVectors(RBEBlocks):
    """Rows (or one vector) in runs of B values with a one-dimensional transform: any row decodes alone."""

    kind: ClassVar[str] = "vectors"


@dataclass(frozen=True, repr=False)
class RBEColumns(RBEBlocks):
    """A matrix whose transform runs down its columns only: W = gain * S_r C, without a basis.

    What a matrix is to activations that are coefficients already (`for_coefficients`). It lives in memory
    only.
    """

    kind: ClassVar[str] = "columns"


def gives_coefficients(weight: RBEMatrix) -> RBEVectors:
    """The same codes, read so that y = W x comes out as the coefficients S_r^-1 y of its blocks.

    weight : whole blocks of rows, no basis
    """
    if weight.basis is not None or weight.rows % weight.block:
        raise ValueError(f"{weight!r} has a basis, or rows that are not whole blocks")
    return RBEVectors(weight.shape, weight.block, weight.transform, weight.gain, None, weight.codes)


def for_coefficients(weight: RBEMatrix) -> RBEColumns:
    """The same codes, for activations that are the coefficients S_c^T x of blocks instead of x.

    weight : whole blocks of columns, no basis
    """
    if weight.basis is not None or weight.cols % weight.block:
        raise ValueError(f"{weight!r} has a basis, or columns that are not whole blocks")
    return RBEColumns(weight.shape, weight.block, weight.transform, weight.gain, None, weight.codes)

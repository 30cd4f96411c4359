"""RBEMatrix and RBEVectors: compressed weights in memory.

A weight W of `rows x cols` is, block by block,

    W = gain * ( S_r C S_c^T  +  sum_k p_k Phi_k )

with S the synthesis matrix of the transform, C the coefficient matrix (the size of W, edges padded with
zeros to whole blocks), Phi_k the basis functions and p_k the basis parameters of a block. `RBEMatrix` uses
B x B blocks; `RBEVectors` uses runs of B values of one row (S_r is the identity), so that any single row
can be decoded by itself. C is stored by a codec: `DenseCodes` (every coefficient, low-bit), `SparseCodes` (the
largest ones and their positions) or `GridCodes` (small integers, entropy-coded in a file). `FORMAT.md` has the
byte layout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar, NoReturn, TypeVar

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from . import transforms
from .codecs import Codes
from .codecs.base import Array as Array
from .codecs.base import total_nbytes
from .dispatch import as_cupy, backend_of, device_memory_error, device_of, move_array
from .workspace import Workspace

_DECODED = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
B = TypeVar("B", bound="RBEBlocks")


@dataclass(frozen=True)
class ErrorReport:
    """The error of a decoded weight.

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
    """The base of `RBEMatrix` and `RBEVectors`. Make them with `rbe_gpu.compress` or `rbe_gpu.load_file`.

    Attributes
    ----------
    shape : the weight's shape: (rows, cols), or (n,) for one vector
    block : B = 32, 64 or 128
    transform : a concrete name of `transforms.TRANSFORMS`
    gain : a power of two that multiplies everything decoded, so that float16 scales hold any magnitude
    basis : basis parameters, float16, or None: (row blocks, column blocks, 8) for a matrix,
        (rows, column blocks, 5) for vectors
    codes : the coefficient matrix, as a codec stores it (see `codecs`)
    row_transformed, col_transformed : the sides of W that the transform applies to. Both for a matrix, only the
        columns for vectors; `RBEMatrix.without_transform` switches one off, in memory only
    """

    shape: tuple[int, ...]
    block: int
    transform: str
    gain: float
    basis: Array | None
    codes: Codes
    row_transformed: bool = True
    col_transformed: bool = True
    kind: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if self.block not in transforms.BLOCK_SIZES:
            raise ValueError(f"block={self.block} is not supported; use one of {transforms.BLOCK_SIZES}")
        if self.transform not in transforms.TRANSFORMS:
            raise ValueError(f"unknown transform {self.transform!r}; use one of {transforms.TRANSFORMS}")
        if min(self.shape, default=0) < 1:
            raise ValueError(f"shape {self.shape} is empty; only arrays with at least one value compress")
        if not self.codes.has_size(self.rows_pad, self.cols_pad):
            raise ValueError(
                f"the codes are not those of {self.rows_pad} x {self.cols_pad} coefficients, which shape {self.shape}"
                f" has in blocks of {self.block}"
            )

    @property
    def rows(self) -> int:
        return self.shape[0] if len(self.shape) == 2 else 1

    @property
    def cols(self) -> int:
        return self.shape[-1]

    @property
    def row_block(self) -> int:
        """Rows that are decoded together: B, or 1 without a row transform."""
        return self.block if self.row_transformed else 1

    @property
    def rows_pad(self) -> int:
        return -(-self.rows // self.row_block) * self.row_block

    @property
    def cols_pad(self) -> int:
        return -(-self.cols // self.block) * self.block

    @property
    def row_transform(self) -> str:
        """S_r, the transform that outputs W x go through; "none" for vectors."""
        return self.transform if self.row_transformed else "none"

    @property
    def col_transform(self) -> str:
        """S_c, the transform that inputs x go through."""
        return self.transform if self.col_transformed else "none"

    @property
    def arrays(self) -> dict[str, Array]:
        """The stored arrays by their name in a file."""
        out = self.codes.arrays
        return out if self.basis is None else {"basis": self.basis, **out}

    @property
    def device(self) -> str:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """All bytes stored: values, positions, scales, basis parameters and padding."""
        return total_nbytes(self.arrays)

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

    def decode(
        self, dtype: Any = np.float32, out: Array | None = None, workspace: Workspace | None = None
    ) -> Array:
        """The dense weight, of `shape`; see `rbe_gpu.decode`."""
        if type(out) is not np.ndarray:
            out = as_cupy(out)
        backend = backend_of(weight=self, out=out)
        dtype = np.dtype(dtype) if out is None else out.dtype
        if dtype not in _DECODED:
            raise TypeError(f"dtype {dtype} is not supported; use float32, float16 or bfloat16")
        try:
            if out is None:
                out = backend.xp.empty(self.shape, dtype)
            elif (
                out.shape != self.shape
                or not out.flags.c_contiguous
                or not getattr(out.flags, "writeable", True)
            ):
                self._refuse(out, backend.array_module)
            scratch = (workspace or Workspace()).on(device_of(out))
            backend.decode(self, out.reshape(self.rows, self.cols), scratch)
        except MemoryError as error:
            device_error = device_memory_error(error)
            raise device_error from (None if device_error is error else error)
        return out

    def _refuse(self, out: Array, module: str) -> NoReturn:
        """Raise the error of an `out` of the wrong shape or layout."""
        if out.shape != self.shape:
            raise ValueError(
                f"out has shape {tuple(out.shape)}, expected {self.shape} (the shape of the weight)"
            )
        if not out.flags.c_contiguous:
            raise ValueError(f"out is not C-contiguous; pass {module}.ascontiguousarray(out)")
        raise ValueError("out is read-only; pass a writable array")  # CuPy's arrays never are

    def to(self: B, device: str) -> B:
        """The same weight on another device, "cpu" or "cuda:0"; see `rbe_gpu.to`. Nothing is decoded."""
        if device == self.device:
            return self
        basis = None if self.basis is None else move_array(self.basis, device)
        codes = self.codes if device == "cpu" else self.codes.for_gpu()
        return replace(self, basis=basis, codes=codes.map_arrays(lambda a: move_array(a, device)))

    def for_lookup(self: B) -> B:
        """The same weight in the form that takes least memory as a table of `embedding`; a matmul decodes it."""
        codes = self.codes.for_lookup()
        return self if codes is self.codes else replace(self, codes=codes)

    def for_int8(self: B) -> B:
        """The same weight in the form that takes least memory for int8 activations; other matmuls decode it."""
        codes = self.codes.for_int8()
        return self if codes is self.codes else replace(self, codes=codes)

    def for_float(self: B) -> B:
        """The same weight in the form that `linear` reads for activations as they are."""
        codes = self.codes.for_float()
        return self if codes is self.codes else replace(self, codes=codes)

    def error_report(self, original: NDArray[Any]) -> ErrorReport:
        """Compare with the weight that was compressed."""
        return error_report(original, self.decode())

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.shape))
        basis = "" if self.basis is None else ", basis"
        sides = "" if self.row_transformed or self.kind == "vectors" else ", no row transform"
        sides += "" if self.col_transformed else ", no column transform"
        return (
            f"{type(self).__name__}({shape}, {self.transform}, block={self.block}, {self.codes.name}{basis}{sides}, "
            f"{self.bits_per_weight:.2f} bits/weight, ratio {self.ratio:.1f})"
        )


@dataclass(frozen=True, repr=False)
class RBEMatrix(RBEBlocks):
    """A matrix in B x B blocks with a two-dimensional transform."""

    kind: ClassVar[str] = "matrix"

    def without_transform(self, side: str) -> RBEMatrix:
        """The same codes with the transform of one side switched off. No array is copied; files do not hold it.

        Parameters
        ----------
        side : "row": y = W x comes out as the coefficients S_r^-1 y of its blocks.
            "col": W takes the coefficients S_c^T x of blocks in the place of x.

        Raises
        ------
        ValueError
            The weight has a basis, that side is not whole blocks, or a transform is off already.
        """
        if side not in ("row", "col"):
            raise ValueError(f"side={side!r} is not valid; use 'row' or 'col'")
        size = self.rows if side == "row" else self.cols
        if self.basis is not None or size % self.block:
            raise ValueError(f"{self!r} has a basis, or {side}s that are not whole blocks")
        if not (self.row_transformed and self.col_transformed):
            raise ValueError(f"{self!r} has one transform only; start from the weight that it was made from")
        return replace(self, row_transformed=side != "row", col_transformed=side != "col")


@dataclass(frozen=True, repr=False)
class RBEVectors(RBEBlocks):
    """Rows (or one vector) in runs of B values with a one-dimensional transform: any row decodes alone."""

    row_transformed: bool = False
    kind: ClassVar[str] = "vectors"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.row_transformed or not self.col_transformed:
            raise ValueError("vectors have a transform along their columns and none along their rows")

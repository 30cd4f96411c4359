"""Dense weights to RBE blocks.

`compress` takes one target: a *grade* or an `rmse` (the smallest size that meets an error), a *ratio* (the
smallest error that fits the bytes), or a *density* (the fraction of the coefficients to store). Size means every
stored byte: values, positions, scales, basis parameters and padding.

How a target is met. The weight is divided by its gain, the basis is fitted and subtracted, and the residual is
transformed. The candidates of every codec (`codecs.search`) are compared on a sample of rows. The best is encoded
in full, decoded, compared with the original, and refined until the decoded weight meets the target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, floor, log2, prod
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from . import transforms
from .blocks import Array, RBEMatrix, RBEVectors, error_report
from .codecs import Codes, EncodeConfig
from .codecs.base import Sample
from .codecs.search import best_for_bytes, best_for_error, candidates, config_named
from .dispatch import as_cupy, device_of, is_cupy
from .threads import blas

F32 = NDArray[np.float32]
Weight = RBEMatrix | RBEVectors
Kind = type[RBEMatrix] | type[RBEVectors]

#: Largest relative Frobenius error of each grade.
GRADES = {"S": 1e-3, "A": 1e-2, "B": 1e-1, "C": 3e-1}
ADAPTIVE = ("dct", "dwt-db2", "dwt-haar", "none")
_SAMPLE = 1 << 18  # coefficients that candidates are compared on; a group's error varies little between rows


# --- preparation: gain, basis, transform --------------------------------------------------------------


def _checked(array: Any) -> F32:
    """The array as float32, finite, 1-D or 2-D and not empty."""
    if device_of(array, "array") != "cpu":
        raise TypeError("array is on a GPU; the encoder runs on NumPy arrays (cupy.asnumpy(array))")
    if array.dtype not in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16):
        raise TypeError(f"array has dtype {array.dtype}; use float32, float16, bfloat16 or float64")
    if array.ndim not in (1, 2):
        raise ValueError(f"array has shape {array.shape}; only vectors and matrices compress (reshape it)")
    if array.size == 0:
        raise ValueError(f"array has shape {array.shape}; an empty array does not compress")
    with np.errstate(over="ignore"):
        w = np.ascontiguousarray(array, np.float32)
    flat = w.reshape(-1)
    for start in range(0, flat.size, 1 << 20):  # no mask of the array's size
        if not np.isfinite(flat[start : start + (1 << 20)]).all():
            raise ValueError(
                "array holds NaN or Inf (or values beyond float32); only finite weights compress"
            )
    return w


def _gain(w: F32) -> float:
    """A power of two near the root mean square, so that scales sit in the middle of float16's range."""
    largest = float(np.abs(w).max())
    if largest == 0.0:
        return 1.0
    scaled = w.reshape(-1)
    energy = 0.0
    for start in range(0, scaled.size, 1 << 20):
        part = scaled[start : start + (1 << 20)].astype(np.float64) / largest
        energy += float(part @ part)
    rms = largest * float(np.sqrt(energy / w.size))
    exponent = max(floor(log2(rms)), ceil(log2(largest)) - 12)  # a block of outliers stays below 2^19 / 2^3
    return 2.0 ** min(max(exponent, -120), 120)


@dataclass(frozen=True)
class _Prepared:
    """A weight before quantisation: everything but the codes."""

    kind: Kind
    shape: tuple[int, ...]
    block: int
    transform: str
    gain: float
    basis: NDArray[np.float16] | None
    coefficients: F32  # (rows_pad, cols_pad)

    def with_codes(self, codes: Codes) -> Weight:
        return self.kind(self.shape, self.block, self.transform, self.gain, self.basis, codes)


def _padded(w: F32, kind: Kind, block: int, gain: float) -> F32:
    w2 = w.reshape(1, -1) if w.ndim == 1 else w
    row_block = block if kind is RBEMatrix else 1
    rows, cols = -(-w2.shape[0] // row_block) * row_block, -(-w2.shape[1] // block) * block
    out = np.zeros((rows, cols), np.float32)
    np.multiply(w2, np.float32(1.0 / gain), out=out[: w2.shape[0], : w2.shape[1]])
    return out


@lru_cache(maxsize=16)
def _fit_matrix(matrix: bool, block: int) -> F32:
    """Least squares: parameters = block values @ this. (values, functions) float32."""
    phi = transforms.basis_2d(block) if matrix else transforms.basis_1d(block)
    return np.ascontiguousarray(np.linalg.pinv(phi.reshape(len(phi), -1)), np.float32)


def _fit_basis(x: F32, kind: Kind, block: int) -> NDArray[np.float16]:
    """The basis parameters of every block, rounded to float16; x is reduced to the residual in place."""
    matrix = kind is RBEMatrix
    fit = _fit_matrix(matrix, block)
    phi = transforms.basis_2d(block) if matrix else transforms.basis_1d(block)
    flat_phi = phi.reshape(len(phi), -1).astype(np.float32)
    row_block = block if matrix else 1
    params = np.empty((x.shape[0] // row_block, x.shape[1] // block, len(phi)), np.float16)
    for i in range(params.shape[0]):
        rows = x[i * row_block : (i + 1) * row_block]
        blocks = rows.reshape(row_block, -1, block).transpose(1, 0, 2)
        p = (blocks.reshape(blocks.shape[0], -1) @ fit).astype(np.float16)
        params[i] = p
        residual = (p.astype(np.float32) @ flat_phi).reshape(blocks.shape)
        rows -= residual.transpose(1, 0, 2).reshape(rows.shape)
    return params


def _transform(x: F32, kind: Kind, block: int, name: str) -> F32:
    """Block analysis, C = A X A^T (or X A^T for vectors), a few block rows at a time; overwrites x."""
    if name == "none":
        return x
    a = np.ascontiguousarray(transforms.analysis(name, block), np.float32)
    step = max(block, (1 << 20) // x.shape[1] // block * block)
    for start in range(0, x.shape[0], step):
        rows = x[start : start + step]
        c = rows.reshape(-1, block) @ a.T
        if kind is RBEMatrix:
            c = np.matmul(a, c.reshape(-1, block, x.shape[1]))
        rows[...] = c.reshape(rows.shape)
    return x


def _prepare(w: F32, kind: Kind, block: int, transform: str, basis: bool, gain: float) -> _Prepared:
    x = _padded(w, kind, block, gain)
    params = _fit_basis(x, kind, block) if basis else None
    return _Prepared(kind, w.shape, block, transform, gain, params, _transform(x, kind, block, transform))


# --- choosing -----------------------------------------------------------------------------------------


def _sample_rows(rows: int, cols: int, row_block: int) -> NDArray[np.int64]:
    """Evenly spaced block rows with about `_SAMPLE` values."""
    blocks = -(-rows // row_block)
    take = min(blocks, max(1, _SAMPLE // (row_block * cols)))
    first = np.unique(np.linspace(0, blocks - 1, take).astype(np.int64)) * row_block
    picked = (first[:, None] + np.arange(row_block)).reshape(-1)
    return np.asarray(picked[picked < rows])


def _sample(prepared: _Prepared, energy: float) -> Sample:
    weight = 1.0
    if not transforms.is_orthonormal(prepared.transform):
        # an error of one coefficient spreads over its pattern: the mean squared length of the patterns
        s = transforms.synthesis(prepared.transform, prepared.block)
        weight = float((s * s).sum(axis=0).mean()) ** (2 if prepared.kind is RBEMatrix else 1)
    return Sample(prepared.coefficients, energy, weight)


def _basis_may_help(part: F32, kind: Kind, block: int, gain: float, energy: float) -> bool:
    """Whether the basis removes at least half the energy that its bytes would remove as wider codes.

    One bit per coefficient divides the squared error by 4, so `spent` bits are worth a factor 4^-spent.
    """
    x = _padded(part, kind, block, gain)
    values = x.size
    params = _fit_basis(x, kind, block)
    left = float((x.astype(np.float64) ** 2).sum())
    spent = 16.0 * params.size / values
    return bool(left <= energy * (1 - 0.5 * (1 - 4.0**-spent)))


def _choose(
    w: F32,
    kind: Kind,
    block: int,
    gain: float,
    names: tuple[str, ...],
    bases: tuple[bool, ...],
    judge: Callable[[Sample, int], tuple[EncodeConfig, float]],
) -> tuple[str, bool, EncodeConfig]:
    """The transform, basis and configuration with the lowest score of `judge(sample, basis bytes)`, on a sample."""
    w2 = w.reshape(1, -1) if w.ndim == 1 else w
    row_block = block if kind is RBEMatrix else 1
    part = np.ascontiguousarray(w2[_sample_rows(w2.shape[0], w2.shape[1], row_block)])
    scaled = part.astype(np.float64) / gain
    energy = float((scaled * scaled).sum())
    best: tuple[float, str, bool, EncodeConfig] | None = None
    if len(bases) > 1 and not _basis_may_help(part, kind, block, gain, energy):
        bases = (False,)
    problem: ValueError | None = None
    for name in names:
        for basis in bases:
            prepared = _prepare(part, kind, block, name, basis, gain)
            try:
                config, score = judge(_sample(prepared, energy), _basis_bytes(w2.shape, kind, block, basis))
            except ValueError as error:
                problem = error
                continue
            if best is None or score < best[0]:
                best = score, name, basis, config
    if best is None:
        assert problem is not None
        raise problem
    return best[1:]


def _basis_bytes(shape: tuple[int, ...], kind: Kind, block: int, basis: bool) -> int:
    if not basis:
        return 0
    if kind is RBEMatrix:
        return 16 * -(-shape[0] // block) * -(-shape[1] // block)
    return 10 * shape[0] * -(-shape[1] // block)


def _padded_shape(w: F32, kind: Kind, block: int) -> tuple[int, int]:
    rows, cols = (1, w.shape[0]) if w.ndim == 1 else w.shape
    row_block = block if kind is RBEMatrix else 1
    return -(-rows // row_block) * row_block, -(-cols // block) * block


# --- the public function ------------------------------------------------------------------------------


@blas
def compress(
    array: Array,
    *,
    grade: str | None = None,
    ratio: float | None = None,
    rmse: float | None = None,
    density: float | None = None,
    block: int = 64,
    transform: str = "dct",
    basis: bool | str = "auto",
    codes: str | None = None,
    kind: str | None = None,
) -> Weight:
    """Compress a dense weight into RBE blocks.

    Give one target, or `codes` alone for every coefficient at that width.

    Parameters
    ----------
    array : (rows, cols) or (n,) float32/float16/bfloat16/float64, finite; a CuPy array is encoded on the CPU, and its
        codes go back to its GPU
    grade : "S", "A", "B" or "C": relative Frobenius error <= 1e-3, 1e-2, 1e-1, 3e-1, smallest storage
    ratio : float32 bytes / stored bytes, at least this, smallest error
    rmse : root mean square error, at most this, smallest storage
    density : fraction of the coefficients to store, the largest ones, 0 < density <= 1
    block : B = 32, 64 or 128
    transform : "dct", "dwt" (Daubechies 4-tap), "dwt-haar", "dwt-db2", "dwt-bior3.1", "hadamard", "none", or
        "adaptive" (the best on this weight of dct, dwt-db2, dwt-haar and none)
    basis : True or False, or "auto" (used where it lowers the size, or the error at equal bytes)
    codes : "dense-int2" to "dense-int12", "sparse-int1" to "sparse-int8", "sparse-f16", "sparse-f32";
        None lets the encoder choose ("sparse-f16" with `density`)
    kind : "matrix" (B x B blocks), or "vectors" (every row by itself, for embedding tables; the only kind of
        a 1-D array)

    Returns
    -------
    RBEMatrix or RBEVectors

    Raises
    ------
    TypeError
        Unknown array type or dtype.
    ValueError
        Empty or more than 2-D, NaN or Inf, more than one target, or a target that cannot be reached.

    Examples
    --------
    >>> m = rbe.compress(weight, grade="B")
    >>> m.ratio, m.error_report(weight).relative_error
    """
    array = as_cupy(array)
    if is_cupy(array):
        weight = compress(
            array.get(), grade=grade, ratio=ratio, rmse=rmse, density=density, block=block, transform=transform,
            basis=basis, codes=codes, kind=kind,
        )  # fmt: skip
        return weight.to(device_of(array))
    w = _checked(array)
    classes: dict[str, Kind] = {"matrix": RBEMatrix, "vectors": RBEVectors}
    class_name = kind or ("vectors" if w.ndim == 1 else "matrix")
    if class_name not in classes:
        raise ValueError(f"unknown kind {kind!r}; use 'matrix' or 'vectors'")
    if class_name == "matrix" and w.ndim == 1:
        raise ValueError("a 1-D array has no 2-D blocks; use kind='vectors' or reshape it to a matrix")
    cls = classes[class_name]
    targets = {"grade": grade, "ratio": ratio, "rmse": rmse, "density": density}
    target_names = [k for k, v in targets.items() if v is not None]
    if len(target_names) > 1:
        raise ValueError(f"{' and '.join(target_names)} are both given; give one target")
    if not target_names and codes is None:
        raise ValueError("no target; give grade=, ratio=, rmse= or density=, or codes= alone")
    if block not in transforms.BLOCK_SIZES:
        raise ValueError(f"block={block} is not supported; use one of {transforms.BLOCK_SIZES}")
    names = ADAPTIVE if transform == "adaptive" else (transforms.canonical_transform(transform),)
    if basis not in (True, False, "auto"):
        raise ValueError(f"basis={basis!r} is not valid; use True, False or 'auto'")
    allowed = None if codes is None else (_checked_codes(codes),)
    gain = _gain(w)
    rows, cols = _padded_shape(w, cls, block)
    bases = (False, True) if basis == "auto" else (bool(basis),)

    if density is not None or not target_names:
        if density is not None and not 0.0 < density <= 1.0:
            raise ValueError(f"density={density} is not a fraction; use 0 < density <= 1")
        fraction = 1.0 if density is None else float(density)
        config = config_named(codes or "sparse-f16")
        if not config.prunes and fraction < 1.0:
            raise ValueError(
                f"density={density} needs sparse codes, not {codes}; use codes='sparse-f16' or similar"
            )
        config = replace(config, density=fraction)

        # the basis takes bytes too: compare errors at equal bits per weight
        def judge(sample: Sample, basis_bytes: int) -> tuple[EncodeConfig, float]:
            spent_bits = 8.0 * basis_bytes / (rows * cols)
            return config, sample.relative_error(config) * 2.0**spent_bits

        chosen = _choose(w, cls, block, gain, names, bases, judge)
        prepared = _prepare(w, cls, block, chosen[0], chosen[1], gain)
        return prepared.with_codes(config.quantize(prepared.coefficients))

    if ratio is not None:
        if not ratio > 0:
            raise ValueError(f"ratio={ratio} is not positive")
        budget = 4 * prod(w.shape) / ratio
        transform_name, use_basis, config = _choose(
            w, cls, block, gain, names, bases,
            lambda sample, extra: best_for_bytes(sample, budget - extra, rows, cols, allowed),
        )  # fmt: skip
        return _fit_bytes(_prepare(w, cls, block, transform_name, use_basis, gain), config, budget)

    target = _checked_error(w, grade, rmse)

    def judge_error(sample: Sample, extra: int) -> tuple[EncodeConfig, float]:
        config, size = best_for_error(sample, target, rows, cols, allowed)
        return config, size + extra

    transform_name, use_basis, config = _choose(w, cls, block, gain, names, bases, judge_error)
    prepared = _prepare(w, cls, block, transform_name, use_basis, gain)
    return _fit_error(w, prepared, config, target, allowed)


def _fit_bytes(prepared: _Prepared, config: EncodeConfig, budget: float) -> Weight:
    """Encode in full; lower the density until the bytes fit. The delta index may have filled long gaps."""
    while True:
        m = prepared.with_codes(config.quantize(prepared.coefficients))
        if m.nbytes <= budget:
            return m
        if not config.prunes or config.density * prepared.coefficients.size < 1:
            raise ValueError(
                f"{m.nbytes} bytes are needed where {int(budget)} are allowed; use a lower ratio"
            )
        config = replace(config, density=config.density * min(0.98, 0.999 * budget / m.nbytes))


def _fit_error(
    w: F32, prepared: _Prepared, config: EncodeConfig, target: float, allowed: tuple[str, ...] | None
) -> Weight:
    """Encode in full, decode, compare; raise the density or the width until the target is met."""
    while True:
        m = prepared.with_codes(config.quantize(prepared.coefficients))
        reached = m.error_report(w).relative_error
        if reached <= target:
            return m
        if config.density < 1.0:
            config = replace(config, density=min(1.0, config.density * 1.01 + 1e-3))
            continue
        rows, cols = prepared.coefficients.shape
        size = config.nbytes(rows, cols)
        wider = [c for c in candidates(allowed) if c.nbytes(rows, cols) > size]
        if not wider:
            raise ValueError(f"relative error {target:.3g} is out of reach of {config.name} ({reached:.3g})")
        config = min(wider, key=lambda c: c.nbytes(rows, cols))


def _checked_codes(codes: str) -> str:
    known = tuple(dict.fromkeys(c.name for c in candidates()))
    if codes not in known:
        raise ValueError(f"unknown codes {codes!r}; use one of {', '.join(known)}")
    return codes


def _checked_error(w: F32, grade: str | None, rmse: float | None) -> float:
    """The target as a relative Frobenius error."""
    if grade is not None:
        if grade not in GRADES:
            raise ValueError(f"unknown grade {grade!r}; use one of {', '.join(GRADES)}")
        return GRADES[grade]
    assert rmse is not None
    if not rmse > 0:
        raise ValueError(f"rmse={rmse} is not positive")
    rms = error_report(w, np.zeros_like(w)).rmse
    return rmse / rms if rms else float("inf")

"""Calibrated quantisation: choose the codes of a weight for the least error of its outputs, not of itself.

For y = x W^T with inputs of second moment H = E[x^T x], the error of the outputs is tr(D H D^T), D = W - W'.
With an orthonormal row transform it is tr(dC H' dC^T), H' = S_c^T H S_c, and the rows of C are independent.
Coefficients are quantised one column after another, and the error of a column is compensated by the columns
after it (optimal-brain-surgeon feedback: Frantar et al. 2022, "GPTQ" and "Optimal brain compression"),
here in the transform domain.

Three refinements. (1) The steps of the grid: with U the upper Cholesky factor of H'^-1, an error e in column i
costs (e / U_ii)^2 after feedback, so the step of column i is proportional to U_ii: every column then adds the same
output error, which for entropy-coded codes is the optimum (reverse water-filling; Cover and Thomas, chapter 10).
(2) The inputs are those of the *compressed* layers before, x', while the target stays the dense layer's output: the
weight that is quantised is argmin_V E|x W^T - x' V^T|^2. (3) Thresholds and reconstruction points are shifted towards
zero, where codes are cheap and coefficients are dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from . import dispatch, transforms
from .blocks import RBEMatrix, RBEVectors
from .codecs import GridCodes

F64 = NDArray[np.float64]
F32 = NDArray[np.float32]
#: of rows x (n, features): n, x^T x (features, features) float32, and the sum of the rows (features,) float64
Sums = tuple[int, F32, F64]

DAMPING = 0.01  # of the mean diagonal of H: regularises directions that the texts never used
#: With fewer rows than this, means are corrected in proportion to the rows
_ROWS_OF_MEANS = 256
_RUN = 64  # columns between two updates of the remaining ones by one matmul
_TOP = 127
_MOST_BANDS, _BAND_CODES = 8, 1 << 18  # of the estimate of a stream: bands of rows, and codes of one at least
#: Shift of the rounding thresholds and of the reconstruction points, in grid steps, by bits per coefficient.
#: Measured on MiniLM: 0.10 and 0.03 gain 0.015 of cosine at 1.6 bits; at 4 bits no shift of the reconstruction is as
#: good (0.9942 and 0.9941 on other text), and the int8 matmul needs that.
DEAD, SHRINK = 0.10, 0.0


@dataclass
class Moments:
    """Second moments of a layer's inputs, accumulated in float64 over the texts.

    Attributes
    ----------
    count : rows seen
    compressed : (features, features) sum of x'^T x', x' the input after compressed layers
    cross : (features, features) sum of x^T x', x the input of the dense model
    mean_dense, mean_compressed : (features,) sums of x and x'
    """

    features: int
    count: int = 0
    compressed: F64 = field(init=False)
    cross: F64 = field(init=False)
    mean_dense: F64 = field(init=False)
    mean_compressed: F64 = field(init=False)
    same: bool = True  # all inputs so far were the same in both models

    def __post_init__(self) -> None:
        n = self.features
        self.compressed = np.zeros((n, n))
        self.cross = self.compressed  # shared while the inputs are the same
        self.mean_dense, self.mean_compressed = np.zeros(n), np.zeros(n)

    def add(self, dense: F32, compressed: F32) -> None:
        """Rows of both inputs, (n, features) float32. Products of a batch are float32, sums of them float64."""
        if dense is compressed:
            self.add_sums(*input_sums(dense))
            return
        self.count += len(dense)
        if self.same:
            self.cross = self.compressed.copy()
            self.same = False
        self.compressed += compressed.T @ compressed
        self.cross += dense.T @ compressed
        self.mean_dense += dense.sum(axis=0, dtype=np.float64)
        self.mean_compressed += compressed.sum(axis=0, dtype=np.float64)

    def add_sums(self, count: int, product: F32, total: F64) -> None:
        """Rows of inputs that are the same in both models, as `input_sums` has them."""
        self.count += count
        self.compressed += product
        if not self.same:
            self.cross += product
        self.mean_dense += total
        self.mean_compressed += total


def input_sums(x: F32) -> Sums:
    """Sums over rows of x (n, features)."""
    return len(x), x.T @ x, x.sum(axis=0, dtype=np.float64)


@dataclass(frozen=True)
class Geometry:
    """The factored moments of an input, for every weight that multiplies it, in one transform and block size.

    Attributes
    ----------
    order : (features,) columns in the order of quantisation, most energy first
    panels : U of the ordered columns without its zeros: for each _RUN columns, from `start` on, the float32 rows
        U[start : start + _RUN, start:]
    step : (features,) relative steps of the ordered columns, geometric mean 1
    target : (features, features) float32: the weight to quantise is W @ target; None: W itself
    """

    transform: str
    block: int
    order: NDArray[np.int64]
    panels: tuple[F32, ...]
    step: F64
    target: F32 | None

    @property
    def upper(self) -> F32:
        """U, (features, features) float32."""
        u = np.zeros((len(self.order), len(self.order)), np.float32)
        for k, panel in enumerate(self.panels):
            u[k * _RUN : k * _RUN + len(panel), k * _RUN :] = panel
        return u


def _columns(a: F64, s: F64) -> F64:
    """Blocks of the last axis times S: a (n, cols_pad) -> (n, cols_pad)."""
    return np.asarray((a.reshape(-1, len(s)) @ s).reshape(a.shape))


def geometry(moments: Moments, transform: str = "dct", block: int = 64) -> Geometry:
    """Factor the second moments once for all weights that share an input (Q, K and V)."""
    if not transforms.is_orthonormal(transform):
        raise ValueError(f"transform {transform!r} is not orthonormal; calibrate with dct, dwt or none")
    s = transforms.synthesis(transform, block)
    n = moments.features
    pad = -n % block
    h = moments.compressed / moments.count
    # fewer rows than features leave directions that no text used
    few = max(1.0, n / moments.count)
    damp = DAMPING * few**2 * float(np.trace(h)) / n
    if damp <= 0.0:
        raise ValueError("the texts never used this layer (its inputs are all zero)")
    h[np.arange(n), np.arange(n)] += damp
    inverse: F64 = np.asarray(np.linalg.inv(h), np.float64)
    target = None
    if not moments.same:
        moved = moments.cross / moments.count
        moved[np.arange(n), np.arange(n)] += damp
        target = np.asarray(moved @ inverse, np.float32)

    def transformed(a: F64, padding: float) -> F64:
        """S^T a S; `padding` on the diagonal of padded columns keeps the matrix positive definite."""
        wide = np.pad(a, (0, pad))
        wide[np.arange(n, n + pad), np.arange(n, n + pad)] = padding
        return _columns(_columns(wide, s).T.copy(), s)

    order = np.argsort(-np.diag(transformed(h, damp)), kind="stable")
    precision = transformed(inverse, 1 / damp)[np.ix_(order, order)]
    upper = np.linalg.cholesky((precision + precision.T) / 2).T
    diagonal = np.diag(upper)
    mean = float(np.exp(np.mean(np.log(diagonal))))
    panels = tuple(
        np.ascontiguousarray(upper[start : start + _RUN, start:], np.float32)
        for start in range(0, len(order), _RUN)
    )
    return Geometry(transform, block, order, panels, diagonal / mean, target)


def target_coefficients(weight: F32, geo: Geometry) -> F32:
    """The coefficients to quantise, columns in the geometry's order: S_r^T (W target) S_c, (rows_pad, cols_pad)."""
    s = np.asarray(transforms.synthesis(geo.transform, geo.block), np.float32)
    w = weight if geo.target is None else weight @ geo.target
    rows, cols = w.shape
    w = np.pad(w, ((0, -rows % geo.block), (0, -cols % geo.block)))
    c = (w.reshape(-1, geo.block) @ s).reshape(-1, geo.block, w.shape[1])
    return np.ascontiguousarray(np.matmul(s.T, c).reshape(w.shape)[:, geo.order])


def round_with_feedback(
    coefficients: F32, geo: Geometry, step: float, dead: float = DEAD, shrink: float = SHRINK
) -> tuple[NDArray[np.int8], F32]:
    """Codes (rows_pad, cols_pad) int8 in the geometry's order, and the float32 steps of its columns."""
    quantize_run = dispatch.CPU.module("feedback").quantize_run
    c = coefficients.copy()
    rows, cols = c.shape
    # rounded as they are stored; at least so large that every code fits int8
    steps = np.maximum(step * geo.step, np.abs(c).max(axis=0) / _TOP).astype(np.float16).astype(np.float32)
    codes = np.empty((rows, cols), np.int8)
    error = np.empty((rows, _RUN), np.float32)
    ones = np.ones(rows, np.float32)
    for start, panel in zip(range(0, cols, _RUN), geo.panels, strict=True):
        stop = min(start + _RUN, cols)
        quantize_run(
            c, start, stop, panel, steps, ones, np.float32(dead), np.float32(shrink), np.float32(_TOP),
            codes, error,
        )  # fmt: skip
        if stop < cols:
            c[:, stop:] -= error[:, : stop - start] @ panel[:, stop - start :]
    return codes, steps


def stream_bits(codes: NDArray[np.int8], classes: int = 16) -> float:
    """Bits per code of a stream (`codecs.entropy`), estimated.

    The entropy of an order-0 coder over bands of rows and classes of columns of similar spread, plus the stream's
    overhead: on MiniLM's weights 0.04 bits for wide codes (4% at one bit), the entropy once more where nearly all are
    zero.
    """
    bands = max(1, min(_MOST_BANDS, codes.size // _BAND_CODES))
    bits: float
    if bands == 1:
        bits = _entropy_by_class(codes, classes)
    else:
        energy = np.concatenate(
            [np.square(part, dtype=np.float32).sum(axis=1) for part in np.array_split(codes, 8 * bands)]
        )
        groups = np.array_split(np.argsort(energy, kind="stable"), bands)
        bits = sum((_entropy_by_class(codes[g], classes) * g.size for g in groups), 0.0) / len(codes)
    return float(bits + 0.04 * bits / (bits + 0.03))


def _entropy_by_class(codes: NDArray[np.int8], classes: int) -> float:
    """Bits per code of an order-0 coder over classes of columns of similar spread."""
    count_codes = dispatch.CPU.module("feedback").count_codes
    counts = np.empty((codes.shape[1], 256), np.int64)
    count_codes(codes.T if codes.flags.f_contiguous else np.ascontiguousarray(codes.T), counts)
    value = np.arange(-128, 128)
    order = np.argsort(counts @ (value * value), kind="stable")
    bits = 0.0
    for group in np.array_split(order, min(classes, len(order))):
        total = counts[group].sum(axis=0)
        p = total[total > 0] / total.sum()
        bits -= float((p * np.log2(p)).sum()) * group.size
    return float(bits / codes.shape[1])


def quantize_matrix(weight: F32, geo: Geometry, step: float) -> RBEMatrix:
    """Quantise a weight (rows, cols) on the grid of a geometry; `step` is the mean step of a coefficient."""
    gain = _power_of_two(step)
    codes, steps = round_with_feedback(target_coefficients(weight, geo) / np.float32(gain), geo, step / gain)
    q = np.empty_like(codes)
    q[:, geo.order] = codes
    col_scale = np.empty(len(steps), np.float16)
    col_scale[geo.order] = steps
    row_scale = np.ones(len(q), np.float16)
    stored = GridCodes.from_integers(q, row_scale, col_scale, float(np.float32(SHRINK)))
    return RBEMatrix(weight.shape, geo.block, geo.transform, gain, None, stored)


def row_coefficients(table: F32, transform: str = "dct", block: int = 64) -> F32:
    """Coefficients of an embedding table, transformed row by row: (rows, cols_pad) float32."""
    s = transforms.synthesis(transform, block).astype(np.float32)
    padded = np.pad(table.astype(np.float32), ((0, 0), (0, -table.shape[1] % block)))
    return np.ascontiguousarray((padded.reshape(-1, block) @ s).reshape(padded.shape))


def row_scales(table: F32, power: float, counts: NDArray[np.int64] | None = None) -> F32:
    """Relative steps of a table's rows, mean 1, as float16 holds them.

    step[r] = norm[r]^power * (count[r] + 2)^-1/4

    A row that is read f times as often deserves a step 1 / sqrt(f) as large, for the least mean error of what is read
    (reverse water-filling); the fourth root is between that and equal steps, because counts are of one text and
    the table serves others. On package descriptions, MiniLM with a table of 1.8 bits has cosine 0.982 without counts,
    0.989 with those of 768 docstrings, 0.994 with those of 63,000 texts of other kinds.

    table : (rows, cols) float32
    counts : (rows,) how often each row was read; None: equally often
    """
    norm = np.sqrt(np.einsum("rc,rc->r", table, table, dtype=np.float64))
    step = np.maximum(norm, 1e-3 * float(norm.mean()) or 1.0) ** power
    if counts is not None:
        step *= (counts + 2.0) ** -0.25
    return np.asarray((step / step.mean()).astype(np.float16), np.float32)


def round_rows(coefficients: F32, scales: F32, step: float) -> NDArray[np.int8]:
    """Codes of a table: there is no input to calibrate on, so no error feedback. (rows, cols_pad) int8."""
    grid = scales[:, None] * np.float32(step)
    codes = np.empty(coefficients.shape, np.int8)
    for start in range(0, len(codes), 4096):
        part = slice(start, start + 4096)
        m = np.floor(np.abs(coefficients[part]) / grid[part] + np.float32(0.5 - DEAD))
        codes[part] = np.copysign(np.minimum(m, _TOP), coefficients[part])
    return codes


def quantize_table(
    table: F32, step: float, scales: F32, transform: str = "dct", block: int = 64
) -> RBEVectors:
    """Quantise an embedding table (rows, cols) with mean step `step`; the step of row r is `scales[r]` times that."""
    gain = _power_of_two(step)
    unit = np.float16(step / gain)
    coefficients = row_coefficients(table, transform, block)
    largest = np.abs(coefficients).max(axis=1) / np.float32(_TOP * float(unit) * gain)
    scales = np.maximum(scales, largest).astype(np.float16).astype(np.float32)
    codes = round_rows(coefficients, scales, float(unit) * gain)
    columns = np.full(codes.shape[1], unit, np.float16)
    stored = GridCodes.from_integers(codes, scales.astype(np.float16), columns, float(np.float32(SHRINK)))
    return RBEVectors(table.shape, block, transform, gain, None, stored)


def corrected_bias(weight: F32, decoded: F32, bias: F32, moments: Moments) -> F32:
    """The bias that preserves the mean output: b + E[x W^T] - E[x' W'^T], for few rows less than that."""
    mean = (
        weight.astype(np.float64) @ moments.mean_dense - decoded.astype(np.float64) @ moments.mean_compressed
    )
    return (bias + mean / max(moments.count, _ROWS_OF_MEANS)).astype(np.float32)


def affine_fit(dense: Sequence[F32], compressed: Sequence[F32]) -> tuple[F64, F64]:
    """Per feature the a and b of least sum (dense - a * compressed - b)^2, over all rows; for few rows
    a part of the way there from a = 1, b = 0.

    dense, compressed : batches of (n, features) float32
    """
    count = sum(len(x) for x in dense)
    x = sum((c.sum(axis=0, dtype=np.float64) for c in compressed), np.zeros(())) / count
    y = sum((d.sum(axis=0, dtype=np.float64) for d in dense), np.zeros(())) / count
    xx, xy = np.zeros(len(x)), np.zeros(len(x))
    for d, c in zip(dense, compressed, strict=True):
        centred = c - x
        xx += np.einsum("nf,nf->f", centred, centred)
        xy += np.einsum("nf,nf->f", centred, d - y)
    seen = min(1.0, count / _ROWS_OF_MEANS)
    a = 1.0 + seen * (np.where(xx > 0, xy / np.where(xx > 0, xx, 1), 1.0) - 1.0)
    return a, seen * (y - a * x)


def _power_of_two(value: float) -> float:
    return float(2.0 ** np.floor(np.log2(value)))

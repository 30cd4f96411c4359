"""Allocation of bits to the weights of a model by their sensitivities.

Each weight is quantised alone and the loss of the model's results is measured; loss grows with the square of the
step, so the total loss for given bytes is least when every weight's step is one common level divided by the root of
its sensitivity (a Lagrangian allocation). The level is found by bisection on the entropy of the codes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..feedback import (
    Geometry,
    quantize_matrix,
    quantize_table,
    round_rows,
    round_with_feedback,
    row_coefficients,
    stream_bits,
    target_coefficients,
)

F32 = NDArray[np.float32]

#: bits per weight at which sensitivities are measured
PROBE_BITS = 3.0
MARGIN = 0.998  # of the budget is allocated: an excess of the last weight cannot be compensated
EMPTY_STREAM = 100.0  # upper bound of the bytes of a stream of zeros
TOLERANCE = 1.02  # a weight that exceeds its planned bytes by more is re-encoded
_SAMPLE_ROWS = 4096  # rows of an embedding table that its entropy is estimated on
_TOP_CODE = 127.0
_COARSEST = 2.0**16  # steps of columns differ by a factor of about 1000


#: Tokens of all different texts below which calibration gains little: there is a warning, and `compress_model`
#: compares the result with plain compression. 40 paragraphs have 2,000.
FEW_TOKENS = 2048
#: A table's row takes a step proportional to its norm to this power: 0 is least squares, 1 the same relative error
#: in every row. Tokens are normalised right after the table, which asks for 1; frequent tokens have small norms.
ROW_POWER = 0.5


def are_few(ids: NDArray[Any]) -> bool:
    """Whether texts with these token ids, all different, say too little: 40 that are alike but for a number do."""
    return ids.size < FEW_TOKENS or np.unique(ids).size < FEW_TOKENS // 8


def warn_of_few(texts: int, ids: NDArray[Any]) -> None:
    """Warn if texts with these token ids are few."""
    if are_few(ids):
        warnings.warn(
            f"calibrating on {texts} different text(s) with {ids.size} tokens, which gains little or nothing; "
            f"use some hundreds of texts of different words, and {FEW_TOKENS} tokens at the least",
            stacklevel=4,
        )


def silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody follows."""


@dataclass(frozen=True)
class CalibrationResult:
    """Result of calibrating a model: its weights for one budget.

    Attributes
    ----------
    tensors : name -> RBEMatrix or RBEVectors for weights, float32 for the corrected biases
    bits : name -> bits per weight, all stored bytes counted
    """

    tensors: dict[str, Any]
    bits: dict[str, float]


@dataclass
class Weight:
    """A weight, its size at a step, and the sensitivity of the model's results to it.

    Together the values, coefficients and geometries of all weights would take several times the memory of the model:
    functions read or compute them.

    Attributes
    ----------
    read : the values, (rows, cols)
    coefficients : called with n, computes those of each n-th row, (rows / n, cols_pad)
    read_geometry : None for an embedding table
    scales : (rows,) of a table, else None
    row_transform : transform and block size of a table's rows, else None
    """

    name: str
    read: Callable[[], F32]
    coefficients: Callable[[int], F32]
    read_geometry: Callable[[], Geometry] | None
    scales: F32 | None = None
    row_transform: tuple[str, int] | None = None
    sensitivity: float = 1.0
    shape: tuple[int, int] = field(init=False)
    spread: float = field(init=False)  # standard deviation of the coefficients

    def __post_init__(self) -> None:
        all_rows = self.coefficients(1)
        self.shape = int(all_rows.shape[0]), int(all_rows.shape[1])
        self.spread = float(all_rows.std())

    @classmethod
    def of_matrix(cls, name: str, read: Callable[[], F32], read_geometry: Callable[[], Geometry]) -> Weight:
        """A linear weight. Where the geometry changes it, its coefficients stay in memory: they are a matmul."""
        kept = None
        if read_geometry().target is not None:
            kept = target_coefficients(read(), read_geometry())

        def coefficients(every: int) -> F32:
            return (target_coefficients(read(), read_geometry()) if kept is None else kept)[::every]

        return cls(name, read, coefficients, read_geometry)

    @classmethod
    def of_table(cls, name: str, read: Callable[[], F32], transform: str, block: int, scales: F32) -> Weight:
        def coefficients(every: int) -> F32:
            return row_coefficients(read()[::every], transform, block)

        return cls(name, read, coefficients, None, scales, (transform, block))

    @property
    def values(self) -> F32:
        return self.read()

    @property
    def geometry(self) -> Geometry | None:
        """None for an embedding table."""
        return None if self.read_geometry is None else self.read_geometry()

    @property
    def size(self) -> int:
        """Coefficients, those of padding included."""
        return self.shape[0] * self.shape[1]

    @property
    def overhead(self) -> float:
        """Bytes of the scales that a file holds."""
        rows, cols = self.shape
        by_row = self.scales is not None and bool((self.scales != 1).any())
        return 2.0 * (rows * by_row + cols)

    def codes(self, step: float) -> NDArray[np.int8]:
        geometry = self.geometry
        if geometry is not None:
            return round_with_feedback(self.coefficients(1), geometry, step)[0]
        assert self.scales is not None
        every = max(1, self.shape[0] // _SAMPLE_ROWS)
        return round_rows(self.coefficients(every), self.scales[::every], step)

    def nbytes(self, step: float) -> float:
        """Estimated bytes at a step."""
        bits: float = stream_bits(self.codes(step)) * self.size
        return bits / 8 + self.overhead

    def step_for(self, bits: float) -> float:
        """The step at which codes take `bits` bits on average, within the bounds of a step."""
        step = self.bounded(self.spread * 2.0 ** (2.05 - bits))
        for _ in range(8):
            reached = stream_bits(self.codes(step))
            if abs(reached - bits) < 5e-3:
                break
            step = self.bounded(step * 2.0 ** float(reached - bits))
        return step

    def probed(self) -> tuple[float, F32]:
        """The step at which sensitivity is measured, and what the weight decodes to then: (rows, cols)."""
        step, geometry = self.step_for(PROBE_BITS), self.geometry
        if geometry is not None:
            return step, quantize_matrix(self.values, geometry, step).decode()
        assert self.scales is not None
        return step, quantize_table(self.values, step, self.scales).decode()

    def fitted(self, quantized: Callable[[float], Any], step: float, limit: float) -> Any:
        """`quantized(step)`, or at a coarser step such that it takes at most `limit` bytes."""
        weight, push = quantized(step), 1.0
        while weight.nbytes > limit:
            # doubling the step saves one bit, and less where most codes are zero already
            excess = 8 * (weight.nbytes - limit) / self.size
            slow = 0.25 * float(np.log2(weight.nbytes / max(limit, 1.0)))
            coarser = self.bounded(step * 2.0 ** (push * max(excess, slow, 0.02)))
            if coarser <= step:
                break
            smaller = quantized(coarser)
            push = 2.0 * push if smaller.nbytes >= weight.nbytes else 1.0
            step, weight = coarser, smaller
        return weight

    def bounded(self, step: float) -> float:
        """The step clamped: below, codes exceed int8; above, all columns are zero."""
        return min(max(step, self.spread / _TOP_CODE), self.spread * _COARSEST)


def steps_for(weights: list[Weight], budget: float) -> dict[str, float]:
    """Steps of least total loss whose estimated bytes fit: step_m = level * sqrt(size_m / sensitivity_m).

    The loss is sum_m sensitivity_m step_m^2, and a step twice as large saves size_m bits. The level moves by secants
    of that rule, which is exact where codes are wide.
    """
    relative = {w.name: (w.size / w.sensitivity) ** 0.5 for w in weights}
    size = sum(w.size for w in weights)
    bits = 8 * (budget - sum(w.overhead for w in weights)) / size
    if bits <= 0.0:
        raise ValueError(
            f"the target leaves {int(budget)} bytes for all weights: fewer than their scales take"
        )
    spread = sum(np.log2(w.spread / relative[w.name]) * w.size for w in weights)
    level = spread / size + 2.05 - bits
    for _ in range(10):
        steps = {w.name: w.bounded(relative[w.name] * 2.0**level) for w in weights}
        excess = 8 * (sum(w.nbytes(steps[w.name]) for w in weights) - budget) / size
        if abs(excess) < 2e-3:
            break
        level += excess
    return steps

"""The ways to store a coefficient matrix, what each costs, and which suits a target best.

A `Plan` names codes, group and fraction kept. `Sample` says what error a plan makes, from some rows of the
coefficients; `best_for_bytes` and `best_for_error` search.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from . import packing
from .blocks import DENSE_BITS, GROUPS, SPARSE_BITS, Codes
from .coding import delta_bytes, encode_dense, encode_sparse, quantize_stream

F32 = NDArray[np.float32]

DEFAULT_GROUP = 64


@dataclass(frozen=True)
class Plan:
    """One way to store coefficients. kept is the fraction of them that is stored (1 for dense codes)."""

    form: str  # "dense" or "sparse"
    value: str  # "int<b>", "f16", "f32"
    group: int = 0
    kept: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.form}-{self.value}"

    @property
    def bits(self) -> int:
        return {"f32": 32, "f16": 16}.get(self.value) or int(self.value[3:])

    def encode(self, c: F32) -> Codes:
        """The stored codes of the coefficients c (rows, cols)."""
        if self.form == "dense":
            return encode_dense(c, self.bits, self.group)
        return encode_sparse(c, self.value, self.group, self.kept)

    def nbytes(self, rows: int, cols: int) -> int:
        """Bytes stored for a rows x cols coefficient matrix."""
        if self.form == "dense":
            return rows * (packing.packed_bytes(cols, self.bits) + 2 * -(-cols // self.group))
        entries = round(self.kept * rows * cols)
        if not self.group:
            values = entries * self.bits // 8
        else:
            values = packing.packed_bytes(entries, self.bits) + 2 * -(-entries // self.group)
        return values + _index_bytes(entries, rows, cols)


def _index_bytes(entries: int, rows: int, cols: int) -> int:
    if entries == rows * cols:
        return 0
    return min(rows * cols // 8, delta_bytes(entries, rows, cols))


class Sample:
    """Some rows of a coefficient matrix, and the error that a plan would make on them.

    Parameters
    ----------
    c : (rows, cols) float32 coefficients
    energy : sum of squares of the same rows of the weight (divided by its gain, before basis and transform)
    weight : what a squared error of a coefficient adds to the weight's, 1 for orthonormal transforms
    """

    def __init__(self, c: F32, energy: float, weight: float) -> None:
        self._c = c
        self._energy = energy
        self._weight = weight
        self._magnitudes = np.abs(c.reshape(-1))
        self._sorted = np.sort(self._magnitudes)
        self._pruned = np.concatenate([[0.0], np.cumsum(self._sorted.astype(np.float64) ** 2)])

    def relative_error(self, plan: Plan) -> float:
        """Estimated relative Frobenius error of the weight."""
        return self._relative(self._squared_error(plan))

    def least_kept(self, target: float) -> float:
        """The fraction that must be kept for pruning alone to meet a relative error."""
        allowed = target**2 * self._energy / self._weight
        dropped = int(np.searchsorted(self._pruned, allowed, side="right")) - 1
        return 1.0 - dropped / self._sorted.size

    def _relative(self, squared: float) -> float:
        return float(np.sqrt(squared * self._weight / self._energy)) if self._energy else 0.0

    def _squared_error(self, plan: Plan) -> float:
        c = self._c
        if plan.form == "dense":
            from .cpu_fallback.quantize import quantize_rows

            scale = np.empty((c.shape[0], -(-c.shape[1] // plan.group)), np.uint16)
            error = np.empty(c.shape[0])
            quantize_rows(c, plan.bits, plan.group, np.float32(0), scale, np.empty((0, 0), np.uint16), error)
            return float(error.sum())
        drop = self._sorted.size - round(plan.kept * self._sorted.size)
        threshold = self._sorted[drop - 1] if drop else np.float32(-1)
        pruned = float(self._pruned[drop])
        if plan.value == "f32":
            return pruned
        stream = c.reshape(-1)[self._magnitudes > threshold]
        if plan.value == "f16":
            diff = stream.astype(np.float64) - stream.astype(np.float16)
            return pruned + float(diff @ diff)
        dead_zone = np.float32(max(threshold, 0.0))
        return pruned + quantize_stream(stream, plan.bits, plan.group, dead_zone, store=False)[2]


def all_plans(names: tuple[str, ...] | None) -> Iterator[Plan]:
    """Every plan whose name is allowed; sparse ones with all coefficients kept."""
    for bits in DENSE_BITS:
        if names is None or f"dense-int{bits}" in names:
            for group in GROUPS:
                yield Plan("dense", f"int{bits}", group)
    for bits in SPARSE_BITS:
        if names is None or f"sparse-int{bits}" in names:
            yield Plan("sparse", f"int{bits}", DEFAULT_GROUP)
    for value in ("f16", "f32"):
        if names is None or f"sparse-{value}" in names:
            yield Plan("sparse", value)


def _kept_within(plan: Plan, budget: float, rows: int, cols: int) -> float:
    """The largest fraction kept whose bytes fit `budget`; 0 if none does."""
    if plan.nbytes(rows, cols) <= budget:
        return 1.0
    low, high = 0, rows * cols
    while low < high:
        middle = (low + high + 1) // 2
        if replace(plan, kept=middle / (rows * cols)).nbytes(rows, cols) <= budget:
            low = middle
        else:
            high = middle - 1
    return low / (rows * cols)


def best_for_bytes(
    sample: Sample, budget: float, rows: int, cols: int, names: tuple[str, ...] | None
) -> tuple[Plan, float]:
    """The plan of least error whose bytes fit `budget`, with its error on the sample."""
    best: tuple[float, Plan] | None = None
    for plan in all_plans(names):
        if plan.form == "dense":
            wider = Plan("dense", f"int{plan.bits + 1}", plan.group)
            fits_wider = plan.bits < max(DENSE_BITS) and wider.nbytes(rows, cols) <= budget
            if plan.nbytes(rows, cols) > budget or (fits_wider and names is None):
                continue
        else:
            kept = _kept_within(plan, budget, rows, cols)
            if kept <= 0.0:
                continue
            plan = replace(plan, kept=kept)
        error = sample.relative_error(plan)
        if best is None or error < best[0]:
            best = error, plan
    if best is None:
        raise ValueError(_unreachable(budget, rows, cols, names))
    return best[1], best[0]


def _unreachable(budget: float, rows: int, cols: int, names: tuple[str, ...] | None) -> str:
    one = 1 / (rows * cols)
    sizes = (p if p.form == "dense" else replace(p, kept=one) for p in all_plans(names))
    least = min(p.nbytes(rows, cols) for p in sizes)
    return f"the target leaves {int(budget)} bytes for codes, but the least is {least}; use a lower ratio"


def best_for_error(
    sample: Sample, target: float, rows: int, cols: int, names: tuple[str, ...] | None
) -> tuple[Plan, float]:
    """The plan of least bytes whose error on the sample meets `target`, with its bytes.

    Where none does, the widest codes allowed; the caller checks the whole weight anyway.
    """
    plans = list(all_plans(names))
    widest = max(plans, key=lambda p: (p.bits, -p.group))
    best, best_size = widest, float(widest.nbytes(rows, cols))
    for group in GROUPS:
        widths = [p for p in plans if p.form == "dense" and p.group == group]
        low, high = 0, len(widths)  # errors fall with the width: bisect for the first that meets the target
        while low < high:
            middle = (low + high) // 2
            if sample.relative_error(widths[middle]) <= target:
                high = middle
            else:
                low = middle + 1
        if low < len(widths) and widths[low].nbytes(rows, cols) < best_size:
            best, best_size = widths[low], widths[low].nbytes(rows, cols)
    least_kept = sample.least_kept(target)
    for plan in plans:
        if plan.form == "dense" or replace(plan, kept=least_kept).nbytes(rows, cols) >= best_size:
            continue
        high_kept = _kept_within(plan, best_size - 1, rows, cols)
        if sample.relative_error(replace(plan, kept=high_kept)) > target:
            continue
        low_kept = least_kept
        while high_kept - low_kept > 2e-3:
            kept = (low_kept + high_kept) / 2
            if sample.relative_error(replace(plan, kept=kept)) <= target:
                high_kept = kept
            else:
                low_kept = kept
        best = replace(plan, kept=high_kept)
        best_size = best.nbytes(rows, cols)
    return best, best_size

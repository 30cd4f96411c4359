"""Intervals of medians, from the spread of the runs, and whether two medians differ.

    half width = f * t * 1.2533 * s / sqrt(n),   s = (p80 - p20) / 1.6832

s is the standard deviation of normal values with these percentiles, 1.2533 / sqrt(n) = sqrt(pi / 2n) the standard
error of a median relative to it, t the 97.5% quantile of Student's distribution with n - 1 degrees of freedom. The
percentiles of a few values are too close to each other; f makes up for that. Two medians differ where their intervals
do not overlap: with equal ones that happens in one of 200.
"""

from __future__ import annotations

from math import pi, sqrt
from statistics import NormalDist
from typing import NamedTuple

from .rows import Row

LEAST_RUNS = 3  # fewer say nothing of a spread
#: f by the number of runs: with it 95% of the intervals hold the median (of 200,000 series of normal values each).
#: From 11 runs on 1 + 1.85 / runs, where 95 to 96% do
_WIDER = {3: 1.25, 4: 1.17, 5: 1.23, 6: 1.38, 7: 1.23, 8: 1.14, 9: 1.13, 10: 1.12}
_Z = NormalDist().inv_cdf(0.975)
_SPREAD = 2 * NormalDist().inv_cdf(0.8)


class Interval(NamedTuple):
    """From low to high, of a median."""

    low: float
    high: float

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high

    def overlaps(self, other: Interval) -> bool:
        """Whether they have a value in common."""
        return self.low <= other.high and other.low <= self.high


def student(degrees: int) -> float:
    """The 97.5% quantile of Student's distribution, by the expansion in 1 / degrees of Fisher and Cornish (1960).

    3% below the exact value at 2 degrees of freedom, 0.7% at 3, 0.13% at 5, closer from there on.
    """
    z, n = _Z, degrees
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3


def interval(row: Row) -> Interval | None:
    """The 95% interval of a row's median; None of fewer than three runs."""
    if row.runs < LEAST_RUNS:
        return None
    wider = _WIDER.get(row.runs, 1 + 1.85 / row.runs)
    half = wider * student(row.runs - 1) * sqrt(pi / 2 / row.runs) * (row.p80 - row.p20) / _SPREAD
    return Interval(row.p50 - half, row.p50 + half)


def faster(row: Row) -> bool | None:
    """Whether a speedup is above 1; None where its interval holds 1, or nothing is known of it."""
    known = interval(row)
    if known is None or 1.0 in known:
        return None
    return row.p50 > 1

"""Rows as points, one per file or setting, and ours compared with each baseline's.

A baseline is compared with our calibrated point of most bytes that are no more than its own. Recall is a share of N
queries, so a difference of two recalls carries noise:

    noise = sqrt((p (1 - p) + q (1 - q)) / N)

is the standard error of p - q if the two models erred on unrelated queries. They err on the same ones, mostly, so
the noise of their difference is smaller than this; the rows do not say by how much.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from ..harness.measure import OURS
from ..harness.rows import Results, Row
from .measure import CALIBRATED, DENSE, DISTILLED, LINEAR, PLAIN, PLAIN_WHOLE, RATIOS, REFUSED, WHOLE
from .quantizers import TOOLS


def tool_of(provider: str) -> str:
    """Who made a file: "rbe_gpu", "dense", or a tool's name."""
    if provider.startswith((CALIBRATED, PLAIN, DISTILLED)):
        return OURS
    # a tool that is no longer in TOOLS has its name first, too
    return next((t.name for t in TOOLS if provider.startswith(f"{t.name} ")), provider.split(" ", 1)[0])


@dataclass(frozen=True)
class Point:
    """A provider of one case: its metrics, by their names in the rows. What was not measured is None."""

    provider: str
    case: str
    queries: int | None
    bytes: float
    resident_bytes: float | None = None
    bits_per_weight: float | None = None
    cosine_mean: float | None = None
    cosine_p1: float | None = None
    overlap_at_10: float | None = None
    recall_at_1: float | None = None
    recall_at_10: float | None = None
    encode_time: float | None = None

    @property
    def tool(self) -> str:
        """Who made it."""
        return tool_of(self.provider)

    @property
    def setting(self) -> str:
        """The provider without its tool: "Q4_K pure", "calibrated ratio 8"."""
        return self.provider.removeprefix(self.tool).strip()

    @property
    def loss(self) -> float | None:
        """1 - mean cosine."""
        return None if self.cosine_mean is None else 1 - self.cosine_mean


_METRICS = tuple(f.name for f in fields(Point))[3:]


def point(results: Results, case: str, provider: str) -> Point | None:
    """The point of a provider; None where not even its bytes were measured."""
    values = {metric: results.value("quality", case, provider, metric) for metric in _METRICS}
    if values["bytes"] is None:
        return None
    row = results.one("quality", case, provider, "recall_at_10")
    queries = None if row is None else re.search(r"(\d+) queries", row.shape)
    return Point(provider, case, None if queries is None else int(queries[1]), **values)  # type: ignore[arg-type]


def points(results: Results, case: str) -> list[Point]:
    """All points of a case, fewest bytes first."""
    every = (point(results, case, p) for p in results.providers("quality", case, "bytes"))
    return sorted((p for p in every if p is not None), key=lambda p: p.bytes)


def ours(points: Iterable[Point], prefix: str) -> list[Point]:
    """Our points whose providers begin with `prefix`: `CALIBRATED`, `PLAIN` or `DISTILLED`."""
    return [p for p in points if p.provider.startswith(prefix)]


def baselines(points: Iterable[Point]) -> list[Point]:
    """The points of other tools."""
    return [p for p in points if p.tool != OURS and p.provider != DENSE]


def measured_tools(results: Results) -> list[str]:
    """The other tools that have a point, in the order of `TOOLS`."""
    measured = {p.tool for case in (LINEAR, WHOLE) for p in baselines(points(results, case))}
    known = [t.name for t in TOOLS if t.name in measured]
    return known + sorted(measured - {*known})


def offered(results: Results) -> list[tuple[float, str]]:
    """(ratio, provider) of our files: those of the report and others that were measured, calibrated before plain."""
    files = (p for metric in ("bytes", REFUSED) for p in results.providers("quality", WHOLE, metric))
    measured = {float(f.rsplit(" ", 1)[1]) for f in files if tool_of(f) == OURS}
    ratios = sorted({*map(float, RATIOS), *measured})
    return [(ratio, f"{prefix} ratio {ratio:g}") for ratio in ratios for prefix in (CALIBRATED, PLAIN)]


def refusal(results: Results, provider: str) -> str | None:
    """Why no file of that ratio can be made; None where one was made, or none was tried."""
    row = results.one("quality", WHOLE, provider, REFUSED)
    return None if row is None else row.shape


@dataclass(frozen=True)
class Comparison:
    """A baseline's point, and our calibrated point of most bytes that are no more; None where all have more."""

    baseline: Point
    ours: Point | None

    @property
    def cosine(self) -> float | None:
        """Our mean cosine less the baseline's."""
        return None if self.ours is None else _difference(self.ours.cosine_mean, self.baseline.cosine_mean)

    @property
    def recall(self) -> float | None:
        """Our recall@10 less the baseline's."""
        return None if self.ours is None else _difference(self.ours.recall_at_10, self.baseline.recall_at_10)

    @property
    def noise(self) -> float | None:
        """Standard error of `recall`, at most (see the module)."""
        if self.ours is None or not self.baseline.queries:
            return None
        p, q = self.ours.recall_at_10, self.baseline.recall_at_10
        return (
            None if p is None or q is None else math.sqrt((p * (1 - p) + q * (1 - q)) / self.baseline.queries)
        )

    @property
    def closer(self) -> bool | None:
        """Whether our cosine is the higher one."""
        return None if self.cosine is None else self.cosine > 0

    @property
    def recall_holds(self) -> bool | None:
        """Whether our recall@10 is not lower by more than noise."""
        return None if self.recall is None or self.noise is None else self.recall >= -self.noise

    @property
    def better(self) -> bool | None:
        """Whether ours is: cosine higher and recall, where both have one, not lower by more than noise."""
        return None if self.closer is None else self.closer and self.recall_holds is not False


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def comparisons(results: Results, case: str) -> list[Comparison]:
    """Every baseline of a case with ours, fewest bytes first."""
    every = points(results, case)
    fitting = ours(every, CALIBRATED)
    return [
        Comparison(
            b,
            max(
                (p for p in fitting if p.bytes <= b.bytes), key=lambda p: (p.bytes, p.provider), default=None
            ),
        )
        for b in baselines(every)
    ]


def smallest(points: Sequence[Point], cosine: float) -> Point | None:
    """The smallest of the points that reach a mean cosine."""
    return min((p for p in points if (p.cosine_mean or 0) >= cosine), key=lambda p: p.bytes, default=None)


@dataclass(frozen=True)
class BasisTrial:
    """The weight error of a group of weights at equal bytes, with and without basis parameters."""

    group: str
    transform: str
    bits: float | None
    without: float | None
    with_basis: float | None

    @property
    def change(self) -> float | None:
        """What the basis adds to the error, as a share of it; less than 0 where it pays."""
        return None if not self.without or self.with_basis is None else self.with_basis / self.without - 1

    @property
    def pays(self) -> bool | None:
        """Whether the error is lower with the basis."""
        return None if self.change is None else self.change < 0


def basis_trials(results: Results) -> list[BasisTrial]:
    """Every group of weights and transform that was tried, in the order of the rows."""
    trials = []
    for case in results.cases("ablation"):
        if case == PLAIN_WHOLE:
            continue
        providers = results.providers("ablation", case, "weight_error")
        for transform in dict.fromkeys(p.rsplit(", ", 1)[0] for p in providers if p.endswith("basis")):
            errors = [
                results.value("ablation", case, f"{transform}, {basis}", "weight_error")
                for basis in ("no basis", "basis")
            ]
            bits = results.value("ablation", case, f"{transform}, no basis", "bits_per_weight")
            trials.append(BasisTrial(case.removeprefix("plain, "), transform, bits, *errors))
    return trials


def texts_of(rows: Iterable[Row]) -> str | None:
    """How many texts, queries and documents all was measured on: the shape of the first row that says it."""
    return next((r.shape for r in rows if (r.op, r.metric) == ("quality", "cosine_mean") and r.shape), None)

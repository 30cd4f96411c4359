"""What the rows of the trade-off say: one point per file or setting, and ours beside each peer's.

A peer is compared with our calibrated point of most bytes that are no more than its own. Recall is a share of N
queries, so a difference of two recalls carries noise:

    noise = sqrt((p (1 - p) + q (1 - q)) / N)

is the standard error of p - q if the two models erred on unrelated queries. They err on the same ones, mostly, so
the noise of their difference is smaller than this; the rows do not say by how much.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .bench import Results, Row
from .quantizers import TOOLS
from .tradeoff import CALIBRATED, DENSE, LINEAR, PLAIN, PLAIN_WHOLE, RATIOS, REFUSED, WHOLE, best_below

OURS = "rbe_gpu"


def tool_of(provider: str) -> str:
    """Who made a file: "rbe_gpu", "dense", or a tool's name."""
    if provider.startswith((CALIBRATED, PLAIN)):
        return OURS
    # a tool that is not known here any more has its name first, too
    return next((t.name for t in TOOLS if provider.startswith(f"{t.name} ")), provider.split(" ", 1)[0])


@dataclass(frozen=True)
class Point:
    """A provider of one case: what it stores and what it reaches. What was not measured is None."""

    provider: str
    case: str
    bytes: float
    resident: float | None
    bits: float | None
    cosine: float | None
    p1: float | None
    overlap: float | None
    recall_1: float | None
    recall_10: float | None
    seconds: float | None
    queries: int | None

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
        """1 - cosine."""
        return None if self.cosine is None else 1 - self.cosine


def point(results: Results, case: str, provider: str) -> Point | None:
    """The point of a provider; None where not even its bytes were measured."""

    def of(metric: str) -> float | None:
        return results.value("quality", case, provider, metric)

    size = of("bytes")
    if size is None:
        return None
    row = results.one("quality", case, provider, "recall_at_10")
    asked = None if row is None else re.search(r"(\d+) queries", row.shape)
    return Point(
        provider, case, size, of("resident_bytes"), of("bits_per_weight"), of("cosine_mean"), of("cosine_p1"),
        of("overlap_at_10"), of("recall_at_1"), of("recall_at_10"), of("encode_time"),
        None if asked is None else int(asked[1]),
    )  # fmt: skip


def points(results: Results, case: str) -> list[Point]:
    """All points of a case, fewest bytes first."""
    found = (point(results, case, p) for p in results.providers("quality", case, "bytes"))
    return sorted((p for p in found if p is not None), key=lambda p: p.bytes)


def of_tool(found: Iterable[Point], prefix: str) -> list[Point]:
    """Those of our points whose providers begin so: `CALIBRATED` or `PLAIN`."""
    return [p for p in found if p.provider.startswith(prefix)]


def peers(found: Iterable[Point]) -> list[Point]:
    """Those that other tools made."""
    return [p for p in found if p.tool != OURS and p.provider != DENSE]


def measured_tools(results: Results) -> list[str]:
    """The other tools that have a point, in the order of `TOOLS`."""
    seen = dict.fromkeys(p.tool for case in (LINEAR, WHOLE) for p in peers(points(results, case)))
    return sorted(seen, key=lambda name: next((i for i, t in enumerate(TOOLS) if t.name == name), len(TOOLS)))


def offered(results: Results) -> list[tuple[float, str]]:
    """(ratio, provider) of our files: those of the report and others that were measured, calibrated before plain."""
    known = (*results.providers("quality", WHOLE, "bytes"), *results.providers("quality", WHOLE, REFUSED))
    files = (p for p in known if tool_of(p) == OURS)
    ratios = {*map(float, RATIOS), *(float(f.rsplit(" ", 1)[1]) for f in files)}
    return [(ratio, f"{kind} ratio {ratio:g}") for ratio in sorted(ratios) for kind in (CALIBRATED, PLAIN)]


def refusal(results: Results, provider: str) -> str | None:
    """Why no file of that ratio can be made; None where one was made, or none was tried."""
    row = results.one("quality", WHOLE, provider, REFUSED)
    return None if row is None else row.shape


@dataclass(frozen=True)
class Duel:
    """A peer's point, and our calibrated point of most bytes that are no more; `ours` is None where all have more."""

    peer: Point
    ours: Point | None

    @property
    def cosine(self) -> float | None:
        """Our mean cosine less the peer's."""
        return None if self.ours is None else _difference(self.ours.cosine, self.peer.cosine)

    @property
    def recall(self) -> float | None:
        """Our recall@10 less the peer's."""
        return None if self.ours is None else _difference(self.ours.recall_10, self.peer.recall_10)

    @property
    def noise(self) -> float | None:
        """Standard error of `recall`, at most (see the module)."""
        if self.ours is None or not self.peer.queries:
            return None
        p, q = self.ours.recall_10, self.peer.recall_10
        return None if p is None or q is None else math.sqrt((p * (1 - p) + q * (1 - q)) / self.peer.queries)

    @property
    def nearer(self) -> bool | None:
        """Whether our cosine is the higher one."""
        return None if self.cosine is None else self.cosine > 0

    @property
    def finds_as_much(self) -> bool | None:
        """Whether our recall@10 is not lower by more than noise."""
        if self.recall is None or self.noise is None:
            return None
        return self.recall >= -self.noise

    @property
    def beaten(self) -> bool | None:
        """Whether the peer is: our cosine higher, our recall, where both have one, not lower by more than noise."""
        return None if self.nearer is None else self.nearer and self.finds_as_much is not False


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def duels(results: Results, case: str) -> list[Duel]:
    """Every peer of a case against ours, fewest bytes first."""
    found = []
    for peer in peers(points(results, case)):
        provider = best_below(results.rows, case, peer.bytes)
        found.append(Duel(peer, None if provider is None else point(results, case, provider)))
    return found


def least_bytes(found: Sequence[Point], cosine: float) -> Point | None:
    """The smallest of the points that reach a mean cosine."""
    return min((p for p in found if (p.cosine or 0) >= cosine), key=lambda p: p.bytes, default=None)


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
    found = []
    for case in results.cases("ablation"):
        if case == PLAIN_WHOLE:
            continue
        providers = results.providers("ablation", case, "weight_error")
        for transform in dict.fromkeys(
            p.removesuffix(", basis").removesuffix(", no basis") for p in providers
        ):
            errors = [
                results.value("ablation", case, f"{transform}, {basis}", "weight_error")
                for basis in ("no basis", "basis")
            ]
            if any(e is not None for e in errors):
                bits = results.value("ablation", case, f"{transform}, no basis", "bits_per_weight")
                found.append(BasisTrial(case.removeprefix("plain, "), transform, bits, *errors))
    return found


def texts_of(rows: Iterable[Row]) -> str | None:
    """How many texts, queries and documents all was measured on: the shape of the first row that says it."""
    return next((r.shape for r in rows if (r.op, r.metric) == ("quality", "cosine_mean") and r.shape), None)

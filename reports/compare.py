"""Two results files beside each other: which figures differ by more than their spread.

rbe-gpu report --compare A.csv B.csv
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from .harness.page import Table, columns
from .harness.rows import Row, read_rows
from .harness.significance import interval
from .harness.text import shown, times

#: metrics whose values change from run to run; every other one is the same each time, up to rounding
_NOISY = re.compile(
    r".*time|speed_vs_.*|.*per_second|.*_vs_.*|peak.*|.*_peak|.*memory.*|dense_share|rate|bandwidth.*|busy|resident|"
    r"allocated_bytes|gpu_.*|joules_.*"
)
#: metrics of which more is better; of the others less is, or neither
_MORE = re.compile(
    r"speed_vs_.*|.*per_second|.*_vs_copy|cosine_.*|nearest_same|rate|bandwidth.*|recall.*|hit_rate"
)
_NEITHER = re.compile(r"unrelated_cosine|original_time|panel_bytes|block_bytes|gpu_.*|busy")
_SAME = 1e-6  # relative: sums in another order
BETTER, WORSE, DIFFERENT, NONE, UNKNOWN = "better", "worse", "different", "none", "unknown"


class Difference(NamedTuple):
    """A figure that both files have. `change`: to B from A; "none" within the spread, "unknown" without one."""

    before: Row
    after: Row
    change: str

    @property
    def ratio(self) -> float | None:
        """B / A, or None where A is 0."""
        return self.after.p50 / self.before.p50 if self.before.p50 else None


def _machine(row: Row) -> str:
    return f"{row.device}, {row.threads} thread{'s' * (row.threads != 1)}" if row.threads else row.device


def _key(row: Row) -> tuple[str, ...]:
    return row.op, row.case, row.backend, row.provider, row.shape, row.dtype, row.metric


def difference(before: Row, after: Row) -> Difference:
    """Of two rows of the same figure."""
    if _NOISY.fullmatch(before.metric):
        a, b = interval(before), interval(after)
        if a is None or b is None:
            return Difference(before, after, UNKNOWN)
        same = a.overlaps(b)
    else:
        same = abs(after.p50 - before.p50) <= _SAME * max(abs(before.p50), abs(after.p50))
    if same:
        return Difference(before, after, NONE)
    if _NEITHER.fullmatch(before.metric):
        return Difference(before, after, DIFFERENT)
    more = after.p50 > before.p50
    return Difference(before, after, BETTER if more == bool(_MORE.fullmatch(before.metric)) else WORSE)


def differences(before: Iterable[Row], after: Iterable[Row]) -> list[Difference]:
    """Of every figure that both have, in the order of the second; the last row of a figure counts."""
    first, second = ({_key(r): r for r in rows} for rows in (before, after))
    return [difference(first[key], row) for key, row in second.items() if key in first]


def table(figures: Sequence[Difference]) -> Table:
    """The differences that are none by chance alone, worst first."""
    made = Table("Differences", columns("op", "case", "provider", "metric", "A", "B", "B / A", "difference"))
    order = (WORSE, BETTER, DIFFERENT)

    def distance(d: Difference) -> float:
        return -max(d.ratio, 1 / d.ratio) if d.ratio and d.ratio > 0 else 0.0

    for d in sorted(
        (d for d in figures if d.change in order), key=lambda d: (order.index(d.change), distance(d))
    ):
        made.add(
            d.after.op, d.after.case, d.after.provider, d.after.metric, shown(d.before.p50, d.before.unit),
            shown(d.after.p50, d.after.unit), "" if d.ratio is None else times(d.ratio), d.change,
        )  # fmt: skip
    return made


def compare(before: Path, after: Path) -> str:
    """Both files beside each other, in Markdown.

    Raises
    ------
    ValueError
        One of them is not a results file, or they have no figure in common.
    OSError
        One of them cannot be read.
    """
    rows = read_rows(before), read_rows(after)
    figures = differences(*rows)
    if not figures:
        raise ValueError(f"{before} and {after} have no figure in common")
    machines = [", ".join(dict.fromkeys(_machine(r) for r in each)) for each in rows]
    counts = Counter(d.change for d in figures)
    only = [len({_key(r) for r in each} - {_key(r) for r in other}) for each, other in (rows, rows[::-1])]
    disturbed = [sum(r.disturbed for r in each) for each in rows]
    lines = [
        *(
            f"{name}: {path}, {machine}"
            for name, path, machine in zip("AB", (before, after), machines, strict=True)
        ),
        "",
        f"{len(figures)} figures in both: {counts[WORSE]} worse in B, {counts[BETTER]} better, {counts[DIFFERENT]} "
        f"different, {counts[NONE]} without a difference, {counts[UNKNOWN]} unknown (of fewer than three runs).",
        f"Only in A: {only[0]}; only in B: {only[1]}.",
        "A difference is one where the 95% intervals of the medians do not overlap.",
    ]
    if machines[0] != machines[1]:
        lines.append(
            "The machines or their threads differ: times and memory say nothing of the code; speeds against "
            "baselines may."
        )
    if any(disturbed):
        lines.append(f"Measured on a disturbed machine: {disturbed[0]} rows of A, {disturbed[1]} of B.")
    differing = table(figures)
    if differing.lines:
        lines += ["", differing.markdown()]
    return "\n".join(lines)

"""What a person reads first: the machine, five findings, each with its number, and where rbe_gpu loses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import median

from ..harness import row_names
from ..harness.measure import NUMPY, ONNX, OURS, TORCH
from ..harness.page import MOST_FINDINGS, Finding
from ..harness.row_names import DENSE, DENSE_NEW
from ..harness.rows import DISTURBED, Results, Row
from ..harness.significance import faster, interval
from ..harness.text import (
    CLOSE,
    cosine_rating,
    fixed,
    listed,
    megabytes,
    percent,
    times,
)
from .compression import SETTINGS

#: most cases that are named of those that lose against a baseline
WORST = 3


# --- the machine ------------------------------------------------------------------------------------------


def quiet(rows: Iterable[Row]) -> Finding:
    """Whether the machine was quiet while the rows were measured; "unknown" where that was not measured."""
    rows = list(rows)
    known = [r for r in rows if r.noise is not None or r.others is not None]
    if not known:
        return Finding(
            "unknown", "These rows do not say whether other programs ran while they were measured."
        )
    disturbed = sum(r.disturbed for r in known)
    if not disturbed:
        return Finding(
            "quiet",
            f"Around no case did other processes take more than {DISTURBED:.0%} of the machine, or an idle spin as "
            "much longer than on the quiet machine.",
        )
    share = percent(disturbed / len(known), 0 if disturbed >= 0.01 * len(known) else 1)
    return Finding(
        f"{share} disturbed",
        f"{disturbed} of {len(known)} rows were measured while other processes took more than {DISTURBED:.0%} of the "
        "machine, also when they were repeated; the table of rows marks them.",
    )


# --- findings ---------------------------------------------------------------------------------------------


def findings(results: Results) -> list[Finding]:
    """At most five findings, each only where its figures were measured."""
    made = (make(results) for make in _FINDINGS)
    return [finding for finding in made if finding is not None][:MOST_FINDINGS]


def _size(results: Results) -> Finding | None:
    dense = results.value("model", "dense", OURS, "file_bytes")
    close = [
        (size, setting.name, mean)
        for setting in SETTINGS
        if (mean := results.value("model", setting.name, OURS, "cosine_mean")) is not None
        and (size := results.value("model", setting.name, OURS, "file_bytes")) is not None
        and mean >= CLOSE
    ]
    if dense is None or not close:
        return None
    size, name, mean = min(close)
    return Finding(
        f"{dense / size:.1f}× smaller",
        f"{name} is the smallest file very close to the dense model: {megabytes(size)} instead of "
        f"{megabytes(dense)}, mean cosine {fixed(mean)}.",
    )


def compared(row: Row) -> str:
    """A speedup in words, with its interval: "faster", "slower" or "no difference"."""
    known, is_faster = interval(row), faster(row)
    word = "no difference" if is_faster is None else "faster" if is_faster else "slower"
    if known is None:
        return f"{times(row.p50)}, of {row.runs} runs, too few for an interval"
    return f"{word}, 95% interval {times(known.low)} to {times(known.high)}"


def _dense_speed(results: Results) -> Finding | None:
    rows = {
        b: row
        for b in (TORCH, ONNX, NUMPY)
        if (row := results.one("model", row_names.MODEL, DENSE, f"speed_vs_{b}")) is not None
    }
    if not rows:
        return None
    baseline = next(iter(rows))
    each = listed([f"{times(row.p50)} as fast as {b} ({compared(row)})" for b, row in rows.items()])
    return Finding(
        f"{times(rows[baseline].p50)} {baseline}", f"The dense encoder on the same threads is {each}."
    )


def _compressed_speed(results: Results) -> Finding | None:
    rows = [
        (row, setting.name)
        for setting in SETTINGS
        if (row := results.one("model", row_names.MODEL, f"{OURS} {setting.name}", f"speed_vs_{DENSE}"))
        is not None
        and (
            cosine_rating(results.value("model", setting.name, OURS, "cosine_mean")).level in ("good", "fair")
        )
    ]
    if not rows:
        return None
    row, name = max(rows, key=lambda r: r[0].p50)
    return Finding(
        f"{times(row.p50)} dense",
        f"The fastest compressed model that keeps its quality is {name}: {times(row.p50)} as fast as the dense one "
        f"({compared(row)}).",
    )


def _sparse_speed(results: Results) -> Finding | None:
    density = row_names.DENSITIES[0]
    rows = [
        r
        for r in results.rows
        if (r.op, r.provider, r.metric) == ("linear", row_names.sparse(density), f"speed_vs_{TORCH}")
    ]
    if not rows:
        return None
    middle = median(r.p50 for r in rows)
    low, high = min(r.p50 for r in rows), max(r.p50 for r in rows)
    return Finding(
        f"{times(middle)} matmul",
        f"With {density:.0%} of the coefficients a matmul is {times(middle)} as fast as {TORCH}'s dense one"
        + (f", the median of {len(rows)} shapes ({times(low)} to {times(high)})" if len(rows) > 1 else "")
        + ". MiniLM's vectors are of no use at that density.",
    )


def _memory(results: Results) -> Finding | None:
    rows = [
        r
        for r in results.rows
        if (r.op, r.case, r.metric) == ("model", row_names.MODEL_MEMORY, "dense_share")
        and r.provider != DENSE
    ]
    if not rows:
        return None
    worst = max(rows, key=lambda r: r.p50)
    return Finding(
        percent(max(worst.p50, 0.0), 1),
        f"Beside the stored weights a process holds {percent(max(worst.p50, 0.0), 1)} of the dense ones "
        f"({worst.provider.removeprefix(OURS).strip()}, the worst case): there is no hidden dense copy.",
    )


def _attention_memory(results: Results) -> Finding | None:
    rows = {r.provider: r for r in results.rows if (r.op, r.metric) == ("attention", "peak_memory")}
    if DENSE not in rows or NUMPY not in rows:
        return None
    ours, theirs = rows[DENSE].p50, rows[NUMPY].p50
    return Finding(
        megabytes(ours), f"Attention over {rows[DENSE].case} needs {megabytes(ours)} of scratch memory, with NumPy's "
        f"score matrix {megabytes(theirs)}.",
    )  # fmt: skip


_FINDINGS: tuple[Callable[[Results], Finding | None], ...] = (
    _size, _dense_speed, _compressed_speed, _sparse_speed, _memory, _attention_memory,
)  # fmt: skip


# --- losses -----------------------------------------------------------------------------------------------


def losses(results: Results) -> list[Finding]:
    """Where rbe_gpu is slower than a baseline beyond the interval, and which settings lose quality."""
    lost = []
    for baseline in (TORCH, ONNX, NUMPY):
        rows = [
            r
            for r in results.rows
            if r.metric == f"speed_vs_{baseline}" and r.provider.startswith(OURS) and r.provider != DENSE_NEW
        ]
        slower = sorted((r for r in rows if faster(r) is False), key=lambda r: r.p50)
        if not slower:
            continue
        named = "; ".join(f"{_case(r)} {times(r.p50)}" for r in slower[:WORST])
        lost.append(
            Finding(
                f"{len(slower)} of {len(rows)}",
                f"cases are slower than {baseline}; the worst: {named}.",
            )
        )
    gone = [
        f"{setting.name} ({fixed(mean)})"
        for setting in SETTINGS
        if (mean := results.value("model", setting.name, OURS, "cosine_mean")) is not None
        and cosine_rating(mean).level in ("lost", "gone")
    ]
    if gone:
        lost.append(
            Finding(
                f"{len(gone)} of {len(SETTINGS)} settings",
                f"lose the model's quality (mean cosine): {', '.join(gone)}. Do not use them without training.",
            )
        )
    return lost


def _case(row: Row) -> str:
    provider = row.provider.removeprefix(OURS).strip()
    return f"{row.op}, {row.case}" + ("" if provider == "dense" else f", {provider}")

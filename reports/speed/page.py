"""The report of speed, memory and size as one HTML page, written from the rows.

The first table is what compression costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rbe_gpu import output

from .. import targets
from ..harness import page, plots, row_names
from ..harness.measure import NUMPY, ONNX, OURS, TOLERANCE, TORCH
from ..harness.page import Table, columns
from ..harness.rows import Results, Row
from ..harness.text import (
    CLOSE,
    FAILED,
    LOSSES,
    MISSING,
    PASSED,
    Rating,
    cosine_rating,
    fixed,
    megabytes,
    percent,
    plain,
    seconds,
    shown,
    times,
)
from . import original, panel_cache, short, summary, utilisation
from .cases import DENSE
from .cases.model import BASELINES
from .compression import ALL_SETTINGS, SETTINGS, Setting
from .costs import ALLOCATED
from .plots import PLOTS

FILE = "results.csv"

# --- what compression costs -------------------------------------------------------------------------------


def cost_table(results: Results, settings: Iterable[Setting] = ALL_SETTINGS) -> Table:
    """Quality and cost of the dense models, ours and the baselines', and of every setting."""
    table = Table(
        "Quality and cost of every setting",
        columns(
            "setting", ("rating", "words"), ("mean cosine", "key"), "worst text", "same nearest text",
            ("file", "n key"), "smaller", "bits per weight", "weight error", ("time per batch", "n"),
            "speed, dense = 1", ("time, lean", "n"),
        ),
        css="quality",
    )  # fmt: skip

    def value(case: str, provider: str, metric: str) -> float | None:
        return results.value("model", case, provider, metric)

    dense = value("dense", OURS, "file_bytes")
    for provider in (DENSE, *BASELINES):
        ours = provider == DENSE
        speed = 1.0 if ours else value(row_names.MODEL, DENSE, f"speed_vs_{provider}")
        mean, least, nearest = (
            1.0 if ours else value("dense", provider, m)
            for m in ("cosine_mean", "cosine_min", "nearest_same")
        )
        table.add(
            f"dense, {OURS if ours else provider}", Rating("", "the baseline" if ours else "for comparison"),
            fixed(mean), fixed(least), percent(nearest), megabytes(dense), "1", "32", "0",
            seconds(value(row_names.MODEL, provider, "time")),
            "1" if ours else times(1 / speed if speed else None), "",
            css="base",
        )  # fmt: skip
    for setting in settings:
        name, provider = setting.name, f"{OURS} {setting.name}"
        file, mean = value(name, OURS, "file_bytes"), value(name, OURS, "cosine_mean")
        table.add(
            name, cosine_rating(mean), fixed(mean), fixed(value(name, OURS, "cosine_min")),
            percent(value(name, OURS, "nearest_same")), megabytes(file),
            times(dense / file if file and dense else None), plain(value(name, OURS, "bits_per_weight")),
            plain(value(name, OURS, "weight_error"), 2), seconds(value(row_names.MODEL, provider, "time")),
            times(value(row_names.MODEL, provider, f"speed_vs_{DENSE}")),
            seconds(value(row_names.MODEL_LEAN, provider, "time")),
        )  # fmt: skip
    return table


def sentences(results: Results) -> list[str]:
    """What the table says about quality; each sentence only where its figures were measured."""
    made = []
    measured = [
        (setting, mean)
        for setting in SETTINGS
        if (mean := results.value("model", setting.name, OURS, "cosine_mean")) is not None
    ]
    if measured and all(mean < CLOSE for _, mean in measured):
        made.append("No measured setting stays very close to the dense model (mean cosine 0.99 or more).")
    for level, words, meaning in (
        ("lost", "Quality is lost", "their vectors differ too much from the model's to stand in for them"),
        ("gone", "Quality is gone", "their vectors no longer say what the texts say"),
    ):
        names = ", ".join(
            f"{s.name} ({fixed(mean)})" for s, mean in measured if cosine_rating(mean).level == level
        )
        if names:
            made.append(f"{words} (mean cosine {LOSSES[level]}) at {names}: {meaning}.")
    unrelated = results.value("model", "dense", OURS, "unrelated_cosine")
    if unrelated is not None:
        made.append(
            f"For comparison: the vectors of two unrelated texts have a cosine of {unrelated:.2f} on average."
        )
    return made


# --- targets and ops --------------------------------------------------------------------------------------


def target_table(results: Results) -> Table:
    """Every target of the CPU and its worst case."""
    table = Table(
        "Targets and what was measured",
        columns("target", ("limit", "n"), ("worst case", "n key"), ("result", "words"), ("cases passed", "n"),
                ("which is worst", "words")),
        css="targets",
    )  # fmt: skip
    levels = {PASSED: "good", FAILED: "lost", MISSING: ""}
    for o in targets.outcomes(results.rows, "cpu"):
        table.add(
            o.target.name, o.target.limit_text, MISSING if o.value is None else o.target.shown(o.value),
            Rating(levels[o.status], o.status), f"{o.passing} of {o.cases}" if o.cases else "", o.case,
        )  # fmt: skip
    return table


def op_tables(results: Results) -> list[tuple[str, Table]]:
    """(op, times) of every op that was timed."""
    tables = []
    for op in dict.fromkeys(r.op for r in results.rows if r.op not in ("model", panel_cache.OP)):
        timed = [
            row
            for case in results.cases(op)
            for provider in results.providers(op, case, "time")
            if (row := results.one(op, case, provider, "time")) is not None
        ]
        if timed:
            tables.append((op, _op_table(results, op, timed)))
    return tables


def _op_table(results: Results, op: str, timed: Sequence[Row]) -> Table:
    def value(row: Row, metric: str) -> float | None:
        return results.value(op, row.case, row.provider, metric)

    allocates = any(value(row, ALLOCATED) is not None for row in timed)
    table = Table(
        f"Times of {op}",
        columns("case", ("provider", "words"), ("time", "n"), ("20% – 80%", "n"),
                *(f"vs {baseline}" for baseline in (TORCH, NUMPY)), "error", ("weight", "n"),
                *[("allocated", "n")] * allocates),
    )  # fmt: skip
    for row in timed:
        # a baseline is not compared with itself, and a dense weight has no weight error: nothing is missing there
        speeds = (
            times(value(row, f"speed_vs_{baseline}")) if row.provider.startswith(OURS) else ""
            for baseline in (TORCH, NUMPY)
        )
        off, bits, error = (value(row, m) for m in ("relative_error", "bits_per_weight", "weight_error"))
        weight = (
            "" if bits is None else f"{bits:.3g} bits" + ("" if error is None else f", error {error:.2g}")
        )
        held = value(row, ALLOCATED)
        table.add(
            row.case, row.provider, seconds(row.p50), f"{seconds(row.p20)} – {seconds(row.p80)}", *speeds,
            "" if off is None else f"{off:.1g}", weight, *["" if held is None else shown(held, "B")] * allocates,
        )  # fmt: skip
    return table


def cache_table(results: Results) -> Table:
    """Hit rate, bytes held and time of a pass by budget of the panel cache."""
    table = Table(
        "Budgets of the panel cache",
        columns("budget", ("hit rate", "n"), ("held", "n"), ("time of a pass", "n key"), ("20% – 80%", "n")),
        css="encodes",
    )
    for share, time, rate, held in panel_cache.budgets(results):
        table.add(
            f"{100 * share:g}% of the dense bytes", percent(rate.p50, 1), megabytes(held.p50), seconds(time.p50),
            f"{seconds(time.p20)} – {seconds(time.p80)}",
        )  # fmt: skip
    return table


def encode_table(results: Results) -> Table:
    """Times to compress the model, write, read and decode it."""
    metrics = {
        "encode_time": "compress", "write_time": "of it: write", "read_time": "read",
        "decode_time": "decode everything",
    }  # fmt: skip
    table = Table(
        "Times of compressing and reading",
        columns("setting", *((h, "n") for h in metrics.values())),
        css="encodes",
    )
    for s in ALL_SETTINGS:
        table.add(s.name, *(seconds(results.value("model", s.name, OURS, m)) for m in metrics))
    return table


# --- the page ---------------------------------------------------------------------------------------------


def render(rows: Iterable[Row], drawn: Sequence[plots.Plot], quick: bool = False) -> str:
    """The whole page.

    Raises
    ------
    ValueError
        There are no rows.
    """
    results = Results(rows)
    texts, baseline_texts = (
        next(
            (r.shape for r in results.rows if r.metric == "cosine_mean" and (r.provider == OURS) is ours),
            MISSING,
        )
        for ours in (True, False)
    )
    batch = results.one("model", row_names.MODEL, DENSE, "time")
    return page.render(
        "speed.html",
        results.rows,
        drawn,
        quick=quick,
        absent=[name for name in (ONNX, TORCH) if all(r.provider != name for r in results.rows)],
        texts=texts,
        baseline_texts=baseline_texts,
        batch=MISSING if batch is None else f"{batch.case}, {batch.shape}",
        quiet=summary.quiet(results.rows),
        findings=summary.findings(results),
        losses=summary.losses(results),
        sentences=sentences(results),
        all_rows=page.row_table(results.rows),
        costs=cost_table(results),
        targets=target_table(results),
        encodes=encode_table(results),
        cache=panel_cache.sentence(results),
        budgets=cache_table(results),
        original=original.table(results),
        original_missing=original.reason(results),
        gpu_missing=utilisation.gpu_reason(results),
        ops=op_tables(results),
        allocates=any(r.metric == ALLOCATED for r in results.rows),
        tolerance=TOLERANCE,
    )


def write(rows: Iterable[Row], out: Path, quick: bool = False) -> Path:
    """Draw the plots into `out/plots/`, and write `out/index.html`, `report.md` and `report.pdf`.

    Returns the page's path.
    """
    rows = list(rows)
    drawn = plots.draw_for_screens(PLOTS, Results(rows))
    written = page.write(out, page.SPEED_PAGE, render(rows, drawn, quick), drawn)
    results = Results(rows)
    output.write_text(
        out / short.MARKDOWN, short.markdown(results, cost_table(results), target_table(results), quick)
    )
    short.pdf(results, drawn, out / short.PDF, quick)
    return written

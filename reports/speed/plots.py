"""The plots of speed, memory and size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..harness import row_names
from ..harness.plots import (
    BLUE,
    BROAD,
    GREEN,
    GREY,
    INK,
    PAPER,
    SKY,
    VERMILLION,
    Plot,
    Value,
    bar_height,
    bars,
    bound_chart,
    label_rows,
    legend_above,
    log_axis,
    new_figure,
    on_phone,
    outliers,
    ratio,
    ratio_axis,
    shape_label,
    spread,
)
from ..harness.rows import Results, Row
from ..harness.text import seconds, times
from ..targets import DENSITY_LIMITS, LARGE, SMALL, VS_NUMPY, VS_TORCH
from . import machine_plots
from .cases import DENSE, NUMPY, ONNX, OURS, TORCH
from .cases.model import BASELINES
from .compression import ALL_SETTINGS, SETTINGS, Setting

#: whether a compressed model caches decoded weights: (case, suffix of the label, colour)
MODES = ((row_names.MODEL, "", BLUE), (row_names.MODEL_LEAN, ", lean", SKY))
COLOURS = {DENSE: INK, OURS: BLUE, TORCH: VERMILLION, NUMPY: GREY, ONNX: GREEN}
PERCENTILES = "with lines from the 20th to the 80th percentile"


def _points(results: Results, x: str, y: str) -> list[tuple[Setting, float, float]]:
    """(setting, x, y) of every setting that has both metrics, ordered by x."""
    points = []
    for setting in SETTINGS:
        a, b = (results.value("model", setting.name, OURS, metric) for metric in (x, y))
        if a is not None and b is not None:
            points.append((setting, a, b))
    return sorted(points, key=lambda p: p[1])


def _percentiles(row: Row, shown: Callable[[float | None], str]) -> str:
    return f"20% to 80%: {shown(row.p20)} to {shown(row.p80)}, {row.runs} runs"


def _speed_words(label: str, baseline: str, row: Row) -> str:
    """What a point of a speedup says."""
    return f"{shape_label(label)}: {times(row.p50)} as fast as {baseline} ({_percentiles(row, times)})"


#: where a name stands beside its point, as (offset, horizontal, vertical): grades and ratios come close to
#: each other, and each chart has one side of the curve free
_UPPER_LEFT = {"grade": ((-3, 6), "right", "bottom"), "ratio": ((-8, 0), "right", "center")}
_UPPER_RIGHT = {"grade": ((8, 0), "left", "center"), "ratio": ((2, 7), "center", "bottom")}


def _name(axes: Any, setting: Setting, x: float, y: float, places: dict[str, Any]) -> None:
    """A setting's name beside its point."""
    offset, horizontal, vertical = places["grade" if setting.grade else "ratio"]
    axes.annotate(
        setting.short.replace("x", "×"), (x, y), xytext=offset, textcoords="offset points",
        ha=horizontal, va=vertical, fontweight="bold", fontsize=9.5, zorder=3,
        bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.5},
    )  # fmt: skip


# --- quality ------------------------------------------------------------------------------------------------


def quality_bytes(results: Results) -> Plot | None:
    """Cosine to the dense model's vectors against the size of the file."""
    mean = _points(results, "file_bytes", "cosine_mean")
    least = _points(results, "file_bytes", "cosine_min")
    dense = results.value("model", "dense", OURS, "file_bytes")
    if not mean or not least or dense is None:
        return None
    figure, axes = new_figure(4.2)
    unrelated = results.value("model", "dense", OURS, "unrelated_cosine")
    if unrelated is not None:
        axes.axhline(unrelated, color=GREY, linestyle=":", linewidth=1.4)
        axes.annotate(
            f"two unrelated texts: {unrelated:.2f}", (1, unrelated), xycoords=("axes fraction", "data"),
            xytext=(-2, 4), textcoords="offset points", ha="right", fontsize=9,
        )  # fmt: skip
    axes.plot([b / 1e6 for _, b, _ in least], [c for _, _, c in least], "v-", color=VERMILLION,
              markerfacecolor=PAPER, markersize=6.5, label="worst text")  # fmt: skip
    axes.plot([b / 1e6 for _, b, _ in mean], [c for _, _, c in mean], "o-", color=BLUE, markersize=6.5,
              label="mean over the texts")  # fmt: skip
    axes.plot(dense / 1e6, 1.0, "D", color=INK, markersize=7.5, label="dense float32 file")
    for setting, b, c in mean:
        _name(axes, setting, b / 1e6, c, _UPPER_LEFT)
    axes.annotate("dense", (dense / 1e6, 1.0), xytext=(0, 8), textcoords="offset points", ha="center",
                  fontweight="bold", fontsize=9.5)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(min(b for _, b, _ in mean) / 1e6 / 1.4, dense / 1e6 * 1.3)
    log_axis(axes.xaxis, [t for t in (1, 2, 5, 10, 20, 50, 100) if t >= axes.get_xlim()[0]])
    low = min(0.0, *(c for _, _, c in least))
    axes.set_ylim(low - 0.08, 1.12)
    axes.set_yticks(np.arange(0, 1.01, 0.2))
    axes.set_xlabel("file size in MB, all bytes counted (log scale)")
    axes.set_ylabel("cosine to the dense model's vector")
    axes.legend(loc="center right")
    text = "; ".join(f"{t.name}: {b / 1e6:.1f} MB, mean cosine {c:.3f}" for t, b, c in mean)
    values = [
        Value(axes, b / 1e6, c, f"{t.name}: {b / 1e6:.2f} MB, {what} {c:.4f}")
        for what, points in (("mean cosine", mean), ("cosine of the worst text", least))
        for t, b, c in points
    ]
    return Plot(
        "quality_bytes", "Quality against file size",
        "Sentence vectors of held-out texts from the compressed model against those of the dense one. "
        "1 is the same direction.",
        f"Line chart. The dense file has {dense / 1e6:.1f} MB and cosine 1. {text}.", figure, values=values,
    )  # fmt: skip


def error_bits(results: Results) -> Plot | None:
    """Weight error against bits per weight, with the least that is possible for Gaussian values."""
    models = _points(results, "bits_per_weight", "weight_error")
    if not models:
        return None
    layers: list[tuple[float, float]] = []
    for op in ("linear", "embedding"):
        for case in results.cases(op):
            for provider in results.providers(op, case, "weight_error"):
                bits = results.value(op, case, provider, "bits_per_weight")
                error = results.value(op, case, provider, "weight_error")
                if bits is not None and error:
                    layers.append((bits, error))
    figure, axes = bound_chart(
        [(b, e) for _, b, e in models],
        "whole models",
        {"single weights, by codes": layers},
        "bits per weight, over all compressed tensors",
    )
    for setting, b, e in models:
        _name(axes, setting, b, e, _UPPER_RIGHT)
    values = [
        Value(axes, b, e, f"{t.name}: {b:.3f} bits per weight, weight error {e:.4g}") for t, b, e in models
    ]
    values += [Value(axes, b, e, f"a single weight: {b:.3f} bits, error {e:.4g}") for b, e in layers]
    text = "; ".join(f"{t.name}: {b:.2f} bits, error {e:.3g}" for t, b, e in models)
    return Plot(
        "error_bits", "Weight error against bits per weight",
        "The dashed line is the least error that any code can reach on independent Gaussian values; real "
        "weights are close to Gaussian, so distance to the line is what a better code could still gain.",
        f"Scatter chart, error on a log scale. {text}.", figure, values=values,
    )  # fmt: skip


# --- speed ------------------------------------------------------------------------------------------------


def _by_mode(results: Results, metric: str) -> Iterator[tuple[str, Row, str]]:
    """(label, row, colour) of every setting and mode that has a metric of the model."""
    for setting in ALL_SETTINGS:
        for case, suffix, colour in MODES:
            row = results.one("model", case, f"{OURS} {setting.name}", metric)
            if row is not None:
                yield setting.name + suffix, row, colour


def batch_time(results: Results) -> Plot | None:
    """Time per batch of every model, dense ones first."""
    dense = results.one("model", row_names.MODEL, DENSE, "time")
    if dense is None:
        return None
    timed: list[tuple[str, Row, str]] = []
    for provider in (*reversed(BASELINES), DENSE):
        row = results.one("model", row_names.MODEL, provider, "time")
        if row is not None:
            timed.append((f"{OURS if provider == DENSE else provider}, dense", row, COLOURS[provider]))
    timed += _by_mode(results, "time")
    labels, rows, colours = zip(*timed, strict=True)
    figure, axes = new_figure(0.9 + 0.27 * len(timed))
    where = np.arange(len(timed))
    values = np.array([r.p50 * 1e3 for r in rows])
    axes.barh(where, values, bar_height(0.72), color=colours)
    axes.errorbar(values, where, xerr=spread(rows, 1e3), fmt="none", ecolor=GREY, elinewidth=1.2, capsize=2)
    edge = max(r.p80 * 1e3 for r in rows)
    for y, row in enumerate(rows):
        axes.text(row.p80 * 1e3 + 0.012 * edge, y, f"{row.p50 * 1e3:.0f}", va="center", fontsize=9,
                  bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.8})  # fmt: skip
    axes.axvline(dense.p50 * 1e3, color=INK, linestyle="--", linewidth=1.2)
    label_rows(axes, labels, 0.27)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, edge * 1.1)
    axes.set_xlabel(f"milliseconds per batch of {row_names.MODEL}, {rows[0].shape} (shorter is faster)")
    text = "; ".join(f"{label} {row.p50 * 1e3:.0f} ms" for label, row, _ in timed)
    hover = [
        Value(axes, row.p50 * 1e3, y, f"{label}: {seconds(row.p50)} ({_percentiles(row, seconds)})")
        for y, (label, row, _) in enumerate(timed)
    ]
    return Plot(
        "batch_time", "Time per batch",
        f"Medians, {PERCENTILES}; the dashed line is the dense rbe_gpu model. A compressed model has room to cache "
        "decoded weights where that is estimated to be faster (dark), or has no cache (light, “lean”).",
        f"Bar chart. {text}.", figure, values=hover,
    )  # fmt: skip


def _speedups(results: Results, ops: Sequence[str], dense: bool) -> Iterator[tuple[str, dict[str, Row]]]:
    """(label, baseline -> row of the speed against it), of dense or of compressed operands."""
    for op in ops:
        for case in results.cases(op):
            providers = dict.fromkeys(
                p for b in (TORCH, NUMPY) for p in results.providers(op, case, f"speed_vs_{b}")
            )
            for provider in providers:
                if "no out" in provider or not provider.startswith(OURS) or (provider == DENSE) is not dense:
                    continue
                if not dense and _shown_elsewhere(op, case, provider):
                    continue
                codes = provider.removeprefix(OURS).strip()
                yield (
                    f"{op}  {case}" + ("" if dense or codes in case else f"  {codes}"),
                    {
                        baseline: row
                        for baseline in (TORCH, NUMPY)
                        if (row := results.one(op, case, provider, f"speed_vs_{baseline}")) is not None
                    },
                )


def _shown_elsewhere(op: str, case: str, provider: str) -> bool:
    """Whether `density_speed` or `decoded_once` shows the case."""
    if op != "linear":
        return False
    return case.endswith(row_names.DECODED) or ("density" in provider and not case.endswith(" 1 token"))


def _speed_plot(
    results: Results, ops: Sequence[str], dense: bool, name: str, title: str, what: str
) -> Plot | None:
    speeds = list(_speedups(results, ops, dense))
    if not speeds:
        return None
    figure, axes = new_figure(1.2 + 0.27 * len(speeds), BROAD)
    label_rows(axes, [shape_label(label) for label, _ in speeds])
    spreads = [v for _, rows in speeds for row in rows.values() for v in (row.p20, row.p80)]
    ratio_axis(axes, spreads, 1.25, "speed of rbe_gpu, the baseline = 1 (log scale; right is faster)")
    low, high = axes.get_xlim()
    values = []
    for baseline, marker, shift in ((NUMPY, "s", 0.13), (TORCH, "o", -0.13)):
        points = [
            (y + shift, rows[baseline], label) for y, (label, rows) in enumerate(speeds) if baseline in rows
        ]
        shown = [(y, row) for y, row, _ in points if low <= row.p50 <= high]
        if shown:
            where, rows = zip(*shown, strict=True)
            axes.errorbar([r.p50 for r in rows], where, xerr=spread(rows), fmt=marker, color=COLOURS[baseline],
                          markersize=6, elinewidth=1.2, label=f"against {baseline}")  # fmt: skip
        places = outliers(axes, [(row.p50, y) for y, row, _ in points], COLOURS[baseline])
        for place, (_, row, label) in zip(places, points, strict=True):
            values.append(Value(axes, *place, _speed_words(label, baseline, row)))
    legend_above(axes)
    text = "; ".join(
        f"{label.replace('  ', ', ')}: "
        + ", ".join(f"{row.p50:.2f} times as fast as {baseline}" for baseline, row in rows.items())
        for label, rows in speeds
    )
    return Plot(
        name, title,
        f"{what} A point right of 1 means that rbe_gpu is faster. Medians of the ratios of paired runs, "
        f"{PERCENTILES}; an arrow at the edge is a value beyond it.",
        f"Dot chart of speedups. {text}.", figure, broad=True, values=values,
    )  # fmt: skip


def op_speed(results: Results) -> Plot | None:
    """Every op on dense arrays against the baselines."""
    ops = list(dict.fromkeys(r.op for r in results.rows if r.op != "model"))
    return _speed_plot(
        results, ops, True, "op_speed", "Ops on dense arrays",
        "Each op with an output buffer, on real weights and activations.",
    )  # fmt: skip


def compressed_speed(results: Results) -> Plot | None:
    """Ops on compressed weights against the baselines' dense op."""
    return _speed_plot(
        results, ("linear", "embedding", "decode"), False, "compressed_speed", "Ops on compressed weights",
        "Against the baselines on the dense weight (for decode: against NumPy decoding the same codes).",
    )  # fmt: skip


def density_speed(results: Results) -> Plot | None:
    """Matmuls with sparse weights against PyTorch's with the dense weight, by density."""
    panels: dict[str, list[tuple[str, list[Row]]]] = {SMALL: [], LARGE: []}
    columns = [*(row_names.sparse(k) for k in row_names.DENSITIES), DENSE]
    for case in results.cases("linear"):
        shape, _, tokens = case.partition(", ")
        rows = [row for c in columns if (row := results.one("linear", case, c, VS_TORCH)) is not None]
        if len(rows) == len(columns) and tokens not in ("1 token", ""):
            for group, cases in panels.items():
                if shape in group.split("|"):
                    cases.append((shape_label(case), rows))
    shown = [(n, group, cases) for n, (group, cases) in enumerate(panels.items()) if cases]
    if not shown:
        return None
    figure, all_axes = new_figure(4.2, BROAD, len(shown))
    hover = []
    where = np.arange(len(columns))
    styles = ((BLUE, "o"), (SKY, "s"), (VERMILLION, "v"), (GREEN, "D"))
    for axes, (number, group, cases) in zip(all_axes, shown, strict=True):
        axes.axhline(1.0, color=INK, linewidth=1.4)
        for x, limits in enumerate(DENSITY_LIMITS.values()):
            axes.plot((x - 0.32, x + 0.32), (limits[number],) * 2, color=INK, linewidth=1.6, linestyle=(0, (2, 1)),
                      label="" if x else "target")  # fmt: skip
        shift = 0.09 * (np.arange(len(cases)) - (len(cases) - 1) / 2)
        for (label, rows), (colour, marker), by in zip(cases, styles, shift, strict=False):
            axes.errorbar(where + by, [r.p50 for r in rows], yerr=spread(rows), fmt=marker, color=colour,
                          markersize=6, elinewidth=1.2, label=label)  # fmt: skip
            hover += [
                Value(
                    axes,
                    x,
                    row.p50,
                    _speed_words(f"{label}, {column.removeprefix(OURS).strip()}", TORCH, row),
                )
                for x, column, row in zip(where + by, columns, rows, strict=True)
            ]
        axes.set_yscale("log")
        axes.set_xticks(where, [*(f"{k:.0%}" for k in row_names.DENSITIES), "dense"])
        axes.set_xlim(-0.6, len(columns) - 0.4)
        axes.set_xlabel("density: share of the coefficients stored")
        axes.set_title(shape_label(" and ".join(group.split("|"))), loc="left")
        axes.legend(loc="upper right")
    values = [r.p50 for _, _, cases in shown for _, rows in cases for r in rows]
    low, high = min(0.5, *values) / 1.25, max(10.0, *values) * 2.5  # room for the legend
    ticks = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
    log_axis(all_axes[0].yaxis, [t for t in ticks if low <= t <= high], ratio)
    all_axes[0].set_ylim(low, high)
    for axes in all_axes if on_phone() else all_axes[:1]:
        axes.set_ylabel("speed, PyTorch's dense matmul = 1 (log scale)")
    text = "; ".join(
        f"{label}: "
        + ", ".join(
            f"{c.removeprefix(OURS).strip()} {row.p50:.2f}" for c, row in zip(columns, rows, strict=True)
        )
        for _, _, cases in shown
        for label, rows in cases
    )
    return Plot(
        "density_speed", "Matmuls without decoding",
        "Speed of a matmul with a sparse weight, in the transform domain, against PyTorch's with the "
        "dense weight; on the right of each panel, rbe_gpu's own dense matmul. Medians of the ratios of paired "
        f"runs, {PERCENTILES}; dashes are the targets.",
        f"Dot chart of speedups. {text}.", figure, broad=True, values=hover,
    )  # fmt: skip


def decoded_once(results: Results) -> Plot | None:
    """The matmul algorithms that are chosen by default, against a matmul with a weight that was decoded once."""
    cases = [c for c in results.cases("linear") if c.endswith(row_names.DECODED)]

    def rows_of(case: str, lean: bool) -> list[Row]:
        providers = results.providers("linear", case, VS_NUMPY)
        rows = (
            results.one("linear", case, p, VS_NUMPY) for p in providers if p.endswith(row_names.LEAN) is lean
        )
        return [row for row in rows if row is not None]

    modes = [
        (row_names.LEAN * lean, label, colour, marker, shift, [rows_of(case, lean) for case in cases])
        for lean, label, colour, marker, shift in (
            (False, "with a cache for all decoded weights", BLUE, "o", -0.15),
            (True, "no cache", SKY, "s", 0.15),
        )
    ]
    if not any(modes[0][-1]):
        return None
    figure, axes = new_figure(1.3 + 0.42 * len(cases), BROAD)
    label_rows(axes, [shape_label(c.removesuffix(row_names.DECODED)) for c in cases])
    axes.axvline(0.95, color=INK, linewidth=1.2, linestyle="--")
    ratio_axis(
        axes, [row.p50 for *_, by_case in modes for rows in by_case for row in rows], 4,
        "speed, NumPy's matmul with the decoded weight = 1 (log scale; right is faster)",
    )  # fmt: skip
    low, high = axes.get_xlim()
    values = []
    for _, label, colour, marker, shift, by_case in modes:
        points = [(row.p50, y + shift, row) for y, rows in enumerate(by_case) for row in rows]
        shown = [(x, y) for x, y, _ in points if low <= x <= high]
        if shown:
            axes.plot(
                *zip(*shown, strict=True), marker, color=colour, markersize=6, linestyle="none", label=label
            )
        for place, (_, _, row) in zip(outliers(axes, [p[:2] for p in points], colour), points, strict=True):
            name = f"{row.case}, {row.provider.removeprefix(OURS).strip()}"
            values.append(Value(axes, *place, _speed_words(name, NUMPY, row)))
        for y, rows in enumerate(by_case):
            worst = min(rows, key=lambda row: row.p50, default=None)
            if worst is not None and low <= worst.p50 < 0.95:
                name = worst.provider.removesuffix(row_names.LEAN).removeprefix(OURS).strip()
                axes.annotate(name, (worst.p50, y + shift), xytext=(-6, 0), textcoords="offset points", ha="right",
                              va="center", fontsize=8.5, zorder=1.5)  # fmt: skip
    legend_above(axes)
    text = "; ".join(
        f"{case}{suffix or ', with a cache'}: {min(r.p50 for r in rows):.2f} to {max(r.p50 for r in rows):.2f}"
        for suffix, *_, by_case in modes
        for case, rows in zip(cases, by_case, strict=True)
        if rows
    )
    return Plot(
        "decoded_once", "Against decoding once",
        "The algorithm that rbe_gpu chooses, against NumPy's matmul with a weight that was decoded before, one point "
        "for each grade and density. The worst is named where it is left of the dashed line, "
        "0.95, the target for all.",
        f"Dot chart of speedups. {text}.", figure, broad=True, values=values,
    )  # fmt: skip


# --- memory -----------------------------------------------------------------------------------------------


def attention_memory(results: Results) -> Plot | None:
    """Peak memory of a long attention beyond its inputs and its result."""
    rows = [r for r in results.rows if (r.op, r.metric) == ("attention", "peak_memory")]
    if not rows:
        return None
    labels = {DENSE: "rbe_gpu", TORCH: "PyTorch (fused)", NUMPY: "NumPy (score matrix)"}
    colours = {**COLOURS, DENSE: BLUE}
    figure, axes = new_figure(0.9 + 0.38 * len(rows))
    bars(axes, [(labels[r.provider], r.p50 / 1e6, colours[r.provider]) for r in rows])
    axes.set_xlim(0, max(*(r.p50 / 1e6 for r in rows), 1.0) * 1.16)
    axes.set_xlabel(f"MB beyond q, k, v and the result, {rows[0].case}")
    text = "; ".join(f"{r.provider}: {r.p50 / 1e6:.1f} MB" for r in rows)
    values = [Value(axes, r.p50 / 1e6, y, f"{r.provider}: {r.p50 / 1e6:.2f} MB") for y, r in enumerate(rows)]
    return Plot(
        "attention_memory", "Memory of a long attention",
        "Peak resident memory of a process that attends over the whole sequence, less that of one that holds "
        "the same arrays and attends among 64 tokens; less than 1 MB is noise. NumPy holds the scores of one head "
        "at a time.",
        f"Bar chart of peak memory beyond the inputs and the result. {text}.", figure, values=values,
    )  # fmt: skip


def weight_memory(results: Results) -> Plot | None:
    """Memory for the weights of a running model."""
    dense = results.one("model", row_names.MODEL, DENSE, "weights_held")
    held = [] if dense is None else [("dense", dense, INK)]
    held += _by_mode(results, "weights_held")
    if len(held) < 2:
        return None
    sizes = [(label, row.p50 / 1e6, colour) for label, row, colour in held]
    figure, axes = new_figure(0.8 + 0.27 * len(sizes))
    bars(axes, sizes)
    axes.axvline(sizes[0][1], color=INK, linestyle="--", linewidth=1.2)
    axes.set_xlim(0, max(size for _, size, _ in sizes) * 1.13)
    axes.set_xlabel("MB held for weights and decoded weights while the model runs")
    text = "; ".join(f"{label}: {size:.1f} MB" for label, size, _ in sizes)
    values = [Value(axes, size, y, f"{label}: {size:.2f} MB") for y, (label, size, _) in enumerate(sizes)]
    return Plot(
        "weight_memory", "Memory for weights",
        "A compressed model that may cache decoded linear weights (dark) needs the memory of those in the cache "
        "beside that of the compressed ones; one without a cache (light, “lean”) the compressed weights alone.",
        f"Bar chart. {text}.", figure, values=values,
    )  # fmt: skip


def process_memory(results: Results) -> Plot | None:
    """What the weights of a running model add to the peak of its process."""

    def value(provider: str, metric: str) -> float | None:
        return results.value("model", row_names.MODEL_MEMORY, provider, f"{metric}_beyond_part")

    sizes = [
        (provider.removeprefix(OURS).strip(), peak / 1e6, stored / 1e6)
        for provider in results.providers("model", row_names.MODEL_MEMORY, "peak_beyond_part")
        if (peak := value(provider, "peak")) is not None and (stored := value(provider, "stored")) is not None
    ]
    dense = next(
        (
            r.p50 / 1e6
            for r in results.rows
            if (r.case, r.metric) == (row_names.MODEL_MEMORY, "dense_beyond_part")
        ),
        None,
    )
    if not sizes or dense is None:
        return None
    figure, axes = new_figure(1.3 + 0.38 * len(sizes))
    bars(axes, [(label, peak, BLUE) for label, peak, _ in sizes])
    for y, (_, _, stored) in enumerate(sizes):
        axes.plot((stored, stored), (y - 0.42, y + 0.42), color=VERMILLION, linewidth=2.2,
                  label="" if y else "bytes stored")  # fmt: skip
    axes.axvline(dense, color=INK, linestyle="--", linewidth=1.2, label="the same weights in float32")
    for label in axes.texts:  # readable where a line passes behind
        label.set(bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1.0}, zorder=5)
    axes.set_xlim(0, max(dense, *(peak for _, peak, _ in sizes)) * 1.16)
    axes.set_xlabel("MB that the weights add to the peak of a process")
    legend_above(axes)
    text = "; ".join(f"{label}: {peak:.1f} MB, stored {stored:.1f} MB" for label, peak, stored in sizes)
    values = [
        Value(axes, peak, y, f"{label}: adds {peak:.2f} MB to the peak, {stored:.2f} MB are stored")
        for y, (label, peak, stored) in enumerate(sizes)
    ]
    return Plot(
        "process_memory", "Weights in a running process",
        "Peak resident memory of a process that loads a model and runs a batch, less that of one that does so with "
        "one layer and the words that occur. A model with a hidden dense copy would reach the dashed line.",
        f"Bar chart. {text}; in float32 {dense:.1f} MB.", figure, values=values,
    )  # fmt: skip


PLOTS: tuple[Callable[[Results], Plot | None], ...] = (
    quality_bytes, error_bits, batch_time, weight_memory, process_memory, density_speed, decoded_once,
    compressed_speed, op_speed, attention_memory, *machine_plots.PLOTS,
)  # fmt: skip

"""The plots of a report, drawn from its rows and from nothing else.

Every plot shows the dense baseline, also where it wins. A plot whose rows are missing is not drawn.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from .aims import AGAINST_NUMPY, AGAINST_TORCH, KEPT_LIMITS, LARGE, SMALL
from .bench import Results, Row
from .cases import DENSE, NUMPY, ONNX, TORCH, linear
from .cases.model import CASE, LEAN, MEMORY, PEERS
from .quality import ALL_TARGETS, OURS, TARGETS, Target

#: Okabe and Ito's palette, told apart with every common colour blindness
BLUE, SKY, VERMILLION, GREEN, GREY = "#0072b2", "#56b4e9", "#d55e00", "#009e73", "#8c9199"
#: a compressed model keeps its decoded weights, or it does not: (case, what a label says, colour)
MODES = ((CASE, "", BLUE), (LEAN, ", lean", SKY))
#: placeholders in the drawing, which become CSS variables in the page
INK, GRID, PAPER = "#1f2430", "#d9dde4", "#fdfdfe"
STYLE = {
    "font.size": 10.5,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10.5,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.6,
    "svg.fonttype": "path",
    "svg.hashsalt": "rbe-gpu",
    "figure.constrained_layout.use": True,
}
NARROW, BROAD = 6.4, 8.8  # inches; 72 SVG units each


@dataclass(frozen=True)
class Plot:
    """A drawn figure. `alt` says in words what it shows, for those who do not see it."""

    name: str
    title: str
    caption: str
    alt: str
    figure: Figure
    broad: bool = False

    def svg(self) -> str:
        """An `<svg>` element for an HTML page: ids of its own, ink and grid in the page's colours."""
        buffer = io.StringIO()
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        text = buffer.getvalue()
        text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
        text = re.sub(r'\bid="', f'id="{self.name}-', text)
        text = re.sub(r'(href="#|url\(#)', rf"\g<1>{self.name}-", text)
        text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
        text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
        for colour, variable in ((INK, "currentColor"), (GRID, "var(--grid)"), (PAPER, "var(--card)")):
            text = text.replace(colour, variable)
        return text.strip()

    def png(self, path: Path) -> None:
        """A picture on white."""
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(path, dpi=160, facecolor="white")


def figure_of(height: float, width: float = NARROW) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def log_axis(axis: Any, ticks: Sequence[float], label: Callable[[float], str]) -> None:
    """A log axis with just these ticks."""
    axis.set_major_locator(LogLocator(subs=(1.0,)))
    axis.set_ticks(list(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda v, _: label(v)))


def _number(v: float) -> str:
    return f"{v:g}"


def _shapes(label: str) -> str:
    """768x768 with the sign that reads as "by"."""
    return re.sub(r"(\d) ?x ?(\d)", r"\1 × \2", label)


def _spread(rows: Sequence[Row], scale: float = 1.0) -> Any:
    """Distances of p20 and p80 from the median, (2, rows), for error bars."""
    return scale * np.array([[r.p50 - r.p20 for r in rows], [r.p80 - r.p50 for r in rows]])


def _points(results: Results, x: str, y: str) -> list[tuple[Target, float, float]]:
    """(target, x, y) of every target that has both metrics, ordered by x."""
    found = []
    for target in TARGETS:
        a, b = (results.value("model", target.name, OURS, metric) for metric in (x, y))
        if a is not None and b is not None:
            found.append((target, a, b))
    return sorted(found, key=lambda p: p[1])


#: where a name stands beside its point, as (offset, horizontal, vertical): grades and ratios come close to
#: each other, and each chart has one side of the curve free
_UPPER_LEFT = {"grade": ((-3, 6), "right", "bottom"), "ratio": ((-8, 0), "right", "center")}
_UPPER_RIGHT = {"grade": ((8, 0), "left", "center"), "ratio": ((2, 7), "center", "bottom")}


def _name(axes: Any, target: Target, x: float, y: float, places: dict[str, Any]) -> None:
    """A target's name beside its point."""
    offset, horizontal, vertical = places["grade" if target.grade else "ratio"]
    axes.annotate(
        target.short.replace("x", "×"), (x, y), xytext=offset, textcoords="offset points",
        ha=horizontal, va=vertical, fontweight="bold", fontsize=9.5, zorder=1.5,
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
    figure, axes = figure_of(4.2)
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
    for target, b, c in mean:
        _name(axes, target, b / 1e6, c, _UPPER_LEFT)
    axes.annotate("dense", (dense / 1e6, 1.0), xytext=(0, 8), textcoords="offset points", ha="center",
                  fontweight="bold", fontsize=9.5)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(min(b for _, b, _ in mean) / 1e6 / 1.4, dense / 1e6 * 1.3)
    log_axis(axes.xaxis, [t for t in (1, 2, 5, 10, 20, 50, 100) if t >= axes.get_xlim()[0]], _number)
    low = min(0.0, *(c for _, _, c in least))
    axes.set_ylim(low - 0.08, 1.12)
    axes.set_yticks(np.arange(0, 1.01, 0.2))
    axes.set_xlabel("file size in MB, all bytes counted (log scale)")
    axes.set_ylabel("cosine to the dense model's vector")
    axes.legend(loc="center right")
    said = "; ".join(f"{t.name}: {b / 1e6:.1f} MB, mean cosine {c:.3f}" for t, b, c in mean)
    return Plot(
        "quality_bytes", "Quality against file size",
        "Sentence vectors of held-out texts from the compressed model against those of the dense one. "
        "1 is the same direction.",
        f"Line chart. The dense file has {dense / 1e6:.1f} MB and cosine 1. {said}.", figure,
    )  # fmt: skip


#: (bits per weight, relative error) of some weights
Errors = Sequence[tuple[float, float]]


def bound_chart(models: Errors, label: str, others: Mapping[str, Errors], x: str) -> tuple[Figure, Any]:
    """Axes of weight error against bits per weight, with Shannon's bound for Gaussian values, D = 2^(-2R).

    models : the points that matter most, called `label`
    others : name -> further points; at most three
    x : what the x axis says
    """
    figure, axes = figure_of(4.2)
    seen = [*models, *(p for points in others.values() for p in points)]
    right = max(b for b, _ in models or seen) * 1.08
    bound = np.linspace(0, right, 200)
    axes.plot(bound, 2.0**-bound, "--", color=INK, linewidth=1.3, label="Shannon's bound, $D = 2^{-2R}$")
    styles = ((SKY, "s", 5.5), (VERMILLION, "v", 6.5), (GREY, "D", 5.5))
    for (name, points), (colour, marker, size) in zip(others.items(), styles, strict=False):
        if points:
            axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=size, linestyle="none",
                      label=name)  # fmt: skip
    if models:
        axes.plot(*zip(*models, strict=True), "o", color=BLUE, markersize=7, label=label)
    axes.set_yscale("log")
    axes.set_xlim(0, right)
    axes.set_ylim(min(e for _, e in models or seen) / 3, 1.5)
    log_axis(axes.yaxis, [t for t in (1e-4, 1e-3, 1e-2, 1e-1, 1) if t > axes.get_ylim()[0]], _number)
    axes.set_xlabel(x)
    axes.set_ylabel("weight error, ||W − W′|| / ||W|| (log scale)")
    axes.legend(loc="upper right")
    return figure, axes


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
    for target, b, e in models:
        _name(axes, target, b, e, _UPPER_RIGHT)
    said = "; ".join(f"{t.name}: {b:.2f} bits, error {e:.3g}" for t, b, e in models)
    return Plot(
        "error_bits", "Weight error against bits per weight",
        "The dashed line is the least error that any code can reach on independent Gaussian values; real "
        "weights are close to Gaussian, so distance to the line is what a better code could still win.",
        f"Scatter chart, error on a log scale. {said}.", figure,
    )  # fmt: skip


# --- speed --------------------------------------------------------------------------------------------------


def batch_time(results: Results) -> Plot | None:
    """Time per batch of every model, dense ones first."""
    dense = results.one("model", CASE, DENSE, "time")
    if dense is None:
        return None
    bars: list[tuple[str, Row, str]] = []
    colours = {DENSE: INK, TORCH: VERMILLION, NUMPY: GREY, ONNX: GREEN}
    for provider in (*reversed(PEERS), DENSE):
        row = results.one("model", CASE, provider, "time")
        if row is not None:
            bars.append((f"{OURS if provider == DENSE else provider}, dense", row, colours[provider]))
    for target in ALL_TARGETS:
        for case, suffix, colour in MODES:
            row = results.one("model", case, f"{OURS} {target.name}", "time")
            if row is not None:
                bars.append((target.name + suffix, row, colour))
    figure, axes = figure_of(0.9 + 0.27 * len(bars))
    where = np.arange(len(bars))
    rows = [row for _, row, _ in bars]
    values = np.array([r.p50 * 1e3 for r in rows])
    axes.barh(where, values, 0.72, color=[c for _, _, c in bars])
    axes.errorbar(values, where, xerr=_spread(rows, 1e3), fmt="none", ecolor=GREY, elinewidth=1.2, capsize=2)
    edge = max(r.p80 * 1e3 for r in rows)
    for y, row in zip(where, rows, strict=True):
        axes.text(row.p80 * 1e3 + 0.012 * edge, y, f"{row.p50 * 1e3:.0f}", va="center", fontsize=9,
                  bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.8})  # fmt: skip
    axes.axvline(dense.p50 * 1e3, color=INK, linestyle="--", linewidth=1.2)
    axes.set_yticks(where, [label for label, _, _ in bars])
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, edge * 1.1)
    axes.set_xlabel(f"milliseconds per batch of {CASE}, {rows[0].shape} (shorter is faster)")
    said = "; ".join(f"{label} {row.p50 * 1e3:.0f} ms" for label, row, _ in bars)
    return Plot(
        "batch_time", "Time per batch",
        "Medians, with lines from the 20th to the 80th percentile; the dashed line is the dense rbe_gpu "
        "model. A compressed model has room to keep decoded weights where the planner finds that faster "
        "(dark), or keeps nothing (light, “lean”).",
        f"Bar chart. {said}.", figure,
    )  # fmt: skip


def _speed_rows(results: Results, ops: Sequence[str], dense: bool) -> Iterator[tuple[str, dict[str, Row]]]:
    """(label, peer -> row of the speed against it), of dense or of compressed operands."""
    for op in ops:
        for case in results.cases(op):
            providers = dict.fromkeys(
                p for peer in (TORCH, NUMPY) for p in results.providers(op, case, f"speed_vs_{peer}")
            )
            for provider in providers:
                if "no out" in provider or not provider.startswith(OURS):
                    continue
                if (provider == DENSE) is not dense:
                    continue
                found = {
                    peer: row
                    for peer in (TORCH, NUMPY)
                    if (row := results.one(op, case, provider, f"speed_vs_{peer}")) is not None
                }
                what = provider.removeprefix(OURS).strip()
                if not dense and _elsewhere(op, case, provider):
                    continue
                yield f"{op}  {case}" + ("" if dense or what in case else f"  {what}"), found


def _elsewhere(op: str, case: str, provider: str) -> bool:
    """Whether `kept_speed` or `decoded_once` shows the product."""
    if op != "linear":
        return False
    return case.endswith(linear.DECODED) or ("kept" in provider and not case.endswith(" 1 token"))


def _speed_plot(
    results: Results, ops: Sequence[str], dense: bool, name: str, title: str, what: str
) -> Plot | None:
    listed = [(label, found) for label, found in _speed_rows(results, ops, dense) if found]
    if not listed:
        return None
    figure, axes = figure_of(1.2 + 0.27 * len(listed), BROAD)
    where = np.arange(len(listed))
    axes.axvline(1.0, color=INK, linewidth=1.4)
    for peer, colour, marker, shift in ((NUMPY, GREY, "s", 0.13), (TORCH, VERMILLION, "o", -0.13)):
        at = [y for y, (_, found) in zip(where, listed, strict=True) if peer in found]
        rows = [found[peer] for _, found in listed if peer in found]
        if rows:
            axes.errorbar(
                [r.p50 for r in rows], np.array(at) + shift, xerr=_spread(rows), fmt=marker, color=colour,
                markersize=6, elinewidth=1.2, label=f"against {peer}",
            )  # fmt: skip
    values = [r for _, found in listed for row in found.values() for r in (row.p20, row.p80)]
    low, high = min(0.5, *values) / 1.25, max(2.0, *values) * 1.25
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    steps = (1,) if high / low > 300 else (1, 2, 5)  # as many labels as there is room for
    ticks = [s * 10.0**e for e in range(-4, 5) for s in steps if low <= s * 10.0**e <= high]
    log_axis(axes.xaxis, ticks, lambda v: f"{v:g}×")
    axes.set_yticks(where, [_shapes(label) for label, _ in listed])
    axes.set_ylim(len(listed) - 0.4, -0.6)
    axes.set_xlabel("speed of rbe_gpu, the peer = 1 (log scale; right is faster)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    said = "; ".join(
        f"{label.replace('  ', ', ')}: "
        + ", ".join(f"{row.p50:.2f} times as fast as {peer}" for peer, row in found.items())
        for label, found in listed
    )
    return Plot(
        name, title,
        f"{what} A point right of 1 means that rbe_gpu is faster. Medians of the ratios of paired runs, with "
        "lines from the 20th to the 80th percentile.",
        f"Dot chart of speed ratios. {said}.", figure, broad=True,
    )  # fmt: skip


def op_speed(results: Results) -> Plot | None:
    """Every op on dense arrays against the peers."""
    ops = list(dict.fromkeys(r.op for r in results.rows if r.op != "model"))
    return _speed_plot(
        results, ops, True, "op_speed", "Ops on dense arrays",
        "Each op with a given output buffer, on real weights and activations.",
    )  # fmt: skip


def compressed_speed(results: Results) -> Plot | None:
    """Ops on compressed weights against the peers' dense op."""
    return _speed_plot(
        results, ("linear", "embedding", "decode"), False, "compressed_speed", "Ops on compressed weights",
        "Against the peers on the dense weight (for decode: against NumPy decoding the same codes).",
    )  # fmt: skip


def kept_speed(results: Results) -> Plot | None:
    """Products with sparse weights against PyTorch's with the dense weight, by the share that is kept."""
    lines: dict[str, list[tuple[str, list[Row]]]] = {SMALL: [], LARGE: []}
    columns = [*(linear.sparse(k) for k in linear.KEPT), DENSE]
    for case in results.cases("linear"):
        shape, _, tokens = case.partition(", ")
        found = [results.one("linear", case, provider, AGAINST_TORCH) for provider in columns]
        rows = [row for row in found if row is not None]
        if len(rows) == len(columns) and tokens not in ("1 token", ""):
            group = next((g for g in lines if shape in g.split("|")), None)
            if group is not None:
                lines[group].append((_shapes(case), rows))
    shown = [(n, group, cases) for n, (group, cases) in enumerate(lines.items()) if cases]
    if not shown:
        return None
    figure = Figure(figsize=(BROAD, 4.2), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    where = np.arange(len(columns))
    styles = ((BLUE, "o"), (SKY, "s"), (VERMILLION, "v"), (GREEN, "D"))
    for axes, (number, group, cases) in zip(panels, shown, strict=True):
        axes.axhline(1.0, color=INK, linewidth=1.4)
        limits = [limit[number] for limit in KEPT_LIMITS.values()]
        for x, limit in enumerate(limits):
            axes.plot((x - 0.32, x + 0.32), (limit, limit), color=INK, linewidth=1.6, linestyle=(0, (2, 1)),
                      label="" if x else "aim")  # fmt: skip
        shift = 0.09 * (np.arange(len(cases)) - (len(cases) - 1) / 2)
        for (label, rows), (colour, marker), by in zip(cases, styles, shift, strict=False):
            axes.errorbar(where + by, [r.p50 for r in rows], yerr=_spread(rows), fmt=marker, color=colour,
                          markersize=6, elinewidth=1.2, label=label)  # fmt: skip
        axes.set_yscale("log")
        axes.set_xticks(where, [*(f"{k:.0%}" for k in linear.KEPT), "dense"])
        axes.set_xlim(-0.6, len(columns) - 0.4)
        axes.set_xlabel("coefficients kept")
        axes.set_title(_shapes(" and ".join(group.split("|"))), loc="left")
        axes.legend(loc="upper right")
    values = [r.p50 for cases in lines.values() for _, rows in cases for r in rows]
    low, high = min(0.5, *values) / 1.25, max(10.0, *values) * 2.5  # room for the legend
    log_axis(
        panels[0].yaxis,
        [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if low <= t <= high],
        lambda v: f"{v:g}×",
    )
    panels[0].set_ylim(low, high)
    panels[0].set_ylabel("speed, PyTorch's dense product = 1 (log scale)")
    said = "; ".join(
        f"{label}: " + ", ".join(f"{column.removeprefix(OURS).strip()} {row.p50:.2f}" for column, row in
                                 zip(columns, rows, strict=True))
        for cases in lines.values() for label, rows in cases
    )  # fmt: skip
    return Plot(
        "kept_speed", "Products without decoding",
        "Speed of a product with a compressed weight, from the kept coefficients alone, against PyTorch's with the "
        "dense weight; on the right of each panel, rbe_gpu's own dense product. Medians of the ratios of paired "
        "runs, with lines from the 20th to the 80th percentile; dashes are what is aimed at.",
        f"Dot chart of speed ratios. {said}.", figure, broad=True,
    )  # fmt: skip


def decoded_once(results: Results) -> Plot | None:
    """The ways that the planner picks against a product with a weight that was decoded once."""
    cases = [c for c in results.cases("linear") if c.endswith(linear.DECODED)]
    found: dict[str, list[list[Row]]] = {"": [], linear.LEAN: []}
    for case in cases:
        providers = results.providers("linear", case, AGAINST_NUMPY)
        for mode, listed in found.items():
            mine = (
                results.one("linear", case, p, AGAINST_NUMPY)
                for p in providers
                if p.endswith(linear.LEAN) is bool(mode)
            )
            listed.append([row for row in mine if row is not None])
    if not any(found[""]):
        return None
    figure, axes = figure_of(1.3 + 0.42 * len(cases), BROAD)
    axes.axvline(1.0, color=INK, linewidth=1.4)
    axes.axvline(0.95, color=INK, linewidth=1.2, linestyle="--")
    for mode, colour, marker, shift, label in (
        ("", BLUE, "o", -0.15, "with a cache for all decoded weights"), (linear.LEAN, SKY, "s", 0.15, "nothing kept"),
    ):  # fmt: skip
        pairs = [(row.p50, y + shift) for y, rows in enumerate(found[mode]) for row in rows]
        if pairs:
            axes.plot(
                *zip(*pairs, strict=True), marker, color=colour, markersize=6, linestyle="none", label=label
            )
        for y, rows in enumerate(found[mode]):
            worst = min(rows, key=lambda row: row.p50, default=None)
            if worst is not None and worst.p50 < 0.95:
                name = worst.provider.removesuffix(linear.LEAN).removeprefix(OURS).strip()
                axes.annotate(
                    name, (worst.p50, y + shift), xytext=(-6, 0), textcoords="offset points", ha="right",
                    va="center", fontsize=8.5, zorder=1.5,
                )  # fmt: skip
    values = [row.p50 for listed in found.values() for rows in listed for row in rows]
    low, high = min(0.5, *values) / 4, max(2.0, *values) * 1.25  # room for a name
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    steps = (1,) if high / low > 300 else (1, 2, 5)
    ticks = [s * 10.0**e for e in range(-4, 4) for s in steps if low <= s * 10.0**e <= high]
    log_axis(axes.xaxis, ticks, lambda v: f"{v:g}×")
    axes.set_yticks(range(len(cases)), [_shapes(c.removesuffix(linear.DECODED)) for c in cases])
    axes.set_ylim(len(cases) - 0.4, -0.6)
    axes.set_xlabel("speed, NumPy's product with the decoded weight = 1 (log scale; right is faster)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    said = "; ".join(
        f"{case}{mode or ', with a cache'}: {min(r.p50 for r in rows):.2f} to {max(r.p50 for r in rows):.2f}"
        for mode, listed in found.items() for case, rows in zip(cases, listed, strict=True) if rows
    )  # fmt: skip
    return Plot(
        "decoded_once", "Against decoding once",
        "The way that rbe_gpu picks by itself against NumPy's product with a weight that was decoded before, one "
        "point for each grade and share of kept coefficients. The worst is named where it is left of the dashed "
        "line, 0.95, below which none is to be.",
        f"Dot chart of speed ratios. {said}.", figure, broad=True,
    )  # fmt: skip


# --- memory -------------------------------------------------------------------------------------------------


def _bars(axes: Any, labels: Sequence[str], values: Sequence[float], colours: Sequence[str]) -> None:
    where = np.arange(len(labels))
    axes.barh(where, values, 0.66, color=list(colours))
    for y, v in zip(where, values, strict=True):
        axes.annotate(
            f"{v:.1f} MB", (v, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.set_yticks(where, labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def attention_memory(results: Results) -> Plot | None:
    """Peak memory of a long attention beyond its inputs and its result."""
    rows = [r for r in results.rows if (r.op, r.metric) == ("attention", "peak_memory")]
    if not rows:
        return None
    colours = {DENSE: BLUE, TORCH: VERMILLION, NUMPY: GREY}
    labels = {DENSE: "rbe_gpu", TORCH: "PyTorch (fused)", NUMPY: "NumPy (score matrix)"}
    figure, axes = figure_of(0.9 + 0.38 * len(rows))
    values = [r.p50 / 1e6 for r in rows]
    _bars(axes, [labels[r.provider] for r in rows], values, [colours[r.provider] for r in rows])
    axes.set_xlim(0, max(*values, 1.0) * 1.16)
    axes.set_xlabel(f"MB beyond q, k, v and the result, {rows[0].case}")
    said = "; ".join(f"{r.provider}: {r.p50 / 1e6:.1f} MB" for r in rows)
    return Plot(
        "attention_memory", "Memory of a long attention",
        "Peak resident memory of a process that attends over the whole sequence, less that of one that holds "
        "the same arrays and attends among 64 tokens; less than 1 MB is noise. NumPy holds the scores of one head "
        "at a time.",
        f"Bar chart. {said}.", figure,
    )  # fmt: skip


def weight_memory(results: Results) -> Plot | None:
    """Memory for the weights of a running model."""
    dense = results.one("model", CASE, DENSE, "weights_held")
    bars = [] if dense is None else [("dense", dense.p50, INK)]
    for target in ALL_TARGETS:
        for case, suffix, colour in MODES:
            row = results.one("model", case, f"{OURS} {target.name}", "weights_held")
            if row is not None:
                bars.append((target.name + suffix, row.p50, colour))
    if len(bars) < 2:
        return None
    figure, axes = figure_of(0.8 + 0.27 * len(bars))
    values = [b / 1e6 for _, b, _ in bars]
    _bars(axes, [label for label, _, _ in bars], values, [c for _, _, c in bars])
    axes.axvline(values[0], color=INK, linestyle="--", linewidth=1.2)
    axes.set_xlim(0, max(values) * 1.13)
    axes.set_xlabel("MB held for weights and decoded weights while the model runs")
    said = "; ".join(f"{label}: {b / 1e6:.1f} MB" for label, b, _ in bars)
    return Plot(
        "weight_memory", "Memory for weights",
        "A compressed model that may keep decoded linear weights (dark) needs the memory of those that it keeps "
        "beside that of the compressed ones; one that keeps nothing (light, “lean”) the compressed weights alone.",
        f"Bar chart. {said}.", figure,
    )  # fmt: skip


def process_memory(results: Results) -> Plot | None:
    """What the weights of a running model add to the peak of its process."""
    bars: list[tuple[str, float, float]] = []
    for provider in results.providers("model", MEMORY, "peak_beyond_part"):
        peak, stored = (
            results.value("model", MEMORY, provider, f"{m}_beyond_part") for m in ("peak", "stored")
        )
        assert peak is not None
        assert stored is not None
        bars.append((provider.removeprefix(OURS).strip(), peak / 1e6, stored / 1e6))
    dense = next(
        (r.p50 / 1e6 for r in results.rows if (r.case, r.metric) == (MEMORY, "dense_beyond_part")), None
    )
    if not bars or dense is None:
        return None
    figure, axes = figure_of(1.3 + 0.38 * len(bars))
    _bars(axes, [b[0] for b in bars], [b[1] for b in bars], [BLUE] * len(bars))
    for y, (_, _, stored) in enumerate(bars):
        axes.plot((stored, stored), (y - 0.42, y + 0.42), color=VERMILLION, linewidth=2.2,
                  label="" if y else "bytes stored")  # fmt: skip
    axes.axvline(dense, color=INK, linestyle="--", linewidth=1.2, label="the same weights in float32")
    for text in axes.texts:  # readable where a line passes behind
        text.set(bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0}, zorder=5)
    axes.set_xlim(0, max(dense, *(b[1] for b in bars)) * 1.16)
    axes.set_xlabel("MB that the weights add to the peak of a process")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    said = "; ".join(f"{label}: {peak:.1f} MB, stored {stored:.1f} MB" for label, peak, stored in bars)
    return Plot(
        "process_memory", "Weights in a running process",
        "Peak resident memory of a process that loads a model and runs a batch, less that of one that does so with "
        "one layer and the words that occur. A model with a hidden dense copy would reach the dashed line.",
        f"Bar chart. {said}; in float32 {dense:.1f} MB.", figure,
    )  # fmt: skip


PLOTS: tuple[Callable[[Results], Plot | None], ...] = (
    quality_bytes,
    error_bits,
    batch_time,
    weight_memory,
    process_memory,
    kept_speed,
    decoded_once,
    compressed_speed,
    op_speed,
    attention_memory,
)


def draw(results: Results) -> list[Plot]:
    """Every plot whose rows are there."""
    with matplotlib.rc_context(STYLE):
        return [plot for make in PLOTS if (plot := make(results)) is not None]

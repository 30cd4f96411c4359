"""The plots of quality per byte, drawn from rows alone. Every one shows the dense model.

Each tool has its colour and its marker in all of them. Names stand beside our points and beside the baselines that no
other baseline beats at its bytes; the tables name all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from textwrap import fill
from typing import Any

import numpy as np

from ..harness.page import QUALITY_PLOT
from ..harness.plots import (
    BLUE,
    BROAD,
    GREY,
    INK,
    PAPER,
    SKY,
    VERMILLION,
    Name,
    Plot,
    bound_chart,
    legend_above,
    log_axis,
    new_figure,
    on_phone,
    place,
)
from ..harness.plots import Value as PointValue
from ..harness.rows import Results
from ..harness.text import cosine_rating, fixed, megabytes
from .measure import CALIBRATED, DENSE, DISTILLED, LINEAR, PLAIN, PLAIN_RATIO, PLAIN_WHOLE, WHOLE
from .points import Point, baselines, basis_trials, measured_tools, ours, point, points

#: colours of Okabe and Ito, and markers: either is enough to tell tools apart
STYLES = (
    (VERMILLION, "s"), ("#009e73", "^"), ("#e69f00", "D"), ("#cc79a7", "v"), (INK, "x"), ("#7a6a00", "P"),
    (GREY, "*"),
)  # fmt: skip
#: our files: prefix of their providers, and how they are drawn
SERIES = (
    (DISTILLED, {"color": BLUE, "marker": "*", "markersize": 12, "zorder": 3.5}),
    (CALIBRATED, {"color": BLUE, "marker": "o", "markersize": 6.5, "zorder": 3}),
    (PLAIN, {"color": SKY, "marker": "o", "markersize": 6.5, "markerfacecolor": PAPER, "zorder": 2.5}),
)
FLOOR = 1e-6  # of 1 - cosine: below is float32's rounding, and is drawn at the edge
CLOSE = 0.01  # 1 - cosine of what is very close to dense
#: abbreviations of settings' names in a plot
SHORT = (
    (r"groups of (\d+)", r"g\1"),
    (r"blocks of (\d+)", r"b\1"),
    (" bits,", " bits"),
    (r" \+ words", " +w"),
)
ABBREVIATIONS = "g64, b64: groups, blocks of 64; +w: the word table too."
FILE_TICKS = (0.1, 0.2, 0.5, 1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 60, 90, 150, 300)
BIT_TICKS = (0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32)

Value = Callable[[Point], "float | None"]


def short(setting: str) -> str:
    """A setting's name for a plot."""
    for pattern, replacement in SHORT:
        setting = re.sub(pattern, replacement, setting)
    return setting


def frontier(points: Sequence[Point], value: Value) -> list[Point]:
    """The points that no other with as few bytes is as good as; `value` is better when it is less."""
    best, front = np.inf, []
    for p in sorted(points, key=lambda p: (p.bytes, np.inf if value(p) is None else value(p))):
        v = value(p)
        if v is not None and v < best:
            best = v
            front.append(p)
    return front


# --- charts of points -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chart:
    """What the axes of a chart show: x and y of a point, and the name of one of ours. A lower `cost` is better.

    joined : lines join our points of a kind
    """

    x: Value
    y: Value
    cost: Value
    name: Callable[[Point], str]
    joined: bool = True

    def at(self, points: Sequence[Point]) -> list[tuple[float, float, Point]]:
        """(x, y, point) of those that have both."""
        return [(x, y, p) for p in points if (x := self.x(p)) is not None and (y := self.y(p)) is not None]


def _ratio(p: Point) -> str:
    """ "8×" of a ratio."""
    return p.provider.rsplit(" ", 1)[-1] + "×"


def _loss(p: Point) -> float | None:
    return None if p.loss is None else max(p.loss, FLOOR)


def file_megabytes(p: Point) -> float:
    """Bytes of a file, in MB."""
    return p.bytes / 1e6


#: bits as they were asked for name our points: "3.25 bits"
LINEAR_LOSS = Chart(
    lambda p: p.bits_per_weight,
    _loss,
    lambda p: p.loss,
    lambda p: p.provider.removeprefix(CALIBRATED).strip(),
)
FILE_LOSS = Chart(file_megabytes, _loss, lambda p: p.loss, _ratio)
FILE_RECALL = replace(
    FILE_LOSS, y=lambda p: p.recall_at_10, cost=lambda p: None if p.recall_at_10 is None else -p.recall_at_10
)


def draw_points(
    axes: Any, results: Results, points: Sequence[Point], chart: Chart, named: Sequence[Point] | None = None
) -> tuple[list[Name], list[tuple[float, float]]]:
    """Our points and every baseline's. Returns the names to write, and all that they must keep off.

    named : the baselines that get a name; None: those of the frontier whose quality is not gone, on a phone none
    """
    names: list[Name] = []
    solid: list[tuple[float, float]] = []
    for prefix, style in SERIES:
        at = chart.at(ours(points, prefix))
        if at:
            xs, ys, _ = zip(*at, strict=True)
            line = "-" if chart.joined else "none"
            axes.plot(xs, ys, linestyle=line, label=prefix.replace(" ", ", "), **style)
            solid += _along(xs, ys) if chart.joined else zip(xs, ys, strict=True)
            # a plain file has the bytes of the calibrated one of its ratio: one name serves both
            known = {name.words for name in names}
            names += [Name(chart.name(p), x, y, bold=True) for x, y, p in at if chart.name(p) not in known]
    others = baselines(points)
    for i, tool in enumerate(measured_tools(results)):
        colour, marker = STYLES[i % len(STYLES)]
        at = chart.at([p for p in others if p.tool == tool])
        if at:
            xs, ys, _ = zip(*at, strict=True)
            axes.plot(xs, ys, marker, color=colour, markersize=5.5, linestyle="none", label=tool, zorder=2,
                      clip_on=False)  # fmt: skip
            solid += zip(xs, ys, strict=True)
    if named is None and on_phone():
        named = []  # there is no room: pointing at a point names it
    if named is None:
        usable = (p for p in frontier(others, chart.cost) if p.cosine_mean is not None)
        named = [p for p in usable if cosine_rating(p.cosine_mean).level != "gone"]
    return names + [Name(short(p.setting), x, y) for x, y, p in chart.at(named)], solid


def _along(xs: Sequence[float], ys: Sequence[float], steps: int = 12) -> list[tuple[float, float]]:
    """Points along a curve, close enough that no name slips between them (log axes: steps of equal ratio)."""
    if len(xs) < 2:
        return list(zip(xs, ys, strict=True))
    t = np.linspace(0, len(xs) - 1, steps * (len(xs) - 1) + 1)
    whole = np.arange(len(xs))
    x = np.exp(np.interp(t, whole, np.log(xs)))
    y = np.interp(t, whole, ys) if min(ys) <= 0 else np.exp(np.interp(t, whole, np.log(ys)))
    return list(zip(x.tolist(), y.tolist(), strict=True))


def least_loss(points: Sequence[Point]) -> float:
    """The lower edge of the y axis for these points."""
    return max(FLOOR, min((_loss(p) or 1 for p in points), default=1.0) / 3)


def loss_axis(axes: Any, low: float, dense_x: float) -> Name:
    """The y axis of 1 - cosine, from `low` up, with a line where vectors are very close to the dense model's.

    The dense model has 1 - cosine = 0, which a log axis cannot show: it stands on the lower edge. Returns its name.
    """
    axes.set_yscale("log")
    axes.set_ylim(low, 2.0)
    log_axis(axes.yaxis, [t for t in 10.0 ** np.arange(-6, 1) if t >= low])
    axes.axhline(CLOSE, color=GREY, linestyle=":", linewidth=1.4, zorder=1)
    axes.set_ylabel("1 − mean cosine to dense (log scale, lower is nearer)")
    axes.plot(dense_x, low, "D", color=INK, markersize=8, clip_on=False, zorder=5)
    return Name("dense: 0", dense_x, low, bold=True)


def x_axis(axes: Any, low: float, high: float, ticks: Sequence[float], label: str) -> None:
    """A log x axis from low to high."""
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    low, high = axes.get_xlim()
    inside = [t for t in ticks if low <= t <= high]
    log_axis(axes.xaxis, inside[-1::-2][::-1] if on_phone() else inside)
    axes.set_xlabel(fill(label, 50) if on_phone() else label)


def file_axis(axes: Any, points: Sequence[Point], dense: Point) -> None:
    """The x axis of the sizes of files."""
    sizes = [file_megabytes(p) for p in (*points, dense)]
    x_axis(
        axes,
        min(sizes) / 1.2,
        max(sizes) * 1.25,
        FILE_TICKS,
        "file size in MB, all bytes counted (log scale)",
    )


def finish(figure: Any, axes: Any, names: Sequence[Name], solid: Sequence[tuple[float, float]]) -> None:
    """The legend, then the names where it leaves room."""
    legend_above(axes, ncols=2 if on_phone() else 5, columnspacing=1.4, handletextpad=0.5)
    place(figure, axes, names, solid)


def hover(axes: Any, chart: Chart, points: Sequence[Point]) -> list[PointValue]:
    """What the points say when they are pointed at."""
    return [PointValue(axes, x, y, words(p)) for x, y, p in chart.at(points)]


def words(p: Point) -> str:
    """A point in words: its size and what it keeps."""
    bits = (
        "" if p.case != LINEAR or p.bits_per_weight is None else f"{p.bits_per_weight:.2f} bits per weight, "
    )
    recall = "" if p.recall_at_10 is None else f", recall@10 {fixed(p.recall_at_10, 3)}"
    return f"{p.provider}: {bits}{megabytes(p.bytes, True)}, mean cosine {fixed(p.cosine_mean)}{recall}"


def listing(points: Sequence[Point], value: Value) -> str:
    """The points in words."""
    return "; ".join(
        f"{p.provider}: {p.bytes / 1e6:.2f} MB, {v:.4g}" for p in points if (v := value(p)) is not None
    )


def linear_loss(results: Results) -> Plot | None:
    """(a) 1 - cosine against bits per weight, the linear layers alone."""
    layers = [p for p in points(results, LINEAR) if p.bits_per_weight is not None and p.loss is not None]
    if not layers:
        return None
    figure, axes = new_figure(5.4, BROAD)
    names, solid = draw_points(axes, results, layers, LINEAR_LOSS)
    least = min(p.bits_per_weight or 1 for p in layers)
    x_axis(
        axes, least / 1.15, 40, BIT_TICKS,
        "bits per weight of the linear layers, scales and tables of codes counted (log scale)",
    )  # fmt: skip
    finish(figure, axes, [loss_axis(axes, least_loss(layers), 32), *names], solid)
    return Plot(
        f"{QUALITY_PLOT}linear", "Linear layers alone: loss against bits per weight",
        "Only the weights of the linear layers are quantised; all else is dense. Lower left is better. The dotted "
        "line is a mean cosine of 0.99. On a wide screen names stand beside the baselines that no other beats at its "
        f"bits, where quality is not gone. {ABBREVIATIONS}",
        f"Scatter chart, both axes logarithmic, of bytes and 1 - cosine. {listing(layers, lambda p: p.loss)}.",
        figure, broad=True, values=hover(axes, LINEAR_LOSS, layers),
    )  # fmt: skip


def file_loss(results: Results) -> Plot | None:
    """(b) 1 - cosine against the size of the file."""
    files = [p for p in points(results, WHOLE) if p.loss is not None and p.provider != DENSE]
    dense = point(results, WHOLE, DENSE)
    if not files or dense is None:
        return None
    figure, axes = new_figure(5.4, BROAD)
    names, solid = draw_points(axes, results, files, FILE_LOSS)
    file_axis(axes, files, dense)
    finish(figure, axes, [loss_axis(axes, least_loss(files), file_megabytes(dense)), *names], solid)
    return Plot(
        f"{QUALITY_PLOT}file-loss", "Whole files: loss against size",
        "Lower left is better. The dotted line is a mean cosine of 0.99. Our points are named by their ratio. "
        f"{ABBREVIATIONS}",
        f"Scatter chart, both axes logarithmic, of bytes and 1 - cosine. {listing(files, lambda p: p.loss)}.",
        figure, broad=True, values=hover(axes, FILE_LOSS, files),
    )  # fmt: skip


def file_recall(results: Results) -> Plot | None:
    """(c) recall@10 against the size of the file, with the dense model's."""
    files = [p for p in points(results, WHOLE) if p.recall_at_10 is not None and p.provider != DENSE]
    dense = point(results, WHOLE, DENSE)
    if not files or dense is None or dense.recall_at_10 is None:
        return None
    figure, axes = new_figure(5.4, BROAD)
    names, solid = draw_points(axes, results, files, FILE_RECALL)
    axes.axhline(dense.recall_at_10, color=INK, linestyle="--", linewidth=1.2, zorder=1)
    axes.plot(file_megabytes(dense), dense.recall_at_10, "D", color=INK, markersize=8, zorder=5)
    file_axis(axes, files, dense)
    low, high = axes.get_xlim()
    solid += [(x, dense.recall_at_10) for x in np.geomspace(low, high, 80).tolist()]
    recalls = [p.recall_at_10 or 0 for p in files]
    axes.set_ylim(min(0.0, *recalls) - 0.02, min(1.02, max(dense.recall_at_10, *recalls) * 1.12))
    axes.set_ylabel("recall@10 (higher is better)")
    finish(figure, axes, [Name("dense", file_megabytes(dense), dense.recall_at_10, bold=True), *names], solid)
    return Plot(
        f"{QUALITY_PLOT}file-recall", "Whole files: recall@10 against size",
        f"Upper left is better. The dashed line is the dense model. {ABBREVIATIONS}",
        f"Scatter chart of bytes (log scale) and recall@10; the dense model has {dense.recall_at_10:.4g}. "
        f"{listing(files, lambda p: p.recall_at_10)}.",
        figure, broad=True, values=hover(axes, FILE_RECALL, [*files, dense]),
    )  # fmt: skip


def weight_error(results: Results) -> Plot | None:
    """(d) weight error against bits per weight without calibration, and Shannon's bound."""
    models: list[tuple[float, float, str]] = []
    for provider in results.providers("ablation", PLAIN_WHOLE, "weight_error"):
        bits = results.value("ablation", PLAIN_WHOLE, provider, "bits_per_weight")
        error = results.value("ablation", PLAIN_WHOLE, provider, "weight_error")
        if bits and error:
            models.append((bits, error, provider.rsplit(" ", 1)[-1] + "×"))
    trials: dict[str, list[tuple[float, float]]] = {"no basis": [], "with basis": []}
    for trial in basis_trials(results):
        for label, error in (("no basis", trial.without), ("with basis", trial.with_basis)):
            if trial.bits and error:
                trials[label].append((trial.bits, error))
    if not models and not any(trials.values()):
        return None
    models.sort()
    figure, axes = bound_chart(
        [(b, e) for b, e, _ in models], "whole models, plain, by ratio",
        {f"groups of weights at ratio {PLAIN_RATIO}, {k}": v for k, v in trials.items()},
        "bits per weight, over all compressed tensors",
    )  # fmt: skip
    solid = [(b, e) for b, e, _ in models] + [p for trial in trials.values() for p in trial]
    place(figure, axes, [Name(name, b, e, bold=True) for b, e, name in models], solid)
    text = "; ".join(f"ratio {name}: {b:.2f} bits, error {e:.3g}" for b, e, name in models)
    return Plot(
        f"{QUALITY_PLOT}weight-error", "Without calibration: weight error against bits per weight",
        "The dashed line is the least error that any code can reach on independent Gaussian values. Dense is 32 "
        "bits, error 0.",
        f"Scatter chart, error on a log scale. {text}.", figure,
        values=[
            *(PointValue(axes, b, e, f"ratio {name}: {b:.3g} bits, error {e:.3g}") for b, e, name in models),
            *(
                PointValue(axes, b, e, f"a group of weights, {label}: {b:.3g} bits, error {e:.3g}")
                for label, trial in trials.items()
                for b, e in trial
            ),
        ],
    )  # fmt: skip


PLOTS: tuple[Callable[[Results], Plot | None], ...] = (linear_loss, file_loss, file_recall, weight_error)

"""The plots of quality per byte, drawn from rows alone. Every one shows the dense model.

Each tool has its colour and its sign in all of them. Names stand beside our points and beside those peers that no
other peer beats at its bytes; the tables name all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from . import page, plot
from .bench import Results
from .page import QUALITY_PLOT
from .plot import BLUE, BROAD, GREY, INK, PAPER, SKY, VERMILLION, Plot
from .tradeoff import CALIBRATED, DENSE, LINEAR, PLAIN, PLAIN_RATIO, PLAIN_WHOLE, WHOLE
from .tradeoff_points import Point, basis_trials, measured_tools, of_tool, peers, point, points

#: colours of Okabe and Ito, and signs: either is enough to tell tools apart
SIGNS = (
    (VERMILLION, "s"), ("#009e73", "^"), ("#e69f00", "D"), ("#cc79a7", "v"), (INK, "x"), ("#7a6a00", "P"),
    (GREY, "*"),
)  # fmt: skip
FLOOR = 1e-6  # of 1 - cosine: below is float32's rounding, and is drawn at the edge
CLOSE = 0.01  # 1 - cosine of what is very close to dense
#: where a name is tried, nearest first: distances from its point in points, and directions
DISTANCES = (7.0, 12.0, 20.0, 28.0, 38.0, 50.0)
DIRECTIONS = tuple(np.deg2rad((45, 135, 0, 180, 90, 270, 315, 225, 22, 158, 68, 112, 338, 202, 292, 248)))
FAR = 15.0  # from here on a line joins name and point
#: what names of settings are shortened to in a plot
SHORT = (
    (r"groups of (\d+)", r"g\1"),
    (r"blocks of (\d+)", r"b\1"),
    (" bits,", " bits"),
    (r" \+ words", " +w"),
)
ABBREVIATIONS = "g64, b64: groups, blocks of 64; +w: the word table too."


Box = NDArray[np.float64]  # (4,): left, bottom, right, top, in pixels
Points = NDArray[np.float64]  # (n, 2), or boxes (n, 4)


@dataclass(frozen=True)
class Name:
    """A name and the point that it belongs to, in data coordinates."""

    words: str
    x: float
    y: float
    bold: bool = False


def place(figure: Figure, axes: Any, names: Sequence[Name], obstacles: Iterable[tuple[float, float]]) -> None:
    """Write names beside their points, where they cover no point, no legend and no other name.

    A name that has no such place covers points rather than names; one that could only cover names is left out.

    obstacles : points that names keep off, in data coordinates
    """
    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()  # settles the layout
    renderer = canvas.get_renderer()
    pixel = figure.dpi / 72
    solid = _dots(axes.transData.transform(np.array([*obstacles]).reshape(-1, 2)), 3.5 * pixel)
    legend = axes.get_legend()
    written = np.empty((0, 4)) if legend is None else legend.get_window_extent(renderer).extents[None]
    inside = axes.get_window_extent(renderer).extents
    for name in names:
        text = axes.annotate(
            name.words, (name.x, name.y), xytext=(0, 0), textcoords="offset points", fontsize=8.5, zorder=1.9,
            fontweight="bold" if name.bold else "normal",
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.4},
        )  # fmt: skip
        text.set_in_layout(False)
        size = text.get_window_extent(renderer)
        at = axes.transData.transform((name.x, name.y))
        best: tuple[int, float, Box] | None = None
        for distance in DISTANCES:
            for angle in DIRECTIONS:
                shift = distance * pixel * np.array((np.cos(angle), np.sin(angle)))
                box = _box(at + shift, shift, size.width, size.height)
                line = _leader(at, box) if distance >= FAR else np.empty((0, 2))
                if not _within(box, inside) or _hits(box, line, written).any():
                    continue
                covered = int(_hits(box, line[4:], solid).sum())
                if best is None or (covered, distance) < best[:2]:
                    best = (covered, distance, box)
            if best is not None and best[0] == 0:
                break
        if best is None:
            text.remove()
            continue
        _, distance, box = best
        written = np.vstack((written, box))
        text.set_position(((box[0] - size.x0) / pixel, (box[1] - size.y0) / pixel))
        if distance >= FAR:
            line = _leader(at, box)
            solid = np.vstack((solid, _dots(line, pixel)))
            ends = axes.transData.inverted().transform(line[[0, -1]])
            (drawn,) = axes.plot(*ends.T, color=GREY, linewidth=0.8, zorder=1.8, scalex=False, scaley=False)
            drawn.set_in_layout(False)


def _dots(at: Points, half: float) -> Points:
    """Squares around points, (n, 4)."""
    return np.hstack((at - half, at + half))


def _leader(at: Any, box: Box) -> Points:
    """Points of the line from a point to the nearest one of a box, (n, 2)."""
    found: Points = np.linspace(at, np.clip(at, box[:2], box[2:]), 12)
    return found


def _hits(box: Box, line: Points, others: Points) -> NDArray[np.bool_]:
    """Which of the other boxes (n, 4) a box overlaps, or a line's points lie in."""
    over = (box[:2] <= others[:, 2:]).all(axis=1) & (others[:, :2] <= box[2:]).all(axis=1)
    inside = ((others[:, None, :2] <= line) & (line <= others[:, None, 2:])).all(axis=2)
    return np.asarray(over | np.any(inside, axis=1), bool)


def _box(corner: Any, shift: Any, width: float, height: float) -> Box:
    """Where a text of that size lies when the edge or corner that is nearest to its point is at `corner`."""
    size = np.array((width, height))
    low = corner - np.where(shift > 1, 0.0, np.where(shift < -1, size, size / 2))
    return np.concatenate((low, low + size))


def _within(box: Box, outer: Box) -> bool:
    return bool((box[:2] >= outer[:2]).all() and (box[2:] <= outer[2:]).all())


def frontier(found: Sequence[Point], value: Callable[[Point], float | None]) -> list[Point]:
    """Those that no other with as few bytes is as good as; `value` is better when it is less."""
    best, kept = np.inf, []
    for p in sorted(found, key=lambda p: (p.bytes, np.inf if value(p) is None else value(p))):
        v = value(p)
        if v is not None and v < best:
            best = v
            kept.append(p)
    return kept


# --- one chart of points --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chart:
    """What the axes of a chart show: x of a point, y of a point, and its name where it is ours."""

    x: Callable[[Point], float | None]
    y: Callable[[Point], float | None]
    name: Callable[[Point], str]
    worth_naming: Callable[[Point], bool]


def short(setting: str) -> str:
    """A setting's name for a plot."""
    for pattern, replacement in SHORT:
        setting = re.sub(pattern, replacement, setting)
    return setting


def _usable(p: Point) -> bool:
    """Whether a peer's quality is not gone."""
    return p.cosine is not None and page.verdict(p.cosine).level != "gone"


def _clipped(loss: float | None) -> float | None:
    return None if loss is None else max(loss, FLOOR)


def _bits_name(p: Point) -> str:
    """ "3.25 bits" as they were asked for."""
    return p.provider.removeprefix(CALIBRATED).strip()


def _ours_name(p: Point) -> str:
    """ "8×" of a ratio."""
    return p.provider.rsplit(" ", 1)[-1] + "×"


def _draw(
    axes: Any,
    results: Results,
    found: Sequence[Point],
    chart: _Chart,
    better: Callable[[Point], float | None],
) -> tuple[list[Name], list[tuple[float, float]]]:
    """Our curves and every peer's points. Returns the names to write, and all that they must keep off."""
    names: list[Name] = []
    solid: list[tuple[float, float]] = []
    series = [
        (of_tool(found, CALIBRATED), "rbe_gpu, calibrated", {"color": BLUE, "marker": "o", "zorder": 3}),
        (of_tool(found, PLAIN), "rbe_gpu, plain",
         {"color": SKY, "marker": "o", "markerfacecolor": PAPER, "zorder": 2.5}),
    ]  # fmt: skip
    for ours, label, style in series:
        at = [(x, y, p) for p in ours if (x := chart.x(p)) is not None and (y := chart.y(p)) is not None]
        if at:
            xs, ys = [x for x, _, _ in at], [y for _, y, _ in at]
            axes.plot(xs, ys, markersize=6.5, label=label, **style)
            solid += _along(xs, ys)
            # a plain file has the bytes of the calibrated one of its ratio: one name serves both
            known = {name.words for name in names}
            names += [Name(chart.name(p), x, y, bold=True) for x, y, p in at if chart.name(p) not in known]
    others = peers(found)
    for i, tool in enumerate(measured_tools(results)):
        colour, marker = SIGNS[i % len(SIGNS)]
        at = [
            (x, y, p) for p in others
            if p.tool == tool and (x := chart.x(p)) is not None and (y := chart.y(p)) is not None
        ]  # fmt: skip
        if at:
            axes.plot([x for x, _, _ in at], [y for _, y, _ in at], marker, color=colour, markersize=5.5,
                      linestyle="none", label=tool, zorder=2, clip_on=False)  # fmt: skip
            solid += [(x, y) for x, y, _ in at]
    for p in frontier(others, better):
        x, y = chart.x(p), chart.y(p)
        if x is not None and y is not None and chart.worth_naming(p):
            names.append(Name(short(p.setting), x, y))
    return names, solid


def _along(xs: Sequence[float], ys: Sequence[float], steps: int = 12) -> list[tuple[float, float]]:
    """Points along a curve, close enough that no name slips between them (log axes: steps of equal ratio)."""
    if len(xs) < 2:
        return list(zip(xs, ys, strict=True))
    t = np.linspace(0, len(xs) - 1, steps * (len(xs) - 1) + 1)
    whole = np.arange(len(xs))
    x = np.exp(np.interp(t, whole, np.log(xs)))
    y = np.interp(t, whole, ys) if min(ys) <= 0 else np.exp(np.interp(t, whole, np.log(ys)))
    return list(zip(x.tolist(), y.tolist(), strict=True))


def _loss_axis(axes: Any, losses: Sequence[float]) -> None:
    """The y axis of 1 - cosine, and a line where vectors are very close to the dense model's."""
    low = max(FLOOR, min(losses) / 3)
    axes.set_yscale("log")
    axes.set_ylim(low, 2.0)
    plot.log_axis(axes.yaxis, [t for t in 10.0 ** np.arange(-6, 1) if t >= low], lambda v: f"{v:g}")
    axes.axhline(CLOSE, color=GREY, linestyle=":", linewidth=1.4, zorder=1)
    axes.set_ylabel("1 − mean cosine to dense (log scale, lower is nearer)")


def _legend(axes: Any) -> None:
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5, columnspacing=1.4, handletextpad=0.5)


def _dense_at_edge(axes: Any, x: float, words: str) -> Name:
    """The dense model has 1 - cosine = 0, which a log axis cannot show: it stands on the lower edge."""
    low = axes.get_ylim()[0]
    axes.plot(x, low, "D", color=INK, markersize=8, clip_on=False, zorder=5)
    return Name(words, x, low, bold=True)


def _said(found: Sequence[Point], y: Callable[[Point], float | None]) -> str:
    return "; ".join(
        f"{p.provider}: {p.bytes / 1e6:.2f} MB, {v:.4g}" for p in found if (v := y(p)) is not None
    )


def linear_loss(results: Results) -> Plot | None:
    """(a) 1 - cosine against bits per weight, the linear layers alone."""
    found = [p for p in points(results, LINEAR) if p.bits is not None and p.loss is not None]
    if not found:
        return None
    figure, axes = plot.figure_of(5.4, BROAD)
    chart = _Chart(lambda p: p.bits, lambda p: _clipped(p.loss), _bits_name, _usable)
    names, solid = _draw(axes, results, found, chart, lambda p: p.loss)
    axes.set_xscale("log")
    axes.set_xlim(min(p.bits or 1 for p in found) / 1.15, 40)
    ticks = [t for t in (0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32) if t >= axes.get_xlim()[0]]
    plot.log_axis(axes.xaxis, ticks, lambda v: f"{v:g}")
    _loss_axis(axes, [_clipped(p.loss) or 1 for p in found])
    names.insert(0, _dense_at_edge(axes, 32, "dense: 0"))
    axes.set_xlabel("bits per weight of the linear layers, scales and tables of codes counted (log scale)")
    _legend(axes)
    place(figure, axes, names, solid)
    return Plot(
        f"{QUALITY_PLOT}linear", "Linear layers alone: loss against bits per weight",
        "Only the weights of the linear layers are quantised; all else is dense. Lower left is better. The dotted "
        "line is a mean cosine of 0.99. Names stand beside the peers that no other peer beats at its bits, where "
        f"quality is not gone. {ABBREVIATIONS}",
        f"Scatter chart, both axes logarithmic, of bytes and 1 - cosine. {_said(found, lambda p: p.loss)}.",
        figure, broad=True,
    )  # fmt: skip


def _file_axis(axes: Any, found: Sequence[Point], dense: float | None) -> None:
    sizes = [p.bytes / 1e6 for p in found] + ([] if dense is None else [dense / 1e6])
    axes.set_xscale("log")
    axes.set_xlim(min(sizes) / 1.2, max(sizes) * 1.25)
    low, high = axes.get_xlim()
    ticks = (0.1, 0.2, 0.5, 1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 60, 90, 150, 300)
    plot.log_axis(axes.xaxis, [t for t in ticks if low <= t <= high], lambda v: f"{v:g}")
    axes.set_xlabel("file size in MB, all bytes counted (log scale)")


def file_loss(results: Results) -> Plot | None:
    """(b) 1 - cosine against the size of the file."""
    found = [p for p in points(results, WHOLE) if p.loss is not None and p.provider != DENSE]
    dense = point(results, WHOLE, DENSE)
    if not found or dense is None:
        return None
    figure, axes = plot.figure_of(5.4, BROAD)
    chart = _Chart(lambda p: p.bytes / 1e6, lambda p: _clipped(p.loss), _ours_name, _usable)
    names, solid = _draw(axes, results, found, chart, lambda p: p.loss)
    _file_axis(axes, found, dense.bytes)
    _loss_axis(axes, [_clipped(p.loss) or 1 for p in found])
    names.insert(0, _dense_at_edge(axes, dense.bytes / 1e6, "dense: 0"))
    _legend(axes)
    place(figure, axes, names, solid)
    return Plot(
        f"{QUALITY_PLOT}file-loss", "Whole files: loss against size",
        "Lower left is better. The dotted line is a mean cosine of 0.99. Our points are named by their ratio. "
        f"{ABBREVIATIONS}",
        f"Scatter chart, both axes logarithmic, of bytes and 1 - cosine. {_said(found, lambda p: p.loss)}.",
        figure, broad=True,
    )  # fmt: skip


def file_recall(results: Results) -> Plot | None:
    """(c) recall@10 against the size of the file, with the dense model's."""
    found = [p for p in points(results, WHOLE) if p.recall_10 is not None and p.provider != DENSE]
    dense = point(results, WHOLE, DENSE)
    if not found or dense is None or dense.recall_10 is None:
        return None
    figure, axes = plot.figure_of(5.4, BROAD)
    chart = _Chart(lambda p: p.bytes / 1e6, lambda p: p.recall_10, _ours_name, _usable)
    names, solid = _draw(axes, results, found, chart, lambda p: None if p.recall_10 is None else -p.recall_10)
    axes.axhline(dense.recall_10, color=INK, linestyle="--", linewidth=1.2, zorder=1)
    axes.plot(dense.bytes / 1e6, dense.recall_10, "D", color=INK, markersize=8, zorder=5)
    names.insert(0, Name("dense", dense.bytes / 1e6, dense.recall_10, bold=True))
    _file_axis(axes, found, dense.bytes)
    low, high = axes.get_xlim()
    solid += [(x, dense.recall_10) for x in np.geomspace(low, high, 80).tolist()]
    top = max(dense.recall_10, *(p.recall_10 or 0 for p in found))
    axes.set_ylim(min(0.0, *(p.recall_10 or 0 for p in found)) - 0.02, min(1.02, top * 1.12))
    axes.set_ylabel("recall@10 (higher is better)")
    _legend(axes)
    place(figure, axes, names, solid)
    return Plot(
        f"{QUALITY_PLOT}file-recall", "Whole files: recall@10 against size",
        f"Upper left is better. The dashed line is the dense model. {ABBREVIATIONS}",
        f"Scatter chart of bytes (log scale) and recall@10; the dense model has {dense.recall_10:.4g}. "
        f"{_said(found, lambda p: p.recall_10)}.",
        figure, broad=True,
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
    figure, axes = plot.bound_chart(
        [(b, e) for b, e, _ in models], "whole models, plain, by ratio",
        {f"groups of weights at ratio {PLAIN_RATIO}, {k}": v for k, v in trials.items()},
        "bits per weight, over all compressed tensors",
    )  # fmt: skip
    solid = [(b, e) for b, e, _ in models] + [p for found in trials.values() for p in found]
    place(figure, axes, [Name(name, b, e, bold=True) for b, e, name in models], solid)
    said = "; ".join(f"ratio {name}: {b:.2f} bits, error {e:.3g}" for b, e, name in models)
    return Plot(
        f"{QUALITY_PLOT}weight-error", "Without calibration: weight error against bits per weight",
        "The dashed line is the least error that any code can reach on independent Gaussian values. Dense is 32 "
        "bits, error 0.",
        f"Scatter chart, error on a log scale. {said}.", figure,
    )  # fmt: skip


PLOTS: tuple[Callable[[Results], Plot | None], ...] = (linear_loss, file_loss, file_recall, weight_error)


def draw(results: Results) -> list[Plot]:
    """Every plot whose rows are there."""
    with matplotlib.rc_context(plot.STYLE):
        return [drawn for make in PLOTS if (drawn := make(results)) is not None]

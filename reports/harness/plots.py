"""Plots: one style, the pieces that several plots share, and placing of labels.

Plots are drawn from rows alone, and every plot shows the dense baseline, also where it wins.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from rbe_gpu import output

from .rows import Results, Row

#: Okabe and Ito's palette, distinguishable with every common colour blindness
BLUE, SKY, VERMILLION, GREEN, GREY = "#0072b2", "#56b4e9", "#d55e00", "#009e73", "#8c9199"
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
    "svg.fonttype": "none",  # text of the page's own font: a quarter of the bytes, and a reader can search it
    "svg.hashsalt": "rbe-gpu",
    "figure.constrained_layout.use": True,
}
NARROW, BROAD = 6.4, 8.8  # inches; 72 SVG units each
#: a drawing as wide as a page of 1240 pixels, and one for a phone, whose text is as large on a screen of 390
WIDE, PHONE = 12.4, 4.9
PHONE_ROWS = 1.5  # height of a row whose label stands above it
#: the width that every new figure gets instead of its own, and whether labels of rows stand above them
_width: ContextVar[float | None] = ContextVar("width", default=None)


class Value(NamedTuple):
    """A point of a figure, in data coordinates of `axes`, and what it says when it is pointed at."""

    axes: Any
    x: float
    y: float
    words: str


@dataclass(frozen=True)
class Plot:
    """A drawn figure.

    Attributes
    ----------
    alt : says in words what it shows, for those who do not see it
    broad : whether it is as wide as the page
    values : what points say when they are pointed at
    phone : the same plot for narrow screens; None: there is one drawing for all
    of_phone : whether it is one for narrow screens
    """

    name: str
    title: str
    caption: str
    alt: str
    figure: Figure
    broad: bool = False
    values: Sequence[Value] = ()
    phone: Plot | None = None
    of_phone: bool = False

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
        text = _smaller(text)
        for colour, variable in ((INK, "currentColor"), (GRID, "var(--grid)"), (PAPER, "var(--card)")):
            text = text.replace(colour, variable)
        return text.strip().removesuffix("</svg>") + self._targets() + "</svg>"

    def _targets(self) -> str:
        """Circles over the points with values: a browser shows their titles, and the page's script better ones."""
        if not self.values:
            return ""
        dpi, height = self.figure.dpi, self.figure.get_figheight() * 72
        circles = []
        for value in self.values:
            x, y = value.axes.transData.transform((value.x, value.y)) * 72 / dpi
            # the script takes the words of a phone's drawing from the wide one: a finger does not show titles
            title = "" if self.of_phone else f"<title>{escape(value.words)}</title>"
            circles.append(f'<circle cx="{x:.1f}" cy="{height - y:.1f}" r="7">{title}</circle>')
        return f'<g class="values">{"".join(circles)}</g>'

    def png(self, path: Path) -> None:
        """A picture on white."""
        with matplotlib.rc_context(STYLE), output.replacing(path) as file:
            self.figure.savefig(file, format="png", dpi=160, facecolor="white")


def _rounded(attribute: re.Match[str]) -> str:
    return re.sub(r"(\d+\.\d\d)\d+", r"\1", attribute[0])


_GRID_LINE = "fill: none; stroke: var(--grid); stroke-width: 0.8; stroke-linecap: square"


def _smaller(svg: str) -> str:
    """A drawing of matplotlib's without what a page does not need: half of the bytes."""
    svg = re.sub(
        r'(<(?:g|path)\b[^>]*?) id="(?![^"]*-m[0-9a-f]{8,}")[^"]*"', r"\1", svg
    )  # markers are referred to
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)  # the page's own
    svg = re.sub(r"(font: [^;\"]*px) [^;\"]*;", r"\1 sans-serif;", svg)
    svg = re.sub(r' transform="rotate\(-0 [^)]*\)"', "", svg)
    svg = svg.replace(f'style="{_GRID_LINE}"', 'class="grid"')
    svg = re.sub(r' (?:d|x|y|points|transform)="[^"]*"', _rounded, svg)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    svg = re.sub(r"> <", "><", svg)
    while (flat := re.sub(r"<g>((?:(?!</?g\b).)*)</g>", r"\1", svg)) != svg:  # groups without a style
        svg = flat
    return svg


def draw(plots: Iterable[Callable[[Results], Plot | None]], results: Results) -> list[Plot]:
    """Every plot whose rows are there."""
    with matplotlib.rc_context(STYLE):
        return [plot for make in plots if (plot := make(results)) is not None]


def draw_for_screens(plots: Iterable[Callable[[Results], Plot | None]], results: Results) -> list[Plot]:
    """Every plot whose rows are there, as wide as the page, and once more for a phone."""
    plots = list(plots)
    with _drawn_at(WIDE):
        wide = draw(plots, results)
    with _drawn_at(PHONE):
        narrow = draw(plots, results)
    return [
        replace(plot, broad=True, phone=replace(phone, name=f"{phone.name}-phone", of_phone=True))
        for plot, phone in zip(wide, narrow, strict=True)
    ]


@contextmanager
def _drawn_at(width: float) -> Iterator[None]:
    token = _width.set(width)
    try:
        yield
    finally:
        _width.reset(token)


def on_phone() -> bool:
    """Whether figures are drawn for a phone."""
    return _width.get() == PHONE


# --- pieces -----------------------------------------------------------------------------------------------


def new_figure(
    height: float, width: float = NARROW, panels: int = 0, stacked: bool = False
) -> tuple[Figure, Any]:
    """A figure and its axes; of several panels the list of their axes. They lie beside each other and share y, or are
    stacked and share x. On a phone panels are always stacked.
    """
    width = _width.get() or width
    if panels and not stacked and on_phone():
        figure = Figure(figsize=(width, height * panels), layout="constrained")
        return figure, figure.subplots(panels, 1, sharey=True, squeeze=False)[:, 0]
    figure = Figure(figsize=(width, height), layout="constrained")
    if panels and stacked:
        return figure, figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    if panels:
        return figure, figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    return figure, figure.subplots()


def number(value: float) -> str:
    """1, 0.5, 0.001."""
    return f"{value:g}"


def ratio(value: float) -> str:
    """A number of times: 2×."""
    return f"{value:g}×"


def shape_label(label: str) -> str:
    """768x768 as 768 × 768."""
    return re.sub(r"(\d) ?x ?(\d)", r"\1 × \2", label)


def spread(rows: Sequence[Row], scale: float = 1.0) -> Any:
    """Distances of p20 and p80 from the median, (2, rows), for error bars."""
    return scale * np.array([[r.p50 - r.p20 for r in rows], [r.p80 - r.p50 for r in rows]])


def log_axis(axis: Any, ticks: Sequence[float], label: Callable[[float], str] = number) -> None:
    """A log axis with exactly these ticks."""
    axis.set_major_locator(LogLocator(subs=(1.0,)))
    axis.set_ticks(list(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda v, _: label(v)))


def fences(values: Sequence[float]) -> tuple[float, float]:
    """Limits of a log axis that shows most of the positive values: those within three times the interquartile range.

    The range is at least a factor of 2 on both sides of the quartiles, so that values that lie close together have no
    outliers.
    """
    logs = np.log10(values)
    low, high = np.percentile(logs, (25, 75))
    reach = max(3 * (high - low), float(np.log10(2)))
    inside = logs[(logs >= low - reach) & (logs <= high + reach)]
    return float(10 ** inside.min()), float(10 ** inside.max())


def ratio_axis(axes: Any, values: Sequence[float], room: float, label: str) -> tuple[float, float]:
    """A log x axis of speedups, with a line at 1 and space for `room` times the least value on the left.

    Returns its limits. Outliers are outside of them (`fences`): `outliers` writes their values at the edge.
    """
    axes.axvline(1.0, color=INK, linewidth=1.4, zorder=1.9)  # below the points
    least, most = fences(values)
    low, high = min(0.5, least) / room, max(2.0, most) * 1.25
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    steps = (1,) if high / low > 300 else (1, 2, 5)  # as many labels as there is room for
    log_axis(axes.xaxis, [t for e in range(-4, 5) for s in steps if low <= (t := s * 10.0**e) <= high], ratio)
    axes.set_xlabel(fill(label, 50) if on_phone() else label)
    return low, high


def outliers(axes: Any, points: Iterable[tuple[float, float]], colour: str) -> list[tuple[float, float]]:
    """Mark the points (x, y) beyond the limits of the x axis by arrows at its edge, with their values.

    Returns the points, those that are marked at the place of their arrow.
    """
    low, high = axes.get_xlim()
    places = []
    for x, y in points:
        if low <= x <= high:
            places.append((x, y))
            continue
        left = x < low
        edge = low * (high / low) ** (0.008 if left else 0.992)
        axes.plot(edge, y, "<" if left else ">", color=colour, markersize=7, clip_on=False, zorder=4)
        axes.annotate(
            f"{x:.2g}×", (edge, y), xytext=(7 if left else -7, 0), textcoords="offset points", fontsize=8.5,
            ha="left" if left else "right", va="center", zorder=4,
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip
        places.append((edge, y))
    return places


def label_rows(axes: Any, labels: Sequence[str], above: float = 0.36) -> None:
    """Name the rows of a chart from the top down; on a phone in the chart, `above` the middle of each row."""
    axes.set_yticks(range(len(labels)), [] if on_phone() else labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    if not on_phone():
        return
    figure = axes.get_figure()
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + (PHONE_ROWS - 1) * 0.27 * len(labels))
    axes.set_ylim(len(labels) - 0.5, -0.9)
    for y, label in enumerate(labels):
        axes.annotate(
            label, (0, y - above), xycoords=("axes fraction", "data"), xytext=(1, 0), textcoords="offset points",
            va="bottom", fontsize=8.8, zorder=3, bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.3},
        )  # fmt: skip


def bar_height(height: float) -> float:
    """Of a bar whose label may stand above it."""
    return 0.5 if on_phone() else height


def bars(axes: Any, bars: Sequence[tuple[str, float, str]], height: float = 0.66) -> None:
    """Horizontal bars of MB with their values, from (label, MB, colour)."""
    labels, values, colours = zip(*bars, strict=True)
    axes.barh(range(len(bars)), values, bar_height(height), color=colours)
    for y, v in enumerate(values):
        axes.annotate(
            f"{v:.1f} MB", (v, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9
        )
    label_rows(axes, labels, 0.27)
    axes.grid(axis="y", visible=False)


def legend_above(axes: Any, ncols: int = 2, **style: Any) -> None:
    """The legend above the axes."""
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=ncols, **style)


#: (bits per weight, relative error) of some weights
Errors = Sequence[tuple[float, float]]


def bound_chart(models: Errors, label: str, others: Mapping[str, Errors], x: str) -> tuple[Figure, Any]:
    """Axes of weight error against bits per weight, with Shannon's bound for Gaussian values, D = 2^(-2R).

    models : the points that matter most, called `label`
    others : name -> further points; at most three
    x : what the x axis says
    """
    figure, axes = new_figure(4.2)
    every = [*models, *(p for points in others.values() for p in points)]
    right = max(b for b, _ in models or every) * 1.08
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
    axes.set_ylim(min(e for _, e in models or every) / 3, 1.5)
    log_axis(axes.yaxis, [t for t in (1e-4, 1e-3, 1e-2, 1e-1, 1) if t > axes.get_ylim()[0]])
    axes.set_xlabel(x)
    axes.set_ylabel("weight error, ||W − W′|| / ||W|| (log scale)")
    axes.legend(loc="upper right")
    return figure, axes


# --- labels beside points ---------------------------------------------------------------------------------

#: where a name is tried, nearest first: distances from its point in points, and directions
DISTANCES = (7.0, 12.0, 20.0, 28.0, 38.0, 50.0)
DIRECTIONS = tuple(np.deg2rad((45, 135, 0, 180, 90, 270, 315, 225, 22, 158, 68, 112, 338, 202, 292, 248)))
FAR = 15.0  # from here on a line joins name and point

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
    line: Points = np.linspace(at, np.clip(at, box[:2], box[2:]), 12)
    return line


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

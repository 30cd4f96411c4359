"""The two plots: quality against the bytes of a file, and against its speed; cosine above, recall below."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ...harness.page import CHOICE_PLOT
from ...harness.plots import BROAD, INK, Name, Plot, legend_above, log_axis, new_figure, place
from ...harness.rows import Results
from ..measure import DENSE, WHOLE
from ..plots import (
    FILE_LOSS,
    FILE_RECALL,
    FLOOR,
    Chart,
    Value,
    draw_points,
    file_axis,
    file_megabytes,
    least_loss,
    listing,
    loss_axis,
    x_axis,
)
from ..points import Point, baselines, point, points
from .measure import BATCHES, OP

SPEED_TICKS = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))


def file_name(p: Point) -> str:
    """The name of one of our files: "minilm-r16" of "rbe_gpu distilled minilm-r16"."""
    return p.provider.split(" ", 2)[-1]


def _figure(
    results: Results,
    shown: Sequence[Point],
    dense: Point,
    x: Callable[[Point], float],
    set_x: Callable[[Any], None],
    *,
    joined: bool = False,
    named: Callable[[Point], bool] = lambda _: True,
) -> Any:
    """A figure of the points and the dense model, which all have an `x`; `set_x` makes the axis of it.

    joined : lines join our points of a kind
    named : whether a point of another tool gets a name
    """
    figure, (above, below) = new_figure(8.4, BROAD, panels=2, stacked=True)
    low = least_loss([p for p in shown if p.loss is not None and not _is_dense(p)])

    def loss(p: Point) -> float | None:
        # what differs from dense by rounding alone stands on the lower edge, as dense does
        return None if p.loss is None else max(p.loss, low)

    cosine = Chart(x, loss, FILE_LOSS.cost, file_name, joined)
    recall = replace(cosine, y=FILE_RECALL.y, cost=FILE_RECALL.cost)
    others = [p for p in baselines(shown) if named(p)]
    names, solid = draw_points(above, results, shown, cosine, others)
    more, lower = draw_points(below, results, shown, recall, others)
    names.insert(0, loss_axis(above, low, x(dense)))
    top = min(2.0, 4 * max((p.loss or low for p in shown), default=1.0))
    above.set_ylim(top=top)
    steps = (1,) if top / low > 1000 else (1, 2, 5)
    log_axis(above.yaxis, [t for e in range(-6, 1) for m in steps if low <= (t := m * 10.0**e) <= top])
    above.set_ylabel("1 − mean cosine (log scale)")
    set_x(below)
    below.set_ylabel("recall@10 (higher is better)")
    if dense.recall_at_10 is not None:
        below.axhline(dense.recall_at_10, color=INK, linestyle="--", linewidth=1.2, zorder=1)
        below.plot(x(dense), dense.recall_at_10, "D", color=INK, markersize=8, zorder=5)
        more.insert(0, Name("dense", x(dense), dense.recall_at_10, bold=True))
    below.margins(y=0.18)
    # a tool may have points in one of the two alone
    legend = {
        label: h
        for axes in (below, above)
        for h, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    legend_above(
        above, ncols=5, columnspacing=1.4, handletextpad=0.5, labels=[*legend], handles=[*legend.values()]
    )
    place(figure, above, names, solid)
    place(figure, below, more, lower)
    return figure


def _is_dense(p: Point) -> bool:
    """Whether its vectors are those of the dense model, but for rounding."""
    return p.loss is not None and p.loss <= FLOOR


def _shown(results: Results, x: Value) -> tuple[list[Point], Point | None]:
    """The points of all files and of the dense model that have an `x`."""
    dense = point(results, WHOLE, DENSE)
    every = [p for p in points(results, WHOLE) if p.provider != DENSE and x(p) is not None]
    return every, None if dense is None or x(dense) is None else dense


def against_bytes(results: Results) -> Plot | None:
    """Quality against the size of the file."""
    shown, dense = _shown(results, file_megabytes)
    if not shown or dense is None:
        return None
    figure = _figure(
        results, shown, dense, file_megabytes, lambda axes: file_axis(axes, shown, dense), joined=True,
        named=lambda p: not _is_dense(p),
    )  # fmt: skip
    return Plot(
        f"{CHOICE_PLOT}bytes", "Quality against size",
        "Above: 1 − mean cosine, lower left is better; the dotted line is a mean cosine of 0.99. Below: recall@10, "
        "upper left is better; the dashed line is the dense model, which covers its other float32 forms. “+w”: the "
        "word table is quantised too.",
        "Two scatter charts over bytes (log scale), of 1 - cosine (log scale) and of recall@10. Of 1 - cosine: "
        f"{listing(shown, lambda p: p.loss)}. Of recall@10: {listing(shown, lambda p: p.recall_at_10)}.",
        figure, broad=True,
    )  # fmt: skip


def against_speed(results: Results) -> Plot | None:
    """Quality against sentences per second, of all that run with kernels of their own."""

    def speed(p: Point) -> float | None:
        return results.value(OP, BATCHES, p.provider, "sentences_per_second")

    shown, dense = _shown(results, speed)
    if not shown or dense is None:
        return None
    speeds = {p.provider: s for p in (*shown, dense) if (s := speed(p)) is not None}

    def set_x(axes: Any) -> None:
        label = f"sentences per second in {BATCHES} (log scale, higher is better)"
        x_axis(axes, min(speeds.values()) / 1.3, max(speeds.values()) * 1.4, SPEED_TICKS, label)

    figure = _figure(results, shown, dense, lambda p: speeds[p.provider], set_x)
    listed = "; ".join(f"{name}: {value:.0f} per second" for name, value in speeds.items())
    return Plot(
        f"{CHOICE_PLOT}speed", "Quality against speed",
        "As above; right is faster. Tools whose kernels do not run here are left out.",
        "Two scatter charts over sentences per second (log scale), of 1 - cosine (log scale) and of recall@10. "
        f"{listed}.",
        figure, broad=True,
    )  # fmt: skip


PLOTS: tuple[Callable[[Results], Plot | None], ...] = (against_bytes, against_speed)

"""The plots of the machine: its roof and where the ops are below it, its cores and memory while the encoder runs, and
what time a cache of decoded panels saves for its memory.
"""

from __future__ import annotations

from collections.abc import Callable
from textwrap import fill

import numpy as np

from ..harness.measure import NUMPY, ONNX, OURS, TORCH
from ..harness.plots import (
    BLUE,
    BROAD,
    GREEN,
    GREY,
    INK,
    SKY,
    VERMILLION,
    Plot,
    Value,
    bars,
    legend_above,
    log_axis,
    new_figure,
    on_phone,
    shape_label,
    spread,
)
from ..harness.row_names import DENSE, PEAK
from ..harness.rows import Results
from ..harness.text import megabytes, seconds
from . import panel_cache, roofline, utilisation
from .costs import MOVED, operations

#: groups of ops that get a colour and a marker of their own
_STYLES = (
    ("linear", BLUE, "o", ("linear",)),
    ("attention", VERMILLION, "v", ("attention",)),
    ("norms and softmax", GREEN, "D", ("layer_norm", "rms_norm", "softmax", "l2_normalize", "mean_pool")),
    ("elementwise", SKY, "s", ("add", "gelu", "silu", "swiglu", "dropout", "rope")),
)


def roof(results: Results) -> Plot | None:
    """Operations per second against operations per byte, below the measured limits."""
    copy = results.value(roofline.OP, roofline.COPY, NUMPY, roofline.BANDWIDTH)
    peak = results.value(roofline.OP, roofline.FLOAT32, NUMPY, roofline.RATE)
    int8 = results.value(roofline.OP, roofline.INT8, OURS, roofline.RATE)
    points = []
    for group, colour, marker, ops in _STYLES:
        for op in ops:
            for case in results.cases(op):
                time, moved = (results.one(op, case, DENSE, metric) for metric in ("time", MOVED))
                work = None if time is None else operations(op, time.shape, case)
                if time is not None and moved is not None and work and moved.p50 and time.p50:
                    points.append(
                        (group, colour, marker, op, case, work / moved.p50, work / time.p50, time.p50)
                    )
    if copy is None or peak is None or not points:
        return None
    figure, axes = new_figure(4.4, BROAD)
    intensities = [p[5] for p in points]
    rates = [p[6] for p in points]
    low, high = min(*intensities, peak / copy) / 2, max(*intensities, peak / copy) * 2
    x = np.geomspace(low, high, 200)
    axes.plot(
        x,
        np.minimum(copy * x, peak) / 1e9,
        color=INK,
        linewidth=1.6,
        label="limit, float32",
    )
    if int8 is not None:
        axes.plot(x, np.minimum(copy * x, int8) / 1e9, "--", color=GREY, linewidth=1.3, label="limit, int8")
    for group, colour, marker, _ in _STYLES:
        own = [(p[5], p[6] / 1e9) for p in points if p[0] == group]
        if own:
            axes.plot(
                *zip(*own, strict=True), marker, color=colour, markersize=6.5, linestyle="none", label=group
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    bottom, top = min(rates) / 2e9, max(*rates, peak, int8 or 0) * 2 / 1e9
    axes.set_ylim(bottom, top)
    ticks = [10.0**e for e in range(-4, 6)]
    log_axis(axes.xaxis, [t for t in ticks if low <= t <= high])
    log_axis(axes.yaxis, [t for t in ticks if bottom <= t <= top])
    axes.set_xlabel("operations per byte moved (log scale)")
    axes.set_ylabel("10⁹ operations per second (log scale)")
    legend_above(axes, ncols=2 if on_phone() else 6)
    values = []
    for _, _, _, op, case, intensity, rate, took in points:
        share = rate / min(peak, copy * intensity)
        values.append(
            Value(axes, intensity, rate / 1e9, f"{op} {shape_label(case)}: {rate / 1e9:.3g}·10⁹ operations/s, "
                  f"{intensity:.3g} per byte, {share:.0%} of the limit there, {seconds(took)}")
        )  # fmt: skip
    text = "; ".join(v.words for v in values)
    return Plot(
        "roof", "Roofline",
        "Each op of rbe_gpu on dense arrays, below what this machine does at most: a copy moves "
        f"{copy / 1e9:.3g} GB/s, NumPy's BLAS multiplies {peak / 1e9:.3g}·10⁹ float32 operations/s"
        + ("" if int8 is None else f", rbe_gpu's int8 matmul {int8 / 1e9:.3g}·10⁹")
        + ". Bytes are those of operands and results, each once: arrays that stay in a cache can be above the slope.",
        f"Scatter chart, both axes logarithmic. {text}.", figure, broad=True, values=values,
    )  # fmt: skip


def cores(results: Results) -> Plot | None:
    """Busy share of the cores and resident memory over time."""
    rows = [r for r in results.rows if r.op == utilisation.OP]
    busy: dict[str, list[tuple[float, float]]] = {}
    for r in rows:
        if r.metric == utilisation.BUSY:
            busy.setdefault(r.provider, []).append((float(r.case.split()[0]), r.p50))
    memory = [(float(r.case.split()[0]), r.p50 / 1e6) for r in rows if r.metric == utilisation.RESIDENT]
    if not busy or not memory:
        return None
    figure, (above, below) = new_figure(4.2, BROAD, panels=2, stacked=True)
    colours = (BLUE, VERMILLION, GREEN, SKY, GREY, INK)
    values = []
    for (name, points), colour in zip(busy.items(), colours * 2, strict=False):
        above.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3.5, label=name)
        values += [Value(above, t, share, f"{name} at {t:.1f} s: {share:.0f}% busy") for t, share in points]
    below.plot(*zip(*memory, strict=True), "o-", color=INK, markersize=3.5)
    values += [Value(below, t, size, f"at {t:.1f} s: {size:.0f} MB resident") for t, size in memory]
    above.set_ylim(-4, 108)
    above.set_ylabel("busy, %")
    below.set_ylim(0, max(size for _, size in memory) * 1.15)
    below.set_ylabel("resident, MB")
    below.set_xlabel(f"seconds, {rows[0].shape}")
    legend_above(above, ncols=4)
    means = ", ".join(f"{name} {np.mean([s for _, s in points]):.0f}%" for name, points in busy.items())
    return Plot(
        "cores", "Cores and memory while the encoder runs",
        "Above the busy share of each core, all processes of the machine counted; below the resident memory of the "
        "process, kernels and libraries included.",
        f"Two line charts over time. Busy on average: {means}. At most {max(s for _, s in memory):.0f} MB resident.",
        figure, broad=True, values=values,
    )  # fmt: skip


#: metric of a GPU -> (label of its axis, scale)
_GPU_PANELS = {
    "gpu_busy": ("busy, %", 1.0), "gpu_memory": ("memory, GB", 1e-9), "gpu_power": ("power, W", 1.0),
    "gpu_sm_clock": ("SM clock, MHz", 1.0), "gpu_memory_clock": ("memory clock, MHz", 1.0),
}  # fmt: skip


def gpu(results: Results) -> Plot | None:
    """Utilisation, memory, power and clocks of a GPU over time; those that it tells."""
    lines = {
        metric: [r for r in results.rows if (r.op, r.metric) == (utilisation.OP, metric)]
        for metric in _GPU_PANELS
    }
    lines = {metric: rows for metric, rows in lines.items() if rows}
    if not lines:
        return None
    figure, panels = new_figure(0.8 + 1.25 * len(lines), BROAD, panels=len(lines), stacked=True)
    values = []
    for axes, (metric, rows) in zip(panels, lines.items(), strict=True):
        label, scale = _GPU_PANELS[metric]
        points = [(float(r.case.split()[0]), r.p50 * scale) for r in rows]
        axes.plot(*zip(*points, strict=True), "o-", color=GREEN, markersize=3.5)
        axes.set_ylim(0, max(108 if metric == "gpu_busy" else 0, 1.15 * max(y for _, y in points)) or 1)
        axes.set_ylabel(fill(label, 9))
        values += [
            Value(axes, t, y, f"{label.rsplit(', ', 1)[0]} at {t:.1f} s: "
                  f"{y:.4g} {label.rsplit(', ', 1)[1]}")
            for t, y in points
        ]  # fmt: skip
    first = next(iter(lines.values()))[0]
    panels[-1].set_xlabel(f"seconds, {first.shape}")
    joules = next((r for r in results.rows if r.metric == utilisation.JOULES), None)
    energy = (
        ""
        if joules is None
        else (
            f" {joules.p50:.3g} J per 1,000 sentences, of the whole board ({joules.shape.rsplit(', ', 1)[-1]})."
        )
    )
    means = ", ".join(
        f"{_GPU_PANELS[metric][0]}: {np.mean([r.p50 * _GPU_PANELS[metric][1] for r in rows]):.4g}"
        for metric, rows in lines.items()
    )
    return Plot(
        "gpu", "The GPU while the encoder runs",
        f"{first.device}: what NVML tells while the dense encoder embeds on it, its memory that of all processes."
        f"{energy}",
        f"Line charts over time. Means: {means}.{energy}", figure, broad=True, values=values,
    )  # fmt: skip


def cache_sweep(results: Results) -> Plot | None:
    """Hit rate and time of a pass through the linear weights against the budget of the panel cache."""
    swept = panel_cache.budgets(results)
    if len(swept) < 2:
        return None
    shares, times, rates, held = zip(*swept, strict=True)
    x = [100 * share for share in shares]
    figure, (above, below) = new_figure(4.4, BROAD, panels=2, stacked=True)
    above.plot(x, [100 * r.p50 for r in rates], "o-", color=BLUE, markersize=5)
    above.set_ylim(-4, 108)
    above.set_ylabel("hit rate, %")
    below.errorbar(x, [t.p50 * 1e3 for t in times], yerr=spread(times, 1e3), fmt="o-", color=BLUE, markersize=5,
                   elinewidth=1.2, label="through the cache")  # fmt: skip
    lines = []
    for case, label, colour, style in (
        (panel_cache.DECODED, "decoded weights, rbe_gpu dense", INK, "--"),
        (panel_cache.NO_CACHE, "chosen without a cache", VERMILLION, ":"),
    ):
        row = next(
            (r for r in results.rows if (r.op, r.case, r.metric) == (panel_cache.OP, case, "time")), None
        )
        if row is not None:
            below.axhline(row.p50 * 1e3, color=colour, linestyle=style, linewidth=1.4, label=label)
            lines.append((label, row))
    below.set_ylim(0, max(t.p80 for t in (*times, *(row for _, row in lines))) * 1.1e3)
    below.set_ylabel("ms for a pass")
    below.set_xlabel("budget of the cache, % of the bytes of all decoded weights")
    legend_above(below, ncols=1 if on_phone() else 3)
    values = [
        Value(above, at, 100 * r.p50, f"budget {at:g}%: {r.p50:.1%} of lookups hit, {megabytes(h.p50)} held")
        for at, r, h in zip(x, rates, held, strict=True)
    ]
    values += [
        Value(below, at, t.p50 * 1e3, f"budget {at:g}%: {seconds(t.p50)} for a pass, {megabytes(h.p50)} held")
        for at, t, h in zip(x, times, held, strict=True)
    ]
    values += [Value(below, x[-1], row.p50 * 1e3, f"{label}: {seconds(row.p50)}") for label, row in lines]
    text = "; ".join(
        f"budget {at:g}%: hit rate {r.p50:.0%}, {seconds(t.p50)}, {megabytes(h.p50)} held"
        for at, t, r, h in zip(x, times, rates, held, strict=True)
    )
    return Plot(
        "cache_sweep", "Cache of decoded panels",
        f"A pass through {times[0].shape.split(',', 1)[0]} of the compressed model with method=\"cache\": hit rate "
        "and time, medians with lines from the 20th to the 80th percentile, by the budget of the cache.",
        f"Two line charts over the budget. {text}.", figure, broad=True, values=values,
    )  # fmt: skip


def process_peaks(results: Results) -> Plot | None:
    """Peak memory of whole processes that load an encoder and run a batch."""
    colours = {DENSE: INK, TORCH: VERMILLION, NUMPY: GREY, ONNX: GREEN}
    rows = [r for r in results.rows if (r.op, r.metric) == ("model", PEAK)]
    if not rows:
        return None
    figure, axes = new_figure(1.0 + 0.38 * len(rows))
    bars(axes, [(r.provider, r.p50 / 1e6, colours.get(r.provider, BLUE)) for r in rows])
    axes.set_xlim(0, max(r.p50 / 1e6 for r in rows) * 1.16)
    axes.set_xlabel("MB resident at most, the whole process")
    text = "; ".join(f"{r.provider}: {megabytes(r.p50)}" for r in rows)
    return Plot(
        "process_peaks", "Peak memory of a process",
        "A fresh process that imports the library, loads the encoder and runs the same batch twice: Python, compiled "
        "kernels and libraries included.",
        f"Bar chart of peak resident memory. {text}.", figure,
        values=[Value(axes, r.p50 / 1e6, y, f"{r.provider}: {megabytes(r.p50)}") for y, r in enumerate(rows)],
    )  # fmt: skip


PLOTS: tuple[Callable[[Results], Plot | None], ...] = (roof, cores, gpu, process_peaks, cache_sweep)

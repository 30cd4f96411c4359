"""The page "Small, good, fast", written from rows alone: which file to take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import sqrt
from pathlib import Path

from ...harness import page, plots
from ...harness.measure import OURS
from ...harness.page import Table, columns
from ...harness.rows import Results, Row
from ...harness.text import (
    MISSING,
    Rating,
    cosine_rating,
    fixed,
    listed,
    megabytes,
    percent,
    plain,
    seconds,
    times,
)
from ..measure import CALIBRATED, DENSE, DISTILLED, ENCODING, EVALUATION_TEXTS, PLAIN, WHOLE
from ..points import Point, baselines, ours, point, points, smallest, texts_of
from . import peers
from .measure import BASELINES, BATCHES, FILE, ONE, OP, SHORT_TEXTS, WEIGHT_ONLY
from .plots import PLOTS, file_name

#: what a user may ask of a file
COSINES = (0.99, 0.95, 0.9)
NOT_ITS_OWN = "not its own"
OTHER_SPACE = Rating("", "another space")
KINDS = {
    DENSE: "float32, as rbe_gpu.load runs the model's own folder.",
    PLAIN: "rbe-gpu compress without calibration.",
    CALIBRATED: "rbe-gpu compress --calibrate.",
    DISTILLED: "rbe-gpu distill: trained on text; how long, on which machine, is in docs/distill.md.",
    "onnxruntime": "the encoder as an ONNX graph, run in ONNX Runtime: in float32, and as quantize_dynamic makes it, "
    "int8 with a scale per output, “+ words” with the word table too, activations quantised as they come.",
    "openvino": "the same graph in OpenVINO's CPU plugin: in float32, and as nncf.quantize makes it, int8 weights "
    "and activations, whose ranges are measured on docstrings.",
    "pytorch": "float32, with PyTorch's fused attention.",
    peers.STATIC: "static embeddings: the mean of a vector for every token, distilled from the same model and cut to "
    "the bytes of one of our files.",
}  # fmt: skip


def _speed(results: Results, provider: str, case: str, metric: str) -> float | None:
    return results.value(OP, case, provider, metric)


def _rate(value: float) -> str:
    """Sentences per second, with three digits or more."""
    return f"{value:,.0f}" if value >= 100 else plain(value)


def _is_weight_only(p: Point) -> bool:
    """Whether it is a tool without an encoder of its own here."""
    return p.tool in WEIGHT_ONLY


def choice_table(results: Results) -> Table:
    """The dense model, our files and the other encoders, smallest first within each."""
    table = Table(
        "Which file to take",
        columns(
            "file", ("rating", "words"), ("mean cosine", "key"), "1st percentile", "top-10 overlap",
            ("recall@10", "key"), ("on disk", "n key"), "times smaller", ("in memory", "n"),
            ("sentences per second", "key"), "vs dense", "vs ONNX Runtime float32", ("a short text", "n"),
            "a short text vs dense",
        ),
        css="many-columns",
    )  # fmt: skip
    every = points(results, WHOLE)
    dense = point(results, WHOLE, DENSE)
    for p in (*([] if dense is None else [dense]), *(p for p in every if p.tool == OURS), *baselines(every)):
        table.add(*_cells(results, p, dense), css="base" if p is dense else "ours" if p.tool == OURS else "")
    return table


def _cells(results: Results, p: Point, dense: Point | None) -> list[str | Rating]:
    itself, static = p is dense, p.tool == peers.STATIC

    def speed(case: str, baseline: str) -> str:
        if rate is None:  # which its own column says
            return ""
        if p.provider == baseline:
            return "1"
        return times(_speed(results, p.provider, case, f"speed_vs_{baseline}"))

    rate, time = (
        _speed(results, p.provider, case, metric)
        for case, metric in ((BATCHES, "sentences_per_second"), (ONE, "time"))
    )
    rating = Rating("", "the baseline") if itself else OTHER_SPACE if static else cosine_rating(p.cosine_mean)
    return [
        p.provider, rating,
        *([""] * 3 if static else [fixed(p.cosine_mean), fixed(p.cosine_p1, 3), percent(p.overlap_at_10)]),
        fixed(p.recall_at_10, 3), megabytes(p.bytes, True),
        "1" if itself else times(dense.bytes / p.bytes if dense else None),
        megabytes(p.resident_bytes) if itself or p.tool == OURS else "",
        NOT_ITS_OWN if _is_weight_only(p) else MISSING if rate is None else _rate(rate),
        *(speed(BATCHES, baseline) for baseline in BASELINES),
        "" if rate is None else seconds(time), speed(ONE, DENSE),
    ]  # fmt: skip


# --- findings ---------------------------------------------------------------------------------------------


def findings(results: Results) -> list[str]:
    """The table in sentences; each only where its figures were measured."""
    every = points(results, WHOLE)
    mine = [p for p in every if p.tool == OURS]
    others = [p for p in baselines(every) if p.cosine_mean is not None]
    dense = point(results, WHOLE, DENSE)
    sentences = []
    described: set[str] = set()
    for least in COSINES:
        best, other = smallest(mine, least), smallest(others, least)
        if best is None or best.provider in described:
            continue
        described.add(best.provider)
        sentences.append(
            f"The smallest of our files with a mean cosine of {least} or more is {_described(results, best, dense)}. "
            + (
                "None of the other tools' files reaches it."
                if other is None
                else f"Of the other tools' files it is {_described(results, other, dense)}."
            )
        )
    if mine and not described:
        sentences.append(f"None of our files has a mean cosine of {COSINES[-1]} or more.")
    for p in (p for p in every if p.tool == peers.STATIC):
        near = min(mine, key=lambda m: abs(m.bytes - p.bytes), default=None)
        if near is not None and None not in (p.recall_at_10, near.recall_at_10):
            sentences.append(
                f"Static embeddings of as many bytes as {file_name(near)} ({p.provider}) have a recall@10 of "
                f"{fixed(p.recall_at_10, 3)} against {fixed(near.recall_at_10, 3)}{_pace(results, p)}."
            )
    return sentences


def _described(results: Results, p: Point, dense: Point | None) -> str:
    """A file in words: its size, quality and speed."""
    words = f"{p.provider}: {megabytes(p.bytes, True)}"
    if dense is not None:
        words += f" ({dense.bytes / p.bytes:.1f} times smaller)"
    words += f", mean cosine {fixed(p.cosine_mean)}"
    if p.recall_at_10 is not None:
        words += f", recall@10 {fixed(p.recall_at_10, 3)}"
        if dense is not None and dense.recall_at_10 is not None:
            words += f" (dense {fixed(dense.recall_at_10, 3)})"
    return words + _pace(results, p)


def _pace(results: Results, p: Point) -> str:
    """How fast it is, from a semicolon on; "" where that was not measured."""
    paces = [
        f"{times(ratio)} the speed of {'dense' if baseline == DENSE else 'ONNX Runtime float32'}"
        for baseline in BASELINES
        if (ratio := _speed(results, p.provider, BATCHES, f"speed_vs_{baseline}")) is not None
    ]
    return f"; {listed(paces)}" if paces else ""


# --- the page ---------------------------------------------------------------------------------------------


def _missing(results: Results) -> list[str]:
    """The tools of which nothing was measured."""
    there = {p.tool for p in points(results, WHOLE)}
    return [name for name in (*peers.REQUIREMENTS, *WEIGHT_ONLY) if name not in there]


def recall_error(p: Point | None) -> float | None:
    """Standard error of a recall over independent queries, sqrt(p (1 - p) / queries)."""
    if p is None or p.recall_at_10 is None or not p.queries:
        return None
    return sqrt(p.recall_at_10 * (1 - p.recall_at_10) / p.queries)


def render(rows: Iterable[Row], drawn: Sequence[plots.Plot]) -> str:
    """The whole page.

    Raises
    ------
    ValueError
        There are no rows.
    """
    results = Results(rows)
    every, texts = points(results, WHOLE), texts_of(results.rows)
    there = {p.tool for p in every}
    kinds = [
        (name.removeprefix(f"{OURS} "), words)
        for name, words in KINDS.items()
        if name in there or ours(every, name)
    ]
    timed = [next((r for r in results.rows if (r.op, r.case) == (OP, case)), None) for case in (BATCHES, ONE)]
    trained = [
        (file_name(p), row.shape)
        for p in ours(every, DISTILLED)
        if (row := results.one("quality", ENCODING, p.provider, "training_steps")) is not None
    ]
    return page.render(
        "small-good-fast.html",
        results.rows,
        drawn,
        small=texts is not None and int(texts.split(" ", 1)[0]) < EVALUATION_TEXTS,
        texts=texts or MISSING,
        findings=findings(results),
        choices=choice_table(results),
        kinds=kinds,
        trained=trained,
        weight_only=[t for t in WEIGHT_ONLY if t in there],
        batches=None if timed[0] is None else f"{BATCHES}, {timed[0].shape}",
        one=None if timed[1] is None else f"{SHORT_TEXTS} texts of {timed[1].shape}",
        rounds=None if timed[0] is None else timed[0].runs,
        recall_error=recall_error(point(results, WHOLE, DENSE)),
        missing=_missing(results),
        file=FILE,
    )  # fmt: skip


def write(rows: Iterable[Row], out: Path) -> Path:
    """Draw `out/plots/small-good-fast-*.png` and write `out/small-good-fast.html`. Returns the page's path."""
    rows = list(rows)
    drawn = plots.draw(PLOTS, Results(rows))
    return page.write(out, page.CHOICE_PAGE, render(rows, drawn), drawn)

"""Quality per byte as one HTML page, written from the rows of `measure` alone.

For a reader who decides whether to use the tool: what loses is named as what wins is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ..harness import page, plots
from ..harness.measure import OURS
from ..harness.page import Table, columns
from ..harness.rows import Results, Row
from ..harness.text import (
    MISSING,
    UNKNOWN,
    Rating,
    cosine_rating,
    fixed,
    megabytes,
    percent,
    plain,
    seconds,
    signed,
    times,
)
from . import summary
from .findings import basis_sentence, findings
from .measure import (
    ABLATION,
    ABLATION_BITS,
    CALIBRATED,
    CALIBRATION_TEXTS,
    DENSE,
    ENCODING,
    EVALUATION_TEXTS,
    FILE,
    LINEAR,
    PLAIN_RATIO,
    WHOLE,
)
from .plots import PLOTS
from .points import (
    Comparison,
    Point,
    baselines,
    basis_trials,
    comparisons,
    measured_tools,
    offered,
    point,
    points,
    refusal,
    texts_of,
)
from .quantizers import TOOLS

#: what the bytes of a file are, by who made it
CONTENTS = {
    OURS: "weights, norms, biases, config, tokenizer and headers: all that `rbe_gpu.load` needs. Calibration also "
    "stores corrected biases and refitted norms, which take the same bytes as the dense ones.",
    "gguf": "a GGUF file as llama.cpp's converter lays it out: vocabulary, tables, linear layers, norms; what is not "
    "quantised is float32. The linear layers and the word table get one type. “Across rows” joins rows "
    "to whole blocks of 256, which llama.cpp does not run: it favours the type over any file in use.",
    "llama.cpp": "the same kind of file, quantised by llama.cpp with an importance matrix unless it says without. A "
    "mixture gives the word table Q8_0; “pure” gives it the type of the rest. “Across rows” as above.",
    "bitsandbytes": "a safetensors file of what the tool saves, all else float16; no tokenizer. Without “+ words” "
    "the word table is float16.",
    "hqq": "as bitsandbytes.",
    "optimum-quanto": "as bitsandbytes.",
    "torchao": "as bitsandbytes.",
    "onnxruntime": "an ONNX graph, run in ONNX Runtime; no vocabulary; what is not quantised is float32. Without "
    "“+ words” the word table is float32.",
}  # fmt: skip
NOT_POSSIBLE = Rating("gone", "cannot be made")
BASELINE = Rating("", "the baseline")
BETTER = {True: Rating("good", "better"), False: Rating("lost", "not better"), None: UNKNOWN}
PAYS = {True: Rating("good", "pays"), False: Rating("lost", "does not pay"), None: UNKNOWN}
TOO_SMALL = Rating("", "none of ours as small")


# --- points -----------------------------------------------------------------------------------------------


def _css(name: str) -> str:
    """The class of a provider's line."""
    return "base" if name == DENSE else "ours" if name.startswith(OURS) else ""


def _scores(p: Point | None) -> list[str]:
    """Cosines and overlap."""
    if p is None:
        return [MISSING] * 3
    return [fixed(p.cosine_mean), fixed(p.cosine_p1), percent(p.overlap_at_10)]


def _recalls(p: Point | None) -> list[str]:
    return [MISSING] * 2 if p is None else [fixed(p.recall_at_1, 3), fixed(p.recall_at_10, 3)]


def _smaller(p: Point | None, dense: Point | None) -> str:
    """How many times smaller than the dense file."""
    if p is None or dense is None:
        return MISSING
    return "1" if p.provider == DENSE else times(dense.bytes / p.bytes)


def _size(p: Point | None) -> str:
    return MISSING if p is None else megabytes(p.bytes, True)


def cost_table(results: Results) -> Table:
    """What a ratio costs: dense, and our ratios, calibrated and plain."""
    table = Table(
        "What a ratio costs",
        columns("file", ("rating", "words"), ("mean cosine", "key"), "1st percentile", "top-10 overlap",
                ("recall@1", "n"), ("recall@10", "n"), ("on disk", "n key"), ("in memory", "n"), "times smaller"),
    )  # fmt: skip
    dense = point(results, WHOLE, DENSE)
    for name in (DENSE, *(provider for _, provider in offered(results))):
        p = point(results, WHOLE, name)
        if refusal(results, name) is not None:
            table.add(name, NOT_POSSIBLE, *[""] * 8)
            continue
        rating = BASELINE if name == DENSE else UNKNOWN if p is None else cosine_rating(p.cosine_mean)
        resident = MISSING if p is None else megabytes(p.resident_bytes)
        table.add(
            name, rating, *_scores(p), *_recalls(p), _size(p), resident, _smaller(p, dense),
            css="base" if name == DENSE else "",
        )  # fmt: skip
    return table


def linear_table(results: Results) -> Table:
    """The linear layers alone: ours and every baseline, fewest bits first; the dense model last."""
    every = sorted(points(results, LINEAR), key=lambda p: (p.bits_per_weight is None, p.bits_per_weight))
    recall = any(p.recall_at_10 is not None for p in every)
    table = Table(
        "The linear layers alone, by bits per weight",
        columns("provider", ("bits per weight", "key"), ("mean cosine", "key"), "1st percentile", "top-10 overlap",
                *[("recall@1", "n"), ("recall@10", "n")] * recall, ("bytes", "n")),
    )  # fmt: skip
    dense = point(results, WHOLE, DENSE)
    if every and dense is not None:
        every.append(dense)
    for p in every:
        bits, size = ("32", "") if p.provider == DENSE else (plain(p.bits_per_weight), _size(p))
        table.add(p.provider, bits, *_scores(p), *_recalls(p)[: 2 * recall], size, css=_css(p.provider))
    return table


def whole_table(results: Results) -> Table:
    """The whole files, smallest first."""
    table = Table(
        "Whole files, smallest first",
        columns("provider", ("on disk", "n key"), "times smaller", ("mean cosine", "key"), "1st percentile",
                "top-10 overlap", ("recall@1", "n"), ("recall@10", "n")),
    )  # fmt: skip
    dense = point(results, WHOLE, DENSE)
    for p in points(results, WHOLE):
        table.add(p.provider, _size(p), _smaller(p, dense), *_scores(p), *_recalls(p), css=_css(p.provider))
    return table


# --- ours and the baselines -------------------------------------------------------------------------------


def comparison_table(results: Results, case: str, title: str) -> Table:
    """Ours and every baseline of a case. In the linear layers sizes are bits per weight, else MB."""
    every = comparisons(results, case)
    recall = any(c.recall is not None for c in every)
    table = Table(
        title,
        columns("baseline", ("ours is", "n text"), ("size", "n"), ("ours, calibrated", "n text"), ("our size", "n"),
                "baseline's cosine", "our cosine", ("difference of cosines", "n"),
                *[("baseline's recall@10", "n"), ("our recall@10", "n"), ("difference of recalls", "n")] * recall),
        css="many-columns",
    )  # fmt: skip

    def size(p: Point) -> str:
        bits = p.bits_per_weight
        return f"{bits:.2f} bits" if case == LINEAR and bits is not None else _size(p)

    for c in every:
        b, p = c.baseline, c.ours
        recalls = [_recalls(b)[1], "" if p is None else _recalls(p)[1], recall_rating(c)]
        table.add(
            b.provider, TOO_SMALL if p is None else BETTER[c.better], size(b),
            "" if p is None else p.provider.removeprefix(CALIBRATED).strip(), "" if p is None else size(p),
            fixed(b.cosine_mean), "" if p is None else fixed(p.cosine_mean), cosine_difference(c),
            *recalls[: 3 * recall],
        )  # fmt: skip
    return table


def cosine_difference(c: Comparison) -> str | Rating:
    """Our cosine less the baseline's: "good" where ours is higher, "lost" where the baseline's is, else "fair"."""
    if c.cosine is None:
        return "" if c.ours is None else UNKNOWN
    level = "good" if c.cosine > 0 else "lost" if c.cosine < 0 else "fair"
    return Rating(level, signed(c.cosine, 4 if abs(c.cosine) >= 1e-3 else 6))


def recall_rating(c: Comparison) -> str | Rating:
    """The same of recall@10; "fair" within noise."""
    if c.recall is None or c.noise is None:
        return "" if c.ours is None else UNKNOWN
    level = "fair" if abs(c.recall) <= c.noise else "good" if c.recall > 0 else "lost"
    return Rating(level, f"{signed(c.recall, 3)} ± {c.noise:.3f}")


# --- ablation and encoding --------------------------------------------------------------------------------


def trial_table(results: Results) -> Table:
    """Transforms and blocks, calibrated: the linear layers alone, all at the same bits."""
    table = Table(
        "Transform and block, calibrated",
        columns("transform", "bits per weight", ("mean cosine", "key"), "1st percentile", "top-10 overlap"),
    )
    names = [f"{transform}, block {block}" for transform, block in ABLATION]
    for name in dict.fromkeys([*names, *results.providers("ablation", "calibrated", "cosine_mean")]):
        bits, cosine, p1, overlap = (
            results.value("ablation", "calibrated", name, metric)
            for metric in ("bits_per_weight", "cosine_mean", "cosine_p1", "overlap_at_10")
        )
        table.add(name, plain(bits), fixed(cosine), fixed(p1), percent(overlap))
    return table


def basis_table(results: Results) -> Table:
    """Transforms without calibration, with and without basis parameters."""
    table = Table(
        "Transform and basis, plain",
        columns("weights", ("transform", "n text"), "bits per weight", "error without basis", "error with basis",
                "change", ("basis", "n")),
    )  # fmt: skip
    for t in basis_trials(results):
        change = MISSING if t.change is None else f"{100 * t.change:+.2f}%"
        table.add(
            t.group, t.transform, plain(t.bits), fixed(t.without), fixed(t.with_basis), change, PAYS[t.pays]
        )
    return table


def encoding_table(results: Results) -> Table:
    """Seconds to make a file, and the tokenizer's bytes in it: ours first; then every baseline, as measured."""
    table = Table(
        "Seconds of encoding",
        columns("file", ("seconds", "n"), ("tokenizer in the file", "n"), ("what", "words")),
    )
    once = results.one("quality", "calibration", CALIBRATED, "encode_time")
    if once is not None:
        table.add("calibration, once for all ratios", seconds(once.p50), "", once.shape)
    for case in (WHOLE, LINEAR):
        for p in points(results, case):
            if p.tool == OURS:
                table.add(f"{p.provider}, {case}", seconds(p.encode_time), "", "")
    for p in baselines(points(results, WHOLE)):
        row = results.one("quality", ENCODING, p.provider, "encode_time")
        size = results.value("quality", ENCODING, p.provider, "tokenizer_bytes")
        table.add(
            p.provider, seconds(None if row is None else row.p50), "none" if size == 0 else megabytes(size, True),
            MISSING if row is None else row.shape,
        )  # fmt: skip
    return table


# --- the page ---------------------------------------------------------------------------------------------


def render(rows: Iterable[Row], drawn: Sequence[plots.Plot]) -> str:
    """The whole page.

    Raises
    ------
    ValueError
        There are no rows.
    """
    results = Results(rows)
    texts, tools = texts_of(results.rows), measured_tools(results)
    calibration = results.one("quality", "calibration", CALIBRATED, "encode_time")
    return page.render(
        "quality.html",
        results.rows,
        drawn,
        small=texts is not None and texts.split(" ", 1)[0] != str(EVALUATION_TEXTS),
        texts=texts or MISSING,
        calibration=f"{CALIBRATION_TEXTS} texts" if calibration is None else calibration.shape,
        numbers_of=summary.findings(results),
        losses=summary.losses(results),
        findings=findings(results),
        all_rows=page.row_table(results.rows),
        costs=cost_table(results),
        linear=linear_table(results),
        linear_recall=any(p.recall_at_10 is not None for p in points(results, LINEAR)),
        whole=whole_table(results),
        comparisons=[
            (name, title, any(c.recall is not None for c in comparisons(results, case)),
             comparison_table(results, case, title))
            for name, title, case in (
                ("against-linear", "Linear layers alone, against each baseline", LINEAR),
                ("against-whole", "Whole files, against each baseline", WHOLE),
            )
        ],
        queries=next((p.queries for p in points(results, WHOLE) if p.queries), MISSING),
        trials=trial_table(results),
        ablation_bits=ABLATION_BITS,
        basis=basis_table(results),
        basis_sentence=basis_sentence(results),
        plain_ratio=PLAIN_RATIO,
        contents=[(tool, CONTENTS.get(tool, MISSING)) for tool in (OURS, *tools)],
        missing=[(t.name, t.requirement) for t in TOOLS if t.name not in tools],
        encodings=encoding_table(results),
        file=FILE,
    )  # fmt: skip


def write(rows: Iterable[Row], out: Path) -> Path:
    """Draw `out/plots/quality-*.png` and write `out/quality.html`. Returns the page's path."""
    rows = list(rows)
    drawn = plots.draw_for_screens(PLOTS, Results(rows))
    return page.write(out, page.QUALITY_PAGE, render(rows, drawn), drawn)

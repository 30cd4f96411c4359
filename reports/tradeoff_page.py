"""Quality per byte as one HTML page, written from the rows of `tradeoff` and from nothing else.

For a reader who decides whether to use the tool. What loses is named as what wins is, and a figure that has no row
is shown as "not measured".

    python -m rbe_gpu.reports.tradeoff_page ROWS.csv --out DIR [--readme README.md]
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from . import page, tradeoff_plot, tradeoff_readme
from .bench import Results, Row, read_rows
from .page import (
    MISSING,
    QUALITY_PAGE,
    QUALITY_PLOT,
    Verdict,
    fixed,
    megabytes,
    percent,
    plain,
    seconds,
    times,
)
from .plot import Plot
from .quantizers import TOOLS
from .tradeoff import (
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
from .tradeoff_findings import basis_sentence, findings
from .tradeoff_points import (
    OURS,
    BasisTrial,
    Duel,
    Point,
    basis_trials,
    duels,
    measured_tools,
    offered,
    peers,
    point,
    points,
    refusal,
    texts_of,
)

#: what the bytes of a file are, by who made it
CONTENTS = {
    OURS: "weights, norms, biases, config, tokenizer and headers: all that `rbe_gpu.load` needs. Calibration also "
    "stores corrected biases and refitted norms, which take the same bytes as the dense ones.",
    "gguf": "a GGUF file as llama.cpp's converter lays it out: vocabulary, tables, linear layers, norms; what is not "
    "quantised is float32. The linear layers and the word table get one type. “Across rows” joins rows "
    "to whole blocks of 256, which llama.cpp does not run: it is kinder to the type than any file in use.",
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


# --- tables -------------------------------------------------------------------------------------------------


def signed(value: float | None, places: int = 4) -> str:
    """A difference with its sign."""
    return MISSING if value is None else f"{value:+.{places}f}"


@dataclass(frozen=True)
class Line:
    """One point, as text. `kind`: "dense", "ours" or "peer"."""

    name: str
    kind: str
    size: str = MISSING
    resident: str = MISSING
    smaller: str = MISSING
    bits: str = MISSING
    cosine: str = MISSING
    p1: str = MISSING
    overlap: str = MISSING
    recall_1: str = MISSING
    recall_10: str = MISSING
    verdict: Verdict = page.UNKNOWN


NOT_POSSIBLE = Verdict("gone", tradeoff_readme.NOT_POSSIBLE)
NOTHING = ("", "", "", "", "", "", "", "", "")


def line(name: str, found: Point | None, dense_bytes: float | None) -> Line:
    """A point's line, or one that says "not measured"."""
    kind = "dense" if name == DENSE else "ours" if name.startswith(OURS) else "peer"
    if found is None:
        return Line(name, kind)
    dense = kind == "dense"
    return Line(
        name, kind, megabytes_of(found.bytes), megabytes(found.resident),
        "1" if dense else times(dense_bytes / found.bytes if dense_bytes else None),
        "32" if dense else plain(found.bits),
        fixed(found.cosine), fixed(found.p1), percent(found.overlap), fixed(found.recall_1, 3),
        fixed(found.recall_10, 3),
        Verdict("", "the baseline") if dense else page.verdict(found.cosine),
    )  # fmt: skip


def megabytes_of(value: float) -> str:
    """MB with as many places as tell files apart."""
    return f"{value / 1e6:.2f} MB" if value < 10e6 else megabytes(value)


def cost_lines(results: Results) -> list[Line]:
    """Table "What a ratio costs": dense, and our ratios, calibrated and plain."""
    dense = results.value("quality", WHOLE, DENSE, "bytes")
    names = [DENSE, *(provider for _, provider in offered(results))]
    return [
        line(name, point(results, WHOLE, name), dense)
        if refusal(results, name) is None
        else Line(name, "ours", *NOTHING, NOT_POSSIBLE)
        for name in names
    ]


def linear_lines(results: Results) -> list[Line]:
    """The linear layers alone: ours and every peer, fewest bits first; the dense model last."""
    found = sorted(points(results, LINEAR), key=lambda p: (p.bits is None, p.bits))
    lines = [line(p.provider, p, None) for p in found]
    dense = point(results, WHOLE, DENSE)
    return [*lines, line(DENSE, dense, None)] if lines else []


def whole_lines(results: Results) -> list[Line]:
    """The whole files, smallest first."""
    dense = results.value("quality", WHOLE, DENSE, "bytes")
    return [line(p.provider, p, dense) for p in points(results, WHOLE)]


BEATEN, NOT_BEATEN = Verdict("good", "beaten"), Verdict("lost", "not beaten")
NONE = Verdict("", "")
TOO_SMALL = Verdict("", "none of ours as small")


@dataclass(frozen=True)
class DuelLine:
    """A peer against our nearest point of no more bytes, as text."""

    peer: str
    peer_size: str
    peer_cosine: str
    peer_recall: str
    ours: str = ""
    our_size: str = ""
    our_cosine: str = ""
    our_recall: str = ""
    cosine: Verdict = NONE
    recall: Verdict = NONE
    result: Verdict = TOO_SMALL


def duel_line(duel: Duel) -> DuelLine:
    """A duel in words. In the linear layers sizes are bits per weight, else MB."""
    peer, ours = duel.peer, duel.ours

    def size(p: Point) -> str:
        return f"{p.bits:.2f} bits" if p.case == LINEAR and p.bits is not None else megabytes_of(p.bytes)

    theirs = (peer.provider, size(peer), fixed(peer.cosine), fixed(peer.recall_10, 3))
    if ours is None:
        return DuelLine(*theirs)
    return DuelLine(
        *theirs, ours.provider.removeprefix(CALIBRATED).strip(), size(ours), fixed(ours.cosine),
        fixed(ours.recall_10, 3), cosine_verdict(duel), recall_verdict(duel),
        page.UNKNOWN if duel.beaten is None else BEATEN if duel.beaten else NOT_BEATEN,
    )  # fmt: skip


def cosine_verdict(duel: Duel) -> Verdict:
    """Our cosine less the peer's: "good" where ours is higher, "lost" where the peer's is, else "fair"."""
    if duel.cosine is None:
        return page.UNKNOWN
    level = "good" if duel.cosine > 0 else "lost" if duel.cosine < 0 else "fair"
    return Verdict(level, signed(duel.cosine, 4 if abs(duel.cosine) >= 1e-3 else 6))


def recall_verdict(duel: Duel) -> Verdict:
    """The same of recall@10; "fair" within noise."""
    if duel.recall is None or duel.noise is None:
        return page.UNKNOWN
    level = "fair" if abs(duel.recall) <= duel.noise else "good" if duel.recall > 0 else "lost"
    return Verdict(level, f"{signed(duel.recall, 3)} ± {duel.noise:.3f}")


@dataclass(frozen=True)
class Trial:
    """A transform and block that calibration was tried with, as text."""

    name: str
    bits: str
    cosine: str
    p1: str
    overlap: str


def trials(results: Results) -> list[Trial]:
    """Calibrated, the linear layers alone, all at the same bits."""
    names = [f"{transform}, block {block}" for transform, block in ABLATION]
    names = list(dict.fromkeys([*names, *results.providers("ablation", "calibrated", "cosine_mean")]))

    def of(name: str, metric: str) -> float | None:
        return results.value("ablation", "calibrated", name, metric)

    return [
        Trial(
            name, plain(of(name, "bits_per_weight")), fixed(of(name, "cosine_mean")), fixed(of(name, "cosine_p1")),
            percent(of(name, "overlap_at_10")),
        )
        for name in names
    ]  # fmt: skip


PAYS = {True: Verdict("good", "pays"), False: Verdict("lost", "does not pay")}


def basis_line(trial: BasisTrial) -> tuple[str, str, str, str, str, str, Verdict]:
    """(group, transform, bits, error without, error with, change, verdict)."""
    change = MISSING if trial.change is None else f"{100 * trial.change:+.2f}%"
    return (
        trial.group, trial.transform, plain(trial.bits), fixed(trial.without), fixed(trial.with_basis), change,
        page.UNKNOWN if trial.pays is None else PAYS[trial.pays],
    )  # fmt: skip


@dataclass(frozen=True)
class Encoding:
    """What it took to make a file, and what of it is the tokenizer, as text."""

    name: str
    seconds: str
    tokenizer: str
    note: str


def encodings(results: Results) -> list[Encoding]:
    """Ours first; then every peer's, in the order measured."""
    found = []
    once = results.one("quality", "calibration", CALIBRATED, "encode_time")
    if once is not None:
        found.append(Encoding("calibration, once for all ratios", seconds(once.p50), "", once.shape))
    for case in (WHOLE, LINEAR):
        ours = [p for p in points(results, case) if p.tool == OURS]
        found += [Encoding(f"{p.provider}, {case}", seconds(p.seconds), "", "") for p in ours]
    for p in dict.fromkeys(p.provider for p in peers(points(results, WHOLE))):
        row = results.one("quality", ENCODING, p, "encode_time")
        size = results.value("quality", ENCODING, p, "tokenizer_bytes")
        found.append(
            Encoding(
                p,
                seconds(None if row is None else row.p50),
                MISSING if size is None else "none" if size == 0 else megabytes_of(size),
                MISSING if row is None else row.shape,
            )
        )
    return found


# --- the page -----------------------------------------------------------------------------------------------


def _each(rows: Iterable[Row], field: str) -> list[str]:
    """What rows have in a column, without repeats: a run that was resumed may have several."""
    return list(dict.fromkeys(v for r in rows if (v := str(getattr(r, field)))))


def _versions(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(v for text in _each(rows, "versions") for v in text.split(", ")))


def is_small(texts: str | None) -> bool:
    """Whether rows are of fewer texts than a report's."""
    return texts is not None and texts.split(" ", 1)[0] != str(EVALUATION_TEXTS)


def render(rows: Iterable[Row], plots: Sequence[Plot]) -> str:
    """The whole page.

    Raises
    ------
    ValueError : there are no rows
    """
    results = Results(rows)
    if not results.rows:
        raise ValueError("there are no rows; a report needs measurements")
    texts, tools = texts_of(results.rows), measured_tools(results)
    times_seen = sorted(_each(results.rows, "timestamp"))
    calibration = results.one("quality", "calibration", CALIBRATED, "encode_time")
    return page.template("quality.html").render(
        small=is_small(texts),
        texts=texts or MISSING,
        calibration=f"{CALIBRATION_TEXTS} texts" if calibration is None else calibration.shape,
        devices=_each(results.rows, "device"),
        threads=_each(results.rows, "threads"),
        commits=_each(results.rows, "commit"),
        measured=" to ".join(dict.fromkeys((times_seen[0], times_seen[-1]))),
        versions=_versions(results.rows),
        findings=findings(results),
        costs=cost_lines(results),
        linear=linear_lines(results),
        whole=whole_lines(results),
        linear_recall=any(p.recall_10 is not None for p in points(results, LINEAR)),
        duels=[
            (
                name,
                title,
                any(d.recall is not None for d in duels(results, case)),
                [duel_line(d) for d in duels(results, case)],
            )
            for name, title, case in (
                ("against-linear", "Linear layers alone, against each peer", LINEAR),
                ("against-whole", "Whole files, against each peer", WHOLE),
            )
        ],
        queries=next((p.queries for p in points(results, WHOLE) if p.queries), MISSING),
        trials=trials(results),
        ablation_bits=ABLATION_BITS,
        basis=[basis_line(t) for t in basis_trials(results)],
        basis_sentence=basis_sentence(results),
        plain_ratio=PLAIN_RATIO,
        plots=[(p, Markup(p.svg())) for p in plots],
        contents=[(tool, CONTENTS.get(tool, MISSING)) for tool in (OURS, *tools)],
        missing=[(t.name, t.requirement) for t in TOOLS if t.name not in tools],
        encodings=encodings(results),
        verdicts=page.VERDICTS,
        gone=page.GONE,
        not_measured=MISSING,
        file=FILE,
        count=len(results.rows),
    )


def write(rows: Iterable[Row], out: Path) -> Path:
    """Draw `out/plots/quality-*.png` and write `out/quality.html`. Returns the page's path."""
    rows = list(rows)
    plots = tradeoff_plot.draw(Results(rows))
    source = render(rows, plots)
    folder = out / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{QUALITY_PLOT}*.png"):
        old.unlink()
    for drawn in plots:
        drawn.png(folder / f"{drawn.name}.png")
    found = out / QUALITY_PAGE
    found.write_text(source, encoding="utf-8")
    page.link(out)
    return found


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m rbe_gpu.reports.tradeoff_page",
        description="Write the page, or a README's tables, from rows that were measured before.",
    )
    parser.add_argument("rows", type=Path, help="a results file, such as quality.csv")
    parser.add_argument("--out", type=Path, help="folder for quality.html, plots/ and the rows")
    parser.add_argument(
        "--readme", type=Path, action="append", default=[], help="a Markdown file whose tables are made anew"
    )
    chosen = parser.parse_args(arguments)
    if chosen.out is None and not chosen.readme:
        parser.error("nothing to write: give --out, or --readme")
    try:
        rows = read_rows(chosen.rows)
        if chosen.out is not None:
            print(f"{write(rows, chosen.out)} written")
            kept = chosen.out / FILE
            if not (kept.exists() and kept.samefile(chosen.rows)):
                shutil.copyfile(chosen.rows, kept)
        for readme in chosen.readme:
            changed = tradeoff_readme.update(readme, rows, chosen.rows)
            print(f"{readme}: {'tables made anew' if changed else 'already so'}")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

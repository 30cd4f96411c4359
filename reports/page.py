"""The report as one HTML page that needs nothing else, written from the rows.

The first page is the table of what compression costs. A figure that has no row is shown as "not measured".
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup

from . import aims, plot
from .bench import Results, Row
from .cases import DENSE, NUMPY, ONNX, ORIGINAL_TIME, TOLERANCE, TORCH
from .cases.model import CASE, LEAN, PEERS
from .quality import ALL_TARGETS, OURS, TARGETS, Target

TEMPLATES = Path(__file__).parent / "templates"
PAGE, QUALITY_PAGE = "index.html", "quality.html"
#: pictures of the other page have names that begin so; either page leaves the other's alone
QUALITY_PLOT = "quality-"
MISSING = "not measured"
SIGNIFICANT = 3


# --- words for numbers --------------------------------------------------------------------------------------


def megabytes(value: float | None) -> str:
    """Bytes in MB (10^6 bytes)."""
    return MISSING if value is None else f"{value / 1e6:.1f} MB"


def seconds(value: float | None) -> str:
    """A time in the unit that suits it."""
    if value is None:
        return MISSING
    value = float(f"{value:.{SIGNIFICANT}g}")
    unit, size = next(
        ((u, z) for u, z in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)) if value >= z), ("ns", 1e-9)
    )
    return f"{value / size:.0f} {unit}" if value >= 100 * size else f"{value / size:.{SIGNIFICANT}g} {unit}"


def plain(value: float | None, digits: int = SIGNIFICANT) -> str:
    """A number with so many digits that count."""
    return MISSING if value is None else f"{value:.{digits}g}"


def fixed(value: float | None, places: int = 4) -> str:
    """A number with so many places, never rounded up to 1."""
    if value is None:
        return MISSING
    step = 10.0**-places
    # a cosine that differs from 1 by rounding alone is 1
    return f"{1 - step:.{places}f}" if 1 - step < value < 1 - 1e-6 else f"{value:.{places}f}"


def times(value: float | None) -> str:
    """A ratio, e.g. 1.25×."""
    if value is None:
        return MISSING
    return f"{value:.0f}×" if value >= 100 else f"{value:.2f}×" if value >= 0.1 else f"{value:.2g}×"


def percent(value: float | None) -> str:
    """A fraction as a percentage."""
    return MISSING if value is None else f"{100 * value:.0f}%"


# --- verdicts -----------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """What a mean cosine means for a user. `level`: "good", "fair", "lost" or "gone"."""

    level: str
    words: str


#: (least mean cosine, verdict), best first
VERDICTS = (
    (0.999, Verdict("good", "as good as dense")),
    (0.99, Verdict("good", "very close to dense")),
    (0.95, Verdict("fair", "small differences")),
    (0.90, Verdict("fair", "noticeable loss; test it on your task")),
    (0.50, Verdict("lost", "quality is lost; do not use")),
)
GONE = Verdict("gone", "quality is gone; unusable")
LIMITS = {"lost": ("0.5 to ", VERDICTS[3][0]), "gone": ("below ", VERDICTS[4][0])}
UNKNOWN = Verdict("", MISSING)


def verdict(cosine_mean: float | None) -> Verdict:
    """The verdict on a mean cosine; "not measured" on None."""
    if cosine_mean is None:
        return UNKNOWN
    for least, found in VERDICTS:
        if cosine_mean >= least:
            return found
    return GONE


# --- the first table ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quality:
    """One line of the first table, as text."""

    name: str
    file: str
    smaller: str
    bits: str
    error: str
    mean: str
    least: str
    nearest: str
    time: str
    relative: str
    lean: str
    verdict: Verdict


def quality_line(results: Results, target: Target) -> Quality:
    """What was measured of one target."""

    def of(metric: str) -> float | None:
        return results.value("model", target.name, OURS, metric)

    file, dense = of("file_bytes"), results.value("model", "dense", OURS, "file_bytes")
    provider = f"{OURS} {target.name}"
    return Quality(
        name=target.name,
        file=megabytes(file),
        smaller=times(dense / file if file and dense else None),
        bits=plain(of("bits_per_weight")),
        error=plain(of("weight_error"), 2),
        mean=fixed(of("cosine_mean")),
        least=fixed(of("cosine_min")),
        nearest=percent(of("nearest_kept")),
        time=seconds(results.value("model", CASE, provider, "time")),
        relative=times(results.value("model", CASE, provider, f"speed_vs_{DENSE}")),
        lean=seconds(results.value("model", LEAN, provider, "time")),
        verdict=verdict(of("cosine_mean")),
    )


def baseline_lines(results: Results) -> list[Quality]:
    """The dense models: ours, which the others are measured against, and the peers'."""
    file = megabytes(results.value("model", "dense", OURS, "file_bytes"))
    lines = []
    for provider in (DENSE, *PEERS):
        ours = provider == DENSE
        against = 1.0 if ours else results.value("model", CASE, DENSE, f"speed_vs_{provider}")

        def cosine(metric: str, provider: str = provider, ours: bool = ours) -> float | None:
            return 1.0 if ours else results.value("model", "dense", provider, metric)

        lines.append(
            Quality(
                name=f"dense, {OURS if ours else provider}",
                file=file,
                smaller="1",
                bits="32",
                error="0",
                mean=fixed(cosine("cosine_mean")),
                least=fixed(cosine("cosine_min")),
                nearest=percent(cosine("nearest_kept")),
                time=seconds(results.value("model", CASE, provider, "time")),
                relative="1" if ours else times(1 / against if against else None),
                lean="",
                verdict=Verdict("", "the baseline" if ours else "a peer"),
            )
        )
    return lines


def findings(results: Results) -> list[str]:
    """The first table in sentences; each only when its figures were measured."""
    said = []
    dense = results.value("model", "dense", OURS, "file_bytes")
    measured = [
        (target, mean, size)
        for target in TARGETS
        if (mean := results.value("model", target.name, OURS, "cosine_mean")) is not None
        and (size := results.value("model", target.name, OURS, "file_bytes")) is not None
    ]
    close = [m for m in measured if m[1] >= VERDICTS[1][0]]
    if close and dense:
        target, mean, size = min(close, key=lambda m: m[2])
        said.append(
            f"The smallest file that stays very close to the dense model is {target.name}: {megabytes(size)} "
            f"instead of {megabytes(dense)} ({dense / size:.1f} times smaller), mean cosine {fixed(mean)}."
        )
    elif measured:
        said.append("No measured target stays very close to the dense model (mean cosine 0.99 or more).")
    for level, words, meaning in (
        ("lost", "Quality is lost", "their vectors differ too much from the model's to stand in for them"),
        ("gone", "Quality is gone", "their vectors no longer say what the texts say"),
    ):
        named = ", ".join(
            f"{t.name} ({fixed(mean)})" for t, mean, _ in measured if verdict(mean).level == level
        )
        if named:
            least, most = LIMITS[level]
            said.append(f"{words} (mean cosine {least}{most}) at {named}: {meaning}.")
    unrelated = results.value("model", "dense", OURS, "unrelated_cosine")
    if unrelated is not None:
        said.append(
            f"For comparison: the vectors of two unrelated texts have a cosine of {unrelated:.2f} on average."
        )
    speeds = []
    for peer in PEERS:
        value = results.value("model", CASE, DENSE, f"speed_vs_{peer}")
        if value is not None:
            speeds.append(f"{value:.2f} times as fast as {peer}")
    if speeds:
        listed = " and ".join([", ".join(speeds[:-1]), speeds[-1]] if speeds[1:] else speeds)
        rate = results.value("model", CASE, DENSE, "sentences_per_second")
        each = "" if rate is None else f" It embeds {rate:.0f} sentences per second."
        said.append(f"The dense rbe_gpu model is {listed} on the same threads.{each}")
    return said


# --- aims ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AimLine:
    """One line of the table of aims, as text. `level` is the verdict's, which the style sheet colours."""

    what: str
    limit: str
    worst: str
    where: str
    meeting: str
    verdict: Verdict


def aim_lines(results: Results) -> list[AimLine]:
    """Every aim with its worst case."""
    lines = []
    for found in aims.verdicts(results.rows):
        measured = found.value is not None
        share = percent if found.aim.at_most else times
        lines.append(
            AimLine(
                what=found.aim.what,
                limit=found.aim.limit_in_words,
                worst=share(found.value),
                where=found.where,
                meeting=f"{found.meeting} of {found.cases}" if measured else "",
                verdict=Verdict({aims.MET: "good", aims.MISSED: "lost"}.get(found.status, ""), found.status),
            )
        )
    return lines


# --- the tables of the ops ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """One line of an op's table, as text."""

    case: str
    provider: str
    time: str
    spread: str
    speeds: tuple[str, ...]
    error: str
    weight: str
    original: str


def op_tables(results: Results) -> list[tuple[str, list[Timing]]]:
    """(op, lines) of every op that was timed."""
    tables = []
    for op in dict.fromkeys(r.op for r in results.rows if r.op != "model"):
        lines = []
        for case in results.cases(op):
            for provider in results.providers(op, case, "time"):
                row = results.one(op, case, provider, "time")
                assert row is not None
                lines.append(_timing(results, row))
        if lines:
            tables.append((op, lines))
    return tables


def _timing(results: Results, row: Row) -> Timing:
    def of(metric: str) -> float | None:
        return results.value(row.op, row.case, row.provider, metric)

    ours = row.provider.startswith(OURS)
    # a peer is not compared with itself, and a dense weight has no weight error: nothing is missing there
    speeds = tuple(times(of(f"speed_vs_{peer}")) if ours else "" for peer in (TORCH, NUMPY))
    error, bits = of("weight_error"), of("bits_per_weight")
    weight = "" if bits is None else f"{bits:.3g} bits" + ("" if error is None else f", error {error:.2g}")
    off = of("relative_error")
    return Timing(
        case=row.case,
        provider=row.provider,
        time=seconds(row.p50),
        spread=f"{seconds(row.p20)} – {seconds(row.p80)}",
        speeds=speeds,
        error="" if off is None else f"{off:.1g}",
        weight=weight,
        original="" if (original := of(ORIGINAL_TIME)) is None else seconds(original),
    )


def encode_lines(results: Results) -> list[tuple[str, str, str, str, str]]:
    """(target, time to compress, to write, to read, to decode)."""
    metrics = ("encode_time", "write_time", "read_time", "decode_time")
    return [
        (t.name, *(seconds(results.value("model", t.name, OURS, m)) for m in metrics))  # type: ignore[misc]
        for t in ALL_TARGETS
    ]


# --- the page -----------------------------------------------------------------------------------------------


def template(name: str) -> jinja2.Template:
    """A template, which refuses names that it was not given."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def link(out: Path) -> None:
    """Let the two pages of a folder point at each other, each only while the other is there."""
    for name, other, words in (
        (PAGE, QUALITY_PAGE, "Quality per byte"),
        (QUALITY_PAGE, PAGE, "Speed and memory"),
    ):
        page = out / name
        if page.exists():
            inside = f'<a href="{other}">{words}</a>' if (out / other).exists() else ""
            source = page.read_text(encoding="utf-8")
            source = re.sub(r"(?s)(<!-- pages -->).*?(<!-- /pages -->)", rf"\g<1>{inside}\g<2>", source)
            page.write_text(source, encoding="utf-8")


def render(rows: Iterable[Row], plots: list[plot.Plot], quick: bool = False) -> str:
    """The whole page."""
    results = Results(rows)
    if not results.rows:
        raise ValueError("there are no rows; a report needs measurements")
    first = results.rows[0]
    texts, peer_texts = (
        next(
            (r.shape for r in results.rows if r.metric == "cosine_mean" and (r.provider == OURS) is ours),
            MISSING,
        )
        for ours in (True, False)
    )
    batch = results.one("model", CASE, DENSE, "time")
    return template("report.html").render(
        quick=quick,
        session=first,
        versions=first.versions.split(", "),
        torch=any(r.provider == TORCH for r in results.rows),
        onnx=any(r.provider == ONNX for r in results.rows),
        texts=texts,
        peer_texts=peer_texts,
        batch=MISSING if batch is None else f"{batch.case}, {batch.shape}",
        findings=findings(results),
        quality=[quality_line(results, t) for t in ALL_TARGETS],
        aims=aim_lines(results),
        baselines=baseline_lines(results),
        plots=[(p, Markup(p.svg())) for p in plots],
        encodes=encode_lines(results),
        ops=op_tables(results),
        peers=(TORCH, NUMPY),
        tolerance=TOLERANCE,
        verdicts=VERDICTS,
        gone=GONE,
        count=len(results.rows),
    )


def write(rows: Iterable[Row], out: Path, quick: bool = False) -> Path:
    """Draw the plots into `out/plots/` and write `out/index.html`. Returns the page's path."""
    rows = list(rows)
    plots = plot.draw(Results(rows))
    folder = out / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):  # a plot that is not drawn this time must not stay from the last
        if not old.name.startswith(QUALITY_PLOT):
            old.unlink()
    for drawn in plots:
        drawn.png(folder / f"{drawn.name}.png")
    page = out / PAGE
    page.write_text(render(rows, plots, quick), encoding="utf-8")
    link(out)
    return page

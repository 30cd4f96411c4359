"""The report in short: `report.md`, to paste into an issue, and `report.pdf`, to print."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure

from rbe_gpu import output

from ..harness.page import Finding, Table
from ..harness.plots import STYLE, Plot
from ..harness.rows import Results, of_cpu
from ..harness.text import MISSING
from . import summary

MARKDOWN, PDF = "report.md", "report.pdf"
QUICK = "Quick run: it shows that everything works; its figures are not for quoting."
PAPER = (11.69, 8.27)  # A4, inches
LINE = 118  # characters


def _machine(results: Results) -> str:
    first = of_cpu(results.rows)[0]
    commit = f", commit {first.commit}" if first.commit else ""
    return f"{first.device}, {first.threads} threads, {first.timestamp}{commit}"


def _parts(results: Results) -> Iterator[tuple[str, Sequence[Finding]]]:
    """(heading, findings) of the summary."""
    yield "The machine was", [summary.quiet(results.rows)]
    yield "Findings", summary.findings(results)
    yield "Where rbe_gpu loses", summary.losses(results)


def markdown(results: Results, costs: Table, targets: Table, quick: bool = False) -> str:
    """The summary, what compression costs and the targets, in Markdown."""
    lines = ["# rbe-gpu report", "", _machine(results), ""]
    if quick:
        lines += [f"**{QUICK}**", ""]
    for heading, findings in _parts(results):
        lines += [f"## {heading}", ""]
        lines += [f"- **{f.number}** {f.sentence}" for f in findings] or [f"- {MISSING}"]
        lines.append("")
    for heading, table in (("Quality and cost", costs), ("Developers' targets", targets)):
        lines += ["<details>", f"<summary>{heading}</summary>", "", table.markdown(), "", "</details>", ""]
    lines += [f"Versions: {results.rows[0].versions}", ""]
    return "\n".join(lines)


def pdf(results: Results, plots: Iterable[Plot], path: Path, quick: bool = False) -> None:
    """A page with the summary, and one for each plot."""
    with (
        matplotlib.rc_context(STYLE),
        output.replacing(path) as file,
        PdfPages(file, metadata={"Title": "rbe-gpu report", "CreationDate": None}) as pages,
    ):
        pages.savefig(_front(results, quick))
        for plot in plots:
            pages.savefig(plot.figure)


def _front(results: Results, quick: bool) -> Figure:
    """The summary as a figure."""
    figure = Figure(figsize=PAPER)
    y = 0.94
    figure.text(0.05, y, "rbe-gpu report", fontsize=20, weight="bold", va="top")
    y -= 0.055
    figure.text(0.05, y, _machine(results) + (f" · {QUICK}" if quick else ""), fontsize=9, va="top")
    y -= 0.045
    for heading, findings in _parts(results):
        figure.text(0.05, y, heading, fontsize=12.5, weight="bold", va="top")
        y -= 0.036
        for number, sentence in [*findings] or [Finding(MISSING, "")]:
            lines = textwrap.wrap(sentence, LINE)
            figure.text(0.05, y, number, fontsize=9.5, weight="bold", va="top", parse_math=False)
            figure.text(0.2, y, "\n".join(lines), fontsize=9.5, va="top", parse_math=False)
            y -= 0.012 + 0.0225 * max(1, len(lines))
        y -= 0.012
    return figure

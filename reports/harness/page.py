"""Self-contained HTML pages: tables and templates."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from rbe_gpu import output

from .plots import Plot
from .readme import head, line
from .rows import Row, of_cpu
from .significance import interval
from .text import GONE, MISSING, RATINGS, Rating, shown

TEMPLATES = Path(__file__).parents[1] / "templates"
SPEED_PAGE, QUALITY_PAGE, CHOICE_PAGE = "index.html", "quality.html", "small-good-fast.html"
QUALITY_PLOT, CHOICE_PLOT = "quality-", "small-good-fast-"
#: pages that may lie in one folder: name -> (prefix of its pictures, what others call it)
PAGES = {
    SPEED_PAGE: ("", "Speed and memory"),
    QUALITY_PAGE: (QUALITY_PLOT, "Quality per byte"),
    CHOICE_PAGE: (CHOICE_PLOT, "Small, good, fast"),
}


# --- tables -----------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """The head of a column, and the CSS class of its cells ("words": text; "n": not wrapped; "key": bold)."""

    head: str
    css: str = ""


class Number(NamedTuple):
    """A cell that is sorted by its value."""

    words: str
    value: float


@dataclass(frozen=True)
class Line:
    """A row of a table: its cells, and its CSS class ("base": the baseline, "ours")."""

    cells: tuple[str | Rating | Number, ...]
    css: str = ""


@dataclass(frozen=True)
class Table:
    """A table of a page; the first column holds the rows' names."""

    caption: str
    columns: tuple[Column, ...]
    lines: list[Line] = field(default_factory=list)
    css: str = ""

    def add(self, *cells: str | Rating | Number, css: str = "") -> None:
        """Append a row. `ValueError` when it does not have a cell for each column."""
        if len(cells) != len(self.columns):
            raise ValueError(f"{self.caption}: {len(cells)} cells for {len(self.columns)} columns: {cells}")
        self.lines.append(Line(cells, css))

    def markdown(self) -> str:
        """The table in Markdown."""

        def words(cell: str | Rating | Number) -> str:
            return (cell if isinstance(cell, str) else cell.words).replace("|", r"\|")

        lines = [line(words(cell) for cell in row.cells) for row in self.lines]
        return "\n".join([*head(line(c.head for c in self.columns)), *lines])

    def records(self) -> dict[str, dict[str, Any]]:
        """Name of a row -> head of a column -> cell."""
        heads = [c.head for c in self.columns]
        return {str(line.cells[0]): dict(zip(heads, line.cells, strict=True)) for line in self.lines}


def columns(*heads: str | tuple[str, str]) -> tuple[Column, ...]:
    """Columns from heads, or from (head, CSS class)."""
    return tuple(Column(h) if isinstance(h, str) else Column(*h) for h in heads)


#: most findings of a summary
MOST_FINDINGS = 5


class Finding(NamedTuple):
    """A number and the sentence that it is of."""

    number: str
    sentence: str


def row_table(rows: Iterable[Row]) -> Table:
    """All rows."""
    table = Table(
        "All rows",
        columns("op", "case", "provider", "metric", "median", "95% interval", "runs", "machine"),
        css="rows",
    )
    for r in rows:
        known = interval(r)
        table.add(
            r.op, r.case, r.provider, r.metric, Number(shown(r.p50, r.unit), r.p50),
            "" if known is None else f"{shown(known.low, r.unit)} – {shown(known.high, r.unit)}",
            Number(str(r.runs), r.runs), "disturbed" if r.disturbed else "",
        )  # fmt: skip
    return table


# --- pages ------------------------------------------------------------------------------------------------


def _run(rows: Sequence[Row]) -> dict[str, Any]:
    """The machine and the versions of rows; a run that was resumed may have several of each.

    The machine is the processor: a GPU is named where its figures are.
    """

    def each(column: str, rows: Sequence[Row] = rows) -> list[str]:
        return list(dict.fromkeys(value for r in rows if (value := str(getattr(r, column)))))

    stamps = sorted(each("timestamp"))
    return {
        "devices": each("device", of_cpu(rows)),
        "threads": each("threads"),
        "commits": each("commit"),
        "measured": " to ".join(dict.fromkeys((*stamps[:1], *stamps[-1:]))),
        "versions": list(dict.fromkeys(v for text in each("versions") for v in text.split(", "))),
    }


def render(template: str, rows: Sequence[Row], plots: Iterable[Plot], **names: Any) -> str:
    """A page from a template, which refuses undefined names.

    Raises
    ------
    ValueError
        There are no rows.
    """
    if not rows:
        raise ValueError("there are no rows; a report needs measurements")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawings = [(p, Markup(p.svg()), p.phone and Markup(p.phone.svg())) for p in plots]
    shared = {
        "ratings": RATINGS,
        "gone": GONE,
        "not_measured": MISSING,
        "count": len(rows),
        "run": _run(rows),
    }
    return environment.get_template(template).render(plots=drawings, **shared, **names)


def write(out: Path, name: str, source: str, plots: Iterable[Plot]) -> Path:
    """Write the page `out/name` and its pictures, `out/plots/*.png`; those of other pages stay. Returns its path."""
    folder = out / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):  # a plot that is not drawn this time must not stay from an earlier run
        if _page_of(old.name) == name:
            old.unlink()
    for plot in plots:
        plot.png(folder / f"{plot.name}.png")
    output.write_text(out / name, source)
    link(out)
    return out / name


def _page_of(picture: str) -> str:
    """The page that a picture belongs to."""
    fitting = (name for name, (prefix, _) in PAGES.items() if picture.startswith(prefix))
    return max(fitting, key=lambda name: len(PAGES[name][0]))


def link(out: Path) -> None:
    """Link the pages of a folder to each other, each only while it is there."""
    there = [name for name in PAGES if (out / name).exists()]
    for name in there:
        links = "".join(f'<a href="{other}">{PAGES[other][1]}</a>' for other in there if other != name)
        source = (out / name).read_text(encoding="utf-8")
        source = re.sub(r"(?s)(<!-- pages -->).*?(<!-- /pages -->)", rf"\g<1>{links}\g<2>", source)
        output.write_text(out / name, source)

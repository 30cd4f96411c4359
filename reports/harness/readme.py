"""Tables of a README that are generated from rows, between two markers and in the README's language.

- a line `<!-- NAME:begin -->`;
- the tables, and a line that names the rows they were made from, `reports/results/....csv`;
- a line `<!-- NAME:end -->`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rbe_gpu import output

from .rows import Results, Row

_SOURCE = re.compile(r"\(reports/results/([^/)\s]+\.csv)\)")
Words = Mapping[str, str]


@dataclass(frozen=True)
class Block:
    """The tables between the markers of one name.

    Attributes
    ----------
    name : of the markers
    make : (results, name of the rows file, words) -> the paragraphs
    english, korean : the words; a README.ko.md gets Korean ones
    """

    name: str
    make: Callable[[Results, str, Words], Iterable[str]]
    english: Words
    korean: Words

    @property
    def begin(self) -> str:
        return f"<!-- {self.name}:begin -->"

    @property
    def end(self) -> str:
        return f"<!-- {self.name}:end -->"

    @property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(rf"(?s)({re.escape(self.begin)}\n).*?({re.escape(self.end)})")

    def source_of(self, readme: Path) -> str:
        """The name of the rows file that a README's tables were made from.

        Raises
        ------
        ValueError
            It has no tables between markers, or they name no rows.
        """
        block = self._pattern.search(readme.read_text(encoding="utf-8"))
        named = None if block is None else _SOURCE.search(block[0])
        if named is None:
            raise ValueError(
                f"{readme} has no tables between {self.begin} and {self.end} that name their rows; generate them "
                f"with python -m rbe_gpu.reports ROWS.csv --readme {readme.name}"
            )
        return named[1]

    def words(self, readme: Path) -> Words:
        """The words of a README, by its name."""
        return self.korean if readme.name.endswith(".ko.md") else self.english

    def tables(self, rows: Iterable[Row], source: str, words: Words | None = None) -> str:
        """The Markdown between the markers. `source` : name of the rows file."""
        return "\n\n".join(self.make(Results(rows), source, self.english if words is None else words))

    def updated(self, text: str, inside: str) -> str:
        """A README's text with the tables between its markers replaced.

        Raises
        ------
        ValueError
            The markers are not there, each once and on lines of their own.
        """
        if text.count(self.begin) != 1 or text.count(self.end) != 1 or not self._pattern.search(text):
            raise ValueError(
                f"the tables belong between a line {self.begin} and a line {self.end}, each there once"
            )
        return self._pattern.sub(lambda m: f"{m[1]}\n{inside}\n\n{m[2]}", text)

    def update(self, readme: Path, rows: Iterable[Row], source: Path) -> bool:
        """Generate the tables of a README anew. Returns whether that changed it.

        Raises
        ------
        ValueError
            It has no markers.
        """
        before = readme.read_text(encoding="utf-8")
        try:
            after = self.updated(before, self.tables(rows, source.name, self.words(readme)))
        except ValueError as error:
            raise ValueError(f"{readme}: {error}") from None
        if after != before:
            output.write_text(readme, after)
        return after != before


def line(cells: Iterable[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def head(text: str) -> list[str]:
    """The two lines that begin a Markdown table, from the first of them."""
    return [text, "|---" * (text.count("|") - 1) + "|"]

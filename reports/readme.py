"""Tables in a README that are made from rows, each between two marks.

- a line `<!-- NAME:begin -->`;
- the tables, and a line that names the rows they were made from, `reports/results/....csv`;
- a line `<!-- NAME:end -->`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_SOURCE = re.compile(r"\(reports/results/([^/)\s]+\.csv)\)")


@dataclass(frozen=True)
class Block:
    """What stands between the marks of one name.

    Attributes
    ----------
    name : of the marks
    command : what makes the tables, for the message where there are none
    """

    name: str
    command: str

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
        """The name of the rows file that a README's tables say they were made from.

        Raises
        ------
        ValueError : it has no tables between marks, or they name no rows
        """
        block = self._pattern.search(readme.read_text(encoding="utf-8"))
        named = None if block is None else _SOURCE.search(block[0])
        if named is None:
            raise ValueError(
                f"{readme} has no tables between {self.begin} and {self.end} that name their rows; "
                f"{self.command.format(readme=readme.name)} makes them"
            )
        return named[1]

    def updated(self, text: str, inside: str) -> str:
        """A README's text with the tables between its marks replaced.

        Raises
        ------
        ValueError : the marks are not there, each once and on lines of their own
        """
        if text.count(self.begin) != 1 or text.count(self.end) != 1 or not self._pattern.search(text):
            raise ValueError(
                f"the tables belong between a line {self.begin} and a line {self.end}, each there once"
            )
        return self._pattern.sub(lambda m: f"{m[1]}\n{inside}\n\n{m[2]}", text)

    def update(self, readme: Path, inside: str) -> bool:
        """Put the tables into a README. Returns whether that changed it.

        Raises
        ------
        ValueError : it has no marks
        """
        before = readme.read_text(encoding="utf-8")
        try:
            after = self.updated(before, inside)
        except ValueError as error:
            raise ValueError(f"{readme}: {error}") from None
        if after != before:
            readme.write_text(after, encoding="utf-8")
        return after != before


def line(cells: Iterable[str]) -> str:
    """A row of a table."""
    return "| " + " | ".join(cells) + " |"


def head(text: str) -> list[str]:
    """The two lines that begin a table, from the first of them."""
    return [text, "|---" * (text.count("|") - 1) + "|"]

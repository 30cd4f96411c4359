"""What commands print: tables, JSON and progress bars."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from ._errors import printable

if TYPE_CHECKING:
    from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")]


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def size(nbytes: int) -> str:
    """A number of bytes in decimal units: "1.23 MB"."""
    from rich.filesize import decimal

    return decimal(nbytes, precision=2)


def escaped(name: str) -> str:
    """A name from a file with control characters escaped."""
    return json.dumps(name)[1:-1]


def new_table(*columns: str, title: str | None = None) -> Table:
    """A table; columns whose name starts with `>` are right-aligned."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in columns:
        name = column.lstrip(">")
        table.add_column(name, justify="right" if column.startswith(">") else "left", no_wrap=True)
    return table


def show(*parts: Table | str, file: TextIO | None = None) -> None:
    """Print tables and lines of text, on standard output or another stream. Names in the lines may hold any bytes."""
    from rich.console import Console

    stream = sys.stdout if file is None else file
    # a pipe has no width: do not wrap lines there
    console = Console(width=None if stream.isatty() else 200, markup=False, highlight=False, file=stream)
    for part in parts:
        console.print(printable(part) if isinstance(part, str) else part)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on standard error if that is a terminal; yields `update(name, done, total)`."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(title), BarColumn(), TextColumn("{task.percentage:.0f}% {task.fields[name]}"))
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(title, total=1, name="")

        def update(name: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, name=escaped(name).replace("[", "("))

        yield update

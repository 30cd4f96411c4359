"""Standard streams that are closed, full, or read by nobody any more."""

from __future__ import annotations

import io
import os
import sys
from typing import Any


class OutputError(Exception):
    """Standard output cannot be written. `quiet` if its reader has gone, as after `| head -1`."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"standard output: {error.strerror}")
        self.quiet = isinstance(error, BrokenPipeError)


class _Output(io.FileIO):
    """Standard output, whose errors are told from those of other files."""

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            raise OutputError(error) from None


def open_closed() -> None:
    """Make the standard streams usable, whatever the parent process has left of them.

    A closed descriptor would be taken by the next file that is opened, and that file receive what is printed. It is
    opened on the null device, the wrong way round: a command that reads standard input or writes standard output
    fails then, and one that does not is unaffected. Messages to a closed standard error are dropped.
    """
    for number, flags in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, flags)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    encoding = "utf-8" if sys.stdout is None else sys.stdout.encoding
    raw = _Output(1, "w", closefd=False)
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(raw), encoding, errors="backslashreplace", line_buffering=raw.isatty()
    )


def flush_output() -> None:
    """Write what is buffered. `OutputError` where that fails."""
    sys.stdout.flush()


def drop_output() -> None:
    """Send what is still buffered to the null device: Python writes it at exit, where an error is a traceback."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def say(line: str) -> None:
    """Print a line on standard error, if there is somebody to read it."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.close(null)

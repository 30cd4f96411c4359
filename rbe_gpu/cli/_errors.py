"""Errors of a command: one line on standard error and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer


def one_line(error: BaseException) -> str:
    """The message of an error on one line."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError) and not str(error):
        return "not enough memory"
    return " ".join(str(error).split()) or type(error).__name__


def fail(message: str) -> NoReturn:
    """Print a message and exit with code 1."""
    print(f"rbe-gpu: {message}", file=sys.stderr)
    raise typer.Exit(1)


@contextmanager
def errors_on_one_line() -> Iterator[None]:
    """Report errors that invalid input causes on one line, with exit code 1; other errors keep their traceback."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, ValueError, MemoryError) as error:
        fail(one_line(error))
    except KeyboardInterrupt:
        print("rbe-gpu: interrupted; nothing was written", file=sys.stderr)
        raise typer.Exit(130) from None

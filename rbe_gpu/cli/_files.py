"""Files that commands write."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from .. import output
from ._errors import fail

Force = Annotated[bool, typer.Option("--force", "-f", help="Overwrite the output file if it exists.")]


def check_output(out: Path, force: bool) -> Path:
    """Fail before any work if the output cannot be written, or is a file that exists and `force` is not set.

    Returns the path to write: `out`, or standard output for `-`.
    """
    path = Path("/dev/stdout") if str(out) == "-" else out
    place = output.destination(path)
    if not place.through and place.path.exists() and not force:
        fail(f"{out} exists; pass --force to replace it")
    return path


def message_stream(out: Path) -> TextIO:
    """Where to say what was written to `out`: not where it was written."""
    return sys.stderr if output.destination(out).descriptor == 1 else sys.stdout


def check_folder(out: Path) -> None:
    """Fail before any work if the output folder cannot be made or written to."""
    if out.exists() and not out.is_dir():
        fail(f"{out} is a file; name a folder")
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir():
        fail(f"{out} cannot be made: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        fail(f"no permission to write in {existing}")


def save_npy(out: Path, array: Any) -> None:
    """Write a .npy file; see `output.replacing`."""
    with output.replacing(out) as file:
        output.write_npy(file, array)

"""Files that commands read and write."""

from __future__ import annotations

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


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file; `-` is standard input."""
    raw = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def read_texts(path: Path) -> list[str]:
    """The non-blank lines of a file."""
    texts = [line for line in read_lines(path) if line.strip()]
    if not texts:
        fail(f"{path} holds no text")
    return texts


def save_npy(out: Path, array: Any) -> None:
    """Write a .npy file; see `output.replacing`."""
    import numpy as np
    from numpy.lib import format as npy

    array = np.ascontiguousarray(array)
    with output.replacing(out) as file:
        # not np.save: on a full disk that raises "4096 requested and 2016 written"
        npy.write_array_header_1_0(file, npy.header_data_from_array_1_0(array))
        file.write(memoryview(array).cast("B") if array.size else b"")

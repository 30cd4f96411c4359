"""Files that commands read and write."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ._errors import fail

Force = Annotated[bool, typer.Option("--force", "-f", help="Overwrite the output file if it exists.")]


def check_output(out: Path, force: bool) -> None:
    """Fail before any work if the output file cannot be created, or exists and `force` is not set."""
    if out.is_dir():
        fail(f"{out} is a folder; name a file")
    if not out.parent.is_dir():
        fail(f"the folder {out.parent} does not exist; make it first")
    if out.exists() and not force:
        fail(f"{out} exists; pass --force to replace it")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        fail(f"no permission to write in {out.parent}")


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
    """Write a .npy file atomically."""
    import numpy as np

    partial = out.with_name(f".{out.name[:100]}.{secrets.token_hex(8)}.partial")
    try:
        with open(partial, "xb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, out)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise

"""What commands read: models, and files of texts."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

from ._errors import fail

STANDARD_INPUT = "standard input"


def check_model(source: str) -> None:
    """Fail for what is there but no model, by its name as it was given."""
    if not source:
        fail("the name of the model is empty; name a model folder or a .rbe.safetensors file")
    path = Path(source).expanduser()
    if os.path.lexists(path) and not (path.is_dir() or path.is_file()):
        fail(f"{source}: not a regular file or folder")


def check_apart(out: Path, model: Path, texts: Path | None = None) -> None:
    """Fail if the output would replace what the command reads."""
    if not out.exists():
        return
    if texts is not None and texts.exists() and out.samefile(texts):
        fail(f"{out} is the file of texts; write the result to another file")
    if model.is_file() and out.samefile(model):
        fail(f"{out} is the model itself; write the result to another file")
    if model.is_dir() and model.resolve() in out.resolve().parents:
        fail(f"{out} is a file of the model; write the result to another file")


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file; `-` is standard input."""
    if str(path) == "-":
        name, raw = STANDARD_INPUT, _standard_input()
    else:
        name, raw = str(path), _contents(path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text (byte {error.start})") from None
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def read_texts(path: Path) -> list[str]:
    """The non-blank lines of a file."""
    texts = [line for line in read_lines(path) if line.strip()]
    if not texts:
        fail(f"{path} holds no text")
    return texts


def _standard_input() -> bytes:
    try:
        return sys.stdin.buffer.read()
    except OSError as error:
        raise OSError(error.errno, error.strerror, STANDARD_INPUT) from None


def _contents(path: Path) -> bytes:
    """A file, or what a pipe brings until it ends; a device such as /dev/zero may have no end."""
    with open(path, "rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if (stat.S_ISCHR(mode) or stat.S_ISBLK(mode)) and not (file.isatty() or path == Path(os.devnull)):
            fail(f"{path} is a device; name a file of texts")
        return file.read()

"""Real text that every Python installation already has: the docstrings of its standard library.

A text is one paragraph of a docstring, 60 to 600 characters long. The corpus is split once and for all by a
hash of each text: a quarter is held out for measuring quality, the rest may be used for calibration. So no
text is ever on both sides, whatever the Python version.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

MIN_CHARS, MAX_CHARS = 60, 600
#: folders that are not the library itself: test suites, and packages installed beside it
EXCLUDED = frozenset(
    {"test", "tests", "idlelib", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)
HELD_OUT_PARTS = 4  # one text of four is held out


def _paragraphs(source: bytes) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escape sequences in the library's own sources
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                yield " ".join(paragraph.split())


@lru_cache(maxsize=2)
def corpus(folder: Path | None = None) -> tuple[str, ...]:
    """All texts, without repeats, in the order of their files' paths.

    Parameters
    ----------
    folder : the library to read; default: this Python's standard library
    """
    root = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    files = (p for p in root.rglob("*.py") if not EXCLUDED.intersection(p.relative_to(root).parts))
    found: dict[str, None] = {}
    for path in sorted(files, key=lambda p: p.relative_to(root).as_posix()):
        try:
            for text in _paragraphs(path.read_bytes()):
                if MIN_CHARS <= len(text) <= MAX_CHARS:
                    found[text] = None
        except (SyntaxError, ValueError):
            continue  # a template or a file in another encoding; none of the library's modules
    return tuple(found)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def is_held_out(text: str) -> bool:
    """Whether a text belongs to the held-out quarter: the first byte of its SHA-256 is a multiple of 4."""
    return _digest(text)[0] % HELD_OUT_PARTS == 0


def _sample(texts: Iterator[str], count: int | None) -> list[str]:
    # in the order of the hashes: a sample of every module, and the same one on every run
    return sorted(texts, key=_digest)[:count]


def held_out(count: int | None = None) -> list[str]:
    """`count` held-out texts (all when None), the same ones on every run of one Python version."""
    return _sample((t for t in corpus() if is_held_out(t)), count)


def calibration(count: int | None = None) -> list[str]:
    """`count` texts (all when None) that are never held out."""
    return _sample((t for t in corpus() if not is_held_out(t)), count)

"""Real text that every Python installation already has: the docstrings of its standard library.

A text is one paragraph of a docstring, 60 to 600 characters long. The split is by docstring: a hash of the whole
docstring holds out one of four, with all its paragraphs; the rest may be used for calibration. Paragraphs of one
docstring speak of one thing in the same words, so a split by paragraph would measure on texts whose neighbours
were calibrated on. A paragraph that stands on both sides is held out, and left out of calibration.

The retrieval task asks with the first paragraph of a held-out docstring for the rest of the same docstring,
among the rests of all of them.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

MIN_CHARS, MAX_CHARS = 60, 600
#: of a first paragraph that asks: most are one sentence
QUERY_CHARS = (20, 600)
#: of a rest that is looked for. 2000 characters are some 500 tokens: a model that reads 256 sees half or more
DOCUMENT_CHARS = (60, 2000)
#: folders that are not the library itself: test suites, and packages installed beside it
EXCLUDED = frozenset(
    {"test", "tests", "idlelib", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)
HELD_OUT_PARTS = 4  # one docstring of four is held out

#: the paragraphs of one docstring, each with its whitespace made single spaces
Docstring = tuple[str, ...]


class RetrievalTask(NamedTuple):
    """Queries and documents; the answer of `queries[i]` is `documents[answers[i]]`."""

    queries: list[str]
    documents: list[str]
    answers: list[int]


def _docstrings(source: bytes) -> Iterator[Docstring]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escape sequences in the library's own sources
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            paragraphs = re.split(r"\n\s*\n", ast.get_docstring(node) or "")
            yield tuple(text for text in (" ".join(p.split()) for p in paragraphs) if text)


def docstrings(folder: Path | None = None) -> tuple[Docstring, ...]:
    """All docstrings, without repeats, in the order of their files' paths.

    Parameters
    ----------
    folder : the library to read; default: this Python's standard library
    """
    return _read(Path(sysconfig.get_path("stdlib")) if folder is None else folder)


@lru_cache(maxsize=2)
def _read(root: Path) -> tuple[Docstring, ...]:
    files = (p for p in root.rglob("*.py") if not EXCLUDED.intersection(p.relative_to(root).parts))
    found: dict[Docstring, None] = {}
    for path in sorted(files, key=lambda p: p.relative_to(root).as_posix()):
        try:
            found.update(dict.fromkeys(_docstrings(path.read_bytes())))
        except (SyntaxError, ValueError):
            continue  # a template or a file in another encoding; none of the library's modules
    found.pop((), None)
    return tuple(found)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def is_held_out(docstring: Docstring) -> bool:
    """Whether a docstring belongs to the held-out quarter.

    SHA-256 of all its paragraphs, joined by single spaces: the first byte is a multiple of 4.
    """
    return _digest(" ".join(docstring))[0] % HELD_OUT_PARTS == 0


def _texts(found: Iterable[Docstring]) -> set[str]:
    return {text for docstring in found for text in docstring if MIN_CHARS <= len(text) <= MAX_CHARS}


def _sample(texts: Iterable[str], count: int | None) -> list[str]:
    # in the order of the hashes: a sample of every module, and the same one on every run
    return sorted(texts, key=_digest)[:count]


def held_out(count: int | None = None, folder: Path | None = None) -> list[str]:
    """`count` held-out texts (all when None), the same ones on every run of one Python version."""
    return _sample(_texts(d for d in docstrings(folder) if is_held_out(d)), count)


def calibration(count: int | None = None, folder: Path | None = None) -> list[str]:
    """`count` texts (all when None) that occur in no held-out docstring."""
    kept = _texts(d for d in docstrings(folder) if is_held_out(d))
    return _sample(_texts(d for d in docstrings(folder) if not is_held_out(d)) - kept, count)


def retrieval(
    queries: int | None = None, documents: int | None = None, folder: Path | None = None
) -> RetrievalTask:
    """First paragraphs of held-out docstrings, and the rests among which each has its own to find.

    A docstring of two or more paragraphs gives its first one, and the others joined by a space. It takes part
    when both have the lengths of QUERY_CHARS and DOCUMENT_CHARS, and neither is that of a docstring before it.
    Every such rest is a document, held out or not; only held-out docstrings ask. Both lists are in the order
    of hashes, so that the answers lie anywhere.

    Parameters
    ----------
    queries : ask with the first so many (all when None)
    documents : look among the first so many (all when None); queries whose answer is not there are left out,
        so that about a quarter as many stay
    folder : the library to read, as in `docstrings`

    Raises
    ------
    ValueError
        A count is negative.
    """
    for name, count in (("queries", queries), ("documents", documents)):
        if count is not None and count < 0:
            raise ValueError(f"{name}={count} is negative; pass a count, or None for all")
    firsts: set[str] = set()
    asks: dict[str, str | None] = {}  # document -> its query, or None where its docstring is not held out
    for docstring in docstrings(folder):
        first, rest = docstring[0], " ".join(docstring[1:])
        if not (_within(first, QUERY_CHARS) and _within(rest, DOCUMENT_CHARS)):
            continue
        if first in firsts or rest in asks:
            continue
        firsts.add(first)
        asks[rest] = first if is_held_out(docstring) else None
    chosen = _sample(asks, documents)
    answers = {query: i for i, text in enumerate(chosen) if (query := asks[text]) is not None}
    asked = _sample(answers, queries)
    return RetrievalTask(asked, chosen, [answers[query] for query in asked])


def _within(text: str, limits: tuple[int, int]) -> bool:
    return limits[0] <= len(text) <= limits[1]

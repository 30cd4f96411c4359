"""A text corpus that every Python installation has: the docstrings of the standard library.

A text is one paragraph of a docstring, 60 to 600 characters long. The split into calibration and held-out texts is
by docstring, with all its paragraphs: a hash of the whole docstring holds out a quarter of them. Paragraphs of one
docstring share their subject and words, so a split by paragraph would leak calibration data into the evaluation. A
paragraph that occurs on both sides is held out.

Retrieval: the first paragraph of a held-out docstring is the query, the rest of the same docstring its document, and
the rests of all docstrings are searched.
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
#: length of a query, the first paragraph: most are one sentence
QUERY_CHARS = (20, 600)
#: length of a document, the rest. 2000 characters are some 500 tokens: a model of 256 tokens reads half or more
DOCUMENT_CHARS = (60, 2000)
#: folders that are not part of the library: test suites, and installed packages
EXCLUDED = frozenset(
    {"test", "tests", "idlelib", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)
HELD_OUT_PARTS = 4  # one docstring of four is held out

#: the paragraphs of one docstring, whitespace collapsed to single spaces
Docstring = tuple[str, ...]


class RetrievalTask(NamedTuple):
    """Queries and documents; `documents[answers[i]]` is the relevant document of `queries[i]`."""

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
    """All distinct docstrings, in the order of their files' paths.

    Parameters
    ----------
    folder : the library to read; default: the standard library of this Python
    """
    return _read(Path(sysconfig.get_path("stdlib")) if folder is None else folder)


@lru_cache(maxsize=2)
def _read(root: Path) -> tuple[Docstring, ...]:
    files = (p for p in root.rglob("*.py") if not EXCLUDED.intersection(p.relative_to(root).parts))
    distinct: dict[Docstring, None] = {}
    for path in sorted(files, key=lambda p: p.relative_to(root).as_posix()):
        try:
            distinct.update(dict.fromkeys(_docstrings(path.read_bytes())))
        except (SyntaxError, ValueError):
            continue  # a template or a file in another encoding; none of the library's modules
    distinct.pop((), None)
    return tuple(distinct)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def is_held_out(docstring: Docstring) -> bool:
    """Whether a docstring is in the held-out quarter.

    The first byte of SHA-256 of its paragraphs, joined by single spaces, is a multiple of 4.
    """
    return _digest(" ".join(docstring))[0] % HELD_OUT_PARTS == 0


def _texts(docstrings: Iterable[Docstring]) -> set[str]:
    return {text for docstring in docstrings for text in docstring if MIN_CHARS <= len(text) <= MAX_CHARS}


def _sample(texts: Iterable[str], count: int | None) -> list[str]:
    # ordered by hash: a sample across all modules, the same on every run
    return sorted(texts, key=_digest)[:count]


def held_out(count: int | None = None, folder: Path | None = None) -> list[str]:
    """`count` held-out texts (None: all), the same on every run of one Python version."""
    return _sample(_texts(d for d in docstrings(folder) if is_held_out(d)), count)


def calibration(count: int | None = None, folder: Path | None = None) -> list[str]:
    """`count` texts (None: all) that occur in no held-out docstring."""
    excluded = _texts(d for d in docstrings(folder) if is_held_out(d))
    return _sample(_texts(d for d in docstrings(folder) if not is_held_out(d)) - excluded, count)


def retrieval(
    queries: int | None = None, documents: int | None = None, folder: Path | None = None
) -> RetrievalTask:
    """Retrieval task: first paragraphs of held-out docstrings as queries, the rests of docstrings as documents.

    A docstring of two or more paragraphs is split into its first one and the others, joined by a space. It is used
    if both have lengths within QUERY_CHARS and DOCUMENT_CHARS and neither repeats that of an earlier docstring.
    Every such rest is a document, held out or not; only held-out docstrings give queries. Both lists are ordered by
    hash, so that the relevant documents are spread over the list.

    Parameters
    ----------
    queries : how many queries (None: all)
    documents : how many documents (None: all); queries whose document is not among them are dropped, which leaves
        about a quarter as many
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
    query_of: dict[str, str | None] = {}  # document -> its query, None where the docstring is not held out
    for docstring in docstrings(folder):
        first, rest = docstring[0], " ".join(docstring[1:])
        if not (_within(first, QUERY_CHARS) and _within(rest, DOCUMENT_CHARS)):
            continue
        if first in firsts or rest in query_of:
            continue
        firsts.add(first)
        query_of[rest] = first if is_held_out(docstring) else None
    chosen = _sample(query_of, documents)
    answers = {query: i for i, text in enumerate(chosen) if (query := query_of[text]) is not None}
    asked = _sample(answers, queries)
    return RetrievalTask(asked, chosen, [answers[query] for query in asked])


def _within(text: str, limits: tuple[int, int]) -> bool:
    return limits[0] <= len(text) <= limits[1]

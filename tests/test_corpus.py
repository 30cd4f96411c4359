"""The docstring corpus: which docstrings are held out, which may be calibrated on, and the retrieval task."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from rbe_gpu.models import corpus

LONG = "that is long enough to count as one text of the corpus, and says which one it is"
FILES = ("b.py", "a.py", "test/c.py", "pkg/sub/d.py", "site-packages/e.py")


def on_side(held_out: bool, make: Callable[[int], tuple[str, ...]]) -> tuple[str, ...]:
    """The first docstring of a numbered series that the hash puts on the side asked for."""
    return next(d for d in map(make, count()) if corpus.is_held_out(d) is held_out)


HELD = on_side(
    True, lambda i: (f"Hold out {i}: a paragraph {LONG}.", "Shared: a paragraph " + LONG, "Short.")
)
KEPT = on_side(False, lambda i: (f"Calibrate {i}: a paragraph {LONG}.", "Shared: a paragraph " + LONG))
#: the same rest, and the same first paragraph, as docstrings before them
SAME_REST = on_side(True, lambda i: (f"Another first paragraph {i}, {LONG}.", *HELD[1:]))
SAME_FIRST = on_side(True, lambda i: (HELD[0], f"Another rest {i}, {LONG}."))
OUT_OF_LIMITS = [
    on_side(True, lambda i: (f"Too short {i}", f"A rest {LONG}.")),
    on_side(True, lambda i: (f"Its rest is too long, number {i}.", f"{LONG}. " * 30)),
    on_side(True, lambda i: (f"Its rest is too short, number {i}.", "Short.")),
    on_side(True, lambda i: (f"There is no rest, number {i}; but {LONG}.",)),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of a few files, with docstrings whose sides are known."""
    root = tmp_path_factory.mktemp("library")
    for name in FILES:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""{name} is a paragraph {LONG}."""\n')
    (root / "broken.py").write_text("def")
    docstrings = [HELD, KEPT, SAME_REST, SAME_FIRST, *OUT_OF_LIMITS]
    # blank lines of a docstring may hold spaces, and lines may be broken anywhere
    bodies = ["\n   \n\n".join(p.replace(" that ", "\n    that  ") for p in d) for d in docstrings]
    (root / "z.py").write_text("".join(f"def f{i}():\n    '''{b}'''\n" for i, b in enumerate(bodies)))
    return root


# --- a small library ----------------------------------------------------------------------------------


def test_docstrings_leave_out_test_suites_and_unreadable_files(library: Path) -> None:
    found = [d[0].split()[0] for d in corpus.docstrings(library)]
    assert found[:3] == ["a.py", "b.py", "pkg/sub/d.py"]
    assert not {"test/c.py", "site-packages/e.py"} & set(found)


def test_paragraphs_end_at_blank_lines_and_have_single_spaces(library: Path) -> None:
    assert corpus.docstrings(library)[3:] == (
        HELD,
        KEPT,
        SAME_REST,
        SAME_FIRST,
        *map(_cleaned, OUT_OF_LIMITS),
    )


def _cleaned(docstring: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(" ".join(p.split()) for p in docstring)


def test_a_docstring_is_on_one_side_whole(library: Path) -> None:
    held, rest = corpus.held_out(folder=library), corpus.calibration(folder=library)
    assert HELD[0] in held
    assert KEPT[0] in rest
    assert HELD[1] == KEPT[1]  # a paragraph of both sides: held out, and not calibrated on
    assert HELD[1] in held
    assert HELD[1] not in rest
    assert HELD[2] not in held  # too short to be a text


def test_the_rule_of_the_hash() -> None:
    # the first bytes of SHA-256 of "two texts" and "three" are 0xdc and 0x8b, whatever the version of Python
    assert corpus.is_held_out(("two texts",))
    assert corpus.is_held_out(("two", "texts"))
    assert not corpus.is_held_out(("three",))


def test_retrieval_pairs_a_first_paragraph_with_its_rest(library: Path) -> None:
    queries, documents, answers = corpus.retrieval(folder=library)
    assert queries == [HELD[0]]
    assert documents[answers[0]] == " ".join(HELD[1:])
    # the rest of a calibration docstring is a document; repeats and lengths out of limits are not
    assert sorted(documents) == sorted([" ".join(HELD[1:]), KEPT[1]])


# --- this Python's library ----------------------------------------------------------------------------


def test_texts_are_real_and_of_the_right_lengths() -> None:
    texts = corpus.held_out() + corpus.calibration()
    assert len(texts) > 3000
    assert len(set(texts)) == len(texts)
    assert all(corpus.MIN_CHARS <= len(t) <= corpus.MAX_CHARS for t in texts)
    assert any("file system path" in t for t in texts)


def test_no_paragraph_is_on_both_sides_and_a_quarter_is_held_out() -> None:
    held, rest = set(corpus.held_out()), set(corpus.calibration())
    assert not held & rest
    parts: dict[bool, list[corpus.Docstring]] = {True: [], False: []}
    for docstring in corpus.docstrings():
        parts[corpus.is_held_out(docstring)].append(docstring)
    assert 0.23 < len(parts[True]) / len(corpus.docstrings()) < 0.27
    assert not any(p in rest for docstring in parts[True] for p in docstring)
    fit = {p for d in parts[False] for p in d if corpus.MIN_CHARS <= len(p) <= corpus.MAX_CHARS}
    assert fit - held == rest


def test_samples_are_prefixes_of_one_order() -> None:
    assert corpus.held_out(8) == corpus.held_out(64)[:8]
    assert corpus.calibration(5) == corpus.calibration()[:5]


def test_retrieval_of_the_library() -> None:
    queries, documents, answers = corpus.retrieval()
    assert len(documents) > 1500
    assert 0.2 < len(queries) / len(documents) < 0.3
    assert len(set(queries)) == len(queries)
    assert len(set(documents)) == len(documents)
    assert len(set(answers)) == len(answers) == len(queries)
    assert all(20 <= len(q) <= 600 for q in queries)
    assert all(60 <= len(d) <= 2000 for d in documents)
    held = {(d[0], " ".join(d[1:])) for d in corpus.docstrings() if corpus.is_held_out(d)}
    assert all((q, documents[a]) in held for q, a in zip(queries, answers, strict=True))
    rest = set(corpus.calibration())
    assert not rest.intersection(queries)
    # answers lie anywhere, not at the front
    assert 0.4 < sum(answers) / len(answers) / len(documents) < 0.6


def test_fewer_queries_and_documents_are_the_first_of_all() -> None:
    queries, documents, answers = corpus.retrieval()
    few = corpus.retrieval(queries=16)
    assert few == (queries[:16], documents, answers[:16])
    some = corpus.retrieval(documents=200)
    assert some.documents == documents[:200]
    assert some.queries == [q for q, a in zip(queries, answers, strict=True) if a < 200]
    assert [documents[a] for a in some.answers] == [some.documents[a] for a in some.answers]
    assert corpus.retrieval(3, 200).queries == some.queries[:3]
    assert corpus.retrieval(0, 0) == ([], [], [])
    with pytest.raises(ValueError, match=r"queries=-1 is negative"):
        corpus.retrieval(-1)

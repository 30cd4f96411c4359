"""The table of docs/architecture.md is that of the import graph."""

from __future__ import annotations

from . import import_graph


def test_the_table_of_the_page_is_current() -> None:
    page = import_graph.PAGE.read_text(encoding="utf-8")
    assert import_graph.updated(page) == page, "python -m tests.import_graph draw"


def test_transitive_reduction() -> None:
    pairs = [("a", "b"), ("b", "c"), ("a", "c"), ("a", "d")]
    assert import_graph.reduced(pairs) == [("a", "b"), ("a", "d"), ("b", "c")]

"""The table of settings: the page shows it, and it knows every key of MiniLM's files."""

from __future__ import annotations

import json

from rbe_gpu.models.settings import FILES, check_keys
from tests import real

from .table import PAGE, page_with_table


def test_the_page_shows_the_table() -> None:
    text = PAGE.read_text("utf-8")
    assert page_with_table(text) == text, "python -m tests.settings.table"


def test_files_of_minilm() -> None:
    for file in FILES:
        path = real.MODEL_DIR / file
        value = json.loads(path.read_text("utf-8")) if path.exists() else {}
        for item in value if isinstance(value, list) else [value]:
            check_keys(item, file)

"""The tables of settings in docs/models.md: `python -m tests.settings.table` writes them."""

from __future__ import annotations

from pathlib import Path

from rbe_gpu.models import gguf_config, settings

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
TABLES = {"settings": settings.table, "gguf": gguf_config.table}


def page_with_table(text: str) -> str:
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table()}\n\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page_with_table(PAGE.read_text("utf-8")), "utf-8")

"""The table of settings in docs/models.md: `python -m tests.settings.table` writes it."""

from __future__ import annotations

from pathlib import Path

from rbe_gpu.models.settings import table

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_BEGIN, _END = "<!-- settings:begin -->\n", "<!-- settings:end -->"


def page_with_table(text: str) -> str:
    before, rest = text.split(_BEGIN)
    return f"{before}{_BEGIN}\n{table()}\n\n{_END}{rest.split(_END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page_with_table(PAGE.read_text("utf-8")), "utf-8")

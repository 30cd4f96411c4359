"""The README's tables of speed: what rows say, and what was not measured; in both languages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rbe_gpu.reports import speed_readme
from rbe_gpu.reports.bench import Row, read_rows
from rbe_gpu.reports.cases import DENSE, TORCH, linear
from rbe_gpu.reports.cases.model import CASE, LEAN
from rbe_gpu.reports.page import MISSING
from rbe_gpu.reports.quality import FAST, OURS

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.ko.md")


def _row(op: str, case: str, provider: str, metric: str, value: float) -> Row:
    return Row(
        op,
        case,
        "cpu",
        provider,
        "",
        "float32",
        2,
        metric,
        "",
        value,
        value,
        value,
        1,
        "a machine",
        "",
        "",
        "",
    )


ROWS = [
    _row("linear", "768x768, 64 tokens", linear.sparse(0.05), f"speed_vs_{TORCH}", 5.25),
    _row("linear", "768x768, 64 tokens", DENSE, f"speed_vs_{TORCH}", 1.125),
    _row("model", CASE, TORCH, "sentences_per_second", 200.4),
    _row("model", CASE, DENSE, "sentences_per_second", 210.0),
    _row("model", CASE, f"{OURS} {FAST.name}", "sentences_per_second", 420.0),
    _row("model", LEAN, f"{OURS} {FAST.name}", f"speed_vs_{DENSE}", 2.004),
    _row("model", "dense", OURS, "file_bytes", 90.9e6),
    _row("model", "grade B", OURS, "file_bytes", 12.1e6),
    _row("model", "grade B", OURS, "cosine_mean", 0.95724),
    _row("model", LEAN, f"{OURS} grade B", "time", 0.1443),
]


@pytest.mark.parametrize("words", [speed_readme.ENGLISH, speed_readme.KOREAN])
def test_tables_say_what_the_rows_say(words: speed_readme.Words) -> None:
    made = speed_readme.tables(ROWS, "rows.csv", words)
    lines = made.splitlines()
    absent = f"{MISSING} | {MISSING} | {MISSING} | {MISSING}"
    assert f"| 768x768, 64 tokens | 5.25× | {absent} | 1.12× |" in lines
    assert f"| 3072x768, 64 tokens | {absent} | {MISSING} | {MISSING} |" in lines
    assert f"{TORCH} 200, {DENSE} 210, {OURS} {FAST.name} 420." in made
    assert "2.00×" in made.split("\n\n")[1]
    assert f"| grade B | 12.1 MB | {MISSING} | {MISSING} | 0.9572 | {MISSING} | 144 ms | {MISSING} |" in lines
    assert "[rows.csv](reports/results/rows.csv)" in lines[-1]
    assert "a machine" in lines[-1]
    heads = [lines[i - 1] for i, text in enumerate(lines) if text.startswith("|---")]
    for table in (made.split("\n\n")[0], made.split("\n\n")[2]):
        assert len({text.count("|") for text in table.splitlines()}) == 1
    assert len(heads) == 2


def test_a_later_row_counts() -> None:
    again = replace(ROWS[0], p50=6.0)
    assert "| 768x768, 64 tokens | 6.00× |" in speed_readme.tables([*ROWS, again], "rows.csv")


def test_the_command_fills_readmes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ROOT / "reports" / "results" / speed_readme.BLOCK.source_of(ROOT / READMES[0])
    for name in READMES:
        (tmp_path / name).write_text(
            f"a\n{speed_readme.BLOCK.begin}\n{speed_readme.BLOCK.end}\nb\n", encoding="utf-8"
        )
    assert speed_readme.main([str(rows), *(str(tmp_path / name) for name in READMES)]) == 0
    for name in READMES:
        made = (tmp_path / name).read_text(encoding="utf-8")
        assert made.startswith("a\n")
        assert made.endswith("b\n")
        assert speed_readme.BLOCK.source_of(tmp_path / name) == rows.name
    assert speed_readme.main([]) == 2
    assert "ROWS.csv" in capsys.readouterr().err
    (tmp_path / "none.md").write_text("no marks\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"none\.md: the tables belong between a line <!-- speed:begin -->"):
        speed_readme.main([str(rows), str(tmp_path / "none.md")])


@pytest.mark.parametrize("name", READMES)
def test_the_readmes_tables_are_those_of_the_committed_rows(name: str) -> None:
    readme = ROOT / name
    source = ROOT / "reports" / "results" / speed_readme.BLOCK.source_of(readme)
    assert source.is_file(), f"{name} names rows that are not there: {source.name}"
    made = speed_readme.tables(read_rows(source), source.name, speed_readme.language(readme))
    text = readme.read_text(encoding="utf-8")
    assert speed_readme.BLOCK.updated(text, made) == text

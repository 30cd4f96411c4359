"""The README's tables of speed: what rows say, and what was not measured; in both languages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rbe_gpu.reports import __main__ as command
from rbe_gpu.reports.harness import row_names
from rbe_gpu.reports.harness.readme import Words
from rbe_gpu.reports.harness.rows import Row, append_rows, read_rows
from rbe_gpu.reports.harness.text import MISSING
from rbe_gpu.reports.speed import page
from rbe_gpu.reports.speed.cases import DENSE, OURS, TORCH
from rbe_gpu.reports.speed.compression import FAST
from rbe_gpu.reports.speed.readme import BLOCK

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
    _row("linear", "768x768, 64 tokens", row_names.sparse(0.05), f"speed_vs_{TORCH}", 5.25),
    _row("linear", "768x768, 64 tokens", DENSE, f"speed_vs_{TORCH}", 1.125),
    _row("model", row_names.MODEL, TORCH, "sentences_per_second", 200.4),
    _row("model", row_names.MODEL, DENSE, "sentences_per_second", 210.0),
    _row("model", row_names.MODEL, f"{OURS} {FAST.name}", "sentences_per_second", 420.0),
    _row("model", row_names.MODEL_LEAN, f"{OURS} {FAST.name}", f"speed_vs_{DENSE}", 2.004),
    _row("model", "dense", OURS, "file_bytes", 90.9e6),
    _row("model", "grade B", OURS, "file_bytes", 12.1e6),
    _row("model", "grade B", OURS, "cosine_mean", 0.95724),
    _row("model", row_names.MODEL_LEAN, f"{OURS} grade B", "time", 0.1443),
]


@pytest.mark.parametrize("words", [BLOCK.english, BLOCK.korean])
def test_tables_say_what_the_rows_say(words: Words) -> None:
    made = BLOCK.tables(ROWS, "rows.csv", words)
    lines = made.splitlines()
    absent = f"{MISSING} | {MISSING} | {MISSING} | {MISSING}"
    assert f"| 768x768, 64 tokens | 5.25× | {absent} | 1.12× |" in lines
    assert f"| 3072x768, 64 tokens | {absent} | {MISSING} | {MISSING} |" in lines
    assert f"{TORCH} 200, {DENSE} 210, {OURS} {row_names.FAST} 420." in made
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
    assert "| 768x768, 64 tokens | 6.00× |" in BLOCK.tables([*ROWS, again], "rows.csv")


def test_the_command_fills_readmes_and_writes_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ROOT / "reports" / "results" / BLOCK.source_of(ROOT / READMES[0])
    for name in READMES:
        (tmp_path / name).write_text(f"a\n{BLOCK.begin}\n{BLOCK.end}\nb\n", encoding="utf-8")
    options = [option for name in READMES for option in ("--readme", str(tmp_path / name))]
    assert command.main([str(rows), *options]) == 0
    for name in READMES:
        made = (tmp_path / name).read_text(encoding="utf-8")
        assert made.startswith("a\n")
        assert made.endswith("b\n")
        assert BLOCK.source_of(tmp_path / name) == rows.name
    (tmp_path / "none.md").write_text("no markers\n", encoding="utf-8")
    assert command.main([str(rows), "--readme", str(tmp_path / "none.md")]) == 1
    assert "none.md: the tables belong between a line <!-- speed:begin -->" in capsys.readouterr().err
    monkeypatch.setattr(page, "PLOTS", ())
    append_rows(tmp_path / "few.csv", ROWS)
    assert command.main([str(tmp_path / "few.csv"), "--out", str(tmp_path / "out")]) == 0
    assert read_rows(tmp_path / "out" / "results.csv") == ROWS
    assert "grade B" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", READMES)
def test_the_readmes_tables_are_those_of_the_committed_rows(name: str) -> None:
    readme = ROOT / name
    source = ROOT / "reports" / "results" / BLOCK.source_of(readme)
    assert source.is_file(), f"{name} names rows that are not there: {source.name}"
    made = BLOCK.tables(read_rows(source), source.name, BLOCK.words(readme))
    text = readme.read_text(encoding="utf-8")
    assert BLOCK.updated(text, made) == text

"""Every bad command line: one line on standard error, the right exit code, nothing left behind, in bounded time."""

from __future__ import annotations

import os
import shlex
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import bad_inputs
from .bad_command_lines import DATA, USAGE
from .command import run

SECONDS = 20.0  # of processor time; most take a few hundredths


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, model_file: Path) -> dict[str, Path]:
    """What the words in braces of a command line stand for."""
    root = tmp_path_factory.mktemp("bad")
    for name in ("bad", "here"):
        (root / name).mkdir()
    (root / "texts.txt").write_text("a text\nand another one\n", "utf-8")
    bad_inputs.build(root / "bad", model_folder, model_file)
    return {
        "bad": root / "bad",
        "here": root / "here",
        "texts": root / "texts.txt",
        "model": model_folder,
        "file": model_file,
    }


def snapshot(places: dict[str, Path]) -> list[tuple[str, int, int]]:
    """Every folder, and every file with its size and time."""

    def walk(folder: Path) -> Iterator[tuple[str, int, int]]:
        for place, folders, files in os.walk(folder):
            for name in files:
                status = os.lstat(Path(place, name))
                yield str(Path(place, name)), status.st_size, status.st_mtime_ns
            yield from ((str(Path(place, name)), 0, 0) for name in folders)

    return sorted(
        entry for folder in (places["bad"].parent, places["model"].parent) for entry in walk(folder)
    )


def check(line: str, words: str, code: int, places: dict[str, Path]) -> None:
    before, start = snapshot(places), time.process_time()
    files = set(os.listdir(places["here"]))
    result = run(*(word.format(**places) for word in shlex.split(line)))
    left = [name for name in os.listdir(places["here"]) if name not in files]
    for name in left:  # the next line finds what this one found
        shutil.rmtree(places["here"] / name) if (places["here"] / name).is_dir() else os.unlink(
            places["here"] / name
        )
    assert not left
    assert result.exit_code == code, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("rbe-gpu: ")
    assert result.stderr.endswith("\n")
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr[:-1].isprintable()
    assert len(result.stderr) < 1200
    assert "internal error" not in result.stderr
    assert words.format(**places) in result.stderr
    assert snapshot(places) == before
    assert time.process_time() - start < SECONDS


def short(value: str) -> str:
    return value if len(value) < 80 else f"{value[:77]}..."


@pytest.mark.parametrize(("line", "words"), USAGE, ids=short)
def test_wrong_usage(line: str, words: str, places: dict[str, Path]) -> None:
    check(line, words, 2, places)


@pytest.mark.parametrize(("line", "words"), DATA, ids=short)
def test_wrong_data(line: str, words: str, places: dict[str, Path]) -> None:
    check(line, words, 1, places)


def test_there_are_enough_of_them() -> None:
    assert len(USAGE) + len(DATA) >= 120
    assert len({line for line, _ in (*USAGE, *DATA)}) == len(USAGE) + len(DATA)

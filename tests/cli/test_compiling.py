"""What a command does while kernels are compiled: a line on a terminal, and a second process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

from rbe_gpu.cli import _compiling
from rbe_gpu.models.load import load

from ..test_compress_model import make_model


def _compile() -> None:
    numba.njit(lambda x: x + 1)(1.0)


@pytest.mark.parametrize(("terminal", "after", "lines"), [(True, 0.0, 1), (True, 1e9, 0), (False, 0.0, 0)])
def test_one_line_on_a_terminal(
    terminal: bool,
    after: float,
    lines: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(_compiling, "_AFTER", after)
    with _compiling.compiling("no such model", None):
        for _ in range(3):
            _compile()
            time.sleep(0.001)
    assert capsys.readouterr().err.count("compiling kernels") == lines
    _compile()  # nobody listens any more
    assert not capsys.readouterr().err


def test_nothing_is_said_of_kernels_that_are_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(_compiling, "_AFTER", 0.0)
    add = numba.njit(lambda x: x + 1)
    add(1.0)
    with _compiling.compiling("no such model", None):
        add(2.0)
    assert not capsys.readouterr().err


def _embed(folder: Path, cache: Path, out: Path) -> float:
    """Embed two lines with the kernels kept in `cache`; returns the seconds."""
    texts = out.with_suffix(".txt")
    texts.write_text("One line of words for a model\nAnother one, a little longer than the first\n")
    command = [
        sys.executable,
        "-m",
        "rbe_gpu.cli",
        "embed",
        str(folder),
        str(texts),
        "-o",
        str(out),
        "--force",
    ]
    start = time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, "NUMBA_CACHE_DIR": str(cache)})
    return time.perf_counter() - start


def test_the_second_process_compiles_what_comes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(tmp_path / "model")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    process = _compiling._compile_later(str(folder), None)
    assert process is not None
    assert process.wait() == 0
    kept = {file.name.partition("-")[0].split(".")[0] for file in (tmp_path / "cache").rglob("*.nbi")}
    names = {file.name for file in (tmp_path / "cache").rglob("*.nbi")}
    for module in ("layer_norm", "mean_pool", "l2_normalize"):
        assert any(f"_parts.{module}." in name for name in names), (module, kept, sorted(names))
    assert any("_tiles" in name for name in names)  # of attention
    assert not any("embedding" in name or "dense_part" in name for name in names)


def test_results_are_those_of_one_process(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    outs = [tmp_path / f"{i}.npy" for i in range(2)]
    for out in outs:  # compiled by two processes, then all from the cache
        _embed(folder, tmp_path / "cache", out)
    alone = load(folder).embed(outs[0].with_suffix(".txt").read_text().splitlines())
    for out in outs:
        assert np.array_equal(np.load(out), alone)


def test_no_process_for_kernels_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(_compiling, "_compile_later", lambda *a: started.append(a))
    add = numba.njit(lambda x: x + 1)
    with _compiling.compiling("model", "int8"):
        add(1.0)
        add(1)
    with _compiling.compiling("model", None):
        add(2.0)
    assert started == [("model", "int8")]


def test_the_second_process_ends_with_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    monkeypatch.setattr(_compiling, "_compile_later", lambda *_: waiting)

    def fail() -> None:
        with _compiling.compiling("model", None):
            _compile()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert waiting.poll() is not None


def test_no_second_process_for_what_is_not_on_this_machine() -> None:
    assert _compiling._compile_later("owner/name-of-a-model", None) is None

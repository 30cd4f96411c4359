"""The line that a terminal shows while kernels are compiled."""

from __future__ import annotations

import sys
import time

import numba
import pytest

from rbe_gpu.cli import _compiling


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
    with _compiling.announced():
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
    with _compiling.announced():
        add(2.0)
    assert not capsys.readouterr().err

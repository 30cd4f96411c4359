"""What becomes of an error, a warning and an interrupt: one line, and an exit code."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import typer

from rbe_gpu.cli import _errors


def reported(command: Callable[[], Any], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = _errors.exit_code(command)
    shown = capsys.readouterr()
    assert shown.out == ""
    return code, shown.err


def raising(error: BaseException) -> Callable[[], NoReturn]:
    def command() -> NoReturn:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("two\nlines"), 1, "two lines"),
        (ValueError("\x1b[2J red \udcff \u202e"), 1, "\\x1b[2J red \\udcff \\u202e"),
        (ValueError(""), 1, "ValueError"),
        (OSError(28, "No space left on device", "out"), 1, "out: No space left on device"),
        (OSError(28, "No space left on device", b"o\xff"), 1, "o\\udcff: No space left on device"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (MemoryError(), 1, "not enough memory"),
        (_errors.Failure("a file is wrong"), 1, "a file is wrong"),
        (_errors.Failure("a variable is wrong", 2), 2, "a variable is wrong"),
        (typer.BadParameter("it is wrong"), 2, "it is wrong; see rbe-gpu --help"),
        (
            typer.BadParameter("it is wrong.", param_hint="--ratio"),
            2,
            "--ratio: it is wrong; see rbe-gpu --help",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors(error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert reported(raising(error), capsys) == (code, f"rbe-gpu: {line}\n")


@pytest.mark.parametrize(("value", "code"), [(None, 0), (0, 0), (3, 3), ("text", 0)])
def test_results(value: object, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert reported(lambda: value, capsys) == (code, "")


def test_a_long_message_loses_its_middle(capsys: pytest.CaptureFixture[str]) -> None:
    _, line = reported(raising(ValueError(f"begin {'x' * 10_000} end")), capsys)
    assert line.startswith("rbe-gpu: begin x")
    assert " ... " in line
    assert line.endswith("x end\n")
    assert len(line) < 1100


def test_a_warning_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("two\nlines", RuntimeWarning, stacklevel=1)

    previous = warnings.showwarning
    assert reported(command, capsys) == (0, "rbe-gpu: warning: two lines\n")
    assert warnings.showwarning is previous


def test_an_internal_error_is_one_line_and_its_traceback_on_request(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, line = reported(raising(TypeError("a bug")), capsys)
    assert code == 1
    assert line == "rbe-gpu: internal error, TypeError: a bug; to report it, run again with RBE_TRACEBACK=1\n"
    monkeypatch.setenv("RBE_TRACEBACK", "1")
    code, shown = reported(raising(TypeError("a bug")), capsys)
    assert code == 1
    assert shown.startswith("Traceback (most recent call last):\n")
    assert shown.endswith("TypeError: a bug\n")


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("the model has no tensor 'a'", "m: the model has no tensor 'a'"),
        ("m: the model has no tensor 'a'", "m: the model has no tensor 'a'"),
        ("m/config.json has no sizes", "m/config.json has no sizes"),
        ("model m2 has no sizes", "m: model m2 has no sizes"),
        ("config.json of m has no sizes", "config.json of m has no sizes"),
    ],
)
def test_an_error_names_the_file_that_it_is_about(
    message: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        with _errors.about("m"):
            raise ValueError(message)

    assert reported(command, capsys) == (1, f"rbe-gpu: {line}\n")

"""Interrupts at any time: exit code 130, at most one line, nothing left behind, and no lost interrupt."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from .command import ENV

LINES = ("", "rbe-gpu: interrupted\n", "rbe-gpu: interrupted; nothing was written\n")


def started(*command: object, folder: Path) -> subprocess.Popen[str]:
    """A process with the signals' default actions: a suite in the background ignores SIGINT, its children too."""

    def defaults() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=ENV,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=defaults,
    )


def loaded(process: subprocess.Popen[str], name: str) -> None:
    """Wait until the process has a shared library whose path contains `name`."""
    deadline = time.monotonic() + 120
    while name not in Path(f"/proc/{process.pid}/maps").read_text():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.001)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells by /proc what a process has loaded")
@pytest.mark.parametrize("library", ["_multiarray_umath", "_ml_dtypes_ext", "tokenizers", "llvmlite"])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_while_modules_are_imported(
    library: str, how: signal.Signals, model_file: Path, tmp_path: Path
) -> None:
    """NumPy's import prints a traceback of its own where an exception meets it, and raises another one."""
    (tmp_path / "t.txt").write_text("a text\n")
    with started(
        "-m", "rbe_gpu.cli", "embed", model_file, "t.txt", "-o", "v.npy", folder=tmp_path
    ) as process:
        loaded(process, library)
        process.send_signal(how)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert stderr in LINES
    assert os.listdir(tmp_path) == ["t.txt"]


def script(body: str) -> str:
    """A process that is as far as a command that works: signals are handled, the output is watched."""
    return "\n".join(
        [
            "import gc, os, signal, sys, time",
            "from pathlib import Path",
            "from rbe_gpu.cli import _errors, _signals",
            "_signals.start()",
            "def command():",
            textwrap.indent(textwrap.dedent(body), "    "),
            "_signals.end(_errors.exit_code(command))",
        ]
    )


def ended(body: str, folder: Path) -> tuple[int, str]:
    with started("-c", script(body), folder=folder) as process:
        stdout, stderr = process.communicate(timeout=60)
    assert stdout == ""
    return process.returncode, stderr


def test_what_is_half_written_is_removed(tmp_path: Path) -> None:
    body = """
    _errors.writes(Path("out"))
    with _signals.cleaning_up():
        try:
            Path("part").touch()
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGINT)  # an impatient user: it does not end the clean-up
            os.unlink("part")
    """
    assert ended(body, tmp_path) == (130, "rbe-gpu: interrupted; nothing was written\n")
    assert os.listdir(tmp_path) == []


def test_what_is_written_is_said_to_be_complete(tmp_path: Path) -> None:
    body = """
    _errors.writes(Path("out"))
    with _signals.cleaning_up():
        Path("out").touch()
        signal.raise_signal(signal.SIGINT)
    """
    assert ended(body, tmp_path) == (130, "rbe-gpu: interrupted; out is complete\n")


def test_an_interrupt_is_not_lost_in_a_destructor(tmp_path: Path) -> None:
    body = """
    class Object:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)
    with _signals.cleaning_up():
        Object()
        time.sleep(0.1)
        print("the command went on")
    """
    assert ended(body, tmp_path) == (130, "rbe-gpu: interrupted\n")


def test_an_interrupt_is_not_lost_in_an_except(tmp_path: Path) -> None:
    body = """
    with _signals.cleaning_up():
        try:
            signal.raise_signal(signal.SIGINT)
        except BaseException:
            raise ImportError("a module turned it into another error") from None
    """
    assert ended(body, tmp_path) == (130, "rbe-gpu: interrupted\n")


def test_an_interrupt_through_eval_ends_with_130(tmp_path: Path) -> None:
    """Python itself ends by SIGINT then, whatever is made of the exception."""
    body = """
    with _signals.cleaning_up():
        eval("signal.raise_signal(signal.SIGINT)")
    """
    assert ended(body, tmp_path) == (130, "rbe-gpu: interrupted\n")


def test_the_third_signal_ends_a_command_that_does_not(tmp_path: Path) -> None:
    body = """
    with _signals.cleaning_up():
        while True:
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                pass
    """
    assert ended(body, tmp_path)[0] == 130


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    body = """
    signal.raise_signal(signal.SIGHUP)
    raise ValueError("the command went on")
    """
    code = script(body).replace(
        "_signals.start()", "signal.signal(signal.SIGHUP, signal.SIG_IGN); _signals.start()"
    )
    with started("-c", code, folder=tmp_path) as process:
        _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (1, "rbe-gpu: the command went on\n")


def test_the_handlers_come_before_any_import_that_takes_time() -> None:
    """`rbe_gpu.cli`, whose `main` handles signals first, loads next to nothing before."""
    slow = "dataclasses inspect numpy pathlib platformdirs rich subprocess threading typer typing"
    code = f"import sys, rbe_gpu.cli; print(sorted(set({slow!r}.split()) & set(sys.modules)))"
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, check=True)
    assert done.stdout == "[]\n"

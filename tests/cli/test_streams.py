"""Standard streams that are closed, full, or read by nobody, and a disk that is full."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from .command import ENV

RBE_GPU = f"{sys.executable} -m rbe_gpu.cli"
CLOSED, FULL = "Bad file descriptor", "No space left on device"


def shell(line: str, folder: Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a line of bash, in which `rbe-gpu` is the command, in a folder."""
    line = line.replace("rbe-gpu", RBE_GPU)
    command = ["bash", "-c", f"set -o pipefail; {line}"]
    return subprocess.run(
        command, capture_output=True, text=True, env=ENV, cwd=folder, timeout=300, **options
    )  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("rbe-gpu --help >&-", f"standard output: {CLOSED}"),
        ("rbe-gpu --version >/dev/full", f"standard output: {FULL}"),
        ("rbe-gpu inspect FILE >&-", f"standard output: {CLOSED}"),
        ("rbe-gpu inspect FILE --json >&- </dev/null", f"standard output: {CLOSED}"),
        ("rbe-gpu inspect FILE >/dev/full", f"standard output: {FULL}"),
        ("rbe-gpu inspect FILE --json >/dev/full", f"standard output: {FULL}"),
        ("rbe-gpu info >&-", f"standard output: {CLOSED}"),
        ("rbe-gpu embed FILE - -o v.npy <&-", f"standard input: {CLOSED}"),
        ("rbe-gpu inspect absent >&-", "absent: No such file or directory"),
        ("rbe-gpu inspect absent 2>&-", None),
        ("rbe-gpu inspect absent 2>/dev/full", None),
        ("rbe-gpu inspect absent 2> >(true)", None),
        ("rbe-gpu inspect FILE >&- 2>&- <&-", None),
    ],
)
def test_a_stream_that_fails(line: str, message: str | None, model_file: Path, tmp_path: Path) -> None:
    done = shell(line.replace("FILE", str(model_file)), tmp_path)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert done.stderr == ("" if message is None else f"rbe-gpu: {message}\n")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("line", ["inspect FILE", "inspect FILE --json", "--help"])
@pytest.mark.parametrize("reader", ["head -c 1", "true"])
def test_a_reader_that_leaves(line: str, reader: str, model_file: Path, tmp_path: Path) -> None:
    """No message: the reader has what it wanted."""
    done = shell(f"rbe-gpu {line.replace('FILE', str(model_file))} | {reader}", tmp_path)
    assert done.stderr == ""
    assert done.returncode in (0, 1)  # 0: it was all in the pipe before the reader left
    assert len(done.stdout) == (1 if reader == "head -c 1" else 0)


def test_a_file_never_takes_the_place_of_a_closed_stream(model_file: Path, tmp_path: Path) -> None:
    """The first file that is opened would be standard input, output or error, and get what is printed."""
    (tmp_path / "t.txt").write_text("a text\n")
    done = shell(f"rbe-gpu embed {model_file} t.txt -o v.npy <&- >&- 2>&-", tmp_path)
    assert done.returncode == 1  # the summary could not be printed
    assert np.load(tmp_path / "v.npy").shape == (1, 96)
    assert sorted(os.listdir(tmp_path)) == ["t.txt", "v.npy"]


def limited(nbytes: int) -> Callable[[], None]:
    """No file of this process can be longer: a disk that is full, with another errno."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))


@pytest.mark.parametrize(
    "line",
    ["embed FILE t.txt -o out", "compress FOLDER -o out --codes dense-int4"],
)
def test_a_full_disk(line: str, model_file: Path, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a text\n" * 200)
    line = line.replace("FILE", str(model_file)).replace("FOLDER", str(model_folder))
    done = shell(f"rbe-gpu {line}", tmp_path, preexec_fn=limited(1 << 14))
    assert done.returncode == 1
    *warned, line = done.stderr.splitlines()
    assert line == "rbe-gpu: out: File too large"
    assert all("kernels cannot be kept" in line for line in warned)  # their files are larger too
    assert done.stdout == ""
    assert os.listdir(tmp_path) == ["t.txt"]

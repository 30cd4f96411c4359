"""Every command where nothing can be written: a read-only folder, a disk without room, /dev/full as its output."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rbe_gpu.cli import app
from rbe_gpu.models.compress import compress_model

from .. import real
from .command import ENV

#: command -> its line, and the file that it cannot write; None for commands that write none
COMMANDS: dict[str, tuple[str, str | None]] = {
    "compress": ("compress FOLDER -o out/file --codes dense-int4", "out/file"),
    "embed": ("embed FILE TEXTS -o out/file", "out/file"),
    "distill": (
        "distill FOLDER -o out/file --texts LINES --start START --ratio 6 --steps 1 --batch-size 8",
        "out/file",
    ),
    "report": ("report --quick --model FOLDER --out out", None),
    "tune": ("tune", "out/costs.json"),
    "inspect": ("inspect FILE", None),
    "generate": ("generate DECODER words -n 2 --json", None),
    "eval": ("eval FILE --against FOLDER --texts TEXTS --no-retrieval", None),
    "warmup": ("warmup FILE --arch 90", None),
    "info": ("info", None),
}
_WRITERS = {"compress", "embed", "distill", "report", "tune"}
_WITHOUT_CUPY = "pip install 'rbe-gpu[cuda13]'"
# the 20 seconds of `tune` are left out
_COMMAND = """
from rbe_gpu import cli, tuning
tuning.measure = lambda report=None: tuning.MatmulCosts()
cli.main()
"""
_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 24, 1, 2


def test_every_command_is_here() -> None:
    assert {command.name for command in app.registered_commands} == COMMANDS.keys()


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "texts").write_text("".join(f"text {i} of some\n" for i in range(12)), "utf-8")
    return tmp_path / "texts"


@pytest.fixture(scope="module")
def training(model_folder: Path) -> tuple[Path, Path]:
    """Real text, and a calibrated file to start from."""
    lines, start = model_folder.parent / "lines", model_folder.parent / "start"
    some = real.texts()[:160]
    lines.write_text("".join(f"{text}\n" for text in some), "utf-8")
    compress_model(model_folder, start, ratio=6.0, calibrate=some)
    return lines, start


@pytest.fixture
def ran(
    tmp_path: Path,
    texts: Path,
    model_folder: Path,
    model_file: Path,
    training: tuple[Path, Path],
    decoder_folder: Path,
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the line of a command in a folder that holds the folder `out`."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (tmp_path / "out").mkdir()

    def run(line: str, **options: object) -> subprocess.CompletedProcess[str]:
        for name, path in zip(
            ("FOLDER", "FILE", "TEXTS", "LINES", "START", "DECODER"),
            (model_folder, model_file, texts, *training, decoder_folder),
            strict=True,
        ):
            line = line.replace(name, str(path))
        env = {**ENV, "RBE_GPU_COSTS": "out/costs.json", "TMPDIR": str(scratch)}
        options = {"stdout": subprocess.PIPE, **options}
        return subprocess.run(
            [sys.executable, "-c", _COMMAND, *line.split()],
            cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True, timeout=300, check=False, **options,
        )  # type: ignore[call-overload,no-any-return]  # fmt: skip

    return run


def _as_a_user() -> None:
    """Take from root, of whom tests may be run, the right to write where permissions forbid it."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in (_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH):
            if libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0):
                raise OSError(ctypes.get_errno(), "prctl")


def _no_room() -> None:
    """No file of this process can have a byte: a disk that is full, with another errno."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def _said(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Lines of standard error, without warnings: the disk of the kernels is full too, and Numba locks files."""
    return [line for line in done.stderr.splitlines() if not line.startswith("rbe-gpu: warning: ")]


def _left_alone(tmp_path: Path) -> None:
    assert sorted(os.listdir(tmp_path)) == ["out", "scratch", "texts"]
    assert os.listdir(tmp_path / "out") == os.listdir(tmp_path / "scratch") == []


def _succeeds(name: str, done: subprocess.CompletedProcess[str]) -> None:
    """A command that writes no file does its work."""
    if name == "warmup" and done.returncode:  # on a machine without CuPy
        assert _WITHOUT_CUPY in done.stderr, done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert _said(done) == []
        assert done.stdout


@pytest.mark.skipif(sys.platform != "linux" and os.geteuid() == 0, reason="root writes everywhere")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_read_only_folder(
    name: str, ran: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    line, file = COMMANDS[name]
    (tmp_path / "out").chmod(0o555)
    tmp_path.chmod(0o555)
    done = ran(line, preexec_fn=_as_a_user)
    tmp_path.chmod(0o755)
    if name not in _WRITERS:
        _succeeds(name, done)
    else:
        assert done.returncode == 1, done.stderr
        (said,) = _said(done)
        folder = "no permission to write in "
        assert said in (
            f"rbe-gpu: {file}: Permission denied",
            f"rbe-gpu: {folder}out",
            f"rbe-gpu: {folder}{tmp_path / 'out'}",
        )
        assert done.stdout == ""
    _left_alone(tmp_path)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk(name: str, ran: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    line, file = COMMANDS[name]
    done = ran(line, preexec_fn=_no_room)
    if name not in _WRITERS:
        _succeeds(name, done)
    else:
        assert done.returncode == 1, done.stderr
        (said,) = _said(done)
        if name in ("report", "distill"):  # one measures in a folder of its own, PyTorch wants one
            assert "No usable temporary directory found in" in said
        else:
            assert said == f"rbe-gpu: {file}: File too large"
        assert done.stdout == ""
    _left_alone(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "report"])
def test_full_standard_output(
    name: str, ran: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """What was written stays: it is whole."""
    line, file = COMMANDS[name]
    with open("/dev/full", "w") as full:
        done = ran(line, stdout=full)
    assert done.returncode == 1
    if name != "warmup" or _WITHOUT_CUPY not in done.stderr:
        assert _said(done) == ["rbe-gpu: standard output: No space left on device"]
    assert os.listdir(tmp_path / "out") == ([] if file is None else [Path(file).name])

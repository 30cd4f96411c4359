"""Environment variables that cannot be honoured are refused by name, with exit code 2, before any work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rbe_gpu.cli import _environment
from rbe_gpu.cli._errors import Failure

from .command import ENV as ENV_OF_PROCESSES
from .command import process, run

WRONG = [
    *(("RBE_NUM_THREADS", v) for v in ("abc", "0", "-1", "1.5", "1e3", "2 3", "٠", "9" * 5000)),
    *(("NUMBA_NUM_THREADS", v) for v in ("", "abc", "0", "-1", "1.5", "99999999", "9" * 5000)),
    *(("NUMBA_THREADING_LAYER", v) for v in ("", "foo", "OMP")),
    *(("NUMBA_DISABLE_JIT", v) for v in ("1", "yes")),
    *(("RBE_GPU_ATTENTION", v) for v in ("wmma", "1", "mma,wgmma")),
    *(("RBE_GPU_COSTS", v) for v in ("/dev/zero", "/", f"{os.devnull}/costs", "x" * 300)),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_value(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    result = run("inspect", "absent")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"rbe-gpu: {name}=")
    assert result.stderr.count("\n") == 1
    assert run("inspect", "--help").exit_code == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RBE_NUM_THREADS", ""),
        ("RBE_NUM_THREADS", " 2 "),
        ("NUMBA_NUM_THREADS", "4"),
        ("NUMBA_THREADING_LAYER", "omp"),
        ("NUMBA_DISABLE_JIT", "0"),
        ("RBE_GPU_COSTS", ""),
        ("RBE_GPU_COSTS", os.devnull),
        ("RBE_GPU_COSTS", "not yet made"),
        ("RBE_ISA", ""),
        ("RBE_GPU_ATTENTION", ""),
        ("RBE_GPU_ATTENTION", "mma"),
        ("RBE_GPU_ATTENTION", "wgmma"),
    ],
)
def test_a_right_value(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    _environment.check()


def test_a_fifo_of_costs_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "costs")
    monkeypatch.setenv("RBE_GPU_COSTS", str(tmp_path / "costs"))
    with pytest.raises(Failure, match="not a regular file"):
        _environment.check()


@pytest.mark.parametrize("text", ["no JSON", "[]", "{}", "[" * 10_000, "x" * 100_000])
def test_costs_that_are_none_are_a_warning(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`rbe-gpu tune` replaces them, and an older version's file need not fit."""
    (tmp_path / "costs.json").write_text(text)
    monkeypatch.setenv("RBE_GPU_COSTS", str(tmp_path / "costs.json"))
    with pytest.warns(RuntimeWarning, match="the built-in costs are used"):
        _environment.check()


@pytest.mark.parametrize("value", ["foo", "avx512-vnni,avx2", "../x"])
def test_an_unknown_instruction_set(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: the variable is read once."""
    monkeypatch.setitem(ENV_OF_PROCESSES, "RBE_ISA", value)
    done = process("inspect", "absent")
    assert done.returncode == 2
    assert done.stderr.startswith(f"rbe-gpu: RBE_ISA={value!r} is not known; use one of ")
    assert done.stderr.count("\n") == 1


def test_an_instruction_set_that_this_processor_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    from rbe_gpu.cpu_fallback import isa

    lacking = "avx2" if isa.host().architecture == "aarch64" else "neon"
    monkeypatch.setitem(ENV_OF_PROCESSES, "RBE_ISA", lacking)
    done = process("inspect", "absent")
    assert done.returncode == 2
    assert done.stderr.startswith(f"rbe-gpu: RBE_ISA={lacking}: this processor (")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("value", ["abc", "0"])
def test_the_number_of_threads_is_read_by_a_process(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package reads it when it is imported; that is no traceback."""
    monkeypatch.setitem(ENV_OF_PROCESSES, "RBE_NUM_THREADS", value)
    done = process("inspect", "absent")
    assert done.returncode == 2
    assert done.stderr == (
        f"rbe-gpu: RBE_NUM_THREADS={value!r} is not a number of threads; set it to 1 or more, or unset it\n"
    )

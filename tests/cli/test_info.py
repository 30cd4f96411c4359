"""`rbe-gpu info`."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import numpy as np
import pytest

import rbe_gpu
from rbe_gpu import machine, registry

from .command import run


def test_info() -> None:
    result = run("info", "--json")
    assert result.exit_code == 0, result.stderr
    info = json.loads(result.stdout)
    assert info["rbe_gpu"] == rbe_gpu.__version__
    assert info["cpu"]["threads"] == os.cpu_count()
    assert info["versions"]["numpy"] == np.__version__
    assert info["numba_threads"] >= 1
    assert isinstance(info["missing"], list)
    assert bool(info["gpus"]) or any("CPU" in line for line in info["missing"])
    assert {*info["kernels"]["ops"], *info["kernels"]["without"]} == set(registry.OPS)
    shown = run("info")
    assert shown.exit_code == 0
    for word in ("CPU", "SIMD", "numpy", "GPU", "CUDA kernels", "softmax", "sm_75 and newer"):
        assert word in shown.stdout


def test_info_without_psutil(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.cores_and_memory()[1]
    monkeypatch.setitem(sys.modules, "psutil", None)
    info = machine.collect()
    assert (info["cpu"]["cores"], info["cpu"]["memory_bytes"]) == (None, None)
    assert any("rbe-gpu[report]" in line for line in info["missing"])


def gpu(capability: tuple[int, int] = (9, 0), cuda: str = "13.0") -> dict[str, Any]:
    major, minor = capability
    return {
        "name": "GPU",
        "memory_bytes": 80 * 10**9,
        "free_bytes": 60 * 10**9,
        "compute_capability": f"{major}.{minor}",
        "architecture": f"sm_{major}{minor}",
        "supported": capability >= (7, 5),
        "driver": "580.1",
        "cuda": cuda,
    }


def cupy_state(**given: Any) -> dict[str, Any]:
    state = {
        "works": True,
        "devices": 1,
        "cuda": "13.2",
        "nvrtc": "13.2",
        "architectures": [75, 90],
        "errors": {},
    }
    return state | given


def shown_info(
    monkeypatch: pytest.MonkeyPatch, gpus: list[dict[str, Any]], cupy: dict[str, Any], no_gpu: str = ""
) -> tuple[str, str]:
    """What `info` prints, and its lines of what is missing."""
    monkeypatch.setattr(machine, "gpus", lambda: (gpus, no_gpu))
    monkeypatch.setattr(machine, "cupy_state", lambda: cupy)
    result = run("info")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    assert json.loads(run("info", "--json").stdout)["gpus"] == gpus
    return result.stdout, "\n".join(machine.collect()["missing"])


def test_info_of_a_gpu_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, missing = shown_info(monkeypatch, [gpu()], cupy_state())
    for words in (
        "GPU, 60.00 GB free of 80.00 GB, compute capability 9.0, driver 580.1, CUDA 13.0",
        "kernels for sm_90: compiled when first called",
        "13.2, NVRTC 13.2",
        "sm_75 sm_90",
    ):
        assert words in shown
    assert "GPU" not in missing


@pytest.mark.parametrize(("cuda", "extra"), [("13.0", "cuda13"), ("12.8", "cuda12")])
def test_info_without_cupy_says_what_to_install(
    cuda: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = cupy_state(works=False, errors={"import": "CuPy is not installed"})
    _, missing = shown_info(monkeypatch, [gpu(cuda=cuda)], state)
    assert f"CuPy is not installed, so CuPy arrays cannot be used: pip install 'rbe-gpu[{extra}]'" in missing


def test_info_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, missing = shown_info(monkeypatch, [], cupy_state(devices=0), "no NVIDIA driver answers (NVML)")
    assert "no NVIDIA driver answers (NVML): everything runs on the CPU; for a GPU" in missing
    assert "pip install 'rbe-gpu[cuda13]'" in missing
    assert "pip install 'rbe-gpu[cuda13]'" in shown  # not cut off


def test_info_of_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, missing = shown_info(monkeypatch, [gpu((7, 0))], cupy_state())
    assert "kernels for sm_70: not supported" in shown
    assert "GPU 0 (GPU) has compute capability 7.0; the kernels need 7.5 or newer" in missing


def test_info_of_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = {"devices": "cudaErrorInsufficientDriver", "nvrtc": "libnvrtc.so.13 is not there"}
    state = cupy_state(devices=0, nvrtc=None, architectures=[], errors=errors)
    shown, missing = shown_info(monkeypatch, [gpu(cuda="12.4")], state)
    assert "reaches no GPU (cudaErrorInsufficientDriver); the driver has CUDA 12.4" in missing
    assert "pip install 'rbe-gpu[cuda12]', or a newer driver" in missing
    assert "CuPy finds no NVRTC" in missing
    assert "compiles for" in shown


def test_state_of_a_cupy_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert machine.cupy_state()["errors"] == {"import": "CuPy is not installed"}

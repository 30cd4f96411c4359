"""Every CUDA source compiles with NVRTC for every architecture, without a warning, and nothing spills."""

from __future__ import annotations

from pathlib import Path

import pytest

from rbe_gpu.gpu import _source

from .host import nvrtc

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "cuda_src").glob("*.cu")) + sorted((ROOT / "tests" / "host").glob("*.cu"))


def text(path: Path) -> str:
    return _source.expand(path.name, path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> None:
    """What the selected tests ask for, two at a time."""
    selected = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    nvrtc.compile_all(
        [(text(p["path"]), p["architecture"]) for p in selected if {"path", "architecture"} <= p.keys()]
    )


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("architecture", nvrtc.ARCHITECTURES)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_compiles(path: Path, architecture: int) -> None:
    """No message, no register spilled to memory, no array indexed into memory."""
    result = nvrtc.compile_source(text(path), architecture)
    assert not result.warnings
    assert result.kernels
    for name, usage in result.kernels.items():
        assert usage.registers, f"{name}: the log says nothing of registers"
        assert usage.spills == 0, f"{name}: {usage}"
        assert usage.stack == 0, f"{name}: {usage}"


def test_spills_are_seen() -> None:
    """A kernel that cannot keep its values in 64 registers."""
    spilling = """#include "types.cuh"
    extern "C" __global__ void __launch_bounds__(1024) spilling(const float* x, float* y) {
      float v[100];
      #pragma unroll
      for (int i = 0; i < 100; ++i) v[i] = x[threadIdx.x + 1024 * i];
      __syncthreads();
      #pragma unroll
      for (int i = 0; i < 100; ++i) y[threadIdx.x + 1024 * i] = v[i] - v[99 - i];
    }"""
    usage = nvrtc.compile_source(_source.expand("spilling.cu", spilling), 90).kernels["spilling"]
    assert usage.spills > 0
    assert usage.registers == 64


def test_errors_are_seen() -> None:
    """With the file and the line as they are in the source."""
    broken = '// first line\n#include "types.cuh"\nextern "C" __global__ void broken() { undefined(); }\n'
    with pytest.raises(nvrtc.NvrtcError, match=r"broken\.cu\(3\).*undefined"):
        nvrtc.compile_source(_source.expand("broken.cu", broken), 75)


def test_architectures_too_old_are_refused() -> None:
    with pytest.raises(nvrtc.NvrtcError):
        nvrtc.compile_source(_source.expand("empty.cu", '#include "types.cuh"\n'), 70)

"""warmup: which kernels a model needs, what is compiled, and the errors without a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from rbe_gpu import cli, warmup
from rbe_gpu.gpu import _execute, _launch, _load, _source
from rbe_gpu.layers import RBELinear
from rbe_gpu.models.bert import BertEncoder
from rbe_gpu.models.load import load
from rbe_gpu.transfer import to

from .host import stand_in
from .host.executor import HostExecutor
from .test_compress_model import make_model


def run(*arguments: Any) -> Result:
    result = CliRunner().invoke(cli.app, ["warmup", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


@pytest.fixture
def compressed(folder: Path, tmp_path: Path) -> Path:
    file = tmp_path / "m.rbe.safetensors"
    done = CliRunner().invoke(cli.app, ["compress", str(folder), "-o", str(file), "--grade", "B"])
    assert done.exit_code == 0
    return file


@pytest.fixture
def sparse(folder: Path, tmp_path: Path) -> Path:
    file = tmp_path / "s.rbe.safetensors"
    options = ("--density", "0.2", "--codes", "sparse-int8")
    done = CliRunner().invoke(cli.app, ["compress", str(folder), "-o", str(file), *options])
    assert done.exit_code == 0, done.stderr
    return file


def products(model: BertEncoder) -> list[RBELinear]:
    """The linear layers of a model."""
    return [
        linear
        for attention, _, ffn, _ in model.layers
        for linear in (attention.query, attention.key, attention.value, attention.output, ffn.up, ffn.down)
    ]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["folder", "compressed", "sparse"])
def test_ops_of_a_model_are_those_whose_kernels_a_batch_launches(
    kind: str, dtype: str, request: pytest.FixtureRequest
) -> None:
    """By default, and with the method that may use kernels of another source."""
    model = load(request.getfixturevalue(kind), dtype=dtype)
    launched: dict[str | None, set[str]] = {None: set(), "transform": set()}
    host = HostExecutor()
    method: str | None = None

    def run_and_note(launches: tuple[_launch.Launch, ...]) -> None:
        launched[method].update(launch.op for launch in launches)
        host(launches)

    with stand_in.installed() as cupy, _execute.executor(run_and_note):
        for method in launched:
            there = to(model, "cuda")
            for layer in products(there):
                layer.method = method
            there.embed(["one text", "and another, which is so much longer that many tokens are multiplied"])
            there.pool(there.forward(cupy.asarray(np.ones((2, 3), np.int64))))
    assert "linear_transform" not in launched[None]
    ops = warmup.ops_of(model)
    assert len(set(ops)) == len(ops)
    assert set(ops) == launched[None] | launched["transform"]
    assert ("linear_transform" in ops) == (kind == "sparse" or (kind, dtype) == ("compressed", "float32"))


# --- what NVRTC is asked for --------------------------------------------------------------------------


class NVRTC(ModuleType):
    """The part of cupy.cuda.nvrtc that `_load` uses; rejects a source that contains `refused`."""

    class NVRTCError(RuntimeError):
        pass

    def __init__(self, refused: str = "no source has this") -> None:
        super().__init__("cupy.cuda.nvrtc")
        self.refused = refused
        self.options: list[tuple[str, ...]] = []
        self.alive: set[int] = set()
        self.source = ""

    def getVersion(self) -> tuple[int, int]:
        return 13, 2

    def getSupportedArchs(self) -> tuple[int, ...]:
        return (70, 75, 80, 90)

    def createProgram(self, source: str, name: str, headers: tuple[()], includes: tuple[()]) -> int:
        assert name.endswith(".cu")
        assert not headers
        assert not includes
        self.source = source
        self.alive.add(1)
        return 1

    def compileProgram(self, program: int, options: tuple[str, ...]) -> None:
        self.options.append(options)
        if self.refused in self.source:
            raise self.NVRTCError

    def getCUBIN(self, program: int) -> bytes:
        return b"cubin"

    def getProgramLog(self, program: int) -> str:
        return "error: refused"

    def destroyProgram(self, program: int) -> None:
        self.alive.remove(program)


@pytest.fixture
def nvrtc(monkeypatch: pytest.MonkeyPatch) -> NVRTC:
    return installed(NVRTC(), monkeypatch)


def installed(nvrtc: NVRTC, monkeypatch: pytest.MonkeyPatch) -> NVRTC:
    cupy, cuda = ModuleType("cupy"), ModuleType("cupy.cuda")
    cuda.nvrtc = nvrtc  # type: ignore[attr-defined]
    for name, module in (("cupy", cupy), ("cupy.cuda", cuda), ("cupy.cuda.nvrtc", nvrtc)):
        monkeypatch.setitem(sys.modules, name, module)
    return nvrtc


def test_compile_only_asks_as_cupy_does(nvrtc: NVRTC) -> None:
    assert _load.compile_only("softmax", 90) == 5
    options = ("-std=c++17", "-ftz=true", "--device-as-default-execution-space", "-arch=sm_90")
    assert nvrtc.options == [options]
    assert nvrtc.source == _source.source("softmax")
    assert not nvrtc.alive


@pytest.mark.parametrize("architecture", [70, 89, 900])
def test_an_architecture_that_nvrtc_or_the_kernels_do_not_have(nvrtc: NVRTC, architecture: int) -> None:
    with pytest.raises(RuntimeError, match=r"not one that NVRTC 13\.2 compiles for: use 75, 80, 90"):
        _load.compile_only("softmax", architecture)


def test_a_source_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    nvrtc = installed(NVRTC("softmax"), monkeypatch)
    with pytest.raises(RuntimeError, match=r"softmax\.cu does not compile for sm_90:\nerror: refused"):
        _load.compile_only("softmax", 90)
    assert not nvrtc.alive


# --- the command --------------------------------------------------------------------------------------


@pytest.fixture
def every_op_has_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_source, "has", lambda op: True)


def test_without_cupy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    result = run(folder)
    assert result.exit_code == 1
    assert result.stderr.startswith(
        "rbe-gpu: CuPy is not installed; for a GPU: pip install 'rbe-gpu[cuda13]'"
    )


@pytest.mark.usefixtures("every_op_has_kernels")
def test_compiling_without_cupy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    result = run(folder, "--arch", 90)
    assert result.exit_code == 1
    assert (
        "whose NVRTC compiles the kernels, is not installed: pip install 'rbe-gpu[cuda13]'" in result.stderr
    )


def test_without_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def count() -> int:
        raise stand_in.CUDARuntimeError("cudaErrorInsufficientDriver: no driver")

    cupy = ModuleType("cupy")
    runtime = SimpleNamespace(getDeviceCount=count, CUDARuntimeError=stand_in.CUDARuntimeError)
    cupy.cuda = SimpleNamespace(runtime=runtime)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    result = run(folder)
    assert result.exit_code == 1
    assert result.stderr == "rbe-gpu: no GPU can be used: cudaErrorInsufficientDriver: no driver\n"


def test_a_version_without_the_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_source, "has", lambda op: op != "linear")
    with stand_in.installed():
        result = run(folder)
    assert result.exit_code == 1
    assert "no CUDA kernels for linear, which the model needs" in result.stderr


def test_device_and_arch_exclude_each_other(folder: Path) -> None:
    assert run(folder, "--device", 0, "--arch", 90).exit_code == 2


@pytest.mark.parametrize("device", [None, 1])
def test_a_model_is_made_warm(compressed: Path, device: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_in.RawModule, "compiled", [])
    monkeypatch.setenv("CUPY_CACHE_DIR", "somewhere")
    _load._module.cache_clear()
    with stand_in.installed():
        found = json.loads(
            run(compressed, "--json", *(() if device is None else ("--device", device))).stdout
        )
        shown = run(compressed)
        missing = run(compressed, "--device", 2)
    _load._module.cache_clear()
    ops = warmup.ops_of(load(compressed))
    assert stand_in.RawModule.compiled[: len(ops)] == [_source.source(op) for op in ops]
    assert found["ops"] == list(ops)
    assert found["device"] == f"cuda:{device or 0}"
    assert found["compiled"][0]["architecture"] == 90
    assert set(found["compiled"][0]["seconds"]) == set(ops)
    assert found["first_batch_seconds"] > 0
    assert found["second_batch_seconds"] > 0
    assert shown.exit_code == 0
    assert "cuda:0: Stand-in GPU; kept in somewhere" in shown.stdout
    assert missing.stderr == "rbe-gpu: cuda:2 is not there; this machine has 2 GPUs\n"


@pytest.mark.usefixtures("every_op_has_kernels", "nvrtc")
def test_architectures_are_compiled_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(_load, "compile_only", lambda op, a: asked.append((op, a)))
    shown = run(folder, "--arch", 75, "--arch", 90)
    assert shown.exit_code == 0, shown.stderr
    assert "nothing is kept" in shown.stdout
    ops = warmup.ops_of(load(folder))
    assert asked == [(op, a) for a in (75, 90) for op in ops]
    found = json.loads(run(folder, "--arch", 75, "--json").stdout)
    assert found["ops"] == list(ops)
    assert set(found["compiled"][0]["seconds"]) == set(ops)

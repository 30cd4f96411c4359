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
from rbe_gpu.codecs import GridCodes
from rbe_gpu.codecs.grid import GridRows
from rbe_gpu.container import load_file, save_file
from rbe_gpu.dispatch import Backend, numpy_backend
from rbe_gpu.gpu import _execute, _launch, _load, _source
from rbe_gpu.layers import RBELinear
from rbe_gpu.models.bert import BertEncoder
from rbe_gpu.models.bert_tensors import linear_weights
from rbe_gpu.models.load import load
from rbe_gpu.transfer import as_on_gpu, to

from .host import stand_in
from .host.executor import HostExecutor
from .test_compress_model import make_model

MODELS = Path(__file__).parent.parent / "reports" / "models"
SOFTMAX = _launch.Kernel("softmax", "softmax_f32_8")


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


@pytest.fixture
def int8(folder: Path, tmp_path: Path) -> Path:
    """A file that names all of its linear layers, whose inputs are rounded to int8."""
    plain, file = tmp_path / "p.rbe.safetensors", tmp_path / "i.rbe.safetensors"
    options = ("--codes", "dense-int4", "--transform", "none")
    done = CliRunner().invoke(cli.app, ["compress", str(folder), "-o", str(plain), *options])
    assert done.exit_code == 0, done.stderr
    tensors, config = load_file(plain)
    save_file(file, tensors, {**config, "int8_activations": list(linear_weights(config["config"]))})
    return file


def products(model: BertEncoder) -> list[RBELinear]:
    """The linear layers of a model."""
    return [
        linear
        for attention, _, ffn, _ in model.layers
        for linear in (attention.query, attention.key, attention.value, attention.output, ffn.up, ffn.down)
    ]


@pytest.mark.parametrize("method", [None, "transform"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["folder", "compressed", "sparse", "int8"])
def test_kernels_of_a_model_are_those_that_batches_launch(
    kind: str, dtype: str, method: str | None, request: pytest.FixtureRequest
) -> None:
    """By default, and with the method that may use kernels of another source."""
    model = load(request.getfixturevalue(kind), dtype=dtype)
    launched: set[_launch.Kernel] = set()
    host = HostExecutor()

    def run_and_note(launches: tuple[_launch.Launch, ...]) -> None:
        launched.update(launch.kernel for launch in launches)
        host(launches)

    for layer in products(model):
        layer.method = method
    with stand_in.installed() as cupy, _execute.executor(run_and_note):
        there = to(model, "cuda")
        there.embed(["one text", "and another, which is so much longer that many tokens are multiplied " * 4])
        there.embed(["x"])
        there.pool(there.forward(cupy.asarray(np.ones((2, 3), np.int64))))
    kernels = warmup.kernels_of(model)
    assert len(set(kernels)) == len(kernels)
    assert launched <= set(kernels)
    assert warmup.ops_of(kernels) == tuple(dict.fromkeys(k.op for k in kernels))
    assert set(warmup.ops_of(kernels)) == {kernel.op for kernel in launched}
    assert ("linear_integers" in warmup.ops_of(kernels)) == (kind == "int8")


def test_a_table_held_for_lookup_has_kernels() -> None:
    """Of minilm-r32, whose table of words takes less memory as `GridRows`: a GPU looks rows up in its codes."""
    model = load(MODELS / "minilm-r32.rbe.safetensors", dtype="float16")
    kernels = warmup.kernels_of(model)
    assert any(kernel.entry.startswith("embedding_") for kernel in kernels)
    table: Any = as_on_gpu(model).word_embeddings.weight
    assert type(table.codes) is GridCodes
    assert type(model.word_embeddings.weight.codes) is GridRows  # as before
    with stand_in.installed():
        moved: Any = to(load(MODELS / "minilm-r32.rbe.safetensors", dtype="float16"), "cuda")
        assert type(moved.word_embeddings.weight.codes) is GridCodes


@pytest.mark.parametrize(
    ("activations", "entries"),
    [
        ("float", {"linear_mma_codes", "linear_mma_codes_64", "linear_mma_parts"}),
        (None, {"linear_integers_inputs", "linear_integers_tiles"}),  # int8, as the file says
    ],
)
def test_kernels_of_large_batches(activations: str | None, entries: set[str]) -> None:
    """Whatever tiles they are computed in: default batches, shorter and longer ones."""
    model = load(MODELS / "minilm-r16.rbe.safetensors", dtype="float16", activations=activations)
    kernels = set(warmup.kernels_of(model))
    launched: set[_launch.Kernel] = set()

    def note(launches: tuple[_launch.Launch, ...]) -> None:
        launched.update(launch.kernel for launch in launches)

    there = as_on_gpu(model)
    with numpy_backend(Backend("cuda", "rbe_gpu.gpu")), _execute.executor(note), np.errstate(all="ignore"):
        for texts, tokens in ((32, 128), (16, 128), (8, 512), (1, 100), (64, 128), (64, 512)):
            there.forward(np.zeros((texts, tokens), np.int64))
    matmuls = {k.entry for k in launched if k.op.startswith("linear")}
    assert matmuls >= entries
    assert ("linear_mma_codes" in matmuls) == (activations == "float")
    assert launched <= kernels


def test_listing_kernels_computes_nothing(compressed: Path) -> None:
    """And leaves the model, and the backend of NumPy arrays, as they were."""
    model = load(compressed)
    before = model.embed(["some text"])
    with _execute.executor(lambda launches: pytest.fail("a kernel was run")):
        assert warmup.kernels_of(model)
    np.testing.assert_array_equal(model.embed(["some text"]), before)


def _refuse(kernel: _launch.Kernel) -> None:
    if kernel.entry == "refused":
        raise RuntimeError(f"{kernel.entry} does not compile")


def test_processes_share_the_kernels() -> None:
    kernels = [_launch.Kernel("add", f"add_{i}") for i in range(3)]
    kernels.append(_launch.Kernel("silu", "silu_f32"))
    seconds = warmup.compile_all(_refuse, kernels, 2)
    assert list(seconds) == ["add", "silu"]
    assert all(0 <= spent < 10 for spent in seconds.values())
    with pytest.raises(RuntimeError, match="refused does not compile"):
        warmup.compile_all(_refuse, [*kernels, _launch.Kernel("add", "refused")], 2)


def test_few_kernels_start_no_process() -> None:
    assert warmup.processes_for([_launch.Kernel("add", "add_f32")]) == 1


# --- what NVRTC is asked for --------------------------------------------------------------------------


class NVRTC(ModuleType):
    """The part of cupy.cuda.nvrtc that `_load` uses; rejects a source that contains `refused`."""

    class NVRTCError(RuntimeError):
        pass

    def __init__(self, refused: str = "no source has this", log: str = "") -> None:
        super().__init__("cupy.cuda.nvrtc")
        self.log = log
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
        return "error: refused" if self.refused in self.source else self.log

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
    assert _load.compile_only(SOFTMAX, 90) == 5
    options = ("-std=c++17", "-ftz=true", "--device-as-default-execution-space", "-arch=sm_90")
    assert nvrtc.options == [options]
    assert nvrtc.source == _source.kernel_source(SOFTMAX)
    assert not nvrtc.alive


@pytest.mark.parametrize("architecture", [70, 89, 900])
def test_an_architecture_that_nvrtc_or_the_kernels_do_not_have(nvrtc: NVRTC, architecture: int) -> None:
    with pytest.raises(RuntimeError, match=r"not one that NVRTC 13\.2 compiles for: use 75, 80, 90"):
        _load.compile_only(SOFTMAX, architecture)


@pytest.mark.filterwarnings("error")
def test_matmuls_that_are_serialized(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning names the kernel; what else NVRTC says of a kernel that compiles is passed over."""
    log = "ptxas info : (C7510) wgmma.mma_async instructions are serialized in function 'softmax_f32_8'"
    nvrtc = installed(NVRTC(log=log), monkeypatch)
    with pytest.warns(
        RuntimeWarning, match=r"softmax_f32_8 of softmax\.cu is slow on sm_90:\nptxas info"
    ) as told:
        assert _load.compile_only(SOFTMAX, 90) == 5
    assert len(told) == 1
    assert not nvrtc.alive
    installed(NVRTC(log="a remark"), monkeypatch)
    assert _load.compile_only(SOFTMAX, 90) == 5


def test_kernels_of_one_architecture_are_compiled_for_it(nvrtc: NVRTC) -> None:
    assert _load.compile_only(_launch.Kernel("attention_wgmma", "attention_wgmma_f16_64"), 90) == 5
    assert nvrtc.options[0][-1] == "-arch=sm_90a"


def test_a_source_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    nvrtc = installed(NVRTC("softmax"), monkeypatch)
    with pytest.raises(
        RuntimeError, match=r"softmax_f32_8 of softmax\.cu does not compile for sm_90:\nerror: refused"
    ):
        _load.compile_only(SOFTMAX, 90)
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
    monkeypatch.setattr(warmup, "processes_for", lambda kernels: 1)  # another process has no stand-in
    monkeypatch.setenv("CUPY_CACHE_DIR", "somewhere")
    _load._module.cache_clear()
    with stand_in.installed():
        found = json.loads(
            run(compressed, "--json", *(() if device is None else ("--device", device))).stdout
        )
        shown = run(compressed)
        missing = run(compressed, "--device", 2)
    _load._module.cache_clear()
    kernels = warmup.kernels_of(load(compressed))
    ops = warmup.ops_of(kernels)
    assert stand_in.RawModule.compiled[: len(kernels)] == [_source.kernel_source(k) for k in kernels]
    assert (found["ops"], found["kernels"]) == (list(ops), len(kernels))
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
    asked: list[tuple[_launch.Kernel, int]] = []
    monkeypatch.setattr(_load, "compile_only", lambda kernel, a: asked.append((kernel, a)))
    monkeypatch.setattr(warmup, "processes_for", lambda kernels: 1)
    shown = run(folder, "--arch", 75, "--arch", 90)
    assert shown.exit_code == 0, shown.stderr
    assert "nothing is kept" in shown.stdout
    kernels = warmup.kernels_of(load(folder))
    ops = warmup.ops_of(kernels)
    assert asked == [(kernel, a) for a in (75, 90) for kernel in kernels]
    found = json.loads(run(folder, "--arch", 75, "--json").stdout)
    assert found["ops"] == list(ops)
    assert set(found["compiled"][0]["seconds"]) == set(ops)


@pytest.mark.usefixtures("every_op_has_kernels", "nvrtc")
def test_each_architecture_has_its_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of attention those of Hopper, where the environment asks for them and heads are wide enough."""
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_attention_heads": 1}))
    asked: set[tuple[str, int]] = set()
    monkeypatch.setattr(_load, "compile_only", lambda kernel, a: asked.add((kernel.op, a)))
    monkeypatch.setattr(warmup, "processes_for", lambda kernels: 1)
    monkeypatch.setenv("RBE_GPU_ATTENTION", "wgmma")
    result = warmup.compiled_only(load(folder, dtype="float16"), (75, 90, 100))
    assert {(op, a) for op, a in asked if "attention" in op} == {
        ("attention", 75),
        ("attention_wgmma", 90),
        ("attention", 100),
    }
    assert {"attention", "attention_wgmma"} < set(result["ops"])
    for each in result["compiled"]:
        assert set(each["seconds"]) == {op for op, a in asked if a == each["architecture"]}
    monkeypatch.setattr(warmup, "compiled_only", lambda model, architectures: result)
    shown = run(folder, "--arch", 75, "--arch", 90, "--arch", 100)
    assert shown.exit_code == 0, shown.stderr
    (row,) = (line.split() for line in shown.stdout.splitlines() if "attention_wgmma" in line)
    assert [row.count("-"), row.count("0.00")] == [2, 1]

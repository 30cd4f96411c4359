"""The GPU check without a GPU: its stages on the stand-in for CuPy and PyTorch on the CPU, at sizes that show nothing
but that they work; and everything that is arithmetic.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rbe_gpu.reports import targets
from rbe_gpu.reports.gpu import (
    attention,
    bandwidth,
    cards,
    check,
    conformance,
    crossover,
    encoder,
    latency,
    minilm,
    plan,
    sanitizer,
    stage,
    weights,
)
from rbe_gpu.reports.gpu.device import SECONDS, Device, attempt, file_name, open_device, run_cases, sampled
from rbe_gpu.reports.gpu.stage import Options, Result
from rbe_gpu.reports.harness import measure, rows
from rbe_gpu.reports.harness.inputs import Inputs
from rbe_gpu.reports.harness.measure import OURS, Case, Provider, WrongResult
from rbe_gpu.reports.harness.text import FAILED, MISSING, PASSED
from rbe_gpu.reports.harness.timing import EventClock, WallClock, paired_times

from rbe_gpu import registry
from rbe_gpu.gpu import _execute

from . import real
from .host import capture, stand_in
from .host.executor import CAPABILITY, HostExecutor
from .test_compress_model import make_model

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return Inputs(real.MODEL_DIR)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    """The stand-in, and PyTorch on the CPU; a clock that calls once and does not look."""
    torch = pytest.importorskip("torch")
    session = rows.Session(2, "GPU H100 that is none", "versions", "commit", "now", "cuda")
    with capture.installed() as (cupy, _):
        yield Device(
            cupy,
            torch,
            WallClock(lambda: None),
            lambda to, source: np.copyto(to, source),
            session,
            tmp_path / "gpu.csv",
            cache_bytes=1 << 16,
            quick=True,
            seconds=0.0,
            torch_device="cpu",
        )


@pytest.fixture
def result(tmp_path: Path) -> Result:
    return Result("stage", tmp_path / "stage.json")


def measured(device: Device) -> rows.Results:
    return rows.Results(rows.read_rows(device.path))


# --- stages on the stand-in ---------------------------------------------------------------------------


def test_bandwidth(device: Device, inputs: Inputs, result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [c for c in bandwidth.cases() if c.cols == 768 or (c.cols == 4096 and c.dtype == "float16")]
    assert {c.op for c in chosen} == set(bandwidth.OURS_OF)
    monkeypatch.setattr(bandwidth, "QUICK_NBYTES", 1 << 13)
    monkeypatch.setattr(bandwidth, "cases", lambda quick: iter(chosen))
    bandwidth.measure(device, inputs, result)
    assert "failed" not in result.facts, result.lines
    results = measured(device)
    for case in chosen:
        providers = results.providers(case.op, case.name, "time")
        assert {"rbe_gpu", "copy"} <= set(providers)
        assert results.value(case.op, case.name, "rbe_gpu", "bandwidth_vs_copy") is not None
    assert results.value("softmax", "768 columns", "rbe_gpu", "speed_vs_PyTorch") is not None
    assert results.value("layer_norm", "4096 columns, residual", "rbe_gpu", "speed_vs_PyTorch") is not None
    assert json.loads(result.path.read_text())["lines"]


def test_decode(device: Device, inputs: Inputs, result: Result) -> None:
    weights.measure_decode(device, inputs, result)
    assert "failed" not in result.facts, result.lines
    results = measured(device)
    for case in weights.decodes(quick=True):
        assert results.value("decode", case.name, "rbe_gpu", "written_vs_copy") is not None


def test_linear(device: Device, inputs: Inputs, result: Result) -> None:
    weights.measure_linear(device, inputs, result)
    assert "failed" not in result.facts, result.lines
    results = measured(device)
    for case in weights.linears(quick=True):
        if case.activation_bits is not None:
            assert results.value("linear", case.name, "rbe_gpu", "rate") is not None
            assert results.value("linear", case.name, "rbe_gpu dense", "rate") is None
            continue
        for provider in ("rbe_gpu", "rbe_gpu dense"):
            assert results.value("linear", case.name, provider, "speed_vs_PyTorch") is not None


def test_crossover(device: Device, inputs: Inputs, result: Result) -> None:
    chosen = list(crossover.series(quick=True))
    assert set(chosen) < set(crossover.series())
    crossover.measure(device, inputs, result)
    assert "failed" not in result.facts, result.lines
    results = measured(device)
    for codes, dtype in chosen:
        for case in crossover.cases(codes, dtype, quick=True):
            for provider in ("rbe_gpu transform", "rbe_gpu decode"):
                assert results.value("linear", case.name, provider, "speed_vs_PyTorch") is not None
            assert results.value("linear", case.name, "rbe_gpu transform", "speed_vs_decode") is not None
        assert any(line.startswith(f"crossover, 256x384, {codes}, {dtype}: ") for line in result.lines)


@pytest.mark.parametrize(
    ("ratios", "tokens"),
    [
        ({1: 4.0, 16: 1.0, 64: 0.5}, 16.0),
        ({64: 0.5, 16: 2.0, 1: 3.0}, 32.0),  # half way of both, as powers
        ({1: 0.9, 16: 2.0, 64: 0.5}, 32.0),
        ({1: 3.0, 64: 1.5}, None),
        ({1: 0.9, 64: 0.5}, None),
        ({}, None),
    ],
)
def test_where_two_ways_cross(ratios: dict[int, float], tokens: float | None) -> None:
    found = crossover.crossing(ratios)
    assert found is None if tokens is None else found == pytest.approx(tokens)


def test_attention(device: Device, inputs: Inputs, result: Result) -> None:
    attention.measure(device, inputs, result)
    assert "failed" not in result.facts, result.lines
    results = measured(device)
    for case in attention.cases(quick=True):
        assert results.value("attention", case.name, "rbe_gpu", "rate") is not None
        assert results.value("attention", case.name, "rbe_gpu", "speed_vs_PyTorch") is not None
    # the CPU has no cuDNN: that is said, and not passed over
    assert any("PyTorch cudnn is left out: RuntimeError" in line for line in result.lines)
    assert not [line for line in result.lines if "wgmma" in line]


def test_both_kernels_of_attention(
    device: Device, inputs: Inputs, result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention.measure_kernels(device, inputs, result)
    assert "failed" not in result.facts, result.lines
    results = measured(device)
    for case in attention.cases(quick=True):
        beside = f"{case.name}, mma beside wgmma"
        for kernel in ("mma", "wgmma"):
            assert results.value("attention", beside, f"rbe_gpu {kernel}", "rate") is not None
        assert results.value("attention", beside, "rbe_gpu wgmma", "speed_vs_mma") is not None
        assert any(line.startswith(f"{case.name}: wgmma ") for line in result.lines)
    assert {size.seq for size in attention.cases(sequences=attention.BESIDE)} == {8192, 1024}
    monkeypatch.setattr(attention, "capability", lambda: (8, 0))
    attention.measure_kernels(device, inputs, result)
    assert result.lines[-1] == "not a GPU of compute capability 9.0: it has one kernel of attention"


def test_a_kernel_of_attention_that_writes_nothing_is_wrong(
    device: Device, inputs: Inputs, result: Result
) -> None:
    """Also where the other kernel, which is right, has run before it."""
    real_rows = [inputs.rows(f"2.{n}", 128).reshape(-1).astype(np.float16) for n in "qkv"]
    size = attention.Attention(1, 32, 1, 64, causal=True)
    for idle, kernel in (("attention_wgmma", "wgmma"), ("attention", "mma")):

        def run(launches: tuple[Any, ...], idle: str = idle) -> None:
            HostExecutor()(tuple(launch for launch in launches if launch.op != idle))

        with (
            _execute.executor(run, CAPABILITY),
            pytest.raises(WrongResult, match=f"rbe_gpu {kernel} is off by inf"),
        ):
            attention.both(device, size, real_rows)


@pytest.mark.parametrize(("asked", "runs"), [("wgmma", False), ("mma", True)])
def test_both_kernels_of_attention_must_run(
    asked: str, runs: bool, device: Device, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_rows = [inputs.rows(f"2.{n}", 128).reshape(-1).astype(np.float16) for n in "qkv"]
    monkeypatch.setattr("rbe_gpu.gpu.attention_wgmma.runs", lambda q: runs)
    with pytest.raises(RuntimeError, match=f"causal: {asked} is asked for, and attention.*_f16_64 of "):
        attention.both(device, attention.Attention(1, 32, 1, 64, causal=True), real_rows)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


def test_encoder(device: Device, folder: Path, result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    assert encoder.kernel_seconds(device, lambda: None) is None  # the profiler sees no GPU here
    monkeypatch.setattr(encoder, "kernel_seconds", lambda device, run: 1e-3)
    monkeypatch.setattr(device, "clock", Ticks({}, 1.1e-3))
    encoder.measure(device, Inputs(folder), result)
    assert "failed" not in result.facts, result.lines
    results = measured(device)
    assert results.value("model", "1 x 8 tokens", encoder.ROUNDED, "speed_vs_float_activations") is not None
    error = results.value("model", "1 x 8 tokens", encoder.ROUNDED, "relative_error")
    assert error is not None
    assert 1e-3 < error <= encoder.ROUNDED_ALLOWED  # activations are rounded
    for provider in ("rbe_gpu", "rbe_gpu float32", "rbe_gpu grade B"):
        assert results.value("model", "1 x 8 tokens", provider, "speed_vs_PyTorch") is not None
    assert results.value("model", "1 x 8 tokens", "rbe_gpu graph", "gpu_time") is not None
    assert results.value("model", "1 x 8 tokens", "rbe_gpu", "graph_vs_kernels") == pytest.approx(1.1)


def test_minilm(device: Device, folder: Path, result: Result, tmp_path: Path) -> None:
    minilm.measure(device, Options(tmp_path, tmp_path, folder), result)
    assert result.status == stage.PASSED, result.lines
    results = measured(device)
    for peer in ("CPU", "Candle"):
        error = results.value("model", "dense", "rbe_gpu", f"relative_error_vs_{peer}")
        assert error is not None
        assert error <= minilm.TOLERANCE


def test_a_case_that_fails_leaves_the_others_alone(device: Device, result: Result) -> None:
    def broken() -> None:
        raise WrongResult("softmax is off by 0.1\nand more")

    attempt(device, result, "first", broken)
    attempt(device, result, "second", lambda: None)
    assert result.lines == ["first: FAILED: WrongResult: softmax is off by 0.1", "second: measured"]
    assert result.facts["failed"] == ["first"]

    def lost() -> None:
        raise RuntimeError("cudaErrorIllegalAddress")

    device.clock = WallClock(lost)
    with pytest.raises(RuntimeError, match="cudaErrorIllegalAddress"):
        attempt(device, result, "third", broken)


def test_a_wrong_result_is_not_timed(device: Device) -> None:
    right = np.arange(4.0)
    assert measure.check("x", device.array(right.astype(np.float32)), right, 1e-6) == 0
    with pytest.raises(WrongResult, match=r"x is off by 0\.\d+ \(allowed 1e-06\)"):
        measure.check("x", device.array(np.array([0, 1, 2, 4], np.float32)), right, 1e-6)
    with pytest.raises(WrongResult):
        measure.check("x", device.array(np.full(4, np.nan, np.float32)), right, 1e-6)
    wrong = device.array(np.array([0, 1, 2, 4], np.float32))
    case = Case("softmax", "4", "(4,)", {OURS: Provider([lambda: wrong], right[[0, 3]], 1e-6)}, sample=[0, 3])
    with pytest.raises(WrongResult, match="softmax, 4, float32: rbe_gpu is off by"):
        device.measure(case)
    assert not device.path.exists()


def test_a_baseline_that_is_wrong_or_raises_is_left_out(device: Device, result: Result) -> None:
    right = np.arange(4.0)
    good, wrong = (device.array(np.float32(a)) for a in (right, right + 1))
    device.say = result.say

    def raises() -> Any:
        raise RuntimeError("no kernel of theirs\nand more")

    calls = iter((good, good, good))  # checked, warmed up, and no further
    providers = {
        OURS: Provider([lambda: good], right, 1e-6),
        "copy": Provider([lambda: good]),
        "PyTorch": Provider([lambda: wrong], right, 1e-6),
        "PyTorch flash": Provider([raises], right, 1e-6),
        "PyTorch unchecked": Provider([raises]),
    }
    case = Case("softmax", "4", "(4,)", providers, baselines=("PyTorch",))
    assert set(device.measure(case)) == {OURS, "copy"}
    assert [line.split(" (")[0] for line in result.lines] == [
        "softmax, 4, float32: PyTorch is left out: WrongResult: softmax, 4, float32: PyTorch is off by 0.535",
        "softmax, 4, float32: PyTorch flash is left out: RuntimeError: no kernel of theirs",
        "softmax, 4, float32: PyTorch unchecked is left out: RuntimeError: no kernel of theirs",
    ]
    providers = {
        OURS: Provider([lambda: good], right, 1e-6),
        "PyTorch": Provider([lambda: next(calls)], right, 1e-6),
    }
    assert set(device.measure(replace(case, providers=providers))) == {OURS}
    assert result.lines[-1].startswith("PyTorch is left out: StopIteration")
    assert {r.provider for r in rows.read_rows(device.path) if r.metric == "time"} == {OURS, "copy"}


@pytest.mark.parametrize("what", ["tensor", "functional"])
def test_no_stage_fails_because_pytorch_does(
    what: str, device: Device, inputs: Inputs, result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    if what == "tensor":
        monkeypatch.setattr(device, "tensor", raises)
    for f in ("linear", "softmax", "scaled_dot_product_attention"):
        monkeypatch.setattr(device.torch.nn.functional, f, raises)
    softmax = bandwidth.Pass("softmax", 768, "float16")
    attend = attention.Attention(1, 32, 1, 64, causal=True)
    size = weights.Linear(weights.QUICK_SHAPE, 1, "dense-int4")
    monkeypatch.setattr(bandwidth, "cases", lambda quick: iter([softmax]))
    monkeypatch.setattr(attention, "cases", lambda quick: iter([attend]))
    monkeypatch.setattr(weights, "linears", lambda quick: iter([size]))
    for measure_stage in (bandwidth.measure, attention.measure, weights.measure_linear):
        measure_stage(device, inputs, result)
    assert "failed" not in result.facts, result.lines
    assert sum("no kernel image" in line for line in result.lines) >= 3
    for case in (softmax, attend, size):
        op = getattr(case, "op", "linear" if case is size else "attention")
        assert measured(device).providers(op, case.name, "time")
        assert "PyTorch" not in measured(device).providers(op, case.name, "time")


def test_cases_are_given_what_time_is_left(device: Device, result: Result) -> None:
    device.quick, device.end = False, time.perf_counter() + 1000
    seconds: list[float] = []
    run_cases(device, result, [(str(i), lambda: seconds.append(device.seconds)) for i in range(3)])
    assert seconds == [SECONDS] * 3
    device.end = time.perf_counter() + 10
    run_cases(device, result, [(str(i), lambda: seconds.append(device.seconds)) for i in range(20)])
    assert 0.15 < seconds[3] <= 0.2
    device.end = time.perf_counter()
    run_cases(device, result, [("first", lambda: seconds.clear()), ("second", lambda: seconds.clear())])
    assert seconds
    assert result.facts["not_reached"] == ["first", "second"]
    assert result.lines[-1] == "no time was left for 2 of 2 cases: first, ..."


def test_the_gpu_of_this_machine(tmp_path: Path) -> None:
    with stand_in.installed():
        found = open_device(Options(tmp_path, tmp_path, commit="abc", quick=True))
    assert found.path == tmp_path / "stand-in-gpu.csv"
    assert found.session.device == "Stand-in GPU (sm_90, 2 multiprocessors, 80 GiB)"
    assert "CUDA 13.2, NVRTC 13.2" in found.session.versions
    assert (found.session.commit, found.cache_bytes, found.quick) == ("abc", 50 << 20, True)
    assert found.torch is None  # the CPU's PyTorch is not compared with


def test_names_of_files_and_samples() -> None:
    assert file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.csv"
    assert sampled(3, 16) == [0, 1, 2]
    assert sampled(1000, 5) == [0, 249, 499, 749, 999]


def test_buffers_are_more_than_the_cache(device: Device) -> None:
    device.quick = False
    assert device.copies(1 << 15) * (1 << 15) >= 4 * device.cache_bytes
    assert device.copies(1 << 40) == 2
    assert device.copies(1) == 64


@pytest.mark.parametrize(
    ("case", "moved"),
    [
        (bandwidth.Pass("softmax", 1024, "float16"), 2 * (1 << 20)),
        (bandwidth.Pass("layer_norm", 1024, "float32", residual=True), 4 * (1 << 20)),
        (bandwidth.Pass("swiglu", 1024, "float16"), 3 * (1 << 19)),
        (bandwidth.Pass("rope", 1024, "float16"), 2 * (1 << 20)),
        (bandwidth.Pass("add", 1024, "float16"), 3 * (1 << 20)),
        (bandwidth.Pass("mean_pool", 1024, "float16"), (1 << 20) + (1 << 13)),
        (bandwidth.Pass("embedding", 1024, "float16"), 2 * (1 << 20)),
    ],
)
def test_bytes_that_must_move(case: bandwidth.Pass, moved: int, inputs: Inputs) -> None:
    arrays = bandwidth.Arrays(inputs.rows("2.sum", 64), inputs.folder)
    assert bandwidth.host_operands(case, arrays, 1 << 20).moved == moved


def test_flops_of_attention() -> None:
    full = attention.Attention(2, 1024, 16, 128, causal=False)
    assert full.flops == 4 * 2 * 16 * 1024 * 1024 * 128
    assert attention.Attention(2, 1024, 16, 128, causal=True).flops == full.flops / 2
    shapes = {c.shape for c in attention.cases()}
    assert all(b * s == 16384 and h * d == 2048 for b, s, h, d in shapes)


# --- time ---------------------------------------------------------------------------------------------


class Ticks:
    """A clock: a call that gives its name takes `costs[name]`, any other `other`. It keeps who was measured."""

    def __init__(self, costs: dict[str, float], other: float = 0.0) -> None:
        self.costs = costs
        self.other = other
        self.order: list[str] = []
        self.firsts: list[tuple[str, int]] = []

    def synchronize(self) -> None:
        pass

    def seconds(self, calls: Any, count: int, first: int) -> float:
        name = calls[0]()
        if not isinstance(name, str):
            return self.other
        self.order.append(name)
        self.firsts.append((name, first))
        return self.costs[name]


def test_providers_take_turns_and_go_through_their_buffers() -> None:
    clock = Ticks({"a": 1e-3, "b": 4e-3})
    calls = {"a": [lambda: "a"] * 3, "b": [lambda: "b"]}
    times = paired_times(calls, clock=clock, seconds=0.0, least=3, short=0.0)
    assert times == {"a": [1e-3] * 3, "b": [4e-3] * 3}
    assert clock.order[2:] == ["a", "b", "b", "a", "a", "b"]  # after one look at each
    assert [f for n, f in clock.firsts[2:] if n == "a"] == [0, 2, 4]  # two calls fill a turn of 2 ms


def test_rounds_end_when_time_is_up() -> None:
    seen = iter(range(100))
    clock, calls = Ticks({"a": 1e-3}), {"a": [lambda: "a"]}
    by_time = paired_times(calls, clock=clock, seconds=10.0, least=2, now=lambda: next(seen))
    assert len(by_time["a"]) == 11
    assert len(paired_times(calls, clock=clock, seconds=1e9, least=2, most=7)["a"]) == 7


def test_calls_of_a_turn_are_limited() -> None:
    clock = Ticks({"a": 1e-6})
    paired_times({"a": [lambda: "a"]}, clock=clock, seconds=0.0, least=2, short=0.0, max_calls=100)
    assert [first for _, first in clock.firsts] == [0, 0, 100]


class FakeCuda:
    """Events that are 6 ms apart; launches of the spinning kernel are recorded."""

    def __init__(self) -> None:
        self.leads: list[int] = []
        event = lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: None)  # noqa: E731
        self.cuda = SimpleNamespace(Event=event, get_elapsed_time=lambda start, end: 6.0)

    def RawKernel(self, source: str, name: str) -> Any:
        assert f"void {name}(" in source
        return lambda grid, block, args: self.leads.append(int(args[0]))


def test_the_gpu_spins_while_calls_are_queued() -> None:
    cupy = FakeCuda()
    clock = EventClock(cupy)
    assert clock.seconds([lambda: None], 3, 0) == pytest.approx(2e-3)
    assert len(cupy.leads) == 1
    slow = [lambda: time.sleep(1e-3)]
    clock.seconds(slow, 3, 0)
    assert len(cupy.leads) > 2  # once too short, then long enough
    assert cupy.leads[-1] >= 3_000_000


def test_calls_that_wait_for_the_gpu_cannot_be_timed_with_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rbe_gpu.reports.harness.timing.MAX_LEAD", 1000)
    with pytest.raises(RuntimeError, match="queueing 2 calls took"):
        EventClock(FakeCuda()).seconds([lambda: time.sleep(1e-3)], 2, 0)


# --- targets ------------------------------------------------------------------------------------------


def row(
    op: str,
    case: str,
    metric: str,
    value: float,
    provider: str = "rbe_gpu",
    shape: str = "",
    gpu: str = "NVIDIA H100 80GB HBM3",
    architecture: str = "sm_90",
) -> rows.Row:
    session = rows.Session(2, f"{gpu} ({architecture})", "v", "c", "t", "cuda")
    return session.row(op, case, provider, metric, "", value, shape=shape, dtype="float16")


def outcome(name: str, *of: rows.Row) -> targets.Outcome:
    (target,) = (t for t in targets.GPU_TARGETS if t.name.startswith(name))
    return targets.outcome(target, of)


def test_targets_without_rows_are_not_measured() -> None:
    assert {o.status for o in targets.outcomes([], "cuda")} == {MISSING}
    assert all(o.line.startswith("not measured: ") for o in targets.outcomes([], "cuda"))
    assert {t.backend for t in targets.TARGETS} == {"cpu", "cuda"}


def test_the_worst_case_decides() -> None:
    shape = "(16384, 4096)"
    good = row("softmax", "4096 columns", "bandwidth_vs_copy", 0.95, shape=shape)
    bad = row("softmax", "16384 columns", "bandwidth_vs_copy", 0.85, shape=shape)
    small = row("softmax", "768 columns", "bandwidth_vs_copy", 0.1, shape="(64, 768)")
    assert outcome("softmax", good, small).status == PASSED
    found = outcome("softmax", good, bad)
    assert found.status == FAILED
    assert found.line.endswith("≥ 90%, worst 85% (16384 columns, float16); 1 of 2 cases pass")
    again = row("softmax", "16384 columns", "bandwidth_vs_copy", 0.93, shape=shape)
    assert outcome("softmax", good, bad, again).status == PASSED  # the last row of a case counts


def test_linear_counts_large_matrices_of_four_bits() -> None:
    case = "{}, {} tokens, dense-int4"
    products = [
        row("linear", case.format("4096x4096", 1), "speed_vs_PyTorch", 3.5),
        row("linear", case.format("4096x4096", 16), "speed_vs_PyTorch", 1.2),
        row("linear", case.format("256x384", 1), "speed_vs_PyTorch", 0.1),
        row("linear", "4096x4096, 1 tokens, dense-int8", "speed_vs_PyTorch", 0.1),
        row("linear", case.format("4096x4096", 1), "speed_vs_PyTorch", 0.1, provider="rbe_gpu dense"),
    ]
    assert outcome("linear, 4 bits, 4096x4096, 1 token", *products).status == PASSED
    assert outcome("linear, 4 bits, 4096x4096, 16 tokens", *products).status == FAILED
    assert outcome("linear, 4 bits, 4096x4096, 2048 tokens", *products).status == MISSING


@pytest.mark.parametrize("gpu", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
def test_attention_is_judged_on_every_gpu_of_the_architecture(gpu: str) -> None:
    case = "8192 tokens, head_dim 128, full"
    assert outcome("attention, full", row("attention", case, "rate", 510e12, gpu=gpu)).status == PASSED
    assert outcome("attention, full", row("attention", case, "rate", 490e12, gpu=gpu)).status == FAILED
    assert outcome("attention, causal", row("attention", case, "rate", 510e12, gpu=gpu)).status == MISSING
    other = row("attention", case, "rate", 510e12, gpu="NVIDIA A100", architecture="sm_80")
    assert outcome("attention, full", other).status == MISSING


@pytest.mark.parametrize(
    ("device", "name", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3 (sm_90, 132 multiprocessors, 79 GiB)", "H100", 3.35e12),
        ("NVIDIA H100 PCIe (sm_90)", "H100 PCIe", 2.0e12),
        ("NVIDIA H100 NVL (sm_90)", "H100 NVL", 3.9e12),
        ("NVIDIA H200 (sm_90, 132 multiprocessors, 140 GiB)", "H200", 4.8e12),
        ("NVIDIA A100-SXM4-80GB (sm_80)", None, None),
    ],
)
def test_cards_are_known_by_what_they_report(device: str, name: str | None, bandwidth: float | None) -> None:
    card = cards.recognised(device)
    assert (card and card.name, card and card.bandwidth) == (name, bandwidth)


def test_the_summary_compares_a_copy_with_the_data_sheet() -> None:
    def line(rate: float, gpu: str) -> str:
        copied = row("softmax", "4096 columns", "bandwidth", rate, provider="copy", gpu=gpu)
        return check.summary([], [copied]).splitlines()[-1]

    assert line(4.3e12, "NVIDIA H200").endswith("a copy moves 4.30 TB/s, 90% of the data sheet's 4.80")
    assert line(4.3e12, "NVIDIA H100 80GB HBM3").endswith("MORE than it can: the times are wrong")
    assert line(1.5e12, "NVIDIA A100").endswith("no known card")


def test_a_limit_from_above() -> None:
    assert (
        outcome("MiniLM, batch 1", row("model", "1 x 128 tokens", "graph_vs_kernels", 1.1)).status == PASSED
    )
    assert (
        outcome("MiniLM, batch 1", row("model", "1 x 128 tokens", "graph_vs_kernels", 1.3)).status == FAILED
    )


# --- what other programs print ------------------------------------------------------------------------


def test_outcomes_of_pytest() -> None:
    log = (
        "tests/test_conformance.py::test_value[cuda-silu-3_x_1-float32] PASSED [  1%]\n"
        "tests/test_conformance.py::test_value[cuda-silu-3_x_31-float32] FAILED [  2%]\n"
        "tests/test_conformance.py::test_out[cuda-silu-3_x_31-float32] ERROR [  3%]\n"
        "FAILED tests/test_conformance.py::test_value[cuda-silu-3_x_31-float32] - boom\n"
    )
    counts, bad = conformance.outcomes(log)
    assert counts == {"passed": 1, "failed": 1, "error": 1}
    assert bad == ["test_value[cuda-silu-3_x_31-float32]", "test_out[cuda-silu-3_x_31-float32]"]


@pytest.mark.parametrize(
    ("printed", "status", "seconds", "ends"),
    [
        ("tests/test_conformance.py::test_value[a] PASSED [100%]", 0, 30.0, stage.PASSED),
        ("tests/test_conformance.py::test_value[a] FAILED [100%]", 1, 30.0, stage.FAILED),
        ("ERROR: --backend cuda cannot be had here: no GPU", 4, 30.0, stage.FAILED),
        ("tests/test_conformance.py::test_value[a] PASSED [  1%]", 0, 0.3, stage.STOPPED),
    ],
)
def test_conformance_of_every_op(
    printed: str,
    status: int,
    seconds: float,
    ends: str,
    tmp_path: Path,
    result: Result,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[str] = []

    def command(name: str, rehearse: bool) -> list[str]:
        started.append(name)
        wait = 60 if ends == stage.STOPPED else 0
        body = f"import os, sys, time; print({printed!r}, flush=True); "
        body += "print('prefers', os.environ.get('RBE_GPU_ATTENTION') or 'nothing', flush=True); "
        return [sys.executable, "-c", f"{body}time.sleep({wait}); sys.exit({status})"]

    monkeypatch.setenv("RBE_GPU_ATTENTION", "wgmma")  # what the check itself has, its processes have not
    monkeypatch.setattr(conformance, "command", command)
    monkeypatch.setattr(conformance, "capability", lambda: (9, 0))
    options = Options(tmp_path, tmp_path, real.MODEL_DIR, jobs=3, seconds=seconds)
    conformance.run(options, result)
    assert result.status == ends
    if ends == stage.STOPPED:
        assert len(started) == 3
        assert any("no time was left" in line for line in result.lines)
    else:
        assert sorted(started) == sorted([*registry.OPS, conformance.ARRAYS, conformance.WGMMA])
        for log in tmp_path.glob("conformance-*.log"):
            preferred = "wgmma" if log.name == "conformance-attention-wgmma.log" else "nothing"
            assert f"prefers {preferred}\n" in log.read_text(), log.name
        assert len([*tmp_path.glob("conformance-*.log")]) == len(started)


def test_what_compute_sanitizer_says() -> None:
    assert sanitizer.findings("memcheck", "========= ERROR SUMMARY: 0 errors\n") == 0
    assert sanitizer.findings("memcheck", "========= ERROR SUMMARY: 12 errors\n") == 12
    hazards = "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n"
    assert sanitizer.findings("racecheck", hazards) == 2
    assert sanitizer.findings("racecheck", "========= Error: process didn't terminate successfully\n") is None
    assert sanitizer.kernels("every_kernel: softmax: 9 calls\nevery_kernel: 112 kernels\n") == 112
    assert sanitizer.kernels("every_kernel: softmax: 9 calls\n") is None


def fake_sanitizer(folder: Path, summary: str, kernels: str, status: int) -> str:
    path = folder / "compute-sanitizer"
    path.write_text(
        f'#!/bin/sh\nwhile [ "$1" != --log-file ]; do shift; done\n'
        f'echo "{summary}" >"$2"\necho "{kernels}"\nexit {status}\n'
    )
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("found", "kernels", "status", "ends"),
    [
        (0, "every_kernel: 3 kernels", 0, stage.PASSED),
        (2, "every_kernel: 3 kernels", 9, stage.FAILED),
        (0, "every_kernel: softmax: 1 calls", 0, stage.FAILED),
        (0, "every_kernel: 3 kernels", 1, stage.FAILED),
    ],
)
def test_a_pass_under_compute_sanitizer(
    found: int,
    kernels: str,
    status: int,
    ends: str,
    tmp_path: Path,
    result: Result,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    summary = f"ERROR SUMMARY: {found} errors RACECHECK SUMMARY: {found} hazards displayed"
    program = fake_sanitizer(tmp_path, summary, kernels, status)
    monkeypatch.setattr(sanitizer, "program", lambda: program)
    sanitizer.run(Options(tmp_path, tmp_path), result)
    assert result.status == ends
    assert set(result.facts) == {"memcheck", "racecheck"}


def test_without_compute_sanitizer(tmp_path: Path, result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer, "program", lambda: None)
    sanitizer.run(Options(tmp_path, tmp_path), result)
    assert result.status == stage.CANNOT_RUN
    assert "pip install nvidia-cuda-sanitizer-api" in result.lines[0]


def test_latency(device: Device, tmp_path: Path, result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "tokens": 24, "compiled": [{"architecture": 90, "seconds": {"linear": 8.0, "attention": 9.0}}],
        "move_seconds": 0.1, "first_batch_seconds": 0.5, "second_batch_seconds": 0.001,
    }  # fmt: skip
    script = f"import json; print('a warning'); print(json.dumps({found!r}, indent=2)); print('done')"
    monkeypatch.setattr(latency, "command", lambda options, model: [sys.executable, "-c", script])
    latency.measure(device, Options(tmp_path, tmp_path, real.MODEL_DIR), result)
    assert result.status == stage.PASSED
    results = measured(device)
    for case in latency.CASES:
        assert results.value("linear", case, "rbe_gpu", "compile_time") == 8.0
        assert results.value("model", case, "rbe_gpu", "compile_time") == 17.0
        assert results.value("model", case, "rbe_gpu", "first_batch_time") == 0.5
    monkeypatch.setattr(
        latency, "command", lambda options, model: [sys.executable, "-c", "exit('no GPU can be used')"]
    )
    latency.measure(device, Options(tmp_path, tmp_path, real.MODEL_DIR), result)
    assert result.status == stage.FAILED
    assert result.lines[-1] == "empty kernel cache: no GPU can be used"


# --- the command --------------------------------------------------------------------------------------


def script(body: str) -> Any:
    """A command of a stage that is this Python program; `path` is the file of its result."""

    def command(name: str, options: Options) -> list[str]:
        path = str(options.out / f"{name}.json")
        held = f"dict(stage={name!r}, status=status, lines=['a line'])"
        head = f"import json, sys, time\ndef write(status): json.dump({held}, open({path!r}, 'w'))\n"
        return [sys.executable, "-c", head + body]

    return command


@pytest.mark.parametrize(
    ("body", "status", "last"),
    [
        ("write('passed')", stage.PASSED, "a line"),
        ("write('failed'); sys.exit(1)", stage.FAILED, "a line"),
        ("write('stopped'); sys.exit(139)", stage.FAILED, "ended with exit status 139; see decode.log"),
        ("pass", stage.FAILED, "it wrote no result"),
    ],
)
def test_a_stage_is_a_process(body: str, status: str, last: str, tmp_path: Path) -> None:
    (found,) = check.run_all(["decode"], Options(tmp_path, tmp_path), script(body))
    assert (found["status"], found["lines"][-1]) == (status, last)


def test_a_stage_that_is_stopped_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = plan.Stage("decode", "", 1.0, 3.0, lambda options, result: None)
    monkeypatch.setattr(check, "LEAST", 0.1)
    monkeypatch.setitem(plan.STAGES, "decode", short)
    body = "write('stopped'); time.sleep(60)"
    (found,) = check.run_all(["decode"], Options(tmp_path, tmp_path), script(body))
    assert found["status"] == stage.STOPPED
    assert found["lines"][0] == "a line"
    assert found["lines"][-1].startswith("stopped after")


def test_no_stage_is_started_without_time(tmp_path: Path) -> None:
    options = Options(tmp_path, tmp_path, seconds=3.0)
    found = check.run_all(["decode", "linear"], options, script("write('passed')"))
    assert [one["lines"] for one in found] == [["no time was left"]] * 2


def test_a_stage_without_cupy_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert check.run_stage("decode", Options(tmp_path, tmp_path)) == 1
    left = stage.read(tmp_path / "decode.json")
    assert left is not None
    assert left["status"] == stage.CANNOT_RUN
    assert "cupy" in left["lines"][-1]


def test_errors_of_a_stage_end_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(options: Options, result: Result) -> None:
        result.say("one case measured")
        raise RuntimeError("cudaErrorIllegalAddress: an illegal memory access was encountered\nmore")

    monkeypatch.setitem(check.STAGES, "decode", plan.Stage("decode", "", 5.0, 5.0, broken))
    assert check.run_stage("decode", Options(tmp_path, tmp_path)) == 1
    left = stage.read(tmp_path / "decode.json")
    assert left is not None
    assert left["status"] == stage.FAILED
    assert (
        left["lines"][-1] == "RuntimeError: cudaErrorIllegalAddress: an illegal memory access was encountered"
    )


def test_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert check.parsed([]).names == list(check.STAGES)
    assert check.parsed(["--only", "decode,linear"]).names == ["decode", "linear"]
    for wrong in (
        ["--only", "decoding"],
        ["--jobs", "0"],
        ["--budget", "-1"],
        ["--budget", "nan"],
        ["--rehearse", "--rows", str(tmp_path)],
        ["--model", str(tmp_path / "no")],
    ):
        with pytest.raises(SystemExit) as caught:
            check.parsed(wrong)
        assert caught.value.code == 2
    assert check.main(["--list"]) == 0
    assert "conformance" in capsys.readouterr().out
    assert check.parsed([]).rows == check.RESULTS
    for small in ("--quick", "--rehearse"):
        assert check.parsed([small, "--out", "there"]).rows == Path("there")


def test_a_stage_gets_the_options(tmp_path: Path) -> None:
    options = Options(tmp_path, tmp_path / "rows", tmp_path, True, "abc", 3, 9.5, rehearse=False)
    (*_, module, flag, name), rest = (c := check._command("linear", options))[:5], c[5:]
    assert (module, flag, name) == ("rbe_gpu.reports.gpu.check", "--stage", "linear")
    given = check.parsed(["--stage", "linear", *rest])
    assert (given.out, given.rows, given.model) == (options.out, options.rows, options.model)
    assert (given.quick, given.commit, given.jobs, given.budget) == (True, "abc", 3, 9.5)
    rehearsed = check._command("linear", replace(options, rehearse=True))
    assert rehearsed[1:4] == ["-m", "tests.host.rehearsal", "rbe_gpu.reports.gpu.check"]
    assert check.parsed(rehearsed[4:]).rehearse


def test_the_summary_names_every_stage_and_target(tmp_path: Path) -> None:
    found = [
        {"stage": "decode", "status": stage.STOPPED, "seconds": 3.0, "lines": ["one", "stopped after 3 s"]}
    ]
    told = check.summary(found, [row("attention", "8192 tokens, head_dim 128, full", "rate", 2e14)])
    assert "decode       stopped        3 s  stopped after 3 s" in told
    assert "failed: attention, full, 8192 tokens, head_dim 128: ≥ 500 TFLOP/s, worst 200 TFLOP/s" in told
    assert told.count("\n  ") == 1 + len(targets.GPU_TARGETS)


def test_rows_of_other_machines_are_left_alone(tmp_path: Path) -> None:
    session = rows.Session(2, "CPU", "v", "c", "t")
    rows.append_rows(tmp_path / "cpu.csv", [session.row("softmax", "a", "rbe_gpu", "time", "s", 1.0)])
    rows.append_rows(tmp_path / "gpu.csv", [row("softmax", "a", "time", 1.0)])
    (tmp_path / "quality.csv").write_text("other,columns\n1,2\n")
    assert [r.backend for r in check.rows_of(tmp_path)] == ["cuda"]

"""`rbe.profile`: what it records, and that nothing of it is left where it is off."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu import dispatch, registry
from rbe_gpu.matmul import algorithms_of
from rbe_gpu.models.bert import BertEncoder
from rbe_gpu.models.bert_tensors import linear_weights, tensor_shapes
from rbe_gpu.profiler import Call, Profile

from . import real
from .architectures.test_decoders import model as decoder_of
from .compressed import compressed
from .host import stand_in

ROOT = Path(rbe.__file__).parents[1]
LAYERS = 2


@pytest.fixture(scope="module")
def x() -> Any:
    return np.ascontiguousarray(real.layer(0, "attention.self.query.weight")[:6, :96])


@pytest.fixture(scope="module")
def encoder() -> BertEncoder:
    config = {**real.config(), "num_hidden_layers": LAYERS}
    return BertEncoder({name: real.weight(name) for name, _ in tensor_shapes(config)}, config)


@pytest.fixture
def cupy() -> Iterator[ModuleType]:
    with stand_in.installed() as module:
        yield module


def states(model: BertEncoder, tokens: int) -> Any:
    ids = np.arange(1, tokens + 1)
    return model._text_states(ids, np.array([tokens], np.int64), model.workspace)[0].copy()


def ops_of(p: Profile) -> Counter[str]:
    return Counter(c.op for c in p.calls)


# --- off ----------------------------------------------------------------------------------------------------


def test_off_runs_the_same_calls_as_before_there_was_a_profile() -> None:
    """Every call of Python and C functions of an op, as sys.setprofile sees them, in a process of its own."""
    code = """
import sys
import numpy as np
import rbe_gpu as rbe
x = np.ones((4, 64), np.float32)
m = rbe.compress(np.eye(64, dtype=np.float32), grade="A")
def calls():
    seen = []
    def note(frame, event, arg):
        if event in ("call", "c_call"):
            seen.append(frame.f_code.co_qualname if event == "call" and sys.version_info >= (3, 11)
                        else getattr(arg, "__name__", frame.f_code.co_name))
    sys.setprofile(note)
    rbe.softmax(x)
    rbe.linear(x, m)
    rbe.layer_norm(x, x[0], x[0])
    sys.setprofile(None)
    return seen
calls(); calls()
before = calls()
print("rbe_gpu.profiler" in sys.modules, len(before) > 20)
with rbe.profile() as p:
    during = calls()
print(calls() == before, len(during) > len(before), len(p.calls))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert done.split() == ["False", "True", "True", "True", "3"]


def test_off_leaves_the_functions_that_were_there(x: Any) -> None:
    rbe.softmax(x)
    loaded, never = dispatch.CPU.softmax, dict(dispatch.CUDA.__dict__)
    steps = [sys.modules[m] for m in ("rbe_gpu.cpu_fallback.encoder_step",) if m in sys.modules]
    before = [module.EncoderStep.run for module in steps]
    with rbe.profile():
        assert dispatch.CPU.softmax is not loaded
        with rbe.profile():
            pass
        assert dispatch.CPU.softmax is not loaded  # the outer one is still on
    assert dispatch.CPU.softmax is loaded
    assert dispatch.CUDA.__dict__ == never
    assert [module.EncoderStep.run for module in steps] == before


def test_an_error_inside_ends_the_profile_and_keeps_what_ran(x: Any) -> None:
    loaded = dispatch.CPU.gelu
    p = rbe.profile()

    def fails() -> None:
        with p:
            rbe.gelu(x)
            rbe.gelu(x[0, 0])

    with pytest.raises(TypeError, match=r"x is a numpy\.float32"):
        fails()
    assert dispatch.CPU.gelu is loaded
    assert [c.op for c in p.calls] == ["gelu"]
    with pytest.raises(RuntimeError, match="has been used"), p:
        pass


# --- on -----------------------------------------------------------------------------------------------------


def test_results_are_the_same_and_each_call_is_recorded(x: Any) -> None:
    weight = compressed("dct int4 b128")
    y = np.ascontiguousarray(np.resize(x, (7, weight.shape[1])))
    expected = rbe.linear(y, weight)
    with rbe.profile() as p:
        assert np.array_equal(rbe.linear(y, weight), expected)
        rbe.softmax(x)
        rbe.softmax(x)
    assert [c.op for c in p.calls] == ["linear", "softmax", "softmax"]
    linear, softmax, _ = p.calls
    assert linear.nbytes == y.nbytes + weight.nbytes + expected.nbytes
    assert linear.algorithm == algorithms_of(dispatch.CPU).choose(weight, 7, y.dtype).name
    assert linear.shape == (7, weight.shape[1])
    assert (softmax.nbytes, softmax.algorithm, softmax.backend) == (2 * x.nbytes, "", "cpu")
    assert all(c.start < c.end and 0 < c.own <= c.end - c.start for c in p.calls)
    assert [(t.op, t.calls, t.nbytes) for t in p.totals() if t.op == "softmax"] == [
        ("softmax", 2, 4 * x.nbytes)
    ]


@pytest.mark.parametrize("method", ["transform", "decode"])
def test_the_method_that_a_caller_asks_for_is_the_algorithm(method: str) -> None:
    weight = compressed("dct int4 b128")
    y = np.ones((40, weight.shape[1]), np.float32)
    with rbe.profile() as p:
        rbe.linear(y, weight, method=method)
    by_name = {a.name: a.method for a in algorithms_of(dispatch.CPU)}
    assert by_name[p.calls[0].algorithm] == method


def test_only_the_rows_that_are_read_count() -> None:
    table = real.weight("embeddings.word_embeddings.weight")
    ids = np.array([5, 6, 7])
    with rbe.profile() as p:
        rows = rbe.embedding(ids, table)
        rbe.softmax(np.ones((8, 16), np.float32), mask=np.zeros((1, 16), np.float32))
    assert p.calls[0].nbytes == ids.nbytes + 2 * rows.nbytes
    assert p.calls[1].nbytes == 2 * 8 * 16 * 4 + 16 * 4  # a mask that is broadcast is read once


def test_times_add_up(encoder: BertEncoder) -> None:
    """Of one thread: ops do not overlap, and with the time outside they are the whole block."""
    states(encoder, 300)
    with rbe.profile() as p:
        states(encoder, 300)
    spans = sorted((c.start, c.end) for c in p.calls)
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    inside = sum(t.seconds for t in p.totals())
    assert inside == pytest.approx(sum(c.end - c.start for c in p.calls) / 1e9, rel=1e-9)
    assert 0 < inside < p.seconds
    assert inside + p.outside_seconds == pytest.approx(p.seconds, rel=1e-9)
    assert sum(t.calls for t in p.totals()) == len(p.calls)


def test_the_ops_of_an_encoder_are_those_of_its_layers(encoder: BertEncoder) -> None:
    with rbe.profile() as p:
        states(encoder, 300)
    counts = ops_of(p)
    assert counts["linear"] == 6 * LAYERS
    assert counts["attention"] == LAYERS
    assert counts["layer_norm"] == 2 * LAYERS + 1


def test_a_step_of_an_encoder_is_one_op(encoder: BertEncoder) -> None:
    expected = states(encoder, 9)
    with rbe.profile() as p:
        assert np.array_equal(states(encoder, 9), expected)
    counts = ops_of(p)
    assert counts["encoder_step"] == 1
    assert not counts["linear"] + counts["attention"]
    step = next(c for c in p.calls if c.op == "encoder_step")
    weights = sum(
        real.weight(n).nbytes for n in real.weight_names() if "encoder.layer.0." in n and "LayerNorm" not in n
    )
    assert step.nbytes == pytest.approx(LAYERS * weights, rel=0.01)  # of which biases are not counted


def test_a_step_that_is_repeated_op_by_op_says_so() -> None:
    """Compressed weights do not take states that are not finite."""
    config = {**real.config(), "num_hidden_layers": 1}
    tensors: dict[str, Any] = {name: real.weight(name) for name, _ in tensor_shapes(config)}
    tensors |= {
        n: rbe.compress(tensors[n], codes="dense-int4", transform="dct") for n in linear_weights(config)
    }
    table = tensors["embeddings.word_embeddings.weight"] = tensors["embeddings.word_embeddings.weight"].copy()
    table[1, 3] = np.inf
    model = BertEncoder(tensors, config)
    with rbe.profile() as p:
        states(model, 3)
    assert [c.algorithm for c in p.calls if c.op == "encoder_step"] == ["not finite: op by op"]
    assert ops_of(p)["linear"] == 6


def test_a_token_of_a_decoder_is_one_op() -> None:
    decoder = decoder_of("llama")
    ids = np.arange(3)[None]
    cache = decoder.new_cache(1, 8)
    decoder.logits(ids, cache=cache, last=True)
    with rbe.profile() as p:
        decoder.logits(ids[:, :1], cache=cache, last=True)
    assert ops_of(p) == Counter(embedding=1, decoder_step=1, linear=1)  # the linear is the head


def test_profiles_nest_and_threads_are_told_apart(x: Any) -> None:
    with rbe.profile() as outer:
        rbe.silu(x)
        with rbe.profile() as inner:
            thread = threading.Thread(target=rbe.gelu, args=(x,))
            thread.start()
            thread.join()
    assert [c.op for c in outer.calls] == ["silu", "gelu"]
    assert inner.calls == outer.calls[1:]
    assert len({c.thread for c in outer.calls}) == 2


def test_time_inside_another_call_counts_once() -> None:
    from rbe_gpu import profiler

    with rbe.profile() as p:
        a, b = (Call(name, "cpu", "", (), 0, 0, 0) for name in ("outer", "inner"))
        profiler._timed(a, lambda: profiler._timed(b, lambda: sum(range(10_000))))
    assert a.own + b.own == a.end - a.start
    assert b.own == b.end - b.start > 0
    assert p.outside_seconds == pytest.approx(p.seconds - (a.end - a.start) / 1e9)


# --- output -------------------------------------------------------------------------------------------------


def test_the_table_has_every_op_the_time_outside_and_the_whole(x: Any) -> None:
    with rbe.profile() as p:
        rbe.softmax(x)
        rbe.gelu(x)
    lines = p.table().splitlines()
    assert lines[0].split() == [
        "op",
        "algorithm",
        "calls",
        "time",
        "ms",
        "share",
        "mean",
        "us",
        "moved",
        "MB",
        "GB/s",
    ]
    assert {line.split()[0] for line in lines[1:3]} == {"softmax", "gelu"}
    assert lines[3].startswith("outside of ops")
    assert lines[4].split() == ["all", "2", f"{1e3 * p.seconds:.3f}", "100.0%"]
    shares = [float(line.split("%")[0].split()[-1]) for line in lines[1:4]]
    assert sum(shares) == pytest.approx(100, abs=0.2)


def test_an_empty_profile_has_a_table_and_a_trace(tmp_path: Path) -> None:
    with rbe.profile() as p:
        pass
    assert [line.split()[0] for line in p.table().splitlines()] == ["op", "outside", "all"]
    p.chrome_trace(tmp_path / "trace.json")
    assert [e["ph"] for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]] == ["M"]


def test_the_trace_has_an_event_for_each_call(encoder: BertEncoder, tmp_path: Path) -> None:
    with rbe.profile() as p:
        states(encoder, 300)
    p.chrome_trace(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    events = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert [e["name"] for e in events] == [c.op for c in p.calls]
    assert {(e["pid"], e["tid"]) for e in events} == {(1, 1)}
    for event, call in zip(events, p.calls, strict=True):
        assert event["dur"] == pytest.approx((call.end - call.start) / 1e3)
        assert event["ts"] >= 0
        assert event["ts"] + event["dur"] <= 1e6 * p.seconds
        assert event["args"]["bytes"] == call.nbytes
    linears = [e for e in events if e["name"] == "linear"]
    assert all(e["args"]["algorithm"] for e in linears)
    assert {e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"} == {"host", "thread 1"}


# --- a GPU --------------------------------------------------------------------------------------------------


def test_a_gpu_has_device_times_and_nvtx_ranges(cupy: Any, x: Any, tmp_path: Path) -> None:
    there = rbe.to(x, "cuda")
    with rbe.profile() as p:
        rbe.softmax(there)
        rbe.gelu(there)
    assert cupy.cuda.nvtx.names == ["rbe.softmax", "rbe.gelu"]
    assert cupy.cuda.nvtx.open == 0
    for call in p.calls:
        assert call.backend == "cuda"
        assert call.device_seconds is not None
        assert (
            call.device_seconds >= (call.end - call.start) / 1e9
        )  # the stand-in runs at once, between the events
    assert "GPU ms" in p.table()
    p.chrome_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert Counter(e["pid"] for e in events if e["ph"] == "X") == {1: 2, 2: 2}
    on_gpu = [e for e in events if e["ph"] == "X" and e["pid"] == 2]
    assert on_gpu[0]["ts"] + on_gpu[0]["dur"] <= on_gpu[1]["ts"] + 1e-6


def test_the_capture_of_a_graph_records_no_events(cupy: Any, x: Any) -> None:
    there = rbe.to(x, "cuda")
    cupy.capturing = True
    with rbe.profile() as p:
        rbe.softmax(there)
    assert [c.device_seconds for c in p.calls] == [None]
    assert p.totals()[0].device_seconds is None


def test_a_cupy_without_nvtx_is_profiled_without_ranges(cupy: Any, x: Any) -> None:
    cupy.cuda.nvtx.available = False
    with rbe.profile() as p:
        rbe.softmax(rbe.to(x, "cuda"))
    assert cupy.cuda.nvtx.names == []
    assert len(p.calls) == 1


@pytest.mark.parametrize("op", registry.OPS)
def test_every_op_is_recorded(op: str) -> None:
    with rbe.profile():
        for backend in (dispatch.CPU, dispatch.CUDA):
            assert op in backend.__dict__
            assert backend.__dict__[op].__module__ == "rbe_gpu.profiler"

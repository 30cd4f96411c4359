"""MiniLM beside eager PyTorch on the same GPU: wall time of whole batches, launches included."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import rbe_gpu as rbe
from rbe_gpu.models.bert_tensors import linear_weights
from rbe_gpu.models.load import load_encoder as load

from ..harness.baselines import TorchBert
from ..harness.inputs import Inputs
from ..harness.measure import OURS, TORCH, Case, Provider, to_numpy
from ..harness.timing import WallClock, speedups
from .device import Device, described, run_cases
from .stage import Result
from .weights import GRID, grid

BATCHES = ((64, 128), (1, 128), (1, 16))
GRAPHS = ((1, 128), (1, 16))
REPLAYS = 20  # under the profiler
QUICK_BATCHES = ((1, 8),)
#: relative error of the last hidden state to NumPy's float32; there is no padding
ALLOWED = {"float32": 1e-4, "float16": 1e-2}
COMPRESSED = "grade B"
FLOATS, ROUNDED = f"{OURS} {GRID}", f"{OURS} {GRID}, int8 activations"
#: Relative error of the second one's last hidden states to the first one's; MiniLM on the CPU has 0.06 to 0.08.
ROUNDED_ALLOWED = 0.2


def token_ids(inputs: Inputs, shape: tuple[int, int]) -> NDArray[np.int64]:
    """Real text as full rows of tokens: no padding, so that every token counts for every provider."""
    ids: list[int] = []
    for text in inputs.folder.text_ids("held_out", 512):
        ids += text
        if len(ids) >= shape[0] * shape[1]:
            break
    return np.resize(np.array(ids, np.int64), shape)


def measure(device: Device, inputs: Inputs, result: Result) -> None:
    folder = inputs.folder.path
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "b.rbe.safetensors"
        rbe.compress_model(folder, file, grade="B")
        models = {
            OURS: load(folder, dtype="float16"),
            f"{OURS} float32": load(folder),
            f"{OURS} {COMPRESSED}": load(file, dtype="float16"),
        }
        there = {provider: rbe.to(model, "cuda") for provider, model in models.items()}
        baselines = _baselines(device, inputs)
        grids = cache(partial(grid_models, folder))
        batches, graphs = (QUICK_BATCHES, QUICK_BATCHES) if device.quick else (BATCHES, GRAPHS)
        run_cases(
            device,
            result,
            [
                (f"{b} x {s} tokens", partial(one, device, inputs, (b, s), there, baselines))
                for b, s in batches
            ]
            + [
                (
                    f"{b} x {s} tokens as a graph",
                    partial(one_graph, device, inputs, (b, s), there[OURS], result),
                )
                for b, s in graphs
            ]
            + [
                (f"{b} x {s} tokens, {GRID}", partial(one_rounded, device, inputs, (b, s), grids))
                for b, s in batches
            ],
        )


def _baselines(device: Device, inputs: Inputs) -> dict[str, TorchBert]:
    """PyTorch's encoders by the dtype of their weights and activations."""
    torch = device.torch
    if torch is None:
        return {}
    try:
        return {
            name: TorchBert(inputs.folder, torch, device.torch_device, getattr(torch, name))
            for name in ("float16", "float32")
        }
    except Exception as error:  # theirs must not fail our case
        device.say(f"no {TORCH} encoder: {described(error)}")
        return {}


def _case(inputs: Inputs, ids: NDArray[np.int64], calls: Mapping[str, Callable[[], Any]], dtype: str) -> Case:
    """Forward passes of one dtype; what they return is checked against NumPy's float32."""
    expected = inputs.numpy.hidden(ids, np.full(len(ids), ids.shape[1], np.int64)).astype(np.float64)
    # the weights of a compressed model are others; `minilm` checks that it computes with them
    providers = {
        name: Provider([call], None if COMPRESSED in name else expected, ALLOWED[dtype])
        for name, call in calls.items()
    }
    return Case(
        "model", f"{ids.shape[0]} x {ids.shape[1]} tokens", str(ids.shape), providers, dtype, None, ()
    )


def one(
    device: Device,
    inputs: Inputs,
    shape: tuple[int, int],
    models: dict[str, Any],
    baselines: dict[str, TorchBert],
) -> None:
    """All models of all dtypes in turn; ours is compared with PyTorch's of the same dtype."""
    ids = token_ids(inputs, shape)
    calls: dict[str, dict[str, Callable[[], Any]]] = {}
    for provider, model in models.items():
        calls.setdefault(str(model.dtype), {})[provider] = partial(model.forward, ids)
    for dtype, model in baselines.items():

        def forward(model: TorchBert = model) -> Any:
            return model.hidden(device.torch.from_numpy(ids).to(device.torch_device))

        calls.setdefault(dtype, {})[f"{TORCH} {dtype}"] = forward
    by_dtype = {dtype: device.checked(_case(inputs, ids, group, dtype)) for dtype, group in calls.items()}
    every = {name: p.calls for case in by_dtype.values() for name, p in case.providers.items()}
    times = device.compare(every, WallClock(device.clock.synchronize))
    for dtype, case in by_dtype.items():
        device.rows(case, "time", "s", {p: times[p] for p in case.providers if p in times})
        if f"{TORCH} {dtype}" in times:
            ratios = speedups(times, f"{TORCH} {dtype}")
            device.rows(case, f"speed_vs_{TORCH}", "x", {p: ratios[p] for p in case.providers if p in models})


# --- int8 activations ---------------------------------------------------------------------------------


def grid_models(folder: Path) -> dict[str, Any]:
    """Encoders on the GPU with grid codes, as calibrated files have them: with float and with int8 activations."""
    dense = load(folder, dtype="float16")
    names, tensors = list(linear_weights(dense.config)), dense.tensors()
    model = dense.with_tensors({name: grid(np.asarray(tensors[name], np.float32)) for name in names})
    return {
        FLOATS: rbe.to(model, "cuda"),
        ROUNDED: rbe.to(model.with_int8_activations(names), "cuda"),
    }


def one_rounded(
    device: Device, inputs: Inputs, shape: tuple[int, int], made: Callable[[], Mapping[str, Any]]
) -> None:
    """Both in turn. made : `grid_models`, once there is time for them"""
    ids, models = token_ids(inputs, shape), made()
    expected = to_numpy(models[FLOATS].forward(ids)).astype(np.float64)
    providers = {
        name: Provider([partial(model.forward, ids)], expected if name == ROUNDED else None, ROUNDED_ALLOWED)
        for name, model in models.items()
    }
    name = f"{shape[0]} x {shape[1]} tokens"
    case = device.checked(Case("model", name, str(ids.shape), providers, "float16", None, ()))
    times = device.times(
        {name: p.calls for name, p in case.providers.items()}, WallClock(device.clock.synchronize)
    )
    device.rows(case, "time", "s", times)
    device.row(case, ROUNDED, "speed_vs_float_activations", "x", speedups(times, FLOATS)[ROUNDED])


# --- graphs -------------------------------------------------------------------------------------------


def kernel_seconds(device: Device, run: Callable[[], Any]) -> float | None:
    """Seconds that the GPU spends in kernels in one `run()`, by PyTorch's profiler, which sees CuPy's launches too.

    None where the profiler is not there, or sees nothing.
    """
    profiler = None if device.torch is None else device.torch.profiler
    if profiler is None or profiler.ProfilerActivity.CUDA not in profiler.supported_activities():
        return None
    device.clock.synchronize()
    with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(REPLAYS):
            run()
        device.clock.synchronize()
    total = sum(float(event.self_device_time_total) for event in trace.key_averages())
    return total * 1e-6 / REPLAYS or None


def one_graph(device: Device, inputs: Inputs, shape: tuple[int, int], model: Any, result: Result) -> None:
    """A replay by the GPU's clock and by wall time, beside the batch without a graph and its kernels alone."""
    ids = token_ids(inputs, shape)
    graph = model.graph(*shape)
    graph(ids)
    provider = f"{OURS} graph"

    def replay() -> Any:
        graph.replay()
        return graph.states

    case = device.checked(_case(inputs, ids, {provider: replay}, str(model.dtype)))
    wall = WallClock(device.clock.synchronize)
    walls = device.times({provider: [graph.replay], OURS: [partial(model.forward, ids)]}, wall)
    device.row(case, provider, "time", "s", walls[provider])
    device.row(case, provider, f"speed_vs_{OURS}", "x", speedups(walls, OURS)[provider])
    replays = device.times({provider: [graph.replay]})[provider]
    device.row(case, provider, "gpu_time", "s", replays)
    kernels = kernel_seconds(device, graph.replay)
    if kernels is None:
        result.say(f"{case.name}: the profiler saw no kernels, so a replay is not compared with their sum")
        return
    device.row(case, provider, "kernel_time", "s", kernels)
    device.row(case, OURS, "graph_vs_kernels", "x", [seconds / kernels for seconds in replays])
    result.say(f"{case.name}: replay {np.median(replays) * 1e6:.0f} us, its kernels {kernels * 1e6:.0f} us")

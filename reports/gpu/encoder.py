"""MiniLM beside PyTorch eager on the same GPU: whole batches by the clock on the wall, launches included."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import rbe_gpu as rbe
from rbe_gpu.models import corpus
from rbe_gpu.models.load import load

from ..bench import speeds
from ..inputs import Inputs
from ..peers import TorchBert
from .device import OURS, TORCH, Device, attempt
from .stage import Result
from .timing import WallClock

BATCHES = ((64, 128), (1, 128), (1, 16))
GRAPHS = ((1, 128), (1, 16))
REPLAYS = 20  # that the profiler looks at
QUICK_BATCHES = ((1, 8),)
#: relative error of the last hidden state to NumPy's float32, padding there is none
ALLOWED = {"float32": 1e-4, "float16": 1e-2}
COMPRESSED = "grade B"


def token_ids(inputs: Inputs, shape: tuple[int, int]) -> NDArray[np.int64]:
    """Real text as full rows of tokens: no padding, so that every token counts for everybody."""
    found: list[int] = []
    for one in corpus.held_out(512):
        found += inputs.folder.tokenizer.encode(one).ids
        if len(found) >= shape[0] * shape[1]:
            break
    return np.resize(np.array(found, np.int64), shape)


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
        peers = _peers(device, inputs)
        for shape in QUICK_BATCHES if device.quick else BATCHES:
            name = f"{shape[0]} x {shape[1]} tokens"
            attempt(device, result, name, partial(one, device, inputs, shape, there, peers))
        for shape in QUICK_BATCHES if device.quick else GRAPHS:
            name = f"{shape[0]} x {shape[1]} tokens as a graph"
            attempt(device, result, name, partial(one_graph, device, inputs, shape, there[OURS], result))


def _peers(device: Device, inputs: Inputs) -> dict[str, TorchBert]:
    """PyTorch's encoders by the dtype of their weights and activations."""
    torch = device.torch
    if torch is None:
        return {}
    return {
        name: TorchBert(inputs.folder, torch, device.torch_device, getattr(torch, name))
        for name in ("float16", "float32")
    }


def one(
    device: Device,
    inputs: Inputs,
    shape: tuple[int, int],
    models: dict[str, Any],
    peers: dict[str, TorchBert],
) -> None:
    ids = token_ids(inputs, shape)
    case = f"{shape[0]} x {shape[1]} tokens"
    expected = inputs.numpy.hidden(ids, np.full(shape[0], shape[1], np.int64)).astype(np.float64)
    rivals: dict[str, list[Callable[[], Any]]] = {}
    dtypes: dict[str, str] = {}
    for provider, model in models.items():
        rivals[provider], dtypes[provider] = [partial(model.forward, ids)], str(model.dtype)
    for dtype, peer in peers.items():
        provider = f"{TORCH} {dtype}"

        def forward(peer: TorchBert = peer) -> Any:
            return peer.hidden(device.torch.from_numpy(ids).to(device.torch_device))

        rivals[provider], dtypes[provider] = [forward], dtype

    def row(provider: str, metric: str, unit: str, values: Any) -> None:
        device.row("model", case, provider, metric, unit, values, str(shape), dtypes[provider])

    for provider, calls in rivals.items():
        found = calls[0]()
        if (
            COMPRESSED in provider
        ):  # what its weights are is told elsewhere; that it computes with them is `minilm`'s
            continue
        found = found.float() if hasattr(found, "float") else found  # a tensor of PyTorch's
        what = f"MiniLM, {case}: {provider}"
        row(provider, "relative_error", "", device.check(what, found, expected, ALLOWED[dtypes[provider]]))
    times = device.times(rivals, WallClock(device.clock.synchronize))
    for provider, seen in times.items():
        row(provider, "time", "s", seen)
        if provider in models and peers:  # of the same dtype
            row(provider, f"speed_vs_{TORCH}", "x", speeds(times, f"{TORCH} {dtypes[provider]}")[provider])


# --- graphs -------------------------------------------------------------------------------------------


def kernel_seconds(device: Device, run: Callable[[], Any]) -> float | None:
    """Seconds that the GPU spends in kernels in one `run()`, by PyTorch's profiler, which sees CuPy's launches too.

    None where the profiler is not there, or sees nothing.
    """
    profiler = None if device.torch is None else device.torch.profiler
    if profiler is None or profiler.ProfilerActivity.CUDA not in profiler.supported_activities():
        return None
    device.clock.synchronize()
    with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(REPLAYS):
            run()
        device.clock.synchronize()
    total = sum(float(event.self_device_time_total) for event in seen.key_averages())
    return total * 1e-6 / REPLAYS or None


def one_graph(
    device: Device,
    inputs: Inputs,
    shape: tuple[int, int],
    model: Any,
    result: Result,
) -> None:
    """A replay by the GPU's clock and the one on the wall, beside the batch without a graph and its kernels alone."""
    ids = token_ids(inputs, shape)
    case, dtype = f"{shape[0]} x {shape[1]} tokens", str(model.dtype)
    graph = model.graph(*shape)
    graph(ids)
    expected = inputs.numpy.hidden(ids, np.full(shape[0], shape[1], np.int64)).astype(np.float64)
    provider = f"{OURS} graph"
    error = device.check(f"MiniLM, {case}: {provider}", graph.states, expected, ALLOWED[dtype])

    def row(metric: str, unit: str, values: Any, by: str = provider) -> None:
        device.row("model", case, by, metric, unit, values, str(shape), dtype)

    row("relative_error", "", error)
    waited = WallClock(device.clock.synchronize)
    walls = device.times({provider: [graph.replay], OURS: [partial(model.forward, ids)]}, waited)
    row("time", "s", walls[provider])
    row(f"speed_vs_{OURS}", "x", speeds(walls, OURS)[provider])
    replay = device.times({provider: [graph.replay]})[provider]
    row("gpu_time", "s", replay)
    alone = kernel_seconds(device, graph.replay)
    if alone is None:
        result.say(f"{case}: the profiler saw no kernels, so that a replay is not compared with their sum")
        return
    row("kernel_time", "s", alone)
    row("graph_vs_kernels", "x", [seconds / alone for seconds in replay], OURS)
    result.say(f"{case}: replay {np.median(replay) * 1e6:.0f} us, its kernels {alone * 1e6:.0f} us")

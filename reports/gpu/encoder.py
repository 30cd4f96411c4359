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
from rbe_gpu.models.load import load

from .. import text
from ..bench import speeds
from ..inputs import Inputs
from ..peers import TorchBert
from .device import OURS, TORCH, Device
from .stage import Result
from .timing import WallClock

BATCHES = ((64, 128), (1, 128), (1, 16))
QUICK_BATCHES = ((1, 8),)
#: relative error of the last hidden state to NumPy's float32, padding there is none
ALLOWED = {"float32": 1e-4, "float16": 1e-2}
COMPRESSED = "grade B"


def token_ids(inputs: Inputs, shape: tuple[int, int]) -> NDArray[np.int64]:
    """Real text as full rows of tokens: no padding, so that every token counts for everybody."""
    found: list[int] = []
    for one in text.held_out(512):
        found += inputs.folder.tokenizer.encode(one).ids
        if len(found) >= shape[0] * shape[1]:
            break
    return np.resize(np.array(found, np.int64), shape)


def measure(device: Device, inputs: Inputs, result: Result) -> None:
    folder = inputs.folder.path
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "b.rbe.safetensors"
        rbe.compress_model(folder, file, grade="B")
        dense, small = rbe.to(load(folder), "cuda"), rbe.to(load(file), "cuda")
        models = {f"{OURS} dense": dense, f"{OURS} {COMPRESSED}": small}
        peers = _peers(device, inputs)
        for shape in QUICK_BATCHES if device.quick else BATCHES:
            one(device, inputs, shape, models, peers)
            result.say(f"{shape[0]} x {shape[1]} tokens: measured")


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
        rivals[provider], dtypes[provider] = [partial(model.forward, ids)], "float32"
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
        found = found.float() if hasattr(found, "float") else found
        what = f"MiniLM, {case}: {provider}"
        row(provider, "relative_error", "", device.check(what, found, expected, ALLOWED[dtypes[provider]]))
    times = device.times(rivals, WallClock(device.clock.synchronize))
    for provider, seen in times.items():
        row(provider, "time", "s", seen)
        for dtype in peers:
            peer_name = f"{TORCH} {dtype}"
            if provider in models:
                row(provider, f"speed_vs_{peer_name}", "x", speeds(times, peer_name)[provider])

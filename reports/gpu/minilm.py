"""MiniLM end to end on the GPU: hidden states of every layer against the CPU's, and against Candle's."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import rbe_gpu as rbe
from rbe_gpu.models import corpus
from rbe_gpu.models.load import load
from rbe_gpu.models.locate import model_folder

from ..peers import Folder
from .device import Device
from .pack import TEXTS, Batch, candle_states, stored_states
from .stage import FAILED, PASSED, Options, Result

TOLERANCE = 1e-5  # float32 against float32 through all layers, as between the CPU and Candle
COMPRESSED_TOLERANCE = 5e-5  # the same, each product within 5e-6 of the decoded weight's
COSINE = 1 - 1e-6  # of sentence vectors


def _relative(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    difference = np.asarray(found, np.float64) - wanted
    return float(np.linalg.norm(difference) / np.linalg.norm(np.asarray(wanted, np.float64)))


def worst(found: Any, wanted: Any, lengths: NDArray[np.int64]) -> float:
    """The largest relative error of all layers' states, padding left out."""
    seen = np.arange(wanted[0].shape[1]) < lengths[:, None]
    states = [np.asarray(a.get() if hasattr(a, "get") else a) for a in found]
    return max(_relative(a[seen], np.asarray(b)[seen]) for a, b in zip(states, wanted, strict=True))


def oracle(folder: Path, quick: bool = False) -> tuple[Batch, Any, str]:
    """A batch, Candle's states of it, and where they come from; None where there is neither Candle nor a file.

    `quick` keeps the shortest text alone.
    """
    stored = stored_states(folder)
    batch = Folder(folder).batch(corpus.calibration(TEXTS)) if stored is None else stored[0]
    if quick:
        one = int(np.argmin(batch[1]))
        ids, lengths = (a[one : one + 1] for a in batch)
        stored = None if stored is None else (batch, [s[one : one + 1, : lengths[0]] for s in stored[1]])
        batch = ids[:, : lengths[0]], lengths
    try:
        return batch, candle_states(folder, *batch), "Candle, run here"
    except ImportError:
        if stored is not None:
            return batch, stored[1], "Candle's states made beforehand (Candle is not installed here)"
        return batch, None, "Candle is not installed here, and the model folder has no states made beforehand"


def measure(device: Device, options: Options, result: Result) -> None:
    folder = model_folder(options.model)
    (ids, lengths), theirs, source = oracle(folder, options.quick)
    host = load(folder)
    there = rbe.to(load(folder), "cuda")
    shape = f"{len(ids)} texts, {int(lengths.sum())} tokens"
    passed = True

    def compared(case: str, peer: str, error: float, allowed: float) -> None:
        nonlocal passed
        device.row("model", case, "rbe_gpu", f"relative_error_vs_{peer}", "", error, shape, "float32")
        ok = error <= allowed
        passed &= ok
        result.say(
            f"{case}: relative error {error:.2g} to {peer} ({'at most' if ok else 'MORE THAN'} {allowed:g})"
        )

    states = there.forward(ids, lengths, all_hidden_states=True)
    compared(
        "dense", "CPU", worst(states, host.forward(ids, lengths, all_hidden_states=True), lengths), TOLERANCE
    )
    if theirs is None:
        result.say(f"not compared with Candle: {source}; make them with python -m rbe_gpu.reports.gpu.pack")
        passed = False
    else:
        result.say(f"the reference is {source}")
        compared("dense", "Candle", worst(states, theirs, lengths), TOLERANCE)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "b.rbe.safetensors"
        rbe.compress_model(folder, file, grade="B")
        small, small_there = load(file), rbe.to(load(file), "cuda")
        wanted = small.forward(ids, lengths, all_hidden_states=True)
        found = small_there.forward(ids, lengths, all_hidden_states=True)
        compared("grade B", "CPU", worst(found, wanted, lengths), COMPRESSED_TOLERANCE)
    texts = corpus.held_out(1 if options.quick else 64)
    a, b = there.embed(texts), host.embed(texts)
    cosine = float(np.min(np.einsum("ij,ij->i", a, b)))
    device.row("model", "dense", "rbe_gpu", "cosine_min_vs_CPU", "", cosine, f"{len(texts)} texts", "float32")
    ok = cosine >= COSINE
    passed &= ok
    result.say(
        f"sentence vectors: least cosine to the CPU's {cosine:.8f} ({'at least' if ok else 'LESS THAN'} {COSINE})"
    )
    result.end(PASSED if passed else FAILED)

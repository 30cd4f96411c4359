"""MiniLM end to end on the GPU: hidden states of every layer against the CPU's, and against Candle's."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import rbe_gpu as rbe
from rbe_gpu.models.load import load_encoder as load
from rbe_gpu.registry import relative_error

from ..harness import token_ids
from ..harness.baselines import Folder, padded
from ..harness.measure import OURS, to_numpy
from .device import Device, open_device
from .pack import Batch, candle_states, short_texts, stored_states
from .stage import FAILED, PASSED, Options, Result

TOLERANCE = 1e-5  # float32 against float32 through all layers, as between the CPU and Candle
COMPRESSED_TOLERANCE = 5e-5  # the same, each matmul within 5e-6 of the decoded weight's
COSINE = 1 - 1e-6  # of sentence vectors


def worst(states: Any, expected: Any, lengths: NDArray[np.int64]) -> float:
    """The largest relative error of all layers' states, padding left out."""
    real = np.arange(expected[0].shape[1]) < lengths[:, None]
    return max(
        relative_error(to_numpy(a)[real], np.asarray(b, np.float64)[real])
        for a, b in zip(states, expected, strict=True)
    )


def reference_states(folder: Path, quick: bool = False) -> tuple[Batch, Any, str]:
    """A batch, Candle's states of it (None without Candle and without stored ones), and where they come from.

    quick : only the shortest text
    """
    stored = stored_states(folder)
    batch = short_texts(Folder(folder)) if stored is None else stored[0]
    if quick:
        one = int(np.argmin(batch[1]))
        ids, lengths = (a[one : one + 1] for a in batch)
        stored = None if stored is None else (batch, [s[one : one + 1, : lengths[0]] for s in stored[1]])
        batch = ids[:, : lengths[0]], lengths
    try:
        return batch, candle_states(folder, *batch), "Candle, run here"
    except ImportError:
        if stored is not None:
            return batch, stored[1], "Candle's stored states (Candle is not installed here)"
        return batch, None, "Candle is not installed here, and the model folder has no stored states"


def vectors(model: Any, ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.float32]:
    """Sentence vectors of a padded batch, (batch, embedding_size)."""
    states = model.forward(ids, lengths)
    return to_numpy(model.pool(states, rbe.to(lengths, model.device)))


def run(options: Options, result: Result) -> None:
    measure(open_device(options), options, result)


def measure(device: Device, options: Options, result: Result) -> None:
    folder = token_ids.model_folder(options.model)
    (ids, lengths), theirs, source = reference_states(folder, options.quick)
    host = load(folder)
    there = rbe.to(load(folder), "cuda")
    shape = f"{len(ids)} texts, {int(lengths.sum())} tokens"
    passed = True

    def compare(case: str, baseline: str, error: float, allowed: float) -> None:
        nonlocal passed
        device.write("model", case, OURS, f"relative_error_vs_{baseline}", "", error, shape, "float32")
        ok = error <= allowed
        passed &= ok
        result.say(
            f"{case}: relative error {error:.2g} to {baseline} ({'at most' if ok else 'MORE THAN'} {allowed:g})"
        )

    states = there.forward(ids, lengths, all_hidden_states=True)
    compare(
        "dense", "CPU", worst(states, host.forward(ids, lengths, all_hidden_states=True), lengths), TOLERANCE
    )
    if theirs is None:
        result.say(f"not compared with Candle: {source}; make them with python -m rbe_gpu.reports.gpu.pack")
        passed = False
    else:
        result.say(f"the reference is {source}")
        compare("dense", "Candle", worst(states, theirs, lengths), TOLERANCE)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "b.rbe.safetensors"
        rbe.compress_model(folder, file, grade="B")
        small, small_there = load(file), rbe.to(load(file), "cuda")
        states, expected = (m.forward(ids, lengths, all_hidden_states=True) for m in (small_there, small))
        compare("grade B", "CPU", worst(states, expected, lengths), COMPRESSED_TOLERANCE)
    texts = Folder(folder).text_ids("held_out", 1 if options.quick else 64)
    a, b = (vectors(model, *padded(texts)) for model in (there, host))
    cosine = float(np.min(np.einsum("ij,ij->i", a, b)))
    device.write("model", "dense", OURS, "cosine_min_vs_CPU", "", cosine, f"{len(texts)} texts", "float32")
    ok = cosine >= COSINE
    passed &= ok
    result.say(
        f"sentence vectors: least cosine to the CPU's {cosine:.8f} ({'at least' if ok else 'LESS THAN'} {COSINE})"
    )
    result.end(PASSED if passed else FAILED)

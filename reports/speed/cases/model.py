"""A whole encoder: 32 texts in, 32 sentence vectors out, tokenizer included; and the memory that its weights take."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import rbe_gpu as rbe
from rbe_gpu.blocks import RBEBlocks
from rbe_gpu.container import load_file, save_file
from rbe_gpu.models import corpus
from rbe_gpu.models.stored_tokenizer import ARRAY as TOKENIZER_ARRAY

from ...harness.baselines import TorchBert, torch_or_none
from ...harness.inputs import Inputs
from ...harness.libraries import RemoteClock
from ...harness.measure import build_only, builds, check, rate_rows
from ...harness.memory import extra_bytes, peak_bytes
from ...harness.row_names import BATCH, MODEL, PEAK
from ...harness.row_names import MODEL_MEMORY as MEMORY
from ...harness.rows import Row, Session
from ...harness.timing import Calls, paired_times
from ...quality.quantizers import Encoder, Source, onnx_runtime
from ..compression import Setting, vector_rows
from . import DENSE, NUMPY, ONNX, OURS, TORCH

#: two float32 implementations of six layers, sums in another order
TOLERANCE = 1e-4
BASELINES = (TORCH, ONNX, NUMPY)
WORDS = "embeddings.word_embeddings.weight"


def batch(inputs: Inputs, texts: list[str]) -> list[str]:
    """The middle 32 of `texts` by length: batched as sentence-transformers does, with little padding."""
    order = sorted(texts, key=lambda t: len(inputs.folder.tokenizer.encode(t).ids))
    start = max(0, (len(order) - BATCH) // 2)
    return order[start : start + BATCH]


def baselines(inputs: Inputs, threads: int) -> dict[str, Encoder]:
    """The encoders that rbe_gpu is compared with, those that are installed and that this process builds."""
    encoders: dict[str, Encoder] = {NUMPY: inputs.numpy} if builds(NUMPY) else {}
    torch = torch_or_none()
    if torch is not None:
        encoders[TORCH] = TorchBert(inputs.folder, torch)
    if builds(ONNX) and find_spec("onnx") is not None and find_spec("onnxruntime") is not None:
        # ONNX Runtime fuses what it can by itself; with attention and norms fused by hand it was no faster
        source = Source(inputs.folder.path)
        graph = onnx_runtime.graph(source).SerializeToString()
        encoders[ONNX] = onnx_runtime.Session(graph, source, BATCH, threads)
    return encoders


def compare(dense: Any, others: Mapping[str, Any], texts: list[str], session: Session) -> Iterator[Row]:
    """The dense encoder's vectors against those of the baselines, before anything is timed.

    Raises
    ------
    WrongResult
        They differ by more than `TOLERANCE`.
    """
    ours = dense.embed(texts)
    for name, model in others.items():
        theirs = model.embed(texts)
        error = check(f"the dense encoder, against {name},", ours, theirs, TOLERANCE)
        yield session.row("model", "dense", name, "relative_error", "", error, shape=f"{len(texts)} texts")
        yield from vector_rows(ours, theirs, "dense", session, name)


def times(
    inputs: Inputs,
    case: str,
    models: Mapping[str, Any],
    session: Session,
    seconds: float,
    least: int,
    on_round: Callable[[], None] = lambda: None,
) -> Iterator[Row]:
    """Time per batch of every model in turn, sentences per second, and the bytes that ours hold for weights and
    decoded panels.

    models : provider -> `processes.RemoteEncoder`
    """
    texts = batch(inputs, corpus.held_out(512))
    tokens = int(inputs.folder.batch(texts)[1].sum())
    shape = f"{tokens} tokens"
    calls: dict[str, Calls] = {name: m.calls(texts) for name, m in models.items()}
    # no warm-up: every model has embedded texts before
    measured = paired_times(
        calls, seconds=seconds, least=least, warm_up=0, on_round=on_round, clock=RemoteClock()
    )
    compared = dict.fromkeys((DENSE, *BASELINES), BASELINES)
    yield from rate_rows(session, "model", case, measured, texts=len(texts), shape=shape, baselines=compared)
    for name, model in models.items():
        held = model.held_bytes()
        if held is not None:
            yield session.row("model", case, name, "weights_held", "B", held, shape=shape)


# --- memory -------------------------------------------------------------------------------------------------


def run_once(file: str, batch: str, cache_bytes: int) -> None:
    """In a process of its own: load a model, and compute the hidden states of a batch twice."""
    model = rbe.load(file, cache_bytes=cache_bytes)
    with np.load(batch) as arrays:
        for _ in range(2):
            model.forward(arrays["ids"], arrays["lengths"])


def run_dense(library: str, folder: str, texts: str, threads: int) -> None:
    """In a process of its own: load a library's dense encoder, and embed texts (a JSON file) twice."""
    build_only(library)
    batch_texts = json.loads(Path(texts).read_text(encoding="utf-8"))
    if library == OURS:
        encoder: Any = rbe.load(folder)
    else:
        encoder = baselines(Inputs(Path(folder)), threads)[library]
    for _ in range(2):
        encoder.embed(batch_texts)


def process_peaks(inputs: Inputs, session: Session, libraries: Iterable[str], scratch: Path) -> Iterator[Row]:
    """Peak memory of a fresh process that embeds 32 texts with a library's dense encoder."""
    texts = batch(inputs, corpus.held_out(512))
    file = scratch / "texts.json"
    file.write_text(json.dumps(texts), encoding="utf-8")
    for library in libraries:
        peak = peak_bytes(
            f"{__name__}:run_dense", library=library, folder=str(inputs.folder.path), texts=str(file),
            threads=session.threads,
        )  # fmt: skip
        provider = DENSE if library == OURS else library
        yield session.row("model", MODEL, provider, PEAK, "B", float(peak), shape=f"{len(texts)} texts")


def memory(
    inputs: Inputs, session: Session, files: Mapping[Setting | None, Path], scratch: Path
) -> Iterator[Row]:
    """Peak memory of a process that runs a model, beyond that of one that runs a small part of it.

    The part has one layer, and of the words those that occur. Both processes compute the same batch with the same
    kernels and the same scratch memory; the one has five layers and most of the vocabulary more. A model that cached
    decoded weights, or decoded all of them for a moment, would show the dense bytes of those.

    files : setting -> compressed file, None -> the dense model's folder
    """
    ids, lengths = inputs.batch
    words, places = np.unique(ids, return_inverse=True)
    for name, array in (("all", ids), ("part", places.reshape(ids.shape))):
        np.savez(scratch / f"{name}.npz", ids=array, lengths=lengths)
    for setting, file in files.items():
        if setting is None:
            stored: dict[str, Any] = {n: inputs.folder.tensor(n) for n in inputs.folder.names()}
            config: Any = {"config": inputs.folder.config}
        else:
            tensors, config = load_file(file)
            stored = {n: t for n, t in tensors.items() if n != TOKENIZER_ARRAY}
        part = _part(inputs, stored, words, setting)
        small = {**config["config"], "num_hidden_layers": 1, "vocab_size": len(words)}
        save_file(scratch / "all.rbe.safetensors", stored, config)
        save_file(scratch / "part.rbe.safetensors", part, {**config, "config": small})
        work, baseline = (
            {
                "file": str(scratch / f"{n}.rbe.safetensors"),
                "batch": str(scratch / f"{n}.npz"),
                "cache_bytes": 0,
            }
            for n in ("all", "part")
        )
        extra = extra_bytes(f"{__name__}:run_once", work, baseline)
        provider = DENSE if setting is None else f"{OURS} {setting.name}"
        held, dense = (
            sum(size(t) for t in stored.values()) - sum(size(t) for t in part.values())
            for size in (lambda t: t.nbytes, _dense_bytes)
        )
        for metric, value in (("peak", extra), ("stored", held), ("dense", dense)):
            yield session.row(
                "model", MEMORY, provider, f"{metric}_beyond_part", "B", float(value), shape=str(ids.shape)
            )
        if setting is not None:
            share = (extra - held) / (dense - held)
            yield session.row("model", MEMORY, provider, "dense_share", "", share, shape=str(ids.shape))


def _part(inputs: Inputs, stored: Mapping[str, Any], words: Any, setting: Setting | None) -> dict[str, Any]:
    """The tensors of a model of one layer that knows only `words`."""
    part = {
        n: t
        for n, t in stored.items()
        if not n.startswith("encoder.layer.") or n.startswith("encoder.layer.0.")
    }
    few = np.ascontiguousarray(inputs.words[words])
    part[WORDS] = few if setting is None else rbe.compress(few, kind="vectors", **setting.options)
    return part


def _dense_bytes(tensor: Any) -> int:
    return int(tensor.dense_nbytes if isinstance(tensor, RBEBlocks) else tensor.nbytes)

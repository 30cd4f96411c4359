"""Compile the kernels of a model before its first batch, and measure how long that and the first batches take."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import registry
from .blocks import RBEBlocks
from .dispatch import CPU, CUDA, canonical_device
from .gpu import _load, _source
from .layers import RBEFFN, RBEAttention, RBEEmbedding, RBELinear
from .matmul import algorithms_of
from .models.bert import BertEncoder
from .models.decoder import Decoder
from .models.text_embedder import TextEmbedder
from .transfer import to

TEXT = "Interest rates rose for the third time this year, and the bank expects one more step before winter."
TOKENS = 24  # for a model without a tokenizer
MANY_TOKENS = 4096


def ops_of(model: BertEncoder) -> tuple[str, ...]:
    """The ops whose CUDA kernels a batch of `model` launches, in the order of `registry.OPS`.

    `linear_transform` follows `linear` if a layer with method="transform" would use it.
    """
    launched = {"embedding", "add", "layer_norm", "attention", "linear"}
    if "mean" in model.pooling:
        launched.add("mean_pool")
    if model.normalize:
        launched.add("l2_normalize")
    layers = [part for part in _layers(vars(model).values()) if isinstance(part.weight, RBEBlocks)]
    if layers:
        launched.add("decode")  # rows of tables, and panels of linear weights
    ops = [op for op in registry.OPS if op in launched]
    weights = [part.weight for part in layers if isinstance(part, RBELinear)]
    if any(_transform_source(weight, model.dtype) != "linear" for weight in weights):
        ops.insert(ops.index("linear") + 1, "linear_transform")
    return tuple(ops)


def _transform_source(weight: RBEBlocks, dtype: Any) -> str:
    """The .cu file that multiplies many tokens in the transform domain of a weight."""
    algorithm: Any = algorithms_of(CUDA).choose(weight, MANY_TOKENS, dtype, method="transform")
    return str(algorithm.source)


def _layers(parts: Iterable[Any]) -> Iterable[RBELinear | RBEEmbedding]:
    """The layers in `parts`, and inside them, that have a weight that may be compressed."""
    for part in parts:
        if isinstance(part, RBELinear | RBEEmbedding):
            yield part
        elif isinstance(part, RBEAttention | RBEFFN):
            yield from _layers(vars(part).values())
        elif isinstance(part, list | tuple):
            yield from _layers(part)


def _with_kernels(ops: Sequence[str]) -> Sequence[str]:
    missing = [op for op in ops if not _source.has(op)]
    if missing:
        raise RuntimeError(
            f"this version has no CUDA kernels for {', '.join(missing)}, which the model needs"
        )
    return ops


def _timed(function: Any, *args: Any) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def compiled_only(model: BertEncoder, architectures: Sequence[int]) -> dict[str, Any]:
    """Compile a model's kernels for each architecture, without storing them. Needs no GPU.

    Returns
    -------
    `ops`, and `compiled`: for each architecture the seconds of every op

    Raises
    ------
    ImportError : CuPy, whose NVRTC compiles, is not installed
    RuntimeError : NVRTC does not support an architecture, or a source does not compile
    """
    ops = _with_kernels(ops_of(model))
    try:
        import cupy  # noqa: F401
    except ImportError:
        raise ImportError(
            "CuPy, whose NVRTC compiles the kernels, is not installed: pip install 'rbe-gpu[cuda13]' (or [cuda12])"
        ) from None
    compiled = [
        {"architecture": a, "seconds": {op: _timed(_load.compile_only, op, a) for op in ops}}
        for a in architectures
    ]
    return {"ops": list(ops), "compiled": compiled}


def gpu_named(device: int | None) -> str:
    """`"cuda:N"` of a CUDA device number; of CuPy's current device for None.

    Raises
    ------
    ImportError : CuPy is not installed
    ValueError : no such GPU
    """
    return canonical_device("cuda" if device is None else f"cuda:{device}")


def warm(model: BertEncoder, where: str) -> dict[str, Any]:
    """Compile a model's kernels on a GPU, move the model there and run two batches of one text.

    Parameters
    ----------
    where : the GPU, as `gpu_named` says it

    Returns
    -------
    `device`, `name`, `cache` (CuPy's folder of compiled binaries), `ops`, `compiled` (the architecture, and the
    seconds of every op: near zero where the binary was cached), `move_seconds`, `first_batch_seconds`,
    `second_batch_seconds`, and `tokens`, the number of tokens of a batch

    Raises
    ------
    RuntimeError : the GPU is too old
    """
    ops = _with_kernels(ops_of(model))
    import cupy

    number = int(where.partition(":")[2])
    gpu = cupy.cuda.Device(number)
    with gpu:
        cupy.cuda.runtime.free(0)  # creates the context: 0.1 to 1 s that belong to no op
        seconds = {op: _timed(_load.compile_op, op, number) for op in ops}
        start = time.perf_counter()
        there = to(model, where)
        gpu.synchronize()
        moved = time.perf_counter() - start
        tokens, batch = _batch(there)

        def run() -> None:
            batch()
            gpu.synchronize()

        first, second = _timed(run), _timed(run)
        name = cupy.cuda.runtime.getDeviceProperties(number)["name"]
    return {
        "device": where,
        "name": name.decode() if isinstance(name, bytes) else str(name),
        "cache": os.environ.get("CUPY_CACHE_DIR") or str(Path.home() / ".cupy" / "kernel_cache"),
        "ops": list(ops),
        "compiled": [{"architecture": int(gpu.compute_capability), "seconds": seconds}],
        "move_seconds": moved,
        "first_batch_seconds": first,
        "second_batch_seconds": second,
        "tokens": tokens,
    }


def warm_cpu(model: TextEmbedder | Decoder) -> dict[str, Any]:
    """Compile a model's kernels for the CPU, those of few tokens and those of many, and run them once more.

    model : with a tokenizer if it makes vectors

    Returns
    -------
    `device` ("cpu"), `name` (the instruction set, see `cpu_fallback.isa`), `cache` (the folder of compiled kernels),
    `first_batch_seconds` and `second_batch_seconds` of batches of eight texts, of two and of one word, of a decoder
    with four and three new tokens
    """
    isa, internals, parts = map(CPU.module, ("isa", "_numba_internals", "_parts"))

    def run() -> None:
        if not isinstance(model, Decoder):
            model.embed([TEXT] * 8)
            model.embed([TEXT, TEXT])
            model.embed([""])
            return
        vocabulary = model.settings.vocab_size
        prompt = (np.arange(TOKENS) % vocabulary).tolist()[: max(1, model.settings.max_positions - 4)]
        model.generate([prompt, prompt], 4, temperature=0.0, ignore_eos=True)
        model.generate([prompt[:1]], 3, temperature=0.0, ignore_eos=True)

    first, second = _timed(run), _timed(run)
    return {
        "device": "cpu",
        "name": isa.active().cpu,
        "cache": internals.cache_folder(parts.run_parts),
        "first_batch_seconds": first,
        "second_batch_seconds": second,
    }


def _batch(model: BertEncoder) -> tuple[int, Any]:
    """The number of tokens of one text, and a function that computes its embedding."""
    if model.tokenizer is not None:
        return len(model.token_ids([TEXT])[0]), lambda: model.embed([TEXT])
    tokens = min(TOKENS, model.max_seq_length)
    ids = (np.arange(tokens) % model.config["vocab_size"])[None]
    return tokens, lambda: model.forward(ids)

"""Compile the kernels of a model before its first batch, and measure how long that and the first batches take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np

from .dispatch import CPU, Backend, canonical_device, numpy_backend
from .gpu import _execute, _load, _source, _splits
from .gpu._launch import Kernel, Launch
from .models.bert import BertEncoder
from .models.decoder import Decoder
from .models.text_embedder import TextEmbedder
from .threads import get_num_threads
from .transfer import as_on_gpu, to

TEXT = "Interest rates rose for the third time this year, and the bank expects one more step before winter."
TOKENS = 24  # for a model without a tokenizer
#: (texts, tokens of each) of the batches whose kernels are compiled: `linear` has its own for 1, 2 to 4, 5 to 16, up
#: to 32 and more tokens.
_BATCHES = ((1, 1), (1, 3), (1, 12), (1, 24), (1, 64))
#: Launched with tilings of each kind (`gpu/_splits.py`), whichever is the fastest.
_KINDS_BATCH = (8, 128)
_KERNELS_A_PROCESS = 8  # so many take about as long as a process takes to start
_LAUNCHERS = Backend("cuda", "rbe_gpu.gpu")


def _with_sources(kernels: Iterable[Kernel]) -> tuple[Kernel, ...]:
    kernels = tuple(kernels)
    missing = [op for op in ops_of(kernels) if not _source.has(op)]
    if missing:
        raise RuntimeError(
            f"this version has no CUDA kernels for {', '.join(missing)}, which the model needs"
        )
    return kernels


def kernels_of(model: BertEncoder, capability: tuple[int, int] = _load.OLDEST) -> tuple[Kernel, ...]:
    """The CUDA kernels that batches of `model` launch, each with its configuration, in the order of first launch.

    The launchers run on NumPy arrays, and nothing is computed: what they would launch is noted.

    capability : compute capability of the GPU
    """
    kernels: dict[Kernel, None] = {}

    def note(launches: tuple[Launch, ...]) -> None:
        kernels.update(dict.fromkeys(launch.kernel for launch in launches))

    there = as_on_gpu(model)

    def launch(texts: int, tokens: int) -> None:
        seq = min(tokens, model.max_positions)
        states = there.forward(np.zeros((texts, seq), np.int64))
        there.pool(states)
        there.pool(states, lengths=np.full(texts, seq))

    with numpy_backend(_LAUNCHERS), _execute.executor(note, capability), np.errstate(all="ignore"):
        for batch in _BATCHES:
            launch(*batch)
        for kind in _splits.KINDS:
            with _splits.preferring(kind):
                launch(*_KINDS_BATCH)
    return _with_sources(kernels)


def ops_of(kernels: Iterable[Kernel]) -> tuple[str, ...]:
    """The sources of kernels, by name, in the order of first launch."""
    return tuple(dict.fromkeys(kernel.op for kernel in kernels))


def _seconds(compile_one: Callable[[Kernel], Any], kernel: Kernel) -> float:
    start = time.perf_counter()
    compile_one(kernel)
    return time.perf_counter() - start


def processes_for(kernels: Sequence[Kernel]) -> int:
    """Processes that compile: one a thread of this package, each with some kernels."""
    return max(1, min(get_num_threads(), len(kernels) // _KERNELS_A_PROCESS))


def compile_all(
    compile_one: Callable[[Kernel], Any], kernels: Sequence[Kernel], processes: int
) -> dict[str, float]:
    """Call `compile_one` for every kernel, in processes where there is more than one.

    compile_one : can be pickled

    Returns
    -------
    Seconds by op, summed over its kernels
    """
    seconds: dict[str, float] = dict.fromkeys(ops_of(kernels), 0.0)
    timed = partial(_seconds, compile_one)
    if processes == 1:
        each = list(map(timed, kernels))
    else:
        # spawned: a process that has used CUDA, or runs threads, cannot be forked
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            each = list(pool.map(timed, kernels))
    for kernel, spent in zip(kernels, each, strict=True):
        seconds[kernel.op] += spent
    return seconds


def _timed(function: Any, *args: Any) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def _compile_only(architecture: int, kernel: Kernel) -> None:
    _load.compile_only(kernel, architecture)


def _compile_on(device: int, kernel: Kernel) -> None:
    _load.compile_kernel(kernel, device)


def compiled_only(model: BertEncoder, architectures: Sequence[int]) -> dict[str, Any]:
    """Compile a model's kernels for each architecture, without storing them. Needs no GPU.

    Returns
    -------
    `ops`, `kernels` (the number of those of all architectures), `processes`, and `compiled`: for each architecture
    the seconds of every op that it has kernels of, and `elapsed_seconds`, less where several processes compile

    Raises
    ------
    ImportError : CuPy, whose NVRTC compiles, is not installed
    RuntimeError : NVRTC does not support an architecture, or a source does not compile
    """
    try:
        import cupy  # noqa: F401
    except ImportError:
        raise ImportError(
            "CuPy, whose NVRTC compiles the kernels, is not installed: pip install 'rbe-gpu[cuda13]' (or [cuda12])"
        ) from None
    of_each = {architecture: kernels_of(model, divmod(architecture, 10)) for architecture in architectures}
    kernels = tuple(dict.fromkeys(kernel for each in of_each.values() for kernel in each))
    processes = processes_for(kernels)
    compiled = []
    for architecture, each in of_each.items():
        start = time.perf_counter()
        seconds = compile_all(partial(_compile_only, architecture), each, processes)
        elapsed = time.perf_counter() - start
        compiled.append({"architecture": architecture, "seconds": seconds, "elapsed_seconds": elapsed})
    return {
        "ops": list(ops_of(kernels)),
        "kernels": len(kernels),
        "processes": processes,
        "compiled": compiled,
    }


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
    `device`, `name`, `cache` (CuPy's folder of compiled binaries), `ops`, `kernels`, `processes` and `compiled` as
    `compiled_only` (near zero where binaries were cached), `move_seconds`, `first_batch_seconds`,
    `second_batch_seconds`, and `tokens`, the number of tokens of a batch

    Raises
    ------
    RuntimeError : the GPU is too old
    """
    import cupy

    number = int(where.partition(":")[2])
    kernels = kernels_of(model, _load.capability(number))
    processes = processes_for(kernels)
    gpu = cupy.cuda.Device(number)
    with gpu:
        cupy.cuda.runtime.free(0)  # creates the context: 0.1 to 1 s that belong to no op
        start = time.perf_counter()
        seconds = compile_all(partial(_compile_on, number), kernels, processes)
        elapsed = time.perf_counter() - start
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
        "cache": str(_load.cache_folder()),
        "ops": list(ops_of(kernels)),
        "kernels": len(kernels),
        "processes": processes,
        "compiled": [
            {"architecture": int(gpu.compute_capability), "seconds": seconds, "elapsed_seconds": elapsed}
        ],
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

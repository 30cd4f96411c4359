"""Utilisation of every core, and memory of the process, over time while the dense encoder runs; on a GPU utilisation,
memory, power, clocks and energy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from ..harness import nvml
from ..harness.measure import OURS
from ..harness.row_names import DENSE
from ..harness.rows import Results, Row, Session, own_cores
from .processes import Processes, RemoteEncoder

OP = "utilisation"
BUSY, RESIDENT = "busy", "resident"
STEP = 0.2  # seconds; counters of processor time have steps of 10 ms
#: of a GPU, with their units: the fields of `nvml.Sample`
GPU_METRICS = {
    "gpu_busy": "%", "gpu_memory": "B", "gpu_power": "W", "gpu_sm_clock": "MHz", "gpu_memory_clock": "MHz",
}  # fmt: skip
JOULES = "joules_per_1000_sentences"
ON_GPU = f"{DENSE}, GPU"  # the provider
GPU_NOT_MEASURED = "gpu_not_measured"  # a metric: the row's shape says why
WHOLE_RUN = "whole run"
MOST_CORES = 8  # of more, the mean, the busiest and the idlest are rows


def _times(cores: Sequence[int]) -> list[tuple[float, float]]:
    """(busy, all) seconds of each core since the machine was started."""
    known = psutil.cpu_times(percpu=True)
    chosen = [known[i] for i in cores if i < len(known)] or known
    sums = [sum(t) - getattr(t, "guest", 0.0) - getattr(t, "guest_nice", 0.0) for t in chosen]
    return [(s - t.idle - getattr(t, "iowait", 0.0), s) for s, t in zip(sums, chosen, strict=True)]


def samples(
    done: Callable[[float], bool], pid: int, cores: Sequence[int]
) -> Iterator[tuple[float, list[float], int]]:
    """(seconds since the start, busy share of each core since the last sample, resident bytes), until `done`.

    done : waits for so many seconds; returns whether the work is done
    """
    process, began, before = psutil.Process(pid), time.perf_counter(), _times(cores)
    while not done(STEP):
        now = _times(cores)
        shares = [(b - a) / max(s - r, 1e-9) for (a, r), (b, s) in zip(before, now, strict=True)]
        before = now
        yield time.perf_counter() - began, shares, process.memory_info().rss


def measure(encoder: RemoteEncoder, texts: list[str], seconds: float, session: Session) -> Iterator[Row]:
    """Rows of the busy share of the cores (%) and the resident memory of the encoder's process, every 0.2 s.

    All processes count: on a quiet machine that is the encoder.
    """
    cores, provider = own_cores(), encoder.provider
    encoder.library.send("embed_for", provider, texts, seconds)
    taken: list[Any] = [*samples(encoder.library.ready, encoder.library.pid, cores)]
    batches = encoder.library.receive()
    shape = f"{batches} batches of {len(texts)} texts"
    for at, shares, resident in taken:
        case = f"{at:.2f} s"
        if len(shares) <= MOST_CORES:
            named = {f"core {n}": share for n, share in zip(cores, shares, strict=True)}
        else:
            named = {
                "busiest core": max(shares),
                "mean": sum(shares) / len(shares),
                "idlest core": min(shares),
            }
        for name, share in named.items():
            yield session.row(OP, case, name, BUSY, "%", 100 * share, shape=shape)
        yield session.row(OP, case, OURS, RESIDENT, "B", float(resident), shape=shape)


def measure_gpu(
    encoder: RemoteEncoder, bus: str, texts: list[str], seconds: float, session: Session, library: Any = None
) -> Iterator[Row]:
    """Rows of a GPU every 0.2 s while an encoder embeds texts on it, and of its joules per 1,000 sentences.

    The energy is that of the whole board, idle power included: by its counter, or where it has none the sum of its
    power over time. What the GPU does not tell has no row.

    bus : its PCI bus id
    library : as `nvml.watched`
    """
    with nvml.watched(bus, library) as gpu:
        taken: list[tuple[float, nvml.Sample]] = []
        before, began = gpu.energy(), time.perf_counter()
        encoder.library.send("embed_for", encoder.provider, texts, seconds)
        try:
            while not encoder.library.ready(STEP):
                taken.append((time.perf_counter() - began, gpu.sample()))
            took, after = time.perf_counter() - began, gpu.energy()
        finally:  # also after an error of NVML: the next request would get this answer
            batches = encoder.library.receive()
        here = replace(session, backend="cuda", device=gpu.name)
    shape = f"{batches} batches of {len(texts)} texts"
    for at, sample in taken:
        for (metric, unit), value in zip(GPU_METRICS.items(), sample, strict=True):
            if value is not None:
                yield here.row(OP, f"{at:.2f} s", encoder.provider, metric, unit, value, shape=shape)
    powers = [sample.power for _, sample in taken if sample.power is not None]
    joules: float | None = None
    if before is not None and after is not None:
        joules, how = after - before, "energy counter"
    elif powers:
        joules, how = took * sum(powers) / len(powers), "mean power x time"
    if joules is not None:
        each = 1e3 * joules / (batches * len(texts))
        yield here.row(OP, WHOLE_RUN, encoder.provider, JOULES, "J", each, shape=f"{shape}, {how}")


def try_gpu(
    processes: Processes, folder: Path, texts: list[str], seconds: float, session: Session
) -> list[Row]:
    """Rows of `measure_gpu` of the dense encoder, or where CUDA, CuPy or NVML fail the one of `gpu_not_measured`.

    folder : of the model
    """
    try:
        encoder, bus = processes.load_on_gpu(ON_GPU, folder)
        encoder.embed(texts)  # compiles the kernels
        return [*measure_gpu(encoder, bus, texts, seconds, session)]
    except Exception as error:  # whatever it is, the rest of the report does not need a GPU
        return [gpu_not_measured(" ".join(str(error).split()) or type(error).__name__, session)]


def gpu_not_measured(reason: str, session: Session) -> Row:
    """The row that says why a GPU that is here was not measured."""
    return session.row(OP, WHOLE_RUN, ON_GPU, GPU_NOT_MEASURED, "", 1.0, shape=reason)


def gpu_reason(results: Results) -> str | None:
    """Why a GPU that is here was not measured; None where it was, or none is here."""
    row = results.one(OP, WHOLE_RUN, ON_GPU, GPU_NOT_MEASURED)
    return None if row is None else row.shape

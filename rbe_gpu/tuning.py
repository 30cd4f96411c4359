"""Measure `MatmulCosts`: each number is the difference of two matmuls that differ in one term."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from . import ops
from .blocks import RBEBlocks
from .codecs import SparseCodes
from .cpu_fallback.matmul_costs import MatmulCosts, costs_file, machine, store
from .encode import compress
from .threads import get_num_threads
from .workspace import Workspace

__all__ = ["MatmulCosts", "costs_file", "machine", "measure", "tune"]

SIZE = 1024  # rows and columns of the matrices: 4 MB dense, in the last-level cache as a layer's weights are
FAR = 1 << 24  # weights of a matrix that fits no cache: 64 MB
_ROUNDS = 5


def _matrix(rows: int | None = None, **options: Any) -> RBEBlocks:
    """A compressed matrix of SIZE columns. The values do not matter: they do not change the time."""
    rows = SIZE if rows is None else rows
    waves = np.sin(np.arange(rows * SIZE, dtype=np.float32) * np.float32(0.7)).reshape(rows, SIZE)
    return compress(waves, basis=False, **options)


def _nanoseconds(call: Callable[[], object]) -> float:
    """The fastest of `_ROUNDS` runs, after a first one that compiles: other load on the machine only adds time."""
    call()
    runs = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        count = 0
        while time.perf_counter() - start < 0.02:
            call()
            count += 1
        runs.append((time.perf_counter() - start) / count)
    return 1e9 * min(runs)


def tune(report: Callable[[str, float], None] | None = None) -> MatmulCosts:
    """Measure `MatmulCosts` on this machine (about 20 seconds), store them, and use them from now on.

    report : called with the name and the value of every number
    """
    measured = measure(report)
    store(measured)
    return measured


def measure(report: Callable[[str, float], None] | None = None) -> MatmulCosts:
    """Measure every number, with the number of threads that kernels use now."""
    threads, ws = get_num_threads(), Workspace()
    activations = {n: np.ones((n, SIZE), np.float32) for n in (1, 16, 32, 256)}
    weights = SIZE * SIZE

    def matmul(weight: Any, tokens: int, method: str | None = None) -> float:
        x, out = activations[tokens], np.empty((tokens, weight.shape[0]), np.float32)
        return _nanoseconds(lambda: ops.linear(x, weight, out=out, workspace=ws, method=method))

    flat = np.ones((SIZE, SIZE), np.float32)
    int4, int4_dct = (
        _matrix(codes="dense-int4", transform="none"),
        _matrix(codes="dense-int4", transform="dct"),
    )
    sparse = _matrix(codes="sparse-int8", density=0.1, transform="none")
    assert isinstance(sparse.codes, SparseCodes)
    entries = sparse.codes.entries
    measured: dict[str, float] = {}

    def note(name: str, value: float) -> None:
        # the difference of two times can be zero or negative when other processes disturb them
        measured[name] = max(value, getattr(MatmulCosts, name) / 10)
        if report is not None:
            report(name, measured[name])

    small, row = np.ones((64, 64), np.float32), np.ones((5, 64), np.float32)
    out = np.empty((5, 64), np.float32)
    note("call", _nanoseconds(lambda: ops.linear(row, small, out=out, workspace=ws)) / 2)
    dense = {n: matmul(flat, n) for n in (16, 256)}
    note("dense", (dense[256] - dense[16]) * threads / weights / 15)
    long = np.ones((FAR // SIZE, SIZE), np.float32)
    note("stream", (matmul(long, 1) - measured["call"]) / FAR)
    codes = {n: matmul(int4, n, "transform") for n in (1, 16, 256)}
    note("unpack", (codes[16] - dense[16]) * threads / weights)
    note("few", (codes[1] - measured["call"]) * threads / weights)
    # few rows, so that the transform of the activations is not small against the matmul
    low = [matmul(_matrix(64, codes="dense-int4", transform=t), 256, "transform") for t in ("none", "dct")]
    note("transform", (low[1] - low[0]) * threads / ((SIZE + 64) * 16))
    one, two = (matmul(sparse, n, "transform") for n in (16, 256))
    note("entry_vector", (two - one) * threads / entries / 15)
    note("entry", (one - 2 * measured["call"]) * threads / entries - measured["entry_vector"])
    note("entry_few", (matmul(sparse, 1, "transform") - measured["call"]) * threads / entries)
    half = _matrix(codes="sparse-int8", density=0.5, transform="none")
    note("spread", (matmul(half, 1, "transform") - measured["call"]) * threads / weights)
    plain, whole = matmul(int4, 32, "decode"), matmul(int4_dct, 32, "decode")
    note("synthesis", (whole - plain) * threads / weights / int4_dct.block)
    note("scatter", (matmul(sparse, 32, "decode") - plain) * threads / weights + measured["unpack"])
    return MatmulCosts(**measured)

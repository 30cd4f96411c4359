"""The numbers of `planner.Costs`, measured: each is the difference of two products that differ in one term."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from . import ops
from .blocks import RBEBlocks
from .codecs import SparseCodes
from .encode import compress
from .planner import Costs
from .threads import get_num_threads
from .workspace import Workspace

SIZE = 1024  # rows and columns of the matrices: 4 MB dense, in the last-level cache as a layer's weights are
FAR = 1 << 24  # weights of a matrix that no cache holds: 64 MB
_ROUNDS = 5


def _matrix(rows: int | None = None, **options: Any) -> RBEBlocks:
    """A compressed matrix of SIZE columns: what its values are does not change the time."""
    rows = SIZE if rows is None else rows
    waves = np.sin(np.arange(rows * SIZE, dtype=np.float32) * np.float32(0.7)).reshape(rows, SIZE)
    return compress(waves, basis=False, **options)


def _nanoseconds(call: Callable[[], object]) -> float:
    """The quickest of some runs, after one that compiles and warms: others on the machine only add."""
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


def measure(report: Callable[[str, float], None] | None = None) -> Costs:
    """Measure every number on the threads that kernels use now."""
    threads, ws = get_num_threads(), Workspace()
    activations = {n: np.ones((n, SIZE), np.float32) for n in (1, 16, 32, 256)}
    weights = SIZE * SIZE

    def product(weight: Any, tokens: int, method: str | None = None) -> float:
        x, out = activations[tokens], np.empty((tokens, weight.shape[0]), np.float32)
        return _nanoseconds(lambda: ops.linear(x, weight, out=out, workspace=ws, method=method))

    flat = np.ones((SIZE, SIZE), np.float32)
    int4, int4_dct = (
        _matrix(codes="dense-int4", transform="none"),
        _matrix(codes="dense-int4", transform="dct"),
    )
    sparse = _matrix(codes="sparse-int8", kept=0.1, transform="none")
    assert isinstance(sparse.codes, SparseCodes)
    entries = sparse.codes.entries
    found: dict[str, float] = {}

    def note(name: str, value: float) -> None:
        # a difference of two times can come out as nothing, or less, where other work disturbs it
        found[name] = max(value, getattr(Costs, name) / 10)
        if report is not None:
            report(name, found[name])

    small, row = np.ones((64, 64), np.float32), np.ones((5, 64), np.float32)
    out = np.empty((5, 64), np.float32)
    note("call", _nanoseconds(lambda: ops.linear(row, small, out=out, workspace=ws)) / 2)
    dense = {n: product(flat, n) for n in (16, 256)}
    note("dense", (dense[256] - dense[16]) * threads / weights / 15)
    long = np.ones((FAR // SIZE, SIZE), np.float32)
    note("stream", (product(long, 1) - found["call"]) / FAR)
    codes = {n: product(int4, n, "transform") for n in (1, 16, 256)}
    note("unpack", (codes[16] - dense[16]) * threads / weights)
    note("few", (codes[1] - found["call"]) * threads / weights)
    # few rows: there the transform of the activations is seen beside the product
    low = [product(_matrix(64, codes="dense-int4", transform=t), 256, "transform") for t in ("none", "dct")]
    note("transform", (low[1] - low[0]) * threads / ((SIZE + 64) * 16))
    one, two = (product(sparse, n, "transform") for n in (16, 256))
    note("entry_vector", (two - one) * threads / entries / 15)
    note("entry", (one - 2 * found["call"]) * threads / entries - found["entry_vector"])
    note("entry_few", (product(sparse, 1, "transform") - found["call"]) * threads / entries)
    half = _matrix(codes="sparse-int8", kept=0.5, transform="none")
    note("spread", (product(half, 1, "transform") - found["call"]) * threads / weights)
    plain, whole = product(int4, 32, "decode"), product(int4_dct, 32, "decode")
    note("synthesis", (whole - plain) * threads / weights / int4_dct.block)
    note("scatter", (product(sparse, 32, "decode") - plain) * threads / weights + found["unpack"])
    return Costs(**found)

"""The roof of this machine, measured: how fast memory is copied, and how fast matrices are multiplied.

operations per second <= min(peak rate, bandwidth * operations per byte)         (Williams, Waterman, Patterson 2009)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

import rbe_gpu as rbe

from ..harness.inputs import Inputs
from ..harness.measure import NUMPY, OURS
from ..harness.rows import Row, Session

OP = "machine"
COPY, FLOAT32, INT8 = "copy", "matmul float32", "matmul int8"
BANDWIDTH, RATE = "bandwidth", "rate"
RUNS = 9
TOKENS = 512
COPIED = 1 << 28  # bytes of each array: more than any cache


def _rates(work: Callable[[], Any], amount: float, runs: int) -> list[float]:
    """`amount` per second, of several runs after one that is not timed."""
    work()
    rates = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        rates.append(amount / (time.perf_counter() - began))
    return rates


def measure(inputs: Inputs, session: Session, quick: bool = False) -> Iterator[Row]:
    """Rows of the bandwidth of a copy (bytes read and written), and of the rates of float32 and int8 matmuls.

    Copies run on as many threads as the session has. float32 is NumPy's BLAS, int8 our own kernel (there is no other
    here that everybody has): its rate is what it reached, not what the processor could.
    """
    runs = 3 if quick else RUNS
    weight = inputs.square() if quick else inputs.broad()
    count = (COPIED >> (3 if quick else 0)) // 4
    source = np.resize(weight, count)
    target = np.empty_like(source)
    parts = [
        slice(i * count // session.threads, (i + 1) * count // session.threads)
        for i in range(session.threads)
    ]

    with ThreadPoolExecutor(session.threads) as pool:

        def copy() -> None:
            list(pool.map(lambda part: np.copyto(target[part], source[part]), parts))

        bandwidth = _rates(copy, 2.0 * source.nbytes, runs)
    yield session.row(OP, COPY, NUMPY, BANDWIDTH, "B/s", bandwidth, shape=f"({count},)")

    x = np.ascontiguousarray(
        np.resize(inputs.wide_rows(64) if quick else inputs.broad_rows(TOKENS), (TOKENS, weight.shape[1]))
    )
    out = np.empty((TOKENS, len(weight)), np.float32)
    work = 2.0 * TOKENS * weight.size
    shape = f"({TOKENS}, {weight.shape[1]}) x {weight.shape}"
    float32 = _rates(lambda: np.matmul(x, weight.T, out=out), work, runs)
    yield session.row(OP, FLOAT32, NUMPY, RATE, "FLOP/s", float32, shape=shape)
    m, ws = rbe.compress(weight, codes="dense-int8", transform="none", basis=False), rbe.Workspace()
    int8 = _rates(lambda: rbe.linear(x, m, out=out, workspace=ws, activation_bits=8), work, runs)
    yield session.row(OP, INT8, OURS, RATE, "FLOP/s", int8, shape=shape, dtype="int8")

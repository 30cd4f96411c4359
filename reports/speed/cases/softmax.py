"""y = exp(x - max) / sum exp(x - max), on the attention scores of a real sequence."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

import rbe_gpu as rbe

from ...harness import baselines
from ...harness.inputs import Inputs
from . import Case, rowwise

ROWS = (64, 1024)


def cases(inputs: Inputs, quick: bool = False) -> Iterator[Case]:
    for rows in ROWS[:1] if quick else ROWS:
        q, k = (inputs.sequence(f"2.{n}", rows)[0, :, 0] for n in "qk")
        scores = np.ascontiguousarray(q @ k.T / np.float32(np.sqrt(q.shape[1])))
        yield rowwise(
            "softmax",
            scores,
            lambda x, out: baselines.softmax(x, out=out),
            lambda f, t: f.softmax(t, dim=-1),
            lambda x, out: rbe.softmax(x, out=out),
        )

"""y = x / max(||x||_2, eps), on rows of MiniLM's hidden states."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

import rbe_gpu as rbe

from ...harness.baselines import F32
from ...harness.inputs import Inputs
from . import Case, rowwise

ROWS = (64, 2048)


def _in_numpy(x: F32, out: F32) -> F32:
    norm: F32 = np.linalg.norm(x, axis=-1, keepdims=True)
    np.divide(x, np.maximum(norm, np.float32(1e-12)), out=out)
    return out


def cases(inputs: Inputs, quick: bool = False) -> Iterator[Case]:
    for rows in ROWS[:1] if quick else ROWS:
        yield rowwise(
            "l2_normalize",
            inputs.rows("2.x", rows),
            _in_numpy,
            lambda f, t: f.normalize(t),
            lambda x, out: rbe.l2_normalize(x, out=out),
        )

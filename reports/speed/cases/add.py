"""y = x + residual, on the sums of MiniLM's residual stream."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

import rbe_gpu as rbe

from ...harness.baselines import as_torch
from ...harness.inputs import Inputs
from . import Case, rowwise

ROWS = (64, 2048)


def cases(inputs: Inputs, quick: bool = False) -> Iterator[Case]:
    for rows in ROWS[:1] if quick else ROWS:
        residual = inputs.rows("2.x", rows)
        (t_residual,) = as_torch(residual)
        yield rowwise(
            "add",
            inputs.rows("2.sum", rows),
            lambda x, out, r=residual: np.add(x, r, out=out),  # type: ignore[misc]
            lambda f, t, r=t_residual: t + r,  # type: ignore[misc]
            lambda x, out, r=residual: rbe.add(x, r, out=out),  # type: ignore[misc]
        )

"""y = x / sqrt(mean(x^2) + eps) * weight, on the sums that MiniLM normalises and the gains of its norms."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

import rbe_gpu as rbe

from ...harness import baselines
from ...harness.inputs import Inputs
from . import Case, rowwise

ROWS = (64, 2048)


def cases(inputs: Inputs, quick: bool = False) -> Iterator[Case]:
    weight = inputs.folder.tensor("encoder.layer.2.output.LayerNorm.weight")
    eps = 1e-6
    torch_weights = baselines.as_torch(weight)
    for rows in ROWS[:1] if quick else ROWS:
        yield rowwise(
            "rms_norm",
            inputs.rows("2.sum", rows),
            lambda x, out: baselines.rms_norm(x, weight, eps, out=out),
            lambda f, t: f.rms_norm(t, t.shape[-1:], *torch_weights, eps),
            lambda x, out: rbe.rms_norm(x, weight, eps, out=out),
        )
        residual = inputs.rows("2.x", rows)
        (t_residual,) = baselines.as_torch(residual)
        yield rowwise(
            "rms_norm",
            inputs.rows("2.sum", rows),
            lambda x, out, r=residual: baselines.rms_norm(np.add(x, r, out=out), weight, eps, out=out),  # type: ignore[misc]
            lambda f, t, r=t_residual: f.rms_norm(t + r, t.shape[-1:], *torch_weights, eps),  # type: ignore[misc]
            lambda x, out, r=residual: rbe.rms_norm(x, weight, eps, r, out=out),  # type: ignore[misc]
            suffix=", of a sum",
        )

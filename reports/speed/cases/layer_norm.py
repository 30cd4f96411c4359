"""y = (x - mean) / sqrt(var + eps) * weight + bias, on the sums that MiniLM normalises."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

import rbe_gpu as rbe

from ...harness import baselines
from ...harness.inputs import Inputs
from . import Case, rowwise

ROWS = (64, 2048)


def cases(inputs: Inputs, quick: bool = False) -> Iterator[Case]:
    weight, bias = (inputs.folder.tensor(f"encoder.layer.2.output.LayerNorm.{n}") for n in ("weight", "bias"))
    eps = float(inputs.folder.config["layer_norm_eps"])
    torch_weights = baselines.as_torch(weight, bias)
    for rows in ROWS[:1] if quick else ROWS:
        yield rowwise(
            "layer_norm",
            inputs.rows("2.sum", rows),
            lambda x, out: baselines.layer_norm(x, weight, bias, eps, out=out),
            lambda f, t: f.layer_norm(t, t.shape[-1:], *torch_weights, eps),
            lambda x, out: rbe.layer_norm(x, weight, bias, eps, out=out),
        )
        residual = inputs.rows("2.x", rows)
        (t_residual,) = baselines.as_torch(residual)
        yield rowwise(
            "layer_norm",
            inputs.rows("2.sum", rows),
            lambda x, out, r=residual: baselines.layer_norm(
                np.add(x, r, out=out), weight, bias, eps, out=out
            ),  # type: ignore[misc]
            lambda f, t, r=t_residual: f.layer_norm(t + r, t.shape[-1:], *torch_weights, eps),  # type: ignore[misc]
            lambda x, out, r=residual: rbe.layer_norm(x, weight, bias, eps, r, out=out),  # type: ignore[misc]
            suffix=", of a sum",
        )

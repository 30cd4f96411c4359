"""y = silu(gate) * up, [gate | up] = x, on what MiniLM's feed-forward layers compute."""

from __future__ import annotations

from collections.abc import Iterator

import rbe_gpu as rbe

from ...harness import baselines
from ...harness.inputs import Inputs
from . import Case, rowwise

ROWS = (64, 2048)


def cases(inputs: Inputs, quick: bool = False) -> Iterator[Case]:
    for rows in ROWS[:1] if quick else ROWS:
        x = inputs.rows("2.middle", rows)
        half = x.shape[1] // 2

        def in_numpy(x: baselines.F32, out: baselines.F32, n: int = half) -> baselines.F32:
            baselines.silu(x[:, :n], out=out)
            out *= x[:, n:]
            return out

        yield rowwise(
            "swiglu",
            x,
            in_numpy,
            lambda f, t, n=half: f.silu(t[:, :n]) * t[:, n:],  # type: ignore[misc]
            lambda x, out: rbe.swiglu(x, out=out),
            cols_out=half,
        )

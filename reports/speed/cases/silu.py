"""y = x / (1 + exp(-x)), on what MiniLM's feed-forward layers compute."""

from __future__ import annotations

from collections.abc import Iterator

import rbe_gpu as rbe

from ...harness import baselines
from ...harness.inputs import Inputs
from . import Case, rowwise

ROWS = (64, 2048)


def cases(inputs: Inputs, quick: bool = False) -> Iterator[Case]:
    for rows in ROWS[:1] if quick else ROWS:
        yield rowwise(
            "silu",
            inputs.rows("2.middle", rows),
            lambda x, out: baselines.silu(x, out=out),
            lambda f, t: f.silu(t),
            lambda x, out: rbe.silu(x, out=out),
        )

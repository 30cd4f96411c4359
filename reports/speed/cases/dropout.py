"""y = x / (1 - p) where kept, else 0: every library draws its own random numbers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

import rbe_gpu as rbe

from ...harness.baselines import F32
from ...harness.inputs import Inputs
from ...harness.row_names import WIDE
from . import Case, rowwise

ROWS = (768, 2048)
#: seconds of the original system with an output buffer and without, the generator made beforehand; it named no shape,
#: and 768 x 768 float32 is that of its linear layer
ORIGINAL = 0.25e-3, 0.30e-3


def cases(inputs: Inputs, quick: bool = False) -> Iterator[Case]:
    p = 0.1
    generator = np.random.default_rng(1)

    def in_numpy(x: F32, out: F32) -> F32:
        np.multiply(x, generator.random(x.shape, np.float32) >= np.float32(p), out=out)
        out *= np.float32(1 / (1 - p))
        return out

    def case(x: F32, suffix: str = "", original: tuple[float, float] | None = None) -> Case:
        return rowwise(
            "dropout",
            x,
            in_numpy,
            lambda f, t: f.dropout(t, p, training=True),
            lambda x, out: rbe.dropout(x, p, seed=1, out=out),
            checked=False,
            suffix=suffix,
            original=original,
        )

    for rows in ROWS[:1] if quick else ROWS:
        yield case(inputs.wide_rows(rows))
    if inputs.wide is not None:
        yield case(inputs.wide.rows(768), WIDE, ORIGINAL)

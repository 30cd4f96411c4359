"""The activations over all of the range where they bend, element by element."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rbe_gpu import reference

from .conftest import TestBackend

RANGE = np.concatenate(
    [np.linspace(-90, 90, 40_001), np.linspace(-8, 8, 40_001), np.geomspace(1e-30, 1e30, 2_001)]
)

#: Relative and absolute error of a float32 result
BOUNDS: dict[str, tuple[str, dict[str, Any], float, float]] = {
    "silu": ("silu", {}, 6e-7, 3e-37),
    "gelu": ("gelu", {}, 6e-7, 1.2e-7),
    "gelu_tanh": ("gelu", {"approximate": "tanh"}, 3e-6, 1.2e-7),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_every_element(backend: TestBackend, name: str) -> None:
    op, options, relative, absolute = BOUNDS[name]
    if name == "gelu" and backend.name != "cpu":
        absolute = 5e-8  # the polynomial of log2 Phi: 1 + erf cancels where its values are near 0
    x = np.concatenate([RANGE, -RANGE]).astype(np.float32)
    y = backend.get(backend.op(op)(**backend.put_all({"x": x, **options}))).astype(np.float64)
    want = reference.ACTIVATIONS[name](x.astype(np.float64))
    off, size = np.abs(y - want), np.abs(want)
    worst = (off - relative * size).argmax()
    assert off[worst] <= relative * size[worst] + absolute

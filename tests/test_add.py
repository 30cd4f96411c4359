"""add beyond the conformance cases: every length, either input as the result, exact sums."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import rbe_gpu as rbe

from . import real

DTYPES = pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name
)


@DTYPES
def test_sums_are_those_of_numpy(dtype: type) -> None:
    """Bit for bit: one sum in float32, rounded once."""
    x, residual = real.activations(400).astype(dtype), real.activations(400, 2).astype(dtype)
    assert rbe.add(x, residual).tobytes() == (x + residual).tobytes()


@pytest.mark.parametrize("over", ["x", "residual"])
def test_over_an_input(over: str) -> None:
    arrays = {"x": real.activations(65), "residual": real.activations(65, 2)}
    want = arrays["x"] + arrays["residual"]
    out = arrays[over]
    assert rbe.add(**arrays, out=out) is out
    np.testing.assert_array_equal(out, want)


@DTYPES
def test_any_length(dtype: type) -> None:
    """No element past the end, with one thread and with several."""
    values = real.activations(400).reshape(-1).astype(dtype)
    for size in (1, 15, 16, 17, 8191, 76_001):
        out = values[: size + 16].copy()
        rbe.add(values[:size], values[size : 2 * size], out=out[:size])
        np.testing.assert_array_equal(out[:size], values[:size] + values[size : 2 * size])
        np.testing.assert_array_equal(out[size:], values[size : size + 16])

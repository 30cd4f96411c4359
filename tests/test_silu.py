"""silu beyond the conformance cases: the whole float32 range, and lengths around the vector width."""

from __future__ import annotations

import numpy as np

import rbe_gpu as rbe
from rbe_gpu import reference
from rbe_gpu.registry import relative_error

from . import real


def test_every_magnitude() -> None:
    """Of either sign, from subnormals to the largest float32: a relative error under 4e-7, or 1e-36."""
    x = np.logspace(-44, 38.5, 20_000).astype(np.float32)
    x = np.concatenate([x, -x, np.zeros(1, np.float32)])
    want = reference.silu(x)
    assert (np.abs(rbe.silu(x) - want) <= 4e-7 * np.abs(want) + 1e-36).all()


def test_limits() -> None:
    x = np.array([np.inf, -np.inf, np.nan, 0.0], np.float32)
    np.testing.assert_array_equal(rbe.silu(x), [np.inf, 0.0, np.nan, 0.0])


def test_in_place_of_any_length() -> None:
    """No element past the end, none twice."""
    values = real.activations(110).reshape(-1)
    for size in (1, 15, 16, 17, 8191, 40_001):
        whole = values[: size + 16].copy()
        want = reference.silu(whole[:size])
        assert relative_error(rbe.silu(whole[:size], out=whole[:size]), want) <= 3e-7
        np.testing.assert_array_equal(whole[size:], values[size : size + 16])


def test_bias_of_one_long_row() -> None:
    """Threads split within the row, and each takes the bias from its own column on."""
    x = real.activations(110).reshape(1, -1)
    bias = np.resize(real.layer(3, "intermediate.dense.bias"), x.shape[1])
    assert relative_error(rbe.silu(x, bias), reference.silu(x, bias)) <= 3e-7

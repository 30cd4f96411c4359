"""gelu beyond the conformance cases: the whole float32 range, accuracy in the tails."""

from __future__ import annotations

import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu import reference
from rbe_gpu.registry import relative_error

from . import real

FORMS = pytest.mark.parametrize("approximate", ["none", "tanh"])


def ffn_input() -> np.ndarray:
    """What gelu sees in layer 3, (65, 1536) float32."""
    w, b = real.layer(3, "intermediate.dense.weight"), real.layer(3, "intermediate.dense.bias")
    return reference.linear(real.activations(65), w, b).astype(np.float32)


@FORMS
def test_real_activations(approximate: str) -> None:
    x = ffn_input()
    want = reference.gelu(x, approximate=approximate)
    assert relative_error(rbe.gelu(x, approximate=approximate), want) <= 3e-7


@FORMS
def test_every_magnitude(approximate: str) -> None:
    """Of either sign, from subnormals to the largest float32: an absolute error under 2e-7 max(|x|, 1)."""
    x = np.logspace(-44, 38.5, 20_000).astype(np.float32)
    x = np.concatenate([x, -x, np.zeros(1, np.float32)])
    want = reference.gelu(x, approximate=approximate)
    error = np.abs(rbe.gelu(x, approximate=approximate) - want)
    assert (error <= 2e-7 * np.maximum(np.abs(want), 1.0)).all()


def test_small_values_are_halves() -> None:
    """gelu(x) = x/2 (1 + O(x)): the relative accuracy holds at 0."""
    x = np.float32(1e-6) * real.activations(1)
    y = rbe.gelu(x)
    np.testing.assert_allclose(y, reference.gelu(x), rtol=2e-7)


@FORMS
def test_limits(approximate: str) -> None:
    x = np.array([np.inf, -np.inf, np.nan, 0.0], np.float32)
    np.testing.assert_array_equal(rbe.gelu(x, approximate=approximate), [np.inf, 0.0, np.nan, 0.0])


def test_bias_of_one_long_row() -> None:
    """Threads split within the row, and each takes the bias from its own column on."""
    x = ffn_input().reshape(1, -1)
    bias = np.resize(real.layer(3, "output.dense.bias"), x.shape[1])
    assert relative_error(rbe.gelu(x, bias), reference.gelu(x, bias)) <= 3e-7


def test_in_place_of_any_length() -> None:
    """No element past the end, none twice."""
    for size in (1, 15, 16, 17, 8191, 20_001):
        whole = np.resize(ffn_input(), size + 16).reshape(-1)
        after = whole[size:].copy()
        want = reference.gelu(whole[:size])
        assert relative_error(rbe.gelu(whole[:size], out=whole[:size]), want) <= 3e-7
        np.testing.assert_array_equal(whole[size:], after)

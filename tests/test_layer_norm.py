"""layer_norm beyond the conformance cases: means far from zero, long rows, outputs over inputs."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu import reference
from rbe_gpu.registry import OPS, relative_error

from . import real


def vectors(cols: int) -> tuple[np.ndarray, np.ndarray]:
    names = ("output.LayerNorm.weight", "output.LayerNorm.bias")
    return tuple(np.resize(real.layer(3, n), cols) for n in names)  # type: ignore[return-value]


def naive(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    """The textbook in float32 with one running sum: mean of squares minus square of the mean."""
    n = np.float32(x.shape[1])
    mean = np.cumsum(x, axis=1, dtype=np.float32)[:, -1:] / n
    square = np.cumsum(x * x, axis=1, dtype=np.float32)[:, -1:] / n
    with np.errstate(invalid="ignore"):
        return (x - mean) / np.sqrt(square - mean * mean + np.float32(eps)) * weight + bias


@pytest.mark.parametrize("cols", [33, 384, 1024, 1536, 5000])
def test_mean_far_from_zero(cols: int) -> None:
    """Mean 1e4, spread 0.1: the last place of float32 is 1e-3 there, and s^2 has no digit of the variance."""
    weight, bias = vectors(cols)
    spread = real.activations(-(-3 * cols // 384)).reshape(-1)[: 3 * cols].reshape(3, cols)
    x = np.float32(1e4) + np.float32(0.1) / spread.std() * spread
    want, _ = reference.layer_norm(x, weight, bias, 1e-12)
    assert relative_error(rbe.layer_norm(x, weight, bias, 1e-12), want) <= 1e-6
    assert not relative_error(naive(x, weight, bias, 1e-12), want) <= 1e-2


def test_row_of_two_million_columns() -> None:
    cols = 1 << 21
    weight, bias = vectors(cols)
    x = real.weight("embeddings.word_embeddings.weight").reshape(-1)[:cols][None] + np.float32(10)
    want, _ = reference.layer_norm(x, weight, bias)
    assert relative_error(rbe.layer_norm(x, weight, bias), want) <= 5e-7
    assert not relative_error(naive(x, weight, bias, 1e-5), want) <= 1e-4


@pytest.mark.parametrize("at", [0, 5, 16, 1000])
def test_one_huge_value(at: int) -> None:
    """An outlier among the 16 values that the shift is taken from, or elsewhere."""
    weight, bias = vectors(1024)
    x = real.activations(8).reshape(3, 1024).copy()
    x[:, at] = 3e4
    want, _ = reference.layer_norm(x, weight, bias)
    assert relative_error(rbe.layer_norm(x, weight, bias), want) <= 1e-6


@pytest.mark.parametrize("cols", [5, 33, 1024, 1500])
@pytest.mark.parametrize("value", [0.1, -1e4, 3e30])
def test_constant_row(cols: int, value: float) -> None:
    """No variance: the bias alone, as far as eps allows, and no NaN from a rounded-off negative variance."""
    weight, bias = vectors(cols)
    x = np.full((2, cols), value, np.float32)
    np.testing.assert_allclose(rbe.layer_norm(x, weight, bias, 1e-5), np.tile(bias, (2, 1)), atol=1e-6)


DTYPES = pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name
)


@DTYPES
@pytest.mark.parametrize("cols", [65, 1536])
def test_outputs_over_inputs(cols: int, dtype: type) -> None:
    """The residual stream in place: residual_out over residual, out over x, and the other way round."""
    weight, bias = (v.astype(dtype) for v in vectors(cols))
    rows = -(-3 * cols // 384)
    x, residual = (
        real.activations(rows, i).reshape(-1)[: 3 * cols].reshape(3, cols).astype(dtype) for i in (3, 2)
    )
    want, want_sum = reference.layer_norm(x, weight, bias, residual=residual)
    tol = OPS["layer_norm"].tolerances[np.dtype(dtype).name]
    for swap in (False, True):
        a, r = x.copy(), residual.copy()
        out, total = (r, a) if swap else (a, r)
        assert rbe.layer_norm(a, weight, bias, residual=r, out=out, residual_out=total) is out
        assert relative_error(out, want, tol.floor) <= tol.rel
        assert relative_error(total, want_sum, tol.floor) <= tol.rel


def test_read_only_weight() -> None:
    """Weights straight from a file are read-only."""
    weight, bias = real.layer(3, "output.LayerNorm.weight"), real.layer(3, "output.LayerNorm.bias")
    assert not weight.flags.writeable
    x = real.activations(3)
    want, _ = reference.layer_norm(x, weight, bias)
    assert relative_error(rbe.layer_norm(x, weight, bias), want) <= 5e-7

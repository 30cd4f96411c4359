"""swiglu beyond the conformance cases: splits inside and between rows."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu import reference
from rbe_gpu.registry import OPS, relative_error

from . import real


@pytest.mark.parametrize("shape", [(1, 40_000), (20_000, 2), (301, 134)])
def test_threads_split_anywhere(shape: tuple[int, int]) -> None:
    """One long row, many rows of one pair, and rows that no chunk of a thread ends on."""
    x = real.activations(110).reshape(-1)[: shape[0] * shape[1]].reshape(shape)
    bias = np.resize(real.layer(3, "intermediate.dense.bias"), shape[1])
    assert relative_error(rbe.swiglu(x, bias), reference.swiglu(x, bias)) <= 5e-7


def test_is_silu_times_up() -> None:
    x = real.activations(3)
    np.testing.assert_allclose(rbe.swiglu(x), rbe.silu(x[:, :192].copy()) * x[:, 192:], rtol=2e-7)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name)
def test_half_rounds_once(dtype: type) -> None:
    """The bias is added and the product taken in float32; only the result is rounded."""
    x = real.activations(3).astype(dtype)
    bias = real.layer(3, "output.dense.bias").astype(dtype)
    tol = OPS["swiglu"].tolerances[np.dtype(dtype).name]
    want = reference.swiglu(x, bias)
    y = rbe.swiglu(x, bias)
    assert relative_error(y, want, tol.floor) <= tol.rel
    exact = want.astype(dtype)
    assert np.count_nonzero(y != exact) <= 0.002 * y.size  # a tie or a near-tie at most


def test_limits() -> None:
    gate = np.array([-np.inf, -np.inf, np.inf, np.nan, 0.0], np.float32)
    up = np.array([2.0, np.inf, -1.0, 1.0, np.inf], np.float32)
    np.testing.assert_array_equal(
        rbe.swiglu(np.concatenate([gate, up])), [0.0, np.nan, -np.inf, np.nan, np.nan]
    )

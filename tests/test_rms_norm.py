"""rms_norm beyond the conformance cases: long rows, outputs over inputs."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu import reference
from rbe_gpu.registry import OPS, relative_error

from . import real


def gain(cols: int) -> np.ndarray:
    return np.resize(real.layer(3, "output.LayerNorm.weight"), cols)


def test_row_of_two_million_columns() -> None:
    """One running float32 sum of squares loses what a sum of chunks keeps."""
    cols = 1 << 21
    x, weight = real.weight("embeddings.word_embeddings.weight").reshape(-1)[:cols][None], gain(cols)
    want, _ = reference.rms_norm(x, weight)
    assert relative_error(rbe.rms_norm(x, weight), want) <= 5e-7
    running = np.sqrt(np.cumsum(x[0] * x[0], dtype=np.float32)[-1] / np.float32(cols) + np.float32(1e-6))
    assert relative_error(x / running * weight, want) > 1e-5


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1.0])
def test_eps(eps: float) -> None:
    x, weight = real.activations(3) * np.float32(1e-3), gain(384)
    want, _ = reference.rms_norm(x, weight, eps)
    assert relative_error(rbe.rms_norm(x, weight, eps), want) <= 5e-7


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name
)
@pytest.mark.parametrize("cols", [65, 1536])
def test_outputs_over_inputs(cols: int, dtype: type) -> None:
    """The residual stream in place: residual_out over residual, out over x, and the other way round."""
    weight, rows = gain(cols).astype(dtype), -(-3 * cols // 384)
    x, residual = (
        real.activations(rows, i).reshape(-1)[: 3 * cols].reshape(3, cols).astype(dtype) for i in (3, 2)
    )
    want, want_sum = reference.rms_norm(x, weight, residual=residual)
    tol = OPS["rms_norm"].tolerances[np.dtype(dtype).name]
    for swap in (False, True):
        a, r = x.copy(), residual.copy()
        out, total = (r, a) if swap else (a, r)
        assert rbe.rms_norm(a, weight, residual=r, out=out, residual_out=total) is out
        assert relative_error(out, want, tol.floor) <= tol.rel
        assert relative_error(total, want_sum, tol.floor) <= tol.rel


def test_half_sums_are_float32() -> None:
    """300^2 is beyond float16, and 1536 such squares are summed."""
    x = (real.activations(4).reshape(1, 1536) * 300).astype(np.float16)
    want, _ = reference.rms_norm(x, gain(1536).astype(np.float16))
    assert relative_error(rbe.rms_norm(x, gain(1536).astype(np.float16)), want) <= 5e-4

"""l2_normalize beyond the conformance cases: NumPy's and PyTorch's results, long rows, tiny and huge values."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu import reference
from rbe_gpu.registry import relative_error

from . import real


@pytest.mark.parametrize("cols", [1, 7, 8, 128, 129, 384, 1000, 1152])
def test_bits_of_numpy(cols: int) -> None:
    """The same pairwise sums: vectors do not change where they are normalized by NumPy."""
    x = np.resize(real.activations(200).reshape(-1), (64, cols))
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_array_equal(rbe.l2_normalize(x), x / np.maximum(norms, np.float32(1e-12)))


def test_pytorch() -> None:
    torch = pytest.importorskip("torch")
    x = np.concatenate([real.activations(8), np.zeros((1, 384), np.float32), real.activations(2) * 1e-13])
    for eps in (1e-12, 0.5):
        want = torch.nn.functional.normalize(torch.from_numpy(x), eps=eps).numpy()
        assert relative_error(rbe.l2_normalize(x, eps), want.astype(np.float64)) <= 3e-7


def test_row_of_two_million_columns() -> None:
    """One running float32 sum of squares loses what pairwise sums keep."""
    cols = 1 << 21
    x = real.weight("embeddings.word_embeddings.weight").reshape(-1)[:cols][None]
    want = reference.l2_normalize(x)
    assert relative_error(rbe.l2_normalize(x), want) <= 3e-7
    running = np.sqrt(np.cumsum(x[0] * x[0], dtype=np.float32)[-1])
    assert relative_error(x / running, want) > 1e-5


def test_rows_do_not_depend_on_each_other() -> None:
    """With one thread and with several."""
    x = real.activations(400)
    together = rbe.l2_normalize(x)
    for row in (0, 17, 399):
        np.testing.assert_array_equal(rbe.l2_normalize(x[row : row + 1]), together[row : row + 1])


def test_overflow_and_underflow_of_squares() -> None:
    """Squares beyond float32 give the right direction; a norm below eps divides the row by eps."""
    x = np.array([[3e19, 4e19], [3e38, -4e-45], [3e-25, 4e-25], [3e-45, 0]], np.float32)
    want = [[0.6, 0.8], [1, 0], [3e-13, 4e-13], [float(x[3, 0]) / 1e-12, 0]]
    np.testing.assert_allclose(rbe.l2_normalize(x), want, rtol=1e-6)
    np.testing.assert_allclose(
        rbe.l2_normalize(x, eps=0.0), [[0.6, 0.8], [1, 0], [0.6, 0.8], [1, 0]], rtol=1e-6
    )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name)
def test_half_sums_are_float32(dtype: type) -> None:
    """300^2 is beyond float16, and 1536 such squares are summed."""
    x = (real.activations(4).reshape(1, 1536) * 300).astype(dtype)
    assert relative_error(rbe.l2_normalize(x), reference.l2_normalize(x)) <= 4e-3


def test_in_place() -> None:
    x = real.activations(65)
    want = rbe.l2_normalize(x)
    assert rbe.l2_normalize(x, out=x) is x
    np.testing.assert_array_equal(x, want)

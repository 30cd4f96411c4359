"""softmax beyond the conformance cases: long rows, large scores, masks that hide NaN."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu import reference
from rbe_gpu.registry import OPS, relative_error

from . import real

LONG = 1 << 21


def embedding_row(count: int) -> np.ndarray:
    """`count` values of the word embeddings as one row, scaled to scores of a few units."""
    return real.weight("embeddings.word_embeddings.weight").reshape(-1)[:count][None] * np.float32(20)


def test_row_of_two_million_columns() -> None:
    """Every part of a long row keeps float32 accuracy; one running float32 sum does not."""
    x = embedding_row(LONG)
    want = reference.softmax(x)
    assert relative_error(rbe.softmax(x), want) <= 1e-6
    e = np.exp(x[0] - x.max())
    running = e[None] / np.cumsum(e, dtype=np.float32)[-1]
    assert relative_error(running, want) > 1e-5


def test_rows_sum_to_one() -> None:
    y = rbe.softmax(np.tile(embedding_row(100_000), (3, 1)))
    np.testing.assert_allclose(y.sum(axis=1, dtype=np.float64), 1.0, rtol=2e-7)


@pytest.mark.parametrize("shift", [-1e6, 1e6, 3e38])
def test_scores_of_any_size(shift: float) -> None:
    """Only differences count: no score overflows exp."""
    x = (np.float32(shift) + np.zeros((2, 5000), np.float32)).astype(np.float32)
    x[0, 3:7] -= np.float32(abs(shift)) / 8
    assert relative_error(rbe.softmax(x), reference.softmax(x)) <= 1e-6


@pytest.mark.parametrize("cols", [65, 5000])
@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name
)
def test_masked_nan_is_not_seen(cols: int, dtype: type) -> None:
    x = real.activations(-(-2 * cols // 384)).reshape(-1)[: 2 * cols].reshape(2, cols).astype(dtype)
    keep = np.ones(x.shape, bool)
    for row, col, value in ((0, 0, np.nan), (0, cols - 1, np.inf), (1, 20, -np.inf)):
        x[row, col], keep[row, col] = value, False
    y = rbe.softmax(x, mask=keep)
    assert not y[~keep].any()
    tol = OPS["softmax"].tolerances[np.dtype(dtype).name]
    assert relative_error(y, reference.softmax(x, mask=keep), tol.floor) <= tol.rel


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_inf_fill_a_long_row(value: float) -> None:
    """In any chunk of the row, as in the reference."""
    x = np.zeros((3, 5000), np.float32)
    for row, col in enumerate((1, 2500, 4999)):
        x[row, col] = value
    want = reference.softmax(x)
    np.testing.assert_array_equal(np.isnan(rbe.softmax(x)), np.isnan(want))


def test_first_chunks_of_minus_inf() -> None:
    x = np.full((2, 5000), -np.inf, np.float32)
    x[0, 4500:] = real.activations(2).reshape(-1)[:500]
    y = rbe.softmax(x)
    assert relative_error(y, reference.softmax(x)) <= 1e-6
    assert not y[1].any()

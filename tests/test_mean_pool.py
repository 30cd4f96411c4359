"""mean_pool beyond the conformance cases: NumPy's bits, batches, threads, long sequences."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu import reference
from rbe_gpu.registry import relative_error

from . import real

DTYPES = pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name
)
LENGTHS = np.array([40, 0, 3, 128, 1])


def packed(dtype: type) -> tuple[np.ndarray, np.ndarray]:
    return real.activations(int(LENGTHS.sum())).astype(dtype), np.cumsum([0, *LENGTHS])


@DTYPES
def test_bits_of_numpy(dtype: type) -> None:
    """`numpy.mean` over the tokens of each sequence, in float32."""
    x, ends = packed(dtype)
    found = rbe.mean_pool(x, cu_seqlens=ends, dtype=np.float32)
    assert found.dtype == np.float32
    for b in np.flatnonzero(LENGTHS):
        want = x[ends[b] : ends[b + 1]].mean(axis=0, dtype=np.float32)
        np.testing.assert_array_equal(found[b], want)
    assert not found[1].any()


@DTYPES
def test_padded_packed_and_alone_are_the_same(dtype: type) -> None:
    """Bit for bit, whatever the padding holds; with one thread and with several."""
    x, ends = packed(dtype)
    padded = np.full((LENGTHS.size, 200, 384), np.nan, dtype)  # enough for several threads
    for b, length in enumerate(LENGTHS):
        padded[b, :length] = x[ends[b] : ends[b + 1]]
    want = rbe.mean_pool(x, cu_seqlens=ends)
    assert rbe.mean_pool(padded, LENGTHS).tobytes() == want.tobytes()
    for b, length in enumerate(LENGTHS):
        alone = rbe.mean_pool(padded[b : b + 1, :length].copy())
        assert alone.tobytes() == want[b : b + 1].tobytes()


def test_long_sequence() -> None:
    x = np.resize(real.activations(500), (1, 20_000, 384))
    assert relative_error(rbe.mean_pool(x), reference.mean_pool(x)) <= 2e-5


def test_out_over_x_is_refused() -> None:
    x = real.activations(3)[None]
    with pytest.raises(ValueError, match="out shares memory with x"):
        rbe.mean_pool(x, out=x[0, :1])


def test_out_decides_the_dtype() -> None:
    x, ends = packed(np.float16)
    out = np.empty((LENGTHS.size, 384), np.float32)
    assert rbe.mean_pool(x, cu_seqlens=ends, dtype=np.float16, out=out) is out

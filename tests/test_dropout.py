"""dropout: the published Philox vectors, the exact mask, its statistics, and streams that go on."""

from __future__ import annotations

from math import sqrt

import ml_dtypes
import numpy as np
import pytest
from rbe_gpu.cpu_fallback._jit import cpu_kernel
from rbe_gpu.cpu_fallback.dropout import _philox_words

import rbe_gpu as rbe
from rbe_gpu import reference

from . import real

PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
ONES = 0xFFFFFFFF

# kat_vectors of the Random123 distribution, philox4x32 10 rounds: counter, key, result
KNOWN = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
)


@cpu_kernel
def _words(words, counter, key0, key1):  # type: ignore[no-untyped-def]
    _philox_words(words, counter, key0, key1)


def cpu_words(count: int, seed: int, offset: int) -> np.ndarray:
    """The kernel's words for counters offset, offset + 1, ..."""
    words = np.empty(1024, np.uint32)
    _words(words, np.uint64(offset), np.uint32(seed & ONES), np.uint32(seed >> 32))
    return words[: 4 * count].reshape(count, 4)


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN, ids=["zeros", "ones", "pi"])
def test_reference_philox_is_the_published_one(counter: tuple, key: tuple, result: tuple) -> None:
    assert reference.philox4x32(counter, key) == result


def test_kernel_philox_known_vector() -> None:
    assert tuple(cpu_words(1, 0, 0)[0]) == KNOWN[0][2]


@pytest.mark.parametrize("offset", [0, 2**32 - 100, 2**64 - 100])
@pytest.mark.parametrize("seed", [0, 0x299F31D0A4093822, 2**64 - 1])
def test_kernel_philox_is_the_reference(seed: int, offset: int) -> None:
    """Across the carry between the counter's words, and around its end."""
    words = cpu_words(256, seed, offset)
    for block in (0, 1, 7, 99, 100, 255):
        n = (offset + block) % 2**64
        want = reference.philox4x32((n & ONES, n >> 32, 0, 0), (seed & ONES, seed >> 32))
        assert tuple(words[block]) == want


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name
)
@pytest.mark.parametrize("count", [1, 5, 1023, 1025, 20_011])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.999, 1.0])
def test_mask_is_the_reference(p: float, count: int, dtype: type) -> None:
    """Bit for bit, with one thread and with several."""
    y = rbe.dropout(np.ones(count, dtype), p, seed=77, offset=13)
    np.testing.assert_array_equal(y != 0, reference.dropout_keep(count, p, 77, 13))


def test_threshold_is_exact() -> None:
    """A word equal to floor(p 2^32) is kept, one below is dropped."""
    words = np.sort(cpu_words(256, 3, 0).reshape(-1))
    for word in words[[10, 500, 1000]]:
        y = rbe.dropout(np.ones(1024, np.float32), int(word) / 2**32, seed=3)
        assert np.count_nonzero(y) == np.count_nonzero(words >= word)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_kept_fraction(p: float) -> None:
    """Within five standard deviations of 1 - p, for every lane and for neighbours together."""
    count = 1 << 20
    keep = rbe.dropout(np.ones(count, np.float32), p, seed=2024) != 0
    for part in (keep, *(keep[lane::4] for lane in range(4))):
        assert abs(part.mean() - (1 - p)) < 5 * sqrt(p * (1 - p) / part.size)
    both = (1 - p) ** 2
    assert abs((keep[1:] & keep[:-1]).mean() - both) < 10 * sqrt(both * (1 - both) / count)


def test_mean_is_kept() -> None:
    """The expectation of the result is x."""
    x = np.abs(real.activations(256)) + np.float32(1)
    total = sum(rbe.dropout(x, 0.25, seed=s).astype(np.float64) for s in range(40))
    assert abs((total / 40 / x).mean() - 1) < 5 * sqrt(0.25 / 0.75 / (40 * x.size))


def test_offset_goes_on() -> None:
    """Calls of 1024 and 5 elements with offsets 0 and 256 draw the mask of one call of 1029."""
    x = real.activations(3).reshape(-1)[:1029].copy()
    whole = rbe.dropout(x, 0.3, seed=9)
    np.testing.assert_array_equal(whole[:1024], rbe.dropout(x[:1024], 0.3, seed=9))
    np.testing.assert_array_equal(whole[1024:], rbe.dropout(x[1024:], 0.3, seed=9, offset=256))


def test_seeds_differ() -> None:
    """Two seeds agree on as many elements as independent masks do."""
    x = np.ones(1 << 16, np.float32)
    a, b, c = (rbe.dropout(x, 0.5, seed=s) != 0 for s in (1, 2, 1 << 32))
    for other in (b, c):
        assert abs((a == other).mean() - 0.5) < 5 * sqrt(0.25 / x.size)


def test_p_zero_changes_nothing() -> None:
    x = real.activations(65)
    x[3, 5], x[7, 0] = np.nan, np.inf
    np.testing.assert_array_equal(rbe.dropout(x, 0.0, seed=1), x)


def test_p_one_leaves_the_residual() -> None:
    x, residual = np.full((65, 384), np.nan, np.float32), real.activations(65)
    assert not rbe.dropout(x, 1.0, seed=1).any()
    np.testing.assert_array_equal(rbe.dropout(x, 1.0, seed=1, residual=residual), residual)


@pytest.mark.parametrize("over", ["x", "residual"])
def test_over_an_input(over: str) -> None:
    arrays = {"x": real.activations(65), "residual": real.activations(65, 2)}
    want = rbe.dropout(**arrays, p=0.3, seed=5)
    out = arrays[over]
    assert rbe.dropout(**arrays, p=0.3, seed=5, out=out) is out
    np.testing.assert_array_equal(out, want)

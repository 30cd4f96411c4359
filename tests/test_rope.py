"""rope beyond the conformance cases: what a rotation preserves, the two forms, threads, positions, copied bits."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu import reference
from rbe_gpu.registry import OPS, relative_error

from . import real
from .cases.rope import tables

DTYPES = pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name
)


def queries(tokens: int, heads: int = 12, head_dim: int = 32) -> np.ndarray:
    return np.resize(real.qkv(4)[0], (tokens, heads, head_dim))


def halves_of_pairs(x: np.ndarray, rotary_dim: int) -> np.ndarray:
    """The features of pairs (2j, 2j + 1) where those of pairs (j, j + rotary_dim / 2) are."""
    order = [*range(0, rotary_dim, 2), *range(1, rotary_dim, 2), *range(rotary_dim, x.shape[-1])]
    return np.ascontiguousarray(x[..., order])


@DTYPES
@pytest.mark.parametrize("rotary_dim", [32, 30, 12, 2])
def test_interleaved_is_a_permutation(rotary_dim: int, dtype: type) -> None:
    """Bit by bit."""
    x = queries(40).astype(dtype)
    cos, sin = tables(rotary_dim)
    y = rbe.rope(halves_of_pairs(x, rotary_dim), cos, sin)
    assert y.tobytes() == halves_of_pairs(rbe.rope(x, cos, sin, interleaved=True), rotary_dim).tobytes()


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_distances(interleaved: bool) -> None:
    """q[i].k[j] is the same for all i - j: what the embedding is for."""
    q, k = (np.broadcast_to(a[0, 3, :1], (30, 1, 32)).copy() for a in real.qkv(4)[:2])
    cos, sin = tables(32)
    q, k = (rbe.rope(a, cos, sin, interleaved=interleaved)[:, 0] for a in (q, k))
    scores = q @ k.T
    for distance in range(-5, 6):
        diagonal = np.diagonal(scores, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=0, atol=2e-6 * np.abs(scores).max())
    assert np.abs(scores[0, 1] - scores[0, 5]) > 1e-3 * np.abs(scores).max()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(2000, 1, 64), (301, 12, 34), (3, 600, 64)])
def test_threads_split_anywhere(tokens: int, heads: int, head_dim: int, interleaved: bool) -> None:
    """Long sequences of one head, odd sizes, and fewer tokens than would be whole parts."""
    x = queries(tokens, heads, head_dim)
    cos, sin = tables(head_dim, tokens)
    y = rbe.rope(x, cos, sin, interleaved=interleaved)
    assert relative_error(y, reference.rope(x, cos, sin, None, interleaved)) <= 2e-7
    before = rbe.get_num_threads()
    rbe.set_num_threads(1)
    try:
        assert rbe.rope(x, cos, sin, interleaved=interleaved).tobytes() == y.tobytes()
    finally:
        rbe.set_num_threads(before)


@DTYPES
@pytest.mark.parametrize("interleaved", [False, True])
def test_padded_packed_and_one_by_one_are_the_same(interleaved: bool, dtype: type) -> None:
    """Bit by bit: tokens of a batch, packed with their positions, and a token at a time as a decoder runs."""
    x = queries(36).astype(dtype).reshape(3, 12, 12, 32)
    cos, sin = tables(20)
    y = rbe.rope(x, cos, sin, interleaved=interleaved)
    positions = np.tile(np.arange(12), 3)
    packed = x.reshape(36, 12, 32)
    assert rbe.rope(packed, cos, sin, positions, interleaved).tobytes() == y.tobytes()
    for token in (0, 7, 35):
        one = rbe.rope(packed[token : token + 1], cos, sin, positions[token : token + 1], interleaved)
        assert one.tobytes() == y.reshape(36, 12, 32)[token : token + 1].tobytes()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name)
def test_half_rounds_once(dtype: type) -> None:
    x = queries(60).astype(dtype)
    cos, sin = tables(32)
    want = reference.rope(x, cos, sin)
    y = rbe.rope(x, cos, sin)
    tol = OPS["rope"].tolerances[np.dtype(dtype).name]
    assert relative_error(y, want, tol.floor) <= tol.rel
    assert np.count_nonzero(y != want.astype(dtype)) <= 0.002 * y.size  # a tie or a near-tie at most


@DTYPES
@pytest.mark.parametrize("in_place", [False, True])
def test_other_features_keep_their_bits(in_place: bool, dtype: type) -> None:
    """Of NaN with any payload, too."""
    x = np.random.default_rng(5).integers(0, 256, (9, 2, 40 * np.dtype(dtype).itemsize), np.uint8).view(dtype)
    cos, sin = tables(18)
    y = rbe.rope(x, cos, sin, out=x.copy() if in_place else None)
    assert y[..., 18:].tobytes() == x[..., 18:].tobytes()


def test_the_error_names_the_position() -> None:
    x, (cos, sin) = queries(4), tables(32)
    with pytest.raises(ValueError, match="positions has 70; cos and sin have rows for 0 to 69"):
        rbe.rope(x, cos, sin, np.array([3, 69, 70, 71]))
    with pytest.raises(ValueError, match="positions has -1; cos and sin have rows for 0 to 69"):
        rbe.rope(x, cos, sin, np.array([3, 69, 0, -1], np.int32))
    with pytest.raises(ValueError, match="x has 71 tokens along seq, but cos and sin have 70 rows"):
        rbe.rope(queries(71), cos, sin)


def test_positions_of_any_strides() -> None:
    x, (cos, sin) = queries(20), tables(32)
    positions = np.arange(60)[::-3]
    assert rbe.rope(x, cos, sin, positions).tobytes() == rbe.rope(x, cos, sin, positions.copy()).tobytes()

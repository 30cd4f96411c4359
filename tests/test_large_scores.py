"""attention and softmax where scores are so large that float32 rounds them by more than its exponents reach."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rbe_gpu import reference, registry
from rbe_gpu.registry import relative_error

from . import real
from .conftest import TestBackend

DTYPES = pytest.mark.parametrize("dtype", registry.DTYPES)
#: The largest numbers of a dtype whose products, up to 256 of them, have exact sums in float32.
SIZE = {"float16": 2.0**15, "bfloat16": 2.0**59, "float32": 2.0**59}
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (40, 40)},
    "scale negative": {"scale": -0.25},
    "mask that keeps": {"mask": (np.arange(150) % 5 > 0)[None, None, None]},
    "mask that is added": {"mask": np.zeros((1, 1, 1, 150), np.float32)},
}


def signs(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).choice([-1.0, 1.0], shape)


def values(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.resize(real.qkv()[2], shape).astype(dtype)


def check(backend: TestBackend, args: dict[str, Any]) -> None:
    """The output within the op's tolerance; log sum exp within four roundings of its size."""
    out, lse = map(backend.get, backend.op("attention")(**backend.put_all({**args, "return_lse": True})))
    want, want_lse = reference.attention(**args, return_lse=True)
    tol = registry.OPS["attention"].tolerances[out.dtype.name]
    assert relative_error(out, want, tol.floor) <= tol.rel
    np.testing.assert_allclose(lse, want_lse, rtol=4 * 2.0**-24)


@DTYPES
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
def test_weights_of_exact_scores(backend: TestBackend, head_dim: int, options: str, dtype: str) -> None:
    """Scores of 1e10 to 1e38: the largest takes all of the weight, or equal ones share it, in every kernel."""
    kind = registry.DTYPES[dtype]
    q, k = (SIZE[dtype] * signs(seed, 1, n, 1, head_dim) for seed, n in ((1, 70), (2, 150)))
    args = {"q": q.astype(kind), "k": k.astype(kind), "v": values(k.shape, kind), "scale": 0.25}
    check(backend, {**args, **OPTIONS[options]})


@DTYPES
@pytest.mark.parametrize("order", ["rising", "falling"])
@pytest.mark.parametrize("head_dim", [32, 64])
def test_maximum_that_moves(backend: TestBackend, head_dim: int, order: str, dtype: str) -> None:
    """From -1e8 through 0 to 1e8 and back, by steps that are nothing, little or much beside their exponentials."""
    kind = registry.DTYPES[dtype]
    q, k = np.zeros((1, 3, 1, head_dim)), np.zeros((1, 402, 1, head_dim))
    q[..., 0] = 2.0 ** np.array([0, 4, 13])[:, None]
    steps = np.concatenate(
        [-(2.0 ** np.arange(13.0, -7, -0.125)), [0, 0], 2.0 ** np.arange(-7.0, 13, 0.0833)]
    )
    k[..., 0] = steps[:402, None] * (1 if order == "rising" else -1)
    check(backend, {"q": q.astype(kind), "k": k.astype(kind), "v": values(k.shape, kind), "scale": 1.0})


@DTYPES
@pytest.mark.parametrize("size", [2e4, 6e4])
def test_rows_whose_largest_score_is_alone(backend: TestBackend, size: float, dtype: str) -> None:
    """Sums that float32 rounds: nothing but the key of the largest score weighs."""
    kind = registry.DTYPES[dtype]
    rows = 0
    for seed in range(4):
        q, k = ((size * signs(seed + 10 * i, 1, 64, 1, 64)).astype(kind) for i in range(2))
        v = values(k.shape, kind)
        y = backend.get(backend.op("attention")(**backend.put_all({"q": q, "k": k, "v": v, "scale": 0.125})))
        scores = q[0, :, 0].astype(np.float64) @ k[0, :, 0].T.astype(np.float64)
        ordered = np.sort(scores, axis=1)
        alone = ordered[:, -1] > ordered[:, -2]
        rows += int(alone.sum())
        want = v[0, scores.argmax(axis=1), 0].astype(np.float64)[alone]
        np.testing.assert_array_equal(y[0, alone, 0].astype(np.float64), want)
    assert rows > 128


@DTYPES
def test_infinite_value_beside_large_scores(backend: TestBackend, dtype: str) -> None:
    """A weight of 0 in float32 times an infinite value is infinite, as in float64 arithmetic of positive weights."""
    kind = registry.DTYPES[dtype]
    q, k = ((2e4 * signs(seed, 1, 64, 1, 64)).astype(kind) for seed in (5, 6))
    v = values(k.shape, kind)
    v[0, 30, 0, 7] = np.inf
    y = backend.get(backend.op("attention")(**backend.put_all({"q": q, "k": k, "v": v, "scale": 0.125})))
    assert (y[..., 7] == np.inf).all()
    scores = q[0, :, 0].astype(np.float64) @ k[0, :, 0].T.astype(np.float64)
    ordered = np.sort(scores, axis=1)
    alone = ordered[:, -1] > ordered[:, -2]
    others = np.arange(64) != 7
    want = v[0, scores.argmax(axis=1), 0][alone][:, others]
    np.testing.assert_array_equal(y[0, alone, 0][:, others], want)


@DTYPES
@pytest.mark.parametrize("cols", [64, 1000, 40000])
@pytest.mark.parametrize("scale", [1.0, 0.3, 2.0**20])
def test_softmax(backend: TestBackend, scale: float, cols: int, dtype: str) -> None:
    """Scores up to 1e38, in rows that are kept in registers and in those that are read twice."""
    kind = registry.DTYPES[dtype]
    size = {"float16": 6e4, "bfloat16": 1e30, "float32": 1e30}[dtype]
    x = (size * np.random.default_rng(cols).standard_normal((3, cols)).clip(-1, 1)).astype(kind)
    x[0, :2] = -np.inf, size * 1.05
    y = backend.get(backend.op("softmax")(**backend.put_all({"x": x, "scale": scale})))
    want = reference.softmax(x, scale)
    tol = registry.OPS["softmax"].tolerances[dtype]
    assert relative_error(y, want, tol.floor) <= tol.rel

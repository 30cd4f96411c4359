"""linear: dense and compressed weights against the float64 reference, on real activations."""

from __future__ import annotations

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from rbe_gpu.cpu_fallback.operand import operand_of

import rbe_gpu as rbe
from rbe_gpu import reference, transforms
from rbe_gpu.codecs import DenseCodes, GridCodes, packing
from rbe_gpu.codecs.dense import quantize_dense

from . import real
from .compressed import FORMS, compressed, gridded, relative


def _x(rows, cols):
    """Real activations cut or tiled to any width."""
    x = real.activations(max(rows, 1))[:rows]
    return np.ascontiguousarray(np.tile(x, (1, -(-cols // x.shape[1])))[:, :cols])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 16, 33, 63, 64, 65, 150])
def test_compressed_equals_the_decoded_product(form, tokens):
    """One token, a few, part of a tile of 64, a whole one, several: every path of the product."""
    m = compressed(form)
    x = _x(tokens, m.shape[1])
    assert relative(rbe.linear(x, m), x.astype(np.float64) @ reference.decode(m).T) < 1e-5


@pytest.mark.parametrize("tokens", [1, 20, 1200])
def test_many_units_and_groups_of_tiles(tokens):
    """More tiles than a unit keeps sums for, more rows and panels than fit one unit."""
    m = rbe.compress(np.tile(real.layer(1, "output.dense.weight"), (2, 1)), density=0.2)
    x = _x(tokens, m.shape[1])
    assert relative(rbe.linear(x, m), x.astype(np.float64) @ reference.decode(m).T) < 1e-5


@pytest.mark.parametrize(
    "form", ["dct int4 b128", "none int4 delta", "dct f16 delta basis", "grid int3 none"]
)
@pytest.mark.parametrize("tokens", [1, 3, 70])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_stay_with_their_token(form, tokens, value):
    """A transform would spread them, and a position that is not stored would lose them."""
    m = compressed(form)
    x = _x(tokens, m.shape[1]).copy()
    x[0, 5] = value
    y, expected = rbe.linear(x, m), reference.linear(x, m)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    np.testing.assert_array_equal(np.isinf(y), np.isinf(expected))
    assert np.isfinite(y[1:]).all()


@pytest.mark.parametrize("form", ["dct int4 b128", "dct f16 delta basis", "grid int3 none"])
@pytest.mark.parametrize("tokens", [1, 3, 70])
@pytest.mark.parametrize("value", [1e28, 1e35, 1e38])
def test_huge_values_stay_finite(form, tokens, value):
    """The mean of a block, or codes before their scale, would be more than float32 holds: the result is not."""
    m = compressed(form)
    x = np.full((tokens, m.shape[1]), value, np.float32)
    x[:, 70:] = 0
    expected = reference.linear(x, m)
    assert np.abs(expected).max() < 3.4e38
    assert relative(rbe.linear(x, m, method="transform"), expected) < 1e-5


@pytest.mark.parametrize("options", [{"density": 0.2}, {"codes": "dense-int4", "block": 32}])
@pytest.mark.parametrize("tokens", [1, 40])
def test_one_sided_products(options, tokens, tmp_path):
    """Coefficients out, or in: what is left of a matrix when one of its transforms is taken away."""
    m = rbe.compress(real.layer(0, "output.dense.weight"), transform="dct", basis=False, **options)
    s = transforms.synthesis("dct", m.block)
    x = _x(tokens, m.cols)
    w = reference.decode(m)

    def blocks_times(a, matrix):
        return (a.reshape(len(a), -1, m.block) @ matrix).reshape(a.shape)

    out = rbe.linear(x, m.without_transform("row"))
    assert relative(out, blocks_times(x.astype(np.float64) @ w.T, s)) < 1e-5
    x_hat = blocks_times(x.astype(np.float64), s).astype(np.float32)
    columns = m.without_transform("col")
    for method in ("transform", "decode"):
        assert relative(rbe.linear(x_hat, columns, method=method), x.astype(np.float64) @ w.T) < 1e-5
    np.testing.assert_allclose(columns.decode(), reference.decode(columns), atol=1e-6)
    with pytest.raises(ValueError, match="whole blocks"):
        compressed("dct int2 b64").without_transform("row")
    with pytest.raises(ValueError, match="whole blocks"):
        compressed("dct int2 b64").without_transform("col")
    for one_sided in (columns, m.without_transform("row")):
        with pytest.raises(ValueError, match="switched off"):
            rbe.save_file(tmp_path / "a.safetensors", {"w": one_sided})
        with pytest.raises(ValueError, match="one transform only"):
            one_sided.without_transform("row")
    with pytest.raises(ValueError, match="side='both'"):
        m.without_transform("both")


def test_a_plan_does_not_outlive_its_weight():
    """Two weights of one shape through one workspace, the first gone before the second comes."""
    ws, x = rbe.Workspace(), _x(8, 384)
    for layer in range(4):
        m = rbe.compress(real.layer(layer, "attention.self.query.weight"), codes="dense-int4")
        assert relative(rbe.linear(x, m, workspace=ws), reference.linear(x, m)) < 1e-5
        del m


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_bias_activation_residual(activation, dtype):
    w, b = real.layer(0, "intermediate.dense.weight"), real.layer(0, "intermediate.dense.bias")
    x = real.activations(33).astype(dtype)
    residual = np.ascontiguousarray(np.tile(x, (1, 4)))
    y = rbe.linear(x, w, b, activation, residual)
    assert y.dtype == dtype
    expected = reference.linear(x, w, b, activation, residual)
    limit = {np.float32: 2e-6, np.float16: 2**-11, ml_dtypes.bfloat16: 2**-8}[
        dtype
    ]  # one rounding of storage
    assert relative(y, expected) < limit


@pytest.mark.parametrize("shape", [(384,), (1, 384), (2, 3, 384), (0, 384)])
def test_leading_axes(shape):
    w, b = real.layer(0, "attention.self.query.weight"), real.layer(0, "attention.self.query.bias")
    x = np.ascontiguousarray(real.activations(6).reshape(-1)[: int(np.prod(shape))].reshape(shape))
    y = rbe.linear(x, w, b)
    assert y.shape == (*shape[:-1], 384)
    np.testing.assert_allclose(y, reference.linear(x, w, b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 4, 5, 70])
def test_no_features(tokens):
    """A sum of no products is zero: what is left is the bias, the activation and the residual."""
    w, b = np.empty((70, 0), np.float32), real.layer(0, "intermediate.dense.bias")[:70].copy()
    x, residual = np.empty((tokens, 0), np.float32), np.ascontiguousarray(real.activations(tokens)[:, :70])
    y = rbe.linear(x, w, b, "gelu", residual)
    np.testing.assert_allclose(y, reference.linear(x, w, b, "gelu", residual), rtol=1e-6, atol=1e-6)


def test_residual_may_be_the_output():
    w = real.layer(0, "attention.output.dense.weight")
    x, residual = real.activations(20), real.activations(20, 4).copy()
    expected = reference.linear(x, w, residual=residual)
    assert rbe.linear(x, w, residual=residual, out=residual) is residual
    assert relative(residual, expected) < 2e-6


@pytest.mark.parametrize(("share", "hits"), [(0.0, 0), (0.5, 2), (1.0, 5)])
def test_cache_counts(share, hits):
    """A 1536 x 1536 weight has 5 panels; the cache keeps what its budget holds and counts what it answers."""
    w = np.tile(real.layer(1, "output.dense.weight"), (4, 1))
    m = rbe.compress(w, codes="dense-int4")
    x = np.tile(real.activations(5), (1, 4))
    cache = rbe.PanelCache(int(share * w.nbytes))
    first = rbe.linear(x, m, cache=cache, method="cache")
    assert (cache.hits, cache.misses) == (0, 5)
    np.testing.assert_array_equal(rbe.linear(x, m, cache=cache, method="cache"), first)
    assert relative(first, reference.linear(x, m)) < 1e-5
    assert cache.hits == hits
    assert cache.hits + cache.misses == 10
    assert cache.nbytes <= cache.budget


@pytest.mark.parametrize("form", ["dct int4 b128", "none int4 delta"])
def test_second_call_allocates_nothing(form):
    m = compressed(form)
    x, ws = _x(40, m.shape[1]), rbe.Workspace()
    out = np.empty((40, m.shape[0]), np.float32)
    bias = np.zeros(m.shape[0], np.float32)
    for _ in range(2):
        rbe.linear(x, m, bias, "gelu", out=out, workspace=ws)
    tracemalloc.start()
    try:
        rbe.linear(x, m, bias, "gelu", out=out, workspace=ws)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8192  # views and call frames, nothing of the size of the data (out alone is 60 kB)


def test_not_a_number_and_infinity():
    w = real.layer(0, "attention.self.query.weight")
    x = real.activations(3).copy()
    x[1, 7] = np.nan
    y = rbe.linear(x, w, activation="gelu")
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()


def test_errors():
    w, x = real.layer(0, "intermediate.dense.weight"), real.activations(4)
    with pytest.raises(ValueError, match="out shares memory with x"):
        rbe.linear(x, w[:384].copy(), out=x)
    with pytest.raises(ValueError, match="takes 384"):
        rbe.linear(x[:, :380].copy(), w)
    with pytest.raises(ValueError, match="unknown activation 'tanh'"):
        rbe.linear(x, w, activation="tanh")
    with pytest.raises(ValueError, match="ascontiguousarray"):
        rbe.linear(np.tile(x, (1, 2))[:, ::2], w)
    with pytest.raises(TypeError, match="float64"):
        rbe.linear(x.astype(np.float64), w)
    with pytest.raises(TypeError, match="numpy or cupy array"):
        rbe.linear(x.tolist(), w)


@pytest.mark.parametrize("codes", ["sparse-int3", "sparse-int8", "sparse-f16", "sparse-f32"])
@pytest.mark.parametrize(("density", "block"), [(0.5, 64), (0.7, 32), (0.95, 128), (1.0, 64)])
def test_rows_with_few_zeros(codes, density, block):
    """Bitmaps, and codes of every coefficient, are multiplied as dense rows from some share on."""
    w = np.ascontiguousarray(real.layer(0, "intermediate.dense.weight")[:200, :300])
    m = rbe.compress(w, density=density, codes=codes, block=block, basis=block == 64)
    assert operand_of(m).densified == (density > 0.65)
    for tokens in (2, 17, 70):
        x = np.ascontiguousarray(real.activations(tokens)[:, :300])
        assert relative(rbe.linear(x, m, method="transform"), reference.linear(x, m)) < 2e-6


#: up to 8 bits, dense codes, and grid codes that are not shrunk
FEW_TOKENS_CODES = [f"dense-int{bits}" for bits in range(2, 9)] + [f"grid-int{bits}" for bits in range(2, 9)]


def _coded(w, codes, **arguments):
    if codes.startswith("dense"):
        return rbe.compress(w, codes=codes, basis=False, **arguments)
    return gridded(w, int(codes[-1]), shrink=0.0, **arguments)


@pytest.mark.parametrize("codes", FEW_TOKENS_CODES)
@pytest.mark.parametrize("transform", ["dct", "none"])
@pytest.mark.parametrize("shape", [(384, 384), (66, 256), (100, 1536), (64, 320), (65, 64)])
def test_few_tokens_of_any_size(codes, transform, shape):
    """With int8 dot-product instructions, activations are quantised to integers with a scale per 64 of them.

    The scales reach from the largest float32 down to groups that are zero or too small for a scale; those take the
    float32 path of other processors.
    """
    w = np.resize(real.layer(0, "intermediate.dense.weight"), shape)
    m = _coded(w, codes, transform=transform)
    x = _x(3, shape[1])
    x[1, shape[1] - 4] = 3e4
    assert relative(rbe.linear(x, m), reference.linear(x, m)) < 1e-6
    for factor in (0.0, 1e-33, 1e-12, 1e28, 1e30):
        scaled = x.copy()
        scaled[:, : shape[1] // 2] *= np.float32(factor)
        assert relative(rbe.linear(scaled, m), reference.linear(scaled, m)) < 1e-6
        scaled = x * np.float32(factor)
        expected = reference.linear(scaled, m)
        assert np.linalg.norm(rbe.linear(scaled, m) - expected) <= 1e-6 * np.linalg.norm(expected)
    scaled = x * np.float32(1e-36)
    assert relative(rbe.linear(scaled, m), reference.linear(scaled, m)) < 1e-5


@pytest.mark.parametrize("codes", FEW_TOKENS_CODES)
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_sums_of_few_tokens(codes, sign):
    """Every code of a row is the least or the greatest, every activation the largest: no int32 overflows."""
    bits, grid = int(codes[-1]), codes.startswith("grid")
    u = np.zeros((5, 192), np.uint16)
    u[1], u[2, ::2], u[3, 64:], u[4, 5] = 2**bits - 1, 2**bits - 1, 2**bits - 1, 1
    value, row, column = packing.pack(u, bits), np.ones(5, np.float16), np.ones(192, np.float16)
    stored = (
        GridCodes(bits, 0.0, value, row, column)
        if grid
        else DenseCodes(bits, 64, value, np.ones((5, 3), np.float16))
    )
    m = rbe.RBEVectors((5, 192), 64, "none", 1.0, None, stored)
    x = np.full((2, 192), sign * 0.7, np.float32)
    x[1, ::2] *= -1
    y, expected = rbe.linear(x, m), reference.linear(x, m)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6 * 192 * 0.7 * 2 ** (bits - 1))


@pytest.mark.parametrize("codes", ["dense-int5", "grid-int5", "grid-int8"])
@pytest.mark.parametrize("transform", ["dct", "none"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])
def test_few_tokens_with_a_value_that_is_not_finite_or_huge(codes, transform, value):
    m = _coded(real.layer(0, "attention.self.query.weight"), codes, transform=transform)
    x = _x(3, 384).copy()
    x[1, 70] = value
    y, expected = rbe.linear(x, m), reference.linear(x, m)
    np.testing.assert_array_equal(np.isfinite(y[1]), np.isfinite(expected[1]))
    if np.isfinite(value):
        assert relative(y[1] / np.float32(value), expected[1] / value) < 1e-6
    assert relative(y[[0, 2]], expected[[0, 2]]) < 1e-6


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_few_tokens_with_groups_of_128(bits):
    w = np.ascontiguousarray(real.layer(0, "output.dense.weight")[:70, :448])
    codes = quantize_dense(w, bits, 128)
    m = rbe.RBEVectors((70, 448), 64, "none", 1.5, None, codes)
    for tokens in (1, 3):
        x = np.ascontiguousarray(_x(tokens, 448))
        assert relative(rbe.linear(x, m), reference.linear(x, m)) < 1e-6


@pytest.mark.parametrize("codes", ["dense-int4", "dense-int5", "dense-int8"])
@pytest.mark.parametrize(("size", "factor"), [(1e-16, 1e-15), (1.0, 1e-29), (1.0, 1e-22), (1e30, 1e-30)])
def test_few_tokens_of_small_values(codes, size, factor):
    """No number between the codes and the result is smaller than what float32 holds, where the result is not."""
    w = real.layer(0, "intermediate.dense.weight")[:64, :256] * np.float32(size)
    w[1] *= np.float32(1e-4)
    m = rbe.compress(w, codes=codes, transform="none", basis=False)
    x = _x(3, 256) * np.float32(factor)
    y, expected = rbe.linear(x, m), reference.linear(x, m)
    for row in (0, 1):
        assert relative(y[:, row], expected[:, row]) < 2e-6

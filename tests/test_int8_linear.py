"""int8 activations: the integers bit for bit, and results against the reference, on real weights and activations."""

from __future__ import annotations

import re

import numpy as np
import pytest
from rbe_gpu.cpu_fallback import int8_exceptions, isa
from rbe_gpu.cpu_fallback.int8_exceptions import find_exceptions
from rbe_gpu.cpu_fallback.int8_simd import BASE_BITS, needs_base
from rbe_gpu.cpu_fallback.operand import operand_of

import rbe_gpu as rbe
from rbe_gpu import reference
from rbe_gpu.codecs import DenseCodes, GridCodes, packing
from rbe_gpu.codecs.dense import quantize_dense

from . import real
from .compressed import gridded, relative

#: few tokens, part of a tile, a whole one, several groups of tiles
TOKENS = (1, 2, 3, 4, 7, 8, 9, 12, 13, 16, 33, 64, 65, 150, 600)


def _x(rows: int, cols: int) -> np.ndarray:
    x = real.activations(max(rows, 1))[:rows]
    return np.ascontiguousarray(np.tile(x, (1, -(-cols // x.shape[1])))[:, :cols])


def _weight(rows: int = 96, cols: int = 384) -> np.ndarray:
    return np.ascontiguousarray(real.layer(1, "output.dense.weight")[:rows, :cols])


def _dense_sums(bits: int, tokens: int, group: int) -> tuple[np.ndarray, rbe.RBEVectors, np.ndarray]:
    """Activations that int8 holds, dense codes with scales of 1, and the exact results, halves of integers."""
    top = 2 ** (bits - 1)
    q = np.clip(np.rint(_weight(97, 416) * 40 * top), -top, top - 1).astype(np.int64)
    q[0, :], q[1, :], q[2, ::2], q[2, 1::2] = top - 1, -top, top - 1, -top
    value = packing.pack((q + top).astype(np.uint16), bits)
    codes = DenseCodes(bits, group, value, np.ones((97, -(-416 // group)), np.float16))
    m = rbe.RBEVectors((97, 416), 32, "none", 1.0, None, codes)
    x = np.rint(127 * _x(tokens, 416) / np.abs(_x(tokens, 416)).max(axis=1, keepdims=True))
    x[0, :] = 127
    x[-1, ::2], x[-1, 1::2] = -127, 127
    expected = x.astype(np.int64) @ (2 * q + 1).T / 2  # less than 2^24
    return x.astype(np.float32), m, expected


def _integers(rows: int, cols: int, bits: int, row_block: int = 64) -> tuple[rbe.RBEMatrix, np.ndarray]:
    """A weight that is a matrix of integers: of real weights, the largest and smallest codes among them."""
    top = 2 ** (bits - 1)
    w = _weight(rows, cols)
    q = np.clip(np.rint(w / np.abs(w).max() * 3 * top), -top, top - 1).astype(np.int8)
    q[0, :], q[1, :], q[2, ::2], q[2, 1::2] = top - 1, -top, top - 1, -top
    pad_rows, pad_cols = -rows % row_block, -cols % row_block
    padded = np.pad(q, ((0, pad_rows), (0, pad_cols)))
    codes = GridCodes.from_integers(padded, np.ones(len(padded)), np.ones(padded.shape[1]))
    return rbe.RBEMatrix((rows, cols), row_block, "none", 1.0, None, codes), q


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("tokens", TOKENS)
def test_sums_are_exact(bits: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a token's largest activation is 127, its scale is 1: results are the sums themselves.

    Activations of the largest size, with the largest codes, are what could overflow an int16.
    """
    _, q = _integers(96, 416, bits)
    x = np.rint(127 * _x(tokens, 416) / np.abs(_x(tokens, 416)).max(axis=1, keepdims=True))
    x[0, :] = 127
    x[-1, ::2], x[-1, 1::2] = -127, 127
    expected = x.astype(np.int64) @ q.astype(np.int64).T
    for base in BASE_BITS:
        monkeypatch.setattr(int8_exceptions, "_TIME", {b: 0.0 if b == base else 1e9 for b in BASE_BITS})
        m, _ = _integers(96, 416, bits)  # another weight: exceptions are found once for each
        y = rbe.linear(x.astype(np.float32), m, activation_bits=8)
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("tokens", [1, 3, 4, 6, 9])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_dense_sums_are_exact(bits: int, tokens: int, group: int) -> None:
    """The same with a scale of 1 for every group: results are half of the sums of 2 q + 1."""
    x, m, expected = _dense_sums(bits, tokens, group)
    np.testing.assert_array_equal(rbe.linear(x, m, activation_bits=8), expected)


@pytest.mark.parametrize("tokens", [1, 8, 9, 80])
def test_activations_are_rounded_as_the_reference_says(tokens: int) -> None:
    """The identity as weight, column scales 1 (and 2^-3): results are z times the token's scale."""
    x = _x(tokens, 384)
    for scale in (1.0, 0.125):
        codes = GridCodes.from_integers(np.eye(384, dtype=np.int8), np.ones(384), np.full(384, scale))
        m = rbe.RBEMatrix((384, 384), 64, "none", 1.0, None, codes)
        z, s = reference.int8_activations(x, np.full(384, scale))
        np.testing.assert_array_equal(rbe.linear(x, m, activation_bits=8), z * s[:, None])


def test_ties_are_rounded_to_even() -> None:
    x = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5] + [0] * 56], np.float32)
    codes = GridCodes.from_integers(np.eye(64, dtype=np.int8), np.ones(64), np.ones(64))
    m = rbe.RBEMatrix((64, 64), 64, "none", 1.0, None, codes)
    for tokens in (1, 20):
        y = rbe.linear(np.repeat(x, tokens, axis=0), m, activation_bits=8)
        assert y[0, :8].tolist() == [127, 0, 2, 2, 0, -2, -2, 126]


FORMS = {
    "grid2 b32": {"grid": 2, "block": 32, "transform": "none"},
    "grid5 none": {"grid": 5, "transform": "none"},
    "grid8 none": {"grid": 8, "transform": "none"},
    "grid6 dct": {"grid": 6, "transform": "dct"},
    "grid4 dwt vectors": {"grid": 4, "transform": "dwt", "kind": "vectors"},
    "dense2": {"codes": "dense-int2", "transform": "none"},
    "dense3 hadamard b32": {"codes": "dense-int3", "transform": "hadamard", "block": 32},
    "dense4": {"codes": "dense-int4", "transform": "none"},
    "dense5 dct b128": {"codes": "dense-int5", "transform": "dct", "block": 128},
    "dense6": {"codes": "dense-int6", "transform": "none"},
    "dense7 vectors": {"codes": "dense-int7", "transform": "none", "kind": "vectors"},
    "dense8": {"codes": "dense-int8", "transform": "none"},
    # groups of 128, 64 and 32 columns of 224; the last of the first two has less
    "dense3 g128 b32": {"dense": 3, "group": 128, "block": 32},
    "dense5 g64 b32": {"dense": 5, "group": 64, "block": 32},
    "dense8 g128": {"dense": 8, "group": 128, "block": 64},
    "dense4 g32": {"dense": 4, "group": 32, "block": 32},
}


def _compressed(form: str, w: np.ndarray) -> rbe.RBEMatrix | rbe.RBEVectors:
    arguments = FORMS[form]
    if "dense" in arguments:
        return _grouped(w, *arguments.values())
    return (
        gridded(w, shrink=0.0, **arguments)
        if "grid" in arguments
        else rbe.compress(w, basis=False, **arguments)
    )


def _grouped(w: np.ndarray, bits: int, group: int, block: int) -> rbe.RBEMatrix:
    """Dense codes with a scale for `group` columns."""
    padded = np.pad(w, [(0, -size % block) for size in w.shape])
    codes = quantize_dense(np.ascontiguousarray(padded), bits, group)
    return rbe.RBEMatrix(w.shape, block, "none", 1.0, None, codes)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_every_code_equals_the_reference(form: str, tokens: int) -> None:
    """Every bit width and transform, rows and columns that are no whole blocks."""
    w = _weight(130, 200)
    m, x = _compressed(form, w), _x(tokens, 200)
    expected = reference.linear_int8(x, m)
    # a transform's rounding may move an activation that lies between two integers
    moved = 0 if m.transform == "none" else 0.5 / 127
    assert relative(rbe.linear(x, m, activation_bits=8), expected) < 1e-6 + moved / np.sqrt(200)


@pytest.mark.parametrize("form", ["grid5 none", "dense4"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("tokens", [2, 40])
def test_bias_activation_residual(form: str, activation: str | None, dtype: type, tokens: int) -> None:
    m, x = _compressed(form, _weight()), _x(tokens, 384).astype(dtype)
    bias, residual = real.layer(1, "output.dense.bias")[:96], _x(tokens, 96).astype(dtype)
    y = rbe.linear(x, m, bias, activation, residual, activation_bits=8)
    assert y.dtype == dtype
    expected = reference.linear_int8(x, m, bias, activation, residual)
    assert relative(y, expected) < (1e-6 if dtype is np.float32 else 1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_a_token_has_the_same_bits_in_every_batch(form: str) -> None:
    m, x = _compressed(form, _weight()), _x(700, 384)
    whole = rbe.linear(x, m, activation_bits=8)
    for first, count in ((0, 1), (5, 3), (20, 8), (40, 9), (60, 12), (100, 13), (300, 64), (650, 50)):
        np.testing.assert_array_equal(
            rbe.linear(x[first : first + count], m, activation_bits=8), whole[first : first + count]
        )


@pytest.mark.parametrize("threads", [1, 2])
def test_threads(threads: int) -> None:
    m, x = _compressed("grid5 none", _weight(384, 384)), _x(300, 384)
    expected = rbe.linear(x, m, activation_bits=8)
    before = rbe.get_num_threads()
    try:
        rbe.set_num_threads(threads)
        np.testing.assert_array_equal(rbe.linear(x, m, activation_bits=8), expected)
    finally:
        rbe.set_num_threads(before)


@pytest.mark.parametrize("form", ["grid5 none", "grid6 dct", "dense4"])
@pytest.mark.parametrize("tokens", [1, 3, 5, 70])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_stay_with_their_token(form: str, tokens: int, value: float) -> None:
    m, x = _compressed(form, _weight()), _x(tokens, 384).copy()
    good = rbe.linear(x, m, activation_bits=8)
    x[0, 5] = value
    y = rbe.linear(x, m, activation_bits=8)
    assert np.isnan(y[0]).all()
    np.testing.assert_array_equal(y[1:], good[1:])


@pytest.mark.parametrize("form", ["grid5 none", "dense5 g64 b32"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_zeros_and_tiny_activations(tokens: int, form: str) -> None:
    m, bias = _compressed(form, _weight()), real.layer(1, "output.dense.bias")[:96]
    y = rbe.linear(np.zeros((tokens, 384), np.float32), m, bias, activation_bits=8)
    np.testing.assert_array_equal(y, np.broadcast_to(bias, y.shape))
    tiny = np.full((tokens, 384), 1e-38, np.float32)
    assert np.isfinite(rbe.linear(tiny, m, activation_bits=8)).all()


def test_the_loss_is_that_of_rounding() -> None:
    """Every activation is off by half a step of its token at most, and so is the result by the codes' sizes."""
    m, x = _compressed("grid8 none", real.layer(1, "output.dense.weight")), _x(100, 1536)
    column = np.asarray(m.codes.col_scale, np.float64)  # type: ignore[union-attr]
    half_step = np.abs(x * column[:1536]).max(axis=1) / 254
    codes = np.abs(reference.coefficients(m) / column)[:384].sum(axis=1) * m.gain
    error = np.abs(rbe.linear(x, m, activation_bits=8) - reference.linear(x, m))
    assert (error <= 1.001 * half_step[:, None] * codes).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda w: rbe.compress(w, density=0.2), "only dense and grid codes"),
        (lambda w: rbe.compress(w, codes="dense-int10", basis=False), "more than 8 bits"),
        (lambda w: gridded(w, 4), "shrink > 0"),
        (lambda w: rbe.compress(w, codes="dense-int4", basis=True), "has a basis"),
        (lambda w: w, "dense"),
    ],
)
def test_weights_without_int8_products(make: object, message: str) -> None:
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        rbe.linear(_x(3, 384), make(_weight()), activation_bits=8)  # type: ignore[operator]


@pytest.mark.parametrize("method", ["decode", "cache"])
def test_methods_without_int8_matmuls(method: str) -> None:
    """The message names both options and what to leave out."""
    m = _compressed("dense4", _weight())
    message = f"method='{method}', activation_bits=8 cannot multiply this weight: int8 activations are multiplied by "
    cache = rbe.PanelCache(1 << 20)
    with pytest.raises(
        NotImplementedError, match=re.escape(message + "method='transform' only: leave out one")
    ):
        rbe.linear(_x(3, 384), m, method=method, cache=cache, activation_bits=8)


def test_other_bits_are_refused() -> None:
    m = _compressed("dense4", _weight())
    for call in (
        lambda: rbe.linear(_x(3, 384), m, activation_bits=4),
        lambda: rbe.RBELinear(m, activation_bits=7),
        lambda: rbe.linear(_x(3, 384), m, activation_bits=16),
    ):
        with pytest.raises(ValueError, match="activation_bits"):
            call()


def test_layers_pass_it_on() -> None:
    w = _weight(384, 384)
    layer = rbe.RBELinear.from_dense(w, codes="dense-int4", activation_bits=8)
    assert "int8 activations" in repr(layer)
    assert layer.plan(100).algorithm == "int8_tiles"
    np.testing.assert_array_equal(
        layer(_x(20, 384)), rbe.linear(_x(20, 384), layer.weight, activation_bits=8)
    )
    ffn = rbe.RBEFFN.from_dense(w, w, codes="dense-int4", activation_bits=8)
    assert (ffn.up.activation_bits, ffn.down.activation_bits) == (8, 8)
    for transform in ("none", "dct"):
        attention = rbe.RBEAttention.from_dense(
            w, w, w, w, 6, codes="dense-int4", transform=transform, basis=False, activation_bits=8
        )
        x = _x(40, 384)[None]
        y, plain = (
            attention(x),
            rbe.RBEAttention(
                *(rbe.RBELinear(getattr(attention, n).weight) for n in ("query", "key", "value", "output")), 6
            )(x),
        )
        assert 0 < relative(y, plain) < 0.05


def test_the_second_call_allocates_nothing_new() -> None:
    ws, m = rbe.Workspace(), _compressed("grid5 none", _weight(384, 384))
    x, out = _x(100, 384), np.empty((100, 384), np.float32)
    rbe.linear(x, m, out=out, workspace=ws, activation_bits=8)
    held = ws.nbytes
    rbe.linear(x, m, out=out, workspace=ws, activation_bits=8)
    assert ws.nbytes == held


def test_weights_of_several_shapes_share_a_workspace() -> None:
    """What one call keeps in scratch memory must not be read by the next one of another shape."""
    ws = rbe.Workspace()
    weights = [_compressed("grid5 none", _weight(*shape)) for shape in ((384, 384), (96, 1536), (300, 64))]
    for tokens in (100, 700, 100, 20):
        for m in weights:
            x = _x(tokens, m.cols)
            y = rbe.linear(x, m, workspace=ws, activation_bits=8)
            np.testing.assert_array_equal(y, rbe.linear(x, m, activation_bits=8))
            assert relative(y, reference.linear_int8(x, m)) < 1e-6


def test_base_bits_follow_the_codes() -> None:
    """Narrow codes are cut to few bits; many large ones ask for more. Exceptions are few bytes."""

    def found(m: rbe.RBEMatrix) -> int8_exceptions.Exceptions:
        return find_exceptions(operand_of(m).params, m.rows_pad, m.cols_pad, 256)

    if not needs_base(isa.active()):
        assert found(_compressed("grid5 none", _weight())).base_bits == 0
        return
    w = _weight(384, 384)
    assert found(gridded(w, 4, shrink=0.0, transform="none")).base_bits == 5
    codes = np.where(np.arange(384 * 384).reshape(384, 384) % 3 == 0, 50, 1).astype(np.int8)
    m = rbe.RBEMatrix(
        (384, 384), 64, "none", 1.0, None, GridCodes.from_integers(codes, np.ones(384), np.ones(384))
    )
    assert found(m).base_bits == 7
    q = np.clip(np.rint(w / w.std() * 4), -128, 127).astype(
        np.int8
    )  # as calibration makes them: 8 bits for a few
    q[0, 0] = 127
    m = rbe.RBEMatrix(
        (384, 384), 64, "none", 1.0, None, GridCodes.from_integers(q, np.ones(384), np.ones(384))
    )
    assert found(m).base_bits in (5, 6)
    assert found(m).nbytes < 0.1 * w.size

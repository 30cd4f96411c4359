"""int8 activations on tensor cores, on the host build: integers bit for bit, results against the reference."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu import Workspace, reference
from rbe_gpu.codecs import GridCodes
from rbe_gpu.gpu import linear, linear_integers
from rbe_gpu.matmul import PreparedInput

from . import real
from .compressed import relative
from .host.executor import HostExecutor
from .host.virtual import VirtualWorkspace, entries, grid_codes, matrix, virtual
from .test_int8_linear import FORMS, _compressed, _dense_sums, _integers, _weight, _x

F32, F16 = np.dtype(np.float32), np.dtype(np.float16)
BF16 = np.dtype(ml_dtypes.bfloat16)
#: one token, part of a tile of few, several of them, the first of many, one row more than a tile of each kind
TOKENS = (1, 15, 16, 17, 33, 64, 65, 129)


def launches(x: np.ndarray, m: Any, out: np.ndarray, ws: Any = None, **given: Any) -> Any:
    named = {"bias": None, "activation": None, "residual": None, "prepared": None} | given
    return linear.launches(
        x, m, named["bias"], named["activation"], named["residual"], out, ws or Workspace(), None, None,
        named["prepared"], 8,
    )  # fmt: skip


def product(
    x: np.ndarray, m: Any, reverse: bool = False, specialised: bool = False, **given: Any
) -> np.ndarray:
    out = np.full((len(x), m.rows), np.nan, x.dtype)
    HostExecutor(reverse, specialised=specialised)(launches(x, m, out, **given))
    return out


# --- integers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("tokens", TOKENS)
def test_sums_are_exact(bits: int, tokens: int) -> None:
    """Where a token's largest activation is 127, its scale is 1: results are the sums themselves."""
    m, q = _integers(96, 416, bits)
    x = np.rint(127 * _x(tokens, 416) / np.abs(_x(tokens, 416)).max(axis=1, keepdims=True))
    x[0, :] = 127
    x[-1, ::2], x[-1, 1::2] = -127, 127
    expected = x.astype(np.int64) @ q.astype(np.int64).T
    np.testing.assert_array_equal(product(x.astype(np.float32), m, reverse=tokens % 2 == 0), expected)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("tokens", [1, 33, 70])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_dense_sums_are_exact(bits: int, tokens: int, group: int) -> None:
    """The same with a scale of 1 for every group: results are half of the sums of 2 q + 1."""
    x, m, expected = _dense_sums(bits, tokens, group)
    np.testing.assert_array_equal(product(x, m), expected)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("cols", [384, 372, 333])
def test_activations_are_those_of_the_reference(dtype: Any, cols: int) -> None:
    """Bit by bit, with column scales of many sizes, tokens of many sizes, and some that are not finite."""
    rng = np.random.default_rng(3)
    scales = np.ldexp(rng.uniform(0.5, 1, 384), rng.integers(-20, 14, 384)).astype(np.float16)
    x = (_x(9, cols) * np.ldexp(1.0, np.arange(-60, 66, 14))[:, None]).astype(np.float32)
    if dtype == F16:
        x = _x(9, cols) * np.ldexp(1.0, np.arange(-16, 11, 3))[:, None]
    x = np.ascontiguousarray(x, np.float32).astype(dtype)
    x[2], x[4, 7], x[6, -1] = 0, np.inf, np.nan
    codes = GridCodes.from_integers(np.eye(64, 384, dtype=np.int8), np.ones(64), scales)
    m = rbe.RBEMatrix((64, cols), 64, "none", 1.0, None, codes)
    ws = Workspace()
    made = launches(x, m, np.zeros((9, 64), dtype), ws)
    HostExecutor()(made[:1])
    padded = np.zeros((9, 384), np.float32)
    padded[:, :cols] = x
    z, scale = reference.int8_activations(padded, codes.col_scale)
    np.testing.assert_array_equal(made[0].params["out"], z)
    np.testing.assert_array_equal(made[0].params["scale"], scale)


def test_ties_are_rounded_to_even() -> None:
    x = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5] + [0] * 56], np.float32)
    codes = GridCodes.from_integers(np.eye(64, dtype=np.int8), np.ones(64), np.ones(64))
    m = rbe.RBEMatrix((64, 64), 64, "none", 1.0, None, codes)
    for tokens in (1, 70):
        y = product(np.repeat(x, tokens, axis=0), m)
        assert y[0, :8].tolist() == [127, 0, 2, 2, 0, -2, -2, 126]


# --- results ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [3, 17, 70, 130])
def test_every_code_equals_the_reference(form: str, tokens: int) -> None:
    """Every bit width, group and transform, rows and columns that are no whole blocks."""
    m, x = _compressed(form, _weight(130, 200)), _x(tokens, 200)
    expected = reference.linear_int8(x, m)
    # a transform's rounding may move an activation that lies between two integers
    moved = 0 if m.transform == "none" else 0.5 / 127
    assert relative(product(x, m), expected) < 1e-6 + moved / np.sqrt(200)


@pytest.mark.parametrize("form", ["grid5 none", "dense4", "grid6 dct"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("tokens", [2, 70])
def test_bias_activation_residual(form: str, activation: str | None, dtype: Any, tokens: int) -> None:
    m, x = _compressed(form, _weight()), _x(tokens, 384).astype(dtype)
    bias, residual = real.layer(1, "output.dense.bias")[:96], _x(tokens, 96).astype(dtype)
    y = product(x, m, bias=bias, activation=activation, residual=residual)
    expected = reference.linear_int8(x, m, bias, activation, residual)
    moved = 0 if m.transform == "none" else 0.5 / 127 / np.sqrt(384)
    assert relative(y, expected) < (1e-6 if dtype == F32 else 1e-3) + moved


@pytest.mark.parametrize("form", FORMS)
def test_a_token_has_the_same_integers_in_every_batch(form: str) -> None:
    """Few tokens and tiles scale the same sums, one by one and tile by tile: the last bit may differ."""
    m, x = _compressed(form, _weight()), _x(140, 384)
    whole = product(x, m)
    for first, count in ((0, 1), (5, 3), (100, 20), (40, 70)):
        part = product(x[first : first + count], m)
        np.testing.assert_allclose(
            part, whole[first : first + count], rtol=0, atol=1e-6 * np.abs(whole).max()
        )


@pytest.mark.parametrize("form", ["grid5 none", "grid6 dct", "dense4"])
@pytest.mark.parametrize("tokens", [1, 5, 70])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_stay_with_their_token(form: str, tokens: int, value: float) -> None:
    m, x = _compressed(form, _weight()), _x(tokens, 384).copy()
    good = product(x, m)
    x[0, 5] = value
    y = product(x, m)
    assert np.isnan(y[0]).all()
    np.testing.assert_array_equal(y[1:], good[1:])


@pytest.mark.parametrize("form", ["grid5 none", "dense5 g64 b32"])
@pytest.mark.parametrize("tokens", [1, 70])
def test_zeros_and_tiny_activations(tokens: int, form: str) -> None:
    m, bias = _compressed(form, _weight()), real.layer(1, "output.dense.bias")[:96]
    y = product(np.zeros((tokens, 384), np.float32), m, bias=bias)
    np.testing.assert_array_equal(y, np.broadcast_to(bias, y.shape))
    assert np.isfinite(product(np.full((tokens, 384), 1e-38, np.float32), m)).all()


@pytest.mark.parametrize("form", ["grid5 none", "dense8 g128", "dense4 g32"])
@pytest.mark.parametrize("tokens", [5, 70])
def test_same_bits_as_with_parameters(form: str, tokens: int) -> None:
    """The kernels compiled for their configuration, as on a GPU, and those that take it as parameters."""
    m, x = _compressed(form, _weight()), _x(tokens, 384).astype(F16)
    np.testing.assert_array_equal(product(x, m, specialised=True), product(x, m))


# --- launches -----------------------------------------------------------------------------------------


def grid(rows: int, cols: int, bits: int = 4, **given: Any) -> Any:
    return matrix(rows, cols, codes=grid_codes(rows, cols, bits), **{"transform": "none"} | given)


def planned(tokens: int, m: Any, dtype: Any = F16) -> Any:
    out = virtual((tokens, m.shape[0]), dtype)
    return launches(virtual((tokens, m.shape[1]), dtype), m, out, VirtualWorkspace())


FEW = ["linear_integers_inputs", "linear_integers_few"]


@pytest.mark.parametrize(
    ("tokens", "weight", "kernels"),
    [
        (1, grid(256, 1024), FEW),
        (64, grid(256, 1024), FEW),
        (65, grid(256, 1024), ["linear_integers_inputs", "linear_integers_tiles"]),
        (1, matrix(256, 1024), ["linear_inputs", *FEW]),
        (65, matrix(256, 1024), ["linear_inputs", "linear_integers_inputs", "linear_integers_groups"]),
        (
            65,
            grid(256, 1024, transform="dct"),
            ["linear_inputs", "linear_integers_inputs", "linear_integers_tiles"],
        ),
    ],
)
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_chooses(tokens: int, weight: Any, kernels: list[str], dtype: Any) -> None:
    assert entries(planned(tokens, weight, dtype)) == kernels


def test_splits_fill_the_gpu() -> None:
    _, few = planned(1, grid(4096, 4096))
    splits = few.params["parts"].shape[0]
    assert few.grid == (32 * splits, 1, 1)
    assert few.grid[0] >= 132
    assert splits * few.params["each"] >= 4096
    assert few.params["each"] % 128 == 0  # whole tiles, and whole groups


def test_projections_share_what_has_the_same_column_scales() -> None:
    """Dense codes under one transform: the activations are rounded once. Grid codes have scales of their own."""
    x = _x(40, 384).astype(F16)
    for form, inputs in (("dense4", 1), ("grid5 none", 2)):
        ws = Workspace()
        prepared = PreparedInput(x, ws)
        made = []
        for rows in (96, 64):
            m, out = _compressed(form, _weight(rows)), np.zeros((40, rows), F16)
            made += entries(launches(x, m, out, ws, prepared=prepared))
        assert made.count("linear_integers_inputs") == inputs


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (grid(64, 64, basis=virtual((1, 1, 8), F16)), "has a basis"),
        (matrix(64, 64, sparse=True), "only dense and grid codes"),
        (grid(64, 1 << 16), "int32 sums could overflow"),
        (virtual((64, 64), F16), "the weight is dense"),
    ],
)
def test_refusals(weight: Any, message: str) -> None:
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        planned(3, weight)


def test_shared_memory_holds_tiles_and_scales() -> None:
    """48 KB of stages of 64 tokens, and 2 KB of scales behind them; of few 36 KB and 2 KB."""
    *_, groups = planned(100, matrix(256, 1024))
    assert groups.shared == linear_integers._SHARED >= 2 * (64 + 128) * 128 + 2048
    few = planned(1, matrix(256, 1024))[-1]
    assert few.shared == 2 * (16 + 128) * 128 + 2048

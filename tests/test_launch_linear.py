"""The launches of linear: which kernels, which sizes, and what they give on the host build."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu import Workspace, reference
from rbe_gpu.gpu import linear
from rbe_gpu.gpu._launch import Launch
from rbe_gpu.gpu._splits import Tiling, seconds, tiling
from rbe_gpu.registry import relative_error

from . import real
from .compressed import FORMS, compressed, decoded, for_gpu
from .host.executor import on_host
from .host.virtual import VirtualWorkspace, entries, matrix, sizes, virtual

F16, BF16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
BIG = 2**31
# one rounding of the result; of x^ and of C, too, where linear multiplies in float16
LIMITS = {np.dtype(np.float32): 5e-6, F16: 5e-4, BF16: 4e-3}


# --- arithmetic ---------------------------------------------------------------------------------------


def linear_launches(tokens: int, weight: Any, dtype: Any = np.float32, **given: Any) -> tuple[Launch, ...]:
    x, out = virtual((tokens, weight.shape[1]), dtype), virtual((tokens, weight.shape[0]), dtype)
    named = {"bias": None, "activation": None, "residual": None} | given
    return linear.launches(
        x, weight, named["bias"], named["activation"], named["residual"], out, VirtualWorkspace()
    )


FEW = ["linear_inputs", "linear_dot_1", "linear_epilogue"]
PANEL = ["linear_absmax", "linear_inputs", "decode_starts", "decode_64", "linear_mma_f16"]


@pytest.mark.parametrize(
    ("tokens", "dtype", "given", "kernels"),
    [
        (1, np.float32, {}, FEW),
        (1, F16, {}, FEW),
        (3, BF16, {}, ["linear_inputs", "linear_dot_4", "linear_epilogue"]),
        (16, np.float32, {}, ["linear_inputs", "linear_dot_8", "linear_epilogue"]),
        (5, F16, {}, ["linear_absmax", "linear_inputs", "linear_mma_few", "linear_epilogue"]),
        (32, BF16, {}, ["linear_absmax", "linear_inputs", "linear_mma_few", "linear_epilogue"]),
        (33, F16, {}, ["linear_absmax", "linear_inputs", "linear_mma_codes_64"]),
        (17, np.float32, {}, ["decode_64", "linear_ffma"]),
        (2, F16, {"sparse": True}, ["linear_inputs", "linear_sparse_4", "linear_absmax", "linear_epilogue"]),
        (17, BF16, {"sparse": True}, PANEL),
        (17, F16, {"sparse": True}, PANEL[2:]),  # x is an operand as it stands
        (17, F16, {"transform": "dwt-bior3.1"}, ["decode_64", "linear_mma_f16"]),
        (16, F16, {"transform": "dwt-bior3.1"}, ["linear_inputs", "linear_dot_8", "linear_epilogue"]),
        (1, F16, {"basis": virtual((4, 2, 8), F16)}, [*FEW[:2], "linear_features", "linear_epilogue"]),
        (17, F16, {"basis": virtual((4, 2, 8), F16)}, ["decode_64", "linear_mma_f16"]),
    ],
)
def test_linear_chooses(tokens: int, dtype: Any, given: dict[str, Any], kernels: list[str]) -> None:
    assert entries(linear_launches(tokens, matrix(256, 128, **given), dtype)) == kernels


@pytest.mark.parametrize(
    ("tokens", "x", "w", "cols", "kernel"),
    [
        (16, np.float32, np.float32, 64, "linear_weight_8"),
        (4, F16, np.float32, 63, "linear_weight_4"),
        (17, np.float32, np.float32, 64, "linear_ffma"),
        (17, F16, F16, 64, "linear_mma_f16"),
        (17, BF16, BF16, 64, "linear_mma_bf16"),
        (17, BF16, F16, 64, "linear_ffma"),  # one type would be rounded to the other
        (17, F16, F16, 63, "linear_ffma"),  # rows are not aligned
    ],
)
def test_linear_chooses_for_a_dense_weight(tokens: int, x: Any, w: Any, cols: int, kernel: str) -> None:
    assert kernel in entries(linear_launches(tokens, virtual((40, cols), w), x))


def test_linear_beyond_31_bits() -> None:
    rows, cols = BIG // 16, 4096  # 2^39 codes
    _, dot, epilogue = linear_launches(1, matrix(rows, cols))
    assert dot.grid == (rows // 16, 1, 1)
    assert dot.params["codes.cols"] == cols
    assert epilogue.grid == (rows // 64 // 128, 1, 1)
    tokens = BIG
    _, inputs, product = linear_launches(tokens, matrix(4096, 128), F16)
    assert inputs.grid == (tokens * 2 // 128, 1, 1)
    assert product.entry == "linear_mma_codes"
    assert product.grid == (tokens // 128 * 32, 1, 1)
    assert product.shared == 64 << 10  # what compute capability 7.5 has for a block
    assert tokens in sizes(product)


def test_linear_splits_k_where_rows_are_few() -> None:
    _, dot, _ = linear_launches(1, matrix(256, 8192))
    parts = dot.params["parts"]
    assert parts.shape == (8, 1, 256)  # 16 blocks of rows, 8 pieces of 1024 columns
    assert dot.grid == (16 * 8, 1, 1)
    *_, few, _ = linear_launches(8, matrix(256, 8192), F16)
    splits = few.params["parts"].shape[0]
    assert few.grid == (2 * splits, 1, 1)
    assert splits * few.params["each"] >= 8192


def test_linear_panels_are_bounded() -> None:
    rows, cols = 40_000, 1024
    launches = linear_launches(17, matrix(rows, cols, sparse=True))
    ends = [launch for launch in launches if launch.entry == "linear_ffma"]
    assert len(ends) == 5
    first = 0
    for launch in ends:
        panel = launch.params["w"]
        assert panel.nbytes <= linear.PANEL_BYTES
        assert launch.params["column"] == first  # the columns of out that the panel gives
        first += panel.shape[0]
    assert first == rows


@pytest.mark.parametrize(
    ("tokens", "height", "splits", "microseconds"),
    [
        (33, 64, 8, 10.5), (64, 64, 8, 12.6), (128, 64, 4, 17.3), (256, 64, 2, 26.8), (512, 64, 1, 39.1),
        (1024, 128, 1, 59.5), (2048, 128, 1, 119.0),
    ],
)  # fmt: skip
def test_tiles_fill_the_gpu(tokens: int, height: int, splits: int, microseconds: float) -> None:
    """4096 x 4096: short tiles, and k split, while tall ones (43.1 us) are too few for 132 multiprocessors."""
    chosen = tiling(tokens, 4096, 64)
    assert (chosen.height, chosen.splits) == (height, splits)
    assert chosen.each * splits >= 64
    assert round(1e6 * seconds(tokens, 4096, chosen), 1) == microseconds
    if tokens <= 512:
        assert round(1e6 * seconds(tokens, 4096, Tiling(128, 64, 1)), 1) == 43.1
    blocks = -(-tokens // height) * 32 * splits
    assert blocks >= 256  # two a multiprocessor, or nearly
    product = linear_launches(tokens, matrix(4096, 4096), F16)[2]
    assert product.grid == (blocks, 1, 1)
    if splits > 1:
        assert product.params["parts"].shape == (splits, tokens, 4096)


@pytest.mark.parametrize("tokens", [33, 100, 700, 5000])
@pytest.mark.parametrize("steps", [1, 3, 4, 7, 24, 64, 1000])
def test_no_split_is_empty(tokens: int, steps: int) -> None:
    chosen = tiling(tokens, 384, steps)
    assert (chosen.splits - 1) * chosen.each < steps <= chosen.splits * chosen.each
    assert chosen.splits == 1 or chosen.each >= 4


# --- values -------------------------------------------------------------------------------------------


def inputs(tokens: int, cols: int, dtype: Any) -> np.ndarray:
    """Real activations cut or tiled to any width."""
    x = real.activations(tokens)
    return np.ascontiguousarray(np.tile(x, (1, -(-cols // x.shape[1])))[:, :cols]).astype(dtype)


@pytest.mark.parametrize(
    ("tokens", "dtype", "reverse"),
    [(2, np.float32, False), (9, F16, True), (35, BF16, False)],
    ids=["2-float32", "9-float16-descending", "35-bfloat16"],
)
@pytest.mark.parametrize("form", FORMS)
def test_linear(form: str, tokens: int, dtype: Any, reverse: bool) -> None:
    m, w = for_gpu(compressed(form)), decoded(form)
    x = inputs(tokens, m.cols, dtype)
    residual = inputs(tokens, m.rows, np.float32)
    bias = np.resize(real.layer(3, "intermediate.dense.bias"), m.rows)
    out = np.full((tokens, m.rows), np.nan, dtype)
    with on_host(reverse):
        linear.linear(x, m, bias, "gelu", residual, out, Workspace(), None)
    expected = reference.linear(x, w, bias, "gelu", residual)
    assert relative_error(out, expected, 2.0**-25) <= LIMITS[np.dtype(dtype)]


@pytest.mark.parametrize(
    "tiles", [Tiling(128, 4, 1), Tiling(64, 4, 1), Tiling(64, 1, 4)], ids=["tall", "short", "split"]
)
@pytest.mark.parametrize(
    "form", ["dct int4 b128", "haar int7 b32", "vectors int4 b64", "grid int4 none exceptions"]
)
@pytest.mark.parametrize("tokens", [65, 131])
def test_tilings(form: str, tiles: Tiling, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in the place of the one that is chosen; k is at most 6 steps."""
    m, w = for_gpu(compressed(form)), decoded(form)
    steps = -(-m.cols_pad // 64)
    each = -(-steps // tiles.splits)
    used = Tiling(tiles.height, each, -(-steps // each))
    monkeypatch.setattr(linear, "tiling", lambda *_: used)
    x = inputs(tokens, m.cols, F16)
    bias = np.resize(real.layer(3, "intermediate.dense.bias"), m.rows)
    residual, out = inputs(tokens, m.rows, F16), np.full((tokens, m.rows), np.nan, F16)
    with on_host(reverse=tokens == 65):
        linear.linear(x, m, bias, "relu", residual, out, Workspace(), None)
    assert relative_error(out, reference.linear(x, w, bias, "relu", residual), 2.0**-25) <= LIMITS[F16]


@pytest.mark.parametrize("dtype", [np.float32, F16])
def test_large_and_small_tokens(dtype: Any) -> None:
    """float16 operands are scaled token by token: neither overflow nor underflow, and Inf and NaN stay."""
    m, w = compressed("dct int4 b128"), decoded("dct int4 b128")
    x = inputs(40, m.cols, np.float32)
    x[1] *= np.float32(6e4) / np.abs(x[1]).max()
    x[2] *= np.float32(1e-3)
    x[3] = 0
    x[4, 7] = np.nan
    x = x.astype(dtype)
    out = np.zeros((40, m.rows), np.float32 if dtype == np.float32 else BF16)
    x = x.astype(out.dtype)
    with on_host():
        linear.linear(x, m, None, None, None, out, Workspace(), None)
    assert np.isnan(out[4].astype(np.float32)).all()
    for row in (0, 1, 2):
        expected = reference.linear(x[row : row + 1], w)
        assert relative_error(out[row : row + 1], expected) <= LIMITS[out.dtype]
    assert not out[3].astype(np.float32).any()


@pytest.mark.parametrize("form", ["dct f16 delta basis", "dct int1 delta b32"])
def test_nan_reaches_every_result(form: str) -> None:
    """Also where a row of W stores nothing in its block."""
    m = compressed(form)
    x = inputs(3, m.cols, np.float32)
    x[1, 5] = np.nan
    out = np.zeros((3, m.rows), np.float32)
    with on_host():
        linear.linear(x, m, None, "relu", None, out, Workspace(), None)
    assert np.isnan(out[1]).all()
    assert np.isfinite(out[[0, 2]]).all()


@pytest.mark.parametrize("dtype", [np.float32, F16])
def test_panels_are_kept_in_the_cache(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "PANEL_BYTES", 1)  # 384 rows are three panels of 128
    m, w = compressed("dct f16 delta basis"), decoded("dct f16 delta basis")
    x = inputs(18, m.cols, dtype)
    cache = rbe.PanelCache(2 * 128 * 384 * x.itemsize)
    for hits in (0, 2):
        out = np.full((18, 384), np.nan, dtype)
        with on_host():
            linear.linear(x, m, None, None, None, out, Workspace(), cache)
        assert relative_error(out, reference.linear(x, w)) <= LIMITS[np.dtype(dtype)]
        assert cache.hits == hits
    assert cache.misses == 4

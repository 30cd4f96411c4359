"""The launches of linear: which kernels, which sizes, and what they give on the host build."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu import Workspace, reference
from rbe_gpu.gpu import linear, linear_few
from rbe_gpu.gpu._launch import Launch
from rbe_gpu.gpu._splits import Tiling, seconds, tiling
from rbe_gpu.registry import relative_error

from . import real
from .compressed import FORMS, compressed, decoded, for_gpu
from .host.executor import HostExecutor, on_host
from .host.virtual import VirtualWorkspace, dense_codes, entries, matrix, sizes, virtual

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


FEW = ["linear_few_dot_1"]
PANEL = ["linear_absmax", "linear_inputs", "decode_starts", "decode_64", "linear_mma_f16"]


@pytest.mark.parametrize(
    ("tokens", "dtype", "given", "kernels"),
    [
        (1, np.float32, {}, FEW),
        (1, F16, {}, FEW),
        (3, BF16, {}, ["linear_few_dot_4"]),
        (16, np.float32, {}, ["linear_few_dot_8"]),
        (5, F16, {}, ["linear_few_mma"]),
        (32, BF16, {}, ["linear_few_mma"]),
        (33, F16, {}, ["linear_absmax", "linear_inputs", "linear_mma_codes_64"]),
        (17, np.float32, {}, ["decode_64", "linear_ffma"]),
        (2, F16, {"sparse": True}, ["linear_inputs", "linear_sparse_4", "linear_absmax", "linear_epilogue"]),
        (17, BF16, {"sparse": True}, PANEL),
        (17, F16, {"sparse": True}, PANEL[2:]),  # x is an operand as it stands
        (17, F16, {"transform": "dwt-bior3.1"}, ["decode_64", "linear_mma_f16"]),
        (16, F16, {"transform": "dwt-bior3.1"}, ["linear_few_dot_8"]),
        (1, F16, {"basis": virtual((4, 2, 8), F16)}, ["linear_features", *FEW]),
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
    (dot,) = linear_launches(1, matrix(rows, cols))
    assert dot.grid == (rows // 64, 1, 1)
    assert dot.params["codes.cols"] == cols
    assert dot.params["splits"] == 1
    assert dot.params["parts"] is None
    assert dot.params["finish.counters"] is None
    tokens = BIG
    _, inputs, product = linear_launches(tokens, matrix(4096, 128), F16)
    assert inputs.grid == (tokens * 2 // 128, 1, 1)
    assert product.entry == "linear_mma_codes"
    assert product.grid == (tokens // 128 * 32, 1, 1)
    assert product.shared == 64 << 10  # what compute capability 7.5 has for a block
    assert tokens in sizes(product)


def test_linear_splits_k_where_rows_are_few() -> None:
    (dot,) = linear_launches(1, matrix(256, 8192))
    assert dot.params["parts"].shape == (8, 1, 256)  # 4 blocks of rows, 8 pieces of 1024 columns
    assert dot.grid == (4 * 8, 1, 1)
    assert dot.params["finish.counters"].shape == (4,)
    (few,) = linear_launches(20, matrix(256, 8192), F16)
    splits = few.params["parts"].shape[0]
    assert few.grid == (2 * 2 * splits, 1, 1)  # of rows and of tokens
    assert few.params["finish.counters"].shape == (4,)
    assert (splits - 1) * few.params["each"] < 8192 <= splits * few.params["each"]


@pytest.mark.parametrize(
    ("transform", "tokens", "grid", "shared"),
    [
        ("dct", 16, 256, 48 << 10), ("dct", 32, 512, 48 << 10),
        ("none", 16, 256, 36 << 10), ("none", 32, 256, 36 << 10),
    ],
)  # fmt: skip
def test_few_tokens_fill_the_gpu(transform: str, tokens: int, grid: int, shared: int) -> None:
    """4096 x 4096: two blocks a multiprocessor; those that make x^ have 512 columns at most, a chunk."""
    (few,) = linear_launches(tokens, matrix(4096, 4096, transform=transform), F16)
    assert few.entry == "linear_few_mma"
    assert (few.grid[0], few.shared) == (grid, shared)
    assert bool(few.params["direct"]) == (transform == "none")
    assert few.params["each"] * few.params["splits"] == 4096


@pytest.mark.parametrize("cols", [416, 1504, 4000])
@pytest.mark.parametrize("block", [32, 128])
def test_blocks_of_a_transform_are_not_split(cols: int, block: int) -> None:
    padded = -(-cols // block) * block
    weight = matrix(256, padded, block=block, codes=dense_codes(256, padded, 4, 32))
    (few,) = linear_launches(16, weight, F16)
    each, splits = int(few.params["each"]), int(few.params["splits"])
    assert each % block == 0
    assert each <= 512
    assert (splits - 1) * each < padded <= splits * each


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


def wide_weight(transform: str, block: int, codes: str) -> Any:
    """96 x 1536: two spans of columns, whose sums are parts of two blocks at least."""
    w = np.ascontiguousarray(real.layer(2, "output.dense.weight")[:96])
    return for_gpu(rbe.compress(w, codes=codes, transform=transform, block=block, basis=False))


@pytest.mark.parametrize("reverse", [False, True], ids=["ascending", "descending"])
@pytest.mark.parametrize(
    ("tokens", "dtype", "bits", "entry"),
    [
        (1, F16, None, "linear_few_dot_1"),
        (3, BF16, None, "linear_few_dot_4"),
        (13, np.float32, None, "linear_few_dot_8"),
        (19, F16, None, "linear_few_mma"),
        (19, F16, 8, "linear_integers_few"),
    ],
)
@pytest.mark.parametrize(
    ("transform", "block"), [("dct", 128), ("dwt-db2", 64), ("hadamard", 32), ("none", 64)]
)
def test_the_last_block_finishes(
    transform: str, block: int, tokens: int, dtype: Any, bits: int | None, entry: str, reverse: bool
) -> None:
    """k is split; two calls with one workspace, whose counters are zero after each, give the same bits."""
    m = wide_weight(transform, block, "dense-int4")
    x, residual = inputs(tokens, m.cols, dtype), inputs(tokens, m.rows, dtype)
    bias = np.resize(real.layer(3, "intermediate.dense.bias"), m.rows)
    ws, outs = Workspace(), []
    for _ in range(2):
        out = np.full((tokens, m.rows), np.nan, dtype)
        made = linear.launches(x, m, bias, "gelu", residual, out, ws, activation_bits=bits)
        assert made[-1].entry == entry
        assert made[-1].params["splits"] > 1
        counters = made[-1].params["finish.counters"]
        assert not counters.any()
        HostExecutor(reverse)(made)
        assert not counters.any()
        outs.append(out)
    np.testing.assert_array_equal(outs[0], outs[1])
    expected = (reference.linear_int8 if bits else reference.linear)(x, m, bias, "gelu", residual)
    moved = 0.5 / 127 / np.sqrt(m.cols) if bits and transform != "none" else 0.0
    assert relative_error(outs[0], expected, 2.0**-25) <= LIMITS[np.dtype(dtype)] + moved


def test_counters_are_zero_in_a_larger_buffer() -> None:
    ws = Workspace()
    small = ws.zeros("counters", 3)
    assert small.tolist() == [0, 0, 0]
    small[:] = 7
    large = ws.zeros("counters", 1000)
    assert not large.any()
    assert ws.nbytes == 4000
    large[5] = 1
    assert ws.zeros("counters", 10)[5] == 1  # left alone: kernels leave zeros
    ws.clear()
    assert ws.nbytes == 0
    assert not ws.zeros("counters", 10).any()


def test_counters_are_set_to_zero_on_their_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever device is current; where that fails, the next call makes them anew."""
    current, filled = [0], list[int]()

    @contextmanager
    def device(index: int) -> Iterator[None]:
        current.append(index)
        yield
        current.pop()

    class Memory(np.ndarray):
        def __setitem__(self, key: Any, value: Any) -> None:
            filled.append(current[-1])
            if len(filled) == 1:
                raise RuntimeError("the fill fails")
            super().__setitem__(key, value)

    def zeros(nbytes: int, dtype: Any) -> np.ndarray:
        made = empty(nbytes, dtype)
        made[...] = 0
        return made

    def empty(nbytes: int, dtype: Any) -> np.ndarray:
        return np.full(nbytes, 7, dtype).view(Memory)

    cupy = SimpleNamespace(cuda=SimpleNamespace(Device=device), empty=empty, zeros=zeros)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    ws = Workspace("cuda:1")
    with pytest.raises(RuntimeError, match="the fill fails"):
        ws.zeros("counters", 3)
    assert not ws.zeros("counters", 3).any()
    assert filled == [1, 1]


@pytest.mark.parametrize("tokens", [4, 16, 40])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_large_and_small_tokens(dtype: Any, tokens: int) -> None:
    """float16 operands are scaled token by token: neither overflow nor underflow, and Inf and NaN stay."""
    m, w = compressed("dct int4 b128"), decoded("dct int4 b128")
    x = inputs(max(tokens, 5), m.cols, np.float32)[:tokens]
    x[1] *= np.float32(6e4) / np.abs(x[1]).max()
    x[2] *= np.float32(1e-3)
    x[3] = 0
    if tokens > 4:
        x[4, 7] = np.nan
    x = x.astype(dtype)
    out = np.zeros((tokens, m.rows), dtype)
    with on_host():
        linear.linear(x, m, None, None, None, out, Workspace(), None)
    if tokens > 4:
        assert np.isnan(out[4].astype(np.float32)).all()
    for row in (0, 1, 2):
        expected = reference.linear(x[row : row + 1], w)
        assert relative_error(out[row : row + 1], expected) <= LIMITS[out.dtype]
    assert not out[3].astype(np.float32).any()


@pytest.mark.parametrize("largest", [1e-33, 1e37, 4e37])
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("splits", [1, 2])
def test_tokens_near_the_limits_of_float(
    splits: int, block: int, largest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One value a token, of bfloat16's range: nothing in linear_few_mma leaves the range of float."""
    monkeypatch.setattr(linear_few, "_BLOCKS_WANTED", splits)
    w = np.ascontiguousarray(real.layer(2, "output.dense.weight")[:128, :512])
    m = for_gpu(rbe.compress(w, codes="dense-int4", transform="dct", block=block, basis=False))
    x = np.zeros((16, m.cols), BF16)
    x[np.arange(16), 37 * np.arange(16) % m.cols] = largest
    out = np.zeros((16, m.rows), BF16)
    with on_host():
        linear.linear(x, m, None, None, None, out, Workspace(), None)
    expected = reference.linear(x, reference.decode(m))
    assert relative_error(out.astype(np.float64) / largest, expected / largest) <= LIMITS[BF16]


def test_a_split_reads_its_own_columns() -> None:
    """A token is scaled by the largest of 64 columns, where a block has memory for 512."""
    w = np.ascontiguousarray(real.layer(2, "output.dense.weight")[:128, :512])
    w[:, 64:] = 0
    m = for_gpu(rbe.compress(w, codes="dense-int4", transform="none", basis=False))
    x = inputs(16, m.cols, BF16)
    x[:, :64] *= BF16.type(1e-6)
    x[:, 64:] *= BF16.type(1e4)
    out = np.zeros((16, m.rows), BF16)
    (few,) = linear.launches(x, m, None, None, None, out, Workspace())
    assert (few.entry, few.params["each"]) == ("linear_few_mma", 64)
    HostExecutor()((few,))
    assert relative_error(out, reference.linear(x, reference.decode(m))) <= LIMITS[BF16]


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

"""The launches of decode, embedding and linear: which kernels, which sizes, and what they give on the host build."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu import Workspace, reference
from rbe_gpu.blocks import DenseCodes, RBEMatrix, RBEVectors, SparseCodes
from rbe_gpu.gpu import _launch, _load, decode, embedding, linear
from rbe_gpu.gpu._launch import MAX_GRID, Launch
from rbe_gpu.spec import relative_error

from . import real
from .compressed import FORMS, compressed
from .host import build
from .host.executor import HostExecutor, KernelError, Library

F16, BF16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
BIG = 2**31
# one rounding of the result; of x^ and of C, too, where linear multiplies in float16
LIMITS = {np.dtype(np.float32): 5e-6, F16: 5e-4, BF16: 4e-3}
ORDERS = pytest.mark.parametrize("reverse", [False, True], ids=["ascending", "descending"])


def virtual(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """A C-contiguous array of any size over a few bytes: a plan looks at it, never into it."""
    dtype = np.dtype(dtype)
    strides = tuple(prod(shape[i + 1 :]) * dtype.itemsize for i in range(len(shape)))
    memory = np.zeros(64, np.uint8)
    start = -memory.ctypes.data % 16
    return np.lib.stride_tricks.as_strided(memory[start : start + dtype.itemsize].view(dtype), shape, strides)


class VirtualWorkspace:
    """Buffers of any size."""

    def get(self, name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
        return virtual(shape, dtype)


def dense_codes(rows: int, cols: int, bits: int = 4) -> DenseCodes:
    value, scale = virtual((rows, cols * bits // 8), np.uint8), virtual((rows, cols // 64), np.float16)
    return DenseCodes(bits, 64, value, scale)


def delta_codes(rows: int) -> SparseCodes:
    entries = virtual((8 * rows,), np.uint8)
    starts = virtual((rows + 1,), np.int64)
    count = virtual((rows,), np.uint16)
    return SparseCodes("int8", "delta", 64, entries, virtual((rows,), F16), entries, count, 0.0, starts)


def matrix(rows: int, cols: int, sparse: bool = False, **given: Any) -> RBEMatrix:
    codes = delta_codes(rows) if sparse else dense_codes(rows, cols)
    settings = {"block": 64, "transform": "dct", "gain": 1.0, "basis": None, "codes": codes} | given
    return RBEMatrix((rows, cols), **settings)


def vectors(rows: int, cols: int, sparse: bool = False) -> RBEVectors:
    codes = delta_codes(rows) if sparse else dense_codes(rows, cols)
    return RBEVectors((rows, cols), 64, "dct", 1.0, None, codes)


def entries(launches: tuple[Launch, ...]) -> list[str]:
    return [launch.entry for launch in launches]


def sizes(launch: Launch) -> list[int]:
    """The 64-bit arguments."""
    return [int(a) for a in launch.args if isinstance(a, np.int64)]


# --- arithmetic ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True])
def test_decode_beyond_31_bits(sparse: bool) -> None:
    rows, cols = BIG // 32, 128  # 2^33 values
    weight = matrix(rows, cols, sparse)
    *before, last = decode.plan(weight, virtual((rows, cols)), VirtualWorkspace())
    assert last.entry == "decode_64"
    assert last.grid == (rows // 64, 1, 1)  # two tiles a block
    assert last.shared == 2 * 4 * 64 * 64
    assert sizes(last)[-2:] == [rows, cols]
    assert entries(tuple(before)) == (["decode_starts"] if sparse else [])
    if sparse:
        assert before[0].grid == (rows // 8, 1, 1)
        assert before[0].args[-1].shape == (rows, 3)


def test_decode_of_more_parts_than_a_grid_has() -> None:
    rows = 2**34
    weight = matrix(rows, 64, transform="none")
    (launch,) = decode.plan(weight, virtual((rows, 64), F16), VirtualWorkspace())
    assert launch.entry == "decode_plain"
    assert launch.grid == (MAX_GRID[0], 1, 1)  # 2^31 blocks of 8 rows: the kernel goes on in strides


@pytest.mark.parametrize("count", [1, BIG + 5])
def test_embedding_beyond_31_bits(count: int) -> None:
    ids = virtual((count,), np.int64)
    (launch,) = embedding.plan(ids, vectors(BIG, 128), virtual((count, 128)), VirtualWorkspace())
    assert (launch.op, launch.entry) == ("decode", "decode_64")
    assert launch.grid == (-(-count // 64), 1, 1)
    (launch,) = embedding.plan(ids, matrix(BIG, 128), virtual((count, 128)), VirtualWorkspace())
    assert launch.entry == "embedding_64"
    assert launch.grid == (min(count, MAX_GRID[0]), 1, 1)
    assert BIG in sizes(launch)
    (launch,) = embedding.plan(ids, virtual((BIG, 128), F16), virtual((count, 128), F16), VirtualWorkspace())
    assert launch.entry == "embedding_rows"
    assert sizes(launch) == [0, BIG, count, 16]  # 16 units of 16 bytes
    assert launch.grid == (min(-(-count * 16 // 256), MAX_GRID[0]), 1, 1)


@pytest.mark.parametrize(
    ("cols", "unit", "units"), [(64, 4, 8), (63, 1, 63), (62, 2, 31), (4, 2, 2), (1, 1, 1)]
)
def test_embedding_copies_in_the_widest_units(cols: int, unit: int, units: int) -> None:
    ids = virtual((7,), np.int32)
    (launch,) = embedding.plan(ids, virtual((9, cols), F16), virtual((7, cols), F16), VirtualWorkspace())
    assert launch.args[-2] == unit
    assert launch.args[-3] == units
    assert launch.args[1] == 0  # int32


def plan_linear(tokens: int, weight: Any, dtype: Any = np.float32, **given: Any) -> tuple[Launch, ...]:
    x, out = virtual((tokens, weight.shape[1]), dtype), virtual((tokens, weight.shape[0]), dtype)
    named = {"bias": None, "activation": None, "residual": None} | given
    return linear.plan(
        x, weight, named["bias"], named["activation"], named["residual"], out, VirtualWorkspace()
    )


FEW = ["linear_inputs", "linear_dot_1", "linear_finish"]
PANEL = ["linear_peaks", "linear_inputs", "decode_starts", "decode_64", "linear_mma_f16"]


@pytest.mark.parametrize(
    ("tokens", "dtype", "given", "kernels"),
    [
        (1, np.float32, {}, FEW),
        (1, F16, {}, FEW),
        (3, BF16, {}, ["linear_inputs", "linear_dot_4", "linear_finish"]),
        (16, np.float32, {}, ["linear_inputs", "linear_dot_8", "linear_finish"]),
        (5, F16, {}, ["linear_peaks", "linear_inputs", "linear_mma_few", "linear_finish"]),
        (32, BF16, {}, ["linear_peaks", "linear_inputs", "linear_mma_few", "linear_finish"]),
        (33, F16, {}, ["linear_peaks", "linear_inputs", "linear_mma_codes"]),
        (17, np.float32, {}, ["decode_64", "linear_ffma"]),
        (2, F16, {"sparse": True}, ["linear_inputs", "linear_sparse_4", "linear_peaks", "linear_finish"]),
        (17, BF16, {"sparse": True}, PANEL),
        (17, F16, {"sparse": True}, PANEL[2:]),  # x is an operand as it stands
        (17, F16, {"transform": "dwt-bior3.1"}, ["decode_64", "linear_mma_f16"]),
        (16, F16, {"transform": "dwt-bior3.1"}, ["linear_inputs", "linear_dot_8", "linear_finish"]),
        (1, F16, {"basis": virtual((4, 2, 8), F16)}, [*FEW[:2], "linear_features", "linear_finish"]),
        (17, F16, {"basis": virtual((4, 2, 8), F16)}, ["decode_64", "linear_mma_f16"]),
    ],
)
def test_linear_chooses(tokens: int, dtype: Any, given: dict[str, Any], kernels: list[str]) -> None:
    assert entries(plan_linear(tokens, matrix(256, 128, **given), dtype)) == kernels


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
    assert kernel in entries(plan_linear(tokens, virtual((40, cols), w), x))


def test_linear_beyond_31_bits() -> None:
    rows, cols = BIG // 16, 4096  # 2^39 codes
    _, dot, finish = plan_linear(1, matrix(rows, cols))
    assert dot.grid == (rows // 16, 1, 1)
    assert dot.args[10] == cols  # CODES_PARAMETERS ends with cols_pad
    assert finish.grid == (rows // 64 // 128, 1, 1)
    tokens = BIG
    _, inputs, product = plan_linear(tokens, matrix(4096, 128), F16)
    assert inputs.grid == (tokens * 2 // 128, 1, 1)
    assert product.entry == "linear_mma_codes"
    assert product.grid == (tokens // 128 * 32, 1, 1)
    assert product.shared == 64 << 10  # what compute capability 7.5 has for a block
    assert tokens in sizes(product)


def test_linear_splits_k_where_rows_are_few() -> None:
    _, dot, _ = plan_linear(1, matrix(256, 8192))
    parts = dot.args[-1]
    assert parts.shape == (8, 1, 256)  # 16 blocks of rows, 8 pieces of 1024 columns
    assert dot.grid == (16 * 8, 1, 1)
    *_, few, _ = plan_linear(8, matrix(256, 8192), F16)
    splits = few.args[-1].shape[0]
    assert few.grid == (2 * splits, 1, 1)
    assert splits * int(few.args[-4]) >= 8192


def test_linear_panels_are_bounded() -> None:
    rows, cols = 40_000, 1024
    launches = plan_linear(17, matrix(rows, cols, sparse=True))
    ends = [launch for launch in launches if launch.entry == "linear_ffma"]
    assert len(ends) == 5
    first = 0
    for launch in ends:
        panel = launch.args[3]
        assert panel.nbytes <= linear.PANEL_BYTES
        assert launch.args[8] == first  # the columns of out that the panel gives
        first += panel.shape[0]
    assert first == rows


# --- values -------------------------------------------------------------------------------------------


@contextmanager
def on_host(reverse: bool = False) -> Iterator[None]:
    with _launch.executor(HostExecutor(reverse)):
        yield


@lru_cache(maxsize=64)
def decoded(form: str) -> np.ndarray:
    m = compressed(form)
    return reference.decode(m).reshape(m.rows, m.cols)


def inputs(tokens: int, cols: int, dtype: Any) -> np.ndarray:
    """Real activations cut or tiled to any width."""
    x = real.activations(tokens)
    return np.ascontiguousarray(np.tile(x, (1, -(-cols // x.shape[1])))[:, :cols]).astype(dtype)


@ORDERS
@pytest.mark.parametrize("form", FORMS)
def test_decode_and_embedding(form: str, reverse: bool) -> None:
    m, expected = compressed(form), decoded(form)
    for dtype in (np.dtype(np.float32), F16):
        out = np.full(expected.shape, np.nan, dtype)
        with on_host(reverse):
            decode.decode(m, out, Workspace())
        assert relative_error(out, expected, 2.0**-25) <= (2e-6 if dtype == np.float32 else 5e-4)
    ids = np.array([m.rows - 1, 0, m.rows // 2, 0], np.int32)
    out = np.full((4, m.cols), np.nan, np.float32)
    with on_host(reverse):
        embedding.embedding(ids, m, out, Workspace())
    assert relative_error(out, expected[ids]) <= 2e-6


@pytest.mark.parametrize(
    ("tokens", "dtype", "reverse"),
    [(2, np.float32, False), (9, F16, True), (35, BF16, False)],
    ids=["2-float32", "9-float16-descending", "35-bfloat16"],
)
@pytest.mark.parametrize("form", FORMS)
def test_linear(form: str, tokens: int, dtype: Any, reverse: bool) -> None:
    m, w = compressed(form), decoded(form)
    x = inputs(tokens, m.cols, dtype)
    residual = inputs(tokens, m.rows, np.float32)
    bias = np.resize(real.layer(3, "intermediate.dense.bias"), m.rows)
    out = np.full((tokens, m.rows), np.nan, dtype)
    with on_host(reverse):
        linear.linear(x, m, bias, "gelu", residual, out, Workspace(), None)
    expected = reference.linear(x, w, bias, "gelu", residual)
    assert relative_error(out, expected, 2.0**-25) <= LIMITS[np.dtype(dtype)]


@ORDERS
@pytest.mark.parametrize("form", ["dct int4 b128", "vectors int6 b32 basis", "none int4 delta"])
def test_rows_that_are_not_there_are_nan(form: str, reverse: bool) -> None:
    m, expected = compressed(form), decoded(form)
    ids = np.array([1, -1, m.rows, 0, 2**40], np.int64)
    out = np.zeros((5, m.cols), np.float32)
    dense = np.zeros((5, m.cols), np.float16)
    with on_host(reverse):
        embedding.embedding(ids, m, out, Workspace())
        embedding.embedding(ids, expected.astype(np.float16), dense, Workspace())
    for found in (out, dense):
        assert np.isnan(found[[1, 2, 4]]).all()
        assert np.isfinite(found[[0, 3]]).all()


def test_values_beyond_4_gigabytes() -> None:
    """Real codes at the end of an array of 2^32 bytes, which the system makes up of nothing until it is touched."""
    source = rbe.compress(
        real.weight("embeddings.word_embeddings.weight")[2000:2064, :64], codes="dense-int8", kind="vectors"
    )
    assert isinstance(source.codes, DenseCodes)
    rows = 2**26 + 64
    value, scale = np.zeros((rows, 64), np.uint8), np.zeros((rows, 1), np.float16)
    value[-64:], scale[-64:] = source.codes.value, source.codes.scale
    codes = DenseCodes(8, source.codes.group, value, scale)
    weight = replace(source, shape=(rows, 64), codes=codes)
    ids = np.arange(rows - 64, rows)
    out = np.full((64, 64), np.nan, np.float32)
    with on_host():
        embedding.embedding(ids, weight, out, Workspace())
    assert relative_error(out, reference.decode(source)) <= 2e-6


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


def test_same_bits_on_one_block() -> None:
    """The kernels go on in strides of the grid."""
    for form in ("dct int4 b128", "dct int1 delta b32"):
        m = compressed(form)
        many = np.full((m.rows, m.cols), np.nan, np.float32)
        one, ws = np.full_like(many, np.nan), Workspace()
        HostExecutor()(decode.plan(m, many, ws))
        HostExecutor()(tuple(replace(launch, grid=(1, 1, 1)) for launch in decode.plan(m, one, ws)))
        np.testing.assert_array_equal(one, many)


# --- broken copies ------------------------------------------------------------------------------------


def outcome(op: str, old: str, new: str, call: Callable[[], tuple[np.ndarray, np.ndarray]]) -> float:
    """The error of a call with one line of the op's source exchanged; infinite where the host build objects."""
    source = _load.source(op)
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in the source of {op}"
    broken = Library(build.build(source.replace(old, new)))

    def execute(launches: tuple[Launch, ...]) -> None:
        for launch in launches:
            if launch.op == op:
                broken.launch(launch)
            else:
                HostExecutor()((launch,))

    try:
        with _launch.executor(execute):
            found, expected = call()
    except KernelError:
        return float("inf")
    return relative_error(found, expected)


def linear_once(form: str, tokens: int) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    def call() -> tuple[np.ndarray, np.ndarray]:
        x = inputs(tokens, compressed(form).cols, F16)
        out = np.full((tokens, compressed(form).rows), np.nan, F16)
        linear.linear(x, compressed(form), None, None, None, out, Workspace(), None)
        return out, reference.linear(x, decoded(form))

    return call


BROKEN_DECODE = {
    "an entry too late": ("static_cast<u32>(carry + sum - kept)", "static_cast<u32>(carry + sum)", "dct f16 bitmap"),
    "a column too far": ("int column = -1, done = 0;", "int column = 0, done = 0;", "dct f16 delta basis"),
    "a barrier before the transform": (
        "tiles, source);\n    __syncthreads();", "tiles, source);", "dct int4 b128"
    ),
    "a barrier before the next tile": (
        "    __syncthreads();  // the tiles are free again\n", "", "grid int5 b128"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_DECODE)
def test_a_broken_decode_is_caught(name: str) -> None:
    old, new, form = BROKEN_DECODE[name]

    def call() -> tuple[np.ndarray, np.ndarray]:
        m, out = compressed(form), np.full(decoded(form).shape, np.nan, F16)
        launches = decode.plan(m, out, Workspace())
        _launch.run(*(replace(launch, grid=(1, 1, 1)) for launch in launches))  # so that tiles follow tiles
        return out, decoded(form)

    assert not outcome("decode", old, new, call) <= 1e-3


BROKEN_LINEAR = {
    "the wait for the copies": ("      cp_async_wait<0>();\n", "      cp_async_wait<1>();\n", 35),
    "the barrier of a step": (
        "      __syncthreads();  // this stage is complete, and the other is free\n",
        "",
        9,
    ),
}


@pytest.mark.parametrize("name", BROKEN_LINEAR)
def test_a_broken_linear_is_caught(name: str) -> None:
    old, new, tokens = BROKEN_LINEAR[name]
    assert not outcome("linear", old, new, linear_once("dct int2 b64", tokens)) <= 5e-3

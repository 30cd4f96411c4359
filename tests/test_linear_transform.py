"""linear on a GPU in the domain of the transform: kernels, sizes, and what they give on the host build."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu import Workspace, reference, transforms
from rbe_gpu.gpu import linear, linear_transform
from rbe_gpu.gpu._launch import Launch
from rbe_gpu.registry import relative_error

from . import real
from .compressed import FORMS, compressed, decoded, for_gpu, relative
from .host import capture
from .host.executor import on_host
from .host.virtual import VirtualWorkspace, entries, matrix, sizes, vectors, virtual
from .test_launch_linear import LIMITS, inputs

F32, F16, BF16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
BIG = 2**31


# --- arithmetic ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", transforms.BLOCK_SIZES)
def test_the_basis_is_a_sum_of_products(block: int) -> None:
    """The parameters where linear_transform_basis places them, between psi and phi, give the 8 functions."""
    phi, psi = linear_transform.functions(block).astype(np.float64)
    expected = transforms.basis_2d(block)
    for k, function in enumerate(expected):
        p = np.eye(8)[k]
        q = np.diag([0.0] * 4 + [p[1]] * 12)
        q[:4, :4] = [[p[0], p[2], p[3], p[5]], [p[2], 0, 0, 0], [p[4], 0, p[7], 0], [p[6], 0, 0, 0]]
        assert np.abs(psi @ q @ phi.T - function).max() <= 1e-6
    assert np.abs(psi @ q @ phi.T).max() > 0.1  # the last of them is no zero


def planned(
    tokens: int, weight: Any, dtype: Any = F32, method: str = "transform", cache: Any = None
) -> tuple[Launch, ...]:
    x, out = virtual((tokens, weight.shape[1]), dtype), virtual((tokens, weight.shape[0]), dtype)
    return linear.launches(x, weight, None, None, None, out, VirtualWorkspace(), cache, method)


def names(*short: str) -> list[str]:
    return [f"linear_transform_{name}" for name in short]


BASIS = {"basis": virtual((4, 2, 8), F16)}
HALF = ["linear_absmax", "linear_inputs"]


@pytest.mark.parametrize(
    ("tokens", "dtype", "given", "kernels"),
    [
        (1, F32, {}, ["linear_few_dot_1"]),
        (16, F32, {"sparse": True}, ["linear_inputs", "linear_sparse_8", "linear_absmax", "linear_epilogue"]),
        (32, F16, {}, ["linear_few_mma"]),
        (33, BF16, {}, [*HALF, "linear_mma_codes_64"]),
        (17, F32, {}, names("inputs", "dense")),
        (17, F32, {"sparse": True}, ["linear_absmax", *names("inputs", "bitmap", "sparse")]),
        (17, BF16, {"sparse": True}, [*HALF, *names("bitmap", "entries")]),
        (17, F16, BASIS, [*HALF, *names("features", "basis", "codes")]),
        (17, F16, {"transform": "dwt-bior3.1"}, names("inputs", "dense")),  # x^ would lose digits
        (17, F32, BASIS, names("inputs", "features", "basis", "dense")),
    ],
)
def test_transform_decodes_nothing(
    tokens: int, dtype: Any, given: dict[str, Any], kernels: list[str]
) -> None:
    assert entries(planned(tokens, matrix(256, 128, **given), dtype)) == kernels


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_decode_and_cache_take_panels(tokens: int) -> None:
    cache = rbe.PanelCache(0)
    for method in ("decode", "cache"):
        given = (tokens, matrix(256, 128), F16, method, cache)
        assert entries(planned(*given)) == ["decode_64", "linear_mma_f16"]
    with pytest.raises(ValueError, match="needs a cache"):
        planned(tokens, matrix(256, 128), F16, "cache")
    with pytest.raises(ValueError, match="unknown method 'fast'"):
        planned(tokens, matrix(256, 128), F16, "fast")


@pytest.mark.parametrize(
    ("tokens", "rows", "depth", "found"),
    [
        (17, 128, 128, (128, 1)),  # nothing to split
        (64, 4096, 4096, (512, 8)),  # 32 tiles
        (256, 4096, 4096, (1024, 4)),
        (1024, 4096, 4096, (4096, 1)),  # 256 tiles
        (64, 384, 1536, (256, 6)),
        (17, 96, 352, (384, 1)),  # ends within a step
        (17, 96, 544, (320, 2)),
    ],
)
def test_splits_fill_a_gpu(tokens: int, rows: int, depth: int, found: tuple[int, int]) -> None:
    each, count = linear_transform.splits(tokens, rows, depth)
    assert (each, count) == found
    assert each % 64 == 0
    assert each * (count - 1) < depth <= each * count


def test_beyond_31_bits() -> None:
    rows, cols = BIG // 16, 4096  # 2^39 weights
    absmax, half, bitmap, product = planned(17, matrix(rows, cols, sparse=True), F16)
    assert bitmap.grid == (rows // 8, 1, 1)
    assert bitmap.params["words"].shape == (rows, cols // 32)
    assert product.grid == (rows // 128, 1, 1)
    assert rows in sizes(product)
    tokens = BIG
    few = replace(matrix(128, 4096), **BASIS)
    ins, features, basis, product = planned(tokens, few)
    assert ins.grid == (tokens // 128 * 64, 1, 1)
    assert features.grid == ins.grid
    assert basis.grid == (tokens // 128, 1, 1)
    assert product.grid == (tokens // 128, 1, 1)
    assert product.shared == 64 << 10  # what compute capability 7.5 has for a block
    for launch in (absmax, half, ins, features, basis, product):
        assert tokens in sizes(launch) or 17 in sizes(launch)
    assert basis.params["sums"].shape == (tokens, 2, linear_transform.FUNCTIONS)


def test_launches_fit_their_kernels() -> None:
    from .host.executor import library

    for weight in (matrix(256, 2048), matrix(256, 2048, sparse=True), vectors(256, 2048)):
        for dtype in (F32, F16):
            for launch in planned(40, weight, dtype):
                library(launch.op).check(launch)


# --- values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "dtype", "reverse"),
    [(1, F32, True), (5, F32, False), (17, F32, True), (65, F16, False), (17, BF16, True)],
    ids=["1-float32", "5-float32", "17-float32", "65-float16", "17-bfloat16"],
)
@pytest.mark.parametrize("form", FORMS)
def test_the_decoded_product(form: str, tokens: int, dtype: Any, reverse: bool) -> None:
    """Every transform, block size, kind of code, with and without a basis: nothing but the product."""
    m = for_gpu(compressed(form))
    x = inputs(tokens, m.cols, dtype)
    out = np.full((tokens, m.rows), np.nan, dtype)
    with on_host(reverse):
        linear.linear(x, m, None, None, None, out, Workspace(), None, "transform")
    expected = reference.linear(x, decoded(form))
    if dtype == F32:
        assert relative(out, expected) <= 5e-6
    # of float16: an operand's rounding beside that of the result
    assert relative_error(out, expected, 2.0**-25) <= LIMITS[dtype]


@pytest.mark.parametrize(
    ("transform", "block"), [(t, b) for t in transforms.TRANSFORMS for b in (32, 64, 128)]
)
@pytest.mark.parametrize("codes", ["sparse-int4", "dense-int5"])
def test_every_transform(transform: str, block: int, codes: str) -> None:
    w = real.layer(1, "attention.self.key.weight")[:70, :330]
    density = {"density": 0.2} if codes.startswith("sparse") else {}
    m = rbe.compress(w, codes=codes, transform=transform, block=block, basis=block == 64, **density)
    for dtype in (F32, F16):
        x = inputs(18, m.cols, dtype)
        out = np.full((18, 70), np.nan, dtype)
        with on_host():
            linear.linear(x, m, None, None, None, out, Workspace(), None, "transform")
        assert relative(out, reference.linear(x, m)) <= (5e-6 if dtype == F32 else 6e-4)


@pytest.mark.parametrize(
    "form", ["dct f16 delta basis", "dct int1 delta b32", "dct int2 b64", "none int4 delta"]
)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_reaches_every_result_of_its_token(form: str, dtype: Any, value: float) -> None:
    """Also where a row of W stores nothing in its block; and no other token's."""
    m = compressed(form)
    x = inputs(40, m.cols, F32)
    x[1, 5] = value
    out = np.zeros((40, m.rows), dtype)
    with on_host():
        linear.linear(x.astype(dtype), m, None, None, None, out, Workspace(), None, "transform")
    finite = np.isfinite(out.astype(np.float32))
    assert not finite[1].any()
    assert finite[[0, *range(2, 40)]].all()


@pytest.mark.parametrize("form", ["dct f16 delta basis", "dct int3 b32 basis", "none int4 delta"])
def test_steady_state(form: str) -> None:
    """Through the layer, on CuPy arrays: nothing is allocated or waited for, and a captured call replays."""
    m = compressed(form)
    x = inputs(20, m.cols, F16)
    bias = np.resize(real.layer(3, "intermediate.dense.bias"), m.rows)
    with capture.installed() as (cupy, events):
        layer = rbe.to(rbe.RBELinear(m, bias, "gelu", method="transform"), "cuda")
        there, out = cupy.asarray(x), cupy.asarray(np.zeros((20, m.rows), F16))
        workspace = Workspace()

        def call() -> None:
            layer(there, out=out, workspace=workspace)

        call()
        call()
        events.clear()
        call()
        assert events == []
        graph = capture.captured(call)
        assert any(launch.op == "linear_transform" for launch in graph.launches)
        out[...] = 0
        graph.launch()
        found = out.get()
    assert relative_error(found, reference.linear(x, decoded(form), bias, "gelu"), 2.0**-25) <= LIMITS[F16]


@pytest.mark.parametrize("method", ["transform", "decode", "cache"])
def test_a_layer_passes_its_method(method: str) -> None:
    m = compressed("dct f16 bitmap")
    x = inputs(20, m.cols, F32)
    layer = rbe.RBELinear(m, cache=1 << 20, method=method)
    with capture.installed() as (cupy, _):
        y = rbe.to(layer, "cuda")(cupy.asarray(x)).get()
    assert relative(y, reference.linear(x, m)) <= 1e-6


@pytest.mark.parametrize(
    ("dtype", "tokens", "method", "launches"),
    [
        (F16, 40, None, {"linear_absmax": 2, "linear_inputs": 2, "linear_mma_codes": 4}),
        (F32, 3, None, {"linear_few_dot_4": 4}),
        (F32, 40, "transform", {"linear_transform_inputs": 2, "linear_transform_dense": 4}),
    ],
)
def test_projections_share_what_is_made_of_x(
    dtype: Any, tokens: int, method: str | None, launches: dict[str, int]
) -> None:
    """Queries, keys and values transform their input once; the output projection has another."""
    parts = ("self.query", "self.key", "self.value", "output.dense")
    weights = [
        rbe.compress(real.layer(0, f"attention.{p}.weight"), codes="dense-int4", basis=False) for p in parts
    ]
    layer = rbe.RBEAttention(*(rbe.RBELinear(w, method=method) for w in weights), 12)
    x = real.activations(tokens).astype(dtype)[None]
    with capture.installed() as (cupy, _):
        there, workspace = rbe.to(layer, "cuda"), Workspace()
        a, b = cupy.asarray(x), cupy.asarray(x[:, ::-1].copy())
        out = cupy.asarray(np.zeros_like(x))
        there(a, out=out, workspace=workspace)
        graph = capture.captured(lambda: there(b, out=out, workspace=workspace))
        first, second = (there(v, workspace=workspace).get() for v in (a, b))
    found = [launch.entry for launch in graph.launches]
    assert {name: sum(e.startswith(name) for e in found) for name in launches} == launches
    limit = 1e-5 if dtype == F32 else 4e-3
    for y, values in ((first, x), (second, x[:, ::-1])):
        assert relative(y.astype(np.float64), layer(values.astype(F32)).astype(np.float64)) <= limit

"""RBEAttention on CuPy arrays, in host emulation: in the transform domain if its matmuls decode no panels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu import Workspace, reference
from rbe_gpu.gpu import _execute, decode, embedding, linear
from rbe_gpu.gpu._launch import Launch
from rbe_gpu.kernel_struct import address
from rbe_gpu.registry import relative_error

from . import real
from .compressed import gridded
from .host import capture, stand_in
from .host.executor import HostExecutor, on_host
from .test_launch_linear import LIMITS, inputs

F32, F16, BF16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
ORDERS = pytest.mark.parametrize("reverse", [False, True], ids=["ascending", "descending"])
PARTS = ("self.query", "self.key", "self.value", "output.dense")
# q, k, v and the heads are rounded as well as the result: that doubles the error
LAYER_LIMITS = {dtype: limit if dtype == F32 else 2 * limit for dtype, limit in LIMITS.items()}

_MATMULS = [f"linear_transform_{name}" for name in ("codes", "entries", "dense", "sparse")]
#: Kernels that transform, by the side.
TRANSFORMS = {
    "linear_inputs": "in",
    "linear_transform_inputs": "in",
    "linear_epilogue": "out",
    "linear_mma_codes": "out",
    "linear_mma_codes_64": "out",
    "linear_transform_epilogue": "out",
    **dict.fromkeys(_MATMULS, "out"),
}


def transforms_of(launches: list[Launch]) -> dict[str, int]:
    """The number of input and output transforms that launches compute; of few tokens, whose matmuls transform their
    input themselves, one for each input."""
    counts = {"in": 0, "out": 0}
    seen: set[tuple[int, int]] = set()
    for launch in launches:
        side, params = TRANSFORMS.get(launch.entry), launch.params
        if launch.op == "linear_few":
            one = address(params["x.data"]), int(params["in_transform"])
            counts["in"] += int(one[1] != decode.TRANSFORM["none"] and one not in seen)
            seen.add(one)
            counts["out"] += int(params["finish.transform"] != decode.TRANSFORM["none"])
        if side is None or (launch.entry in _MATMULS and params["parts"] is not None):
            continue  # where k is split, the epilogue transforms the sums
        field = "epilogue.transform" if launch.op == "linear_transform" and side == "out" else "transform"
        counts[side] += int(params[field] != decode.TRANSFORM["none"])
    return counts


@contextmanager
def device(reverse: bool = False) -> Iterator[tuple[Any, list[Launch]]]:
    """The CuPy stand-in, and the launches since the list was last cleared."""
    launches: list[Launch] = []
    host = HostExecutor(reverse)

    def run(given: tuple[Launch, ...]) -> None:
        launches.extend(given)
        host(given)

    with stand_in.installed() as cupy, _execute.executor(run):
        yield cupy, launches


def dense(size: int, hidden: int | None = None) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Weights and biases of four projections from `hidden` features to `size` and back, cut from real ones."""
    hidden = size if hidden is None else hidden
    weights = [real.layer(0, f"attention.{p}.weight") for p in PARTS]
    biases = [real.layer(0, f"attention.{p}.bias") for p in PARTS]
    cut = [np.ascontiguousarray(w[:size, :hidden]) for w in weights[:3]]
    cut.append(np.ascontiguousarray(weights[3][:hidden, :size]))
    return cut, [*(b[:size].copy() for b in biases[:3]), biases[3][:hidden].copy()]


def attention(
    heads: int, size: int, hidden: int | None = None, method: str | None = "transform", **options: Any
) -> rbe.RBEAttention:
    weights, biases = dense(size, hidden)
    make = gridded if "grid" in options else rbe.compress
    pairs = zip((make(w, **options) for w in weights), biases, strict=True)
    return rbe.RBEAttention(*(rbe.RBELinear(w, b, method=method) for w, b in pairs), heads)


def expected(layer: rbe.RBEAttention, x: np.ndarray, ends: list[int]) -> np.ndarray:
    """The reference attention of packed sequences."""
    results = []
    for a, b in pairwise(ends):
        q, k, v = (
            reference.linear(x[a:b], p.weight, p.bias).reshape(1, b - a, -1, layer.head_dim)
            for p in (layer.query, layer.key, layer.value)
        )
        heads = reference.attention(q, k, v).reshape(b - a, -1)
        results.append(reference.linear(heads, layer.output.weight, layer.output.bias))
    return np.concatenate(results)


SPARSE = {"density": 0.2, "codes": "sparse-int8", "basis": False}
DENSE = {"codes": "dense-int5", "basis": False}
FITTING = {
    # name: (heads, features, tokens, options)
    "dct sparse": (3, 96, [0, 7, 24], {**SPARSE, "transform": "dct", "block": 32}),
    "dct dense": (3, 96, [0, 7, 40], {**DENSE, "transform": "dct", "block": 32}),
    "dwt dense": (3, 96, [0, 20], {**DENSE, "transform": "dwt", "block": 32}),
    "hadamard sparse delta": (2, 128, [0, 18], {**SPARSE, "density": 0.04, "transform": "hadamard", "block": 64}),
    "haar grid": (2, 128, [0, 9, 18], {"grid": 4, "transform": "dwt-haar", "block": 64}),
    "dct sparse b128": (2, 256, [0, 19], {**SPARSE, "transform": "dct", "block": 128}),
    "few sparse": (3, 96, [0, 2, 9], {**SPARSE, "transform": "dct", "block": 32}),
    "few dense": (2, 128, [0, 3], {**DENSE, "transform": "dwt", "block": 64}),
    "k split": (6, 384, [0, 5, 20], {**SPARSE, "transform": "dct", "block": 64}),
}  # fmt: skip


@ORDERS
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("name", FITTING)
def test_two_transforms(name: str, dtype: Any, reverse: bool) -> None:
    """One of the input, shared by query, key and value, and one of the result; nothing is decoded."""
    heads, size, ends, options = FITTING[name]
    layer = attention(heads, size, **options)
    x, residual = (real.activations(ends[-1], i)[:, :size].astype(dtype) for i in (3, 1))
    with device(reverse) as (cupy, launches):
        there = rbe.to(layer, "cuda")
        a, more, at = cupy.asarray(x), cupy.asarray(residual), cupy.asarray(np.array(ends))
        y = there(a, cu_seqlens=at)
        assert isinstance(y, cupy.ndarray)
        assert transforms_of(launches) == {"in": 1, "out": 1}
        assert {launch.op for launch in launches} <= {"linear", "linear_few", "linear_transform", "attention"}
        launches.clear()
        ordinary = there.output(there.mix(a, cu_seqlens=at))
        assert transforms_of(launches) == {"in": 2, "out": 4}
        sums = there(a, cu_seqlens=at, residual=more).get()
    expected_y = expected(layer, x, ends)
    assert relative_error(y.get(), ordinary.get().astype(np.float64)) <= LAYER_LIMITS[dtype]
    assert relative_error(y.get(), expected_y) <= LAYER_LIMITS[dtype]
    assert relative_error(sums, expected_y + residual.astype(np.float64)) <= LIMITS[dtype]


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_padded_and_cross(dtype: Any) -> None:
    """Sequences with lengths and a mask, cross attention, fewer key/value heads, projections that are not square,
    biases of another dtype: as on the CPU."""
    weights, biases = dense(128, 70)
    q, k, v, o = (rbe.compress(w, block=32, **DENSE) for w in weights)
    k, v = (rbe.compress(w[:64], block=32, **DENSE) for w in weights[1:3])
    bias = [biases[0].astype(F16), None, biases[2][:64], biases[3]]
    pairs = zip((q, k, v, o), bias, strict=True)
    layer = rbe.RBEAttention(*(rbe.RBELinear(w, b, method="transform") for w, b in pairs), 4, 2, causal=True)
    x = real.activations(18)[:, :70].reshape(2, 9, 70).astype(dtype)
    context = real.activations(24, 1)[:, :70].reshape(2, 12, 70).astype(dtype)
    lengths, mask = np.array([12, 5]), np.ones((9, 12), bool)
    mask[:, 3] = False
    expected_y = layer(x.astype(F32), lengths, mask, context=context.astype(F32))
    with device() as (cupy, launches):
        there = rbe.to(layer, "cuda")
        a, b, n, m = (cupy.asarray(v) for v in (x, context, lengths, mask))
        y = there(a, n, m, context=b).get()
        assert transforms_of(launches) == {"in": 2, "out": 1}  # of x, and of context
        assert y.dtype == dtype
    assert relative_error(y, expected_y.astype(np.float64)) <= LAYER_LIMITS[dtype]


def changed(layer: rbe.RBEAttention, part: str, **options: Any) -> rbe.RBEAttention:
    """`layer` with one projection compressed with other options, or with another method."""
    linear = getattr(layer, part)
    if "method" in options:
        linear.method = options["method"]
    else:
        w = linear.weight.decode()
        linear.weight = rbe.compress(w, **options) if options else w
    return layer


BLOCKS_OF_32 = {**DENSE, "transform": "dct", "block": 32}
ORDINARY = {
    "blocks that do not divide heads": (lambda: attention(3, 96, **{**BLOCKS_OF_32, "block": 64}), 4),
    "blocks larger than heads": (lambda: attention(3, 96, **{**BLOCKS_OF_32, "block": 128}), 4),
    "a basis": (lambda: attention(3, 96, **{**BLOCKS_OF_32, "basis": True}), 4),
    "not orthonormal": (lambda: attention(3, 96, **{**BLOCKS_OF_32, "transform": "dwt-bior3.1"}), 4),
    "no transform": (lambda: attention(3, 96, **{**BLOCKS_OF_32, "transform": "none"}), 0),
    "two transforms": (
        lambda: changed(attention(3, 96, **BLOCKS_OF_32), "key", **{**BLOCKS_OF_32, "transform": "dwt"}), 4
    ),
    "a dense projection": (lambda: changed(attention(3, 96, **BLOCKS_OF_32), "output"), 3),
    "a projection that is decoded": (
        lambda: changed(attention(3, 96, **BLOCKS_OF_32), "value", method="decode"), 3
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("why", ORDINARY)
def test_the_ordinary_way(why: str, dtype: Any) -> None:
    """Where the transform domain is not supported, every projection has its output transform."""
    make, outputs = ORDINARY[why]
    layer = make()
    x = real.activations(20)[:, :96].astype(dtype)
    with device() as (cupy, launches):
        there = rbe.to(layer, "cuda")
        y = there(cupy.asarray(x), cu_seqlens=cupy.asarray(np.array([0, 20])))
        assert transforms_of(launches)["out"] == outputs
    expected_y = expected(layer, x, [0, 20])
    assert relative_error(y.get(), expected_y) <= LAYER_LIMITS[dtype]


@pytest.mark.parametrize(
    ("dtype", "tokens", "options", "cache", "counts", "ops"),
    [
        # panels: as ever
        (F32, 20, BLOCKS_OF_32, None, {"in": 0, "out": 0}, {"linear", "decode"}),
        (F16, 20, {**SPARSE, "block": 32}, None, {"in": 0, "out": 0}, {"linear", "decode"}),
        # what the default multiplies as it is stored
        (F16, 40, BLOCKS_OF_32, None, {"in": 1, "out": 1}, {"linear"}),
        (BF16, 9, BLOCKS_OF_32, 1 << 20, {"in": 1, "out": 1}, {"linear_few"}),
        (F32, 16, {**SPARSE, "block": 32}, None, {"in": 1, "out": 1}, {"linear"}),
    ],
)
def test_the_default_way_is_as_it_was(
    dtype: Any, tokens: int, options: dict[str, Any], cache: int | None, counts: dict[str, int], ops: set[str]
) -> None:
    """Attention is in the transform domain unless a matmul of it decodes panels."""
    layer = attention(3, 96, method=None, **{"transform": "dct", **options})
    for part in (layer.query, layer.key, layer.value, layer.output):
        part.cache = None if cache is None else rbe.PanelCache(cache)
    x = real.activations(tokens)[:, :96].astype(dtype)
    with device() as (cupy, launches):
        there = rbe.to(layer, "cuda")
        y = there(cupy.asarray(x), cu_seqlens=cupy.asarray(np.array([0, tokens]))).get()
        assert transforms_of(launches) == counts
        assert {launch.op for launch in launches} == {"attention", *ops}
    assert relative_error(y, expected(layer, x, [0, tokens])) <= LAYER_LIMITS[dtype]


def test_a_changed_bias_or_method_is_seen() -> None:
    weights, biases = dense(96)
    layer = rbe.RBEAttention.from_dense(*weights, 3, method="transform", **BLOCKS_OF_32)
    x, ends = real.activations(20)[:, :96].copy(), np.array([0, 20])
    with device() as (cupy, launches):
        there, a, at = rbe.to(layer, "cuda"), cupy.asarray(x), cupy.asarray(ends)
        there(a, cu_seqlens=at)
        there.value.bias = cupy.asarray(biases[2])
        layer.value.bias = biases[2]
        launches.clear()
        y = there(a, cu_seqlens=at).get()
        assert transforms_of(launches) == {"in": 1, "out": 1}
        assert relative_error(y, expected(layer, x, [0, 20])) <= LAYER_LIMITS[F32]
        there.query.method = None
        launches.clear()
        there(a, cu_seqlens=at)
        assert transforms_of(launches) == {"in": 2, "out": 3}


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_what_is_not_finite_stays_in_its_sequence(dtype: Any) -> None:
    layer = attention(3, 96, **{**SPARSE, "density": 0.03, "transform": "dct", "block": 32})
    x = real.activations(20)[:, :96].astype(dtype)
    x[4, 7] = np.nan
    with device() as (cupy, _):
        y = rbe.to(layer, "cuda")(cupy.asarray(x), cu_seqlens=cupy.asarray(np.array([0, 9, 20]))).get()
    assert np.isnan(y[:9].astype(F32)).all()
    assert np.isfinite(y[9:].astype(F32)).all()


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_steady_state(dtype: Any) -> None:
    """The second call neither allocates nor synchronises, and a captured one replays."""
    layer = attention(3, 96, **{**SPARSE, "transform": "dct", "block": 32})
    x = real.activations(20)[:, :96].astype(dtype)
    with capture.installed() as (cupy, events):
        there, workspace = rbe.to(layer, "cuda"), Workspace()
        a, at, out = cupy.asarray(x), cupy.asarray(np.array([0, 20])), cupy.asarray(np.zeros_like(x))

        def call() -> None:
            there(a, cu_seqlens=at, residual=a, out=out, workspace=workspace)

        call()
        events.clear()
        call()
        assert events == []
        graph = capture.captured(call)
        assert transforms_of(graph.launches) == {"in": 1, "out": 1}
        inputs = [launch.entry for launch in graph.launches if launch.entry.endswith("_inputs")]
        assert inputs == (["linear_transform_inputs"] * 2 if dtype == F32 else ["linear_inputs"])
        before = out.get()
        out[...] = 0
        graph.launch()
        np.testing.assert_array_equal(out.get(), before)


# --- matrices with one of their transforms ------------------------------------------------------------


@ORDERS
@pytest.mark.parametrize("options", [SPARSE, DENSE, {"grid": 5}], ids=["sparse", "dense", "grid"])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_one_sided(block: int, options: dict[str, Any], reverse: bool) -> None:
    """Weights without one of their transforms, with every algorithm and number of tokens; and decoded."""
    w = np.ascontiguousarray(real.layer(1, "intermediate.dense.weight")[:128, :384])
    m = (gridded if "grid" in options else rbe.compress)(w, block=block, transform="dwt", **options)
    for weight in (m.without_transform("row"), m.without_transform("col")):
        w = reference.decode(weight)
        for tokens, dtype, method in (
            (3, F32, None), (9, F16, None), (18, F16, "transform"), (18, BF16, "transform"),
            (36, F16, "transform"), (18, F32, "transform"), (18, F32, "decode"),
        ):  # fmt: skip
            x = inputs(tokens, 384, dtype)
            out = np.full((tokens, 128), np.nan, dtype)
            with on_host(reverse):
                linear.linear(x, weight, None, None, None, out, Workspace(), None, method)
            assert relative_error(out, reference.linear(x, w), 2.0**-25) <= LIMITS[dtype]
        out = np.full((128, 384), np.nan, np.float32)
        with on_host(reverse):
            decode.decode(weight, out, Workspace())
        assert relative_error(out, w) <= 2e-6


def test_rows_of_columns_are_not_looked_up() -> None:
    m = rbe.compress(real.layer(1, "intermediate.dense.weight")[:64, :64].copy(), **DENSE)
    with on_host(), pytest.raises(TypeError, match="RBEMatrix it was made from"):
        embedding.embedding(
            np.array([1]), m.without_transform("col"), np.zeros((1, 64), np.float32), Workspace()
        )

"""Layers on compressed weights against the float64 reference on the decoded weights."""

from __future__ import annotations

import gc
import tracemalloc
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu import reference
from rbe_gpu.codecs import GridCodes
from rbe_gpu.layers import (
    RBEFFN,
    RBEAttention,
    RBEDropout,
    RBEEmbedding,
    RBELayerNorm,
    RBELinear,
    RBERMSNorm,
)

from . import real

TOLERANCE = 1e-5  # relative Frobenius: float32 sums of up to 1536 terms, against float64
DENSE = ()
FORMS = (
    DENSE,
    (("codes", "dense-int4"),),
    (("codes", "dense-int6"), ("block", 32), ("transform", "none")),
    (("density", 0.25), ("codes", "sparse-f16"), ("transform", "dwt")),
    (("density", 0.5), ("codes", "sparse-int8"), ("basis", True)),
)
FORM_IDS = ("dense", "dense-int4", "dense-int6-none", "sparse-f16-dwt", "sparse-int8-basis")
HEADS = 12
TOKENS = 70
SMALL = 16 << 10  # bytes of small temporary Python objects that a call may allocate

Form = tuple[tuple[str, Any], ...]


def relative(y: Any, expected: Any) -> float:
    difference = np.asarray(y, np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


def vector(name: str) -> np.ndarray:
    return real.layer(3, name + ".bias")


@cache
def linear(name: str, form: Form, rows: int | None = None) -> RBELinear:
    """A linear layer of MiniLM's layer 3, or its first `rows` rows."""
    weight = np.ascontiguousarray(real.layer(3, name + ".weight")[:rows])
    return RBELinear.from_dense(weight, vector(name)[:rows].copy(), **dict(form))


def attention(form: Form, kv_heads: int = HEADS, **options: Any) -> RBEAttention:
    query, key, value = (
        linear(f"attention.self.{n}", form, rows)
        for n, rows in (("query", None), ("key", 32 * kv_heads), ("value", 32 * kv_heads))
    )
    return RBEAttention(query, key, value, linear("attention.output.dense", form), HEADS, kv_heads, **options)


def expected_linear(layer: RBELinear, x: Any, activation: str | None = None) -> Any:
    return reference.linear(x, layer.weight, layer.bias, activation)


def expected_attention(layer: RBEAttention, x: Any, context: Any = None, **options: Any) -> Any:
    source = x if context is None else context
    q, k, v = (
        expected_linear(part, a).reshape(*a.shape[:-1], heads, layer.head_dim)
        for part, a, heads in (
            (layer.query, x, layer.num_heads),
            (layer.key, source, layer.num_kv_heads),
            (layer.value, source, layer.num_kv_heads),
        )
    )
    o = reference.attention(q, k, v, layer.causal, layer.scale, window=layer.window, **options)
    return expected_linear(layer.output, o.reshape(*x.shape[:-1], -1))


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return real.activations(TOKENS)


def padded(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Real hidden states (count, seq, 384) float32 of layer 3, and their lengths; seq is the longest."""
    _, lengths = real.batch(8)
    lengths = lengths[:count].copy()
    return np.ascontiguousarray(real.hidden_states(8)[3][:count, : lengths.max()], np.float32), lengths


# --- against the reference ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_linear(form: Form, activation: str | None, x: np.ndarray) -> None:
    shared = linear("intermediate.dense", form)
    layer = RBELinear(shared.weight, shared.bias, activation)
    residual = np.resize(x, (TOKENS, 1536))
    assert relative(layer(x), expected_linear(layer, x, activation)) <= TOLERANCE
    y = layer(x.reshape(2, -1, 384), residual.reshape(2, -1, 1536))
    assert y.shape == (2, TOKENS // 2, 1536)
    expected = reference.linear(x, layer.weight, layer.bias, activation, residual)
    assert relative(y.reshape(TOKENS, -1), expected) <= TOLERANCE


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
def test_embedding(form: Form) -> None:
    table = np.ascontiguousarray(real.weight("embeddings.word_embeddings.weight")[1000:1512])
    ids = (real.batch(8)[0] % 512).astype(np.int32)
    layer = RBEEmbedding.from_dense(table, **dict(form))
    if form:
        assert isinstance(layer.weight, rbe.RBEVectors)
    y = layer(ids)
    assert y.dtype == np.float32
    assert relative(y, reference.embedding(ids, layer.weight)) <= TOLERANCE
    assert (layer.rows, layer.cols) == (512, 384)


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
def test_norms(form: Form, x: np.ndarray) -> None:
    gain = real.layer(3, "output.LayerNorm.weight")
    bias = real.layer(3, "output.LayerNorm.bias")
    residual = np.ascontiguousarray(x[::-1])
    total = np.empty_like(x)

    layer = RBELayerNorm.from_dense(gain, bias, 1e-12, **dict(form))
    expected, expected_total = reference.layer_norm(
        x, reference.dense(layer.weight), reference.dense(layer.bias), 1e-12, residual
    )
    assert relative(layer(x, residual, residual_out=total), expected) <= TOLERANCE
    assert relative(total, expected_total) <= TOLERANCE

    rms = RBERMSNorm.from_dense(gain, 1e-6, **dict(form))
    expected, expected_total = reference.rms_norm(x, reference.dense(rms.weight), 1e-6, residual)
    assert relative(rms(x, residual, residual_out=total), expected) <= TOLERANCE
    assert relative(total, expected_total) <= TOLERANCE


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
def test_attention(form: Form) -> None:
    x, lengths = padded(3)
    layer = attention(form)
    y = layer(x, lengths, residual=x)
    expected = expected_attention(layer, x, lengths=lengths) + x
    for row, expected_row, length in zip(y, expected, lengths, strict=True):
        assert relative(row[:length], expected_row[:length]) <= TOLERANCE


@pytest.mark.parametrize("kv_heads", [1, 4, 12])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (5, 2)}, {"scale": 0.1}], ids=str)
def test_grouped_causal_and_window_attention(kv_heads: int, options: dict[str, Any]) -> None:
    x, lengths = padded(2)
    layer = attention(FORMS[1], kv_heads, **options)
    y, expected = layer(x, lengths), expected_attention(layer, x, lengths=lengths)
    for row, expected_row, length in zip(y, expected, lengths, strict=True):
        assert relative(row[:length], expected_row[:length]) <= TOLERANCE


def test_cross_attention() -> None:
    x, lengths = padded(3)
    queries = np.ascontiguousarray(x[:, :7])
    layer = attention(FORMS[1])
    y = layer(queries, lengths, context=x)
    assert y.shape == queries.shape
    assert relative(y, expected_attention(layer, queries, x, lengths=lengths)) <= TOLERANCE


def test_attention_mask() -> None:
    x, lengths = padded(3)
    keep = np.arange(x.shape[1]) < lengths[:, None]
    layer = attention(DENSE)
    y = layer(x, mask=keep[:, None, None, :])
    assert relative(y, expected_attention(layer, x, lengths=lengths)) <= TOLERANCE


def test_packed_attention_is_the_padded_one_without_padding() -> None:
    """Also where neighbours have one length, and where a sequence is empty."""
    x, lengths = padded(6)
    lengths[3] = lengths[2] = lengths[1]
    lengths[4] = 0
    real_tokens = np.arange(x.shape[1]) < lengths[:, None]
    layer = attention(FORMS[1], causal=True)
    packed = np.ascontiguousarray(x[real_tokens])
    y = layer(packed, lengths, residual=packed)
    assert y.shape == packed.shape
    expected = (expected_attention(layer, x, lengths=lengths) + x)[real_tokens]
    assert relative(y, expected) <= TOLERANCE
    ends = np.cumsum([0, *lengths], dtype=np.int32)
    np.testing.assert_array_equal(layer(packed, cu_seqlens=ends, residual=packed), y)
    for given in ({"lengths": lengths, "cu_seqlens": ends}, {}):
        with pytest.raises(ValueError, match="need lengths= or cu_seqlens="):
            layer(packed, **given)
    with pytest.raises(ValueError, match="cu_seqlens is for packed sequences"):
        layer(x, lengths, cu_seqlens=ends)


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "relu"])
def test_ffn(form: Form, activation: str, x: np.ndarray) -> None:
    up, down = linear("intermediate.dense", form), linear("output.dense", form)
    layer = RBEFFN(up, down, activation=activation)
    hidden = expected_linear(up, x, activation)
    expected = expected_linear(down, hidden) + x
    assert relative(layer(x, residual=x), expected) <= TOLERANCE
    assert layer.nbytes == up.nbytes + down.nbytes
    assert up.activation is None  # the layer given is not changed


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
def test_swiglu_ffn(form: Form, x: np.ndarray) -> None:
    """Stacked [gate; up], as `from_dense` makes it, and with a gate of its own."""
    up, gate = (real.layer(i, "intermediate.dense.weight") for i in (3, 4))
    up_bias, gate_bias = (real.layer(i, "intermediate.dense.bias") for i in (3, 4))
    down = real.layer(3, "output.dense.weight")
    stacked = RBEFFN.from_dense(up, down, gate, "swiglu", up_bias=up_bias, gate_bias=gate_bias, **dict(form))
    assert stacked.gate is None
    hidden = reference.swiglu(expected_linear(stacked.up, x))
    assert relative(stacked(x), expected_linear(stacked.down, hidden)) <= TOLERANCE

    separate = RBEFFN(
        linear("intermediate.dense", form),
        stacked.down,
        RBELinear.from_dense(gate, gate_bias, **dict(form)),
        activation="swiglu",
    )
    assert separate.gate is not None
    hidden = expected_linear(separate.gate, x, "silu") * expected_linear(separate.up, x)
    assert relative(separate(x), expected_linear(separate.down, hidden)) <= TOLERANCE


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_half_activations(dtype: Any, x: np.ndarray) -> None:
    """The result has the dtype of x; each of up to six stored tensors in sequence rounds by 2^-11 or 2^-8."""
    tolerance = 6 * 2.0 ** (-11 if dtype is np.float16 else -8)
    half = x.astype(dtype)
    ffn = RBEFFN(linear("intermediate.dense", FORMS[1]), linear("output.dense", FORMS[1]))
    y = ffn(half, residual=half)
    wide = half.astype(np.float64)
    expected = expected_linear(ffn.down, expected_linear(ffn.up, wide, "gelu")) + wide
    assert y.dtype == dtype
    assert relative(y, expected) <= tolerance
    layer = attention(FORMS[1])
    y = layer(half[None])
    assert y.dtype == dtype
    assert relative(y, expected_attention(layer, wide[None])) <= tolerance


# --- dropout ------------------------------------------------------------------------------------------


def test_dropout_training_and_evaluation(x: np.ndarray) -> None:
    layer = RBEDropout(0.3, seed=7)
    assert layer.training
    first = layer(x)
    assert layer.offset == -(-x.size // 4)
    np.testing.assert_allclose(first, reference.dropout(x, 0.3, 7, 0), rtol=1e-6)
    second = layer(x, residual=x)
    np.testing.assert_allclose(second, reference.dropout(x, 0.3, 7, -(-x.size // 4), x), rtol=1e-6, atol=1e-6)
    layer(x.reshape(-1)[:5])
    assert layer.offset == 2 * -(-x.size // 4) + 2

    assert layer.eval() is layer
    offset = layer.offset
    assert layer(x) is x
    out = np.empty_like(x)
    assert layer(x, out=out) is out
    np.testing.assert_array_equal(out, x)
    np.testing.assert_array_equal(layer(x, residual=x), x + x)
    assert layer.offset == offset

    layer.train()
    layer.offset = 0
    np.testing.assert_array_equal(layer(x), first)


# --- memory -------------------------------------------------------------------------------------------


def _layers(form: Form) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Every layer with weights, and the shape of its input."""
    ffn = RBEFFN(linear("intermediate.dense", form), linear("output.dense", form))
    swiglu = RBEFFN(
        linear("intermediate.dense", form),
        linear("output.dense", form),
        linear("intermediate.dense", form),
        activation="swiglu",
    )
    stacked = RBEFFN(linear("intermediate.dense", form), _half_down(form), activation="swiglu")
    gain = real.layer(3, "output.LayerNorm.weight")
    return {
        "linear": (linear("intermediate.dense", form), (TOKENS, 384)),
        "attention": (attention(form), (2, TOKENS // 2, 384)),
        "ffn": (ffn, (TOKENS, 384)),
        "swiglu": (swiglu, (TOKENS, 384)),
        "swiglu-stacked": (stacked, (TOKENS, 384)),
        "layer_norm": (RBELayerNorm.from_dense(gain, gain, **dict(form)), (TOKENS, 384)),
        "rms_norm": (RBERMSNorm.from_dense(gain, **dict(form)), (TOKENS, 384)),
        "dropout": (RBEDropout(0.1), (TOKENS, 384)),
    }


@cache
def _half_down(form: Form) -> RBELinear:
    weight = np.ascontiguousarray(real.layer(3, "output.dense.weight")[:, :768])
    return RBELinear.from_dense(weight, **dict(form))


KINDS = ("linear", "attention", "ffn", "swiglu", "swiglu-stacked", "layer_norm", "rms_norm", "dropout")


def traced_peak(call: Any) -> int:
    """Peak bytes that a call allocates through Python and NumPy."""
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("form", [FORMS[0], FORMS[1], FORMS[4]], ids=[FORM_IDS[i] for i in (0, 1, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_second_call_allocates_nothing(kind: str, form: Form) -> None:
    """With out= and a workspace. The smallest buffer is 108 KB; views and lists of arguments take up to 13 KB of
    small objects, whatever the size of the data.
    """
    layer, shape = _layers(form)[kind]
    x = real.activations(TOKENS).reshape(shape)
    workspace = rbe.Workspace()
    expected = layer(x)
    out = np.empty_like(expected)
    if kind == "dropout":
        layer.offset = 0
    assert layer(x, out=out, workspace=workspace) is out
    np.testing.assert_array_equal(out, expected)
    peak = traced_peak(lambda: layer(x, out=out, workspace=workspace))
    assert peak < SMALL, f"{kind} allocated {peak} bytes"


@pytest.mark.parametrize("name", ["dropout", "softmax"])
def test_the_scratch_memory_of_a_part_is_on_its_stack(name: str) -> None:
    """8 KB for every thread that comes in time would make the memory of a call depend on the scheduler."""
    x = real.activations(TOKENS)
    out = np.empty_like(x)
    arguments: tuple[Any, ...] = (0.1, 0) if name == "dropout" else ()

    def call() -> None:
        getattr(rbe, name)(x, *arguments, out=out)

    call()
    assert traced_peak(call) < 4 << 10


def test_embedding_second_call_allocates_nothing() -> None:
    table = np.ascontiguousarray(real.weight("embeddings.word_embeddings.weight")[:512])
    ids = np.arange(0, 512, 3)
    for form in (FORMS[0], FORMS[1]):
        layer, workspace = RBEEmbedding.from_dense(table, **dict(form)), rbe.Workspace()
        out = layer(ids, workspace=workspace).copy()
        assert layer(ids, out=out, workspace=workspace) is out
        assert traced_peak(lambda: layer(ids, out=out, workspace=workspace)) < SMALL  # noqa: B023


def test_layers_share_a_workspace() -> None:
    """A transformer layer on one workspace gives the same as its parts without one."""
    x, lengths = padded(3)
    ws = rbe.Workspace()
    attend = attention(FORMS[1])
    norm = RBELayerNorm(real.layer(3, "output.LayerNorm.weight"), vector("output.LayerNorm"), 1e-12)
    ffn = RBEFFN(linear("intermediate.dense", FORMS[1]), linear("output.dense", FORMS[1]))
    a, b = np.empty_like(x), np.empty_like(x)
    for _ in range(2):
        attend(x, lengths, residual=x, out=a, workspace=ws)
        norm(a, out=a, workspace=ws)
        ffn(a, residual=a, out=b, workspace=ws)
        norm(b, out=b, workspace=ws)
    alone = norm(attend(x, lengths, residual=x))
    alone = norm(ffn(alone, residual=alone))
    np.testing.assert_array_equal(b, alone)
    # scratch memory of one layer, not of all of them: q, k, v, heads, the FFN's inner states, decoding
    assert ws.nbytes < 4 * x.nbytes + x.nbytes * 4 + (16 << 20)


# --- cache --------------------------------------------------------------------------------------------


def test_cache_hits_under_a_budget(x: np.ndarray) -> None:
    """A budget of 0, of one layer and of both layers: from the second call on no hits, half, and all."""
    shared = [linear(n, FORMS[1]) for n in ("intermediate.dense", "output.dense")]
    panels = _panels(shared)
    one = shared[0].weight.dense_nbytes
    for budget, kept in ((0, 0), (one, panels // 2), (2 * one, panels)):
        cache = rbe.PanelCache(budget)
        layer = RBEFFN(*(RBELinear(part.weight, part.bias, cache=cache, method="cache") for part in shared))
        first = layer(x)
        assert (cache.hits, cache.misses) == (0, panels)
        assert cache.nbytes <= budget
        np.testing.assert_array_equal(layer(x), first)
        assert (cache.hits, cache.misses) == (kept, 2 * panels - kept)
        assert cache.nbytes == (one * kept * 2) // panels


def _panels(layers: list[RBELinear]) -> int:
    cache = rbe.PanelCache(0)
    for layer in layers:
        RBELinear(layer.weight, cache=cache, method="cache")(
            real.activations(1).repeat(layer.in_features // 384, axis=1)
        )
    return cache.misses


def test_cache_from_a_number(x: np.ndarray) -> None:
    weight = real.layer(3, "attention.self.query.weight")
    layer = RBELinear.from_dense(weight, cache=1 << 20, codes="dense-int4")
    layer(x)
    layer(x)
    assert layer.cache is not None
    assert (layer.cache.budget, layer.cache.hits, layer.cache.misses) == (1 << 20, 1, 1)
    assert layer.nbytes == layer.weight.nbytes  # the cache is counted by itself


def test_bytes_are_those_in_memory() -> None:
    """A file compresses grid codes further. In memory one large integer is an exception to codes of two bits."""
    q = np.zeros((64, 64), np.int8)
    q[0, 0] = 127
    codes = GridCodes.from_integers(q, np.ones(64), np.ones(64))
    layer = RBELinear(rbe.RBEMatrix((64, 64), 64, "none", 1.0, None, codes))
    codes_and_scales, exceptions = 64 * 64 * 2 // 8 + 2 * 2 * 64, 3 + 2 * 65
    assert layer.nbytes == codes_and_scales + exceptions
    assert layer.weight.nbytes < 300


# --- construction -------------------------------------------------------------------------------------


def test_from_dense_compresses_only_when_asked() -> None:
    weight = real.layer(3, "attention.self.query.weight")
    assert RBELinear.from_dense(weight).weight is weight
    assert RBELinear.from_dense(weight, grade=None).weight is weight
    compact = RBELinear.from_dense(weight, grade="C", block=32)
    assert isinstance(compact.weight, rbe.RBEMatrix)
    assert compact.weight.block == 32
    assert compact.weight.error_report(weight).relative_error <= 0.3
    assert compact.nbytes < weight.nbytes
    small = RBEAttention.from_dense(weight, weight, weight, weight, HEADS, ratio=6)
    assert small.nbytes <= 4 * weight.nbytes / 6
    assert RBEFFN.from_dense(weight, weight, rmse=0.01).down.weight.error_report(weight).rmse <= 0.01
    with pytest.raises(TypeError, match="colour"):
        RBELinear.from_dense(weight, colour="blue")


def test_repr_describes_the_weights() -> None:
    compact = linear("intermediate.dense", FORMS[1])
    assert repr(compact).startswith(
        "RBELinear(384 -> 1536, bias, RBEMatrix(1536x384, dct, block=64, dense-int4"
    )
    dense = linear("output.dense", DENSE)
    assert repr(dense) == "RBELinear(1536 -> 384, bias, dense(384x1536, float32))"
    assert "12 heads of 32 (4 for keys and values), causal" in repr(attention(DENSE, 4, causal=True))
    assert repr(RBEFFN(compact, dense, activation="silu")).startswith("RBEFFN(silu")
    assert repr(RBEDropout(0.5, 3).eval()) == "RBEDropout(p=0.5, seed=3, offset=0, evaluation)"
    gain = real.layer(3, "output.LayerNorm.weight")
    assert repr(RBELayerNorm(gain)) == "RBELayerNorm(eps=1e-05, weight=dense(384, float32), bias=None)"
    assert repr(RBERMSNorm(gain)) == "RBERMSNorm(eps=1e-06, weight=dense(384, float32))"
    assert repr(RBEEmbedding(dense.weight)) == "RBEEmbedding(384 rows of 1536, dense(384x1536, float32))"


def test_wrong_arguments_name_the_fix(x: np.ndarray) -> None:
    w = real.layer(3, "attention.self.query.weight")
    gain = real.layer(3, "output.LayerNorm.weight")
    square = RBELinear(w)
    wide = linear("intermediate.dense", DENSE)
    with pytest.raises(TypeError, match="numpy or cupy array"):
        RBELinear(w.tolist())
    with pytest.raises(ValueError, match="out_features"):
        RBELinear(gain)
    with pytest.raises(ValueError, match=r"bias has shape \(5,\)"):
        RBELinear(w, gain[:5])
    with pytest.raises(ValueError, match="unknown activation 'tanh'"):
        RBELinear(w, activation="tanh")
    with pytest.raises(ValueError, match=r"needs \(rows, cols\)"):
        RBEEmbedding(gain)
    with pytest.raises(ValueError, match=r"needs \(cols,\)"):
        RBELayerNorm(w)
    with pytest.raises(ValueError, match=r"bias has shape \(5,\)"):
        RBELayerNorm(gain, gain[:5])
    with pytest.raises(ValueError, match=r"needs \(cols,\)"):
        RBERMSNorm(w)
    with pytest.raises(ValueError, match="not a probability"):
        RBEDropout(1.5)
    with pytest.raises(ValueError, match="out of range"):
        RBEDropout(0.5, seed=-1)
    with pytest.raises(ValueError, match="not a multiple of num_heads=7"):
        RBEAttention(square, square, square, square, 7)
    with pytest.raises(ValueError, match="not a multiple of num_kv_heads=5"):
        RBEAttention(square, square, square, square, 12, 5)
    with pytest.raises(ValueError, match="key gives 384 features"):
        RBEAttention(square, square, square, square, 12, 4)
    with pytest.raises(ValueError, match="output takes 1536 features"):
        RBEAttention(square, square, square, linear("output.dense", DENSE), 12)
    with pytest.raises(ValueError, match="gate is given but activation is 'gelu'; use one of"):
        RBEFFN(square, square, square)
    with pytest.raises(ValueError, match="unknown activation 'tanh'"):
        RBEFFN(square, square, activation="tanh")
    with pytest.raises(ValueError, match="pass it to RBEFFN"):
        RBEFFN(RBELinear(w, activation="relu"), square)
    with pytest.raises(ValueError, match="down takes 384 features, up gives 1536"):
        RBEFFN(wide, square)
    with pytest.raises(ValueError, match="belong together"):
        RBEFFN.from_dense(w, w, activation="swiglu")
    layer = attention(DENSE)
    with pytest.raises(ValueError, match="need lengths="):
        layer(x)
    with pytest.raises(ValueError, match="lengths add up to 60, x has 70"):
        layer(x, np.array([30, 30]))
    with pytest.raises(TypeError, match="integers of shape"):
        layer(x, np.array([30.0, 40.0]))
    with pytest.raises(ValueError, match="packed"):
        layer(x[None, None])
    with pytest.raises(ValueError, match="context has 2 axes"):
        layer(x[None], context=x)


def _transforms_of(call, monkeypatch):
    """The number of input and output transforms that a call computes on the CPU, and its result."""
    from rbe_gpu.cpu_fallback import linear

    counts = {"in": 0, "out": 0}
    matmul_tiles = linear.matmul_tiles

    def counted(call, a, threads):
        counts["in"] += a.pending and bool(a.params["transform"][0])
        counts["out"] += bool(call.params["transform_out"][0])
        matmul_tiles(call, a, threads)

    monkeypatch.setattr(linear, "matmul_tiles", counted)
    return counts, call()


@pytest.mark.parametrize("options", [{"density": 0.1}, {"codes": "dense-int8"}])
@pytest.mark.parametrize("transform", ["dct", "dwt", "hadamard"])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_makes_two_transforms(options, transform, packed, monkeypatch):
    """Blocks of 32 divide heads of 32: queries, keys, values and heads stay in the transform domain."""
    names = [f"attention.{n}" for n in ("self.query", "self.key", "self.value", "output.dense")]
    weights = [real.layer(0, f"{n}.weight") for n in names]
    biases = [real.layer(0, f"{n}.bias") for n in names]
    compressed = [rbe.compress(w, block=32, transform=transform, basis=False, **options) for w in weights]
    layer = rbe.RBEAttention(*(rbe.RBELinear(w, b) for w, b in zip(compressed, biases, strict=True)), 12)
    plain = rbe.RBEAttention(
        *(rbe.RBELinear(w.decode(), b) for w, b in zip(compressed, biases, strict=True)), 12
    )
    x = real.activations(40)
    lengths = np.array([25, 15])
    if not packed:
        x, lengths = x.reshape(2, 20, 384), np.array([20, 11])
    residual = real.activations(40, 3).reshape(x.shape)
    counts, y = _transforms_of(lambda: layer(x, lengths, residual=residual), monkeypatch)
    assert counts == {"in": 1, "out": 1}
    expected = plain(x, lengths, residual=residual)
    assert np.linalg.norm(y - expected) < 1e-6 * np.linalg.norm(expected)


def test_attention_outside_the_transform_domain(monkeypatch):
    """Blocks that do not divide the heads: every projection has its output transform; the input has one."""
    parts = ("self.query", "self.key", "self.value", "output.dense")
    weights = [real.layer(0, f"attention.{n}.weight") for n in parts]
    layer = rbe.RBEAttention.from_dense(
        *weights, 12, codes="dense-int8", block=64, transform="dct", basis=False
    )
    counts, y = _transforms_of(lambda: layer(real.activations(20)[None]), monkeypatch)
    assert counts == {"in": 2, "out": 4}
    layer.query = rbe.RBELinear(layer.query.weight.decode())  # a changed part takes effect
    np.testing.assert_allclose(layer(real.activations(20)[None]), y, rtol=1e-3, atol=1e-5)


def test_attention_follows_a_new_bias():
    """The projections in the transform domain are derived again when a part changes."""
    parts = ("self.query", "self.key", "self.value", "output.dense")
    weights = [real.layer(0, f"attention.{n}.weight") for n in parts]
    layer = rbe.RBEAttention.from_dense(*weights, 12, codes="dense-int8", block=32, basis=False)
    x = real.activations(20)[None]
    before = layer(x)
    layer.value.bias = real.layer(0, "attention.self.value.bias")
    shift = np.asarray(layer.output.weight.decode() @ layer.value.bias)
    np.testing.assert_allclose(layer(x) - before, np.broadcast_to(shift, x.shape), atol=1e-5)
    after = layer(x)
    layer.output.activation = "relu"
    np.testing.assert_array_equal(layer(x), np.maximum(after, 0))


def test_a_method_in_the_transform_domain(monkeypatch):
    """`from_dense` passes it to every projection, also in the transform domain, where a change takes effect."""
    parts = ("self.query", "self.key", "self.value", "output.dense")
    weights = [real.layer(0, f"attention.{n}.weight") for n in parts]
    options = {"codes": "dense-int8", "block": 32, "basis": False}
    layer = rbe.RBEAttention.from_dense(*weights, 12, method="decode", **options)
    x = real.activations(20)[None]
    counts, decoded = _transforms_of(lambda: layer(x), monkeypatch)
    assert counts == {"in": 0, "out": 0}
    for part in (layer.query, layer.key, layer.value, layer.output):
        assert part.method == "decode"
        part.method = "transform"
    counts, transformed = _transforms_of(lambda: layer(x), monkeypatch)
    assert counts == {"in": 1, "out": 1}
    assert np.linalg.norm(decoded - transformed) < 1e-6 * np.linalg.norm(decoded)
    assert rbe.RBELinear.from_dense(weights[0], method="decode", **options).method == "decode"
    ffn = rbe.RBEFFN.from_dense(weights[0], weights[3], method="decode", **options)
    assert (ffn.up.method, ffn.down.method) == ("decode", "decode")
    with pytest.raises(ValueError, match="unknown method 'fast'"):
        rbe.RBEAttention.from_dense(*weights, 12, method="fast", **options)


def test_attention_in_the_transform_domain_follows_changes(monkeypatch):
    """The derived projections follow every change, and use the method of each projection."""
    from rbe_gpu.cpu_fallback import linear

    decoded = []
    decode_rows = linear.decode_rows
    monkeypatch.setattr(linear, "decode_rows", lambda *args: decoded.append(1) or decode_rows(*args))
    layer = attention((("codes", "dense-int8"), ("block", 32), ("transform", "dct"), ("basis", False)))
    parts = (layer.query, layer.key, layer.value, layer.output)
    x = real.activations(40).reshape(2, 20, 384)

    def check() -> None:
        assert relative(layer(x), expected_attention(layer, x)) < TOLERANCE

    check()
    layer.causal = True
    check()
    layer.window = (3, 0)
    check()
    layer.scale = 0.05
    check()
    for method, times in (("transform", 0), ("decode", 4)):
        try:
            for part in parts:
                part.method = method
            decoded.clear()
            check()
            assert len(decoded) == times
        finally:
            for part in parts:  # other tests share them
                part.method = None

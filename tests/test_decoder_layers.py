"""Layers of decoders against float64: rotary positions, norms of heads, a cache, gated activations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu import reference
from rbe_gpu.layers import RBEFFN, KVCache, RBEAttention, RBELinear, RBERMSNorm, RBERotary

from . import real
from .test_layers import DENSE, FORMS, HEADS, TOLERANCE, attention, expected_linear, linear, relative

FREQUENCIES = 10000.0 ** (-np.arange(0, 32, 2) / 32)
GAIN = np.linspace(0.5, 1.5, 32, dtype=np.float32)


def rotated(x: Any, positions: np.ndarray, frequencies: np.ndarray = FREQUENCIES) -> Any:
    angle = (positions.astype(np.float32)[..., None] * frequencies.astype(np.float32)).astype(np.float64)
    half = angle.shape[-1]
    a, b, rest = np.split(np.asarray(x, np.float64), [half, 2 * half], axis=-1)
    c, s = np.cos(angle)[..., None, :], np.sin(angle)[..., None, :]
    return np.concatenate([a * c - b * s, b * c + a * s, rest], axis=-1)


def expected(layer: RBEAttention, x: np.ndarray, positions: np.ndarray) -> Any:
    """The definition, of one sequence (tokens, hidden)."""
    q, k, v = (
        expected_linear(part, x).reshape(len(x), heads, layer.head_dim)
        for part, heads in (
            (layer.query, layer.num_heads), (layer.key, layer.num_kv_heads), (layer.value, layer.num_kv_heads)
        )
    )  # fmt: skip
    if layer.query_norm is not None:
        q, k = (reference.rms_norm(a, GAIN, 1e-6)[0] for a in (q, k))
    if layer.rotary is not None:
        q, k = (rotated(a, positions, layer.rotary.frequencies) for a in (q, k))
    o = reference.attention(q[None], k[None], v[None], layer.causal, layer.scale, window=layer.window)
    return expected_linear(layer.output, o[0].reshape(len(x), -1))


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return real.activations(60)


def decoder_attention(
    form: Any = DENSE, kv_heads: int = 4, window: tuple[int, int] | None = None
) -> RBEAttention:
    norms = {name: RBERMSNorm(GAIN) for name in ("query_norm", "key_norm")}
    return attention(form, kv_heads, causal=True, window=window, rotary=RBERotary(FREQUENCIES), **norms)


@pytest.mark.parametrize("form", [DENSE, FORMS[1]], ids=["dense", "int4"])
@pytest.mark.parametrize("kv_heads", [1, 4, HEADS])
def test_rotary_positions_and_norms(form: Any, kv_heads: int, x: np.ndarray) -> None:
    """Padded and packed, numbered by itself and with positions given."""
    layer = decoder_attention(form, kv_heads)
    count = np.arange(30)
    want = np.concatenate([expected(layer, x[:30], count), expected(layer, x[30:], count)])
    assert relative(layer(x, np.array([30, 30])), want) <= TOLERANCE
    assert relative(layer(x.reshape(2, 30, -1)).reshape(60, -1), want) <= TOLERANCE
    positions = np.concatenate([count, count + 500])
    far = np.concatenate([want[:30], expected(layer, x[30:], count + 500)])
    assert relative(layer(x, np.array([30, 30]), positions=positions), far) <= 2 * TOLERANCE


@pytest.mark.parametrize("window", [None, (6, 0)])
@pytest.mark.parametrize("kv_heads", [4, HEADS])
def test_a_cache_holds_the_tokens_before(kv_heads: int, window: Any, x: np.ndarray) -> None:
    """Three sequences whose tokens come in pieces: all at once, some each, one each, and none of one."""
    layer = decoder_attention(DENSE, kv_heads, window)
    sequences = [x[:25], x[25:36], x[36:57]]
    want = [expected(layer, s, np.arange(len(s))) for s in sequences]
    cache = KVCache(1, 3, 25, kv_heads, 32)
    done = np.zeros(3, np.int64)
    for counts in ([4, 1, 9], [1, 1, 1], [0, 3, 1], [1, 1, 1], [19, 5, 9]):
        part = np.concatenate([s[d : d + c] for s, d, c in zip(sequences, done, counts, strict=True)])
        ends = np.cumsum([0, *counts])
        got = layer(part, cu_seqlens=ends, cache=cache.layer(0))
        for b, (d, c) in enumerate(zip(done, counts, strict=True)):
            if c:
                assert relative(got[ends[b] : ends[b + 1]], want[b][d : d + c]) <= TOLERANCE
        done += counts
        cache.lengths += counts
    assert done.tolist() == [25, 11, 21]


def test_sequences_leave_a_cache(x: np.ndarray) -> None:
    layer = decoder_attention()
    cache = KVCache(1, 3, 8, 4, 32)
    ends = np.arange(0, 16, 5)
    layer(x[:15], cu_seqlens=ends, cache=cache.layer(0))
    cache.lengths += 5
    cache.keep([0, 2])
    got = layer(x[[20, 21]], cu_seqlens=np.arange(3), cache=cache.layer(0))
    for row, (start, new) in enumerate(((0, 20), (10, 21))):
        whole = np.concatenate([x[start : start + 5], x[new : new + 1]])
        assert relative(got[row], expected(layer, whole, np.arange(6))[-1]) <= TOLERANCE
    assert cache.batch == 2


def test_partial_and_interleaved_rotation(x: np.ndarray) -> None:
    rotary = RBERotary(FREQUENCIES[:4])
    assert rotary.rotary_dim == 8
    heads = np.ascontiguousarray(x[:5].reshape(5, HEADS, 32))
    got = rotary(heads, np.arange(5) + 7, 12)
    assert relative(got, rotated(heads, np.arange(5) + 7, FREQUENCIES[:4])) <= TOLERANCE
    np.testing.assert_array_equal(got[..., 8:], heads[..., 8:])
    pairs = RBERotary(FREQUENCIES, interleaved=True)(heads, np.arange(5), 5)
    apart = np.concatenate([heads[..., ::2], heads[..., 1::2]], axis=-1)
    want = rotated(apart, np.arange(5))
    assert relative(np.concatenate([pairs[..., ::2], pairs[..., 1::2]], axis=-1), want) <= TOLERANCE


def test_tables_grow() -> None:
    rotary = RBERotary(FREQUENCIES)
    cos, _ = rotary.tables(10)
    assert cos.shape == (256, 16)
    assert rotary.tables(256)[0] is cos
    assert rotary.tables(257)[0].shape == (512, 16)
    assert rotary.nbytes == 2 * 512 * 16 * 4


@pytest.mark.parametrize("form", FORMS[:2], ids=["dense", "int4"])
@pytest.mark.parametrize(
    ("activation", "of_gate"),
    [("geglu", "gelu"), ("geglu_tanh", "gelu_tanh"), ("reglu", "relu"), ("swiglu", "silu")],
)
def test_gated_activations(form: Any, activation: str, of_gate: str, x: np.ndarray) -> None:
    up, gate = (real.layer(i, "intermediate.dense.weight") for i in (3, 4))
    down = real.layer(3, "output.dense.weight")
    layer = RBEFFN.from_dense(up, down, gate, activation, **dict(form))
    if activation == "swiglu":
        layer = RBEFFN(
            RBELinear.from_dense(up, **dict(form)),
            layer.down,
            RBELinear.from_dense(gate, **dict(form)),
            activation,
        )
    assert layer.gate is not None
    hidden = expected_linear(layer.gate, x, of_gate) * expected_linear(layer.up, x)
    assert relative(layer(x), expected_linear(layer.down, hidden)) <= TOLERANCE


def test_wrong_arguments(x: np.ndarray) -> None:
    layer = decoder_attention()
    cache = KVCache(1, 1, 80, 4, 32).layer(0)
    with pytest.raises(ValueError, match="cache= is for packed sequences"):
        layer(x[None], cache=cache)
    with pytest.raises(ValueError, match="cache= is for packed sequences"):
        attention(DENSE)(x, np.array([60]), cache=cache)
    with pytest.raises(ValueError, match="rotary and context= do not go together"):
        layer(x[None], context=x[None])
    with pytest.raises(ValueError, match=r"query_norm has shape \(16,\), expected \(32,\)"):
        attention(DENSE, query_norm=RBERMSNorm(GAIN[:16].copy()))
    with pytest.raises(ValueError, match="rotary has 34 features, a head has 32"):
        attention(DENSE, rotary=RBERotary(np.ones(17)))
    with pytest.raises(ValueError, match=r"frequencies have shape \(2, 2\)"):
        RBERotary(np.ones((2, 2)))
    up, down = linear("intermediate.dense", DENSE), linear("output.dense", DENSE)
    with pytest.raises(ValueError, match="activation 'geglu' needs gate="):
        RBEFFN(up, down, activation="geglu")
    with pytest.raises(ValueError, match="belong together"):
        RBEFFN.from_dense(up.weight, down.weight, activation="geglu")
    assert "RBERotary(32 features)" in repr(layer)
    assert rbe.KVCache is KVCache

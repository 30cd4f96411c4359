"""Layers and the encoder on a GPU in steady state: nothing allocated, nothing waited for; graphs replay the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu import Workspace
from rbe_gpu.gpu.graph import Graph
from rbe_gpu.models import BertEncoder
from rbe_gpu.models.bert import DTYPES

from . import real
from .host import capture
from .test_bert import relative, small_config, used_tensors
from .test_bert_gpu import LIMITS, one_layer

Device = tuple[Any, list[str]]


@pytest.fixture
def device() -> Iterator[Device]:
    with capture.installed() as found:
        yield found


def steady(events: list[str], call: Callable[[], Any]) -> Any:
    """The result of a third call, which must neither allocate nor wait."""
    call()
    call()
    events.clear()
    found = call()
    assert events == []
    return found


def tokens(batch: int, seq: int) -> tuple[np.ndarray, np.ndarray]:
    """Real ids and lengths, cut to `seq`."""
    ids, lengths = real.batch(8)
    return np.ascontiguousarray(ids[:batch, :seq]), np.minimum(
        lengths[:batch], [seq - 3 * b for b in range(batch)]
    )


FORMS: list[dict[str, Any]] = [
    {},
    {"codes": "dense-int4", "block": 32},
    {"density": 0.1, "transform": "dct"},
    {"codes": "dense-int4", "basis": True},
]


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_layers(device: Device, form: dict[str, Any], dtype: str) -> None:
    """Attention, packed and padded, feed-forward and norm, of 20 tokens: few-token kernels and panels."""
    _, events = device
    names = ("query", "key", "value")
    q, k, v = (real.layer(0, f"attention.self.{n}.weight")[:96, :96].copy() for n in names)
    attention = rbe.to(rbe.RBEAttention.from_dense(q, k, v, q, 3, cache=1 << 20, **form), "cuda")
    ffn = rbe.to(
        rbe.RBEFFN.from_dense(np.concatenate([q, k]), np.concatenate([q, k]).T.copy(), **form), "cuda"
    )
    norm = rbe.to(rbe.RBELayerNorm(np.ones(96, np.float32), np.zeros(96, np.float32)), "cuda")
    host = real.activations(20)[:, :96].astype(DTYPES[dtype])
    x, out, ws = rbe.to(host.copy(), "cuda"), rbe.to(np.empty_like(host), "cuda"), Workspace()
    ends = rbe.to(np.array([0, 7, 20]), "cuda")
    padded, wide = x.reshape(2, 10, 96), out.reshape(2, 10, 96)
    lengths = rbe.to(np.array([10, 4]), "cuda")
    for call in (
        lambda: attention(x, cu_seqlens=ends, residual=x, out=out, workspace=ws),
        lambda: attention(padded, lengths, residual=padded, out=wide, workspace=ws),
        lambda: ffn(x, residual=x, out=out, workspace=ws),
        lambda: norm(x, residual=x, out=out, workspace=ws),
    ):
        assert np.isfinite(np.asarray(steady(events, call).get(), np.float32)).all()


def test_what_an_attention_derives_is_not_moved(device: Device) -> None:
    """Else the codes of its weights would be on the GPU once more for every reading of them."""
    w = real.layer(0, "attention.self.query.weight")[:96, :96].copy()
    layer = rbe.RBEAttention.from_dense(w, w, w, w, 3, codes="dense-int4", block=32, basis=False)
    x = real.activations(5)[:, :96].copy()
    here = layer(x, np.array([5]))
    assert layer._derived is not None
    there = rbe.to(layer, "cuda")
    assert there._derived is None
    assert relative(there(rbe.to(x, "cuda"), np.array([5])).get(), here.astype(np.float64)) <= 5e-6


def test_more_layers(device: Device) -> None:
    """Rows of a compressed table, SwiGLU, an RMS norm and dropout."""
    _, events = device
    w = real.layer(0, "intermediate.dense.weight")[:192, :96].copy()
    table = rbe.to(rbe.RBEEmbedding.from_dense(w, grade="B"), "cuda")
    ffn = rbe.to(rbe.RBEFFN.from_dense(w, w.T.copy(), w[::-1].copy(), "swiglu", grade="B"), "cuda")
    norm = rbe.to(rbe.RBERMSNorm(np.ones(96, np.float32)), "cuda")
    ids = rbe.to(np.array([3, 191, 0, 3, 7]), "cuda")
    x, out = (rbe.to(np.ones((5, 96), np.float32), "cuda") for _ in range(2))
    ws = Workspace()
    for call in (
        lambda: table(ids, out=x, workspace=ws),
        lambda: ffn(x, residual=x, out=out, workspace=ws),
        lambda: norm(x, residual=out, out=out, workspace=ws),
        lambda: rbe.dropout(x, 0.1, 7, residual=x, out=out),
    ):
        assert np.isfinite(steady(events, call).get()).all()


@pytest.mark.parametrize("dtype", LIMITS)
def test_the_encoder_allocates_nothing(device: Device, dtype: str) -> None:
    """Ids and lengths on the GPU, with `out=`: forward and pool."""
    cupy, events = device
    here = one_layer(dtype)
    there = rbe.to(here, "cuda")
    ids, lengths = tokens(2, 9)
    moved, ends = rbe.to(ids, "cuda"), rbe.to(lengths, "cuda")
    states, vectors = cupy.empty((2, 9, 384), here.dtype), cupy.empty((2, 384), here.dtype)

    def call() -> Any:
        there.forward(moved, ends, out=states)
        return there.pool(states, ends, out=vectors)

    found = steady(events, call).get()
    text = np.arange(9) < lengths[:, None]
    wanted = here.forward(ids, lengths)
    assert relative(states.get()[text], wanted[text].astype(np.float64)) <= LIMITS[dtype]
    assert relative(found, here.pool(wanted, lengths).astype(np.float64)) <= LIMITS[dtype]


@pytest.mark.parametrize("dtype", LIMITS)
def test_graph_of_the_encoder(device: Device, dtype: str) -> None:
    """Replays follow the ids and lengths that are there, and are what the CPU gives."""
    cupy, events = device
    here = one_layer(dtype)
    graph = rbe.to(here, "cuda").graph(2, 9)
    ids, lengths = tokens(2, 9)
    first = graph(ids, lengths).get()
    events.clear()
    graph.replay()
    assert events == []
    np.testing.assert_array_equal(graph.vectors.get(), first)
    text = [row[:n] for row, n in zip(ids, lengths, strict=True)]
    states = [here.forward(row[None]) for row in text]
    wanted = np.concatenate([here.pool(s) for s in states]).astype(np.float64)
    assert relative(first, wanted) <= LIMITS[dtype]
    turned = graph(cupy.asarray(ids[::-1].astype(np.int32)), lengths[::-1].copy()).get()
    assert relative(turned, wanted[::-1]) <= LIMITS[dtype]
    assert np.linalg.norm(turned.astype(np.float64), axis=1) == pytest.approx(1, abs=5e-3)


def test_a_graph_of_compressed_weights_keeps_its_memory(device: Device) -> None:
    """Other batches of the model, larger ones too, leave what the graph works on where it is."""
    tensors = {
        n: rbe.compress(t, codes="dense-int8") if t.ndim == 2 and n.startswith("encoder") else t
        for n, t in used_tensors(1).items()
    }
    pooling = {"pooling_mode_cls_token": True}
    here = BertEncoder(tensors, small_config(), real.tokenizer(), pooling, False)
    there = rbe.to(here, "cuda")
    graph = there.graph(1, 5)
    ids = tokens(1, 5)[0]
    first = graph(ids).get()
    # the kernels multiply decoded weights, and so does a dense model of them
    decoded = {n: t if isinstance(t, np.ndarray) else t.decode() for n, t in tensors.items()}
    dense = BertEncoder(decoded, small_config(), real.tokenizer(), pooling, False)
    assert relative(first, dense.forward(ids)[:, 0].astype(np.float64)) <= LIMITS["float32"]
    there.forward(tokens(2, 12)[0])
    there.workspace.clear()
    np.testing.assert_array_equal(graph(ids).get(), first)


def test_what_a_graph_refuses(device: Device) -> None:
    here = one_layer()
    there = rbe.to(here, "cuda")
    with pytest.raises(TypeError, match=r'the model is on the CPU; move it: rbe_gpu.to\(model, "cuda"\)'):
        here.graph(1, 4)
    with pytest.raises(ValueError, match="batch=0, seq=4"):
        there.graph(0, 4)
    with pytest.raises(ValueError, match="600 positions"):
        there.graph(1, 600)
    with pytest.raises(ValueError, match="pooling by the maximum"):
        rbe.to(one_layer(pooling_mode_max_tokens=True), "cuda").graph(1, 4)
    graph = there.graph(1, 4)
    for ids, lengths in (
        (np.zeros((1, 5), np.int64), None),
        (np.zeros((1, 4)), None),
        (tokens(1, 4)[0], np.ones(2)),
    ):
        with pytest.raises(ValueError, match="the graph takes integers of shape"):
            graph(ids, lengths)


def test_work_that_allocates_is_refused(device: Device) -> None:
    """As CUDA does; and the next capture begins anew."""
    cupy, _ = device
    x = rbe.to(np.ones((3, 8), np.float32), "cuda")
    with pytest.raises(capture.CaptureError, match="empty while a stream is captured"):
        Graph(lambda: rbe.softmax(x))
    with pytest.raises(capture.CaptureError, match="get while a stream is captured"):
        Graph(x.get)
    out = cupy.empty((3, 8), np.float32)
    graph = Graph(lambda: rbe.softmax(x, out=out))
    x.view(np.ndarray)[:, 0] = 100
    graph()
    assert (out.get()[:, 0] == 1).all()


def test_padded_and_packed_states_are_the_same(device: Device) -> None:
    """CuPy arrays are computed padded, NumPy arrays packed; with token types and all hidden states too."""
    cupy, _ = device
    model = rbe.to(one_layer(), "cuda")
    ids, lengths = tokens(2, 9)
    text = np.arange(9) < lengths[:, None]
    types = (ids % 2).astype(np.int64)
    moved, moved_lengths = cupy.asarray(ids), cupy.asarray(lengths)
    for kwargs in ({}, {"token_type_ids": types}):
        wanted = model.forward(ids, lengths, all_hidden_states=True, **kwargs)
        on_gpu = {name: cupy.asarray(a) for name, a in kwargs.items()}
        found = model.forward(moved, moved_lengths, all_hidden_states=True, **on_gpu)
        assert len(found) == len(wanted) == 2
        for a, b in zip(found, wanted, strict=True):
            assert relative(a.get()[text], b.get()[text].astype(np.float64)) <= LIMITS["float32"]
            assert not b.get()[~text].any()
    with pytest.raises(TypeError, match="use integers of shape"):
        model.forward(moved[0])
    with pytest.raises(ValueError, match="token_type_ids has shape"):
        model.forward(moved, moved_lengths, cupy.asarray(types[:1]))
    with pytest.raises(ValueError, match="ids have 600 positions"):
        model.forward(cupy.asarray(np.ones((1, 600), np.int64)))
    with pytest.raises(ValueError, match="out is float32 of shape"):
        model.forward(moved, moved_lengths, out=cupy.empty((2, 9, 3), np.float32))


def test_forward_fills_out() -> None:
    """On the CPU `out` receives the last states, and zeros in the padding."""
    model = one_layer()
    ids, lengths = real.batch(4)
    wanted = model.forward(ids, lengths)
    out = np.full_like(wanted, np.nan)
    assert model.forward(ids, lengths, out=out) is out
    np.testing.assert_array_equal(out, wanted)
    first, last = model.forward(ids, lengths, all_hidden_states=True, out=out)
    assert last is out
    assert first is not out
    np.testing.assert_array_equal(last, wanted)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("modes", [("cls",), ("mean",), ("max",), ("cls", "max", "mean")], ids="+".join)
def test_pool_of_padded_and_packed_states(modes: tuple[str, ...], dtype: str) -> None:
    """The same bits, and those of NumPy; a text without tokens has mean and maximum 0."""
    names = {f"pooling_mode_{m}_token{'' if m == 'cls' else 's'}": True for m in modes}
    model = one_layer(dtype, **names)
    ids, lengths = real.batch(4)
    text = np.arange(ids.shape[1]) < lengths[:, None]
    states = model.forward(ids, lengths)
    packed, ends = np.ascontiguousarray(states[text]), np.cumsum([0, *lengths])
    wanted = np.empty((4, len(modes), 384), np.float32)
    for b, row in enumerate(wanted):
        one = packed[ends[b] : ends[b + 1]]
        pooled = {"cls": one[0], "max": one.max(axis=0), "mean": one.mean(axis=0, dtype=np.float32)}
        row[...] = [pooled[m] for m in ("cls", "max", "mean") if m in modes]
    wanted = wanted.reshape(4, -1)
    np.testing.assert_array_equal(model.pool(states, lengths, normalize=False), wanted)
    np.testing.assert_array_equal(model.pool(packed, cu_seqlens=ends, normalize=False), wanted)
    unit = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_array_equal(model.pool(states, lengths), unit)
    if "cls" not in modes:
        with_empty = np.concatenate([ends[:2], ends[1:]])
        assert not model.pool(packed, cu_seqlens=with_empty, normalize=False)[1].any()


@pytest.mark.parametrize("dtype", LIMITS)
def test_pool_on_the_gpu(device: Device, dtype: str) -> None:
    """Every mode, of padded and of packed states, to float32 and to the dtype of the states."""
    cupy, _ = device
    names = {
        "pooling_mode_cls_token": True,
        "pooling_mode_max_tokens": True,
        "pooling_mode_mean_tokens": True,
    }
    here = one_layer(dtype, **names)
    there = rbe.to(here, "cuda")
    states, lengths = real.activations(20).astype(here.dtype).reshape(2, 10, 384), np.array([10, 4])
    packed, ends = np.concatenate([states[0], states[1, :4]]), np.array([0, 10, 14])
    wanted = here.pool(states, lengths)
    for kwargs in ({"lengths": lengths}, {"cu_seqlens": ends}):
        x = cupy.asarray(states if "lengths" in kwargs else packed)
        on_gpu = {name: cupy.asarray(a) for name, a in kwargs.items()}
        found = there.pool(x, **on_gpu)
        assert isinstance(found, cupy.ndarray)
        assert found.dtype == np.float32
        assert relative(found.get(), wanted.astype(np.float64)) <= LIMITS["float32"]
        out = cupy.empty(wanted.shape, here.dtype)
        assert there.pool(x, out=out, **on_gpu) is out
        assert relative(out.get(), wanted.astype(np.float64)) <= LIMITS[dtype]

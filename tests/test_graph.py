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
    """Ids and lengths on the GPU, `out=` given: encode and pooled."""
    cupy, events = device
    here = one_layer(dtype)
    there = rbe.to(here, "cuda")
    ids, lengths = tokens(2, 9)
    moved, ends = rbe.to(ids, "cuda"), rbe.to(lengths, "cuda")
    states, vectors = cupy.empty((2, 9, 384), here.dtype), cupy.empty((2, 384), here.dtype)

    def call() -> Any:
        there.encode(moved, ends, out=states)
        return there.pooled(states, ends, out=vectors)

    found = steady(events, call).get()
    text = np.arange(9) < lengths[:, None]
    wanted = here.forward(ids, lengths)
    assert relative(states.get()[text], wanted[text].astype(np.float64)) <= LIMITS[dtype]
    assert relative(found, here.pooled(wanted, lengths).astype(np.float64)) <= LIMITS[dtype]


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
    wanted = np.concatenate([here.pooled(s) for s in states]).astype(np.float64)
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


def test_encode_is_forward_on_the_cpu() -> None:
    """The same function of padded arrays, with types too; padding aside."""
    model = one_layer()
    ids, lengths = real.batch(4)
    text = np.arange(ids.shape[1]) < lengths[:, None]
    types = (ids % 2).astype(np.int64)
    for given in ({}, {"token_type_ids": types}):
        wanted = model.forward(ids, lengths, **given)[text].astype(np.float64)
        assert relative(model.encode(ids, lengths, **given)[text], wanted) <= LIMITS["float32"]
    with pytest.raises(TypeError, match="use integers of shape"):
        model.encode(ids[0])
    with pytest.raises(ValueError, match="token_type_ids has shape"):
        model.encode(ids, lengths, types[:1])


@pytest.mark.parametrize("modes", [("cls",), ("mean",), ("cls", "mean")], ids="+".join)
def test_pooled_is_pool(modes: tuple[str, ...]) -> None:
    names = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens"}
    model = one_layer(**{names[m]: True for m in modes})
    ids, lengths = real.batch(4)
    text = np.arange(ids.shape[1]) < lengths[:, None]
    states = model.encode(ids, lengths)
    packed, ends = np.ascontiguousarray(states[text]), np.cumsum([0, *lengths])
    wanted = model.pool(packed, lengths).astype(np.float64)
    assert relative(model.pooled(states, lengths, normalize=False), wanted) <= LIMITS["float32"]
    assert relative(model.pooled(packed, cu_seqlens=ends, normalize=False), wanted) <= LIMITS["float32"]
    unit = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
    assert relative(model.pooled(states, lengths), unit) <= LIMITS["float32"]

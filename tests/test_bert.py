"""The BERT encoder and its loader: MiniLM against a float64 reference; every supported folder and file."""

from __future__ import annotations

import json
import shutil
import sys
import types
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from rbe_gpu.cpu_fallback import matmul_algorithms
from tokenizers import Tokenizer

import rbe_gpu as rbe
from rbe_gpu import reference
from rbe_gpu.container import save_file
from rbe_gpu.models import BertEncoder, load
from rbe_gpu.models.architectures import ARCHITECTURES, Architecture
from rbe_gpu.models.bert import POOLING

from . import real

TOLERANCE = 1e-5  # relative Frobenius, float32 through all layers against float64
# a text alone and in a batch: BLAS may sum in another order for another number of rows
SAME = 2e-6
LETTERS = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(ml_dtypes.bfloat16): "BF16"}


@cache
def minilm() -> BertEncoder:
    return load(real.MODEL_DIR)


def relative(result: Any, expected: Any) -> float:
    difference = np.asarray(result, np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


def valid(count: int = 8) -> np.ndarray:
    """Mask of the positions of `real.batch(count)` that are not padding, (count, seq)."""
    ids, lengths = real.batch(count)
    return np.asarray(np.arange(ids.shape[1]) < lengths[:, None])


def pooled(mode: str = "mean", normalize: bool = True, count: int = 8) -> np.ndarray:
    """float64 embeddings of the first texts, from the float64 hidden states."""
    _, lengths = real.batch(count)
    states = real.hidden_states(count)[-1]
    how = {"mean": lambda s: s.mean(axis=0), "max": lambda s: s.max(axis=0), "cls": lambda s: s[0]}[mode]
    rows = np.stack([how(s[:n]) for s, n in zip(states, lengths, strict=True)])
    return rows / np.linalg.norm(rows, axis=1, keepdims=True) if normalize else rows


def used_tensors(layers: int) -> dict[str, np.ndarray]:
    """MiniLM's tensors of its embeddings and first layers."""
    keep = ("embeddings.", *(f"encoder.layer.{i}." for i in range(layers)))
    return {n: real.weight(n) for n in real.weight_names() if n.startswith(keep) and "position_ids" not in n}


def small_config(layers: int = 1, **changes: Any) -> dict[str, Any]:
    return {**real.config(), "num_hidden_layers": layers, **changes}


def write_checkpoint(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a safetensors file by hand: the library's NumPy functions have no bfloat16."""
    header: dict[str, Any] = {}
    at = 0
    for name, a in tensors.items():
        offsets = [at, at + a.nbytes]
        header[name] = {"dtype": LETTERS[a.dtype], "shape": list(a.shape), "data_offsets": offsets}
        at += a.nbytes
    text = json.dumps(header).encode()
    payload = b"".join(a.tobytes() for a in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + payload)


Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Create a model folder: config.json, model.safetensors unless tensors is None, and MiniLM's tokenizer."""

    def make(
        config: dict[str, Any], tensors: dict[str, np.ndarray] | None, files: tuple[str, ...] = ()
    ) -> Path:
        path = tmp_path / "model"
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
        if tensors is not None:
            write_checkpoint(path / "model.safetensors", tensors)
        for name in ("tokenizer.json", *files):
            (path / name).parent.mkdir(exist_ok=True)
            shutil.copy(real.MODEL_DIR / name, path / name)
        return path

    return make


# --- hidden states ------------------------------------------------------------------------------------


def test_hidden_states_of_every_layer() -> None:
    ids, lengths = real.batch(8)
    result = minilm().forward(ids, lengths, all_hidden_states=True)
    expected = real.hidden_states(8)
    assert len(result) == len(expected) == 7
    for mine, theirs in zip(result, expected, strict=True):
        assert mine.shape == theirs.shape
        assert mine.dtype == np.float32
        assert relative(mine[valid()], theirs[valid()]) <= TOLERANCE
        assert not mine[~valid()].any()
    np.testing.assert_array_equal(minilm().forward(ids, lengths), result[-1])


#: Relative Frobenius to float64, per layer one rounding of some ten results: float16 to 11 bits, bfloat16 to 8.
HALF = {"float16": 2e-3, "bfloat16": 1.5e-2}


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_states(dtype: str) -> None:
    """States of every layer, and embeddings; dense weights are stored in the half type."""
    ids, lengths = real.batch(8)
    model = load(real.MODEL_DIR, dtype=dtype)
    result = model.forward(ids, lengths, all_hidden_states=True)
    for mine, theirs in zip(result, real.hidden_states(8), strict=True):
        assert mine.dtype == model.dtype
        assert relative(mine[valid()], theirs[valid()]) <= HALF[dtype]
        assert not mine[~valid()].astype(np.float32).any()
    vectors = model.embed(real.texts()[:8])
    assert vectors.dtype == np.float32
    assert relative(vectors, pooled()) <= HALF[dtype]
    assert model.nbytes < 0.501 * minilm().nbytes


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("mode", ["cls", "max"])
def test_half_precision_pooling(dtype: str, mode: str) -> None:
    pooling = {name: True for name, short in POOLING.items() if short == mode}
    parts = used_tensors(1), small_config(), real.tokenizer(), pooling
    model, plain = BertEncoder(*parts, dtype=dtype), BertEncoder(*parts)
    texts = real.texts()[:4]
    assert relative(model.embed(texts), plain.embed(texts).astype(np.float64)) <= HALF[dtype]


def test_half_precision_of_compressed_weights() -> None:
    """Compressed weights are not converted; tables are decoded to the half type."""
    tensors = {
        n: rbe.compress(t, kind="vectors" if "embeddings" in n else "matrix", grade="A")
        if t.ndim == 2 and "token_type" not in n and t.shape[0] < 2000
        else t
        for n, t in used_tensors(1).items()
    }
    ids, lengths = real.batch(4)
    half = BertEncoder(tensors, small_config(), dtype="float16").forward(ids, lengths)
    plain = BertEncoder(tensors, small_config()).forward(ids, lengths)
    assert half.dtype == np.float16
    assert relative(half, plain.astype(np.float64)) <= HALF["float16"]


def test_unsupported_dtype() -> None:
    with pytest.raises(ValueError, match="dtype='float64' is not supported; use one of"):
        BertEncoder(used_tensors(1), small_config(), dtype="float64")


def test_a_text_alone_is_the_text_in_a_batch() -> None:
    ids, lengths = real.batch(8)
    together = minilm().forward(ids, lengths.astype(np.uint64))
    for i in (0, 2, 5):
        alone = minilm().forward(ids[i : i + 1, : lengths[i]].astype(np.int32))
        assert relative(alone[0], together[i, : lengths[i]]) <= SAME


def test_padding_is_not_read() -> None:
    """Padded positions are never read: they may even hold an id out of range."""
    ids, lengths = real.batch(8)
    other = np.where(valid(), ids, 10**6)
    np.testing.assert_array_equal(minilm().forward(other, lengths), minilm().forward(ids, lengths))


def test_token_types() -> None:
    ids, lengths = real.batch(8)
    token_types = (np.arange(ids.shape[1]) >= 10).astype(np.int64) * np.ones_like(ids)
    model = BertEncoder(used_tensors(1), small_config())
    result = model.forward(ids, lengths, token_types, all_hidden_states=True)[0]
    e = "embeddings."
    total = (
        real.weight(e + "word_embeddings.weight").astype(np.float64)[ids]
        + real.weight(e + "position_embeddings.weight")[: ids.shape[1]]
        + real.weight(e + "token_type_embeddings.weight")[token_types]
    )
    gain, bias = real.weight(e + "LayerNorm.weight"), real.weight(e + "LayerNorm.bias")
    expected, _ = reference.layer_norm(total, gain, bias, 1e-12)
    assert relative(result[valid()], expected[valid()]) <= TOLERANCE


def one_layer(x: np.ndarray, lengths: np.ndarray, activation: str) -> np.ndarray:
    """Textbook version of MiniLM's first layer, with another activation. x : (batch, seq, 384) float64."""

    def dense(y: Any, name: str, act: str | None = None) -> Any:
        return reference.linear(y, real.layer(0, name + ".weight"), real.layer(0, name + ".bias"), act)

    def norm(y: Any, residual: Any, name: str) -> Any:
        gain, bias = real.layer(0, name + ".weight"), real.layer(0, name + ".bias")
        return reference.layer_norm(y, gain, bias, 1e-12, residual)[0]

    q, k, v = (
        dense(x, f"attention.self.{n}").reshape(*x.shape[:2], 12, 32) for n in ("query", "key", "value")
    )
    o = reference.attention(q, k, v, lengths=lengths).reshape(x.shape)
    x = norm(dense(o, "attention.output.dense"), x, "attention.output.LayerNorm")
    return np.asarray(
        norm(dense(dense(x, "intermediate.dense", activation), "output.dense"), x, "output.LayerNorm")
    )


@pytest.mark.parametrize(
    ("hidden_act", "activation"), [("relu", "relu"), ("gelu_new", "gelu_tanh"), ("silu", "silu")]
)
def test_hidden_act(hidden_act: str, activation: str) -> None:
    ids, lengths = real.batch(8)
    model = BertEncoder(used_tensors(1), small_config(hidden_act=hidden_act))
    result = model.forward(ids, lengths)
    expected = one_layer(real.hidden_states(8)[0], lengths, activation)
    assert relative(result[valid()], expected[valid()]) <= TOLERANCE


def test_forward_rejects_invalid_arguments() -> None:
    model = BertEncoder(used_tensors(1), small_config())
    ids, lengths = real.batch(8)
    with pytest.raises(TypeError, match="use integers of shape"):
        model.forward(ids.astype(np.float32))
    with pytest.raises(TypeError, match="use integers of shape"):
        model.forward(ids[0])
    with pytest.raises(ValueError, match=r"use integers of shape \(8,\)"):
        model.forward(ids, lengths[:3])
    with pytest.raises(ValueError, match="lengths run from"):
        model.forward(ids, lengths + ids.shape[1])
    with pytest.raises(ValueError, match="token_type_ids has shape"):
        model.forward(ids, lengths, ids[:1])
    with pytest.raises(ValueError, match="600 tokens, the model has 512 positions"):
        model.forward(np.ones((1, 600), np.int64))
    with pytest.raises(IndexError, match="rows 0 to 30521"):
        model.forward(np.array([[30522]]))
    assert model.forward(np.empty((0, 4), np.int64)).shape == (0, 4, 384)


# --- embeddings ---------------------------------------------------------------------------------------


def test_embeddings() -> None:
    texts = list(real.texts()[:8])
    result = minilm().embed(texts)
    assert result.shape == (8, 384)
    assert result.dtype == np.float32
    assert relative(result, pooled()) <= TOLERANCE
    assert relative(minilm().embed(texts, normalize=False), pooled(normalize=False)) <= TOLERANCE
    np.testing.assert_allclose(np.linalg.norm(result, axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("mode", ["mean", "max", "cls"])
def test_pooling(mode: str) -> None:
    name = {"mean": "mean_tokens", "max": "max_tokens", "cls": "cls_token"}[mode]
    pooling = {"word_embedding_dimension": 384, f"pooling_mode_{name}": True, "include_prompt": True}
    model = BertEncoder(used_tensors(6), real.config(), real.tokenizer(), pooling, normalize=False)
    assert relative(model.embed(real.texts()[:8]), pooled(mode, normalize=False)) <= TOLERANCE


def test_joined_pooling() -> None:
    pooling = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}
    model = BertEncoder(used_tensors(6), real.config(), real.tokenizer(), pooling, normalize=False)
    expected = np.concatenate([pooled("cls", False), pooled("mean", False)], axis=1)
    assert model.embedding_size == 768
    assert relative(model.embed(real.texts()[:8]), expected) <= TOLERANCE


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_order_and_batches(batch_size: int) -> None:
    """Rows are in the order of the texts for every batch size; a generator is consumed once."""
    texts = real.texts()[:8]
    order = [5, 0, 7, 2, 2, 6, 1]
    result = minilm().embed((texts[i] for i in order), batch_size=batch_size)
    assert relative(result, pooled()[order]) <= TOLERANCE


def test_workspace_serves_every_batch() -> None:
    model = minilm()
    model.embed(real.texts()[:8], batch_size=4)
    held = model.workspace.nbytes
    first = model.embed(real.texts()[:8], batch_size=4)
    assert model.workspace.nbytes == held
    np.testing.assert_array_equal(model.embed(real.texts()[:8], batch_size=4), first)


def test_long_texts_are_truncated() -> None:
    long = " ".join(real.texts()[:40])
    tokenizer = Tokenizer.from_file(str(real.MODEL_DIR / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ids = tokenizer.encode(long).ids
    assert len(ids) > 600
    assert minilm().max_seq_length == 256
    for model, limit in (
        (minilm(), 256),
        (BertEncoder(used_tensors(6), real.config(), tokenizer), 512),
        (BertEncoder(used_tensors(6), real.config(), tokenizer, max_seq_length=5), 5),
    ):
        states = model.forward(np.array([[*ids[: limit - 1], ids[-1]]]))[0]
        expected = states.mean(axis=0)
        result = model.embed([long], normalize=False)
        assert relative(result[0], expected) <= SAME


def test_every_string_is_a_text() -> None:
    texts = ["", " \n\t", "naïve café 🙂", "日本語のテキスト", "e\u0301 \u200b \ufffd", "\x00", "x" * 5000]
    result = minilm().embed(texts)
    assert np.isfinite(result).all()
    np.testing.assert_allclose(np.linalg.norm(result, axis=1), 1, rtol=1e-6)
    for row, text in zip(result, texts, strict=True):
        assert relative(minilm().embed([text])[0], row) <= SAME
    empty = minilm().forward(np.array([[101, 102]]))[0].mean(axis=0)  # [CLS] [SEP]
    assert relative(minilm().embed([""], normalize=False)[0], empty) <= SAME


def test_embed_arguments() -> None:
    assert minilm().embed([]).shape == (0, 384)
    with pytest.raises(TypeError, match="one string"):
        minilm().embed("a text")
    with pytest.raises(TypeError, match=r"texts\[1\] is a int"):
        minilm().embed(["a text", 3])
    with pytest.raises(ValueError, match="batch_size=0"):
        minilm().embed(["a text"], batch_size=0)
    with pytest.raises(ValueError, match="no tokenizer"):
        BertEncoder(used_tensors(1), small_config()).embed(["a text"])


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    minilm().embed(["a text"])
    assert "".join(capsys.readouterr()) == ""
    minilm().embed(["a text"], show_progress=True)
    assert "embedding" in "".join(capsys.readouterr())  # a command may have sent it to standard error before


# --- compressed ---------------------------------------------------------------------------------------


@cache
def compressed_tensors() -> dict[str, Any]:
    """Two layers of MiniLM: tables as vectors, matrices in two kinds of codes, the rest dense."""
    result: dict[str, Any] = {}
    for name, a in used_tensors(2).items():
        if "word_embeddings" in name or "position_embeddings" in name:
            result[name] = rbe.compress(a, codes="dense-int6", kind="vectors")
        elif a.ndim == 2 and min(a.shape) >= 32:
            result[name] = rbe.compress(a, codes="dense-int4" if "output" in name else "dense-int5", block=32)
        else:
            result[name] = a
    return result


@cache
def decoded_tensors() -> dict[str, np.ndarray]:
    return {n: reference.dense(t).astype(np.float32) for n, t in compressed_tensors().items()}


@pytest.fixture(scope="module")
def compressed_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compressed") / "small.rbe.safetensors"
    tokenizer = zlib.compress((real.MODEL_DIR / "tokenizer.json").read_bytes())
    stored = {
        "model_type": "bert",
        "config": small_config(2),
        "pooling": {"pooling_mode_cls_token": True},
        "normalize": False,
        "max_seq_length": 64,
    }
    tensors = {**compressed_tensors(), "tokenizer.json.zlib": np.frombuffer(tokenizer, np.uint8)}
    save_file(path, tensors, stored)
    return path


def test_compressed_model_is_the_dense_one_on_decoded_weights(compressed_file: Path) -> None:
    model = load(compressed_file)
    dense = BertEncoder(decoded_tensors(), small_config(2))
    ids, lengths = real.batch(8)
    result = model.forward(ids, lengths, all_hidden_states=True)
    expected = dense.forward(ids, lengths, all_hidden_states=True)
    for mine, theirs in zip(result, expected, strict=True):
        assert relative(mine, theirs) <= TOLERANCE
    assert model.nbytes < dense.nbytes / 4
    assert model.max_seq_length == 64
    assert not model.normalize
    states = dense.forward(np.array([[101, 102]]))[0]
    assert relative(model.embed([""])[0], states[0]) <= TOLERANCE


def test_an_architecture_is_an_entry_of_the_table(
    folder: Folder, compressed_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its config is checked before its tensors are read, from a folder and from a compressed file."""
    seen: list[Any] = []

    def model(tensors: Any, stored: Any, *options: Any) -> tuple[Any, ...]:
        return sorted(tensors), stored, options

    made = Architecture(seen.append, model)
    monkeypatch.setitem(ARCHITECTURES, "bert", made)
    path = folder(small_config(1), {"pooler.dense.bias": np.zeros(3, np.float32)})
    tensors, stored, options = load(path, 7, "float16")
    assert seen == [stored["config"]] == [small_config(1)]
    assert tensors == ["pooler.dense.bias"]
    assert options[-2:] == (7, "float16")
    tensors, stored, options = load(compressed_file)
    config = stored["config"]
    assert config == small_config(2)
    assert stored["pooling"] == {"pooling_mode_cls_token": True}
    assert stored["normalize"] is False
    assert stored["max_seq_length"] == 64
    assert options[1:] == (0, "float32")
    for model_type in ("another", ["bert"], None):
        (path / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
        with pytest.raises(ValueError, match=r"model_type .*; supported: bert"):
            load(path)


def test_cache_budgets_of_a_model(compressed_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If caching is cheapest: with room for all, every linear weight is decoded once; for half, what fits is kept.

    With the default budget of 0 nothing is decoded.
    """
    for algorithm, cost in (("TransformTiles", 2.0), ("DecodedPanels", 3.0), ("CachedPanels", 1.0)):
        monkeypatch.setattr(getattr(matmul_algorithms, algorithm), "cost", lambda *_, cost=cost: cost)
    ids, lengths = real.batch(8)
    linear = [t for n, t in compressed_tensors().items() if n.startswith("encoder") and len(t.shape) == 2]
    total = sum(t.dense_nbytes for t in linear)
    expected = load(compressed_file).forward(ids, lengths)
    for budget in (total, 0, total // 2):
        model = load(compressed_file, cache_bytes=budget)
        first = model.forward(ids, lengths)
        assert relative(first, expected) <= TOLERANCE
        panels = model.cache.misses
        if not budget:
            assert panels == model.cache.hits == model.cache.nbytes == 0
            continue
        assert model.cache.hits == 0
        assert panels >= len(linear)  # large weights are several panels
        np.testing.assert_array_equal(model.forward(ids, lengths), first)
        again = model.cache.misses - panels
        assert model.cache.hits + again == panels
        if budget == total:
            assert again == 0
            assert model.cache.nbytes == model.cache.budget == total
        else:
            assert 0 < again < panels
            assert 0.8 * budget < model.cache.nbytes <= budget


def test_damaged_compressed_models(tmp_path: Path) -> None:
    path = tmp_path / "broken.rbe.safetensors"
    tensors = used_tensors(1)
    good = {"model_type": "bert", "config": small_config()}
    save_file(path, tensors)
    with pytest.raises(ValueError, match="holds tensors but no model"):
        load(path)
    bomb = zlib.compress(b" " * (65 << 20))
    for packed, message in (
        (np.zeros(9, np.uint8), "damaged"),
        (np.frombuffer(zlib.compress(b"{}" * 999)[:-6], np.uint8), "cut off"),
        (np.frombuffer(bomb, np.uint8), r"larger than \d{7} bytes"),  # what so small an array may hold
        (np.frombuffer(zlib.compress(b"{}"), np.uint8), "holds no tokenizer"),
        (np.zeros(9, np.float32), "not an array of uint8"),
    ):
        save_file(path, {**tensors, "tokenizer.json.zlib": packed}, good)
        with pytest.raises(ValueError, match=message) as error:
            load(path)
        assert "\n" not in str(error.value)
    for changes, message in (
        ({"config": []}, "holds tensors but no model"),
        ({"pooling": ["mean"]}, "the pooling config is a list"),
        ({"pooling": {}}, "turns on no mode"),
        ({"max_seq_length": "all"}, "max_seq_length='all'"),
        ({"max_seq_length": -1}, "max_seq_length=-1"),
    ):
        save_file(path, tensors, {**good, **changes})
        with pytest.raises(ValueError, match=message):
            load(path)
    path.write_bytes(b"not a safetensors file at all")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load(path)


# --- folders ------------------------------------------------------------------------------------------


def expect_like(model: BertEncoder, tensors: dict[str, np.ndarray], tolerance: float = SAME) -> None:
    """`model` computes what float32 copies of `tensors` compute."""
    ids, lengths = real.batch(8)
    expected = BertEncoder({n: a.astype(np.float32) for n, a in tensors.items()}, small_config())
    assert relative(model.forward(ids, lengths), expected.forward(ids, lengths)) <= tolerance


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_half_checkpoint(folder: Folder, dtype: Any) -> None:
    """Half-precision weights are not converted in memory; results are those of their float32 copies."""
    tensors = {n: a.astype(dtype) for n, a in used_tensors(1).items()}
    model = load(folder(small_config(), tensors))
    dense = sum(a.nbytes for a in tensors.values())
    assert dense <= model.nbytes < 1.01 * dense
    expect_like(model, tensors)


def test_checkpoint_of_a_larger_model(folder: Folder) -> None:
    """Names with `bert.`, gamma and beta, and tensors of a head, as in the checkpoints of BERT."""
    tensors = used_tensors(1)
    renamed = {
        "bert."
        + n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): a
        for n, a in tensors.items()
    }
    renamed["cls.predictions.bias"] = np.zeros(30522, np.float32)
    model = load(folder(small_config(), renamed))
    expect_like(model, tensors, 0.0)
    assert not model.normalize
    assert model.pooling == ("mean",)
    assert model.max_seq_length == 512


def test_sharded_checkpoint(folder: Folder) -> None:
    tensors = used_tensors(1)
    path = folder(small_config(), None)
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    names = sorted(tensors)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    for shard, half in zip(shards, halves, strict=True):
        write_checkpoint(path / shard, {n: tensors[n] for n in half})
    weight_map = {n: shard for shard, half in zip(shards, halves, strict=True) for n in half}
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    expect_like(load(path), tensors, 0.0)

    (path / shards[1]).unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model-00002-of-00002\.safetensors"):
        load(path)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}))
    with pytest.raises(ValueError, match="files of the same folder"):
        load(path)


def test_weights_stay_mapped() -> None:
    """The weights of a dense model are views of the mapped file, which is not written to."""
    table = minilm().word_embeddings.weight
    assert not table.flags.owndata
    assert minilm().nbytes == sum(
        real.weight(n).nbytes
        for n in real.weight_names()
        if not n.startswith("pooler") and "position_ids" not in n
    )


def test_sentence_transformers_files(folder: Folder) -> None:
    files = ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json")
    path = folder(small_config(), used_tensors(1), files)
    model = load(path)
    assert (model.pooling, model.normalize, model.max_seq_length) == (("mean",), True, 256)

    modules = json.loads((path / "modules.json").read_text())
    (path / "modules.json").write_text(json.dumps(modules[:2]))
    assert not load(path).normalize
    norm = {"type": "sentence_transformers.models.LayerNorm", "path": "2_LayerNorm"}
    (path / "modules.json").write_text(json.dumps([*modules[:2], norm]))
    with pytest.raises(ValueError, match='the module "LayerNorm"'):
        load(path)
    dense = {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}
    (path / "modules.json").write_text(json.dumps([*modules[:2], dense]))
    with pytest.raises(FileNotFoundError, match=r"2_Dense has no config\.json"):
        load(path)
    (path / "modules.json").write_text("{}")
    with pytest.raises(ValueError, match=r"modules\.json is not a list"):
        load(path)
    (path / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode": "first"}))
    (path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match='pooling_mode="first"; needs one or several of cls, max'):
        load(path)
    (path / "1_Pooling/config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"1_Pooling has no config\.json"):
        load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
        ({"hidden_act": "tanh"}, "hidden_act 'tanh'"),
        ({"num_attention_heads": 7}, "not a multiple of num_attention_heads=7"),
        ({"num_hidden_layers": "six"}, "num_hidden_layers='six'"),
        ({"vocab_size": None}, "vocab_size=None"),
        ({"is_decoder": True}, "is_decoder=true"),
        ({"hidden_act": ["gelu"]}, "hidden_act"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps=nan"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps='small'"),
        ({"num_hidden_layers": 10**15}, "has no tensor 'encoder.layer.1.attention"),
        ({"hidden_size": 768}, r"has shape \(30522, 384\), config.json says \(30522, 768\)"),
        ({"num_hidden_layers": 2}, "has no tensor 'encoder.layer.1.attention.self.query.weight'"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_unsupported_models(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        BertEncoder(used_tensors(1), small_config(**changes))
    assert "\n" not in str(error.value)


def test_invalid_model_folder(folder: Folder, tmp_path: Path) -> None:
    path = folder(small_config(), None)
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        load(path)
    (path / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="not a safetensors file"):
        load(path)
    (path / "config.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="holds a JSON list"):
        load(path)
    (path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load(path)
    (path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json; it is not a model folder"):
        load(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(tmp_path / "nothing.rbe.safetensors")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load("./nothing/here")


def test_hub(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """hf:// is downloaded with huggingface_hub; without it, or offline, the error names the fix."""
    path = folder(small_config(), used_tensors(1))
    asked = []

    def snapshot_download(name: str, *, revision: str | None, **options: Any) -> str:
        asked.append((name, revision))
        if name == "someone/away":
            raise OSError("no route\nto the hub")
        return str(path)

    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    expect_like(load("hf://someone/model"), used_tensors(1), 0.0)
    expect_like(load("hf://model@refs/pr/1"), used_tensors(1), 0.0)
    assert asked == [("someone/model", None), ("model", "refs/pr/1")]
    with pytest.raises(FileNotFoundError, match=r"^hf://someone/away cannot be downloaded: no route$"):
        load("hf://someone/away")
    for name in ("hf://", "hf://a/b/c", "hf://../b", "hf:///a", "hf://a/b@", "hf://a b"):
        with pytest.raises(
            ValueError, match=r"names no model of the Hugging Face Hub; write hf://OWNER/NAME"
        ):
            load(name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"pip install rbe-gpu\[hub\]"):
        load("hf://someone/model")


def test_repr() -> None:
    assert repr(minilm()) == (
        "BertEncoder(6 layers, hidden 384, 12 heads, vocabulary 30522, mean pooling, float32 states, "
        "90.3 MB of weights, cache of 0.0 MB)"
    )

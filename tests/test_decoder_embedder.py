"""Decoders that make vectors of texts: folders as Qwen3-Embedding has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import rbe_gpu as rbe
from rbe_gpu.container import load_file, save_file
from rbe_gpu.models import corpus
from rbe_gpu.models.compress import compress_model
from rbe_gpu.models.decoder import Decoder
from rbe_gpu.models.decoder_embedder import DecoderEmbedder
from rbe_gpu.models.load import load, load_decoder, load_embedder, load_encoder
from rbe_gpu.train.distill import distill

from . import real
from .architectures.decoder_cases import write_with_tokenizer

PROMPT = "Instruct: find it\nQuery:"
TEXTS = ["a text", "", "another, longer text of some more words", "x"]


def change(path: Path, **values: Any) -> None:
    settings = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**settings, **values}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pooling by the last token, as that of Qwen3-Embedding behind a token that ends the text."""
    path = write_with_tokenizer(tmp_path / "model")
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    end = next(iter(tokenizer["added_tokens"]))
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": end["content"], "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            end["content"]: {"id": end["content"], "ids": [end["id"]], "tokens": [end["content"]]}
        },
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    types = ("Transformer", "Pooling", "Normalize")
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{t}" if i else "",
            "type": f"sentence_transformers.models.{t}",
        }
        for i, t in enumerate(types)
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    change(path / "1_Pooling" / "config.json", pooling_mode="lasttoken")
    change(path / "sentence_bert_config.json", max_seq_length=40)
    change(path / "config_sentence_transformers.json", prompts={"query": PROMPT, "document": ""})
    return path


def expected(model: DecoderEmbedder, texts: list[str]) -> NDArray[np.float64]:
    """Text by text, the state of its last token."""
    vectors = []
    for text in texts:
        ids = model.token_ids([text])[0]
        state = model.decoder.forward(ids[None].astype(np.int64))[0, -1].astype(np.float64)
        vectors.append(state / np.linalg.norm(state))
    return np.array(vectors)


def test_vectors(folder: Path) -> None:
    model = load(folder)
    assert isinstance(model, DecoderEmbedder)
    assert (model.pooling, model.normalize, model.max_seq_length) == (("lasttoken",), True, 40)
    assert "lasttoken pooling" in repr(model)
    vectors = model.embed(TEXTS, batch_size=3)
    assert vectors.shape == (4, model.embedding_size) == (4, 64)
    np.testing.assert_allclose(vectors, expected(model, TEXTS), atol=2e-6)
    ends = [ids[-1] for ids in model.token_ids(["a", "word " * 100])]
    assert ends[0] == ends[1]  # the token that ends a text stays when it is truncated
    assert len(model.token_ids(["word " * 100])[0]) == 40
    queries = model.embed(["sea"], prompt_name="query")
    np.testing.assert_allclose(queries, expected(model, [PROMPT + "sea"]), atol=2e-6)
    assert np.abs(queries - model.embed(["sea"])).max() > 1e-3
    long = np.linalg.norm(model.embed(TEXTS, normalize=False), axis=1)
    assert (np.abs(long - 1) > 0.1).all()


def test_the_tokenizer_of_the_decoder_stays_as_it_is(folder: Path) -> None:
    decoder = load_embedder(folder).decoder  # type: ignore[attr-defined]
    decoder.tokenizer.no_truncation()
    short = DecoderEmbedder(decoder, max_seq_length=8)
    long = DecoderEmbedder(decoder, max_seq_length=20)
    text = "word " * 100
    assert [len(m.token_ids([text])[0]) for m in (short, long)] == [8, 20]
    assert len(decoder.token_ids(text)) > 100


def test_mean_pooling_without_the_prompt(folder: Path) -> None:
    change(folder / "1_Pooling" / "config.json", pooling_mode="mean", include_prompt=False)
    model = load_embedder(folder)
    assert isinstance(model, DecoderEmbedder)
    vectors = model.embed(["some sea"], prompt_name="query")
    ids = model.token_ids(["some sea"], PROMPT)[0]
    states = model.forward(ids[None].astype(np.int64))[0, model.prompt_length(PROMPT) :].astype(np.float64)
    mean = states.mean(0)
    np.testing.assert_allclose(vectors[0], mean / np.linalg.norm(mean), atol=2e-6)


def test_compressed_files(folder: Path, tmp_path: Path) -> None:
    """They keep the settings; the vectors are close."""
    dense, out = load_embedder(folder), tmp_path / "m.rbe.safetensors"
    compress_model(folder, out, codes="dense-int12", transform="none")
    model = load(out)
    assert isinstance(model, DecoderEmbedder)
    for name in ("pooling", "normalize", "max_seq_length", "prompts", "truncate_dim", "include_prompt"):
        assert getattr(model, name) == getattr(dense, name)
    cosines = (model.embed(TEXTS) * dense.embed(TEXTS)).sum(1)
    assert cosines.min() > 0.9999
    assert 0 < model.nbytes < load(folder).nbytes  # type: ignore[union-attr]
    compress_model(folder, out, codes="dense-int8", transform="none")
    names = [n for n in model.tensors() if n.endswith("_proj.weight")]
    rounded = load_embedder(out).with_int8_activations(names)
    assert rounded.int8_activations == set(names)
    assert (rounded.embed(TEXTS) * dense.embed(TEXTS)).sum(1).min() > 0.9
    again = dense.with_tensors(model.tensors())
    np.testing.assert_array_equal(again.embed(TEXTS), model.embed(TEXTS))
    moved = rbe.to(model, "cpu")
    np.testing.assert_array_equal(moved.embed(TEXTS), model.embed(TEXTS))


def test_calibration(folder: Path, tmp_path: Path) -> None:
    """The state of the last token counts: the file's vectors are close to those of the dense model."""
    texts = [text[:200] for text in real.texts()[:60]]
    summary = compress_model(folder, tmp_path / "c", ratio=4, calibrate=texts, block=32)
    assert summary.ratio >= 4
    model, dense = load_embedder(tmp_path / "c"), load_embedder(folder)
    assert (model.embed(texts) * dense.embed(texts)).sum(1).mean() > 0.98


def test_half_types(folder: Path) -> None:
    vectors = load_embedder(folder, dtype="float16").embed(TEXTS)
    assert (vectors * load_embedder(folder).embed(TEXTS)).sum(1).min() > 0.999


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "middle"}, 'pooling_mode="middle"'),
        (
            "sentence_bert_config.json",
            {"do_lower_case": True},
            "do_lower_case=true, which decoders do not have",
        ),
        ("sentence_bert_config.json", {"max_seq_length": 1}, "leaves no room for text beside 1 special"),
        ("sentence_bert_config.json", {"depth": 1}, 'unknown key "depth"'),
        ("config_sentence_transformers.json", {"prompts": 3}, "prompts=3; needs an object"),
        ("config.json", {"use_bidirectional_attention": True}, "only causal attention is supported"),
        ("tokenizer_config.json", {"tokenizer_class": "BertTokenizer"}, "tokenizer_class="),
        ("tokenizer_config.json", {"truncation_side": "left"}, 'truncation_side="left"; needs "right"'),
    ],
)
def test_refusals(folder: Path, tmp_path: Path, file: str, values: dict[str, Any], message: str) -> None:
    change(folder / file, **values)
    with pytest.raises(ValueError, match=message):
        load(folder)
    if "max_seq_length" not in values:  # read by the model, not by compress
        with pytest.raises(ValueError, match=message):
            compress_model(folder, tmp_path / "c", codes="dense-int8")


def test_what_takes_no_such_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="generates no text"):
        load_decoder(folder)
    with pytest.raises(ValueError, match="makes vectors with a decoder"):
        load_encoder(folder)


def test_training(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a calibrated file, whose vectors come closer to those of the dense model."""
    monkeypatch.setattr(
        corpus, "held_out", lambda count: []
    )  # the start file is calibrated, however few the texts
    texts = [text[:120] for text in real.texts()[:320]]
    compress_model(folder, tmp_path / "start", ratio=6, calibrate=texts[:60], block=32)
    options = {"start": tmp_path / "start", "batch_size": 16, "max_tokens": 40}
    summary = distill(folder, texts, out=tmp_path / "c", ratio=6, steps=50, **options)
    assert summary.ratio >= 6
    assert summary.result.cosine_mean > summary.start.cosine_mean
    assert isinstance(load(tmp_path / "c"), DecoderEmbedder)


def test_settings_of_a_compressed_file(folder: Path, tmp_path: Path) -> None:
    compress_model(folder, tmp_path / "c", codes="dense-int8", transform="none")
    tensors, config = load_file(tmp_path / "c")
    save_file(tmp_path / "c", tensors, {**config, "pooling": {"pooling_mode": 3}})
    with pytest.raises(ValueError, match="pooling_mode=3"):
        load(tmp_path / "c")
    # what says that a decoder makes vectors is that the file has pooling
    save_file(tmp_path / "c", tensors, {k: v for k, v in config.items() if k != "pooling"})
    assert isinstance(load(tmp_path / "c"), Decoder)

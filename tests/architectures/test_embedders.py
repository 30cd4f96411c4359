"""Vectors of small models are those of sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import rbe_gpu as rbe
from rbe_gpu.models.compress import compress_model
from rbe_gpu.models.decoder_embedder import DecoderEmbedder
from rbe_gpu.models.load import load, load_embedder
from rbe_gpu.train.distill import distill

from .. import real
from .embedder_cases import CASES, TANH, TEXTS, write

RECORDED = np.load(Path(__file__).with_name("embedder_vectors.npz"))
#: of the largest component: float32 sums in another order
TOLERANCE = 1e-5
GEMMA = "embeddinggemma"
BERT = "bert, Dense with tanh"


def folder(name: str, path: Path) -> Path:
    shapes = json.loads(str(RECORDED[f"{name}.shapes"]))
    return write(path, CASES[name], {key: tuple(shape) for key, shape in shapes.items()})


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_every_case_is_recorded() -> None:
    assert {key.rpartition(".")[0] for key in RECORDED.files} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_vectors(name: str, tmp_path: Path) -> None:
    model, want = load_embedder(folder(name, tmp_path / "m")), RECORDED[f"{name}.vectors"]
    vectors = model.embed(TEXTS, **CASES[name].call)
    assert vectors.shape == want.shape == (len(TEXTS), model.embedding_size)
    assert np.abs(vectors - want).max() <= TOLERANCE * np.abs(want).max()
    alone = np.concatenate([model.embed([text], **CASES[name].call) for text in TEXTS])
    assert np.abs(vectors - alone).max() <= 2e-6 * np.abs(want).max()
    moved = rbe.to(model, "cpu").embed(TEXTS, **CASES[name].call)
    np.testing.assert_array_equal(moved, vectors)


@pytest.mark.parametrize("name", CASES)
def test_compressed_files(name: str, tmp_path: Path) -> None:
    """Those of 12-bit codes are close, and keep Dense modules and settings."""
    source, out = folder(name, tmp_path / "m"), tmp_path / "m.rbe.safetensors"
    compress_model(source, out, codes="dense-int12", transform="none")
    dense, model = load_embedder(source), load_embedder(out)
    a, b = (m.embed(TEXTS, normalize=True, **CASES[name].call) for m in (dense, model))
    assert (a * b).sum(axis=1).min() > 0.9999
    assert model.tensors().keys() == dense.tensors().keys()
    assert model.normalize == CASES[name].normalize
    assert [m.activation for m in model.dense] == [m.activation for m in dense.dense]
    again = dense.with_tensors(model.tensors())
    np.testing.assert_array_equal(again.embed(TEXTS), model.embed(TEXTS))
    shifted = dense.with_tensors({"dense.0.weight": 2 * dense.tensors()["dense.0.weight"]})
    assert np.abs(shifted.embed(TEXTS, normalize=False) - dense.embed(TEXTS, normalize=False)).max() > 0.01


def test_half_types(tmp_path: Path) -> None:
    source = folder(GEMMA, tmp_path / "m")
    vectors, whole = (load_embedder(source, dtype=d).embed(TEXTS) for d in ("bfloat16", "float32"))
    assert vectors.dtype == np.float32
    assert (vectors * whole).sum(axis=1).min() > 0.99
    weights = load_file(source / "2_Dense" / "model.safetensors")
    save_file({k: v.astype(np.float16) for k, v in weights.items()}, source / "2_Dense" / "model.safetensors")
    half = load_embedder(source).embed(TEXTS)
    np.testing.assert_allclose(half, whole, atol=2e-3)


def test_the_width_counts_pooled_columns(tmp_path: Path) -> None:
    model = load_embedder(folder(BERT, tmp_path / "m"))
    assert (model.pooled_size, model.embedding_size) == (16, 16)
    states = model.forward(np.full((2, 5), 3))
    assert model.pool(states).shape == (2, 16)
    out = np.empty((2, 16), np.float16)
    np.testing.assert_allclose(model.pool(states, out=out), model.pool(states), atol=1e-3)


def test_both_directions(tmp_path: Path) -> None:
    """What is behind a token changes it, within half of the window to either side."""
    model = load(folder(GEMMA, tmp_path / "m"))
    assert isinstance(model, DecoderEmbedder)
    c = model.decoder.settings
    assert (c.causal, c.windows) == (False, (5, 5, None, 5))
    with pytest.raises(ValueError, match="attention in both directions: it generates no text"):
        model.decoder.generate(["x"], 4)


def test_a_model_without_modules_is_refused(tmp_path: Path) -> None:
    path = folder(GEMMA, tmp_path / "m")
    (path / "modules.json").unlink()
    for call in (lambda: load(path), lambda: compress_model(path, tmp_path / "c", codes="dense-int8")):
        with pytest.raises(ValueError, match=r"use_bidirectional_attention.*needs modules.json"):
            call()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"activation_function": "torch.nn.modules.activation.GELU"}, "activation_function=.*needs one of"),
        ({"activation_function": None}, "activation_function=null"),
        ({"in_features": 25}, "in_features=25, but the vectors before it have 24 columns"),
        ({"out_features": 0}, "out_features=0; needs a positive integer"),
        ({"out_features": 15}, r"dense.0.weight has shape \(16, 24\), its settings say \(15, 24\)"),
        ({"bias": "yes"}, 'bias="yes"'),
        ({"use_residual": True}, "use_residual=true: residual connections"),
        ({"module_input_name": "token_embeddings"}, "module_input_name 'token_embeddings'"),
        ({"gain": 2}, 'unknown key "gain"'),
    ],
)
def test_dense_settings_that_are_not_supported_are_named(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = folder(BERT, tmp_path / "m")
    change(path / "2_Dense" / "config.json", **values)
    with pytest.raises(ValueError, match=message):
        load(path)
    with pytest.raises(ValueError, match=message):
        compress_model(path, tmp_path / "c", codes="dense-int8")


def test_dense_tensors_that_are_not_supported_are_named(tmp_path: Path) -> None:
    path = folder(BERT, tmp_path / "m")
    file = path / "2_Dense" / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "residual.weight": weights["linear.weight"]}, file)
    with pytest.raises(ValueError, match=r"2_Dense.*has the tensor 'residual.weight'"):
        load(path)
    save_file({"linear.weight": weights["linear.weight"]}, file)
    with pytest.raises(ValueError, match=r"no tensor 'dense.0.bias' of its Dense module"):
        load(path)
    checkpoint = load_file(path / "model.safetensors")
    save_file({**checkpoint, "dense.0.weight": weights["linear.weight"]}, path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"has a tensor 'dense.0.weight', which is the name of a Dense module's"
    ):
        load(path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"2_Dense has no model.safetensors"):
        load(path)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (("Transformer", "Dense", "Pooling"), "Transformer, Dense, Pooling; needs"),
        (("Transformer", "Pooling", "Normalize", "Dense"), "Pooling, Normalize, Dense; needs"),
        (("Transformer", "Pooling", "LayerNorm"), 'the module "LayerNorm"'),
    ],
)
def test_modules_in_another_order_are_refused(kinds: tuple[str, ...], message: str, tmp_path: Path) -> None:
    path = folder(BERT, tmp_path / "m")
    places = {"Transformer": "", "Pooling": "1_Pooling", "Dense": "2_Dense"}
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": places.get(kind, ""),
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=message):
        load(path)


def test_two_modules_of_one_folder_are_refused(tmp_path: Path) -> None:
    path = folder(BERT, tmp_path / "m")
    modules = json.loads((path / "modules.json").read_text())
    (path / "modules.json").write_text(json.dumps([*modules, {**modules[-1], "idx": 3, "name": "3"}]))
    with pytest.raises(ValueError, match='two Dense modules in "2_Dense"'):
        load(path)


@pytest.mark.filterwarnings("ignore:calibrating on:UserWarning")  # bytes are few different tokens
def test_calibration_takes_dense_modules_and_training_refuses_them(tmp_path: Path) -> None:
    path, texts = folder(BERT, tmp_path / "m"), list(real.texts()[:60])
    model = load_embedder(path)
    calibrated = rbe.calibrate(model, texts)
    budget = sum(w.values.size for w in calibrated._weights.values()) * 6 / 8
    compressed = model.with_tensors(calibrated.compress(budget).tensors)
    a, b = (m.embed(texts, normalize=True) for m in (model, compressed))
    assert (a * b).sum(axis=1).mean() > 0.99
    with pytest.raises(ValueError, match=r"has Dense modules .modules.json., which training does not take"):
        distill(path, texts, out=tmp_path / "c", ratio=4, steps=1)


def test_a_stored_list_that_is_none_is_refused(tmp_path: Path) -> None:
    from rbe_gpu.container import load_file as load_rbe
    from rbe_gpu.container import save_file as save_rbe

    compress_model(folder(BERT, tmp_path / "m"), tmp_path / "c", codes="dense-int8")
    tensors, config = load_rbe(tmp_path / "c")
    assert config["dense"][0]["activation_function"] == TANH
    save_rbe(tmp_path / "c", tensors, {**config, "dense": {"0": 1}})
    with pytest.raises(ValueError, match="has dense, which is not a list of settings"):
        load(tmp_path / "c")
    save_rbe(tmp_path / "c", tensors, {**config, "dense": [3]})
    with pytest.raises(ValueError, match=r"dense\[0\] is a int, expected an object"):
        load(tmp_path / "c")

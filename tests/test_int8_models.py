"""int8 activations of whole models: which layers take them, and where that is stored."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu.container import load_file, save_file
from rbe_gpu.models.bert import BertEncoder
from rbe_gpu.models.bert_tensors import linear_weights
from rbe_gpu.models.int8_choice import int8_weights

from . import real
from .test_bert import small_config, used_tensors

TEXTS = ["The bank raised its interest rates.", "A cat sat on the mat.", "Rivers flow to the sea.", "Yes."]


@pytest.fixture(scope="module")
def model() -> BertEncoder:
    """Two layers of MiniLM: the weights of the linear layers in 8-bit codes."""
    tensors = used_tensors(2)
    for name in linear_weights(small_config(2)):
        tensors[name] = rbe.compress(tensors[name], codes="dense-int8", transform="none", basis=False)
    return BertEncoder(tensors, small_config(2), real.tokenizer())


@pytest.fixture(scope="module")
def file(model: BertEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a file, in which half of the layers are named."""
    path = tmp_path_factory.mktemp("int8") / "m.rbe.safetensors"
    config = {"model_type": "bert", "config": small_config(2)}
    names = list(linear_weights(small_config(2)))[::2]
    save_file(path, model.tensors(), {**config, "int8_activations": names})
    return path


def _int8(model: BertEncoder) -> set[str]:
    return {
        f"encoder.layer.{i}.{name}"
        for i, (attention, _, ffn, _) in enumerate(model.layers)
        for name, linear in (
            ("attention.self.query.weight", attention.query),
            ("attention.self.key.weight", attention.key),
            ("attention.self.value.weight", attention.value),
            ("attention.output.dense.weight", attention.output),
            ("intermediate.dense.weight", ffn.up),
            ("output.dense.weight", ffn.down),
        )
        if linear.activation_bits == 8
    }


def test_all_layers_or_some(model: BertEncoder) -> None:
    names = list(linear_weights(model.config))
    plain = model.embed(TEXTS)
    for chosen in ((), names[:1], names[5:9], names):
        rounded = model.with_int8_activations(chosen)
        assert _int8(rounded) == rounded.int8_activations == set(chosen)
        vectors = rounded.embed(TEXTS)
        assert np.array_equal(vectors, plain) == (not chosen)
        assert ((vectors * plain).sum(axis=1) > 0.98).all()
    assert not _int8(model)  # unchanged
    assert model.with_int8_activations(names).nbytes == model.nbytes


def test_a_text_has_the_same_vector_alone_and_in_a_batch(model: BertEncoder) -> None:
    rounded = model.with_int8_activations(list(linear_weights(model.config)))
    together = rounded.embed(TEXTS)
    for i, text in enumerate(TEXTS):
        alone = rounded.embed([text])[0]
        np.testing.assert_allclose(alone, together[i], rtol=0, atol=1e-6)


def test_several_threads_use_one_model(model: BertEncoder) -> None:
    rounded = model.with_int8_activations(list(linear_weights(model.config)))
    expected = [rounded.embed(TEXTS[:count]) for count in (1, 2, 3, 4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            vectors = pool.map(lambda count: rounded.embed(TEXTS[:count]), (1, 2, 3, 4))
            for there, here in zip(vectors, expected, strict=True):
                np.testing.assert_array_equal(there, here)


def test_a_file_says_which_layers(file: Path) -> None:
    names = set(linear_weights(small_config(2)))
    assert _int8(rbe.load(file)) == set(load_file(file)[1]["int8_activations"])
    assert _int8(rbe.load(file, activations="int8")) == names
    assert _int8(rbe.load(file, activations="float")) == set()
    with pytest.raises(ValueError, match="activations='bf16'"):
        rbe.load(file, activations="bf16")


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ("all", "not a list of names"),
        ([1], "not a list of names"),
        (["encoder.layer.7.output.dense.weight"], "no linear weight of the model"),
        (["embeddings.word_embeddings.weight"], "no linear weight of the model"),
    ],
)
def test_a_file_that_names_other_layers_is_refused(
    file: Path, tmp_path: Path, stored: object, message: str
) -> None:
    tensors, config = load_file(file)
    save_file(tmp_path / "x.rbe.safetensors", tensors, {**config, "int8_activations": stored})
    with pytest.raises(ValueError, match=message):
        rbe.load(tmp_path / "x.rbe.safetensors")


def test_dense_weights_take_none(model: BertEncoder) -> None:
    dense = BertEncoder(used_tensors(1), small_config(1))
    with pytest.raises(
        ValueError, match=r"encoder\.layer\.0\..*takes no int8 activations.*the weight is dense"
    ):
        dense.with_int8_activations(list(linear_weights(dense.config)))
    assert int8_weights(BertEncoder(used_tensors(1), small_config(1), real.tokenizer()), TEXTS) == []


def test_layers_are_chosen_by_their_loss(model: BertEncoder) -> None:
    """None for a limit that rounding always exceeds, all for one that it never does."""
    assert int8_weights(model, TEXTS, most=-1.0) == []
    assert int8_weights(model, TEXTS, most=1.0) == list(linear_weights(model.config))


def test_tensors_make_the_same_model(model: BertEncoder) -> None:
    again = BertEncoder(model.tensors(), model.config, real.tokenizer())
    np.testing.assert_array_equal(again.embed(TEXTS), model.embed(TEXTS))
    changed = model.with_tensors({"embeddings.LayerNorm.bias": np.zeros(model.hidden_size, np.float32)})
    assert not np.array_equal(changed.embed(TEXTS), model.embed(TEXTS))

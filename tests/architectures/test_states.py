"""Hidden states of every supported encoder are those of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

import rbe_gpu as rbe
from rbe_gpu.models import calibrate
from rbe_gpu.models.bert import BertEncoder
from rbe_gpu.models.encoders import ENCODERS, canonical_name, relative_bias
from rbe_gpu.models.load import load

from .. import real
from .cases import CONFIGS, LENGTHS, TEXTS, bytes_tokenizer, inputs, tokenizer_config, weights

RECORDED = np.load(Path(__file__).with_name("states.npz"))
#: of the largest value of the states: float32 sums in another order, two layers
TOLERANCE = 1e-5


def tensors(name: str) -> dict[str, NDArray[np.float32]]:
    shapes = json.loads(str(RECORDED[f"{name}.shapes"]))
    return weights({key: tuple(shape) for key, shape in shapes.items()})


def folder(name: str, path: Path, prefix: str = "") -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIGS[name]))
    save_file({prefix + key: value for key, value in tensors(name).items()}, path / "model.safetensors")
    return path


def packed(states: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.concatenate([states[i, :n] for i, n in enumerate(LENGTHS.tolist())])


def test_every_model_type_is_recorded() -> None:
    assert {config["model_type"] for config in CONFIGS.values()} == set(ENCODERS)
    assert {key.partition(".")[0] for key in RECORDED.files} - {"tokenizer"} == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states(name: str, tmp_path: Path) -> None:
    model = load(folder(name, tmp_path / "model"))
    states, want = packed(model.forward(inputs(), LENGTHS)), RECORDED[f"{name}.states"]
    assert np.abs(states - want).max() <= TOLERANCE * np.abs(want).max()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_text_is_the_same_alone(name: str, tmp_path: Path) -> None:
    model, ids = load(folder(name, tmp_path / "model")), inputs()
    together = model.forward(ids, LENGTHS)
    for i, length in enumerate(LENGTHS.tolist()):
        alone = model.forward(ids[i : i + 1, :length])[0]
        # one token takes another matmul algorithm than many
        assert np.abs(alone - together[i, :length]).max() <= 1e-6 * np.abs(alone).max()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_head_model_has_a_prefix(name: str, tmp_path: Path) -> None:
    """Checkpoints of models with a head name the encoder: `roberta.embeddings...`."""
    prefix = {"xlm-roberta": "roberta.", "camembert": "roberta."}.get(name, CONFIGS[name]["model_type"] + ".")
    plain, named = (
        load(folder(name, tmp_path / key, given)).forward(inputs(), LENGTHS)
        for key, given in (("plain", ""), ("named", prefix))
    )
    assert np.array_equal(plain, named)


@pytest.mark.parametrize("name", CONFIGS)
def test_compressed_files_are_loaded(name: str, tmp_path: Path) -> None:
    """Those of 12-bit codes are within a thousandth, and the tensors of a model are named as it reads them."""
    source = folder(name, tmp_path / "model")
    rbe.compress_model(source, tmp_path / "m.rbe.safetensors", codes="dense-int12", transform="none")
    model, dense = load(tmp_path / "m.rbe.safetensors"), load(source)
    got, want = (packed(m.forward(inputs(), LENGTHS)) for m in (model, dense))
    assert np.linalg.norm(got - want) <= 1e-3 * np.linalg.norm(want)
    assert model.tensors().keys() == dense.tensors().keys()
    again = dense.with_tensors(dense.tensors())
    assert np.array_equal(packed(again.forward(inputs(), LENGTHS)), want)


def test_a_long_text_is_refused(tmp_path: Path) -> None:
    model = load(folder("roberta", tmp_path / "model"))
    assert model.max_positions == 298
    model.forward(np.full((1, 298), 5))
    with pytest.raises(ValueError, match="299 tokens, the model has 298 positions"):
        model.forward(np.full((1, 299), 5))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("distilbert", {"dim": 25}, "dim=25, not a multiple of n_heads=3"),
        ("distilbert", {"n_layers": 0}, "n_layers=0; needs a positive integer"),
        ("distilbert", {"activation": "snake"}, "activation 'snake'"),
        ("mpnet", {"relative_attention_num_buckets": 64}, "relative_attention_num_buckets=64"),
        ("roberta", {"pad_token_id": 299}, "pad_token_id=299; needs an integer from 0 to 298"),
        ("roberta", {"type_vocab_size": 2}, r"token_type_embeddings.weight has shape \(1, 24\)"),
        ("roberta", {"sliding": 1}, 'unknown key "sliding"'),
        ("bert", {"model_type": "albert"}, "model_type 'albert'; supported: bert, distilbert, mpnet"),
    ],
)
def test_what_is_not_supported_is_named(name: str, change: dict, message: str, tmp_path: Path) -> None:
    path = folder(name, tmp_path / "model")
    (path / "config.json").write_text(json.dumps({**CONFIGS[name], **change}))
    with pytest.raises(ValueError, match=message):
        load(path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    kept = {key: value for key, value in tensors("mpnet").items() if "relative" not in key}
    with pytest.raises(ValueError, match=r"no tensor 'encoder.relative_attention_bias.weight'"):
        BertEncoder(kept, CONFIGS["mpnet"])


def test_names() -> None:
    for name, config in CONFIGS.items():
        model = BertEncoder(tensors(name), config)
        read = {canonical_name(key) for key in tensors(name)}
        assert set(model.tensors()) <= read, name


def test_relative_bias_is_the_definition() -> None:
    """Distances 0 to 7 by themselves, 8 to 127 logarithmically, behind the query and before it."""
    buckets = np.arange(32, dtype=np.float32)[:, None]
    bias = relative_bias(buckets, 300)[0]
    assert bias.shape == (599,)
    at = {distance: int(bias[299 + distance]) for distance in range(-299, 300)}
    assert [at[-n] for n in range(9)] == list(range(9))
    assert [at[n] for n in range(1, 9)] == [16 + n for n in range(1, 9)]
    assert [at[-n] for n in (11, 12, 15, 16, 22, 23, 31, 32, 45, 46, 63, 64, 90, 91, 127, 128, 299)] == [
        *(8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15, 15, 15),
    ]
    assert at[299] == 31


# --- RobertaTokenizer -----------------------------------------------------------------------------------


def with_tokenizer(path: Path, prefix_space: bool = False, **change: object) -> Path:
    """A model folder with a tokenizer of bytes; change : keys of tokenizer.json."""
    made = bytes_tokenizer(prefix_space)
    rows = len(made["model"]["vocab"])
    folder("roberta", path)
    (path / "config.json").write_text(json.dumps({**CONFIGS["roberta"], "vocab_size": rows}))
    shapes = json.loads(str(RECORDED["roberta.shapes"])) | {"embeddings.word_embeddings.weight": [rows, 24]}
    save_file(weights({key: tuple(shape) for key, shape in shapes.items()}), path / "model.safetensors")
    (path / "tokenizer.json").write_text(json.dumps({**made, **change}))
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(prefix_space)))
    return path


@pytest.mark.parametrize("prefix_space", [False, True])
def test_ids_are_those_of_transformers(prefix_space: bool, tmp_path: Path) -> None:
    model = load(with_tokenizer(tmp_path / "model", prefix_space))
    assert [ids.tolist() for ids in model.token_ids(TEXTS)] == json.loads(
        str(RECORDED[f"tokenizer.{prefix_space}"])
    )
    assert np.isfinite(model.embed(TEXTS)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": {"type": "NFC"}}, "normalizer"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "add_prefix_space false"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer"),
        ({"post_processor": None}, r'"<s>" \(id 0\) before and "</s>" \(id 2\) behind'),
        ({"model": {**bytes_tokenizer(False)["model"], "dropout": 0.1}}, "model.dropout=0.1"),
        ({"model": {**bytes_tokenizer(False)["model"], "fuse_unk": True}}, "model.fuse_unk=true"),
    ],
)
def test_what_the_class_would_replace_is_refused(change: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load(with_tokenizer(tmp_path / "model", **change))


@pytest.mark.filterwarnings("ignore:calibrating on:UserWarning")  # bytes are few different tokens
def test_calibration_numbers_tokens_as_the_model_does(tmp_path: Path) -> None:
    path, some = with_tokenizer(tmp_path / "model"), list(real.texts()[:60])
    model = load(path)
    calibrated = rbe.calibrate(model, some)
    weight_of = calibrated._weights
    scales = weight_of["embeddings.position_embeddings.weight"].scales
    counts = np.bincount(
        np.concatenate([2 + np.arange(len(ids)) for ids in model.token_ids(some)]), minlength=300
    )
    table = model.position_embeddings.weight
    np.testing.assert_array_equal(scales, calibrate.row_scales(table, calibrate.ROW_POWER, counts))
    budget = sum(w.values.size for w in weight_of.values()) * 6 / 8
    compressed = model.with_tensors(calibrated.compress(budget).tensors)
    vectors, dense = (m.embed(some, normalize=True) for m in (compressed, model))
    assert (vectors * dense).sum(axis=1).mean() > 0.99

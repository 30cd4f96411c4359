"""Files and folders that commands must refuse: each is a good one with one thing wrong."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.test_compress_model import cut_tensors, write_safetensors

DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
QUERY = "encoder.layer.0.attention.self.query.weight"


def build(folder: Path, model_folder: Path, model_file: Path) -> None:
    """Make them all in `folder`: single files, compressed files, and model folders named `model-*`."""
    _single_files(folder)
    _compressed_files(folder, model_file)
    tensors = cut_tensors()
    for name, change in {**_CONFIGS, **_TOKENIZERS, **_OTHER_FILES}.items():
        path = _copy(model_folder, folder / name)
        change(path)
    for name, change_tensors in _TENSORS.items():
        path = _copy(model_folder, folder / name)
        (path / "model.safetensors").unlink()
        write_safetensors(path / "model.safetensors", change_tensors(dict(tensors)))


def _copy(model_folder: Path, path: Path) -> Path:
    """The model folder, with hard links to its weights."""
    shutil.copytree(model_folder, path, copy_function=_link_weights)
    return path


def _link_weights(source: str, target: str) -> None:
    (os.link if source.endswith(".safetensors") else shutil.copyfile)(source, target)


# --- single files ---------------------------------------------------------------------------------------


def _single_files(folder: Path) -> None:
    (folder / "empty").touch()
    (folder / "text").write_text("hello, this is no file of a model\n")
    (folder / "blank").write_text("\n \n\t\n")
    (folder / "binary").write_bytes(random.Random(1).randbytes(5000))
    (folder / "latin1").write_bytes("Köln\n".encode("latin-1"))
    (folder / "folder").mkdir()
    (folder / "dangling").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "fifo")


def _compressed_files(folder: Path, model_file: Path) -> None:
    whole = model_file.read_bytes()
    (folder / "cut.rbe.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "header-only.rbe.safetensors").write_bytes(whole[:8])
    (folder / "no-length.rbe.safetensors").write_bytes(whole[:5])
    (folder / "huge-header.rbe.safetensors").write_bytes(b"\xff" * 8 + whole[8:])
    (folder / "longer.rbe.safetensors").write_bytes(whole + b"\0")


# --- model folders --------------------------------------------------------------------------------------

Change = Callable[[Path], object]


def _text(file: str, text: str | bytes) -> Change:
    """Replace a file of the folder."""
    raw = text if isinstance(text, bytes) else text.encode()
    return lambda folder: (folder / file).write_bytes(raw)


def _without(file: str) -> Change:
    return lambda folder: (folder / file).unlink()


def _json(file: str, edit: Callable[[Any], object]) -> Change:
    def change(folder: Path) -> None:
        value = json.loads((folder / file).read_text("utf-8"))
        edit(value)
        (folder / file).write_text(json.dumps(value))

    return change


def _config(**values: Any) -> Change:
    return _json("config.json", lambda config: config.update(values))


_CONFIGS: dict[str, Change] = {
    "model-config-missing": _without("config.json"),
    "model-config-empty": _text("config.json", ""),
    "model-config-list": _text("config.json", "[]"),
    "model-config-null": _text("config.json", "null"),
    "model-config-object": _text("config.json", "{}"),
    "model-config-deep": _text("config.json", DEEP),
    "model-config-deep-value": _text("config.json", '{"vocab_size": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    "model-config-cut": _text("config.json", '{"model_type": "bert", "hidd'),
    "model-config-latin1": _text("config.json", '{"model_type": "bért"}'.encode("latin-1")),
    "model-config-digits": _text("config.json", '{"vocab_size": ' + "9" * 10_000 + "}"),
    "model-config-nan": _config(layer_norm_eps=float("nan")),
    "model-config-inf": _config(layer_norm_eps=float("inf")),
    "model-config-eps-text": _config(layer_norm_eps="1e-12"),
    "model-config-negative": _config(hidden_size=-96),
    "model-config-text": _config(hidden_size="96"),
    "model-config-float": _config(hidden_size=96.0),
    "model-config-true": _config(num_hidden_layers=True),
    "model-config-many-layers": _config(num_hidden_layers=10**12),
    "model-config-heads": _config(num_attention_heads=7),
    "model-config-huge": _config(vocab_size=2**63),
    "model-config-type": _config(model_type="gpt2"),
    "model-config-type-list": _config(model_type=["bert"]),
    "model-config-activation": _config(hidden_act="mish"),
    "model-config-activation-list": _config(hidden_act=["gelu"]),
    "model-config-positions": _config(position_embedding_type="relative_key"),
}

_TOKENIZERS: dict[str, Change] = {
    "model-tokenizer-empty": _text("tokenizer.json", ""),
    "model-tokenizer-object": _text("tokenizer.json", "{}"),
    "model-tokenizer-list": _text("tokenizer.json", "[]"),
    "model-tokenizer-deep": _text("tokenizer.json", DEEP),
    "model-tokenizer-binary": _text("tokenizer.json", b"\xff\xfe\x00{}"),
    "model-tokenizer-no-unk": _json("tokenizer.json", lambda t: t["model"]["vocab"].pop("[UNK]")),
    "model-tokenizer-unknown": _json("tokenizer.json", lambda t: t["model"].update(type="Nonsense")),
    "model-tokenizer-id": _json("tokenizer.json", lambda t: t["model"]["vocab"].update(zebra=5_000_000)),
    "model-tokenizer-negative": _json("tokenizer.json", lambda t: t["model"]["vocab"].update(zebra=-1)),
}

_OTHER_FILES: dict[str, Change] = {
    "model-modules-text": _text("modules.json", "no JSON"),
    "model-modules-object": _text("modules.json", "{}"),
    "model-modules-numbers": _text("modules.json", "[1, 2]"),
    "model-modules-deep": _text("modules.json", "[" * 100_000 + "]" * 100_000),
    "model-modules-dense": _json("modules.json", lambda m: m.append({"type": "x.Dense", "path": "2"})),
    "model-modules-outside": _json("modules.json", lambda m: m[1].update(path="../../elsewhere")),
    "model-pooling-missing": _without("1_Pooling/config.json"),
    "model-pooling-list": _text("1_Pooling/config.json", "[]"),
    "model-pooling-none": _text("1_Pooling/config.json", '{"pooling_mode": "none"}'),
    "model-pooling-deep": _text("1_Pooling/config.json", DEEP),
    "model-length-deep": _text("sentence_bert_config.json", DEEP),
    "model-length-list": _text("sentence_bert_config.json", "[]"),
    "model-weights-missing": _without("model.safetensors"),
    "model-weights-empty": lambda folder: _replace(folder / "model.safetensors", b""),
    "model-weights-text": lambda folder: _replace(folder / "model.safetensors", b"no safetensors file"),
    "model-weights-cut": lambda folder: _cut(folder / "model.safetensors"),
    "model-weights-folder": lambda folder: _folder(folder / "model.safetensors"),
    "model-index-text": lambda folder: _index(folder, "no JSON"),
    "model-index-list": lambda folder: _index(folder, '{"weight_map": []}'),
    "model-index-outside": lambda folder: _index(folder, '{"weight_map": {"a": "../model.safetensors"}}'),
    "model-index-missing": lambda folder: _index(folder, '{"weight_map": {"a": "absent.safetensors"}}'),
    "model-index-number": lambda folder: _index(folder, '{"weight_map": {"a": 7}}'),
}


def _replace(path: Path, raw: bytes) -> None:
    path.unlink()
    path.write_bytes(raw)


def _cut(path: Path) -> None:
    raw = path.read_bytes()
    _replace(path, raw[: len(raw) // 2])


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _index(folder: Path, text: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)


# --- weights --------------------------------------------------------------------------------------------

Tensors = dict[str, np.ndarray]


def _cast(dtype: type) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: (1000 * a).astype(dtype) for name, a in tensors.items()}


def _cast_one(dtype: type) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, QUERY: (1000 * tensors[QUERY]).astype(dtype)}


def _with_value(value: float, name: str = QUERY) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        a = tensors[name].copy()
        a.reshape(-1)[5] = value
        return {**tensors, name: a}

    return change


_TENSORS: dict[str, Callable[[Tensors], Tensors]] = {
    "model-int64": _cast(np.int64),
    "model-float64": _cast(np.float64),
    "model-int64-query": _cast_one(np.int64),
    "model-float64-query": _cast_one(np.float64),
    "model-bool-query": _cast_one(np.bool_),
    "model-nan": _with_value(float("nan")),
    "model-inf": _with_value(float("inf")),
    "model-inf-bias": _with_value(float("inf"), "encoder.layer.0.output.dense.bias"),
    "model-nan-words": _with_value(float("nan"), "embeddings.word_embeddings.weight"),
    "model-nan-norm": _with_value(float("nan"), "embeddings.LayerNorm.weight"),
    "model-no-query": lambda tensors: {n: a for n, a in tensors.items() if n != QUERY},
    "model-query-shape": lambda tensors: {**tensors, QUERY: tensors[QUERY][:-1].copy()},
    "model-query-axes": lambda tensors: {**tensors, QUERY: tensors[QUERY].reshape(96, 32, 3)},
    "model-query-empty": lambda tensors: {**tensors, QUERY: tensors[QUERY][:0].copy()},
    "model-no-tensors": lambda tensors: {},
    "model-only-integers": lambda tensors: {"embeddings.position_ids": tensors["embeddings.position_ids"]},
}

#: names of the model folders that `build` makes
MODEL_FOLDERS = (*_CONFIGS, *_TOKENIZERS, *_OTHER_FILES, *_TENSORS)
#: what `compress` accepts of them without `--calibrate`: it converts float64
CONVERTED = ("model-float64", "model-float64-query")

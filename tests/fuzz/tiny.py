"""A model folder of a few kilobytes, cut from the small model of the tests."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np

from rbe_gpu.mapped import MappedFile

from ..test_compress_model import write_safetensors

_HIDDEN, _INNER, _VOCABULARY, _POSITIONS, _LAYERS = 24, 32, 130, 16, 1


def make_tiny(model: Path, folder: Path) -> Path:
    """`model` with fewer words, positions, features and layers, in `folder`."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    sizes = {
        "hidden_size": _HIDDEN,
        "intermediate_size": _INNER,
        "vocab_size": _VOCABULARY,
        "max_position_embeddings": _POSITIONS,
    }
    new = {config[key]: value for key, value in sizes.items()}
    (folder / "config.json").write_text(json.dumps({**config, **sizes, "num_hidden_layers": _LAYERS}))
    pooling = json.loads((folder / "1_Pooling/config.json").read_text("utf-8"))
    pooling["word_embedding_dimension"] = _HIDDEN
    (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {word: i for word, i in vocabulary.items() if i < _VOCABULARY}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    source = MappedFile(folder / "model.safetensors")
    tensors = {}
    for name in source.entries:
        tensor = source.array(name)
        layer = re.search(r"layer\.(\d+)\.", name)
        if tensor.dtype.kind not in "iu" and (layer is None or int(layer[1]) < _LAYERS):
            tensors[name] = np.ascontiguousarray(tensor[tuple(slice(new.get(n, n)) for n in tensor.shape)])
    del source
    (folder / "model.safetensors").unlink()
    write_safetensors(folder / "model.safetensors", tensors)
    return folder

"""Folders of small decoders, and of models of sentence-transformers that are read like them, of a few kilobytes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ..architectures import test_decoders, test_embedders
from ..architectures.decoder_cases import CONFIGS
from ..architectures.embedder_cases import CASES, write

_DECODERS = ("llama", "llama 3", "qwen3, yarn", "gemma2", "gemma3_text", "phi3, longrope", "gpt2")
_EMBEDDERS = ("embeddinggemma", "modernbert", "nomic_bert")
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}A: {{ message.content | trim }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}B:{% endif %}"
)
_FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


def tokenizer() -> dict[str, Any]:
    """A tokenizer.json of 61 tokens, as many as the decoders have: letters, and some pairs of them."""
    tokens = ["<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyzABCDT.,:!?0123456789", "\u0120", "\u010a"]
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("\u0120", "the"),
        ("i", "n"),
        ("e", "r"),
        ("o", "t"),
        ("ot", "her"),
        ("h", "er"),
    ]
    tokens += ["".join(pair) for pair in merges]
    tokens += [f"<{i}>" for i in range(61 - len(tokens))]
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": {"type": "NFC"},
        "added_tokens": [{"id": i, "content": tokens[i], **_FLAGS, "special": True} for i in range(3)],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)}, "merges": [list(pair) for pair in merges],
        },
    }  # fmt: skip


def folders(root: Path, names: Sequence[str] = (*_DECODERS, *_EMBEDDERS)) -> dict[str, Path]:
    """A folder by name, of float16 weights."""
    root.mkdir()
    return {name: (_decoder if name in CONFIGS else _embedder)(root / name, name) for name in names}


def _decoder(path: Path, name: str) -> Path:
    files: dict[str, Any] = {
        "config.json": {**CONFIGS[name], "eos_token_id": 1, "torch_dtype": "float16"},
        "tokenizer.json": tokenizer(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": {"content": "</s>"},
            "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False, "model_max_length": 200,
            "added_tokens_decoder": {"0": {"content": "<s>", **_FLAGS, "special": True}}, "chat_template": _TEMPLATE,
        },
        "generation_config.json": {
            "eos_token_id": [1, 2], "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01,
            "repetition_penalty": 1.1, "max_new_tokens": 30,
        },
    }  # fmt: skip
    path.mkdir()
    tensors = {key: a.astype(np.float16) for key, a in test_decoders.tensors(name).items()}
    first = dict(list(tensors.items())[: len(tensors) // 2])
    shards = {
        "model-1.safetensors": first,
        "model-2.safetensors": {k: a for k, a in tensors.items() if k not in first},
    }
    if name == "llama 3":  # in one file, and its template in another one
        shards = {"model.safetensors": tensors}
        del files["tokenizer_config.json"]["chat_template"]
        (path / "chat_template.jinja").write_text(_TEMPLATE)
    else:
        weight_map = {key: file for file, those in shards.items() for key in those}
        files["model.safetensors.index.json"] = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    for file, those in shards.items():
        save_file(those, path / file)
    for file, value in files.items():
        (path / file).write_text(json.dumps(value))
    return path


def _embedder(path: Path, name: str) -> Path:
    """Its first layer."""
    case = CASES[name]
    config = {**case.config, "num_hidden_layers": 1}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:1]
    recorded = json.loads(str(test_embedders.RECORDED[f"{name}.shapes"]))
    shapes = {
        key: tuple(shape) for key, shape in recorded.items() if not re.search(r"layers?\.(?!0\.)\d+\.", key)
    }
    write(path, case._replace(config=config), shapes)
    for file in path.rglob("*.safetensors"):
        tensors = test_embedders.load_file(file)
        file.unlink()
        save_file({key: a.astype(np.float16) for key, a in tensors.items()}, file)
    return path

"""Small models of every `model_type`, whose weights are random numbers: config, tensors and inputs.

`record.py` fills a model of transformers with them, the tests one of this package. They show that tensors are read
and computed with as transformers does; nothing is said about the quality of a model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_SIZES = {
    "vocab_size": 48,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "hidden_act": "gelu",
    "max_position_embeddings": 300,
}
#: by name: config.json
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert", **_SIZES, "type_vocab_size": 2, "layer_norm_eps": 1e-12},
    "distilbert": {
        "model_type": "distilbert",
        "vocab_size": 48,
        "dim": 24,
        "n_layers": 2,
        "n_heads": 3,
        "hidden_dim": 40,
        "activation": "gelu",
        "max_position_embeddings": 300,
    },
    "mpnet": {
        "model_type": "mpnet", **_SIZES, "layer_norm_eps": 1e-5, "pad_token_id": 1,
        "relative_attention_num_buckets": 32
    },
    "roberta": {
        "model_type": "roberta", **_SIZES, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1
    },
    "roberta, padding 0": {
        "model_type": "roberta", **_SIZES, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 0
    },
    "xlm-roberta": {
        "model_type": "xlm-roberta", **_SIZES, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1
    },
    "camembert": {
        "model_type": "camembert", **_SIZES, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1
    },
}  # fmt: skip
LENGTHS = np.array([9, 290, 1])


def inputs() -> NDArray[np.int64]:
    """(texts, longest) ids; behind a text zeros. All texts have the ids of padding in them, 0 and 1."""
    ids = np.random.RandomState(1).randint(0, 48, (len(LENGTHS), int(LENGTHS.max())))
    ids[:2, 3:6] = [1, 7, 0]
    return np.where(np.arange(ids.shape[1]) < LENGTHS[:, None], ids, 0).astype(np.int64)


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, NDArray[np.float32]]:
    """Random float32 tensors, the same on every machine; norms are around one."""
    random = np.random.RandomState(0)
    made = {}
    for name in sorted(shapes):
        values = random.standard_normal(shapes[name]) * 0.3
        if name.endswith("weight") and values.ndim == 1:
            values += 1.0
        made[name] = values.astype(np.float32)
    return made


# --- a tokenizer of bytes -------------------------------------------------------------------------------

TEXTS = (
    "The theatre there, then: naïve Café-goers in 東京 <mask> the end",
    " two  spaces, and a tab\tin the</s> middle <pad> of it",
    "",
)
_MERGES = (
    ("t", "h"),
    ("th", "e"),
    ("Ġ", "the"),
    ("Ġ", "t"),
    ("i", "n"),
    ("Ġ", "in"),
    ("a", "n"),
    ("an", "d"),
)


def _letters() -> list[str]:
    """A printable character for every byte, as GPT-2's byte-level BPE writes them."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return [chr(byte) if byte in kept else chr(256 + others.index(byte)) for byte in range(256)]


def bytes_tokenizer(prefix_space: bool) -> dict[str, Any]:
    """A tokenizer.json of RobertaTokenizer."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokens = [*special, *_letters(), *("".join(pair) for pair in _MERGES), "<mask>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": vocab[token],
                "content": token,
                "single_word": False,
                "lstrip": token == "<mask>",
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token in (*special, "<mask>")
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel", "add_prefix_space": prefix_space, "trim_offsets": True, "use_regex": True
        },
        "post_processor": {
            "type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0], "trim_offsets": True,
            "add_prefix_space": prefix_space,
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": vocab, "merges": [list(pair) for pair in _MERGES],
        },
    }  # fmt: skip


def tokenizer_config(prefix_space: bool) -> dict[str, Any]:
    return {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": prefix_space, "model_max_length": 290}

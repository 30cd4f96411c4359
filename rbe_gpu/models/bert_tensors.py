"""The tensors of an encoder: names, shapes and block sizes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..transforms import BLOCK_SIZES, DEFAULT_BLOCK
from .checkpoint import check_distinct, check_shapes
from .encoders import BUCKETS, canonical_name, encoder_of, with_bert_names

_PROJECTION = re.compile(r"encoder\.layer\.\d+\.attention\.(self\.(query|key|value)|output\.dense)\b")
#: attribute of `RBEAttention` or `RBEFFN` -> name of its weight in a layer
ATTENTION_WEIGHTS = {
    "query": "attention.self.query.weight",
    "key": "attention.self.key.weight",
    "value": "attention.self.value.weight",
    "output": "attention.output.dense.weight",
}
TYPES = "embeddings.token_type_embeddings.weight"
RELATIVE = "encoder.relative_attention_bias.weight"
FFN_WEIGHTS = {"up": "intermediate.dense.weight", "down": "output.dense.weight"}


def tensor_shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor that the encoder reads, by BERT's names (`encoders.canonical_name`).

    A generator, since a config from an untrusted file may claim any number of layers.
    """
    config = with_bert_names(config)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    yield "embeddings.word_embeddings.weight", (config["vocab_size"], hidden)
    yield "embeddings.position_embeddings.weight", (config["max_position_embeddings"], hidden)
    if config["type_vocab_size"]:
        yield TYPES, (config["type_vocab_size"], hidden)
    if encoder_of(config).relative_positions:
        yield RELATIVE, (BUCKETS, config["num_attention_heads"])
    yield "embeddings.LayerNorm.weight", (hidden,)
    yield "embeddings.LayerNorm.bias", (hidden,)
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}."
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            yield f"{layer}attention.{name}.weight", (hidden, hidden)
            yield f"{layer}attention.{name}.bias", (hidden,)
        yield f"{layer}intermediate.dense.weight", (inner, hidden)
        yield f"{layer}intermediate.dense.bias", (inner,)
        yield f"{layer}output.dense.weight", (hidden, inner)
        yield f"{layer}output.dense.bias", (hidden,)
        for name in ("attention.output", "output"):
            yield f"{layer}{name}.LayerNorm.weight", (hidden,)
            yield f"{layer}{name}.LayerNorm.bias", (hidden,)


def linear_weights(config: Mapping[str, Any]) -> Iterator[str]:
    """Names of the weights of linear layers, as in `tensor_shapes`."""
    for i in range(with_bert_names(config)["num_hidden_layers"]):
        for name in (*ATTENTION_WEIGHTS.values(), *FFN_WEIGHTS.values()):
            yield f"encoder.layer.{i}.{name}"


def block_of(name: str, config: Mapping[str, Any], transform: str, block: int | None) -> int:
    """The block size of a matrix: `block`, or a default if that is None.

    The default is 64; of an attention projection with a transform it is the largest size up to 64 that divides
    head_dim, so that head_dim is a multiple of it and `RBEAttention` can stay in the transform domain.
    """
    if block is None and transform != "none" and _PROJECTION.match(canonical_name(name)):
        named = with_bert_names(config)
        hidden, heads = named.get("hidden_size"), named.get("num_attention_heads")
        if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
            sizes = (b for b in BLOCK_SIZES if b <= DEFAULT_BLOCK and hidden // heads % b == 0)
            return max(sizes, default=DEFAULT_BLOCK)
    return block or DEFAULT_BLOCK


def check_tensors(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> None:
    """Raise a ValueError if tensors with these names and shapes are not those of the encoder; others are ignored."""
    names = [(name, canonical_name(name)) for name in shapes]
    used = {"embeddings", "encoder"}
    check_distinct((name, short) for name, short in names if short.partition(".")[0] in used)
    check_shapes({short: tuple(shapes[name]) for name, short in names}, tensor_shapes(config))

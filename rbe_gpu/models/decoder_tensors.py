"""The tensors of a decoder: names, shapes, and what checkpoints call them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .checkpoint import check_distinct, check_shapes
from .decoders import DecoderConfig, decoder_config
from .dense_modules import PREFIX

#: attribute of `RBEAttention` or `RBEFFN` -> name of its weight in a layer
LINEAR_PARTS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
EMBEDDINGS, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def canonical_name(name: str) -> str:
    """The name of a tensor of a checkpoint as here: those of bare models lack `model.`."""
    return name if name.startswith(("model.", PREFIX)) or name == HEAD else f"model.{name}"


def norm_names(config: DecoderConfig) -> tuple[str, ...]:
    """The norms of a layer over the hidden states, in the order in which they are applied."""
    if config.sandwich:
        return (
            "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
        )  # fmt: skip
    return "input_layernorm", "post_attention_layernorm"


def tensor_shapes(config: DecoderConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor that a decoder reads.

    A generator, since a config from an untrusted file may claim any number of layers.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield EMBEDDINGS, (config.vocab_size, hidden)
    yield FINAL_NORM, (hidden,)
    if not config.tied:
        yield HEAD, (config.vocab_size, hidden)
    shapes = {
        "query": (queries, hidden),
        "key": (keys, hidden),
        "value": (keys, hidden),
        "output": (hidden, queries),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
    }
    for i in range(config.num_layers):
        layer = f"model.layers.{i}."
        for part, name in LINEAR_PARTS.items():
            yield f"{layer}{name}.weight", shapes[part]
            if has_bias(config, part):
                yield f"{layer}{name}.bias", shapes[part][:1]
        for name in norm_names(config):
            yield f"{layer}{name}.weight", (hidden,)
        if config.head_norms:
            for name in ("q_norm", "k_norm"):
                yield f"{layer}self_attn.{name}.weight", (config.head_dim,)


def has_bias(config: DecoderConfig, part: str) -> bool:
    """Whether a linear layer of LINEAR_PARTS has a bias."""
    if part in ("query", "key", "value"):
        return config.qkv_bias
    return config.output_bias if part == "output" else config.ffn_bias


def linear_weights(config: Mapping[str, Any]) -> Iterator[str]:
    """Names of the weights of linear layers, of a config.json."""
    for i in range(config["num_hidden_layers"]):
        for name in LINEAR_PARTS.values():
            yield f"model.layers.{i}.{name}.weight"


def check_tensors(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> None:
    """Raise a ValueError if tensors with these names and shapes are not those of a decoder; others are ignored."""
    layers = config.get("num_hidden_layers")
    if type(layers) is int and layers > len(shapes):  # what a config costs is then bounded by the tensors
        raise ValueError(f"config.json has num_hidden_layers={layers}, but there are {len(shapes)} tensors")
    names = [(name, canonical_name(name)) for name in shapes]
    check_distinct(names)
    check_shapes({short: tuple(shapes[name]) for name, short in names}, tensor_shapes(decoder_config(config)))

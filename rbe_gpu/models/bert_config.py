"""Checks of the config.json that an encoder is made with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .encoders import encoder_of
from .settings import check_keys, config_table

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)


def check_config(config: Mapping[str, Any]) -> None:
    """Raise a ValueError for a config.json that this encoder does not support."""
    encoder = encoder_of(config)

    def named(name: str) -> str:
        return encoder.renamed.get(name, name)

    sizes = [*_SIZES, *(["type_vocab_size"] if encoder.token_types else [])]
    for name in map(named, sizes):
        value = config.get(name)
        if type(value) is not int or value < 1:
            raise ValueError(f"config.json has {name}={value!r}; needs a positive integer")
    hidden, heads = named("hidden_size"), named("num_attention_heads")
    if config[hidden] % config[heads]:
        raise ValueError(
            f"config.json has {hidden}={config[hidden]}, not a multiple of {heads}={config[heads]}"
        )
    check_keys(config, config_table(config), "config.json")
    if encoder.padded_positions:
        padding, rows = config.get("pad_token_id", 1), config["max_position_embeddings"]
        if type(padding) is not int or not 0 <= padding < rows - 1:
            raise ValueError(
                f"config.json has pad_token_id={padding!r}; needs an integer from 0 to {rows - 2}"
            )
    eps = config.get("layer_norm_eps", encoder.eps)
    if not isinstance(eps, int | float) or not 0 <= eps < 1:
        raise ValueError(f"config.json has layer_norm_eps={eps!r}; needs a number from 0 to 1")
    activation = config.get(named("hidden_act"), "gelu")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(
            f"config.json has {named('hidden_act')} {activation!r}; use one of {tuple(ACTIVATIONS)}"
        )

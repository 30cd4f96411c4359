"""The tensors of a decoder: names, shapes, and what checkpoints call them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from .checkpoint import check_distinct, check_shapes
from .decoders import DecoderConfig, decoder_config
from .dense_modules import PREFIX
from .tensor_views import Part

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
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FINAL_NORM, EMBEDDING_NORM, POSITIONS = "model.norm", "model.embed_norm", "model.position_embeddings.weight"
TYPES = "model.token_type_embeddings.weight"


class Layout(NamedTuple):
    """How the checkpoints of a `model_type` name and store tensors, where that differs from Llama's.

    Attributes
    ----------
    prefix : that names of checkpoints with a head begin with
    layers : what layers are called
    renamed : name of a module in a checkpoint, of a layer behind its number -> here
    fused : name of a linear layer -> those of LINEAR_PARTS that it is, one below the other
    transposed : whether the weights of `fused` are stored with inputs as rows, as `Conv1D` of transformers does
    unread : modules of a layer whose tensors are no weights
    """

    prefix: str
    layers: str
    renamed: Mapping[str, str]
    fused: Mapping[str, tuple[str, ...]]
    transposed: bool = False
    unread: tuple[str, ...] = ()


#: by model_type of config.json
LAYOUTS = {
    "gpt2": Layout(
        "transformer.",
        "h",
        {
            "wte": "embed_tokens",
            "wpe": "position_embeddings",
            "ln_f": "norm",
            "ln_1": "input_layernorm",
            "ln_2": "post_attention_layernorm",
        },
        {
            "attn.c_attn": ("query", "key", "value"),
            "attn.c_proj": ("output",),
            "mlp.c_fc": ("up",),
            "mlp.c_proj": ("down",),
        },
        transposed=True,
        unread=("attn.bias", "attn.masked_bias"),  # masks of causal attention
    ),
    "phi3": Layout(
        "model.",
        "layers",
        {},
        {"self_attn.qkv_proj": ("query", "key", "value"), "mlp.gate_up_proj": ("gate", "up")},
    ),
    "nomic_bert": Layout(
        "nomic_bert.",
        "layers",
        {
            "embeddings.word_embeddings": "embed_tokens",
            "embeddings.token_type_embeddings": "token_type_embeddings",
            "emb_ln": "embed_norm",
            "embeddings.LayerNorm": "embed_norm",
            "norm1": "post_attention_layernorm",
            "norm2": "post_feedforward_layernorm",
            "post_mlp_layernorm": "post_feedforward_layernorm",
        },
        {
            "attn.Wqkv": ("query", "key", "value"),
            "attn.out_proj": ("output",),
            "mlp.fc11": ("up",),
            "mlp.fc12": ("gate",),
            "mlp.fc2": ("down",),
        },
    ),
    "modernbert": Layout(
        "model.",
        "layers",
        {
            "embeddings.tok_embeddings": "embed_tokens",
            "embeddings.norm": "embed_norm",
            "final_norm": "norm",
            "attn_norm": "input_layernorm",
            "mlp_norm": "post_attention_layernorm",
        },
        {
            "attn.Wqkv": ("query", "key", "value"),
            "attn.Wo": ("output",),
            "mlp.Wi": ("gate", "up"),
            "mlp.Wo": ("down",),
        },
    ),
}
_LAYER = re.compile(r"(?:encoder\.)?(layers|h)\.(\d+)\.(.+)")


def canonical_name(name: str) -> str:
    """The name of a tensor of a checkpoint as here: those of bare models lack `model.`."""
    return name if name.startswith(("model.", PREFIX)) or name == HEAD else f"model.{name}"


def norm_names(config: DecoderConfig) -> tuple[str, ...]:
    """The norms of a layer over the hidden states, in the order in which they are applied (`has_norm`)."""
    if config.sandwich:
        return (
            "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
        )  # fmt: skip
    if config.post_norm:
        return "post_attention_layernorm", "post_feedforward_layernorm"
    return "input_layernorm", "post_attention_layernorm"


def has_norm(config: DecoderConfig, index: int, name: str) -> bool:
    """Whether a layer has a norm of `norm_names`: the first one none where embeddings are normalised."""
    return not (config.embedding_norm and index == 0 and name == "input_layernorm")


def linear_parts(config: DecoderConfig) -> dict[str, str]:
    """LINEAR_PARTS of a decoder: those without a gate lack it."""
    return {part: name for part, name in LINEAR_PARTS.items() if config.gated or part != "gate"}


def linear_shapes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """The shape of the weight of each of LINEAR_PARTS."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "query": (queries, hidden),
        "key": (keys, hidden),
        "value": (keys, hidden),
        "output": (hidden, queries),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
    }


def is_unread(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor of a checkpoint is no weight (`Layout.unread`)."""
    layout = LAYOUTS.get(str(config["model_type"]))
    layer = None if layout is None else _LAYER.fullmatch(name.removeprefix(layout.prefix))
    return layout is not None and layer is not None and layer[3] in layout.unread


def parts_of(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, Part] | None:
    """What the tensors of a checkpoint are here: name here -> part of a tensor; None where they are as they are.

    names : in the checkpoint; those that are of no module of the model keep their names

    Raises
    ------
    ValueError
        Two tensors are the same weight.
    """
    layout = LAYOUTS.get(str(config["model_type"]))
    if layout is None:
        return None
    settings = decoder_config(config)
    shapes = linear_shapes(settings)
    parts: list[tuple[str, Part]] = []
    for name in names:
        short = name.removeprefix(layout.prefix)
        layer = _LAYER.fullmatch(short)
        if layer is not None and layer[1] != layout.layers:
            layer = None
        at, short = ("model.", short) if layer is None else (f"model.layers.{layer[2]}.", layer[3])
        module, _, kind = short.rpartition(".")
        if layer is not None and module in layout.fused:
            transposed = layout.transposed and kind == "weight"
            start = 0
            for part in layout.fused[module]:
                stop = start + shapes[part][0]
                parts.append((f"{at}{LINEAR_PARTS[part]}.{kind}", Part(name, start, stop, transposed)))
                start = stop
        elif layer is not None or module in layout.renamed:
            parts.append((f"{at}{layout.renamed.get(module, module)}.{kind}", Part(name)))
        else:
            parts.append((name, Part(name)))
    check_distinct((part.name, here) for here, part in parts)
    return dict(parts)


def tensor_shapes(config: DecoderConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor that a decoder reads.

    A generator, since a config from an untrusted file may claim any number of layers.
    """
    hidden, shapes = config.hidden_size, linear_shapes(config)

    def norm(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (hidden,)
        if config.norm_bias:
            yield f"{name}.bias", (hidden,)

    yield EMBEDDINGS, (config.vocab_size, hidden)
    if not config.post_norm:
        yield from norm(FINAL_NORM)
    if config.embedding_norm:
        yield from norm(EMBEDDING_NORM)
    if config.token_types:
        yield TYPES, (config.token_types, hidden)
    if config.learned_positions:
        yield POSITIONS, (config.max_positions, hidden)
    if not config.tied:
        yield HEAD, (config.vocab_size, hidden)
    for i in range(config.num_layers):
        layer = f"model.layers.{i}."
        for part, name in linear_parts(config).items():
            yield f"{layer}{name}.weight", shapes[part]
            if has_bias(config, part):
                yield f"{layer}{name}.bias", shapes[part][:1]
        for name in norm_names(config):
            if has_norm(config, i, name):
                yield from norm(f"{layer}{name}")
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
    settings = decoder_config(config)
    for i in range(settings.num_layers):
        for name in linear_parts(settings).values():
            yield f"model.layers.{i}.{name}.weight"


def check_tensors(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> None:
    """Raise a ValueError if tensors with these names and shapes are not those of a decoder; others are ignored."""
    settings = decoder_config(config)
    if settings.num_layers > len(shapes):  # what a config costs is then bounded by the tensors
        raise ValueError(f"config.json has {settings.num_layers} layers, but there are {len(shapes)} tensors")
    names = [(name, canonical_name(name)) for name in shapes]
    check_distinct(names)
    check_shapes({short: tuple(shapes[name]) for name, short in names}, tensor_shapes(settings))

"""The decoders that load, and where each differs from Llama: one `Family` for each `model_type`.

All are stacks of attention and a feed-forward part, normalised before each. They differ in the kind of norm, in norms
of queries and keys and behind the parts, in positions, biases, gates and windows of attention. Two encoders are built
so, too: ModernBERT (Warner et al. 2024) and, but for the place of its norms, NomicBERT (Nussbaum et al. 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

from ..layers.ffn import GATED
from .bert_config import ACTIVATIONS as UNGATED
from .rope_frequencies import KINDS, check_positive, check_rope, first_context, rope_parameters
from .settings import check_keys, fail

MOST_LAYERS = 10_000
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Family:
    """How the decoders of one `model_type` differ from Llama.

    Attributes
    ----------
    qkv_bias : whether queries, keys and values have a bias, whatever config.json says
    reads_bias : whether `attention_bias` of config.json says so of all four linear layers of attention
    ffn_bias : whether `mlp_bias` says so of the feed-forward part
    head_norms : whether queries and keys are normalised head by head
    sandwich : whether the results of attention and of the feed-forward part are normalised, too, before they are
        added; and norms scale by 1 + weight, word embeddings by sqrt(hidden_size)
    windows : whether layers may see only the last `sliding_window` tokens
    thetas : of the layers without and with a window, where they differ, the key of config.json and its default; None:
        all layers rotate alike
    rope_kinds : of rotary embeddings that it may have
    partial_rotary : whether `partial_rotary_factor` may say that a part of the features is rotated
    theta : of the rotary frequencies, where config.json has none and all layers rotate alike
    scaled_local : whether rope_scaling is of the layers with a window, too
    both_directions : whether `use_bidirectional_attention` lets tokens see those behind them
    encoder : whether tokens always do; such a model makes vectors and generates no text
    renamed : Llama's name of a setting in config.json -> its name there, where that is, or may be, another
    norm : "rms" (RMSNorm) or "layer" (LayerNorm)
    norm_bias : whether LayerNorms have a bias; else `norm_bias` of config.json says so
    post_norm : whether norms are not before the parts but behind them, of the sum, and there is none at the end
    token_types : whether the embedding of token type 0 is added to those of the words
    linear_bias : whether all linear layers have a bias
    learned_positions : whether positions are embeddings that are added to those of the words, in place of rotations
    gated : whether the feed-forward part has a gate
    tied : whether logits are computed with the word embeddings, where config.json does not say
    embedding_norm : whether word embeddings are normalised, and then not again before the first attention
    eps : the key of config.json, and its default
    activation : the key of config.json, and its default
    eos : the token that ends a text, where config.json does not say
    softcaps : soft caps of the scores of attention and of the logits, where config.json does not say; None: there are
        none
    """

    qkv_bias: bool = False
    reads_bias: bool = False
    ffn_bias: bool = False
    head_norms: bool = False
    sandwich: bool = False
    windows: bool = False
    thetas: Mapping[str, tuple[str, float]] | None = None
    rope_kinds: tuple[str, ...] = KINDS
    partial_rotary: bool = False
    theta: float = 1e4
    scaled_local: bool = False
    both_directions: bool = False
    encoder: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)
    norm: str = "rms"
    norm_bias: bool = False
    post_norm: bool = False
    token_types: bool = False
    linear_bias: bool = False
    learned_positions: bool = False
    gated: bool = True
    tied: bool = False
    embedding_norm: bool = False
    eps: tuple[str, float] = ("rms_norm_eps", 1e-6)
    activation: tuple[str, str] = ("hidden_act", "silu")
    eos: int | None = None
    softcaps: tuple[float, float] | None = None


#: by model_type of config.json
DECODERS: dict[str, Family] = {
    "llama": Family(reads_bias=True, ffn_bias=True, eos=2),
    "mistral": Family(windows=True, eos=2),
    "qwen2": Family(qkv_bias=True, windows=True),
    "qwen3": Family(reads_bias=True, head_norms=True, windows=True),
    "gemma2": Family(
        reads_bias=True, eos=1, sandwich=True, windows=True, tied=True,
        activation=("hidden_activation", "gelu_pytorch_tanh"), softcaps=(50.0, 30.0),
    ),
    "gemma3_text": Family(
        reads_bias=True, eos=1, head_norms=True, sandwich=True, windows=True, both_directions=True, tied=True,
        thetas={FULL: ("rope_theta", 1e6), SLIDING: ("rope_local_base_freq", 1e4)},
        activation=("hidden_activation", "gelu_pytorch_tanh"),
    ),
    # what Phi-3 calls yarn is another embedding
    "phi3": Family(
        windows=True, rope_kinds=("default", "longrope"), partial_rotary=True, eps=("rms_norm_eps", 1e-5), eos=32000,
    ),
    "gpt2": Family(
        renamed={
            "hidden_size": "n_embd", "intermediate_size": "n_inner", "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head", "max_position_embeddings": "n_positions",
        },
        norm="layer", norm_bias=True, linear_bias=True, learned_positions=True, gated=False, tied=True,
        eps=("layer_norm_epsilon", 1e-5), activation=("activation_function", "gelu_new"), eos=50256,
    ),
    "modernbert": Family(
        reads_bias=True, ffn_bias=True, windows=True, scaled_local=True, encoder=True, norm="layer", tied=True,
        thetas={FULL: ("global_rope_theta", 160_000.0), SLIDING: ("local_rope_theta", 1e4)},
        embedding_norm=True, eps=("norm_eps", 1e-5), activation=("hidden_activation", "gelu"),
    ),
    # the names of the model's own code, and in transformers 5 those of Llama
    "nomic_bert": Family(
        renamed={
            "hidden_size": "n_embd", "intermediate_size": "n_inner", "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head", "max_position_embeddings": "n_positions",
            "layer_norm_eps": "layer_norm_epsilon", "rope_theta": "rotary_emb_base",
        },
        encoder=True, norm="layer", norm_bias=True, post_norm=True, token_types=True, embedding_norm=True, tied=True,
        rope_kinds=("default", "linear"), theta=1000.0, eps=("layer_norm_eps", 1e-12),
    ),
}  # fmt: skip
#: activation of config.json -> of `RBEFFN`
ACTIVATIONS = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_pytorch_tanh": "geglu_tanh",
    "gelu_new": "geglu_tanh",
    "relu": "reglu",
}
#: keys of NomicBERT whose defaults are not those of the models that were published
_NOMIC_DEFAULTS = (
    *("activation_function", "layer_norm_epsilon", "rotary_emb_base", "rotary_emb_fraction"),
    *("qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias"),
)
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class DecoderConfig:
    """What a decoder is, of a checked config.json.

    Attributes
    ----------
    first_context : texts of more tokens have other rotary frequencies, at every position (LongRoPE); None: all have
        the same
    activation : of `RBEFFN`; a gated one where the feed-forward part has a gate
    qkv_bias, output_bias, ffn_bias : whether the linear layers of queries, keys and values, of the output of
        attention, and of the feed-forward part have a bias
    head_norms, sandwich, norm, post_norm, embedding_norm, learned_positions : as in `Family`
    norm_bias : whether norms have a bias
    token_types : rows of the embeddings of token types; 0 for none
    embedding_scale : of the word embeddings; 1 but for Gemma
    scale : of the scores of attention
    attention_softcap, logit_softcap : soft caps of the scores of attention (`rbe_gpu.attention`) and of the logits
    tied : whether logits are computed with the word embeddings
    causal : whether a token sees only those before it and itself
    windows : for each layer how far a token sees: those less than so many tokens away; None: all
    rotary : the rotary embedding of each type of layer, as `rope_parameters` has it; none with learned positions
    eos : tokens that end a text
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    first_context: int | None
    eps: float
    activation: str
    qkv_bias: bool
    output_bias: bool
    ffn_bias: bool
    head_norms: bool
    sandwich: bool
    norm: str
    norm_bias: bool
    post_norm: bool
    embedding_norm: bool
    token_types: int
    learned_positions: bool
    embedding_scale: float
    scale: float
    attention_softcap: float | None
    logit_softcap: float | None
    tied: bool
    causal: bool
    windows: tuple[int | None, ...]
    rotary: dict[str, dict[str, Any]]
    eos: tuple[int, ...]

    @property
    def gated(self) -> bool:
        """Whether the feed-forward part has a gate."""
        return self.activation in GATED

    def layer_type(self, index: int) -> str:
        return FULL if self.windows[index] is None else SLIDING


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a config.json describes.

    Raises
    ------
    ValueError
        It is not supported; the message names the key.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in DECODERS:
        shown_type = str(model_type)[:60]
        raise ValueError(f"config.json has model_type {shown_type!r}; supported: {', '.join(DECODERS)}")
    family = DECODERS[model_type]
    check_keys(config, f"config.json ({model_type})", "config.json")
    if model_type == "nomic_bert" and "n_embd" in config:
        for name in _NOMIC_DEFAULTS:
            if name not in config:
                raise ValueError(
                    f"config.json has no {name}, for which the model's own code has another default"
                )
    _check_names(config, family)
    config = with_llama_names(config)
    for name in _SIZES:
        if type(config.get(name)) is not int or config[name] < 1:
            fail("config.json", _own_name(config, name), config.get(name), "a positive integer")
    if config["num_hidden_layers"] > MOST_LAYERS:  # what a config alone can cost is bounded
        name = _own_name(config, "num_hidden_layers")
        fail("config.json", name, config["num_hidden_layers"], f"at most {MOST_LAYERS}")
    heads, kv_heads, head_dim = _head_sizes(config, family)
    bias = family.linear_bias or (_flag(config, "attention_bias", False) and family.reads_bias)
    causal = not family.encoder
    if family.both_directions:
        causal = not _flag(config, "use_bidirectional_attention", False)
    windows = _windows(config, family, model_type)
    if not causal:  # the window of config.json is that of both directions together
        windows = tuple(None if window is None else window // 2 + 1 for window in windows)
    rotary = _rotary(config, family, windows, head_dim)
    attention_softcap, logit_softcap = _softcaps(config, family)
    positions = config["max_position_embeddings"]
    contexts = [context for context in map(first_context, rotary.values()) if context is not None]
    return DecoderConfig(
        model_type=model_type,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=positions,
        # no text exceeds one that holds all positions
        first_context=min((context for context in contexts if context < positions), default=None),
        eps=_eps(config, family),
        activation=_activation(config, family),
        qkv_bias=bias or family.qkv_bias,
        output_bias=bias,
        ffn_bias=family.linear_bias or (_flag(config, "mlp_bias", False) and family.ffn_bias),
        head_norms=family.head_norms,
        sandwich=family.sandwich,
        norm=family.norm,
        norm_bias=family.norm_bias or (family.norm == "layer" and _flag(config, "norm_bias", False)),
        post_norm=family.post_norm,
        token_types=_positive(config, "type_vocab_size") if family.token_types else 0,
        embedding_norm=family.embedding_norm,
        learned_positions=family.learned_positions,
        embedding_scale=sqrt(config["hidden_size"]) if family.sandwich else 1.0,
        scale=_scale(config, family, head_dim),
        attention_softcap=attention_softcap,
        logit_softcap=logit_softcap,
        tied=family.encoder or _flag(config, "tie_word_embeddings", family.tied),
        causal=causal,
        windows=windows,
        rotary=rotary,
        eos=token_ids(config.get("eos_token_id", family.eos), "config.json", "eos_token_id"),
    )


def _head_sizes(config: Mapping[str, Any], family: Family) -> tuple[int, int, int]:
    """num_heads, num_kv_heads and head_dim."""
    heads = config["num_attention_heads"]
    kv_heads = _optional_size(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        fail("config.json", "num_key_value_heads", kv_heads, f"a divisor of num_attention_heads={heads}")
    hidden = config["hidden_size"]
    head_dim = _optional_size(config, "head_dim", hidden // heads)
    own_size = config.get("head_dim") is not None
    if not 2 <= head_dim <= 256 or head_dim % 2 or (family.renamed and not own_size and hidden % heads):
        if own_size:
            fail("config.json", "head_dim", head_dim, "an even number from 2 to 256")
        name, width = _own_name(config, "num_attention_heads"), _own_name(config, "hidden_size")
        fail(
            "config.json",
            name,
            heads,
            f"a divisor of {width}={hidden}, with heads of an even width from 2 to 256",
        )
    return heads, kv_heads, head_dim


def _eps(config: Mapping[str, Any], family: Family) -> float:
    key, default = family.eps
    eps = config.get(key, default)
    if type(eps) not in (int, float) or not 0 <= eps < 1:
        fail("config.json", _own_name(config, key), eps, "a number from 0 to 1")
    return float(eps)


def _activation(config: Mapping[str, Any], family: Family) -> str:
    """The activation of `RBEFFN`."""
    key, default = family.activation
    activation = config.get(key) or default
    activations = ACTIVATIONS if family.gated else UNGATED
    if not isinstance(activation, str) or activation not in activations:
        fail("config.json", key, activation, f"one of {', '.join(activations)}")
    return activations[activation]


def _rotary(
    config: Mapping[str, Any], family: Family, windows: tuple[int | None, ...], head_dim: int
) -> dict[str, dict[str, Any]]:
    """The rotary embedding of each type of layer."""
    if family.learned_positions:
        return {}
    rotary = {}
    for layer_type in sorted({FULL if window is None else SLIDING for window in windows}):
        rotary[layer_type] = rope_parameters(config, layer_type, family)
        check_rope(rotary[layer_type], head_dim, family.rope_kinds, family.partial_rotary)
    return rotary


def _scale(config: Mapping[str, Any], family: Family, head_dim: int) -> float:
    """The factor of the scores of attention."""
    scalar = config.get("query_pre_attn_scalar", 256) if family.sandwich else head_dim
    check_positive("query_pre_attn_scalar", scalar)
    return 1.0 / sqrt(scalar if _flag(config, "scale_attn_weights", True) else 1)


def _softcaps(config: Mapping[str, Any], family: Family) -> tuple[float | None, float | None]:
    """Soft caps of the scores of attention and of the logits."""
    if family.softcaps is None:
        return None, None
    names = "attn_logit_softcapping", "final_logit_softcapping"
    caps = [config.get(name, default) for name, default in zip(names, family.softcaps, strict=True)]
    for name, cap in zip(names, caps, strict=True):
        if cap is not None and (type(cap) not in (int, float) or not 1e-6 <= cap <= 1e6):
            fail("config.json", name, cap, "a number from 1e-6 to 1e6, or null")
    return caps[0], caps[1]


def _own_name(config: Mapping[str, Any], name: str) -> str:
    """What a config.json calls a setting, or would call it."""
    other = DECODERS[config["model_type"]].renamed.get(name, name)
    return name if name in config and other not in config else other


def _positive(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if type(value) is not int or value < 1:
        fail("config.json", name, value, "a positive integer")
    return value


def with_llama_names(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config.json with its settings under Llama's names, too."""
    family = DECODERS.get(str(config.get("model_type")))
    if family is None or not family.renamed:
        return config
    own = family.renamed.items()
    named = {**config, **{name: config[other] for name, other in own if config.get(other) is not None}}
    width = named.get("hidden_size")
    if named.get("intermediate_size") is None and type(width) is int:
        named["intermediate_size"] = 4 * width
    return named


def _check_names(config: Mapping[str, Any], family: Family) -> None:
    """Raise a ValueError where one setting has two values, under Llama's name and the family's own."""
    for name, other in family.renamed.items():
        values = config.get(name), config.get(other)
        if None not in values and values[0] != values[1]:
            fail("config.json", name, values[0], f"{other}={values[1]}, or absent")
    if config.get("activation_function") == "swiglu" and config.get("hidden_act", "silu") not in (
        "silu",
        "swish",
    ):
        fail("config.json", "hidden_act", config["hidden_act"], "silu, beside activation_function")


def token_ids(value: Any, where: object, name: str) -> tuple[int, ...]:
    """A token id, a list of them, or null, as a tuple."""
    if value is None:
        return ()
    ids = value if isinstance(value, list | tuple) else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        fail(where, name, value, "a token id, or a list of them")
    return tuple(ids)


def _optional_size(config: Mapping[str, Any], name: str, default: int) -> int:
    value = config.get(name)
    if value is None:
        return default
    if type(value) is not int or value < 1:
        fail("config.json", name, value, "a positive integer")
    return value


def _flag(config: Mapping[str, Any], name: str, default: bool) -> bool:
    value = config.get(name, default)
    if type(value) is not bool:
        fail("config.json", name, value, "true or false")
    return value


#: a window of more tokens than any text has; kernels take windows as integers of 32 and 64 bits
_WHOLE_TEXT = 1 << 30


def _windows(config: Mapping[str, Any], family: Family, model_type: str) -> tuple[int | None, ...]:
    """For each layer the window of config.json, or None for all tokens."""
    layers = config["num_hidden_layers"]
    key = "local_attention" if family.encoder else "sliding_window"
    window = config.get(key, {"modernbert": 128, "phi3": None}.get(model_type, 4096))
    uses = _flag(config, "use_sliding_window", not model_type.startswith("qwen"))
    if not family.windows or window is None or not uses:
        window = None
    elif type(window) is not int or window < 1:
        fail("config.json", key, window, "a positive integer or null")
    else:
        window = min(window, _WHOLE_TEXT)
    types = config.get("layer_types")
    if types is not None:
        known = isinstance(types, list) and all(kind in (FULL, SLIDING) for kind in types)
        if not known or len(types) != layers:
            fail("config.json", "layer_types", types, f"{layers} times {FULL} or {SLIDING}")
        if window is None and SLIDING in types:
            fail("config.json", key, config.get(key), "a number, as layer_types has it")
        return tuple(window if kind == SLIDING else None for kind in types)
    if model_type in ("gemma2", "gemma3_text", "modernbert") and window is None:
        fail("config.json", key, config.get(key), "a positive integer")
    if model_type == "modernbert":
        pattern = _optional_size(config, "global_attn_every_n_layers", 3)
        return tuple(window if i % pattern else None for i in range(layers))
    if model_type == "gemma3_text":
        name = "sliding_window_pattern" if "sliding_window_pattern" in config else "_sliding_window_pattern"
        pattern = _optional_size(config, name, 6)
        return tuple(window if (i + 1) % pattern else None for i in range(layers))
    if model_type == "gemma2":
        return tuple(None if i % 2 else window for i in range(layers))
    first = config.get("max_window_layers", 28) if model_type.startswith("qwen") else 0
    if type(first) is not int or first < 0:
        fail("config.json", "max_window_layers", first, "an integer from 0")
    return tuple(window if i >= first else None for i in range(layers))

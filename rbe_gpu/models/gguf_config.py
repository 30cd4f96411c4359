"""What the metadata of a GGUF file says about a decoder: a config as in config.json, and its tensors.

Every key is honoured, has no effect on results, or is refused; so is a key that is not listed, because it may change
them (`KEYS`, shown in docs/models.md). What a key means, and its value where it is absent, is as in llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import inf
from typing import Any, NamedTuple, NoReturn

from ..json_checks import quoted
from .gguf_header import Header, List
from .setting_key import Key
from .settings import same, shown
from .settings import table as settings_table


def _honoured(effect: str) -> Key:
    return Key(effect, None, True)


def _only(*accepted: Any, effect: str) -> Key:
    return Key(effect, accepted)


_OFF = (0, 0.0, False)
_MODEL: dict[str, Key] = {
    "vocab_size": _honoured("must be the rows of `token_embd.weight`"),
    "context_length": _honoured("`max_position_embeddings`"),
    "embedding_length": _honoured("`hidden_size`"),
    "block_count": _honoured("`num_hidden_layers`"),
    "feed_forward_length": _honoured("`intermediate_size`; the same in every layer"),
    "attention.head_count": _honoured("`num_attention_heads`; the same in every layer"),
    "attention.head_count_kv": _honoured(
        "`num_key_value_heads`; the same in every layer; absent: as many as heads"
    ),
    "attention.key_length": _honoured("`head_dim`; absent: `embedding_length / attention.head_count`"),
    "attention.value_length": _honoured("must be `attention.key_length`"),
    "attention.layer_norm_rms_epsilon": _honoured("`rms_norm_eps`"),
    "attention.sliding_window": _honoured("refused unless 0 or at least `context_length`"),
    "rope.dimension_count": _honoured("must be `head_dim`: RoPE of a part of the head is not supported"),
    "rope.freq_base": _honoured("`rope_theta`; absent: 10000"),
    "rope.scaling.type": _honoured("`none` or `linear`; absent: `linear`"),
    "rope.scaling.factor": _honoured("`rope_scaling` of type `linear`; absent or 0: 1"),
    "rope.scale_linear": _honoured("an old name of `rope.scaling.factor`"),
    "rope.scaling.attn_factor": _only(1, 1.0, effect="RoPE with a scaled amplitude is not supported"),
    "rope.scaling.original_context_length": Key("of YaRN, which is refused"),
    "rope.scaling.finetuned": Key("description"),
    "tensor_data_layout": _only("Meta AI original pth", effect="rows in another order are not supported"),
    "attention.causal": _only(True, effect="only causal attention is supported"),
    "attention.clamp_kqv": _only(*_OFF, effect="clamped activations are not supported"),
    "attention.max_alibi_bias": _only(*_OFF, effect="ALiBi is not supported"),
    "attn_logit_softcapping": _only(*_OFF, effect="soft-capped scores are not supported"),
    "final_logit_softcapping": _only(*_OFF, effect="soft-capped logits are not supported"),
    "pooling_type": _only(0, effect="only generation is supported, not vectors of texts"),
    "use_parallel_residual": _only(False, effect="parallel residual connections are not supported"),
    "expert_count": _only(0, effect="mixtures of experts are not supported"),
    "expert_used_count": _only(0, effect="mixtures of experts are not supported"),
}
_GEMMA: dict[str, Key] = {
    **_MODEL,
    "attention.sliding_window": _honoured("`sliding_window`; absent or 0: every layer has full attention"),
    "attention.sliding_window_pattern": _honoured(
        "n: every n-th layer has full attention, the others the window (`layer_types`); or true for the layers with "
        "the window; absent: 6"
    ),
    "rope.freq_base_swa": _honoured("`rope_local_base_freq`, of layers with the window; absent: 10000"),
}
_GENERAL: dict[str, Key] = {
    "general.architecture": _honoured("`model_type`: llama (also Mistral, SmolLM2), qwen2, qwen3, gemma3"),
    "general.alignment": _honoured("of the tensors' bytes in the file; absent: 32"),
    "general.type": _only("model", effect="adapters, projectors and importance matrices are no models"),
    "general.quantization_version": _only(2, effect="blocks of another version are not supported"),
    "general.*": Key("description"),
}
_SPECIAL = "`bos_token_id`", "`eos_token_id`", "`pad_token_id`"
_TOKENIZER: dict[str, Key] = {
    "tokenizer.ggml.model": _honoured(
        "`gpt2` (byte-level BPE), `llama` (SentencePiece BPE); absent, `no_vocab` or `none`: there is no tokenizer"
    ),
    "tokenizer.ggml.pre": _honoured("of `gpt2`: how text is split into words (`gguf_tokenizer.SPLITS`)"),
    "tokenizer.ggml.tokens": _honoured("the vocabulary, one token for each row of `token_embd.weight`"),
    "tokenizer.ggml.token_type": _honoured("which tokens are special, user-defined, bytes or unused"),
    "tokenizer.ggml.scores": _honoured("of `llama`: in which order pieces are merged; of `gpt2`: not read"),
    "tokenizer.ggml.merges": _honoured("of `gpt2`: in which order pieces are merged"),
    "tokenizer.ggml.bos_token_id": _honoured(_SPECIAL[0]),
    "tokenizer.ggml.eos_token_id": _honoured(_SPECIAL[1]),
    "tokenizer.ggml.eot_token_id": _honoured("ends generation, too: `eos_token_id` becomes a list"),
    "tokenizer.ggml.eom_token_id": _honoured("ends generation, too: `eos_token_id` becomes a list"),
    "tokenizer.ggml.padding_token_id": _honoured(_SPECIAL[2]),
    "tokenizer.ggml.unknown_token_id": _honoured("of `llama`: what text outside of the vocabulary becomes"),
    "tokenizer.ggml.add_bos_token": _honoured(
        "texts begin with the token `bos_token_id`; absent: true for `llama` and for `gpt2` split as Llama 3"
    ),
    "tokenizer.ggml.add_eos_token": _honoured("texts end with the token `eos_token_id`; absent: false"),
    "tokenizer.ggml.add_space_prefix": _honoured(
        "of `llama`: texts begin with a space; absent: true; not of Gemma and `gpt2`"
    ),
    "tokenizer.ggml.add_sep_token": _only(False, effect="separators are not supported"),
    "tokenizer.ggml.remove_extra_whitespaces": _only(False, effect="not supported"),
    "tokenizer.chat_template": _honoured("`GGUFModel.chat_template`"),
    **dict.fromkeys(
        ("tokenizer.chat_template.*", "tokenizer.chat_templates"), Key("further templates, by name")
    ),
    "tokenizer.huggingface.json": Key("not read"),
    **dict.fromkeys(
        (
            *(f"tokenizer.ggml.fim_{name}_token_id" for name in ("pre", "suf", "mid", "pad", "rep", "sep")),
            *(f"tokenizer.ggml.{name}_token_id" for name in ("prefix", "suffix", "middle")),
            *(f"tokenizer.ggml.{name}_token_id" for name in ("seperator", "cls", "mask")),
        ),
        Key("of infilling and of encoders"),
    ),
}
_OTHERS: dict[str, Key] = {
    "split.count": _only(0, 1, effect="the model is split into several files; merge them (llama-gguf-split)"),
    "split.no": _only(0, effect="the model is split into several files; merge them (llama-gguf-split)"),
    "split.tensors.count": Key("description"),
    "quantize.*": Key("description"),
    "mradermacher.*": Key("description"),
}
#: group -> key -> what it does; the keys of an architecture are written without its name in front, "*": any ending
KEYS: dict[str, dict[str, Key]] = {
    "general": _GENERAL,
    "llama, qwen2, qwen3": _MODEL,
    "gemma3": _GEMMA,
    "tokenizer": _TOKENIZER,
    "others": _OTHERS,
}


class Architecture(NamedTuple):
    """How a `general.architecture` is called in config.json, and what sets its tensors apart.

    Attributes
    ----------
    biases : projections that must have (True), or may have (None), biases
    halves : q and k are interleaved for llama.cpp's RoPE, and are put back into halves
    qk_norm : q and k are normalised, head by head
    gemma : norms before and after, stored as 1 + w
    """

    model_type: str
    architectures: str
    keys: dict[str, Key]
    biases: bool | None = False
    halves: bool = False
    qk_norm: bool = False
    gemma: bool = False


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", _MODEL, biases=None, halves=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _MODEL, biases=True),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _MODEL, qk_norm=True),
    "gemma3": Architecture("gemma3_text", "Gemma3ForCausalLM", _GEMMA, qk_norm=True, gemma=True),
}


class Part(NamedTuple):
    """A tensor as the file stores it.

    Attributes
    ----------
    name : in the file
    shape : as in Hugging Face's checkpoint
    heads : rows are interleaved by head for this many heads; 0: they are not
    minus_one : the file has 1 + w
    """

    name: str
    shape: tuple[int, ...]
    heads: int = 0
    minus_one: bool = False


# --- the keys -----------------------------------------------------------------------------------------


def table() -> str:
    """`KEYS` as Markdown, for docs/models.md."""
    return settings_table(KEYS, {}, "| keys of | key | results | |")


def architecture(header: Header) -> tuple[str, Architecture]:
    """The architecture that a file names; others are refused."""
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(
            f"{header.where}: general.architecture={_shown(name)}; supported: {', '.join(ARCHITECTURES)}"
        )
    return name, ARCHITECTURES[name]


def check_keys(header: Header) -> None:
    """Refuse keys that are not listed in `KEYS`, and values that are not supported."""
    name, of = architecture(header)
    known = {
        **_GENERAL,
        **_TOKENIZER,
        **_OTHERS,
        **{f"{name}.{key}": value for key, value in of.keys.items()},
    }
    endings = tuple((key[:-1], value) for key, value in known.items() if key.endswith("*"))
    for key, value in header.metadata.items():
        entry = known.get(key) or next((entry for start, entry in endings if key.startswith(start)), None)
        if entry is None:
            raise ValueError(
                f"{header.where}: unknown key {quoted(key)}, which may change results; remove it if it does not"
            )
        if entry.accepted is not None and not any(same(_json(value), a) for a in entry.accepted):
            raise ValueError(f"{header.where}: {key}={_shown(value)}: {entry.effect}")


def _json(value: Any) -> Any:
    return value if not isinstance(value, List) else f"a list of {value.items}"


def _shown(value: Any) -> str:
    return shown(_json(value))


class _Values:
    """The checked values of an architecture's keys."""

    def __init__(self, header: Header, prefix: str) -> None:
        self.header, self.prefix = header, prefix

    def fail(self, key: str, value: Any, needs: str) -> NoReturn:
        raise ValueError(f"{self.header.where}: {key}={_shown(value)}; needs {needs}")

    def get(self, key: str) -> Any:
        return self.header.metadata.get(f"{self.prefix}.{key}")

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not least <= value < 1 << 31:
            self.fail(f"{self.prefix}.{key}", value, f"an integer from {least} on")
        return value

    def for_all_layers(self, key: str, layers: int, default: int | None = None) -> int:
        """An integer, or one for each layer, all equal."""
        value = self.get(key)
        if isinstance(value, list):
            if len(value) != layers or len(set(value)) != 1 or type(value[0]) is not int or value[0] < 1:
                self.fail(f"{self.prefix}.{key}", value, f"the same positive integer for all {layers} layers")
            return int(value[0])
        return self.integer(key, default)

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float) or not 0 < value < inf:
            self.fail(f"{self.prefix}.{key}", value, "a positive number")
        return float(value)

    def token(self, name: str, vocab_size: int) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        value = self.header.metadata.get(key)
        if value is not None and (type(value) is not int or not 0 <= value < vocab_size):
            self.fail(key, value, f"a token below {vocab_size}")
        return value


# --- the config ---------------------------------------------------------------------------------------


def config_of(header: Header) -> dict[str, Any]:
    """The metadata as a config.json of transformers. Its keys must have passed `check_keys`.

    attention_bias is true where q, k and v have biases: of a llama o has one too, of a qwen2 it has none.
    eos_token_id is a list where the file has tokens that end a turn or a message, too. rope_scaling is None,
    {"rope_type": "linear", "factor": ...}, or for llama.cpp's form of Llama 3's scaling {"rope_type": "factors",
    "factors": [head_dim / 2 numbers]}, by which the frequencies are divided.
    """
    name, of = architecture(header)
    values = _Values(header, name)
    hidden, layers = values.integer("embedding_length"), values.integer("block_count")
    if layers > len(header.tensors):
        values.fail(f"{name}.block_count", layers, f"at most one for each of {len(header.tensors)} tensors")
    heads = values.for_all_layers("attention.head_count", layers)
    kv_heads = values.for_all_layers("attention.head_count_kv", layers, heads)
    if heads % kv_heads:
        values.fail(f"{name}.attention.head_count_kv", kv_heads, f"a divisor of the {heads} heads")
    if values.get("attention.key_length") is None and hidden % heads:
        values.fail(f"{name}.attention.head_count", heads, f"a divisor of embedding_length={hidden}")
    head_dim = values.integer("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        value = values.get(key)
        if value is not None and value != head_dim:
            values.fail(f"{name}.{key}", value, f"{head_dim}, the width of a head")
    if head_dim % 2:
        values.fail(f"{name}.attention.key_length", head_dim, "an even width of heads")
    positions = values.integer("context_length")
    vocab_size = _vocab_size(header, values)
    ends = [values.token(end, vocab_size) for end in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    config: dict[str, Any] = {
        "architectures": [of.architectures],
        "model_type": of.model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": values.for_all_layers("feed_forward_length", layers),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": values.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": positions,
        "rope_theta": values.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(values, header, head_dim),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors if of.biases is None else of.biases,
        "bos_token_id": values.token("bos", vocab_size),
        "eos_token_id": ends if len(ends) > 1 else ends[0] if ends else None,
        "pad_token_id": values.token("padding", vocab_size),
    }
    if of.gemma:
        return config | _gemma(values, config)
    window = values.integer("attention.sliding_window", 0, least=0)
    if 0 < window < positions:
        values.fail(f"{name}.attention.sliding_window", window, f"0 or at least context_length={positions}")
    return {**config, "hidden_act": "silu"}


def _vocab_size(header: Header, values: _Values) -> int:
    """The rows of the word embeddings, which vocab_size and the vocabulary must agree with."""
    table = header.tensors.get("token_embd.weight")
    if table is None:
        raise ValueError(f"{header.where}: no tensor token_embd.weight")
    rows = table.shape[0]
    stored = values.integer("vocab_size", rows)
    if stored != rows:
        values.fail(f"{values.prefix}.vocab_size", stored, f"{rows}, the rows of token_embd.weight")
    tokens = header.lists.get("tokenizer.ggml.tokens")
    if tokens is not None and tokens.items != rows:
        raise ValueError(
            f"{header.where}: tokenizer.ggml.tokens has {tokens.items} tokens, token_embd.weight has {rows} rows"
        )
    return rows


def _rope_scaling(values: _Values, header: Header, head_dim: int) -> dict[str, Any] | None:
    kind = values.get("rope.scaling.type")
    if kind not in (None, "none", "linear"):
        values.fail(f"{values.prefix}.rope.scaling.type", kind, "none or linear; others are not supported")
    keys = [key for key in ("rope.scaling.factor", "rope.scale_linear") if values.get(key) not in (None, 0)]
    factor = values.number(keys[0]) if keys else 1.0
    if "rope_freqs.weight" in header.tensors:
        if factor != 1.0 and kind != "none":
            values.fail(f"{values.prefix}.{keys[0]}", factor, "1 beside the tensor rope_freqs.weight")
        return {"rope_type": "factors", "factors": []}  # GGUFFile puts them in
    if factor == 1.0 or kind == "none":
        return None
    return {"rope_type": "linear", "factor": factor}


def _gemma(values: _Values, config: Mapping[str, Any]) -> dict[str, Any]:
    """What only a Gemma 3 has. The scale of the scores is that of llama.cpp, which tells the 27B by its layers."""
    layers = config["num_hidden_layers"]
    window = values.integer("attention.sliding_window", 0, least=0)
    key = "attention.sliding_window_pattern"
    pattern = values.get(key)
    if isinstance(pattern, list):
        if len(pattern) != layers or not all(type(item) is bool or item in (0, 1) for item in pattern):
            values.fail(f"{values.prefix}.{key}", pattern, f"true or false for each of {layers} layers")
        local = [bool(item) for item in pattern]
    else:
        every = values.integer(key, 6, least=0)
        local = [every == 0 or i % every < every - 1 for i in range(layers)]
    if not window:
        local = [False] * layers
    heads = config["num_attention_heads"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": window or config["max_position_embeddings"],
        "layer_types": ["sliding_attention" if item else "full_attention" for item in local],
        "rope_local_base_freq": values.number("rope.freq_base_swa", 10000.0),
        "query_pre_attn_scalar": config["hidden_size"] // heads if layers == 62 else config["head_dim"],
    }


# --- the tensors --------------------------------------------------------------------------------------


def tensors_of(header: Header, config: Mapping[str, Any]) -> dict[str, Part]:
    """Hugging Face's name -> how the file stores the tensor, in the order of the file; all others are refused.

    Raises
    ------
    ValueError
        A tensor is missing, unknown, or of another shape than the config says; the message names it.
    """
    _, of = architecture(header)
    parts = dict(_parts(of, config))
    names = {part.name: name for name, part in parts.items()}
    for name, part in parts.items():
        stored = header.tensors.get(part.name)
        if stored is None:
            raise ValueError(f"{header.where}: no tensor {part.name} ({name})")
        if stored.shape != part.shape:
            raise ValueError(
                f"{header.where}: tensor {part.name} has shape {stored.shape}, the metadata says {part.shape}"
            )
    factors = header.tensors.get("rope_freqs.weight")
    if factors is not None:
        shape = (config["head_dim"] // 2,)
        if not of.halves or factors.shape != shape:
            raise ValueError(
                f"{header.where}: tensor rope_freqs.weight has shape {factors.shape}; only a llama has one, of "
                f"{shape}"
            )
    for stored_name in header.tensors:
        if stored_name not in names and stored_name != "rope_freqs.weight":
            raise ValueError(
                f"{header.where}: unknown tensor {quoted(stored_name)}, which may change results"
            )
    return {names[stored]: parts[names[stored]] for stored in header.tensors if stored in names}


def _parts(of: Architecture, config: Mapping[str, Any]) -> Iterator[tuple[str, Part]]:
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width, kv_width = heads * head_dim, kv_heads * head_dim
    norm = of.gemma  # stored as 1 + w
    yield "model.embed_tokens.weight", Part("token_embd.weight", (config["vocab_size"], hidden))
    yield "model.norm.weight", Part("output_norm.weight", (hidden,), minus_one=norm)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", Part("output.weight", (config["vocab_size"], hidden))
    norms = (
        {
            "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "ffn_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
        }
        if of.gemma
        else {"post_attention_layernorm": "ffn_norm"}
    )
    linear = {
        "self_attn.q_proj": ("attn_q", (width, hidden), heads if of.halves else 0),
        "self_attn.k_proj": ("attn_k", (kv_width, hidden), kv_heads if of.halves else 0),
        "self_attn.v_proj": ("attn_v", (kv_width, hidden), 0),
        "self_attn.o_proj": ("attn_output", (hidden, width), 0),
        "mlp.gate_proj": ("ffn_gate", (inner, hidden), 0),
        "mlp.up_proj": ("ffn_up", (inner, hidden), 0),
        "mlp.down_proj": ("ffn_down", (hidden, inner), 0),
    }
    projections = "qkv" if of.biases else "qkvo"
    biased = tuple(f"self_attn.{p}_proj" for p in projections) if config["attention_bias"] else ()
    for i in range(config["num_hidden_layers"]):
        layer, block = f"model.layers.{i}.", f"blk.{i}."
        for name, stored in {"input_layernorm": "attn_norm", **norms}.items():
            yield f"{layer}{name}.weight", Part(f"{block}{stored}.weight", (hidden,), minus_one=norm)
        if of.qk_norm:
            for p in "qk":
                part = Part(f"{block}attn_{p}_norm.weight", (head_dim,), minus_one=norm)
                yield f"{layer}self_attn.{p}_norm.weight", part
        for name, (stored, shape, interleaved) in linear.items():
            yield f"{layer}{name}.weight", Part(f"{block}{stored}.weight", shape, interleaved)
            if name in biased:
                yield f"{layer}{name}.bias", Part(f"{block}{stored}.bias", shape[:1], interleaved)

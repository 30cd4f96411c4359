"""Small decoders of every `model_type`, whose weights are random numbers (see `cases`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 200,
    "rms_norm_eps": 1e-5,
}
#: by name: config.json
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_SIZES, "head_dim": 8, "hidden_act": "silu", "tie_word_embeddings": False},
    "llama, tied, with biases": {
        "model_type": "llama", **_SIZES, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
    },
    "llama 3": {
        "model_type": "llama", **_SIZES, "head_dim": 8, "num_key_value_heads": 6, "hidden_act": "gelu",
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {"model_type": "mistral", **_SIZES, "head_dim": 8, "sliding_window": 7},
    "qwen2": {
        "model_type": "qwen2", **_SIZES, "tie_word_embeddings": True, "use_sliding_window": True,
        "sliding_window": 9, "max_window_layers": 2,
    },
    "qwen3": {"model_type": "qwen3", **_SIZES, "head_dim": 16, "attention_bias": True},
    "gemma2": {
        "model_type": "gemma2", **_SIZES, "head_dim": 8, "query_pre_attn_scalar": 6, "sliding_window": 6,
        "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0, "rope_theta": 5000.0,
    },
    "gemma3_text": {
        "model_type": "gemma3_text", **_SIZES, "head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 6,
        "sliding_window_pattern": 3, "rope_theta": 1e6, "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gemma3_text, of transformers 5": {
        "model_type": "gemma3_text", **_SIZES, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    },
    "qwen3, yarn": {
        "model_type": "qwen3", **_SIZES, "head_dim": 32, "rope_theta": 1e4,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 50},
    },
    "llama, yarn": {
        "model_type": "llama", **_SIZES, "head_dim": 32,
        "rope_parameters": {
            "rope_type": "yarn", "factor": 3.0, "rope_theta": 1e3, "beta_fast": 8, "beta_slow": 2, "mscale": 0.7,
            "mscale_all_dim": 0.4,
        },
    },
    "phi3": {
        "model_type": "phi3", **_SIZES, "sliding_window": 8, "pad_token_id": 0,
        "original_max_position_embeddings": 200, "full_attn_mod": 1, "interpolate_factor": 1,
        "lm_head_bias": False, "mlp_bias": False,
    },
    "phi3, longrope": {
        "model_type": "phi3", **_SIZES, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
        "pad_token_id": 0, "max_position_embeddings": 800,
        "original_max_position_embeddings": 200, "partial_rotary_factor": 0.75, "tie_word_embeddings": True,
        "rope_scaling": {
            "type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.2, 2.0, 3.5],
            "long_factor": [1.0, 2.1, 4.3, 8.2, 16.0, 32.5],
        },
    },
    "phi3, beyond the first context of longrope": {
        "model_type": "phi3", **_SIZES, "hidden_size": 32, "num_attention_heads": 4, "pad_token_id": 0,
        "max_position_embeddings": 400, "original_max_position_embeddings": 30,
        "rope_scaling": {
            "type": "longrope", "short_factor": [1.0, 1.2, 1.5, 2.0], "long_factor": [1.0, 2.5, 7.0, 13.0],
        },
    },
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 61, "n_embd": 24, "n_inner": 40, "n_layer": 3, "n_head": 6,
        "n_positions": 200, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_ctx": 200,
    },
    "gpt2, with a head": {
        "model_type": "gpt2", "vocab_size": 61, "n_embd": 24, "n_layer": 3, "n_head": 3, "n_positions": 200,
        "activation_function": "relu", "layer_norm_epsilon": 1e-2, "tie_word_embeddings": False,
        "scale_attn_weights": False,
    },
}  # fmt: skip
LENGTHS = np.array([11, 150, 1])
NEW_TOKENS = 40


def write_with_tokenizer(path: Path, dtype: Any = np.float32, **settings: Any) -> Path:
    """A folder of a Llama with random weights of `dtype`, a tokenizer of bytes and a chat template.

    settings : of config.json, in place of those here
    """
    from safetensors.numpy import save_file

    from rbe_gpu.models.decoder_tensors import tensor_shapes
    from rbe_gpu.models.decoders import decoder_config

    from .cases import bytes_tokenizer, weights

    tokenizer = bytes_tokenizer(False)
    del tokenizer["post_processor"]
    vocabulary = len(tokenizer["model"]["vocab"])
    config = {
        **CONFIGS["llama"], "vocab_size": vocabulary, "tie_word_embeddings": True, "eos_token_id": 2,
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4, **settings,
    }  # fmt: skip
    tokenizer_config = {
        "tokenizer_class": "GPT2TokenizerFast",
        "chat_template": "User: {{ messages[-1].content }}\nAnswer:",
    }
    path.mkdir(parents=True)
    for name, value in (
        ("config.json", config), ("tokenizer.json", tokenizer), ("tokenizer_config.json", tokenizer_config),
    ):  # fmt: skip
        (path / name).write_text(json.dumps(value))
    made = weights(dict(tensor_shapes(decoder_config(config))))
    save_file({name: a.astype(dtype) for name, a in made.items()}, path / "model.safetensors")
    return path


def inputs() -> NDArray[np.int64]:
    """(texts, longest) ids; behind a text zeros."""
    ids = np.random.RandomState(1).randint(0, 61, (len(LENGTHS), int(LENGTHS.max())))
    return np.where(np.arange(ids.shape[1]) < LENGTHS[:, None], ids, 0).astype(np.int64)

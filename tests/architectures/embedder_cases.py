"""Small models of sentence-transformers whose weights are random numbers: folders with all their files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .cases import bytes_tokenizer, weights

IDENTITY, TANH = "torch.nn.modules.linear.Identity", "torch.nn.modules.activation.Tanh"


class Embedder(NamedTuple):
    """A model.

    Attributes
    ----------
    config : config.json without vocab_size
    pooling : 1_Pooling/config.json
    dense : config.json of each Dense module
    normalize : whether there is a Normalize module
    prompts : of config_sentence_transformers.json
    call : arguments of `encode` and `embed`
    tokenizer_class : of tokenizer_config.json
    """

    config: dict[str, Any]
    pooling: dict[str, Any]
    dense: tuple[dict[str, Any], ...] = ()
    normalize: bool = True
    prompts: dict[str, str] = {}  # noqa: RUF012  never changed
    call: dict[str, str] = {}  # noqa: RUF012  never changed
    tokenizer_class: str = "PreTrainedTokenizerFast"


_BERT = {
    "model_type": "bert", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 96, "hidden_act": "gelu", "max_position_embeddings": 80, "type_vocab_size": 2,
}  # fmt: skip
_GEMMA = {
    "model_type": "gemma3_text", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 200,
    "rms_norm_eps": 1e-6, "query_pre_attn_scalar": 12, "sliding_window": 9, "_sliding_window_pattern": 6,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    "rope_theta": 1e6, "rope_local_base_freq": 10000.0, "rope_scaling": None, "use_bidirectional_attention": True,
    "hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": None, "final_logit_softcapping": None,
}  # fmt: skip
_MODERNBERT = {
    "model_type": "modernbert", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5,
    "num_attention_heads": 4, "max_position_embeddings": 200, "norm_eps": 1e-5, "hidden_activation": "gelu",
    "global_attn_every_n_layers": 3, "local_attention": 8, "global_rope_theta": 160000.0,
    "local_rope_theta": 10000.0, "attention_bias": False, "mlp_bias": False, "norm_bias": False, "pad_token_id": 1,
    "cls_token_id": 0, "sep_token_id": 2, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
_NOMIC = {
    "model_type": "nomic_bert", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 200, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
    "hidden_act": "silu", "rope_parameters": {"rope_type": "default", "rope_theta": 700.0}, "pad_token_id": 1,
}  # fmt: skip
_PROMPTS = {"query": "task: search result | query: ", "document": "title: none | text: "}


def _dense(inputs: int, outputs: int, activation: str, bias: bool = False) -> dict[str, Any]:
    return {
        "in_features": inputs, "out_features": outputs, "bias": bias, "activation_function": activation,
        "module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding",
    }  # fmt: skip


CASES: dict[str, Embedder] = {
    "bert, Dense with tanh": Embedder(
        _BERT, {"pooling_mode": "mean"}, (_dense(64, 48, TANH, bias=True),), normalize=False
    ),
    "bert, two modes, prompt not pooled": Embedder(
        _BERT,
        {"pooling_mode": ["cls", "mean"], "include_prompt": False},
        (_dense(128, 32, TANH, bias=True), _dense(32, 40, IDENTITY)),
        prompts={"query": "find "},
        call={"prompt_name": "query"},
    ),
    "embeddinggemma": Embedder(
        _GEMMA,
        {"pooling_mode": "mean"},
        (_dense(64, 96, IDENTITY), _dense(96, 64, IDENTITY)),
        prompts=_PROMPTS,
        call={"prompt_name": "query"},
    ),
    "embeddinggemma, an even window, documents": Embedder(
        {**_GEMMA, "sliding_window": 12},
        {"pooling_mode": "mean"},
        (_dense(64, 64, IDENTITY),),
        prompts=_PROMPTS,
        call={"prompt_name": "document"},
    ),
    "modernbert": Embedder(_MODERNBERT, {"pooling_mode": "cls"}),
    "modernbert, with biases, of transformers 5": Embedder(
        {
            **{k: v for k, v in _MODERNBERT.items() if "theta" not in k and not k.startswith("global")},
            "attention_bias": True,
            "mlp_bias": True,
            "norm_bias": True,
            "local_attention": 7,
            "hidden_activation": "gelu_pytorch_tanh",
            "layer_types": ["sliding_attention", "full_attention", *["sliding_attention"] * 3],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
        },
        {"pooling_mode": "mean"},
        (_dense(64, 8, TANH, bias=True),),
        normalize=False,
    ),
    "nomic_bert": Embedder(
        _NOMIC, {"pooling_mode": "mean"}, prompts={"query": "search_query: "}, call={"prompt_name": "query"}
    ),
}
TEXTS = ("The theatre there, then: naïve Café-goers in 東京", "", "x", "word of a longer text, " * 7)


def tokenizer() -> dict[str, Any]:
    return bytes_tokenizer(False)


def config(case: Embedder) -> dict[str, Any]:
    return {**case.config, "vocab_size": len(tokenizer()["model"]["vocab"])}


def write(path: Path, case: Embedder, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """The folder of a model. shapes : of the tensors of its checkpoint"""
    from safetensors.numpy import save_file

    modules: list[tuple[str, dict[str, Any] | None]] = [
        ("Transformer", None), ("Pooling", {"embedding_dimension": case.config["hidden_size"], **case.pooling}),
        *(("Dense", settings) for settings in case.dense),
        *([("Normalize", None)] if case.normalize else []),
    ]  # fmt: skip
    files: dict[str, Any] = {
        "config.json": config(case),
        "tokenizer.json": tokenizer(),
        "tokenizer_config.json": {
            "tokenizer_class": case.tokenizer_class, "model_max_length": 60, "cls_token": "<s>", "sep_token": "</s>",
            "pad_token": "<pad>",
        },
        "sentence_bert_config.json": {"max_seq_length": 60, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": case.prompts, "similarity_fn_name": "cosine"},
        "modules.json": [
            {
                "idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "",
                "type": f"sentence_transformers.models.{kind}",
            }
            for i, (kind, _) in enumerate(modules)
        ],
    }  # fmt: skip
    path.mkdir(parents=True)
    made = weights(
        dict(shapes)
    )  # for matrices twice as large as those of `cases`: by less, or scores are hundreds
    save_file(
        {k: a * np.float32(0.5) if a.ndim == 2 else a for k, a in made.items()}, path / "model.safetensors"
    )
    for i, (kind, settings) in enumerate(modules):
        if settings is not None:
            files[f"{i}_{kind}/config.json"] = settings
        if kind == "Dense" and settings is not None:
            sizes = settings["out_features"], settings["in_features"]
            made = weights({"linear.weight": sizes, "linear.bias": sizes[:1]})
            (path / f"{i}_{kind}").mkdir()
            kept = made if settings["bias"] else {"linear.weight": made["linear.weight"]}
            save_file(
                {k: np.ascontiguousarray(v) for k, v in kept.items()},
                path / f"{i}_{kind}" / "model.safetensors",
            )
    for name, value in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(json.dumps(value), "utf-8")
    return path

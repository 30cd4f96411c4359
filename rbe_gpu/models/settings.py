"""Every file of a model folder, every key of it, and what it does to the vectors.

The readers are those of sentence-transformers 6.2 and transformers 5.24. A key is honoured, has no effect on vectors,
or is refused; so is a key that is not listed, because it may change them. `docs/models.md` shows this table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

from ..json_checks import quoted


class Key(NamedTuple):
    """A key of a file.

    Attributes
    ----------
    effect : what it does here, for the documentation; of a key with `accepted`, what another value would do
    accepted : the values that are not refused; None: every one, or those that its reader accepts
    honoured : whether it can change vectors
    """

    effect: str
    accepted: tuple[Any, ...] | None = None
    honoured: bool = False


def _honoured(effect: str) -> Key:
    return Key(effect, None, True)


def _ignored(*names: str, effect: str = "") -> dict[str, Key]:
    return dict.fromkeys(names, Key(effect))


def _only(*accepted: Any, effect: str) -> Key:
    return Key(effect, accepted)


OFF = (None, False)
EMPTY: tuple[Any, ...] = (None, False, "", [], {})

_BERT_CONFIG: dict[str, Key] = {
    "model_type": _honoured("`bert`"),
    "vocab_size": _honoured("rows of the word embeddings"),
    "hidden_size": _honoured("width of the hidden states, a multiple of `num_attention_heads`"),
    "num_hidden_layers": _honoured("layers; further ones of the checkpoint are not read"),
    "num_attention_heads": _honoured("heads of attention"),
    "intermediate_size": _honoured("width of the feed-forward layers"),
    "max_position_embeddings": _honoured("rows of the position embeddings; texts are truncated to them"),
    "type_vocab_size": _honoured("rows of the token type embeddings; texts have type 0"),
    "layer_norm_eps": _honoured("eps of layer normalisation"),
    "hidden_act": _honoured(
        "activation of the feed-forward layers: gelu, gelu_python, gelu_new, gelu_fast, gelu_pytorch_tanh, relu, "
        "silu or swish"
    ),
    "tokenizer_class": _honoured("where tokenizer_config.json has none"),
    "position_embedding_type": _only("absolute", None, effect="relative positions are not supported"),
    "is_decoder": _only(*OFF, effect="only encoders are supported"),
    "is_encoder_decoder": _only(*OFF, effect="only encoders are supported"),
    "is_causal": _only(*OFF, effect="only bidirectional attention is supported"),
    "use_bidirectional_attention": _only(None, True, effect="only bidirectional attention is supported"),
    "add_cross_attention": _only(*OFF, effect="only encoders are supported"),
    "cross_attention_hidden_size": _only(None, effect="only encoders are supported"),
    "tie_encoder_decoder": _only(*OFF, effect="only encoders are supported"),
    "pruned_heads": _only(*EMPTY, effect="pruned heads are not supported; store the weights of every head"),
    "per_layer_config": _only(*EMPTY, effect="layers of different shapes are not supported"),
    "layer_types": _only(*EMPTY, effect="only full attention is supported"),
    "quantization_config": _only(
        *EMPTY, effect="the checkpoint is quantised; use the weights that it was quantised from"
    ),
    "compression_config": _only(
        *EMPTY, effect="the checkpoint is quantised; use the weights that it was quantised from"
    ),
    "load_in_8bit": _only(
        *OFF, effect="the checkpoint is quantised; use the weights that it was quantised from"
    ),
    "load_in_4bit": _only(
        *OFF, effect="the checkpoint is quantised; use the weights that it was quantised from"
    ),
    "auto_map": _only(*EMPTY, effect="the model has code of its own, which is not run"),
    "rope_parameters": _only(*EMPTY, effect="rotary position embeddings are not supported"),
    "rope_scaling": _only(*EMPTY, effect="rotary position embeddings are not supported"),
    "rope_theta": _only(None, effect="rotary position embeddings are not supported"),
    "adapters": _only(*EMPTY, effect="adapters are not supported; merge them into the weights"),
    **dict.fromkeys(
        ("torch_dtype", "dtype"),
        Key(
            "the precision of the original: hidden states are computed in `dtype=` of `rbe_gpu.load`",
            (None, "float32", "float16", "bfloat16", "float64", "auto"),
        ),
    ),
    **_ignored(
        *("attention_probs_dropout_prob", "hidden_dropout_prob", "classifier_dropout", "initializer_range"),
        *(
            "gradient_checkpointing",
            "use_cache",
            "chunk_size_feed_forward",
            "tie_word_embeddings",
            "torchscript",
        ),
        *(
            "output_hidden_states",
            "output_attentions",
            "output_past",
            "return_dict",
            "use_bfloat16",
            "pad_token_id",
        ),
        *("bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id"),
        *(
            "decoder_start_token_id",
            "prefix",
            "attn_implementation",
            "experts_implementation",
            "use_flash_attn",
        ),
        *(
            "tie_last_hidden_states",
            "emb_pooler",
            "matryoshka_dimensions",
            "model_max_length",
            "base_model_tp_plan",
            "base_model_pp_plan",
            "use_flash_attention_2",
        ),
        effect="of training, caching, output or speed",
    ),
    **_ignored(
        *(
            "architectures",
            "transformers_version",
            "name_or_path",
            "model_name",
            "base_model",
            "torch_version",
        ),
        *("unsloth_version", "unsloth_fixed", "sentence_transformers", "language", "license", "gguf_file"),
        effect="description",
    ),
    **_ignored(
        *("num_labels", "id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params"),
        *("summary_activation", "summary_first_dropout", "summary_last_dropout", "summary_proj_to_labels"),
        *(
            "summary_type",
            "summary_use_proj",
            "directionality",
            "pooler_fc_size",
            "pooler_num_attention_heads",
        ),
        *(
            "pooler_num_fc_layers",
            "pooler_size_per_head",
            "pooler_type",
            "classifier_bias",
            "n_labels",
            "head_type",
        ),
        *("classifiers_size", "num_choices", "label_smoothing", "max_span_width", "crf", "out_dim"),
        effect="of heads, which are not run",
    ),
    **_ignored(
        *("assistant_confidence_threshold", "assistant_lookbehind", "bad_words_ids", "begin_suppress_tokens"),
        *(
            "diversity_penalty",
            "do_sample",
            "early_stopping",
            "encoder_no_repeat_ngram_size",
            "epsilon_cutoff",
        ),
        *(
            "encoder_repetition_penalty",
            "eta_cutoff",
            "exponential_decay_length_penalty",
            "forced_bos_token_id",
        ),
        *(
            "forced_eos_token_id",
            "length_penalty",
            "max_length",
            "min_length",
            "no_repeat_ngram_size",
            "num_beams",
        ),
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "num_beam_groups", "num_return_sequences"),
        *("output_scores", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "top_k"),
        *("suppress_tokens", "target_lookbehind", "temperature", "top_p", "typical_p"),
        effect="of text generation",
    ),
}

_NO_TYPES: dict[str, Key] = {name: key for name, key in _BERT_CONFIG.items() if name != "type_vocab_size"}
_FROM_PADDING: dict[str, Key] = {
    "pad_token_id": _honoured("positions begin behind it; the token of padding has it as its position"),
    "max_position_embeddings": _honoured(
        "rows of the position embeddings; texts are truncated to those behind `pad_token_id`"
    ),
}
_ROBERTA_CONFIG: dict[str, Key] = {
    **_BERT_CONFIG,
    "model_type": _honoured("`roberta`, `xlm-roberta` or `camembert`"),
    **_FROM_PADDING,
    **_ignored("classifier_dropout", "add_pooling_layer", effect="of heads, which are not run"),
}
_MPNET_CONFIG: dict[str, Key] = {
    **_NO_TYPES,
    "model_type": _honoured("`mpnet`"),
    **_FROM_PADDING,
    "relative_attention_num_buckets": _only(
        None, 32, effect="the bias by distance has 32 buckets, as transformers computes it"
    ),
    **_ignored("type_vocab_size", effect="the model has no token types"),
}
_DISTILBERT_CONFIG: dict[str, Key] = {
    **_NO_TYPES,
    "model_type": _honoured("`distilbert`"),
    "dim": _honoured("width of the hidden states, a multiple of `n_heads`"),
    "n_layers": _honoured("layers; further ones of the checkpoint are not read"),
    "n_heads": _honoured("heads of attention"),
    "hidden_dim": _honoured("width of the feed-forward layers"),
    "activation": _BERT_CONFIG["hidden_act"],
    **_ignored(
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
        *("layer_norm_eps", "type_vocab_size"),
        effect="not read by DistilBERT; eps is 1e-12",
    ),
    **_ignored(
        "sinusoidal_pos_embds",
        "tie_weights_",
        effect="how positions were initialised; the checkpoint holds them",
    ),
    **_ignored("dropout", "attention_dropout", "qa_dropout", "seq_classif_dropout", effect="of training"),
}

_MODULES: dict[str, Key] = {
    "type": _honoured(
        "Transformer, Pooling, then Normalize or Dropout, of sentence_transformers; others are refused"
    ),
    "path": _honoured("the folder of the module's files"),
    **_ignored("idx", "name", effect="names of the modules, all different"),
    "kwargs": Key("names of arguments of `encode` for the module"),
}

_SENTENCE_BERT: dict[str, Key] = {
    "max_seq_length": _honoured(
        "texts are truncated to this many tokens; null: as tokenizer_config.json says"
    ),
    "do_lower_case": _honoured("texts become lower case before the tokenizer's own normaliser"),
    "transformer_task": _only(None, "feature-extraction", effect="only `feature-extraction` is supported"),
    "modality_config": _only(
        None,
        {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        effect="only the last hidden states of texts are supported",
    ),
    "module_output_name": _only(None, "token_embeddings", effect="only `token_embeddings` is supported"),
    "processing_kwargs": _only(*EMPTY, effect="arguments of the tokenizer are not supported"),
    "query_length": _only(None, effect="lengths by task are not supported"),
    "document_length": _only(None, effect="lengths by task are not supported"),
    "query_expansion": _only(*EMPTY, effect="query expansion is not supported"),
    "tokenizer_name_or_path": _only(None, effect="a tokenizer elsewhere is not read"),
    **dict.fromkeys(
        ("model_args", "model_kwargs"),
        _only(
            *EMPTY,
            {"trust_remote_code": False},
            {"trust_remote_code": True},
            {"add_pooling_layer": False},
            effect="arguments of the model are not supported",
        ),
    ),
    **dict.fromkeys(
        ("tokenizer_args", "processor_kwargs", "config_args", "config_kwargs"),
        _only(
            *EMPTY,
            {"trust_remote_code": False},
            {"trust_remote_code": True},
            effect="arguments of the tokenizer and the config are not supported",
        ),
    ),
    **_ignored("unpad_inputs", effect="of speed"),
}

_SENTENCE_TRANSFORMERS: dict[str, Key] = {
    "prompts": _honoured("texts by name that are put before texts; null: none"),
    "default_prompt_name": _honoured("the prompt of `embed` without `prompt` and `prompt_name`"),
    "truncate_dim": _honoured("vectors keep this many first columns, after normalisation"),
    "model_type": _only(None, "SentenceTransformer", effect="only `SentenceTransformer` is supported"),
    "similarity_fn_name": Key("how vectors are to be compared; `embed` compares none"),
    **_ignored("__version__", "requirements", effect="description"),
}

_POOLING: dict[str, Key] = {
    "pooling_mode": _honoured(
        "cls, max, mean, mean_sqrt_len_tokens, weightedmean or lasttoken; several are concatenated in this order"
    ),
    **dict.fromkeys(
        (
            "pooling_mode_cls_token",
            "pooling_mode_max_tokens",
            "pooling_mode_mean_tokens",
            "pooling_mode_mean_sqrt_len_tokens",
            "pooling_mode_weightedmean_tokens",
            "pooling_mode_lasttoken",
        ),
        _honoured("where `pooling_mode` is absent: concatenated in this order; none is true: mean"),
    ),
    "include_prompt": _honoured("false: the tokens of the prompt are left out"),
    **_ignored(
        "embedding_dimension", "word_embedding_dimension", effect="the width, which config.json says too"
    ),
}

_NORMALIZE: dict[str, Key] = {
    "module_input_name": _only(None, "sentence_embedding", effect="only the pooled vector is normalised"),
    "module_output_name": _only(None, "sentence_embedding", effect="only the pooled vector is normalised"),
}

_TOKENIZER_CONFIG: dict[str, Key] = {
    "tokenizer_class": _honoured(
        "BertTokenizer, DistilBertTokenizer and MPNetTokenizer: the normaliser is made from the next three keys, "
        "whatever tokenizer.json says; RobertaTokenizer, PreTrainedTokenizerFast, TokenizersBackend and, with a "
        "Unigram model, XLMRobertaTokenizer: tokenizer.json as it is; others are refused. Absent: BertTokenizer"
    ),
    "do_lower_case": _honoured("BertTokenizer: texts become lower case; absent: true"),
    "strip_accents": _honoured("BertTokenizer: accents are removed; null: if texts become lower case"),
    "tokenize_chinese_chars": _honoured("BertTokenizer: CJK characters are words; absent: true"),
    "add_prefix_space": _honoured("RobertaTokenizer: must be what tokenizer.json says; absent: false"),
    "model_max_length": _honoured(
        "texts are truncated to this many tokens, if sentence_bert_config.json names none"
    ),
    "max_len": _honoured("an old name of `model_max_length`"),
    "truncation_side": _honoured("which end of a long text is cut off"),
    **dict.fromkeys(
        ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token", "bos_token", "eos_token"),
        _honoured("a token that text may contain; one that tokenizer.json lacks is refused"),
    ),
    **dict.fromkeys(
        ("additional_special_tokens", "extra_special_tokens"),
        _honoured("tokens that text may contain; those that tokenizer.json lacks are refused"),
    ),
    "added_tokens_decoder": _honoured("the added tokens, which must be those of tokenizer.json"),
    "padding_side": _only(
        None, "right", effect="padding on the left shifts positions by the batch's longest text"
    ),
    "split_special_tokens": _only(*OFF, effect="not supported"),
    "auto_map": _only(*EMPTY, effect="the tokenizer has code of its own, which is not run"),
    "chat_template": _only(*EMPTY, effect="chat templates are not supported"),
    "init_inputs": _only(*EMPTY, effect="not supported"),
    "model_input_names": Key("must name `attention_mask`: without it padding is attended to"),
    **_ignored(
        *(
            "do_basic_tokenize",
            "never_split",
            "clean_up_tokenization_spaces",
            "wordpieces_prefix",
            "use_fast",
        ),
        *("clean_text", "add_bos_token", "add_eos_token", "sp_model_kwargs", "legacy"),
        *(
            "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
            "trim_offsets",
            "errors",
        ),
        effect="not read by the tokenizers above",
    ),
    **_ignored(
        *("pad_to_multiple_of", "pad_token_type_id", "pad_token_id", "padding", "max_length", "stride"),
        *("truncation", "truncation_strategy", "return_token_type_ids", "verbose", "device_map"),
        effect="of padding and of calls with these arguments",
    ),
    **_ignored(
        *(
            "name_or_path",
            "special_tokens_map_file",
            "tokenizer_file",
            "vocab_file",
            "merges_file",
            "backend",
        ),
        *(
            "is_local",
            "full_tokenizer_file",
            "local_files_only",
            "processor_class",
            "files_loaded",
            "response_template",
            "__version__",
        ),
        *("transformers_version", "response_schema", "chat_control_tokens", "from_slow", "revision"),
        effect="description",
    ),
}

_SPECIAL_TOKENS: dict[str, Key] = {
    name: Key(
        "as in tokenizer_config.json, and preferred to it; not read if that has `added_tokens_decoder`",
        None,
        True,
    )
    for name in (
        *("unk_token", "sep_token", "pad_token", "cls_token", "mask_token", "bos_token", "eos_token"),
        *("additional_special_tokens", "extra_special_tokens"),
    )
}

_TOKENIZER: dict[str, Key] = {
    "model": _honoured("the vocabulary; every id must be a row of the word embeddings"),
    "added_tokens": _honoured("tokens that text may contain"),
    "normalizer": _honoured("as it is, or made from tokenizer_config.json (`tokenizer_class`)"),
    "pre_tokenizer": _honoured("as it is; BertTokenizer: must be BertPreTokenizer"),
    "post_processor": _honoured(
        "as it is; BertTokenizer: must add `cls_token` and `sep_token`; token types are 0"
    ),
    "truncation": _honoured("only its `direction`, where tokenizer_config.json has no `truncation_side`"),
    "padding": Key("its `direction` must be `Right`"),
    "decoder": Key("of ids to text"),
    "version": Key("description"),
}

#: file -> key -> what it does
FILES: dict[str, dict[str, Key]] = {
    "modules.json": _MODULES,
    "config.json": _BERT_CONFIG,
    "config.json (roberta)": _ROBERTA_CONFIG,
    "config.json (mpnet)": _MPNET_CONFIG,
    "config.json (distilbert)": _DISTILBERT_CONFIG,
    "sentence_bert_config.json": _SENTENCE_BERT,
    "config_sentence_transformers.json": _SENTENCE_TRANSFORMERS,
    "1_Pooling/config.json": _POOLING,
    "2_Normalize/config.json": _NORMALIZE,
    "tokenizer.json": _TOKENIZER,
    "tokenizer_config.json": _TOKENIZER_CONFIG,
    "special_tokens_map.json": _SPECIAL_TOKENS,
}

#: files of a model folder without keys, or whose presence is what matters
OTHER_FILES = {
    "model.safetensors, model.safetensors.index.json and its shards": "the weights: float32, float16 or bfloat16",
    "vocab.txt": "where there is no tokenizer.json: the vocabulary of a BertTokenizer",
    "added_tokens.json": "its tokens must be in tokenizer.json; not read beside `added_tokens_decoder`",
    "adapter_config.json": "refused: adapters are not supported; merge them into the weights",
    "quantize_config.json, quant_config.json": "refused: the checkpoint is quantised",
    "all others": "not read",
}
REFUSED_FILES = {
    "adapter_config.json": "adapters are not supported; merge them into the weights",
    "quantize_config.json": "the checkpoint is quantised; use the weights that it was quantised from",
    "quant_config.json": "the checkpoint is quantised; use the weights that it was quantised from",
}


def config_table(config: Mapping[str, Any]) -> str:
    """The key of FILES for a config.json of a supported `model_type`."""
    model_type = str(config.get("model_type", "bert"))
    same_keys = {"bert": "", "xlm-roberta": " (roberta)", "camembert": " (roberta)"}
    return "config.json" + same_keys.get(model_type, f" ({model_type})")


def shown(value: Any) -> str:
    """A value of a file for a message: JSON, one line, short."""
    text = json.dumps(value) if not isinstance(value, str) else quoted(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def same(a: Any, b: Any) -> bool:
    """Whether two JSON values are equal, `true` and 1 being different."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def check_keys(settings: Mapping[str, Any], file: str, where: object = None) -> None:
    """Refuse keys of a file that are not listed, and values that are not supported.

    Parameters
    ----------
    file : a key of FILES
    where : the path for messages; None: `file`

    Raises
    ------
    ValueError
        It names the file, the key and its value.
    """
    keys = FILES[file]
    where = where or file
    for name, value in settings.items():
        key = keys.get(name)
        if key is None:
            if file.startswith("config.json") and name.startswith("_"):
                continue  # of transformers itself: the path it was loaded from and the like
            raise ValueError(
                f"{where} has an unknown key {quoted(name)}, which may change the vectors; remove it if it does not"
            )
        if key.accepted is not None and not any(same(value, accepted) for accepted in key.accepted):
            given = f"{name} {value[:60]!r}" if isinstance(value, str) else f"{name}={shown(value)}"
            raise ValueError(f"{where} has {given}: {key.effect}")


def fail(where: object, name: str, value: Any, needs: str) -> NoReturn:
    """Refuse a value: "FILE has KEY=VALUE; needs ..."."""
    raise ValueError(f"{where} has {name}={shown(value)}; needs {needs}")


# --- the table of docs/models.md ----------------------------------------------------------------------


_COLUMNS = "| file | key | vectors | |"


def table(
    files: Mapping[str, Mapping[str, Key]] = FILES,
    others: Mapping[str, str] = OTHER_FILES,
    columns: str = _COLUMNS,
) -> str:
    """Keys by file as Markdown, those with the same effect in one row.

    Parameters
    ----------
    others : files without keys, and what they are for
    columns : the first line
    """
    return "\n".join(_lines(files, others, columns))


def _lines(files: Mapping[str, Mapping[str, Key]], others: Mapping[str, str], columns: str) -> Iterator[str]:
    yield columns
    yield "|---|---|---|---|"
    for file, keys in files.items():
        rows: dict[Key, list[str]] = {}
        for name, key in keys.items():
            rows.setdefault(_hashable(key), []).append(f"`{name}`")
        for key, names in rows.items():
            yield f"| {file} | {', '.join(names)} | {_kind(key)} | {key.effect} |"
    for file, effect in others.items():
        yield f"| {file} | | | {effect} |"


def _hashable(key: Key) -> Key:
    accepted = key.accepted
    return key._replace(accepted=None if accepted is None else tuple(json.dumps(a) for a in accepted))


def _kind(key: Key) -> str:
    if key.honoured:
        return "honoured"
    return "no effect" if key.accepted is None else f"refused unless {', '.join(key.accepted)}"

"""Every file of an encoder's folder, every key of it, and what it does to the vectors (`settings.FILES`).

The readers are those of sentence-transformers 6.2 and transformers 5.24.
"""

from __future__ import annotations

from .setting_key import EMPTY, OFF, Key, honoured, ignored, only

BERT_CONFIG: dict[str, Key] = {
    "model_type": honoured("`bert`"),
    "vocab_size": honoured("rows of the word embeddings"),
    "hidden_size": honoured("width of the hidden states, a multiple of `num_attention_heads`"),
    "num_hidden_layers": honoured("layers; further ones of the checkpoint are not read"),
    "num_attention_heads": honoured("heads of attention"),
    "intermediate_size": honoured("width of the feed-forward layers"),
    "max_position_embeddings": honoured("rows of the position embeddings; texts are truncated to them"),
    "type_vocab_size": honoured("rows of the token type embeddings; texts have type 0"),
    "layer_norm_eps": honoured("eps of layer normalisation"),
    "hidden_act": honoured(
        "activation of the feed-forward layers: gelu, gelu_python, gelu_new, gelu_fast, gelu_pytorch_tanh, relu, "
        "silu or swish"
    ),
    "tokenizer_class": honoured("where tokenizer_config.json has none"),
    "position_embedding_type": only("absolute", None, effect="relative positions are not supported"),
    "is_decoder": only(*OFF, effect="only encoders are supported"),
    "is_encoder_decoder": only(*OFF, effect="only encoders are supported"),
    "is_causal": only(*OFF, effect="only bidirectional attention is supported"),
    "use_bidirectional_attention": only(None, True, effect="only bidirectional attention is supported"),
    "add_cross_attention": only(*OFF, effect="only encoders are supported"),
    "cross_attention_hidden_size": only(None, effect="only encoders are supported"),
    "tie_encoder_decoder": only(*OFF, effect="only encoders are supported"),
    "pruned_heads": only(*EMPTY, effect="pruned heads are not supported; store the weights of every head"),
    "per_layer_config": only(*EMPTY, effect="layers of different shapes are not supported"),
    "layer_types": only(*EMPTY, effect="only full attention is supported"),
    "quantization_config": only(
        *EMPTY, effect="the checkpoint is quantised; use the weights that it was quantised from"
    ),
    "compression_config": only(
        *EMPTY, effect="the checkpoint is quantised; use the weights that it was quantised from"
    ),
    "load_in_8bit": only(
        *OFF, effect="the checkpoint is quantised; use the weights that it was quantised from"
    ),
    "load_in_4bit": only(
        *OFF, effect="the checkpoint is quantised; use the weights that it was quantised from"
    ),
    "auto_map": only(*EMPTY, effect="the model has code of its own, which is not run"),
    "rope_parameters": only(*EMPTY, effect="rotary position embeddings are not supported"),
    "rope_scaling": only(*EMPTY, effect="rotary position embeddings are not supported"),
    "rope_theta": only(None, effect="rotary position embeddings are not supported"),
    "adapters": only(*EMPTY, effect="adapters are not supported; merge them into the weights"),
    **dict.fromkeys(
        ("torch_dtype", "dtype"),
        Key(
            "the precision of the original: hidden states are computed in `dtype=` of `rbe_gpu.load`",
            (None, "float32", "float16", "bfloat16", "float64", "auto"),
        ),
    ),
    **ignored(
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
    **ignored(
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
    **ignored(
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
    **ignored(
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

_NO_TYPES: dict[str, Key] = {name: key for name, key in BERT_CONFIG.items() if name != "type_vocab_size"}
_FROM_PADDING: dict[str, Key] = {
    "pad_token_id": honoured("positions begin behind it; the token of padding has it as its position"),
    "max_position_embeddings": honoured(
        "rows of the position embeddings; texts are truncated to those behind `pad_token_id`"
    ),
}
ROBERTA_CONFIG: dict[str, Key] = {
    **BERT_CONFIG,
    "model_type": honoured("`roberta`, `xlm-roberta` or `camembert`"),
    **_FROM_PADDING,
    **ignored("classifier_dropout", "add_pooling_layer", effect="of heads, which are not run"),
}
MPNET_CONFIG: dict[str, Key] = {
    **_NO_TYPES,
    "model_type": honoured("`mpnet`"),
    **_FROM_PADDING,
    "relative_attention_num_buckets": only(
        None, 32, effect="the bias by distance has 32 buckets, as transformers computes it"
    ),
    **ignored("type_vocab_size", effect="the model has no token types"),
}
DISTILBERT_CONFIG: dict[str, Key] = {
    **_NO_TYPES,
    "model_type": honoured("`distilbert`"),
    "dim": honoured("width of the hidden states, a multiple of `n_heads`"),
    "n_layers": honoured("layers; further ones of the checkpoint are not read"),
    "n_heads": honoured("heads of attention"),
    "hidden_dim": honoured("width of the feed-forward layers"),
    "activation": BERT_CONFIG["hidden_act"],
    **ignored(
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
        *("layer_norm_eps", "type_vocab_size"),
        effect="not read by DistilBERT; eps is 1e-12",
    ),
    **ignored(
        "sinusoidal_pos_embds",
        "tie_weights_",
        effect="how positions were initialised; the checkpoint holds them",
    ),
    **ignored("dropout", "attention_dropout", "qa_dropout", "seq_classif_dropout", effect="of training"),
}

MODULES: dict[str, Key] = {
    "type": honoured(
        "Transformer, Pooling, then Dense, then Normalize, and Dropout anywhere behind, of sentence_transformers; "
        "others are refused"
    ),
    "path": honoured("the folder of the module's files"),
    **ignored("idx", "name", effect="names of the modules, all different"),
    "kwargs": Key("names of arguments of `encode` for the module"),
}

SENTENCE_BERT: dict[str, Key] = {
    "max_seq_length": honoured(
        "texts are truncated to this many tokens; null: as tokenizer_config.json says"
    ),
    "do_lower_case": honoured("texts become lower case before the tokenizer's own normaliser"),
    "transformer_task": only(None, "feature-extraction", effect="only `feature-extraction` is supported"),
    "modality_config": only(
        None,
        {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        effect="only the last hidden states of texts are supported",
    ),
    "module_output_name": only(None, "token_embeddings", effect="only `token_embeddings` is supported"),
    "processing_kwargs": only(*EMPTY, effect="arguments of the tokenizer are not supported"),
    "query_length": only(None, effect="lengths by task are not supported"),
    "document_length": only(None, effect="lengths by task are not supported"),
    "query_expansion": only(*EMPTY, effect="query expansion is not supported"),
    "tokenizer_name_or_path": only(None, effect="a tokenizer elsewhere is not read"),
    **dict.fromkeys(
        ("model_args", "model_kwargs"),
        only(
            *EMPTY,
            {"trust_remote_code": False},
            {"trust_remote_code": True},
            {"add_pooling_layer": False},
            effect="arguments of the model are not supported",
        ),
    ),
    **dict.fromkeys(
        ("tokenizer_args", "processor_kwargs", "config_args", "config_kwargs"),
        only(
            *EMPTY,
            {"trust_remote_code": False},
            {"trust_remote_code": True},
            effect="arguments of the tokenizer and the config are not supported",
        ),
    ),
    **ignored("unpad_inputs", effect="of speed"),
}

SENTENCE_TRANSFORMERS: dict[str, Key] = {
    "prompts": honoured("texts by name that are put before texts; null: none"),
    "default_prompt_name": honoured("the prompt of `embed` without `prompt` and `prompt_name`"),
    "truncate_dim": honoured("vectors keep this many first columns, after normalisation"),
    "model_type": only(None, "SentenceTransformer", effect="only `SentenceTransformer` is supported"),
    "similarity_fn_name": Key("how vectors are to be compared; `embed` compares none"),
    **ignored("__version__", "requirements", effect="description"),
}

POOLING: dict[str, Key] = {
    "pooling_mode": honoured(
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
        honoured("where `pooling_mode` is absent: concatenated in this order; none is true: mean"),
    ),
    "include_prompt": honoured("false: the tokens of the prompt are left out"),
    **ignored(
        "embedding_dimension", "word_embedding_dimension", effect="the width, which config.json says too"
    ),
}

DENSE: dict[str, Key] = {
    "in_features": honoured("columns of the vectors before it"),
    "out_features": honoured("columns of the vectors behind it"),
    "bias": honoured("whether a bias is added; absent: true"),
    "activation_function": honoured("Identity or Tanh of torch.nn; absent: Tanh; others are refused"),
    "module_input_name": only("sentence_embedding", effect="only vectors of texts pass Dense modules"),
    "module_output_name": only(None, "sentence_embedding", effect="only vectors of texts pass Dense modules"),
    "use_residual": only(False, effect="residual connections are not supported"),
}

NORMALIZE: dict[str, Key] = {
    "module_input_name": only(None, "sentence_embedding", effect="only the pooled vector is normalised"),
    "module_output_name": only(None, "sentence_embedding", effect="only the pooled vector is normalised"),
}

TOKENIZER_CONFIG: dict[str, Key] = {
    "tokenizer_class": honoured(
        "BertTokenizer, DistilBertTokenizer and MPNetTokenizer: the normaliser is made from the next three keys, "
        "whatever tokenizer.json says; RobertaTokenizer, PreTrainedTokenizerFast, TokenizersBackend and, with a "
        "Unigram model, XLMRobertaTokenizer: tokenizer.json as it is; others are refused. Absent: BertTokenizer"
    ),
    "do_lower_case": honoured("BertTokenizer: texts become lower case; absent: true"),
    "strip_accents": honoured("BertTokenizer: accents are removed; null: if texts become lower case"),
    "tokenize_chinese_chars": honoured("BertTokenizer: CJK characters are words; absent: true"),
    "add_prefix_space": honoured("RobertaTokenizer: must be what tokenizer.json says; absent: false"),
    "model_max_length": honoured(
        "texts are truncated to this many tokens, if sentence_bert_config.json names none"
    ),
    "max_len": honoured("an old name of `model_max_length`"),
    "truncation_side": honoured("which end of a long text is cut off"),
    **dict.fromkeys(
        ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token", "bos_token", "eos_token"),
        honoured("a token that text may contain; one that tokenizer.json lacks is refused"),
    ),
    **dict.fromkeys(
        ("additional_special_tokens", "extra_special_tokens"),
        honoured("tokens that text may contain; those that tokenizer.json lacks are refused"),
    ),
    "added_tokens_decoder": honoured("the added tokens, which must be those of tokenizer.json"),
    "padding_side": only(
        None, "right", effect="padding on the left shifts positions by the batch's longest text"
    ),
    "split_special_tokens": only(*OFF, effect="not supported"),
    "auto_map": only(*EMPTY, effect="the tokenizer has code of its own, which is not run"),
    "chat_template": only(*EMPTY, effect="chat templates are not supported"),
    "init_inputs": only(*EMPTY, effect="not supported"),
    "model_input_names": Key("must name `attention_mask`: without it padding is attended to"),
    **ignored(
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
    **ignored(
        *("pad_to_multiple_of", "pad_token_type_id", "pad_token_id", "padding", "max_length", "stride"),
        *("truncation", "truncation_strategy", "return_token_type_ids", "verbose", "device_map"),
        effect="of padding and of calls with these arguments",
    ),
    **ignored(
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

SPECIAL_TOKENS: dict[str, Key] = {
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

TOKENIZER: dict[str, Key] = {
    "model": honoured("the vocabulary; every id must be a row of the word embeddings"),
    "added_tokens": honoured("tokens that text may contain"),
    "normalizer": honoured("as it is, or made from tokenizer_config.json (`tokenizer_class`)"),
    "pre_tokenizer": honoured("as it is; BertTokenizer: must be BertPreTokenizer"),
    "post_processor": honoured(
        "as it is; BertTokenizer: must add `cls_token` and `sep_token`; token types are 0"
    ),
    "truncation": honoured("only its `direction`, where tokenizer_config.json has no `truncation_side`"),
    "padding": Key("its `direction` must be `Right`"),
    "decoder": Key("of ids to text"),
    "version": Key("description"),
}

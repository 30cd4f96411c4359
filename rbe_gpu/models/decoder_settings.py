"""The keys of a decoder's config.json and generation_config.json, and what each does (`settings.FILES`).

The readers are those of transformers 5.24.
"""

from __future__ import annotations

from .encoder_settings import BERT_CONFIG
from .encoder_settings import TOKENIZER_CONFIG as ENCODER_TOKENIZER
from .setting_key import EMPTY, OFF, Key, honoured, ignored, only

#: tokenizer classes whose tokenizer.json is taken as it is; a "Fast" may follow
TOKENIZER_CLASSES = (
    "PreTrainedTokenizer",
    "TokenizersBackend",
    "LlamaTokenizer",
    "GPT2Tokenizer",
    "Qwen2Tokenizer",
    "GemmaTokenizer",
)

#: keys that have no effect for encoders, and are refused with the same values: descriptions, training, checkpoints
_SHARED: dict[str, Key] = {
    name: key
    for name, key in BERT_CONFIG.items()
    if not key.honoured
    and name not in ("layer_types", "position_embedding_type", "cross_attention_hidden_size")
}
_LLAMA: dict[str, Key] = {
    **_SHARED,
    "model_type": honoured("`llama`"),
    "vocab_size": honoured("rows of the word embeddings"),
    "hidden_size": honoured("width of the hidden states"),
    "intermediate_size": honoured("width of the feed-forward layers"),
    "num_hidden_layers": honoured("layers; further ones of the checkpoint are not read"),
    "num_attention_heads": honoured("query heads"),
    "num_key_value_heads": honoured("key and value heads; null: as many"),
    "head_dim": honoured("features of a head; null: `hidden_size` / `num_attention_heads`"),
    "hidden_act": honoured("activation of the gate: silu, swish, gelu, gelu_pytorch_tanh, gelu_new or relu"),
    "max_position_embeddings": honoured("tokens of a text at most"),
    "rms_norm_eps": honoured("eps of RMSNorm"),
    "rope_theta": honoured("base of the rotary frequencies"),
    "rope_scaling": honoured(
        "default, linear, llama3, yarn, or factors, which the frequencies of a GGUF file become; others are refused "
        "by name"
    ),
    "rope_parameters": honoured("the same, as transformers 5 writes it"),
    "tie_word_embeddings": honoured("true: logits are computed with the word embeddings"),
    "attention_bias": honoured("biases of the linear layers of attention"),
    "mlp_bias": honoured("biases of the feed-forward layers"),
    "eos_token_id": honoured("the tokens that end a text, where generation_config.json has none"),
    "pretraining_tp": only(None, 1, effect="split matrices are not supported"),
    "partial_rotary_factor": only(None, 1, 1.0, effect="whole heads are rotated"),
    "is_decoder": Key("always"),
    **dict.fromkeys(
        ("is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder"),
        only(*OFF, effect="only decoders without an encoder are supported"),
    ),
    "is_causal": only(None, True, effect="only causal attention is supported"),
    "use_bidirectional_attention": only(*OFF, effect="only causal attention is supported"),
    "is_llama_config": Key("description"),
    "rope_interleaved": only(*OFF, effect="pairs are the halves of a head"),
    **ignored("attention_dropout", "attn_implementation", effect="of training or speed"),
}
_WINDOW: dict[str, Key] = {
    "sliding_window": honoured("tokens that a layer with a window sees; null: all"),
    "layer_types": honoured("full_attention or sliding_attention for each layer"),
}
_QWEN: dict[str, Key] = {
    **_LLAMA,
    **_WINDOW,
    "use_sliding_window": honoured("whether layers have a window"),
    "max_window_layers": honoured("the first layer with a window, without `layer_types`"),
}
_GEMMA: dict[str, Key] = {
    **{name: key for name, key in _LLAMA.items() if name != "hidden_act"},
    **_WINDOW,
    "model_type": honoured("`gemma3_text`"),
    "hidden_activation": honoured("activation of the gate, as `hidden_act` of Llama"),
    "use_bidirectional_attention": honoured(
        "true: tokens see those behind them, too, in windows of half of `sliding_window` to either side; only of "
        "models that make vectors"
    ),
    "query_pre_attn_scalar": honoured("scores are divided by its square root"),
    "rope_local_base_freq": honoured("base of the rotary frequencies of layers with a window"),
    **dict.fromkeys(
        ("sliding_window_pattern", "_sliding_window_pattern"),
        honoured("every so many layers one without a window, where there are no `layer_types`"),
    ),
    "final_logit_softcapping": only(None, effect="soft caps are not supported"),
    "attn_logit_softcapping": only(None, effect="soft caps are not supported"),
    **ignored("hidden_act", "cache_implementation", effect="not read by Gemma 3"),
}
_GEMMA2: dict[str, Key] = {
    **{
        name: key
        for name, key in _GEMMA.items()
        if not name.endswith("sliding_window_pattern") and name != "rope_local_base_freq"
    },
    "model_type": honoured("`gemma2`"),
    "use_bidirectional_attention": only(*OFF, effect="only causal attention is supported"),
    "rope_parameters": _LLAMA["rope_parameters"],
    "attn_logit_softcapping": honoured("soft cap of the scores of attention; null: none"),
    "final_logit_softcapping": honoured("soft cap of the logits; null: none"),
    "sliding_window_size": Key("description"),
    **ignored("hidden_act", "cache_implementation", effect="not read by Gemma 2"),
}
_PHI3: dict[str, Key] = {
    **{
        name: key
        for name, key in _LLAMA.items()
        if name not in ("mlp_bias", "pretraining_tp", "is_llama_config")
    },
    "model_type": honoured("`phi3`"),
    "sliding_window": _WINDOW["sliding_window"],
    "rope_scaling": honoured(
        "default or longrope (su), with other frequencies for texts beyond the first context; others are refused by "
        "name"
    ),
    "original_max_position_embeddings": honoured("of longrope: tokens of the first context; absent: 4096"),
    "partial_rotary_factor": honoured("of the features of a head, how many are rotated"),
    **dict.fromkeys(("attention_bias", "mlp_bias", "lm_head_bias"), only(*OFF, effect="Phi-3 has no biases")),
    "full_attn_mod": only(None, 1, effect="every layer attends alike"),
    "interpolate_factor": only(None, 1, effect="rotations are scaled by rope_scaling alone"),
    **ignored("auto_map", effect="code for versions of transformers without Phi-3; it is not run"),
    **ignored(
        "resid_pdrop", "embd_pdrop", "attention_dropout", "attn_implementation", effect="of training or speed"
    ),
}
_GPT2: dict[str, Key] = {
    **_SHARED,
    "model_type": honoured("`gpt2`"),
    "vocab_size": _LLAMA["vocab_size"],
    "n_embd": _LLAMA["hidden_size"],
    "n_layer": _LLAMA["num_hidden_layers"],
    "n_head": honoured("heads of attention"),
    "n_inner": honoured("width of the feed-forward layers; null: 4 `n_embd`"),
    "n_positions": honoured("rows of the position embeddings; tokens of a text at most"),
    "activation_function": BERT_CONFIG["hidden_act"],
    "layer_norm_epsilon": honoured("eps of layer normalisation"),
    "scale_attn_weights": honoured("false: scores are not divided by the square root of the width of a head"),
    "scale_attn_by_inverse_layer_idx": only(
        *OFF, effect="scores that are scaled by the layer are not supported"
    ),
    **{name: _LLAMA[name] for name in ("tie_word_embeddings", "eos_token_id", "is_decoder", "is_causal")},
    "use_bidirectional_attention": _LLAMA["use_bidirectional_attention"],
    **ignored("n_ctx", effect="not read by GPT-2"),
    **ignored(
        "resid_pdrop", "embd_pdrop", "attn_pdrop", "attn_implementation", effect="of training or speed"
    ),
    **ignored("reorder_and_upcast_attn", effect="of the precision of scores, which are float32"),
}
_NOMIC: dict[str, Key] = {
    **_SHARED,
    "model_type": honoured("`nomic_bert`"),
    "vocab_size": _LLAMA["vocab_size"],
    "type_vocab_size": BERT_CONFIG["type_vocab_size"],
    **{
        name: _LLAMA[name]
        for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "head_dim", "hidden_act")
    },
    "num_attention_heads": honoured("heads of attention"),
    "max_position_embeddings": honoured("texts are truncated to so many tokens"),
    "layer_norm_eps": honoured("eps of layer normalisation"),
    "rope_theta": honoured("base of the rotary frequencies"),
    "rope_parameters": honoured("the same; rope_type default or linear"),
    "rope_scaling": honoured("default or linear"),
    "partial_rotary_factor": only(None, 1, 1.0, effect="whole heads are rotated"),
    "n_embd": honoured("`hidden_size`"),
    "n_layer": honoured("`num_hidden_layers`"),
    "n_head": honoured("`num_attention_heads`"),
    "n_inner": honoured("`intermediate_size`; null: 4 `n_embd`"),
    "n_positions": honoured("`max_position_embeddings`"),
    "layer_norm_epsilon": honoured("`layer_norm_eps`"),
    "rotary_emb_base": honoured("`rope_theta`"),
    "tokenizer_class": honoured("where tokenizer_config.json has none"),
    "activation_function": only("swiglu", effect="only SwiGLU is supported under this name"),
    "rotary_emb_fraction": only(1, 1.0, effect="whole heads are rotated"),
    "rotary_emb_interleaved": only(*OFF, effect="pairs are the halves of a head"),
    **dict.fromkeys(
        ("rotary_emb_scale_base", "rotary_scaling_factor"),
        only(None, effect="scaled rotations are not supported"),
    ),
    **dict.fromkeys(
        ("qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias"), only(*OFF, effect="linear layers have no biases")
    ),
    **dict.fromkeys(
        ("prenorm", "parallel_block"), only(*OFF, effect="only norms behind each part are supported")
    ),
    "causal": only(*OFF, effect="only bidirectional attention is supported"),
    "use_rms_norm": only(*OFF, effect="only LayerNorm is supported"),
    "scale_attn_weights": only(
        None, True, effect="scores are divided by the square root of the width of a head"
    ),
    "scale_attn_by_inverse_layer_idx": only(
        *OFF, effect="scores that are scaled by the layer are not supported"
    ),
    "moe_every_n_layers": only(None, 0, effect="mixtures of experts are not supported"),
    **ignored("auto_map", effect="the model's own code, which is not run"),
    **ignored(
        *(
            "attn_pdrop",
            "embd_pdrop",
            "resid_pdrop",
            "dense_seq_output",
            "fused_bias_fc",
            "fused_dropout_add_ln",
        ),
        *("use_xentropy", "reorder_and_upcast_attn", "attn_implementation", "max_trained_positions"),
        *("pad_vocab_size_multiple", "parallel_block_tied_norm"),
        effect="of training or speed",
    ),
}
_MODERNBERT: dict[str, Key] = {
    **_SHARED,
    "model_type": honoured("`modernbert`"),
    **{name: _LLAMA[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "attention_bias")},
    "intermediate_size": honoured("half of the rows of `mlp.Wi`"),
    "num_attention_heads": honoured("heads of attention"),
    "max_position_embeddings": honoured("texts are truncated to so many tokens"),
    "hidden_activation": honoured("activation of the gate, as `hidden_act` of Llama"),
    "norm_eps": honoured("eps of layer normalisation"),
    "norm_bias": honoured("biases of the norms"),
    "mlp_bias": honoured("biases of the feed-forward layers"),
    "local_attention": honoured("tokens that a layer with a window sees, half of them on either side"),
    "layer_types": _WINDOW["layer_types"],
    "global_attn_every_n_layers": honoured(
        "every so many layers one without a window, the first one too, where there are no `layer_types`"
    ),
    "global_rope_theta": honoured("base of the rotary frequencies of layers without a window"),
    "local_rope_theta": honoured("base of the rotary frequencies of layers with a window"),
    "rope_scaling": honoured("of all layers; as of Llama"),
    "rope_parameters": honoured("the same and theta for each type of layers, as transformers 5 writes it"),
    "tokenizer_class": honoured("where tokenizer_config.json has none"),
    "partial_rotary_factor": only(None, 1, 1.0, effect="whole heads are rotated"),
    "head_dim": only(None, effect="heads are `hidden_size` / `num_attention_heads` wide"),
    **ignored(
        *(
            "embedding_dropout",
            "mlp_dropout",
            "attention_dropout",
            "initializer_cutoff_factor",
            "reference_compile",
        ),
        *("repad_logits_with_grad", "deterministic_flash_attn", "attn_implementation"),
        effect="of training or speed",
    ),
    **ignored("layer_norm_eps", "position_embedding_type", effect="not read by ModernBERT"),
    **ignored(
        *("decoder_bias", "classifier_pooling", "classifier_activation", "sparse_prediction"),
        "sparse_pred_ignore_index",
        effect="of heads, which are not run",
    ),
}
#: by the key of `settings.FILES`
CONFIGS: dict[str, dict[str, Key]] = {
    "config.json (llama)": _LLAMA,
    "config.json (mistral)": {
        **_LLAMA,
        "model_type": honoured("`mistral`"),
        "sliding_window": _WINDOW["sliding_window"],
    },
    "config.json (qwen2)": {**_QWEN, "model_type": honoured("`qwen2`")},
    "config.json (qwen3)": {**_QWEN, "model_type": honoured("`qwen3`")},
    "config.json (gemma2)": _GEMMA2,
    "config.json (gemma3_text)": _GEMMA,
    "config.json (phi3)": _PHI3,
    "config.json (gpt2)": _GPT2,
    "config.json (nomic_bert)": _NOMIC,
    "config.json (modernbert)": _MODERNBERT,
}
GENERATION: dict[str, Key] = {
    "eos_token_id": honoured("the tokens that end a text"),
    "do_sample": honoured("false: `temperature` is 0"),
    "temperature": honoured("of sampling, unless `generate` has one"),
    "top_k": honoured("of sampling, unless `generate` has one"),
    "top_p": honoured("of sampling, unless `generate` has one"),
    "min_p": honoured("of sampling, unless `generate` has one"),
    "repetition_penalty": honoured("unless `generate` has one"),
    **dict.fromkeys(
        ("num_beams", "num_beam_groups", "num_return_sequences"), only(None, 1, effect="not supported")
    ),
    **dict.fromkeys(("typical_p", "encoder_repetition_penalty"), only(None, 1, 1.0, effect="not supported")),
    **dict.fromkeys(
        (
            "no_repeat_ngram_size",
            "encoder_no_repeat_ngram_size",
            "epsilon_cutoff",
            "eta_cutoff",
            "diversity_penalty",
        ),
        only(None, 0, 0.0, effect="not supported"),
    ),
    **dict.fromkeys(
        (
            *("penalty_alpha", "dola_layers", "guidance_scale", "sequence_bias", "watermarking_config"),
            *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id"),
            *("forced_eos_token_id", "exponential_decay_length_penalty", "constraints", "force_words_ids"),
            *("stop_strings", "top_h"),
        ),
        only(*EMPTY, effect="not supported"),
    ),
    **dict.fromkeys(
        ("renormalize_logits", "remove_invalid_values", "token_healing", "use_mtp"),
        only(*OFF, effect="not supported"),
    ),
    **ignored(
        *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time"),
        effect="how much is generated is an argument of `generate`",
    ),
    **ignored(
        *("bos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version", "length_penalty"),
        *(
            "early_stopping",
            "use_cache",
            "cache_implementation",
            "cache_config",
            "output_scores",
            "output_logits",
        ),
        *("output_attentions", "output_hidden_states", "return_dict_in_generate", "return_legacy_cache"),
        *("prompt_lookup_num_tokens", "max_matching_ngram_size", "num_assistant_tokens", "is_assistant"),
        *("num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_early_exit"),
        *("assistant_lookbehind", "target_lookbehind", "low_memory", "compile_config", "disable_compile"),
        *("assistant_ensemble_weight", "continuous_batching_config", "max_cache_len", "speculation_type"),
        *("prefill_chunk_size", "chat_format", "max_window_size", "trust_remote_code"),
        effect="description, speed, or of what is not run",
    ),
}
TOKENIZER_CONFIG: dict[str, Key] = {
    **{
        name: key
        for name, key in ENCODER_TOKENIZER.items()
        if name not in ("padding_side", "truncation_side")
    },
    "tokenizer_class": honoured(
        f"tokenizer.json as it is: {', '.join(TOKENIZER_CLASSES)} (and with Fast behind it)"
    ),
    "chat_template": honoured("makes one text of a conversation; chat_template.jinja is preferred to it"),
    "add_bos_token": honoured("must be what the post_processor of tokenizer.json does"),
    "add_eos_token": honoured("must be what the post_processor of tokenizer.json does"),
    **dict.fromkeys(
        ("unk_token", "pad_token", "bos_token", "eos_token"),
        honoured("one that tokenizer.json lacks is refused"),
    ),
    "added_tokens_decoder": honoured("tokens that tokenizer.json lacks are refused"),
    **ignored(
        *("sep_token", "cls_token", "mask_token", "additional_special_tokens", "extra_special_tokens"),
        effect="description",
    ),
    **dict.fromkeys(
        ("model_max_length", "max_len"),
        honoured("texts of vectors are truncated to it; generation has `max_position_embeddings`"),
    ),
    **ignored("padding_side", effect="nothing is padded"),
    "truncation_side": honoured("right; of vectors, left is refused"),
    **ignored(
        *(
            "do_lower_case",
            "strip_accents",
            "tokenize_chinese_chars",
            "add_prefix_space",
            "use_default_system_prompt",
        ),
        *("spaces_between_special_tokens", "sp_model_kwargs", "image_token", "boi_token", "eoi_token"),
        *("audio_token", "vision_token", "model_specific_special_tokens", "vocab_size", "fix_mistral_regex"),
        effect="not read by the tokenizers above",
    ),
}

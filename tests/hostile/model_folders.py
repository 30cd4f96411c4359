"""Model folders that must be refused: MiniLM's with one thing wrong each, and words of the one line that says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.settings.cases import (
    BERT,
    CONFIG,
    FAST,
    LIBRARY,
    POOLING,
    SPECIAL,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Edit,
    change,
    drops,
    removes,
    sets,
    writes,
)
from tests.test_compress_model import write_safetensors

QUERY = "encoder.layer.0.attention.self.query.weight"
DEEP = "[" * 100_000 + "]" * 100_000


class Bad(NamedTuple):
    """A change of the folder, or of the tensors of the small model, and what the message says."""

    words: tuple[str, ...]
    edits: tuple[Edit, ...] = ()
    tensors: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] | None = None


def _text(file: str, text: str) -> Edit:
    def written(folder: Path) -> None:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text, "utf-8")

    return written


def _config(**values: Any) -> Bad:
    name = next(iter(values))
    return Bad(("config.json", name), (sets(CONFIG, **values),))


def _keys(file: str, **values: Any) -> Bad:
    return Bad((file, next(iter(values))), (sets(file, **values),))


def _modules(edit: Callable[[Any], object], *words: str) -> Bad:
    return Bad(("modules.json", *words), (change("modules.json", edit),))


DENSE = "2_Dense/config.json"
_DENSE_MODULE = {"idx": 2, "name": "dense", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
_DENSE_SETTINGS = {
    "in_features": 384,
    "out_features": 8,
    "bias": True,
    "activation_function": "torch.nn.Tanh",
}
_WITH_DENSE = change("modules.json", lambda m: m.insert(2, _DENSE_MODULE))


def _dense(word: str, **values: Any) -> Bad:
    return Bad(("2_Dense", word), (_WITH_DENSE, writes(DENSE, {**_DENSE_SETTINGS, **values})))


def _tokenizer(edit: Callable[[Any], object], *words: str) -> Bad:
    return Bad((TOKENIZER, *words), (change(TOKENIZER, edit),))


#: the step of GPT-2 and RoBERTa
BYTES = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
_LISTS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "decoder": "decoders",
    "post_processor": "processors",
}


def replaced(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


_DOUBLED = replaced("a", "aa")


def _prefix(replacement: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": replacement, "prepend_scheme": "always", "split": True}


def _many(part: str, step: dict[str, Any], number: int) -> Bad:
    made = {part: {"type": "Sequence", _LISTS[part]: [step] * number}}
    words = (TOKENIZER, f"{part} of more than 128 steps")
    return Bad(words, (FAST, change(TOKENIZER, lambda t: t.update(made))))


def _steps(**steps: list[Any]) -> Bad:
    """One part of a tokenizer.json replaced by a sequence, which multiplies a text."""
    made = {part: {"type": "Sequence", _LISTS[part]: those} for part, those in steps.items()}
    return Bad((TOKENIZER, "bytes of one byte of text"), (FAST, change(TOKENIZER, lambda t: t.update(made))))


def _thousand_times_thousand(tokenizer: Any) -> None:
    template = tokenizer["post_processor"]
    template["special_tokens"]["[CLS]"].update(ids=[101] * 1000, tokens=["[CLS]"] * 1000)
    template["single"][:1] *= 1000


def _processors(*make: Callable[[Any], dict[str, Any]]) -> Edit:
    """A sequence of post-processors, each made from the template."""

    def edit(tokenizer: Any) -> None:
        made = [one(tokenizer["post_processor"]) for one in make]
        tokenizer["post_processor"] = {"type": "Sequence", "processors": made}

    return change(TOKENIZER, edit)


def _texts(number: int) -> Bad:
    """A template with the text so many times: with truncation, 5 take 5 s and 2.5 GB, 10 never end."""

    def edit(tokenizer: Any) -> None:
        first, text, last = tokenizer["post_processor"]["single"]
        tokenizer["post_processor"]["single"] = [first, *[text] * number, last]

    words = (TOKENIZER, "post_processor.single", f"the Sequence A {number} times")
    return Bad(words, (FAST, change(TOKENIZER, edit)))


def _doubles_added_tokens(tokenizer: Any) -> None:
    tokenizer["added_tokens"][0].update(content="aa[PAD]", normalized=True)
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [_DOUBLED] * 23}


def _two_texts_in_a_sequence(tokenizer: Any) -> None:
    template = {**tokenizer["post_processor"], "single": tokenizer["post_processor"]["pair"]}
    tokenizer["post_processor"] = {"type": "Sequence", "processors": [template]}


def _renamed(rename: Callable[[str], str], *words: str) -> Bad:
    return Bad(words, (), lambda tensors: {rename(name): a for name, a in tensors.items()})


def _with(name: str, a: np.ndarray, *words: str) -> Bad:
    return Bad(("model.safetensors", name, *words), (), lambda tensors: {**tensors, name: a})


def _query(cast: Callable[[np.ndarray], np.ndarray], *words: str) -> Bad:
    return Bad(
        ("model.safetensors", QUERY, *words),
        (),
        lambda tensors: {**tensors, QUERY: cast(tensors[QUERY].copy())},
    )


def _put(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def put(a: np.ndarray) -> np.ndarray:
        a[3, 5] = value
        return a

    return put


_GPTQ = {"quant_method": "gptq", "bits": 4}

FOLDERS: dict[str, Bad] = {
    # config.json
    "unknown key of config.json": _config(rotary_dim=32),
    "relative positions": _config(position_embedding_type="relative_key_query"),
    "decoder": _config(is_decoder=True),
    "decoder, 1": _config(is_decoder=1),
    "encoder and decoder": _config(is_encoder_decoder=True),
    "causal": _config(is_causal=True),
    "cross attention": _config(add_cross_attention=True),
    "pruned heads": _config(pruned_heads={"0": [1, 2]}),
    "config by layer": _config(per_layer_config={"0": {"num_attention_heads": 6}}),
    "layer types": _config(layer_types=["sliding_attention"] * 6),
    "rotary positions": _config(rope_theta=10000.0),
    "code of its own": _config(auto_map={"AutoModel": "modeling.Model"}),
    "bitsandbytes": _config(quantization_config={"load_in_8bit": True, "quant_method": "bitsandbytes"}),
    "gptq": _config(quantization_config=_GPTQ),
    "load_in_4bit": _config(load_in_4bit=True),
    "dtype of 8 bits": _config(torch_dtype="float8_e4m3fn"),
    "dtype int8": _config(dtype="int8"),
    "activation": _config(hidden_act="quick_gelu"),
    "activation of another case": _config(hidden_act="GELU"),
    "eps null": _config(layer_norm_eps=None),
    "eps true": _config(layer_norm_eps=True),
    "layers true": _config(num_hidden_layers=True),
    "model type": _config(model_type="albert"),
    "constant of config.json": Bad(
        ("config.json", "NaN is no value"), (_text(CONFIG, '{"model_type": "bert", "layer_norm_eps": NaN}'),)
    ),
    "nested config.json": Bad(("config.json", "nested"), (_text(CONFIG, f'{{"id2label": {DEEP}}}'),)),
    # modules.json
    "modules that are no list": Bad(("modules.json", "list"), (_text("modules.json", "{}"),)),
    "modules of texts": Bad(("modules.json", "list"), (_text("modules.json", '["Transformer"]'),)),
    "nested modules.json": Bad(("modules.json", "nested"), (_text("modules.json", DEEP),)),
    "no modules": Bad(("modules.json", "Transformer, Pooling"), (_text("modules.json", "[]"),)),
    "no pooling": _modules(lambda m: m.pop(1), "Transformer, Normalize"),
    "normalized before pooling": _modules(lambda m: m.insert(1, m.pop()), "Transformer, Normalize, Pooling"),
    "pooled twice": _modules(lambda m: m.append({**m[1], "name": "3"}), "Normalize, Pooling"),
    "names twice": _modules(lambda m: m[2].update(name="1"), "two modules", "1"),
    "dense after normalize": Bad(
        ("modules.json", "Normalize, Dense"),
        (change("modules.json", lambda m: m.append(_DENSE_MODULE)), writes(DENSE, _DENSE_SETTINGS)),
    ),
    "layer norm": _modules(lambda m: m[2].update(type="sentence_transformers.models.LayerNorm"), "LayerNorm"),
    "router": _modules(lambda m: m[0].update(type="sentence_transformers.models.Router"), "Router"),
    "module of another library": _modules(lambda m: m[2].update(type="custom.Normalize"), "custom.Normalize"),
    "name that is a list": _modules(lambda m: m[2].update(name=[2]), "name"),
    "path of two lines": _modules(lambda m: m[1].update(path="1\n_Pooling"), "path"),
    "type that is a number": _modules(lambda m: m[0].update(type=7), "type=7"),
    "path outside": _modules(lambda m: m[1].update(path="../1_Pooling"), "path", "../1_Pooling"),
    "path from the root": _modules(lambda m: m[1].update(path="/tmp"), "path", "/tmp"),
    "path of Windows": _modules(lambda m: m[1].update(path="C:\\pooling"), "path"),
    "unknown key of modules.json": _modules(lambda m: m[1].update(weight=2), "weight"),
    # 1_Pooling and 2_Normalize
    "unknown mode": _keys(POOLING, pooling_mode="attention"),
    "unknown older mode": _keys(POOLING, pooling_mode_attention_tokens=True),
    "modes that are none": _keys(POOLING, pooling_mode=[]),
    "mode null": _keys(POOLING, pooling_mode=None),
    "mode 1": _keys(POOLING, pooling_mode_cls_token=1),
    "include_prompt": _keys(POOLING, include_prompt="no"),
    "empty pooling": Bad(("1_Pooling", "turns on no mode"), (writes(POOLING, {}),)),
    "normalized tokens": Bad(
        ("2_Normalize", "module_input_name"),
        (sets("2_Normalize/config.json", module_input_name="token_embeddings"),),
    ),
    # 2_Dense
    "dense without sizes": _dense("in_features", in_features=None),
    "dense of a size that is true": _dense("out_features", out_features=True),
    "dense of another width": Bad(
        ("a Dense module", "in_features=385"),
        (_WITH_DENSE, writes(DENSE, {**_DENSE_SETTINGS, "in_features": 385})),
    ),
    "dense with another activation": _dense("activation_function", activation_function="torch.nn.GELU"),
    "dense with code of its own": _dense("activation_function", activation_function="custom.Identity"),
    "dense without an activation": _dense("activation_function", activation_function=None),
    "dense with a bias that is a number": _dense("bias", bias=1),
    "dense with a residual": _dense("use_residual", use_residual=True),
    "dense of tokens": _dense("module_input_name", module_input_name="token_embeddings"),
    "unknown key of 2_Dense": _dense("scale", scale=2),
    "nested 2_Dense": Bad((DENSE, "nested"), (_WITH_DENSE, _text(DENSE, DEEP))),
    # sentence_bert_config.json
    "length 0": _keys(BERT, max_seq_length=0),
    "length -1": _keys(BERT, max_seq_length=-1),
    "length of 1.5": _keys(BERT, max_seq_length=1.5),
    "length true": _keys(BERT, max_seq_length=True),
    "length as text": _keys(BERT, max_seq_length="256"),
    "do_lower_case as text": _keys(BERT, do_lower_case="yes"),
    "task": _keys(BERT, transformer_task="fill-mask"),
    "modalities": _keys(
        BERT, modality_config={"text": {"method": "forward", "method_output_name": "pooler_output"}}
    ),
    "output": _keys(BERT, module_output_name="sentence_embedding"),
    "processing": _keys(BERT, processing_kwargs={"text": {"max_length": 8}}),
    "query length": _keys(BERT, query_length=32),
    "query expansion": _keys(BERT, query_expansion={"length": 32}),
    "arguments of the model": _keys(BERT, model_args={"attn_implementation": "eager", "is_decoder": True}),
    "arguments of the tokenizer": _keys(BERT, tokenizer_args={"do_lower_case": False}),
    "tokenizer elsewhere": _keys(BERT, tokenizer_name_or_path="bert-base-cased"),
    "unknown key of sentence_bert_config.json": _keys(BERT, lowercase=True),
    # config_sentence_transformers.json
    "prompts that are a list": _keys(LIBRARY, prompts=["query: "]),
    "prompt that is a number": _keys(LIBRARY, prompts={"query": 3}),
    "half a surrogate pair": Bad(
        (LIBRARY, "surrogate"), (_text(LIBRARY, '{"prompts": {"query": "\\ud83d"}}'),)
    ),
    "default prompt that is not there": _keys(LIBRARY, default_prompt_name="passage"),
    "default prompt that is a list": _keys(LIBRARY, default_prompt_name=["query"]),
    "truncate_dim 0": _keys(LIBRARY, truncate_dim=0),
    "truncate_dim -1": _keys(LIBRARY, truncate_dim=-1),
    "truncate_dim as text": _keys(LIBRARY, truncate_dim="100"),
    "sparse encoder": _keys(LIBRARY, model_type="SparseEncoder"),
    "unknown key of config_sentence_transformers.json": _keys(LIBRARY, query_prompt="query: "),
    # tokenizers
    "tokenizer without a model": Bad((TOKENIZER, "model"), (_text(TOKENIZER, "{}"),)),
    "nested tokenizer.json": Bad((TOKENIZER, "nested"), (_text(TOKENIZER, DEEP),)),
    "unknown key of tokenizer.json": _tokenizer(lambda t: t.update(unigram={}), "unigram"),
    "id beyond the table": _tokenizer(
        lambda t: t["model"]["vocab"].update(zebra=30522), "zebra", "30522 rows"
    ),
    "id of 2^31": _tokenizer(lambda t: t["model"]["vocab"].update(zebra=2**31 - 1), "zebra", "30522 rows"),
    "negative id": _tokenizer(lambda t: t["model"]["vocab"].update(zebra=-1), "zebra", "30522 rows"),
    "added token without text": _tokenizer(lambda t: t["added_tokens"][0].update(content={}), "added_tokens"),
    "added token without id": _tokenizer(lambda t: t["added_tokens"][0].pop("id"), "added_tokens"),
    "id that is a text": _tokenizer(lambda t: t["model"]["vocab"].update(the="7"), "the", "integer"),
    "added id beyond the table": _tokenizer(
        lambda t: t["added_tokens"].append({**t["added_tokens"][0], "content": "<e1>", "id": 30522}), "<e1>"
    ),
    "no unknown token": _tokenizer(lambda t: t["model"]["vocab"].pop("[UNK]"), "[UNK]"),
    "another normalizer": _tokenizer(lambda t: t.update(normalizer={"type": "NFC"}), "normalizer"),
    "text not cleaned": _tokenizer(lambda t: t["normalizer"].update(clean_text=False), "clean_text"),
    "another splitter": _tokenizer(lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer"),
    "no special tokens": _tokenizer(lambda t: t.update(post_processor=None), "post_processor"),
    "template with a token that is not there": Bad(
        (TOKENIZER, "post_processor.single", "[CLS]", "special_tokens"),
        (FAST, change(TOKENIZER, lambda t: t["post_processor"]["special_tokens"].pop("[CLS]"))),
    ),
    "template of two texts": Bad(
        (TOKENIZER, "post_processor.single", "Sequence A"),
        (FAST, change(TOKENIZER, lambda t: t["post_processor"].update(single=t["post_processor"]["pair"]))),
    ),
    "templates in a sequence": Bad(
        (TOKENIZER, "post_processor.single", "Sequence A"),
        (FAST, change(TOKENIZER, _two_texts_in_a_sequence)),
    ),
    "template that adds thousands of tokens": Bad(
        (TOKENIZER, "adds 1000001 tokens"),
        (FAST, change(TOKENIZER, _thousand_times_thousand)),
    ),
    "template without the text": _texts(0),
    "template with the text twice": _texts(2),
    "template with the text 2,000 times": _texts(2000),
    "two templates": Bad(
        (TOKENIZER, "post_processor.processors", "one that puts tokens around a text"),
        (FAST, _processors(lambda t: t, lambda t: t)),
    ),
    "tokens around the pieces of a template": Bad(
        (TOKENIZER, "post_processor.processors", "one that puts tokens around a text"),
        (
            FAST,
            _processors(
                lambda t: t,
                lambda t: {"type": "BertProcessing", "sep": ["[SEP]", 102], "cls": ["[CLS]", 101]},
            ),
        ),
    ),
    "thousands of normalisers": _many("normalizer", {"type": "Lowercase"}, 20_000),
    "129 splitters": _many("pre_tokenizer", {"type": "Digits", "individual_digits": True}, 129),
    "129 decoders": _many("decoder", {"type": "Fuse"}, 129),
    "129 post-processors": _many("post_processor", {**BYTES, "add_prefix_space": False}, 129),
    "a character of 18 others": _steps(
        normalizer=[replaced("\u0644", "\ufdfa"), {"type": "NFKC"}] * 6,
    ),
    "prefixes of prefixes": _steps(pre_tokenizer=[_prefix("A"), _prefix("B")] * 8),
    "a decoder of an empty suffix": _steps(decoder=[{"type": "BPEDecoder", "suffix": ""}] * 18),
    "a decoder of an empty delimiter": _steps(
        decoder=[{"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "", "cleanup": True}] * 18
    ),
    "a regular expression between characters": _steps(
        normalizer=[{"type": "Replace", "pattern": {"Regex": "(?=.)"}, "content": " "}] * 16
    ),
    "steps that multiply an added token": Bad(
        (TOKENIZER, "bytes of one byte of text"), (FAST, change(TOKENIZER, _doubles_added_tokens))
    ),
    "replacements that double a text": _steps(normalizer=[_DOUBLED] * 30),
    "replacements that take turns": _steps(
        normalizer=[replaced("a", "BB"), {"type": "Lowercase"}, replaced("b", "aa")] * 8
    ),
    "a long replacement": _steps(normalizer=[replaced("a", "b c " * 10_000)]),
    "a long prefix": _steps(normalizer=[{"type": "Prepend", "prepend": "a" * 100_000}]),
    "bytes of bytes": _steps(pre_tokenizer=[{**BYTES, "add_prefix_space": False}] * 30),
    "a decoder that doubles a text": _steps(decoder=[_DOUBLED] * 30),
    "words of no characters": Bad(
        (TOKENIZER, "pre_tokenizer.length=0; needs 1 or more"),
        (FAST, change(TOKENIZER, lambda t: t.update(pre_tokenizer={"type": "FixedLength", "length": 0}))),
    ),
    "a decoder that strips ends": Bad(
        (TOKENIZER, "decoder.stop=1; needs 0"),
        (
            FAST,
            change(
                TOKENIZER,
                lambda t: t.update(decoder={"type": "Strip", "content": " ", "start": 0, "stop": 1}),
            ),
        ),
    ),
    "another id of the first token": _tokenizer(
        lambda t: t["post_processor"]["special_tokens"]["[CLS]"].update(ids=[7]), "post_processor", "101"
    ),
    "token types": _tokenizer(
        lambda t: t["post_processor"]["single"][1]["Sequence"].update(type_id=1), "post_processor"
    ),
    "token types, as it is": Bad(
        (TOKENIZER, "token types"),
        (
            FAST,
            change(TOKENIZER, lambda t: t["post_processor"]["single"][1]["Sequence"].update(type_id=1)),
        ),
    ),
    "long words": _tokenizer(
        lambda t: t["model"].update(max_input_chars_per_word=20), "max_input_chars_per_word"
    ),
    "prefix of subwords": _tokenizer(lambda t: t["model"].update(continuing_subword_prefix="@@"), "@@"),
    "padding on the left": _keys(TOKENIZER_CONFIG, padding_side="left"),
    "padding of tokenizer.json on the left": _tokenizer(
        lambda t: t["padding"].update(direction="Left"), "Left"
    ),
    "truncation side": _keys(TOKENIZER_CONFIG, truncation_side="middle"),
    "class": _keys(TOKENIZER_CONFIG, tokenizer_class="BertJapaneseTokenizer"),
    "class for another model": Bad(
        (TOKENIZER, "model.type", "XLMRobertaTokenizer"),
        (sets(TOKENIZER_CONFIG, tokenizer_class="XLMRobertaTokenizer"),),
    ),
    "lower case as text": _keys(TOKENIZER_CONFIG, do_lower_case="true"),
    "accents as text": _keys(TOKENIZER_CONFIG, strip_accents="no"),
    "special tokens are split": _keys(TOKENIZER_CONFIG, split_special_tokens=True),
    "no attention mask": _keys(TOKENIZER_CONFIG, model_input_names=["input_ids"]),
    "chat template": _keys(TOKENIZER_CONFIG, chat_template="{{ text }}"),
    "code of the tokenizer": _keys(TOKENIZER_CONFIG, auto_map={"AutoTokenizer": ["a.B", None]}),
    "model_max_length 0": Bad(
        (TOKENIZER_CONFIG, "model_max_length"), (removes(BERT), sets(TOKENIZER_CONFIG, model_max_length=0))
    ),
    "unknown key of tokenizer_config.json": _keys(TOKENIZER_CONFIG, uppercase=True),
    "another first token": _keys(TOKENIZER_CONFIG, cls_token="[MASK]")._replace(
        words=(TOKENIZER, "post_processor", "[MASK]"), edits=(sets(SPECIAL, cls_token="[MASK]"),)
    ),
    "another unknown token": Bad((TOKENIZER, "unk_token"), (sets(SPECIAL, unk_token="the"),)),
    "special token that is not there": Bad(
        ("mask_token", "<mask>", TOKENIZER),
        (drops(SPECIAL, "mask_token"), sets(TOKENIZER_CONFIG, mask_token="<mask>")),
    ),
    "special token that is a number": _keys(SPECIAL, mask_token=103),
    "unknown key of special_tokens_map.json": _keys(SPECIAL, end_token="[SEP]"),
    "added tokens that are not there": Bad(
        ("added_tokens.json", "<e1>"), (writes("added_tokens.json", {"<e1>": 7}),)
    ),
    "added tokens that disagree": Bad(
        (TOKENIZER_CONFIG, "added_tokens_decoder", "the"),
        (
            sets(
                TOKENIZER_CONFIG,
                added_tokens_decoder={"1996": {"content": "the", "special": True}},
            ),
        ),
    ),
    "vocab.txt without unknown token": Bad(
        ("vocab.txt", "[UNK]"), (removes(TOKENIZER), _text("vocab.txt", "[PAD]\n[CLS]\n[SEP]\nthe\n"))
    ),
    "vocab.txt that is too long": Bad(
        ("vocab.txt", "id 30522"),
        (
            removes(TOKENIZER),
            lambda f: _text("vocab.txt", (f / "vocab.txt").read_text("utf-8") + "zebra0\n")(f),
        ),
    ),
    # files
    "adapter": Bad(("adapter_config.json",), (writes("adapter_config.json", {}),)),
    "config of a quantiser": Bad(
        ("quantize_config.json", "quantised"), (writes("quantize_config.json", _GPTQ),)
    ),
    # weights
    "SCB": _with("encoder.layer.0.attention.self.query.SCB", np.ones(96, np.float32), "bitsandbytes"),
    "absmax": _with(f"{QUERY}.absmax", np.ones(96, np.float32), "bitsandbytes"),
    "quant_state": _with(f"{QUERY}.quant_map", np.ones(16, np.float32), "bitsandbytes"),
    "qweight": _with("encoder.layer.0.attention.self.query.qweight", np.ones((12, 96), np.int64), "GPTQ"),
    "packed": _with(
        "encoder.layer.0.attention.self.query.weight_packed", np.ones((12, 96), np.int64), "compressed"
    ),
    "scale": _with("encoder.layer.0.attention.self.query.weight_scale", np.ones(96, np.float32), "FP8"),
    "int64": _query(lambda a: (1000 * a).astype(np.int64), "I64"),
    "bool": _query(lambda a: a > 0, "BOOL"),
    "nan": _query(_put(np.nan), "NaN"),
    "inf": _query(_put(np.inf), "Inf"),
    "nan of a row that no text uses": Bad(
        ("model.safetensors", "word_embeddings", "NaN"),
        (),
        lambda tensors: {
            **tensors,
            "embeddings.word_embeddings.weight": _put(np.nan)(
                tensors["embeddings.word_embeddings.weight"].copy()
            ),
        },
    ),
    "inf, float16": _query(lambda a: _put(np.inf)(a.astype(np.float16)), "Inf"),
    "module.": _renamed(lambda name: f"module.{name}", "module.", "prefix"),
    "module.bert.": _renamed(lambda name: f"module.bert.{name}", "module.bert.", "prefix"),
    "0.auto_model.": _renamed(lambda name: f"0.auto_model.{name}", "0.auto_model.", "prefix"),
    "albert.": _renamed(lambda name: f"albert.{name}", "albert.", "prefix"),
    "the same weight twice": Bad(
        (f"bert.{QUERY}", "the same weight"), (), lambda tensors: {**tensors, f"bert.{QUERY}": tensors[QUERY]}
    ),
    "no query": Bad((QUERY,), (), lambda tensors: {n: a for n, a in tensors.items() if n != QUERY}),
}


def build(folder: Path, bad: Bad, minilm: Path, small: Callable[[Path, Any], Path]) -> Path:
    """The folder of a case. small : `make_model` of tests/test_compress_model.py"""
    from tests.settings.cases import make
    from tests.test_compress_model import cut_tensors

    if bad.tensors is None:
        return make(folder, minilm, bad.edits)
    small(folder, cut_tensors())
    write_safetensors(folder / "model.safetensors", bad.tensors(cut_tensors()))
    return folder

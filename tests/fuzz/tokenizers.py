"""Tokenizers of few tokens with every kind of step, as model files hold them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rbe_gpu.models.stored_tokenizer import ARRAY, stored_tokenizer

from ..test_tokenizer_bounds import charsmap

_LETTERS = "abcdefghijklmnopqrstuvwxyzA.,"
_TOKENS = ["<unk>", "<s>", "</s>", *_LETTERS, "\u2581", "\u2581a", "th", "the", "<0x41>", "an"]
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _replaced(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def _split(pattern: str, behavior: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


def _metaspace(scheme: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": True}


_NORMALIZERS: list[list[dict[str, Any]]] = [
    [{"type": "NFC"}, {"type": "Lowercase"}, {"type": "Strip", "strip_left": True, "strip_right": True}],
    [{"type": "Nmt"}, {"type": "NFKC"}, _replaced(" {2,}", " ", "Regex"), {"type": "StripAccents"}],
    [{"type": "Prepend", "prepend": "\u2581"}, _replaced(" ", "\u2581")],
    [
        {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
         "lowercase": True},
        {"type": "NFD"},
    ],
    [{"type": "Precompiled", "precompiled_charsmap": charsmap("abc")}, {"type": "NFKD"}, {"type": "ByteLevel"}],
]  # fmt: skip
_SPLITTERS: list[list[dict[str, Any]]] = [
    [{"type": "BertPreTokenizer"}, {"type": "FixedLength", "length": 5}],
    [_split("\\s+(?!\\S)|\\s+", "Isolated"), _BYTES, {"type": "UnicodeScripts"}],
    [_metaspace("always"), {"type": "CharDelimiterSplit", "delimiter": ","}],
    [{"type": "WhitespaceSplit"}, {"type": "Punctuation", "behavior": "MergedWithNext"}],
    [{"type": "Whitespace"}, {"type": "Digits", "individual_digits": True}],
]
_DECODERS: list[list[dict[str, Any]]] = [
    [{"type": "WordPiece", "prefix": "##", "cleanup": True}],
    [_BYTES, _replaced("a", "b")],
    [
        _replaced("\u2581", " "), {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
    [_metaspace("first"), {"type": "BPEDecoder", "suffix": "</w>"}],
    [{"type": "CTC", "pad_token": "<unk>", "word_delimiter_token": "\u2581", "cleanup": True}],
]  # fmt: skip
_VOCABULARY = {token: i for i, token in enumerate(_TOKENS)}
_MODELS: list[dict[str, Any]] = [
    {
        "type": "WordPiece", "unk_token": "<unk>", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
        "vocab": _VOCABULARY,
    },
    {
        "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
        "vocab": _VOCABULARY, "merges": [["t", "h"], ["th", "e"], ["a", "n"], ["\u2581", "a"]],
    },
    {
        "type": "Unigram", "unk_id": 0, "byte_fallback": True,
        "vocab": [[token, -float(i)] for i, token in enumerate(_TOKENS)],
    },
    {"type": "WordLevel", "unk_token": "<unk>", "vocab": _VOCABULARY},
    {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": True, "vocab": _VOCABULARY, "merges": ["t h"],
    },
]  # fmt: skip
_PROCESSORS: list[dict[str, Any] | None] = [
    {"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1]},
    {**_BYTES, "trim_offsets": False},
    {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    },
    {
        "type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1], "trim_offsets": True,
        "add_prefix_space": False,
    },
    None,
]  # fmt: skip


def _tokenizers() -> Iterator[bytes]:
    for i, model in enumerate(_MODELS):
        token = {"id": 2, "content": "</s>", "single_word": i == 1, "lstrip": i == 2, "rstrip": i == 3}
        value = {
            "version": "1.0",
            "truncation": {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0},
            "padding": None if i else {
                "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                "pad_type_id": 0, "pad_token": "<unk>",
            },
            "added_tokens": [{**token, "normalized": i == 4, "special": True}],
            "normalizer": {"type": "Sequence", "normalizers": _NORMALIZERS[i]},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": _SPLITTERS[i]},
            "post_processor": _PROCESSORS[i],
            "decoder": {"type": "Sequence", "decoders": _DECODERS[i]},
            "model": model,
        }  # fmt: skip
        yield json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def stored_texts(encoder: Path, decoder: Path) -> Iterator[tuple[str, str, bytes]]:
    """Model, array ("zst" or "zlib") and text of tokenizers, those of the folders of the models first."""
    import zstandard

    for model, folder in (("encoder", encoder), ("decoder", decoder)):
        text = (folder / "tokenizer.json").read_bytes()
        yield model, "zlib", text
        yield model, ARRAY.rpartition(".")[2], zstandard.decompress(stored_tokenizer(text).tobytes())
    for i, text in enumerate(_tokenizers()):
        packed = zstandard.decompress(stored_tokenizer(text).tobytes())
        yield ("encoder", "decoder")[i % 2], "zst", packed
        yield ("decoder", "encoder")[i % 2], "zst", text

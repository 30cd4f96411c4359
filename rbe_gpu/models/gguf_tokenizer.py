"""The tokenizer.json of a GGUF file, made from its vocabulary.

Two kinds: byte-level BPE ("gpt2"), whose merges the file lists, and SentencePiece BPE ("llama"), whose merges are
every way to split a piece into two others, the best score first. Texts get the ids that transformers' tokenizer for
the file gives them, or that of the original model where both differ (docs/models.md).
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..json_checks import quoted
from .gguf_header import Header
from .settings import shown

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # 5: unused, 6: a byte
_TYPES = range(7)
_SPACE = "\u2581"  # what SentencePiece writes for a space
MAX_PIECE = 512  # characters of a piece of SentencePiece; longer ones make the search for merges slow
MAX_MERGES = 8  # for each piece, on average; Llama 2 has 1.9, Gemma 3 has 2.0

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Split(NamedTuple):
    """How a byte-level tokenizer splits text into words, by the name in tokenizer.ggml.pre.

    Attributes
    ----------
    pattern : a regular expression of words; None: that of GPT-2
    digits : each digit is a word, before the pattern
    whole_words : a word that is in the vocabulary is one token, whatever the merges make of it
    add_bos : whether texts begin with bos_token_id where the file does not say
    normalizer : of text
    """

    pattern: str | None = None
    digits: bool = False
    whole_words: bool = False
    add_bos: bool = False
    normalizer: str | None = None


_OF_LLAMA3 = Split(_LLAMA3, whole_words=True, add_bos=True)
SPLITS = {
    **dict.fromkeys(("default", "gpt-2"), Split()),
    "smollm": Split(digits=True),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _OF_LLAMA3),
    "tekken": Split(_TEKKEN, whole_words=True, add_bos=True),
    "qwen2": Split(_QWEN2, normalizer="NFC"),
}


class _Vocabulary:
    """The checked vocabulary of a file."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.tokens = header.texts("tokenizer.ggml.tokens")
        # llama.cpp's name for a token without text
        self.tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(self.tokens)]
        self.respelled: set[int] = set()  # tokens that are not in the file as they are here
        self.types: Sequence[int] = [_NORMAL] * len(self.tokens)
        if "tokenizer.ggml.token_type" in header.metadata:
            self.types = self.numbers("tokenizer.ggml.token_type").tolist()
            if not all(kind in _TYPES for kind in set(self.types)):
                self.fail("tokenizer.ggml.token_type", "holds other numbers than 0 to 6")

    def fail(self, key: str, message: str) -> NoReturn:
        raise ValueError(f"{self.header.where}: {key} {message}")

    def numbers(self, key: str) -> NDArray[Any]:
        """A list of numbers, one for each token."""
        numbers = self.header.numbers(key)
        if len(numbers) != len(self.tokens):
            self.fail(key, f"has {len(numbers)} items for {len(self.tokens)} tokens")
        return numbers

    def ids(self) -> dict[str, int]:
        """token -> id; all tokens must differ."""
        ids = {token: i for i, token in enumerate(self.tokens)}
        if len(ids) != len(self.tokens):
            for i, token in enumerate(self.tokens):
                if ids[token] != i:
                    self.fail(
                        "tokenizer.ggml.tokens", f"has the token {quoted(token)} twice, {i} and {ids[token]}"
                    )
        return ids

    def unknown(self) -> int | None:
        """The token of unknown_token_id."""
        key = "tokenizer.ggml.unknown_token_id"
        value = self.header.metadata.get(key)
        if value is not None and (type(value) is not int or not 0 <= value < len(self.tokens)):
            self.fail(key, f"is {shown(str(value))}; needs a token below {len(self.tokens)}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        key = f"tokenizer.ggml.{name}"
        value = self.header.metadata.get(key, default)
        if type(value) is not bool:
            self.fail(key, f"is {shown(str(value))}; needs true or false")
        return value


def tokenizer_json(header: Header, config: Mapping[str, Any]) -> bytes | None:
    """The tokenizer.json of a file whose header is checked; None if it has no vocabulary.

    Parameters
    ----------
    config : of `gguf_config.config_of`

    Raises
    ------
    ValueError
        The vocabulary is of a kind that is not supported, or it is damaged; the message names the key.
    """
    kind = header.metadata.get("tokenizer.ggml.model")
    if kind in (None, "no_vocab", "none"):
        return None
    makers = {"gpt2": _byte_level, "llama": _sentencepiece}
    if not isinstance(kind, str) or kind not in makers:
        raise ValueError(
            f"{header.where}: tokenizer.ggml.model={shown(str(kind))}; supported: {', '.join(makers)}"
        )
    vocabulary = _Vocabulary(header)
    parts, merges, add_bos = makers[kind](vocabulary, config)
    added = _added_tokens(vocabulary, config, parts.pop("vocab"))
    outer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": parts.pop("normalizer"),
        "pre_tokenizer": parts.pop("pre_tokenizer"),
        "post_processor": _ends(vocabulary, config, add_bos),
        "decoder": parts.pop("decoder"),
    }
    words = [json.dumps(token, ensure_ascii=False) for token in vocabulary.tokens]
    # by hand: half a million pairs as lists would take 100 MB
    made = bytearray()
    made += _json(outer)[:-1] + b',"model":' + _json({"type": "BPE", "dropout": None, **parts})[:-1]
    made += b',"vocab":{'
    _append(made, (f"{word}:{i}" for i, word in enumerate(words)))
    made += b'},"merges":['
    _append(made, (f"[{words[left]},{words[right]}]" for left, right in zip(*merges, strict=True)))
    made += b"]}}"
    return bytes(made)


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _append(made: bytearray, items: Iterator[str]) -> None:
    """Append items with commas between them, some thousand at a time."""
    comma = b""
    while part := ",".join(islice(items, 8192)):
        made += comma + part.encode()
        comma = b","


#: keys of a tokenizer.json and of its model, and the vocabulary; ids of merged pairs; whether texts begin with BOS
_Made = tuple[dict[str, Any], tuple[Sequence[int], Sequence[int]], bool]


# --- byte-level BPE -----------------------------------------------------------------------------------


def _byte_level(vocabulary: _Vocabulary, config: Mapping[str, Any]) -> _Made:
    pre = vocabulary.header.metadata.get("tokenizer.ggml.pre")
    if not isinstance(pre, str) or pre not in SPLITS:
        vocabulary.fail("tokenizer.ggml.pre", f"is {shown(str(pre))}; supported: {', '.join(SPLITS)}")
    if vocabulary.flag("add_space_prefix", False):
        vocabulary.fail("tokenizer.ggml.add_space_prefix", "is true; needs false for the model gpt2")
    split, ids = SPLITS[pre], vocabulary.ids()
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": split.pattern is None,
    }
    steps: list[dict[str, Any]] = [byte_level]
    if split.pattern is not None:
        pattern = {"Regex": split.pattern}
        steps.insert(0, {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False})
    if split.digits:
        steps.insert(0, {"type": "Digits", "individual_digits": True})
    parts = {
        "vocab": ids,
        "normalizer": None if split.normalizer is None else {"type": split.normalizer},
        "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        "decoder": {**byte_level, "use_regex": True},
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": split.whole_words,
    }
    return parts, _listed_merges(vocabulary, ids), split.add_bos


def _listed_merges(vocabulary: _Vocabulary, ids: Mapping[str, int]) -> tuple[Sequence[int], Sequence[int]]:
    """The merges that a file lists, as pairs of ids."""
    key = "tokenizer.ggml.merges"
    left, right = array("i"), array("i")
    listed = vocabulary.header.lists.get(key)
    if listed is not None and listed.items > MAX_MERGES * len(ids):
        vocabulary.fail(key, f"has {listed.items} items for {len(ids)} tokens; at most {MAX_MERGES} for each")
    for i, merge in enumerate(vocabulary.header.each_text(key)):
        a, space, b = merge.partition(" ")
        if a not in ids or b not in ids or not space:
            vocabulary.fail(
                key, f"has {quoted(merge)} as item {i}, which are no two tokens of the vocabulary"
            )
        if a + b not in ids:
            vocabulary.fail(key, f"has {quoted(merge)} as item {i}, which make no token of the vocabulary")
        left.append(ids[a])
        right.append(ids[b])
    return left, right


# --- SentencePiece BPE --------------------------------------------------------------------------------


def _sentencepiece(vocabulary: _Vocabulary, config: Mapping[str, Any]) -> _Made:
    gemma = config["model_type"].startswith("gemma")
    if "tokenizer.ggml.merges" in vocabulary.header.metadata:
        vocabulary.fail("tokenizer.ggml.merges", "is not supported for the model llama")
    tokens = vocabulary.tokens
    with np.errstate(invalid="ignore"):  # of NaN, which is refused
        scores: NDArray[Any] = vocabulary.numbers("tokenizer.ggml.scores").astype(np.float64)
    if not np.isfinite(scores).all():
        vocabulary.fail("tokenizer.ggml.scores", "holds NaN or Inf")
    prefix = vocabulary.flag("add_space_prefix", not gemma)
    if gemma:
        if prefix:
            vocabulary.fail("tokenizer.ggml.add_space_prefix", "is true; needs false for a Gemma")
        # llama.cpp writes runs of spaces as they are, and scores do not follow the order of merges
        for i, token in enumerate(tokens):
            if token == " " * len(token):
                tokens[i] = _SPACE * len(token)
                vocabulary.respelled.add(i)
        scores = -np.arange(len(tokens), dtype=np.float64)
    ids = vocabulary.ids()
    unknown = vocabulary.unknown()
    if unknown is None:
        unknown = next((i for i, kind in enumerate(vocabulary.types) if kind == _UNKNOWN), None)
    spaces = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    steps: list[dict[str, Any]] = [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    parts = {
        "vocab": ids,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE} if gemma else None,
        "pre_tokenizer": None
        if gemma
        else {
            "type": "Metaspace",
            "replacement": _SPACE,
            "prepend_scheme": "first" if prefix else "never",
            "split": False,
        },
        "decoder": {"type": "Sequence", "decoders": steps},
        "unk_token": None if unknown is None else tokens[unknown],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
    }
    return parts, _scored_merges(vocabulary, ids, scores), True


def _scored_merges(
    vocabulary: _Vocabulary, ids: Mapping[str, int], scores: NDArray[np.float64]
) -> tuple[Sequence[int], Sequence[int]]:
    """Every split of a piece into two others: the best score first, then the longest left part, then by ids.

    The order is that of transformers' `generate_merges`.
    """
    key = "tokenizer.ggml.tokens"
    merged, left, right = array("i"), array("i"), array("i")
    lengths = np.fromiter(map(len, vocabulary.tokens), np.int64, len(vocabulary.tokens))
    if lengths.size and lengths.max() > MAX_PIECE:
        i = int(lengths.argmax())
        vocabulary.fail(key, f"has {lengths[i]} characters in token {i}; at most {MAX_PIECE} are supported")
    most = MAX_MERGES * len(vocabulary.tokens)
    get = ids.get
    for i, token in enumerate(vocabulary.tokens):
        for at in range(1, len(token)):
            first = get(token[:at])
            if first is not None:
                second = get(token[at:])
                if second is not None:
                    merged.append(i)
                    left.append(first)
                    right.append(second)
        if len(merged) > most:
            vocabulary.fail(key, f"can be merged in more than {MAX_MERGES} ways for each token")
    piece, a, b = (np.frombuffer(part, np.int32) for part in (merged, left, right))
    short = (-lengths).astype(np.int16)
    order = np.lexsort((b, a, piece, short[b], short[a], -scores[piece]))
    return array("i", a[order].tobytes()), array("i", b[order].tobytes())


# --- special tokens -----------------------------------------------------------------------------------


def _added_tokens(
    vocabulary: _Vocabulary, config: Mapping[str, Any], ids: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Tokens that text may contain: those of type control, unknown and user-defined, and those that the keys name."""
    ends = config["eos_token_id"]
    special = {config["bos_token_id"], config["pad_token_id"], *(ends if isinstance(ends, list) else [ends])}
    unknown = vocabulary.unknown()
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [
        {"id": i, "content": token, **flags, "special": kind != _USER_DEFINED or i in special}
        for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind in (_CONTROL, _UNKNOWN)
        or i in special
        or i == unknown
        # a Gemma's runs of spaces are found by merges
        or (kind == _USER_DEFINED and i not in vocabulary.respelled)
    ]


def _ends(vocabulary: _Vocabulary, config: Mapping[str, Any], add_bos: bool) -> dict[str, Any] | None:
    """The post-processor that puts BOS before a text and EOS behind it, as the file says."""
    text = {"Sequence": {"id": "A", "type_id": 0}}
    steps: list[dict[str, Any]] = [text]
    used: dict[str, Any] = {}
    eos = config["eos_token_id"]
    for name, number, default in (
        ("bos", config["bos_token_id"], add_bos and config["bos_token_id"] is not None),
        ("eos", eos[0] if isinstance(eos, list) else eos, False),
    ):
        if not vocabulary.flag(f"add_{name}_token", default):
            continue
        if number is None:
            vocabulary.fail(f"tokenizer.ggml.add_{name}_token", f"is true, but there is no {name}_token_id")
        token = vocabulary.tokens[number]
        used[token] = {"id": token, "ids": [number], "tokens": [token]}
        steps.insert(0 if name == "bos" else len(steps), {"SpecialToken": {"id": token, "type_id": 0}})
    if not used:
        return None
    second = [{kind: {**value, "type_id": 1} for kind, value in step.items()} for step in steps]
    second[steps.index(text)]["Sequence"]["id"] = "B"
    return {"type": "TemplateProcessing", "single": steps, "pair": [*steps, *second], "special_tokens": used}

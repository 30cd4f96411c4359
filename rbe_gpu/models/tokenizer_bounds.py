"""Bounds of the steps of a tokenizer.json, which are untrusted: how many there are, and what they make of a text.

    bytes behind the steps <= product of the growth of the steps * (bytes of the text + 1)

The growth of a step is the largest that its type and settings allow, whatever the text. Decoders take tokens one by
one, so for them it holds token by token. Consecutive replacements of texts count once, by the largest, unless one
takes a character that another before it has made.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .settings import fail

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_STEPS = (
    128  # of the normaliser and pre-tokeniser, the decoder or the post-processor; models have up to a dozen
)
MAX_GROWTH = 1 << 14  # steps like those of ALBERT reach 6,534
MAX_ADDED = 1024  # tokens around a text; most models add two
#: Brackets, commas and colons of a tokenizer.json: how many are allowed, and for how many bytes one more. tokenizers
#: takes up to 160 bytes for one in a vocabulary, and 360 for one of an object in a step. The tokenizers of MiniLM and
#: SmolLM2 have 0.13 and 0.16 for each byte, and few objects beside the added tokens, each of more than 100 bytes.
_MARKS = ((b"[{,:", 1 << 18, 4), (b"{", 1 << 14, 20))
_NESTED = ("normalizers", "pretokenizers", "decoders", "processors")  # steps of a Sequence

#: Types by the attribute of the tokenizer, with the growth of those whose settings do not change it. Of Unicode's
#: forms: https://www.unicode.org/faq/normalization.html (UTF-8). Others: a space on both sides of a Chinese
#: character, NFD and Lowercase (BertNormalizer), two bytes for one (ByteLevel), a space before a token (WordPiece).
_GROWTH: dict[str, dict[str, float]] = {
    "normalizer": {
        "BertNormalizer": 8.0,
        "ByteLevel": 2.0,
        "Lowercase": 1.5,
        "NFC": 3.0,
        "NFD": 3.0,
        "NFKC": 11.0,
        "NFKD": 11.0,
        "Nmt": 1.0,
        "Precompiled": 1.0,
        "Prepend": 1.0,
        "Replace": 1.0,
        "Strip": 1.0,
        "StripAccents": 1.0,
    },
    "pre_tokenizer": {
        "BertPreTokenizer": 1.0,
        "ByteLevel": 2.0,
        "CharDelimiterSplit": 1.0,
        "Digits": 1.0,
        "FixedLength": 1.0,
        "Metaspace": 1.0,
        "Punctuation": 1.0,
        "Split": 1.0,
        "UnicodeScripts": 1.0,
        "Whitespace": 1.0,
        "WhitespaceSplit": 1.0,
    },
    "decoder": {
        "BPEDecoder": 1.0,
        "ByteFallback": 1.0,
        "ByteLevel": 2.0,
        "CTC": 1.0,
        "Fuse": 1.0,
        "Metaspace": 1.0,
        "Replace": 1.0,
        "Strip": 1.0,
        "WordPiece": 2.0,
    },
}
#: A regular expression whose match has a character: each of its alternatives begins with one that must be there. It
#: may hold no group with a question mark (options, comments, assertions) and no \K, which change what that means.
_ESCAPE = r"\\(?:[sSdDwWhHnrt]|[pP]\{[^{}]*\}|u[0-9a-fA-F]{4}|[^\w\s])"
_CHARACTER = re.compile(
    rf"(?:[^\\\[\](){{}}*+?.^$#]|\.|{_ESCAPE}|\[\^?(?:{_ESCAPE}|[^\[\]\\^])(?:{_ESCAPE}|[^\[\]\\])*\])"
    r"(?:\+|\{[1-9][0-9]*(?:,[0-9]*)?\})?(?![*+?{])"
)


def check_text(text: bytes, where: object) -> None:
    """Refuse a tokenizer.json whose parsing takes more memory than one with a vocabulary does, before it is parsed.

    Raises
    ------
    ValueError
        More brackets, commas and colons, or more of them that begin an object, than `_MARKS` allows.
    """
    for marks, spare, bytes_each in _MARKS:
        number = sum(text.count(mark) for mark in marks)
        if number > spare + len(text) // bytes_each:
            what = "brackets, commas and colons" if len(marks) > 1 else "braces"
            raise ValueError(
                f"{where} has {len(text)} bytes of JSON, {number} of them {what}: more than a tokenizer has"
            )


def check_bounds(tokenizer: Tokenizer, where: object) -> None:
    """Refuse steps that could multiply a text, in time linear in their JSON; no text is encoded.

    Raises
    ------
    ValueError
        More than MAX_STEPS, MAX_GROWTH or MAX_ADDED, a type that is not known, a template that does not hold the
        text once, or a setting with which tokenizers panics.
    """
    steps = {
        name: list(_steps(getattr(tokenizer, name), name, where))
        for name in ("normalizer", "pre_tokenizer", "decoder", "post_processor")
    }
    _check_processors(steps.pop("post_processor"), where)
    _check_panics(steps, where)
    growths = {name: _growth(those, name, where) for name, those in steps.items()}
    for growth in (growths["normalizer"] * growths["pre_tokenizer"], growths["decoder"]):
        if growth > MAX_GROWTH:
            raise ValueError(
                f"{where} has steps that make up to {growth:.1e} bytes of one byte of text; {MAX_GROWTH} are allowed"
            )


def _steps(part: Any, name: str, where: object) -> Iterator[Mapping[str, Any]]:
    """The steps of a part in their order, those of sequences in place of these."""
    stack, number = [] if part is None else [json.loads(part.__getstate__())], 0
    while stack:
        step = stack.pop()
        inner = next((step[key] for key in _NESTED if key in step), None)
        number += len(inner or ())
        if number > MAX_STEPS:
            raise ValueError(f"{where} has a {name} of more than {MAX_STEPS} steps")
        if inner is None:
            yield step
        else:
            stack += reversed(inner)


def _check_processors(steps: Sequence[Mapping[str, Any]], where: object) -> None:
    """Refuse templates that hold the text twice, whose windows multiply, and what makes tokenizers panic."""
    around = [step for step in steps if step["type"] != "ByteLevel"]
    if len(around) > 1:
        kinds = [step["type"] for step in around]
        fail(where, "post_processor.processors", kinds, "one that puts tokens around a text")
    for step in around:
        if step["type"] != "TemplateProcessing":
            continue
        special, texts, added = step["special_tokens"], 0, 0
        for piece in step["single"]:
            token = piece.get("SpecialToken", {}).get("id")
            if token is not None and token not in special:
                fail(where, "post_processor.single", piece, "a token of its special_tokens")
            if token is None and piece["Sequence"]["id"] != "A":
                fail(where, "post_processor.single", piece, "the Sequence A alone")
            texts += token is None
            added += 0 if token is None else len(special[token]["ids"])
        if texts != 1:
            raise ValueError(
                f"{where} has a post_processor.single with the Sequence A {texts} times; needs it once"
            )
        if added > MAX_ADDED:
            raise ValueError(
                f"{where} has a post_processor that adds {added} tokens to a text; {MAX_ADDED} are allowed"
            )


def _check_panics(steps: Mapping[str, Sequence[Mapping[str, Any]]], where: object) -> None:
    """Refuse settings with which tokenizers panics: at the first word, or at tokens that a text may hold."""
    for step in steps["pre_tokenizer"]:
        if step["type"] == "FixedLength" and not step["length"]:
            fail(where, "pre_tokenizer.length", step["length"], "1 or more")
    for step in steps["decoder"]:
        # at a token with fewer characters than `stop` and no other ones, an empty token above all, and where the
        # characters at both ends are the same ones
        if step["type"] == "Strip" and step["stop"]:
            fail(where, "decoder.stop", step["stop"], "0, as tokenizers fails at short tokens with others")


def _growth(steps: Sequence[Mapping[str, Any]], name: str, where: object) -> float:
    product, largest = 1.0, 1.0  # of the steps so far without the last replacements; of these
    made: set[str] | None = None  # characters that the last replacements have made
    for step in steps:
        if step["type"] not in _GROWTH[name]:
            fail(where, f"{name}.type", step["type"], f"one of {', '.join(_GROWTH[name])}")
        growth = max(_GROWTH[name][step["type"]], _growth_of_settings(step, name))
        text = step["pattern"].get("String") if step["type"] == "Replace" else None
        if text and made is not None and made.isdisjoint(text):
            largest = max(largest, growth)
            made.update(step["content"])
        else:
            product, largest = product * largest, growth
            made = set(step["content"]) if text else None
    return product * largest


def _growth_of_settings(step: Mapping[str, Any], name: str) -> float:
    kind = step["type"]
    if kind == "Replace":
        ((pattern_kind, pattern),) = step["pattern"].items()
        made = len(step["content"].encode())
        if pattern_kind == "String" and pattern:
            return made / len(pattern.encode())
        return made if pattern_kind == "Regex" and _takes_characters(pattern) else 1.0 + made
    if kind == "Prepend":
        return 1.0 + len(step["prepend"].encode())
    if kind == "Precompiled":
        return _longest(step["precompiled_charsmap"])
    if name == "pre_tokenizer" and kind == "Metaspace":
        return 1.0 + len(step["replacement"].encode())  # before each word, and a word may have one character
    if name == "pre_tokenizer" and kind == "ByteLevel":
        return 4.0 if step["add_prefix_space"] else 2.0
    if kind == "BPEDecoder":
        return 1.0 if step["suffix"] else 2.0  # a space beside every character
    if kind == "CTC":
        return 1.0 if step["word_delimiter_token"] else 2.0
    return 1.0


def _takes_characters(pattern: str) -> bool:
    """Whether no match of a regular expression is empty; False, where it is not one of the simple ones."""
    return not re.search(r"\(\?|\\K", pattern) and all(map(_CHARACTER.match, pattern.split("|")))


def _longest(charsmap: str | None) -> int:
    """Bytes of the longest text in a character map of sentencepiece: uint32 n, n bytes of a trie, texts with a 0."""
    try:
        data = base64.b64decode(charsmap or "")
    except binascii.Error:
        return len(charsmap or "")
    texts = data[4 + int.from_bytes(data[:4], "little") :]
    return max((match.end() - match.start() for match in re.finditer(rb"[^\0]+", texts)), default=0)

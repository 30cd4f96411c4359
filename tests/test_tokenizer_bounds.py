"""Bounds of a tokenizer's steps against what tokenizers makes of texts."""

from __future__ import annotations

import base64
import json
import sys
import time
import unicodedata
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from rbe_gpu.models import tokenizer_bounds
from rbe_gpu.models.tokenizer import read_tokenizer
from rbe_gpu.models.tokenizer_bounds import check_bounds
from tests import real

Replace = normalizers.Replace
#: every character that a Unicode form or Lowercase changes, and some that they do not
CHARACTERS = [
    c
    for c in map(chr, range(sys.maxunicode + 1))
    if not "\ud800" <= c <= "\udfff"
    and (
        unicodedata.decomposition(c)
        or c.lower() != c
        or c < "\u0300"
        or "\uac00" <= c <= "\uad00"
        or c == "\u4e00"
    )
]
TEXTS = [
    "a",
    "ab",
    "a b",
    "aaaa",
    "bcb",
    "  ",
    " a",
    "\ufdfa",
    "\u0390",
    "A\u0130",
    "x" * 50,
    "## ab",
    "\u4e00",
]


def charsmap(text: str) -> str:
    """A character map of sentencepiece that makes `text` of an a: a double array of 1,024 units, and the text."""
    units = np.zeros(1024, "<u4")
    units[0] = 256 << 10  # the children of the root: 256 xor a byte
    units[256 ^ ord("a")] = 512 << 10 | 1 << 8 | ord("a")  # a leaf
    return base64.b64encode(
        np.uint32(units.nbytes).tobytes() + units.tobytes() + text.encode() + b"\0"
    ).decode()


def precompiled(text: str) -> Any:
    return normalizers.Precompiled(base64.b64decode(charsmap(text)))


def growth(part: str, *steps: Any) -> float:
    return tokenizer_bounds._growth([json.loads(step.__getstate__()) for step in steps], part, "m")


NORMALIZERS = [
    *(
        getattr(normalizers, name)()
        for name in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Nmt", "StripAccents")
    ),
    normalizers.BertNormalizer(),
    normalizers.BertNormalizer(strip_accents=True, lowercase=False),
    normalizers.ByteLevel(),
    normalizers.Strip(),
    normalizers.Prepend("\u2581"),
    normalizers.Prepend("abc"),
    precompiled("abcdefgh" * 10),
    Replace("a", "bb"),
    Replace("", "xy"),
    Replace("ab", ""),
    *(
        Replace(Regex(pattern), "xyz")
        for pattern in ("a", "a*", "(?=.)", "", r"\s+", "[^]]*", "a{2}?", "a|", "^")
    ),
]


@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=str)
def test_normalizers(normalizer: Any) -> None:
    """n bytes become growth * (n + 1) at most."""
    bound = growth("normalizer", normalizer)
    for text in TEXTS:
        assert len(normalizer.normalize_str(text).encode()) <= bound * (len(text.encode()) + 1)


@pytest.mark.parametrize(
    ("name", "exact"),
    [("NFC", 3), ("NFD", 3), ("NFKC", 11), ("NFKD", 11), ("Lowercase", 1.5), ("ByteLevel", 2)],
)
def test_growth_of_unicode_forms(name: str, exact: float) -> None:
    step = getattr(normalizers, name)()
    assert max(len(step.normalize_str(c).encode()) / len(c.encode()) for c in CHARACTERS) == exact
    assert growth("normalizer", step) == exact


@pytest.mark.parametrize("strip_accents", [None, False, True])
def test_growth_of_the_bert_normalizer(strip_accents: bool | None) -> None:
    step = normalizers.BertNormalizer(strip_accents=strip_accents)
    assert max(len(step.normalize_str(c).encode()) / len(c.encode()) for c in CHARACTERS) <= 3
    assert growth("normalizer", step) == 8


def test_growth_of_a_charsmap() -> None:
    """The longest of its texts, which it makes of a byte."""
    step = precompiled("b" * 100)
    assert step.normalize_str("a") == "b" * 100
    assert growth("normalizer", step) == 100


@pytest.mark.parametrize(
    "splitter",
    [
        pre_tokenizers.Metaspace("A"),
        pre_tokenizers.Metaspace("\u2581"),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.BertPreTokenizer(),
        pre_tokenizers.Split(Regex("a|"), "isolated"),
    ],
    ids=str,
)
def test_pre_tokenizers(splitter: Any) -> None:
    """Behind one that makes a word of each character, as prefixes are put before words."""
    each = pre_tokenizers.Split(Regex("."), "isolated")
    for text in (*TEXTS, *CHARACTERS[:2000]):
        pieces = pre_tokenizers.Sequence([each, splitter]).pre_tokenize_str(text)
        assert sum(len(piece.encode()) for piece, _ in pieces) <= growth("pre_tokenizer", splitter) * len(
            text.encode()
        )


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.BPEDecoder(suffix=""),
        decoders.BPEDecoder(suffix="a"),
        decoders.CTC(word_delimiter_token=""),
        decoders.CTC(word_delimiter_token="a", pad_token=""),
        decoders.WordPiece(prefix="##", cleanup=False),
        decoders.ByteFallback(),
        decoders.ByteLevel(),
        decoders.Metaspace(),
        decoders.Fuse(),
        decoders.Replace("a", "bcd"),
    ],
    ids=str,
)
def test_decoders(decoder: Any) -> None:
    """Token by token, empty ones too."""
    for tokens in (TEXTS, ["", "a", ""], ["<0xE4>", "<0xff>"], ["\xff" * 9, "\u0100"], ["a"] * 5, CHARACTERS):
        size = sum(len(token.encode()) + 1 for token in tokens)
        assert len(decoder.decode(list(tokens)).encode()) <= growth("decoder", decoder) * size


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (1, 1), (2, 2**31)])
def test_a_decoder_that_panics(start: int, stop: int) -> None:
    """At empty tokens, and at those that one end or both leave nothing of."""
    step = decoders.Strip("a", start, stop)
    with pytest.raises(BaseException, match="index out of bounds") as error:
        step.decode([""])
    assert type(error.value).__name__ == "PanicException"
    with pytest.raises(ValueError, match=rf"^m has decoder\.stop={stop}; needs 0, as tokenizers fails at"):
        check_bounds(chain([], None, [step]), "m")
    for token in ("", "a", "aa", "ba"):
        decoders.Strip("a", start, 0).decode([token])
    check_bounds(chain([], None, [decoders.Strip("a", start, 0)]), "m")


def test_every_type_is_known() -> None:
    for module, name, others in (
        (normalizers, "normalizer", {"Normalizer", "NORMALIZERS"}),
        (pre_tokenizers, "pre_tokenizer", {"PreTokenizer"}),
        (decoders, "decoder", {"Decoder", "DecodeStream"}),
    ):
        types = {word for word in dir(module) if word[0].isupper()} - others - {"Sequence"}
        assert types <= set(tokenizer_bounds._GROWTH[name])
    with pytest.raises(ValueError, match=r'^m has decoder\.type="Uppercase"; needs one of BPEDecoder, '):
        tokenizer_bounds._growth([{"type": "Uppercase"}], "decoder", "m")


@pytest.mark.parametrize(
    "pattern",
    [
        "[\u2000-\u200f]",
        " {2,}",
        r"\s+",
        "a|b",
        r"\p{L}+x?",
        ".",
        r"[^\S\n]+",
        r"\.",
        "a{2}",
        "[a-z]b*",
        "\u2581",
    ],
)
def test_expressions_that_take_characters(pattern: str) -> None:
    assert tokenizer_bounds._takes_characters(pattern)
    step = Replace(Regex(pattern), "x")
    assert all(len(step.normalize_str(text)) <= len(text) for text in TEXTS)


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "",
            "a*",
            "a?",
            "a{0,3}",
            "a{,3}",
            "a+*",
            "a{2}?",
            "a{2}*",
            "[^]]*",
            "a(?#c)*",
            "a|",
            "|a",
            "^",
            "$",
        ),
        *(r"\b", r"a\K", "(?=a)", r"\1a", r"[\c]]*", "a++*", "[[a]]*", "[a]*", "a{10}{0}", "a{1,2}?", "(a|)"),
    ],
)
def test_expressions_that_may_take_nothing(pattern: str) -> None:
    assert not tokenizer_bounds._takes_characters(pattern)


def chain(normalizer: list[Any], splitter: Any = None, decoder: list[Any] | None = None) -> Any:
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.Sequence(normalizer)
    if splitter is not None:
        tokenizer.pre_tokenizer = splitter
    if decoder is not None:
        tokenizer.decoder = decoders.Sequence(decoder)
    return tokenizer


SPACES = Replace(Regex(" {2,}"), "\u2581")
NFKC_MAP = precompiled("\u0635" * 15 + "   ")  # 33 bytes, as long as the longest of XLM-R's
QUOTES = zip(
    "\uff0c\u3002\u3001\u201d\u201c\u2236\uff1a\uff1f\u300a\u300b", "`,.".ljust(10, '"'), strict=True
)
CHAINS = {
    "bert": chain([normalizers.BertNormalizer()], pre_tokenizers.BertPreTokenizer(), [decoders.WordPiece()]),
    "albert": chain(
        [
            *(Replace(a, '"') for a in ("``", "''")),
            *(normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase(), NFKC_MAP, SPACES),
        ],
        pre_tokenizers.Metaspace(),
        [decoders.Metaspace()],
    ),
    "xlm-r": chain(
        [NFKC_MAP, SPACES],
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]),
    ),
    "llama": chain(
        [normalizers.Prepend("\u2581"), Replace(" ", "\u2581")],
        None,
        [
            decoders.Replace("\u2581", " "),
            *(decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)),
        ],
    ),
    "qwen": chain(
        [normalizers.NFC()],
        pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(r"\s+(?!\S)"), "isolated"), pre_tokenizers.ByteLevel(False)]
        ),
        [decoders.ByteLevel()],
    ),
    "clip": chain([normalizers.NFC(), Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]),
    "15 kinds of spaces": chain([Replace(Regex("[\u2000-\u200f]"), " ")] * 15),
    "punctuation": chain([Replace(a, b) for a, b in QUOTES]),
    "two maps": chain([NFKC_MAP, NFKC_MAP]),
    "map and prefix": chain([NFKC_MAP, normalizers.Prepend("\u2581"), SPACES, Replace(Regex(r"\s+"), " ")]),
    "120 emoji": chain(
        [Replace(chr(0x1F600 + i), f" grinning face {i} ") for i in range(120)], pre_tokenizers.ByteLevel()
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_real_chains(name: str) -> None:
    check_bounds(CHAINS[name], name)


def test_time_is_linear() -> None:
    """400,000 steps took 26 s; the number is counted first. Steps with long texts are read once."""
    base = json.loads((real.MODEL_DIR / "tokenizer.json").read_text("utf-8"))
    base["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}] * 400_000}
    many = json.dumps(base).encode()
    start = time.process_time()
    with pytest.raises(ValueError, match="normalizer of more than 128 steps"):
        read_tokenizer(many, "m")
    assert time.process_time() - start < 10
    tokenizer = chain([Replace(chr(0x4E00 + i) * 30_000, "b" * 90_000) for i in range(127)])
    start = time.process_time()
    check_bounds(tokenizer, "m")
    assert time.process_time() - start < 5


@pytest.mark.parametrize("name", ["normalized", r"norm\u0061lized"])
def test_steps_are_checked_before_an_added_token_meets_them(name: str) -> None:
    """tokenizers normalises it when the tokenizer is made: 23 doublings took 5 s and 0.7 GB, then were refused."""
    base = json.loads((real.MODEL_DIR / "tokenizer.json").read_text("utf-8"))
    base["added_tokens"][0].update(content="aa[PAD]", normalized=True)
    base["normalizer"] = {
        "type": "Sequence",
        "normalizers": [json.loads(Replace("a", "aa").__getstate__())] * 24,
    }
    text = json.dumps(base).replace('"normalized"', f'"{name}"').encode()
    start = time.process_time()
    with pytest.raises(
        ValueError, match=r"make up to 1\.7e\+07 bytes of one byte of text; 16384 are allowed$"
    ):
        read_tokenizer(text, "m")
    assert time.process_time() - start < 2


def test_a_stride_of_truncation() -> None:
    """The windows of the text that is encoded here took 0.5 GB and more; the length and the stride have no effect."""
    base = json.loads((real.MODEL_DIR / "tokenizer.json").read_text("utf-8"))
    base["normalizer"] = {"type": "Replace", "pattern": {"String": "a"}, "content": "b " * 8000}
    base["truncation"] = {"direction": "Left", "max_length": 4000, "stride": 3990, "strategy": "LongestFirst"}
    start = time.process_time()
    tokenizer = read_tokenizer(json.dumps(base).encode(), "m")
    assert time.process_time() - start < 2
    assert tokenizer.truncation["direction"] == "left"
    assert tokenizer.truncation["stride"] == 0

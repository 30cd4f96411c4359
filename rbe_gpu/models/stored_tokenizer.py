"""The tokenizer of a model file: tokenizer.json in one array, with its vocabulary as a list. FORMAT.md, section 7."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import MutableMapping
from json.encoder import encode_basestring
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..blocks import RBEBlocks
from ..codecs import entropy
from ..json_checks import FormatError, check_length, failure, parse_json

ARRAY = "tokenizer.json.zst"
_VERSION_1 = "tokenizer.json.zlib"
MAX_BYTES = 64 << 20  # of the text, decompressed
#: Of an array of any size, and for each byte of it: bytes of the text, and brackets, commas and colons of its JSON,
#: each of which takes up to 160 bytes to parse. Tokenizers have 4 to 8 bytes and less than one mark for a byte of
#: their array (SmolLM2: 4.1 and 0.64); many added tokens, all alike, a few hundred thousand marks more.
_SPARE_BYTES, _BYTES = 8 << 20, 16
_SPARE_MARKS, _MARKS = 1 << 18, 1
_EMPTY = b'{"model":{"vocab":{}'  # how the JSON behind a list of tokens begins
_TYPE = re.compile(rb',("type":"[A-Za-z]+")(?=[,}])')  # of the model, where it follows
_PIECE = 1 << 12  # bytes that are decompressed at a time, to at most 4 MB
_LEVEL = 19  # a twentieth of a second for 30,000 tokens


def stored_tokenizer(text: bytes) -> NDArray[np.uint8]:
    """The array of a tokenizer.json.

    A vocabulary whose ids are 0, 1, 2 ... is stored as the list of its tokens: numbers that rise by one have no
    repetitions that a compressor could use, and take half of what the tokens take.

    Raises
    ------
    ValueError
        A reader would refuse it: the text is too large for its array.
    """
    import zstandard

    value = json.loads(text)
    model = value.get("model") if isinstance(value, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if (
        isinstance(model, dict)
        and isinstance(vocabulary, dict)
        and set(vocabulary.values()) == set(range(len(vocabulary)))
    ):
        # the vocabulary first: a reader puts the tokens there without parsing what follows
        rest = {"model": {"vocab": {}, **{k: v for k, v in model.items() if k != "vocab"}}}
        rest |= {k: v for k, v in value.items() if k != "model"}
        tokens = sorted(vocabulary, key=vocabulary.__getitem__)
        text = f"{_dump(tokens)}\n{_dump(rest)}".encode()
    # matches of 4 bytes and more: with shorter ones, as the level has them, BERT's vocabulary takes 5% more
    parameters = zstandard.ZstdCompressionParameters.from_level(_LEVEL, source_size=len(text), min_match=4)
    packed = np.frombuffer(zstandard.ZstdCompressor(compression_params=parameters).compress(text), np.uint8)
    _check_size(len(text), _marks(text), packed.size)
    return packed


def take_tokenizer(tensors: MutableMapping[str, Any], path: Path) -> tuple[bytes, str] | None:
    """The text of tokenizer.json, and what to call it in messages; its array is taken out of the tensors.

    None without one.

    Raises
    ------
    ValueError
        The array is not what FORMAT.md describes.
    """
    names = [name for name in (ARRAY, _VERSION_1) if name in tensors]
    if not names:
        return None
    if len(names) > 1:
        raise ValueError(f"{path}: two tokenizers, {ARRAY} and {_VERSION_1}")
    packed = tensors.pop(names[0])
    if isinstance(packed, RBEBlocks) or packed.dtype != np.uint8:
        raise ValueError(f"{path}: the tokenizer is not an array of uint8")
    if names[0] == _VERSION_1:
        text = _inflated(packed, path)
    else:
        try:
            text = entropy.frame_content(packed, _largest(packed.size))
        except entropy.StreamError as error:
            raise ValueError(f"{path}: the tokenizer is damaged: {error}") from None
    try:
        _check_size(len(text), _marks(text), packed.size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if names[0] == ARRAY and text[:1] == b"[":
        text = _with_vocabulary(text, path)
    return text, f"{path}: {names[0]}"


def _largest(array_bytes: int) -> int:
    """Bytes of the text that an array of so many may hold."""
    return min(MAX_BYTES, _SPARE_BYTES + _BYTES * array_bytes)


def _marks(text: bytes) -> int:
    return sum(text.count(mark) for mark in b"[{,:")


def _check_size(text_bytes: int, marks: int, array_bytes: int) -> None:
    """Refuse a text whose parsing costs more than a file of the array's size may cost."""
    if text_bytes > _largest(array_bytes) or marks > _SPARE_MARKS + _MARKS * array_bytes:
        raise ValueError(
            f"the tokenizer has {text_bytes} bytes of JSON, {marks} of them brackets, commas and colons: too many "
            f"for an array of {array_bytes} bytes"
        )


def _inflated(packed: NDArray[np.uint8], path: Path) -> bytes:
    """The text, once its length is known: zlib joins a text of unknown length from parts, and holds it twice."""
    data, largest = packed.tobytes(), _largest(packed.size)
    stream, length = zlib.decompressobj(), 0
    try:
        for start in range(0, len(data), _PIECE):
            length += len(stream.decompress(data[start : start + _PIECE]))
            if stream.eof or length > largest:
                break
        if not stream.eof or length > largest:
            raise ValueError(f"{path}: the tokenizer is cut off, or larger than {largest} bytes")
        return zlib.decompress(data, bufsize=max(1, length))
    except zlib.error as error:
        raise ValueError(f"{path}: the tokenizer is damaged: {error}") from None


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _with_vocabulary(text: bytes, path: Path) -> bytes:
    """tokenizer.json from the list of its tokens, a line, and what it is without them."""
    where, file_bytes, end = f"{path}: the tokenizer", path.stat().st_size, text.find(b"\n")
    end = len(text) if end < 0 else end
    check_length(end, file_bytes, failure(where), beside=len(text))
    tokens = parse_json(text[:end], where, file_bytes, beside=len(text))
    if not set(map(type, tokens)) <= {str} or len(set(tokens)) != len(tokens):
        raise FormatError(f"{path}: the tokenizer has a list of tokens that are not different texts")
    if not text.startswith(_EMPTY, end + 1):
        raise FormatError(f"{path}: the tokenizer has a list of tokens, and no empty vocabulary behind it")
    head = _TYPE.match(text, end + 1 + len(_EMPTY))
    # its type before the vocabulary: tokenizers then takes 19 ms for 30,000 tokens; 30 where it has to keep them
    start = b'{"model":{' + (head[1] + b"," if head else b"") + b'"vocab":{'
    return b"".join(
        (start, _pairs(text[:end], tokens), b"}", text[head.end() if head else end + 1 + len(_EMPTY) :])
    )


def _pairs(line: bytes, tokens: list[str]) -> bytes:
    """`"token":number,...` from the list of the tokens, and its JSON."""
    inner, last = line[2:-2], len(tokens) - 1
    # 4 ms for 30,000 tokens; one by one 8
    if line[:2] == b'["' and line[-2:] == b'"]' and inner.count(b'","') == last and not _escaped(inner):
        # no space behind a token: each that is between two would leave a `","` less
        return b'"%b":%d' % (inner.replace(b"%", b"%%").replace(b'","', b'":%d,"') % (*range(last),), last)
    return ",".join([f"{encode_basestring(token)}:{i}" for i, token in enumerate(tokens)]).encode()


def _escaped(text: bytes) -> bool:
    """Whether a `","` begins with a quote that is part of a token: behind an odd number of backslashes."""
    at = text.find(b'\\","')
    while at >= 0:
        start = at
        while start and text[start - 1] == ord("\\"):
            start -= 1
        if (at - start) % 2 == 0:
            return True
        at = text.find(b'\\","', at + 1)
    return False

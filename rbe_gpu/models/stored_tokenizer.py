"""The tokenizer of a model file: tokenizer.json in one array, with its vocabulary as a list. FORMAT.md, section 7."""

from __future__ import annotations

import json
import zlib
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..blocks import RBEBlocks
from ..codecs import entropy
from ..json_checks import FormatError, check_cost, failure

ARRAY = "tokenizer.json.zst"
_VERSION_1 = "tokenizer.json.zlib"
MAX_BYTES = 64 << 20  # of the text, decompressed
_LEVEL = 19  # a twentieth of a second for 30,000 tokens


def stored_tokenizer(text: bytes) -> NDArray[np.uint8]:
    """The array of a tokenizer.json.

    A vocabulary whose ids are 0, 1, 2 ... is stored as the list of its tokens: numbers that rise by one have no
    repetitions that a compressor could use, and take half of what the tokens take.
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
        in_order = sorted(vocabulary, key=vocabulary.__getitem__)
        value["model"] = {**model, "vocab": {}}
        text = json.dumps([value, in_order], separators=(",", ":"), ensure_ascii=False).encode()
    return np.frombuffer(zstandard.ZstdCompressor(level=_LEVEL).compress(text), np.uint8)


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
            text = entropy.frame_content(packed, MAX_BYTES).tobytes()
        except entropy.StreamError as error:
            raise ValueError(f"{path}: the tokenizer is damaged: {error}") from None
        if text[:1] == b"[":
            text = _with_vocabulary(text, path)
    return text, f"{path}: {names[0]}"


def _inflated(packed: NDArray[np.uint8], path: Path) -> bytes:
    stream = zlib.decompressobj()
    try:
        text = stream.decompress(packed.tobytes(), MAX_BYTES)
    except zlib.error as error:
        raise ValueError(f"{path}: the tokenizer is damaged: {error}") from None
    if not stream.eof:
        raise ValueError(f"{path}: the tokenizer is cut off, or larger than {MAX_BYTES >> 20} MiB")
    return text


def _with_vocabulary(text: bytes, path: Path) -> bytes:
    """tokenizer.json from `[tokenizer.json with an empty vocabulary, tokens by id]`.

    15 ms for 30,000 tokens. Strict parsing (`json_checks.parse_json`) would take 10 more: what it refuses beyond
    this, the tokenizer's own parser sees, too.
    """
    check_cost(text, path.stat().st_size, failure(f"{path}: the tokenizer"))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise FormatError(f"{path}: the tokenizer is not valid JSON ({reason})") from None
    if len(value) != 2 or not isinstance(value[0], dict) or not isinstance(value[1], list):
        raise FormatError(f"{path}: the tokenizer is not tokenizer.json and a list of tokens")
    tokenizer, tokens = value
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("vocab") != {}:
        raise FormatError(f"{path}: the tokenizer has no empty vocabulary to put its list of tokens into")
    if not all(type(token) is str for token in tokens) or len(set(tokens)) != len(tokens):
        raise FormatError(f"{path}: the tokenizer has a list of tokens that are not different texts")
    model["vocab"] = {token: number for number, token in enumerate(tokens)}
    return json.dumps(tokenizer, separators=(",", ":")).encode()

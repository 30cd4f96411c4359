"""tokenizer.json in a model file: the same tokenizer comes back, and what is none is refused."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from rbe_gpu.models.stored_tokenizer import ARRAY, MAX_BYTES, stored_tokenizer, take_tokenizer

from . import real


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Whose size bounds the memory for the JSON."""
    path = tmp_path / "m"
    path.write_bytes(bytes(1000))
    return path


def back(array: Any, file: Path, name: str = ARRAY) -> bytes:
    tensors = {name: array, "w": np.zeros(1)}
    taken = take_tokenizer(tensors, file)
    assert list(tensors) == ["w"]
    assert taken is not None
    assert taken[1] == f"{file}: {name}"
    return taken[0]


def packed(value: Any) -> np.ndarray:
    return np.frombuffer(zstandard.compress(json.dumps(value).encode()), np.uint8)


def test_a_tokenizer_of_bert(file: Path) -> None:
    text = (real.MODEL_DIR / "tokenizer.json").read_bytes()
    array = stored_tokenizer(text)
    assert array.size < 105_000  # 190,870 with the ids, by zlib
    assert json.loads(back(array, file)) == json.loads(text)


@pytest.mark.parametrize(
    "model",
    [
        {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.5]]},
        {"type": "WordPiece", "vocab": {"a": 0, "b": 2}},  # a hole
        {"type": "WordPiece", "vocab": {"b": 1, "a": 0, "\u00e4\\": 2}},  # another order
        {"type": "BPE", "vocab": {}, "merges": []},
        {"type": "WordLevel"},
    ],
)
def test_any_vocabulary(model: dict[str, Any], file: Path) -> None:
    value = {"version": "1.0", "model": model}
    assert json.loads(back(stored_tokenizer(json.dumps(value).encode()), file)) == value


def test_no_tokenizer(file: Path) -> None:
    assert take_tokenizer({}, file) is None


REST = b'{"model":{"vocab":{}}}'


def lines(*parts: bytes) -> np.ndarray:
    return np.frombuffer(zstandard.compress(b"\n".join(parts)), np.uint8)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(9, np.float32), "is not an array of uint8"),
        (np.zeros(9, np.uint8), "not one zstd frame"),
        (np.frombuffer(zstandard.compress(b"{}") + b"x", np.uint8), "not one zstd frame"),
        (np.frombuffer(zstandard.compress(bytes(MAX_BYTES + 1)), np.uint8), "the frame holds 67108865 bytes"),
        (np.frombuffer(zstandard.compress(b"[{"), np.uint8), "not valid JSON"),
        (lines(b'["a"', REST), "not valid JSON"),
        (lines(b"[]"), "no empty vocabulary behind it"),
        (lines(b'["a"]', b"{}"), "no empty vocabulary behind it"),
        (lines(b'["a"]', b'{"model":{"vocab":{"b":0}}}'), "no empty vocabulary behind it"),
        (lines(b'["a"]', b' {"model":{"vocab":{}}}'), "no empty vocabulary behind it"),
        (lines(b'["a",1]', REST), "not different texts"),
        (lines(b'["a","a"]', REST), "not different texts"),
        (lines(b"[" + b"[]," * 1_000_000 + b"0]", REST), "too many for a file of 1000 bytes"),
        (lines(b'["' + b"\x7f" * 13_000_000 + b'"]', REST), "too many for a file of 1000 bytes"),
    ],
)
def test_refused(array: np.ndarray, message: str, file: Path) -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match=message) as error:
        take_tokenizer({ARRAY: array}, file)
    assert str(error.value).startswith(f"{file}: the tokenizer")
    assert "\n" not in str(error.value)
    assert time.process_time() - start < 2.0


def test_a_list_in_another_encoding(file: Path) -> None:
    """It does not begin with a bracket: what tokenizers is given is not UTF-8."""
    text = '["a"]'.encode("utf-16") + b"\n" + REST
    assert back(np.frombuffer(zstandard.compress(text), np.uint8), file) == text


def test_a_tokenizer_larger_than_its_file(tmp_path: Path) -> None:
    """262,144 tokens and 514,906 merges, as Gemma's: nothing but the list of tokens counts."""
    tokens = {f"\u0120token{i}": i for i in range(262_144)}
    merges = [["\u0120token", str(i)] for i in range(514_906)]
    text = json.dumps({"model": {"type": "BPE", "vocab": tokens, "merges": merges}}).encode()
    path = tmp_path / "m"
    with path.open("wb") as file:
        file.truncate(15 << 20)
    assert json.loads(back(stored_tokenizer(text), path)) == json.loads(text)


def test_two_tokenizers(file: Path) -> None:
    with pytest.raises(ValueError, match="two tokenizers"):
        take_tokenizer({ARRAY: packed({}), "tokenizer.json.zlib": packed({})}, file)

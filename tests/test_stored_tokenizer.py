"""tokenizer.json in a model file: the same tokenizer comes back, and what is none is refused."""

from __future__ import annotations

import json
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

import rbe_gpu
from rbe_gpu.models.compress import compress_model
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
        (lines(b"[" + b"[]," * 1_000_000 + b"0]", REST), "too many for an array of"),
        (
            lines(b'["' + b"\x7f" * 7_000_000 + b'"' + b",0" * 200_000 + b"]", REST),
            "for a file of 1000 bytes",
        ),
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


#: tokens of which some hold what separates two of them
SEPARATORS = ["", '"', "\\", ",", '",', '","', '\\",', '\\","\\', "%", "%d", "\u00e4", "\n", '"', "a b"]


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ":"), (" ,", ":")])
@pytest.mark.parametrize("ascii", [True, False])
@pytest.mark.parametrize(
    "type", ["", ',"type":"WordLevel"', ', "type":"WordLevel"', ',"type":"W","type":"V"']
)
def test_lists_as_other_writers_have_them(
    separators: tuple[str, str], ascii: bool, type: str, file: Path
) -> None:
    """Every order of two tokens, spaces or not, whatever follows: the tokens with their places."""
    rest = f'{{"model":{{"vocab":{{}}{type}}}}}'
    for first in range(len(SEPARATORS)):
        for last in range(first + 1, len(SEPARATORS) + 1):
            tokens = list(dict.fromkeys(SEPARATORS[first:last] + SEPARATORS[:first]))
            for some in (tokens, tokens[::-1]):
                text = json.dumps(some, separators=separators, ensure_ascii=ascii)
                made = json.loads(back(lines(text.encode(), rest.encode()), file))["model"]
                assert list(made.pop("vocab").items()) == [(token, i) for i, token in enumerate(some)]
                assert made == {k: v for k, v in json.loads(rest)["model"].items() if k != "vocab"}


def test_the_type_of_a_model_comes_first(file: Path) -> None:
    """tokenizers keeps what is before it, and takes half as much time again."""
    text = back(lines(b'["a"]', b'{"model":{"vocab":{},"type":"WordLevel"}}'), file)
    assert text == b'{"model":{"type":"WordLevel","vocab":{"a":0}}}'


def test_a_tokenizer_larger_than_its_file(tmp_path: Path) -> None:
    """262,144 tokens and 514,906 merges, as Gemma's: nothing but the list of tokens counts."""
    rng = np.random.default_rng(0)
    # 3.6 bits a letter: a token packs to a few bytes, as real ones do
    words = rng.choice(np.frombuffer(b"etaoinshrdlu", np.uint8), (262_144, 8)).tobytes().decode()
    parts = [words[8 * i : 8 * i + n] for i, n in enumerate(rng.integers(4, 9, 262_144).tolist())]
    tokens = [f"\u0120{part}" for part in dict.fromkeys(parts)]
    pairs = rng.integers(0, len(parts), (514_906, 2)).tolist()
    rest = {"model": {"vocab": {}, "type": "BPE", "merges": [[parts[a][:3], parts[b][:3]] for a, b in pairs]}}
    array = lines(json.dumps(tokens).encode(), json.dumps(rest, separators=(",", ":")).encode())
    path = tmp_path / "m"
    with path.open("wb") as file:
        file.truncate(15 << 20)
    expected = {"model": {**rest["model"], "vocab": {token: i for i, token in enumerate(tokens)}}}
    assert json.loads(back(array, path)) == expected


@pytest.mark.parametrize("name", [ARRAY, "tokenizer.json.zlib"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"b":12345678,"a":[' + b"[]," * 300_000 + b"0]}", "600005 of them brackets"),
        (b'{"normalizer":[' + b"0," * 400_000 + b"0]}", "400003 of them brackets"),
        (b'["a"]\n{"model":{"vocab":{},"x":[' + b"0," * 400_000 + b"0]}}", "400009 of them brackets"),
        (b"{" + b" " * (9 << 20) + b"}", r"expected at most \d+$|larger than \d+ bytes"),
    ],
)
def test_a_text_too_large_for_its_array(name: str, text: bytes, message: str, tmp_path: Path) -> None:
    """6 kB took 19 s and 2 GB; the writer refuses what a reader does."""
    pack = zstandard.compress if name == ARRAY else zlib.compress
    array = np.frombuffer(pack(text), np.uint8)
    (path := tmp_path / "m").write_bytes(bytes(10 << 20))  # what counts is the array
    with pytest.raises(ValueError, match=message):
        take_tokenizer({name: array}, path)


def test_the_writer_refuses_what_a_reader_refuses() -> None:
    value = {"model": {"vocab": {}}, "added_tokens": [{"id": 0}] * 400_000}
    with pytest.raises(ValueError, match="too many for an array of"):
        stored_tokenizer(json.dumps(value).encode())


def test_compress_names_a_tokenizer_that_does_not_fit(tmp_path: Path) -> None:
    """A folder's tokenizer may take more than a model file's: here, 60,000 times the same token."""
    from tests.test_compress_model import make_model

    path = make_model(tmp_path / "m") / "tokenizer.json"
    value = json.loads(path.read_text("utf-8"))
    value["added_tokens"] += value["added_tokens"][:1] * 60_000
    path.write_text(json.dumps(value), "utf-8")
    assert rbe_gpu.load(tmp_path / "m").embed(["a"]).shape == (1, 96)
    with pytest.raises(ValueError, match=r"too many for an array of .*; remove added tokens") as error:
        compress_model(tmp_path / "m", tmp_path / "out", codes="dense-int4")
    assert str(error.value).startswith(f"{path}: the tokenizer has ")
    assert not (tmp_path / "out").exists()


def test_many_added_tokens(file: Path) -> None:
    """6,242 added tokens, as Gemma's, and few others."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    added = [{"id": i, "content": f"<unused{i}>", **flags} for i in range(6242)]
    value = {"model": {"vocab": {}}, "added_tokens": added}
    assert json.loads(back(stored_tokenizer(json.dumps(value).encode()), file)) == value


def test_two_tokenizers(file: Path) -> None:
    with pytest.raises(ValueError, match="two tokenizers"):
        take_tokenizer({ARRAY: packed({}), "tokenizer.json.zlib": packed({})}, file)

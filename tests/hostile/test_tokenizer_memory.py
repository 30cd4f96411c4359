"""Memory before a model's JSON, or the tokenizer of a model file, is refused, each measured in its own process."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from rbe_gpu.container import load_file, save_file
from rbe_gpu.models.compress import compress_model
from rbe_gpu.models.stored_tokenizer import ARRAY
from tests.bounded import limit, readings
from tests.settings.cases import TOKENIZER, TOKENIZER_CONFIG
from tests.test_compress_model import make_model

SIZE = 3_000_000
_MODEL = '"type":"BPE","unk_token":null,"vocab":{"a":0,"b":1},"merges":[]'


def _filled(start: str, piece: str, end: str) -> str:
    return start + piece * (SIZE // len(piece)) + end


def _steps(start: str, piece: str, end: str) -> str:
    return f'{{"model":{{{_MODEL}}},"normalizer":{_filled(start, piece, end)}}}'


#: what no tokenizer has: refused before it is parsed
JUNK = {
    "lists": _steps("[", "[],", "0]"),
    "numbers": _steps("[", "0,", "0]"),
    "objects": _steps('{"type":"Sequence","normalizers":[', '{"a":0},', "0]}"),
    "objects in the vocabulary": _filled('{"model":{"type":"BPE","merges":[],"vocab":[', '{"a":0},', "0]}}"),
    "pieces without a text": _filled('{"model":{"type":"Unigram","unk_id":0,"vocab":[', '["",0],', "0]}}"),
    "lists and a long id": f'{{"x":12345678,{_steps("[", "[],", "0]")[1:]}',
    "objects and a token that is normalised": '{"added_tokens":[{"normalized":true}],'
    + _steps('{"type":"Sequence","normalizers":[', '{"a":0},', "0]}")[1:],
}
#: in the shape of a vocabulary, with a fault at its end
VOCABULARIES = {
    "tokens": '{"model":{"type":"BPE","merges":["x y"],"vocab":{'
    + ",".join(f'"{i:x}":0' for i in range(SIZE // 9))
    + "}}}",
    "pieces": _filled('{"model":{"type":"Unigram","unk_id":0,"vocab":[', '["aaaaa",0],', "0]}}"),
    "merges": _filled(
        '{"model":{"type":"BPE","vocab":{"aa":0,"bb":1},"merges":[', '["aa","bb"],', '["a","b"]]}}'
    ),
    "objects in the steps": _steps('{"type":"Sequence","normalizers":[', '{"aaaaaaaaaaaaaa":0},', "0]}"),
}
#: bytes that parsing takes for one of the JSON: 46 to 57 for 6 MB of these, 25 for MiniLM's and SmolLM2's tokenizers
_FOR_EACH = 60


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    compress_model(make_model(root / "folder"), root / "file", codes="dense-int4")
    return root


def folder(made: Path, path: Path, text: str) -> Path:
    shutil.copytree(made / "folder", path)
    (path / TOKENIZER).write_text(text)
    settings = path / TOKENIZER_CONFIG
    given = json.loads(settings.read_text()) if settings.exists() else {}
    settings.write_text(json.dumps({**given, "tokenizer_class": "PreTrainedTokenizerFast"}))
    return path


def file(made: Path, path: Path, text: str) -> Path:
    """Beside a text that does not pack, of half its length: what is stored is not small."""
    noise = (
        np.random.default_rng(0).integers(ord("a"), ord("z"), SIZE // 2, np.uint8, True).tobytes().decode()
    )
    text = text.replace('{"type":', f'{{"zz":"{noise}","type":', 1)
    tensors: dict[str, Any]
    tensors, config = load_file(made / "file")
    tensors[ARRAY] = np.frombuffer(zstandard.compress(text.encode()), np.uint8)
    save_file(path, tensors, config)
    return path


def faults(cases: dict[str, str], for_each: int, made: Path, root: Path) -> list[str]:
    """What is accepted, or takes more than 64 MB, 4 times its files and `for_each` times the JSON."""
    paths = [
        make(made, root / f"{name}, {make.__name__}", t)
        for name, t in cases.items()
        for make in (folder, file)
    ]
    wrong = []
    for path, reading in zip(paths, readings("models.load:load", paths), strict=True):
        size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) or path.stat().st_size
        if reading.message is None or "\n" in reading.message:
            wrong.append(f"{path.name}: {reading.message}")
        if reading.nbytes > (64 << 20) + 4 * size + for_each * SIZE:
            wrong.append(f"{path.name}: {reading.nbytes / 1e6:.0f} MB")
    return wrong


def test_what_is_no_tokenizer(made: Path, tmp_path: Path) -> None:
    """6 MB of objects took 864 MB in a folder and 1,024 in a file of 2.4 MB."""
    assert not faults(JUNK, 0, made, tmp_path)


def test_vocabularies_with_a_fault(made: Path, tmp_path: Path) -> None:
    assert not faults(VOCABULARIES, _FOR_EACH, made, tmp_path)


def test_the_largest_texts(made: Path, tmp_path: Path) -> None:
    """59 MB that pack to little, beside noise that makes the array large enough for them; each text is held once."""
    noise = np.random.default_rng(0).integers(ord("a"), ord("z"), 6_500_000, np.uint8, True).tobytes()
    rest = b'\n{"model":{"vocab":{},"zz":"' + noise + b'"}}'
    marks = b'{"zz":"' + noise + b'","a":[' + b"0," * 29_500_000 + b"0]}"
    cases = {
        "marks": (ARRAY, zstandard.compress(marks)),
        "marks, version 1": ("tokenizer.json.zlib", zlib.compress(marks, 1)),
        "a long token": (ARRAY, zstandard.compress(b'["' + b"a" * 59_000_000 + b'"]' + rest)),
        "one line": (ARRAY, zstandard.compress(b'["' + noise + b'","' + b"a" * 59_000_000 + b'"]')),
        "a long rest": (
            ARRAY,
            zstandard.compress(b'["' + b"a" * 9_000_000 + b'"]' + rest[:-3] + b"a" * 50_000_000 + b'"}}'),
        ),
    }
    paths = []
    tensors: dict[str, Any]
    for kind, (name, array) in cases.items():
        tensors, config = load_file(made / "file")
        tensors.pop(ARRAY)
        tensors[name] = np.frombuffer(array, np.uint8)
        paths.append(tmp_path / kind)
        save_file(paths[-1], tensors, config)
    for path, reading in zip(paths, readings("models.load:load", paths), strict=True):
        assert reading.message is not None, path.name
        assert "too many for " in reading.message, reading
        assert reading.nbytes <= limit(path), (path.name, reading)


@pytest.mark.parametrize("name", ["config.json", TOKENIZER_CONFIG, "added_tokens.json", "modules.json"])
def test_other_files(name: str, made: Path, tmp_path: Path) -> None:
    path = tmp_path / "m"
    shutil.copytree(made / "folder", path)
    (path / name).write_text(_filled('{"a":[', "[],", "0]}"))
    (reading,) = readings("models.load:load", [path])
    assert reading.message is not None
    assert f"{path / name}: the JSON has " in reading.message
    assert reading.nbytes < (64 << 20) + 4 * SIZE


def test_a_long_vocabulary_of_lines(made: Path, tmp_path: Path) -> None:
    """Refused at the first line beyond the word embeddings."""
    path = tmp_path / "m"
    shutil.copytree(made / "folder", path)
    (path / TOKENIZER).unlink()
    (path / "vocab.txt").write_text("".join(f"{i:x}\n" for i in range(SIZE // 6)))
    (reading,) = readings("models.load:load", [path])
    assert reading.message is not None
    assert "vocab.txt has the token " in reading.message
    assert reading.nbytes < (64 << 20)

"""Files made to hurt a reader: `load_file` raises `FormatError`, or loads what can be decoded.

Every file starts as a valid one, with real weights in every kind of codes, and is then damaged on purpose.
"""

from __future__ import annotations

import copy
import json
import os
import random
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from rbe_gpu import reference
from rbe_gpu.blocks import RBEBlocks
from rbe_gpu.container import FormatError, describe, load_file, save_file
from rbe_gpu.mapped import MappedFile
from rbe_gpu.models.load import load
from tests import real
from tests.test_container import encoded

from .parts import CAP, Parts, packed, valid_bytes
from .reader_rules import CLASSES, RULES, frame


@pytest.fixture
def attack(tmp_path: Path) -> Callable[..., str | None]:
    """Load these bytes as a file: the one-line message of its FormatError, or None where it loads."""
    path = tmp_path / "evil.rbe.safetensors"

    def run(raw: bytes, cap: int = CAP) -> str | None:
        path.write_bytes(raw)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                tensors, _ = load_file(path, max_decoded_bytes=cap)
            except FormatError as error:
                message = str(error)
                assert message.startswith(str(path))
                assert "\n" not in message
                assert message.isascii()
                assert len(message) < len(str(path)) + 500
                return message
        with np.errstate(all="ignore"):  # huge but finite scales may overflow; nothing may go out of range
            for value in tensors.values():
                if isinstance(value, RBEBlocks):
                    assert reference.coefficients(value).shape == (value.rows_pad, value.cols_pad)
                else:
                    value.tobytes()
        return None

    return run


def test_the_valid_file_is_valid(attack: Callable[..., Any]) -> None:
    assert attack(valid_bytes()) is None
    assert attack(Parts().join()) is None


# --- the outside --------------------------------------------------------------------------------------


def test_cut_anywhere(attack: Callable[..., Any]) -> None:
    raw = valid_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    places = {
        *range(0, 200),
        *range(8 + n - 50, 8 + n + 300),
        *range(0, len(raw), 37),
        *range(len(raw) - 50, len(raw)),
    }
    for at in sorted(p for p in places if p < len(raw)):
        assert attack(raw[:at]), f"cut at {at}"


def test_longer_than_it_says(attack: Callable[..., Any]) -> None:
    for extra in (b"\0", b"\0" * 8, valid_bytes()):
        assert "the file has" in attack(valid_bytes() + extra)


@pytest.mark.parametrize("length", [0, 1, 2, 7, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1])
def test_header_length(attack: Callable[..., Any], length: int) -> None:
    assert attack(struct.pack("<Q", length) + valid_bytes()[8:])


def test_header_length_off_by_a_little(attack: Callable[..., Any]) -> None:
    raw = valid_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    for wrong in (n - 8, n - 1, n + 1, n + 8, len(raw) - 8, len(raw) - 7):
        assert attack(struct.pack("<Q", wrong) + raw[8:])


HEADERS: dict[str, str | bytes] = {
    "empty": "",
    "spaces": "        ",
    "list": "[]",
    "text": '"text"',
    "null": "null",
    "leading space": " {}",
    "byte order mark": b"\xef\xbb\xbf{}",
    "not UTF-8": b'{"\xff\xfe": 1}',
    "UTF-16": '{"a": 1}'.encode("utf-16-le"),
    "raw surrogate": '{"\ud800": 1}',
    "escaped surrogate": '{"\\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}',
    "garbage after": '{} {"a": 1}',
    "cut": '{"a": {"dtype": "U8"',
    "NaN": '{"a": NaN}',
    "Infinity": '{"a": [Infinity, -Infinity]}',
    "comment": '{} // "a"',
    "single quotes": "{'a': 1}",
    "key twice": '{"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, '
    '"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}',
    "metadata twice": '{"__metadata__": {"rbe": "{}"}, "__metadata__": {"rbe": "{}"}}',
    "deep list": '{"a": ' + "[" * 200_000,
    "deep closed list": '{"a": ' + "[" * 5000 + "]" * 5000 + "}",
    "deep objects": '{"a": ' * 100_000,
    "65 deep": '{"a": ' + "[" * 65 + "]" * 65 + "}",
    "long number": '{"a": ' + "9" * 100_000 + "}",
    "long float": '{"a": ' + "9" * 1000 + "e9}",
    "metadata is a list": '{"__metadata__": []}',
    "metadata is null": '{"__metadata__": null}',
    "metadata of numbers": '{"__metadata__": {"rbe": 1}}',
    "no metadata": "{}",
    "no rbe": '{"__metadata__": {"format": "pt"}}',
    **{
        f"rbe {name}": json.dumps({"__metadata__": {"rbe": text}})
        for name, text in {
            "empty": "",
            "list": "[]",
            "number": "1",
            "object": "{}",
            "NaN": '{"version": NaN}',
            "key twice": '{"version": 1, "version": 1, "config": {}, "tensors": {}}',
            "inner key twice": '{"version": 1, "config": {"a": 1, "a": 1}, "tensors": {}}',
            "deep": '{"version": 1, "config": {"a": ' + "[" * 100_000 + "]" * 100_000 + '}, "tensors": {}}',
            "surrogate": '{"version": 1, "config": {"a": "\\udc00"}, "tensors": {}}',
            "garbage": '{"version": 1, "config": {}, "tensors": {}}x',
            "version 3": '{"version": 3, "config": {}, "tensors": {}}',
            "version 0": '{"version": 0, "config": {}, "tensors": {}}',
            "version true": '{"version": true, "config": {}, "tensors": {}}',
            "version 1.0": '{"version": 1.0, "config": {}, "tensors": {}}',
            "version text": '{"version": "1", "config": {}, "tensors": {}}',
            "config list": '{"version": 1, "config": [], "tensors": {}}',
            "config null": '{"version": 1, "config": null, "tensors": {}}',
            "tensors list": '{"version": 1, "config": {}, "tensors": []}',
            "one key more": '{"version": 1, "config": {}, "tensors": {}, "x": 1}',
            "phantom": '{"version": 1, "config": {}, "tensors": {"a": {"kind": "dense"}}}',
        }.items()
    },
}


@pytest.mark.parametrize("case", HEADERS)
def test_header_text(attack: Callable[..., Any], case: str) -> None:
    assert attack(packed(HEADERS[case]))


def test_an_empty_description_is_valid(attack: Callable[..., Any]) -> None:
    text = json.dumps(
        {"__metadata__": {"rbe": '{"version": 1, "config": {}, "tensors": {}}', "other": "ignored"}}
    )
    assert attack(packed(text)) is None


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_file(tmp_path / "none")
    with pytest.raises(FormatError, match="not a regular file"):
        load_file(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    for special in (tmp_path / "pipe", Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(FormatError, match="not a regular file"):
            load_file(special)
    (tmp_path / "empty").touch()
    with pytest.raises(FormatError, match="0 bytes"):
        load_file(tmp_path / "empty")


def test_other_files(attack: Callable[..., Any]) -> None:
    for raw in (
        b"PK\x03\x04" + b"\0" * 100,
        b"\x89PNG\r\n\x1a\n" + b"\0" * 100,
        b"<html>" * 10,
        b"\0" * 4096,
    ):
        assert "not a safetensors file" in attack(raw)


# --- every field --------------------------------------------------------------------------------------

VALUES: tuple[Any, ...] = (
    None, True, False, {}, [], [0], [1, 2], [2**62, 2**62], [True, 4], [32, 64.0], [[1], [2]], [1] * 40,
    -1, 0, 1, 2, 7, 31, 33, 64, 255, 256, 65536, 2**31, 2**47, 2**62, 2**63, 2**64, 10**30, -(2**63),
    0.5, 1.0, 1.5, -0.0, 1e-320, 1e38, 1e308, 1e400, -1e400,
    "", "x", "\ud800", "a\nb", "dct", "dense", "sparse", "matrix", "vectors", "bitmap", "delta", "full",
    "f32", "f16", "int1", "int8", "int9", "int-1", "U8", "F16", "F32", "BF16", "F8_E4M3", {"kind": "dense"},
)  # fmt: skip


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything inside a JSON value."""
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        yield (*path, key)
        yield from leaves(child, (*path, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


# one array of every element size and shape; the others follow the same lines of the reader
ENTRIES = ("layer.bias", "layer.b.count", "layer.c.basis", "layer.c.value", "layer.mask")


@pytest.mark.parametrize("part", ["description", "header"])
def test_every_field_with_every_value(attack: Callable[..., Any], part: str) -> None:
    loaded = []
    for path in leaves(getattr(Parts(), part)):
        if part == "header" and path[0] not in ENTRIES:
            continue
        for new in VALUES:
            parts = Parts()
            old = at(getattr(parts, part), path)
            if old == new and type(old) is type(new):
                continue
            at(getattr(parts, part), path[:-1])[path[-1]] = new
            if attack(parts.join()) is None:
                loaded.append((path, new))
    # what may change in a valid file: values without a rule that ties them to others, and the config
    for path, new in loaded:
        if part == "header":
            assert path == ("layer.mask", "dtype"), new  # a BOOL as U8 or I8
        elif path[0] == "tensors":
            free = ["gain", "dead_zone", "transform", "kind", "group", "shape", "shrink"]
            if path[1] in ("layer.g", "layer.h", "layer.i"):
                free.append("bits")  # more than the integers need
            assert path[-1] in free or path[-2] == "shape", (path, new)
        else:
            assert path[0] == "config", (path, new)
    if part == "description":
        assert {path[-1] for path, _ in loaded} >= {
            "gain", "dead_zone", "transform", "model_type", "shrink", "bits"
        }  # fmt: skip


def test_every_field_missing_or_more(attack: Callable[..., Any]) -> None:
    for part in ("description", "header"):
        for path in leaves(getattr(Parts(), part)):
            if path[0] in ("__metadata__", "config"):
                continue
            parts = Parts()
            parent = at(getattr(parts, part), path[:-1])
            del parent[path[-1]]
            assert attack(parts.join()), f"without {path}"
            parts = Parts()
            value = at(getattr(parts, part), path)
            if isinstance(value, dict):
                value["more"] = 1
            elif isinstance(value, list):
                value.append(-1)
            else:
                continue
            assert attack(parts.join()), f"more in {path}"


def test_swapped_descriptions(attack: Callable[..., Any]) -> None:
    names = list(Parts().tensors)
    for a in names:
        for b in names:
            if a < b and Parts().tensors[a] != Parts().tensors[b]:
                parts = Parts()
                parts.tensors[a], parts.tensors[b] = parts.tensors[b], parts.tensors[a]
                assert attack(parts.join())


@pytest.mark.parametrize("name", RULES)
def test_rule(attack: Callable[..., Any], name: str) -> None:
    parts = Parts()
    expected = RULES[name](parts)
    message = attack(parts.join())
    assert message is not None
    assert expected in message


def test_float32_values_must_be_finite(attack: Callable[..., Any], tmp_path: Path) -> None:
    save_file(tmp_path / "a", {"w": encoded("sparse-f32-bitmap")})
    raw = bytearray((tmp_path / "a").read_bytes())
    entry = MappedFile(tmp_path / "a").entries["w.value"]
    for bits in (0x7F800000, 0xFFC00000):
        raw[entry.stop - 4 : entry.stop] = struct.pack("<I", bits)
        assert 'tensor "w": value holds NaN or Inf' in attack(bytes(raw))


def test_a_stream_in_another_form_of_frame(attack: Callable[..., Any]) -> None:
    """Whatever the blocks: repeating ones, a checksum, another level."""
    for make in (
        frame,
        zstandard.ZstdCompressor(level=19).compress,
        zstandard.ZstdCompressor(write_checksum=True).compress,
    ):
        parts = Parts()
        parts.replace("layer.g.stream", make(parts.array("layer.g.stream").tobytes()[CLASSES:]))
        assert attack(parts.join()) is None


def test_a_stream_that_unpacks_a_thousandfold(attack: Callable[..., Any]) -> None:
    """A few bytes may stand for many zeros, but not for more than the cap lets the tensor decode to."""
    parts = Parts()
    columns = CAP // 4 // 32
    parts.tensors["layer.g"]["shape"] = [32, columns]
    parts.replace("layer.g.stream", frame(bytes(columns) + bytes(32 * columns)))
    parts.replace("layer.g.col_scale", np.zeros(columns, np.float16).tobytes())
    parts.header["layer.g.col_scale"]["shape"] = [columns]
    raw = parts.join()
    assert attack(raw, 2 * CAP) is None
    assert "decodes to more than the limit" in attack(raw, CAP - 1)


def test_a_billion_tensors_are_not_made(attack: Callable[..., Any]) -> None:
    """Many tensors, each within the cap: the sum is what counts."""
    parts = Parts()
    for i in range(200):
        parts.tensors[f"copy{i}"] = copy.deepcopy(parts.tensors["layer.b"])
        parts.tensors[f"copy{i}"]["shape"] = [32, 2**14]
    assert "decodes to more than the limit" in attack(parts.join())


def test_the_cap_is_a_parameter(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(valid_bytes())
    tensors, _ = load_file(path)
    need = sum(
        4 * v.rows_pad * v.cols_pad if isinstance(v, RBEBlocks) else v.nbytes for v in tensors.values()
    )
    load_file(path, max_decoded_bytes=need)
    describe(path, max_decoded_bytes=need)
    for function in (load_file, describe):
        with pytest.raises(FormatError, match=f"limit of {need - 1} bytes"):
            function(path, max_decoded_bytes=need - 1)


def test_a_tokenizer_that_unpacks_beyond_the_limit(tmp_path: Path) -> None:
    packer = zlib.compressobj(1)
    bomb = b"".join([*(packer.compress(b" " * (1 << 20)) for _ in range(65)), packer.flush()])
    assert len(bomb) < 2_000_000
    zeros = zstandard.compress(bytes(65 << 20))
    assert len(zeros) < 10_000
    for name, array, words in (
        ("tokenizer.json.zlib", bomb, f"larger than {(8 << 20) + 16 * len(bomb)} bytes"),
        (
            "tokenizer.json.zst",
            zeros,
            f"holds 68157440 bytes, expected at most {(8 << 20) + 16 * len(zeros)}",
        ),
    ):
        tensors = {name: np.frombuffer(array, np.uint8)}
        save_file(tmp_path / "a", tensors, {"model_type": "bert", "config": real.config()})
        with pytest.raises(ValueError, match=words):
            load(tmp_path / "a")


# --- random damage ------------------------------------------------------------------------------------


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """One to four changes: a flipped bit, a new byte, a run of bytes lost, doubled or overwritten."""
    out = bytearray(raw)
    (n,) = struct.unpack("<Q", raw[:8])
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        where = rng.randrange(min(8 + n, len(out))) if rng.random() < 0.6 else rng.randrange(len(out))
        length = rng.choice((1, 2, 4, 8, 40))
        kind = rng.randrange(6)
        if kind == 0:
            out[where] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[where] = rng.randrange(256)
        elif kind == 2:  # a digit for a digit: numbers that stay numbers
            digits = [i for i in range(8, min(8 + n, len(out))) if 48 <= out[i] <= 57]
            if digits:
                out[rng.choice(digits)] = 48 + rng.randrange(10)
        elif kind == 3:
            del out[where : where + length]
        elif kind == 4:
            out[where:where] = out[where : where + length]
        else:
            out[where : where + length] = rng.choice((b"\xff", b"\0", b"{", b'"', b"9")) * length
    return bytes(out)


@pytest.mark.parametrize("seed", range(8))
def test_random_damage(attack: Callable[..., Any], seed: int) -> None:
    rng = random.Random(seed)
    outcomes = [attack(damaged(valid_bytes(), rng)) for _ in range(500)]
    assert sum(m is not None for m in outcomes) > 250  # the damage is not all in harmless bytes


@pytest.mark.parametrize("seed", range(2))
def test_random_digits_in_the_description(attack: Callable[..., Any], seed: int) -> None:
    """Damage that JSON and the container let through, so that the rules of the codes must catch it."""
    rng = random.Random(1000 + seed)
    for _ in range(300):
        parts = Parts()
        paths = [p for p in leaves(parts.tensors) if type(at(parts.tensors, p)) in (int, float, str, bool)]
        for _ in range(rng.choice((1, 2, 3))):
            path = rng.choice(paths)
            donor = at(parts.tensors, rng.choice(paths))  # a value of the right sort from another place
            at(parts.tensors, path[:-1])[path[-1]] = donor
        attack(parts.join())

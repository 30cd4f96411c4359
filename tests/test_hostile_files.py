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
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from rbe_gpu import compress, reference
from rbe_gpu.blocks import RBEBlocks
from rbe_gpu.container import FormatError, describe, load_file, save_file
from rbe_gpu.mapped import MappedFile
from rbe_gpu.models.load import load
from tests.compressed import gridded
from tests.test_container import encoded, golden_tensors, small

CAP = 1 << 22  # bytes that a damaged file may claim to decode to: the tests decode what loads


def valid_tensors() -> dict[str, Any]:
    return {
        **golden_tensors(),  # dense-int4, delta f16, bitmap int3 with a basis, grid, float32, bfloat16
        "layer.d": encoded("sparse-int4-delta"),
        "layer.e": compress(small(32, 32), codes="sparse-int5", block=32, basis=False),  # a full index
        "layer.h": gridded(small(32, 40), 4, block=32),
        "layer.mask": np.array([True, False, True]),
    }


@lru_cache(maxsize=1)
def valid_bytes() -> bytes:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"rbe-hostile-{os.getpid()}"
    try:
        save_file(path, valid_tensors(), {"model_type": "example", "sizes": [1, 2.5, None, True]})
        return path.read_bytes()
    finally:
        path.unlink(missing_ok=True)


class Parts:
    """A file taken apart: `header` and `description` as JSON, `payload` as bytes; `join` is the way back."""

    def __init__(self) -> None:
        raw = valid_bytes()
        (n,) = struct.unpack("<Q", raw[:8])
        self.header: dict[str, Any] = json.loads(raw[8 : 8 + n])
        self.description: dict[str, Any] = json.loads(self.header["__metadata__"]["rbe"])
        self.payload = bytearray(raw[8 + n :])

    @property
    def tensors(self) -> dict[str, Any]:
        return self.description["tensors"]

    def array(self, name: str) -> np.ndarray:
        """A writable view of an array in the payload."""
        entry = self.header[name]
        dtype = {"F32": "<f4", "F16": "<f2", "U8": "u1", "U16": "<u2", "BOOL": "u1", "BF16": "<u2"}[
            entry["dtype"]
        ]
        begin, _ = entry["data_offsets"]
        return np.frombuffer(self.payload, dtype, prod(entry["shape"]), begin).reshape(entry["shape"])

    def replace(self, name: str, raw: bytes) -> None:
        """Other bytes for an array, of any number; what follows it in the payload moves."""
        begin, end = self.header[name]["data_offsets"]
        self.payload[begin:end] = raw
        self.header[name]["shape"] = [len(raw)]
        self.header[name]["data_offsets"][1] = begin + len(raw)
        for other, entry in self.header.items():
            if other not in ("__metadata__", name) and entry["data_offsets"][0] >= end:
                entry["data_offsets"] = [n + begin + len(raw) - end for n in entry["data_offsets"]]

    def join(self) -> bytes:
        self.header["__metadata__"]["rbe"] = json.dumps(self.description)
        return packed(json.dumps(self.header)) + bytes(self.payload)


def packed(text: str | bytes) -> bytes:
    """The length and the header, padded to 8 bytes."""
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


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
            "version 2": '{"version": 2, "config": {}, "tensors": {}}',
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
            if path[1] in ("layer.g", "layer.h"):
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


# --- one rule at a time -------------------------------------------------------------------------------


def rule(name: str) -> Callable[[Callable[[Parts], str]], Callable[[Parts], str]]:
    def register(function: Callable[[Parts], str]) -> Callable[[Parts], str]:
        RULES[name] = function
        return function

    return register


RULES: dict[str, Callable[[Parts], str]] = {}
NOT_FINITE = {"NaN": 0x7E00, "negative NaN": 0xFE01, "Inf": 0x7C00, "-Inf": 0xFC00}

for _name, _bits in NOT_FINITE.items():
    for _array in (
        "layer.a.scale",
        "layer.b.value",
        "layer.c.scale",
        "layer.c.basis",
        "layer.d.scale",
        "layer.e.scale",
        "layer.g.row_scale",
        "layer.g.col_scale",
        "layer.h.row_scale",
    ):
        for _at in (0, -1):

            def _damage(p: Parts, array: str = _array, at: int = _at, bits: int = _bits) -> str:
                p.array(array).reshape(-1).view(np.uint16)[at] = bits
                return f'tensor "{array.rpartition(".")[0]}": {array.rpartition(".")[2]} holds NaN or Inf'

            RULES[f"{_name} at {_at} of {_array}"] = _damage


@rule("index past the columns")
def _(p: Parts) -> str:
    first = int(p.array("layer.b.count")[0])
    p.array("layer.b.index")[first - 1] = 255
    return 'tensor "layer.b": index leaves the 64 columns in row 0'


@rule("index past the columns in the last row")
def _(p: Parts) -> str:
    p.array("layer.b.index")[-1] = 64
    return 'tensor "layer.b": index leaves the 64 columns in row 31'


@rule("all indices 255")
def _(p: Parts) -> str:
    p.array("layer.d.index")[:] = 255
    return 'tensor "layer.d": index leaves'


@rule("a count more")
def _(p: Parts) -> str:
    p.array("layer.b.count")[3] += 1
    return 'tensor "layer.b": its rows hold 842 entries, the description says 841'


@rule("counts moved between rows")
def _(p: Parts) -> str:
    count = p.array("layer.b.count")
    take = int(count[:4].sum())
    count[0], count[1:4] = min(take, 64), 0
    count[-1] += take - min(take, 64)
    return 'tensor "layer.b": '


@rule("a count beyond the columns")
def _(p: Parts) -> str:
    p.array("layer.b.count")[0] = 65535
    return 'tensor "layer.b": count holds 65535, but a row has 64 columns'


@rule("counts that wrap around 2**16")
def _(p: Parts) -> str:
    p.array("layer.b.count")[:] = 65535
    return 'tensor "layer.b": count holds 65535'


@rule("a bit more in a bitmap")
def _(p: Parts) -> str:
    index = p.array("layer.c.index")
    index[0, 0] ^= 1
    return 'tensor "layer.c": its rows hold 84'


@rule("a full bitmap")
def _(p: Parts) -> str:
    p.array("layer.c.index")[:] = 255
    return 'tensor "layer.c": its rows hold 2048 entries, the description says 841'


@rule("entries beyond the matrix")
def _(p: Parts) -> str:
    p.tensors["layer.b"]["codes"]["entries"] = 32 * 64 + 1
    return "entries=2049 is not between 0 and 2048"


@rule("a byte of a bool")
def _(p: Parts) -> str:
    p.array("layer.mask")[1] = 2
    return 'tensor "layer.mask": a BOOL array holds bytes other than 0 and 1'


@rule("more columns than 64 bits count")
def _(p: Parts) -> str:
    p.tensors["layer.a"]["shape"] = [2**63, 2**63]
    return "is not between 1 and 281474976710656"


@rule("a product beyond 64 bits")
def _(p: Parts) -> str:
    p.tensors["layer.a"]["shape"] = [2**40, 2**40]
    return f"decodes to more than the limit of {CAP} bytes"


@rule("a few counts that decode to gigabytes")
def _(p: Parts) -> str:
    p.tensors["layer.b"]["shape"] = [30, 2**40]
    return 'tensor "layer.b": decodes to more than the limit'


@rule("gain not a power of two")
def _(p: Parts) -> str:
    p.tensors["layer.a"]["gain"] = 0.75
    return 'tensor "layer.a": gain=0.75 is not a power of two'


@rule("gain zero")
def _(p: Parts) -> str:
    p.tensors["layer.a"]["gain"] = 0.0
    return "gain=0.0 is not a power of two"


@rule("gain negative")
def _(p: Parts) -> str:
    p.tensors["layer.a"]["gain"] = -2.0
    return "gain=-2.0 is not a power of two"


@rule("gain beyond float32")
def _(p: Parts) -> str:
    p.tensors["layer.a"]["gain"] = 2.0**128
    return "is not a power of two that float32 holds"


@rule("gain below float32")
def _(p: Parts) -> str:
    p.tensors["layer.a"]["gain"] = 2.0**-150
    return "is not a power of two that float32 holds"


@rule("dead zone negative")
def _(p: Parts) -> str:
    p.tensors["layer.c"]["codes"]["dead_zone"] = -0.5
    return 'tensor "layer.c": dead_zone=-0.5 is not a float32 of 0 or more'


@rule("dead zone of float values")
def _(p: Parts) -> str:
    p.tensors["layer.b"]["codes"]["dead_zone"] = 0.5
    return 'tensor "layer.b": dead_zone=0.5 belongs to integer values'


@rule("an array of another dtype")
def _(p: Parts) -> str:
    p.header["layer.a.scale"]["dtype"] = "BF16"
    return 'tensor "layer.a": scale is BF16, expected F16'


@rule("an array of another shape")
def _(p: Parts) -> str:
    p.header["layer.a.scale"]["shape"] = [2, 32]
    return 'tensor "layer.a": scale has shape [2, 32], expected [32, 2]'


@rule("an array missing")
def _(p: Parts) -> str:
    p.header["layer.z"] = p.header.pop("layer.a.scale")
    p.tensors["layer.z"] = {"kind": "dense"}
    return 'tensor "layer.a": the array "scale" is missing'


@rule("an array that nobody owns")
def _(p: Parts) -> str:
    del p.tensors["layer.bias"]
    return 'the array "layer.bias" belongs to no tensor'


@rule("an array that the codes have no use for")
def _(p: Parts) -> str:
    p.header["layer.a.count"] = p.header.pop("layer.half")
    del p.tensors["layer.half"]
    return 'tensor "layer.a": the array "count" does not belong to these codes'


@rule("a basis that is not announced")
def _(p: Parts) -> str:
    p.tensors["layer.c"]["basis"] = False
    return 'tensor "layer.c": the array "basis" does not belong to these codes'


@rule("a basis that is not there")
def _(p: Parts) -> str:
    p.tensors["layer.a"]["basis"] = True
    return 'tensor "layer.a": the array "basis" is missing'


@rule("one array of two tensors")
def _(p: Parts) -> str:
    p.tensors["layer.a.scale"] = {"kind": "dense"}
    return 'tensor "layer.a.scale": the array "layer.a.scale" belongs to two tensors'


@rule("two arrays on the same bytes")
def _(p: Parts) -> str:
    p.header["layer.half"]["data_offsets"] = p.header["layer.a.scale"]["data_offsets"]
    p.header["layer.half"]["shape"] = [64]
    return "overlaps another one or leaves a gap"


@rule("arrays that overlap by a byte")
def _(p: Parts) -> str:
    entry = p.header["layer.a.value"]
    entry["data_offsets"] = [entry["data_offsets"][0] - 1, entry["data_offsets"][1] - 1]
    return "overlaps another one or leaves a gap"


@rule("a gap")
def _(p: Parts) -> str:
    entry = p.header["layer.bias"]
    entry["shape"], entry["data_offsets"] = [63], [0, 252]
    return "overlaps another one or leaves a gap"


@rule("an array at an odd place")
def _(p: Parts) -> str:
    p.payload[:0] = b"\1"
    for name, entry in p.header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [n + 1 for n in entry["data_offsets"]]
    p.header["byte"] = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    p.tensors["byte"] = {"kind": "dense"}
    return "is not aligned to its dtype"


@rule("a name of control characters")
def _(p: Parts) -> str:
    p.tensors["\x1b[2J\nlayer"] = {"kind": "dense"}
    return 'tensor "\\u001b[2J\\nlayer": its array is missing'


@rule("a name of a megabyte")
def _(p: Parts) -> str:
    p.tensors["x" * 1_000_000] = {"kind": "dense"}
    return '...": its array is missing'


@rule("offsets backwards")
def _(p: Parts) -> str:
    p.header["layer.bias"]["data_offsets"] = [256, 0]
    return 'array "layer.bias": shape [64] of F32 takes 256 bytes, data_offsets give -256'


@rule("sizes whose product is zero in 64 bits")
def _(p: Parts) -> str:
    p.header["layer.bias"]["shape"] = [2**32, 2**32]
    return 'array "layer.bias": shape'


@rule("an empty array of huge sizes")
def _(p: Parts) -> str:
    p.header["zero"] = {"dtype": "U8", "shape": [0, 2**47, 2**47], "data_offsets": [0, 0]}
    p.tensors["zero"] = {"kind": "dense"}
    return 'array "zero": shape [0, 140737488355328, 140737488355328] is too large'


# the stream of layer.g is one raw block: 10 bytes before its content, 64 class bytes, a byte for each integer
_CLASSES, _CODES = 10, 74


@rule("row_scale neither true nor false")
def _(p: Parts) -> str:
    p.tensors["layer.g"]["codes"]["row_scale"] = 1
    return 'tensor "layer.g": row_scale is not true or false'


@rule("row_scale false, but the array is there")
def _(p: Parts) -> str:
    p.tensors["layer.g"]["codes"]["row_scale"] = False
    return 'tensor "layer.g": the array "row_scale" does not belong to these codes'


@rule("shrink of one half")
def _(p: Parts) -> str:
    p.tensors["layer.g"]["codes"]["shrink"] = 0.5
    return 'tensor "layer.g": shrink=0.5 is not a float32 of 0 or more and less than 0.5'


@rule("shrink negative")
def _(p: Parts) -> str:
    p.tensors["layer.g"]["codes"]["shrink"] = -0.25
    return "shrink=-0.25 is not a float32"


@rule("shrink between two float32 values")
def _(p: Parts) -> str:
    p.tensors["layer.g"]["codes"]["shrink"] = 0.1
    return "shrink=0.1 is not a float32"


@rule("fewer bits than the integers have")
def _(p: Parts) -> str:
    p.tensors["layer.g"]["codes"]["bits"] = 4
    return 'tensor "layer.g": stream: integers from -16 to 15 are not of 4 bits'


@rule("an integer beyond the bits")
def _(p: Parts) -> str:
    p.array("layer.g.stream")[_CODES] = 32
    return 'tensor "layer.g": stream: integers from -16 to 16 are not of 5 bits'


@rule("an escaped integer beyond the bits")
def _(p: Parts) -> str:
    p.array("layer.g.stream")[-1] = 255
    return 'tensor "layer.g": stream: integers from -16 to 127 are not of 5 bits'


@rule("an escaped tuple that is missing")
def _(p: Parts) -> str:
    p.array("layer.g.stream")[_CODES] = 255
    return 'tensor "layer.g": stream: 2118 bytes are too few for the escaped integers'


@rule("an escaped integer too many")
def _(p: Parts) -> str:
    codes = p.array("layer.g.stream")[_CODES:]
    codes[np.flatnonzero(codes == 255)[0]] = 31
    return 'tensor "layer.g": stream: 1 bytes follow the escaped integers'


@rule("a column in a class that takes less")
def _(p: Parts) -> str:
    p.array("layer.g.stream")[_CLASSES] = 7
    return 'tensor "layer.g": stream: '


@rule("all columns in a class that takes less")
def _(p: Parts) -> str:
    p.array("layer.g.stream")[_CLASSES:_CODES] = 255
    return "bytes follow the escaped integers"


@rule("a content size that is not the block's")
def _(p: Parts) -> str:
    p.array("layer.g.stream")[5] += 1
    return 'tensor "layer.g": stream: not one zstd frame'


@rule("not a zstd frame")
def _(p: Parts) -> str:
    p.array("layer.g.stream")[0] ^= 1
    return 'tensor "layer.g": stream: not one zstd frame'


@rule("a table that is no Huffman table")
def _(p: Parts) -> str:
    p.array("layer.h.stream")[12:60] = 255
    return 'tensor "layer.h": stream: not one zstd frame'


def _stream(name: str, make: Callable[[bytes, bytes], bytes], expected: str) -> None:
    """A rule that puts other bytes in place of a stream: `make(stream, content)`."""

    def damage(p: Parts) -> str:
        frame = p.array("layer.g.stream").tobytes()
        p.replace("layer.g.stream", make(frame, frame[_CLASSES:]))
        return f'tensor "layer.g": stream: {expected}'

    RULES[name] = damage


def _frame(content: bytes, size: int | None = None, dictionary: int = 0) -> bytes:
    """A frame of raw and repeating blocks, claiming 8 bytes of content size (or another one)."""
    head = struct.pack("<IB", 0xFD2FB528, 0xE0 | (1 if dictionary else 0))
    head += bytes([dictionary] if dictionary else [])
    head += struct.pack("<Q", len(content) if size is None else size)
    blocks = b""
    for start in range(0, len(content), 65536):
        part = content[start : start + 65536]
        last = start + 65536 >= len(content)
        same = part == part[:1] * len(part)
        kind = len(part) << 3 | (2 if same else 0) | last
        blocks += kind.to_bytes(3, "little") + (part[:1] if same else part)
    return head + blocks


_SKIPPABLE = struct.pack("<II", 0x184D2A50, 4) + b"skip"
_stream("a stream of nothing", lambda f, c: b"", "not one zstd frame")
_stream("a stream of its magic alone", lambda f, c: f[:4], "not one zstd frame")
_stream("a stream cut short", lambda f, c: f[:-1], "not one zstd frame")
_stream("a byte behind the frame", lambda f, c: f + b"\0", "not one zstd frame")
_stream("two frames", lambda f, c: f + f, "not one zstd frame")
_stream("a skippable frame behind", lambda f, c: f + _SKIPPABLE, "not one zstd frame")
_stream("a skippable frame before", lambda f, c: _SKIPPABLE + f, "not one zstd frame")
_stream("a skippable frame alone", lambda f, c: _SKIPPABLE, "not one zstd frame")
_stream("a dictionary", lambda f, c: _frame(c, dictionary=7), "not one zstd frame")
_stream("no content", lambda f, c: _frame(b"", 0), "the frame holds 0 bytes")
_stream("a class byte missing", lambda f, c: _frame(c[:63]), "63 bytes are too few for the classes of 64")
_stream("classes alone", lambda f, c: _frame(c[:64]), "64 bytes, but the classes take 2112")
_stream("a byte of content more", lambda f, c: _frame(c + b"\0"), "1 bytes follow the escaped integers")
_stream(
    "more content than any", lambda f, c: _frame(c + bytes(65536)), "the frame holds 67654 bytes, expected"
)
_stream("a size of 2**63", lambda f, c: _frame(c, 2**63), "the frame holds 9223372036854775808 bytes")
_stream("a size of 2**64 - 1", lambda f, c: _frame(c, 2**64 - 1), "the frame ")
_stream("a size of 2**64 - 2", lambda f, c: _frame(c, 2**64 - 2), "the frame ")
_stream(
    "no size",
    lambda f, c: zstandard.ZstdCompressor(write_content_size=False).compress(c),
    "the frame does not give its size",
)
_stream("a wrong checksum", lambda f, c: f[:4] + bytes([f[4] | 4]) + f[5:] + b"1234", "not one zstd frame")


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
        _frame,
        zstandard.ZstdCompressor(level=19).compress,
        zstandard.ZstdCompressor(write_checksum=True).compress,
    ):
        parts = Parts()
        parts.replace("layer.g.stream", make(parts.array("layer.g.stream").tobytes()[_CLASSES:]))
        assert attack(parts.join()) is None


def test_a_stream_that_unpacks_a_thousandfold(attack: Callable[..., Any]) -> None:
    """A few bytes may stand for many zeros, but not for more than the cap lets the tensor decode to."""
    parts = Parts()
    columns = CAP // 4 // 32
    parts.tensors["layer.g"]["shape"] = [32, columns]
    parts.replace("layer.g.stream", _frame(bytes(columns) + bytes(32 * columns)))
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
    tensors = {"tokenizer.json.zlib": np.frombuffer(bomb, np.uint8)}
    save_file(tmp_path / "a", tensors, {"model_type": "bert", "config": {"model_type": "bert"}})
    with pytest.raises(ValueError, match="larger than 64 MiB"):
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

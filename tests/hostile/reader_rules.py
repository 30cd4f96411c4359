"""Files that break one rule of FORMAT.md each: how each is made, and the words of the reader's message."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import zstandard

from .parts import CAP, Parts

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
CLASSES, _CODES = 10, 74


@rule("row_scale neither true nor false")
def _(p: Parts) -> str:
    p.tensors["layer.g"]["codes"]["row_scale"] = 1
    return 'tensor "layer.g": row_scale is not true or false'


@rule("row_scale false, but the array is there")
def _(p: Parts) -> str:
    p.tensors["layer.g"]["codes"]["row_scale"] = False
    return 'tensor "layer.g": the array "row_scale" does not belong to these codes'


for _name, _bands, _message in (
    ("no bands", 0, "bands=0 is not between 1 and 32"),
    ("33 bands", 33, "bands=33 is not between 1 and 32"),
    ("bands that are true", True, "bands is not an integer"),
    ("a band that no row is in", 3, "stream: rows are in bands 0, 1, expected 0 to 2"),
    ("bands of rows taken for classes", 1, "stream: "),
):

    def _damage_bands(p: Parts, bands: Any = _bands, message: str = _message) -> str:
        p.tensors["layer.i"]["codes"]["bands"] = bands
        return f'tensor "layer.i": {message}'

    RULES[_name] = _damage_bands


@rule("a row in a band beyond the last")
def _(p: Parts) -> str:
    p.array("layer.i.stream")[CLASSES + 31] = 2
    return 'tensor "layer.i": stream: rows are in bands 0, 1, 2, expected 0 to 1'


@rule("a stream that ends in the bands")
def _(p: Parts) -> str:
    content = p.array("layer.i.stream").tobytes()[CLASSES:]
    p.replace("layer.i.stream", frame(content[: 32 + 127]))
    return 'tensor "layer.i": stream: 159 bytes are too few for the classes of 64 columns and the bands of 32 rows'


@rule("2,048 classes in 32 bands")
def _(p: Parts) -> str:
    p.tensors["layer.i"]["codes"]["bands"] = 32
    p.replace("layer.i.stream", frame(bytes(range(32)) + bytes(range(64)) * 32))
    return 'tensor "layer.i": stream: 2048 classes in all bands, more than 256'


@rule("bands in version 1")
def _(p: Parts) -> str:
    p.description["version"] = 1
    return 'codes has an unknown entry "bands"'


@rule("no bands in version 2")
def _(p: Parts) -> str:
    del p.tensors["layer.g"]["codes"]["bands"]
    return 'tensor "layer.g": codes has no "bands"'


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
    p.array("layer.g.stream")[CLASSES] = 7
    return 'tensor "layer.g": stream: '


@rule("all columns in a class that takes less")
def _(p: Parts) -> str:
    p.array("layer.g.stream")[CLASSES:_CODES] = 255
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
        p.replace("layer.g.stream", make(frame, frame[CLASSES:]))
        return f'tensor "layer.g": stream: {expected}'

    RULES[name] = damage


def frame(content: bytes, size: int | None = None, dictionary: int = 0) -> bytes:
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
_stream("a dictionary", lambda f, c: frame(c, dictionary=7), "not one zstd frame")
_stream("no content", lambda f, c: frame(b"", 0), "the frame holds 0 bytes")
_stream("a class byte missing", lambda f, c: frame(c[:63]), "63 bytes are too few for the classes of 64")
_stream("classes alone", lambda f, c: frame(c[:64]), "64 bytes, but the classes take 2112")
_stream("a byte of content more", lambda f, c: frame(c + b"\0"), "1 bytes follow the escaped integers")
_stream(
    "more content than any", lambda f, c: frame(c + bytes(65536)), "the frame holds 67654 bytes, expected"
)
_stream("a size of 2**63", lambda f, c: frame(c, 2**63), "the frame holds 9223372036854775808 bytes")
_stream("a size of 2**64 - 1", lambda f, c: frame(c, 2**64 - 1), "the frame ")
_stream("a size of 2**64 - 2", lambda f, c: frame(c, 2**64 - 2), "the frame ")
_stream(
    "no size",
    lambda f, c: zstandard.ZstdCompressor(write_content_size=False).compress(c),
    "the frame does not give its size",
)
_stream("a wrong checksum", lambda f, c: f[:4] + bytes([f[4] | 4]) + f[5:] + b"1234", "not one zstd frame")

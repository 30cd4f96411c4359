"""The header of a GGUF file: metadata and where each tensor is. It is untrusted input, checked in full.

    "GGUF" | version u32 | tensors u64 | keys u64 | keys: name, type u32, value | tensors: name, axes u32,
    sizes u64 (the fastest first), type u32, offset u64 | padding | data

It is parsed here and not by the gguf package, which trusts counts and makes an array of every item of a list.
Every number is read within the file's bounds, so that work is linear in the file's size; lists of text stay in
the file until `Header.texts` decodes them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from mmap import mmap
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..json_checks import quoted

VERSIONS = (2, 3)
MAX_KEYS = 10_000  # a converted model has about 40
MAX_TENSORS = 1 << 16  # the largest dense models have about 1,200
MAX_NAME = 256  # bytes of the name of a tensor; llama.cpp: 64
MAX_KEY = 1 << 16
MAX_LIST = 4096  # items of a list in `Header.metadata`
MAX_VALUE = 1 << 20  # bytes of a text or list in `Header.metadata`; longer ones are a `List`
MAX_AXES = 4
MAX_ALIGNMENT = 1 << 16

_STRING, _ARRAY, _FLOAT32, _BOOL = 8, 9, 6, 7
#: type of a value -> NumPy's name of it
_NUMBERS = {
    **{0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "u1", 10: "<u8", 11: "<i8"},
    12: "<f8",
}


class List(NamedTuple):
    """A long list of the metadata (or one long text), which `Header.texts` and `Header.numbers` read."""

    kind: int
    items: int
    start: int  # bytes of the file
    stop: int


class Tensor(NamedTuple):
    """A tensor of the file.

    Attributes
    ----------
    shape : sizes in NumPy's order, the fastest last
    kind : the name of its type, such as "Q4_K"
    start, stop : bytes of the file
    """

    shape: tuple[int, ...]
    kind: str
    start: int
    stop: int


@dataclass
class Header:
    """A parsed header.

    Attributes
    ----------
    where : the file, for messages
    metadata : key -> bool, int, float, str, a list of them, or a `List`; float32 values are the shortest decimals
    tensors : in the order of the file
    data_start : where the tensors' bytes begin
    """

    where: str
    view: mmap
    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    data_start: int = 0
    lists: dict[str, List] = field(default_factory=dict)

    def texts(self, key: str) -> list[str]:
        """A list of text of the metadata, however long; refused if it is no such list, or not UTF-8."""
        return list(self.each_text(key))

    def each_text(self, key: str) -> Iterator[str]:
        """The items of `texts`, one at a time."""
        stored = self._list(key, "a list of text", (_STRING,))
        raw, at, unpack = self.view[stored.start : stored.stop], 0, struct.Struct("<Q").unpack_from
        for i in range(stored.items):
            start = at + 8
            at = start + unpack(raw, at)[0]
            try:
                yield str(raw[start:at], "utf-8")
            except UnicodeDecodeError:
                raise ValueError(f"{self.where}: item {i} of key {quoted(key)} is not UTF-8 text") from None

    def numbers(self, key: str) -> NDArray[Any]:
        """A list of numbers of the metadata as an array, which is a view of the file."""
        stored = self._list(key, "a list of numbers", tuple(_NUMBERS))
        return np.frombuffer(self.view, _NUMBERS[stored.kind], stored.items, stored.start)

    def _list(self, key: str, needs: str, kinds: tuple[int, ...]) -> List:
        stored = self.lists.get(key)
        if stored is None or stored.kind not in kinds:
            raise ValueError(f"{self.where}: key {key} is not {needs}")
        return stored


class _Cursor:
    """Reads from a mapped file, within its bounds."""

    def __init__(self, view: mmap, at: int, where: str) -> None:
        self.view, self.at, self.where = view, at, where

    def fail(self, message: str) -> NoReturn:
        raise ValueError(f"{self.where}: {message}")

    def skip(self, nbytes: int, what: str) -> int:
        """The first of the next bytes, which must be in the file."""
        start = self.at
        if nbytes > len(self.view) - start:
            self.fail(
                f"the file is truncated: {what} needs {nbytes} bytes at byte {start} of {len(self.view)}"
            )
        self.at = start + nbytes
        return start

    def number(self, kind: str, what: str) -> int:
        """An unsigned integer; kind: of `struct`."""
        start = self.skip(struct.calcsize(f"<{kind}"), what)
        return int(struct.unpack_from(f"<{kind}", self.view, start)[0])

    def raw(self, what: str, most: int | None = None) -> bytes:
        nbytes = self.number("Q", what)
        if most is not None and nbytes > most:
            self.fail(f"{what} has {nbytes} bytes; at most {most} are supported")
        start = self.skip(nbytes, what)
        return self.view[start : start + nbytes]

    def skip_text(self, what: str) -> int:
        nbytes = self.number("Q", what)
        self.skip(nbytes, what)
        return nbytes

    def text(self, what: str, most: int | None = None) -> str:
        try:
            return self.raw(what, most).decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8 text (byte {error.start} of it)")

    def value(self, kind: int, what: str) -> Any:
        """A value of the metadata; of a list or long text only where it is. The cursor is behind it then."""
        if kind == _STRING:
            start = self.at
            stop = start + 8 + self.skip_text(what)
            if stop - start > MAX_VALUE:
                return List(kind, 1, start, stop)
            self.at = start
            return self.text(what)
        if kind == _ARRAY:
            return self.list_of(what)
        if kind not in _NUMBERS:
            self.fail(f"{what} has the unknown type {kind}")
        dtype = np.dtype(_NUMBERS[kind])
        start = self.skip(dtype.itemsize, what)
        return _plain(np.frombuffer(self.view, dtype, 1, start), kind)[0]

    def list_of(self, what: str) -> List:
        kind, count = self.number("I", what), self.number("Q", what)
        start = self.at
        if kind in _NUMBERS:
            self.skip(count * np.dtype(_NUMBERS[kind]).itemsize, what)
        elif kind == _STRING:
            if count * 8 > len(self.view) - start:
                self.fail(f"the file is truncated: {what} claims {count} texts")
            # this loop is most of the time of a header: 262,144 tokens take 0.1 s
            view, at, size, unpack = self.view, start, len(self.view), struct.Struct("<Q").unpack_from
            for _ in range(count):
                if at + 8 > size:
                    break
                at += 8 + unpack(view, at)[0]
                if at > size:
                    break
            else:
                self.at = at
                return List(kind, count, start, at)
            self.fail(f"the file is truncated inside of {what}")
        else:
            self.fail(f"{what} is a list of type {kind}, which is not supported")
        return List(kind, count, start, self.at)


def _plain(values: NDArray[Any], kind: int) -> list[Any]:
    """Numbers as Python's."""
    if kind == _FLOAT32:  # 1e-05, not 9.999999747378752e-06: what the model's own config says
        return [float(str(value)) for value in values]
    return [bool(value) for value in values] if kind == _BOOL else list(values.tolist())


def read_header(view: mmap, where: str, sizes: Mapping[int, tuple[str, int, int]]) -> Header:
    """Parse and check the header of a mapped GGUF file.

    Parameters
    ----------
    sizes : type of a tensor -> its name, weights of a block, bytes of a block

    Raises
    ------
    ValueError
        It is not a GGUF file of a supported version, or its header contradicts itself or the file's size; the
        message names the file and the key or tensor.
    """
    cursor = _Cursor(view, 0, where)
    if view[:4] != b"GGUF":
        cursor.fail("not a GGUF file: it does not start with 'GGUF'")
    cursor.at = 4
    version = cursor.number("I", "the version")
    if version & 0xFFFF == 0:
        cursor.fail("a big-endian GGUF file; only little-endian ones are supported")
    if version not in VERSIONS:
        cursor.fail(f"GGUF version {version}; supported: {', '.join(map(str, VERSIONS))}")
    tensors, keys = cursor.number("Q", "the number of tensors"), cursor.number("Q", "the number of keys")
    for count, most, what in ((tensors, MAX_TENSORS, "tensors"), (keys, MAX_KEYS, "keys")):
        if count > most:
            cursor.fail(f"the header claims {count} {what}; at most {most} are supported")
    header = Header(where, view)
    for _ in range(keys):
        key = cursor.text("the name of a key", MAX_KEY)
        what = f"key {quoted(key)}"
        if key in header.metadata:
            cursor.fail(f"{what} appears twice")
        value = cursor.value(cursor.number("I", what), what)
        if isinstance(value, List):
            header.lists[key] = value
            header.metadata[key] = value
            if value.items <= MAX_LIST and cursor.at - value.start <= MAX_VALUE:
                texts = value.kind == _STRING
                header.metadata[key] = header.texts(key) if texts else _plain(header.numbers(key), value.kind)
        else:
            header.metadata[key] = value
    alignment = header.metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        cursor.fail(f"general.alignment={alignment} is not a power of two up to {MAX_ALIGNMENT}")
    described = list(_tensors(cursor, tensors, alignment, sizes))
    header.data_start = -(-cursor.at // alignment) * alignment
    for name, tensor in described:
        if name in header.tensors:
            cursor.fail(f"tensor {quoted(name)} appears twice")
        start, stop = tensor.start + header.data_start, tensor.stop + header.data_start
        if stop > len(view):
            cursor.fail(
                f"the file is truncated: tensor {quoted(name)} ends at byte {stop}, the file has {len(view)}"
            )
        header.tensors[name] = tensor._replace(start=start, stop=stop)
    at = header.data_start
    for name, tensor in sorted(header.tensors.items(), key=lambda item: item[1].start):
        if tensor.start < at:
            cursor.fail(f"tensor {quoted(name)} overlaps another one")
        at = tensor.stop
    return header


def _tensors(
    cursor: _Cursor, count: int, alignment: int, sizes: Mapping[int, tuple[str, int, int]]
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor's name, and where it is behind the start of the data."""
    for _ in range(count):
        name = cursor.text("the name of a tensor", MAX_NAME)
        what = f"tensor {quoted(name)}"
        axes = cursor.number("I", what)
        if not 1 <= axes <= MAX_AXES:
            cursor.fail(f"{what} has {axes} axes; 1 to {MAX_AXES} are supported")
        shape = tuple(cursor.number("Q", what) for _ in range(axes))[::-1]
        kind, offset = cursor.number("I", what), cursor.number("Q", what)
        if kind not in sizes:
            supported = ", ".join(name for name, _, _ in sizes.values())
            cursor.fail(f"{what} has the type {kind}; supported: {supported}")
        kind_name, weights, nbytes = sizes[kind]
        if not all(0 < n < 1 << 48 for n in shape) or prod(shape) >= 1 << 60:
            cursor.fail(f"{what} has the shape {shape}, which is not supported")
        if shape[-1] % weights:
            cursor.fail(f"{what} has rows of {shape[-1]} weights, which are no whole blocks of {kind_name}")
        if offset % alignment:
            cursor.fail(f"{what} is at {offset} of the data, not a multiple of general.alignment={alignment}")
        yield name, Tensor(shape, kind_name, offset, offset + prod(shape) // weights * nbytes)

"""A safetensors file mapped into memory, and checked as if an enemy had written it.

The header is parsed here and not by the safetensors library because NumPy has no bfloat16 there, a key that
appears twice passes, and arrays are copied. Everything this module accepts is a valid safetensors file.
"""

from __future__ import annotations

import json
import mmap
import os
import stat
import struct
from collections.abc import Callable
from math import isfinite, prod
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
MAX_DEPTH = 64  # nesting of the JSON

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


Fail = Callable[[str], NoReturn]


class FormatError(ValueError):
    """A file that is not what `FORMAT.md` describes. The message is one line with the file and the tensor."""


# --- JSON ---------------------------------------------------------------------------------------------


def quoted(name: str) -> str:
    """A name from a file as it may stand in a message: printable ASCII, one line, not too long."""
    text = json.dumps(name)
    return text if len(text) <= 100 else text[:96] + '..."'


def failure(where: str) -> Fail:
    def fail(message: str) -> NoReturn:
        raise FormatError(f"{where}: {message}")

    return fail


def check_tree(value: Any, fail: Fail) -> None:
    """No nesting beyond MAX_DEPTH, and only text that UTF-8 can hold."""
    pending = [(value, 0)]
    while pending:
        item, depth = pending.pop()
        if isinstance(item, str):
            try:
                item.encode("utf-8")
            except UnicodeEncodeError:
                fail("the JSON holds half of a surrogate pair")
        elif isinstance(item, dict | list):
            if depth >= MAX_DEPTH:
                fail(f"the JSON is nested more than {MAX_DEPTH} deep")
            pending += [(child, depth + 1) for child in item]
            if isinstance(item, dict):
                pending += [(child, depth + 1) for child in item.values()]


def parse_json(text: str | bytes, where: str) -> Any:
    """Strict JSON: UTF-8, no key twice, no NaN, no endless numbers, no deep nesting; else `FormatError`."""
    fail = failure(where)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            keys = [key for key, _ in items]
            fail(f"the key {quoted(next(k for k in keys if keys.count(k) > 1))} appears twice")
        return found

    def integer(digits: str) -> int:
        return int(digits) if len(digits) <= 20 else fail(f"the number {digits[:20]}... is too large")

    def constant(name: str) -> NoReturn:
        fail(f"{name} is not JSON")

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        value = json.loads(text, object_pairs_hook=pairs, parse_int=integer, parse_constant=constant)
    except FormatError:
        raise
    except RecursionError:
        fail("the JSON is nested too deeply")
    except MemoryError:
        fail("the JSON does not fit into memory")
    except ValueError as error:
        fail(f"not valid JSON ({' '.join(str(error).split())[:120]})")
    check_tree(value, fail)
    return value


def dump_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def json_fields(value: Any, names: tuple[str, ...], what: str, fail: Fail) -> list[Any]:
    """The values of a JSON object that has exactly these keys."""
    if type(value) is not dict:
        fail(f"{what} is not a JSON object")
    for name in names:
        if name not in value:
            fail(f"{what} has no {quoted(name)}")
    for name in value:
        if name not in names:
            fail(f"{what} has an unknown entry {quoted(name)}")
    return [value[name] for name in names]


def json_integer(value: Any, low: int, high: int, what: str, fail: Fail) -> int:
    if type(value) is not int:  # bool is an int to isinstance
        fail(f"{what} is not an integer")
    if not low <= value <= high:
        fail(f"{what}={value} is not between {low} and {high}")
    return value


def json_number(value: Any, what: str, fail: Fail) -> float:
    if type(value) not in (int, float) or not isfinite(value):
        fail(f"{what} is not a finite number")
    return float(value)


def json_choice(value: Any, choices: tuple[Any, ...], what: str, fail: Fail) -> Any:
    if type(value) is not type(choices[0]) or value not in choices:
        shown = quoted(value) if isinstance(value, str) else str(value)[:40]
        fail(f"{what}={shown} is not one of {', '.join(map(str, choices))}")
    return value


# --- a safetensors file, mapped -----------------------------------------------------------------------


class Entry(NamedTuple):
    """One array of a safetensors file; start and stop count from the file's first byte."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class MappedFile:
    """A safetensors file mapped into memory, its header checked in full.

    Arrays are views of the file. They are writable, in private memory: writing to one changes neither the
    file nor another mapping of it. (So kernels compile once for loaded and for fresh arrays.) A file must not
    be shortened or rewritten in place while it is mapped; replacing it, as `Writer` does, is safe.

    Parameters
    ----------
    path : the file
    read_only : map for reading alone; the system then sets no memory aside, so that a file may be larger
        than memory and swap

    Attributes
    ----------
    path : Path
    entries : dict[str, Entry], in the order of the payload
    metadata : dict[str, str], the file's `__metadata__`
    header_bytes : the length and the JSON header
    file_bytes : the size of the file

    Raises
    ------
    OSError
        The file cannot be opened.
    FormatError
        It is not a safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str], read_only: bool = False) -> None:
        self.path = Path(path)
        fail = failure(str(self.path))
        if not stat.S_ISREG(os.stat(self.path).st_mode):
            fail("not a regular file")
        with open(self.path, "rb") as file:
            self.file_bytes = os.fstat(file.fileno()).st_size
            if self.file_bytes < 8:
                fail(f"{self.file_bytes} bytes are too few for a safetensors file")
            access = mmap.ACCESS_READ if read_only else mmap.ACCESS_COPY
            self._map = mmap.mmap(file.fileno(), self.file_bytes, access=access)
        (length,) = struct.unpack_from("<Q", self._map)
        if length > min(self.file_bytes - 8, MAX_HEADER_BYTES):
            fail(
                f"not a safetensors file, or cut short: a header of {length} bytes in {self.file_bytes} bytes"
            )
        text = self._map[8 : 8 + length]
        if text[:1] != b"{":
            fail("not a safetensors file: the header does not start with '{'")
        self.header_bytes = 8 + length
        header = parse_json(text, str(self.path))
        if type(header) is not dict:
            fail("the header is not a JSON object")
        self.metadata = self._parse_metadata(header.pop("__metadata__", {}), fail)
        entries = {name: self._parse_entry(name, value) for name, value in header.items()}
        self.entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
        at = self.header_bytes
        for name, entry in self.entries.items():
            if entry.start != at:
                fail(f"array {quoted(name)} overlaps another one or leaves a gap")
            at = entry.stop
        if at != self.file_bytes:
            fail(f"the arrays end at byte {at}, the file has {self.file_bytes}")
        self._bytes = np.frombuffer(self._map, np.uint8)

    @staticmethod
    def _parse_metadata(value: Any, fail: Fail) -> dict[str, str]:
        if type(value) is not dict or not all(type(v) is str for v in value.values()):
            fail("__metadata__ is not a JSON object of strings")
        return dict(value)

    def _parse_entry(self, name: str, value: Any) -> Entry:
        fail = failure(f"{self.path}: array {quoted(name)}")
        dtype, shape, offsets = json_fields(
            value, ("dtype", "shape", "data_offsets"), "its header entry", fail
        )
        dtype = json_choice(dtype, tuple(DTYPES), "dtype", fail)
        if type(shape) is not list or len(shape) > 32:
            fail("shape is not a list of at most 32 sizes")
        shape = tuple(json_integer(n, 0, 2**48, "a size in shape", fail) for n in shape)
        if type(offsets) is not list or len(offsets) != 2:
            fail("data_offsets is not a list of two integers")
        payload = self.file_bytes - self.header_bytes
        start, stop = (json_integer(n, 0, payload, "an offset", fail) for n in offsets)
        size = prod(shape) * DTYPES[dtype].itemsize
        if stop - start != size:
            fail(f"shape {list(shape)} of {dtype} takes {size} bytes, data_offsets give {stop - start}")
        if prod(n for n in shape if n) >= 2**60:
            fail(f"shape {list(shape)} is too large")
        return Entry(dtype, shape, start + self.header_bytes, stop + self.header_bytes)

    def array(self, name: str) -> NDArray[Any]:
        """The array of this name, a view of the file."""
        entry = self.entries[name]
        flat = self._bytes[entry.start : entry.stop].view(DTYPES[entry.dtype])
        return np.asarray(flat.reshape(entry.shape))

"""A safetensors file mapped into memory. It is untrusted input: the header is checked in full.

The header is parsed here and not by the safetensors library because NumPy has no bfloat16 there, a key that
appears twice passes, and arrays are copied. Everything this module accepts is a valid safetensors file.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .json_checks import Fail, failure, json_choice, json_fields, json_integer, parse_json, quoted

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit

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


class Entry(NamedTuple):
    """One array of a safetensors file; start and stop count from the file's first byte."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class MappedFile:
    """A safetensors file mapped into memory, its header checked in full.

    Arrays are views of the file. They are writable and copy-on-write: writing to one changes neither the file
    nor another mapping of it. (So kernels compile once for loaded and for new arrays.) A file must not be
    truncated or rewritten in place while it is mapped; replacing it, as `Writer` does, is safe.

    Parameters
    ----------
    path : the file
    read_only : map without write access; the system then reserves no memory, so that a file may be larger than
        memory and swap

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
            self._check_size(fail)
            access = mmap.ACCESS_READ if read_only else mmap.ACCESS_COPY
            try:
                self._map = mmap.mmap(file.fileno(), self.file_bytes, access=access)
            except OSError as error:  # of too many descriptors or mappings, without a name
                error.filename = os.fspath(self.path)
                raise
        self._read_header(fail)

    @classmethod
    def of_bytes(cls, data: bytes | memoryview, name: str) -> MappedFile:
        """The contents of such a file. Arrays are views of a copy; `name` stands for the path in messages."""
        data = memoryview(data).cast("B")
        file = cls.__new__(cls)
        file.path, file.file_bytes = Path(name), len(data)
        fail = failure(name)
        file._check_size(fail)
        file._map = mmap.mmap(-1, file.file_bytes)  # aligned to a page, as a file's
        file._map[:] = data
        file._read_header(fail)
        return file

    def _check_size(self, fail: Fail) -> None:
        if self.file_bytes < 8:
            fail(f"{self.file_bytes} bytes are too few for a safetensors file")

    def _read_header(self, fail: Fail) -> None:
        (length,) = struct.unpack_from("<Q", self._map)
        if length > min(self.file_bytes - 8, MAX_HEADER_BYTES):
            fail(
                f"not a safetensors file, or cut short: a header of {length} bytes in {self.file_bytes} bytes"
            )
        if length == 0 or self._map[8:9] != b"{":
            fail("not a safetensors file: the header does not start with '{'")
        self.header_bytes = 8 + length
        # an object, as it starts with "{"
        header: dict[str, Any] = parse_json(self._map[8 : 8 + length], str(self.path), self.file_bytes)
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
        fail = failure(lambda: f"{self.path}: array {quoted(name)}")
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

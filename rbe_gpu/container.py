"""Compressed weights in a file: `.rbe.safetensors`, an ordinary safetensors file with one JSON description.

`FORMAT.md` specifies every byte. `Writer` streams: it holds one tensor at a time, and the file appears under its
name only when it is complete. `load_file` maps the file into memory and treats it as untrusted input: counts and
indices become addresses, so every size and sum is checked, in Python integers, before an array leaves this
module. The rules of one tensor are in `stored.py` and each codec's `from_file`; the reader and the writer both call
them.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from io import BytesIO
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import memory, output, threads
from .blocks import RBEBlocks, RBEMatrix
from .codecs import CODECS
from .json_checks import (
    FormatError,
    check_cost,
    check_tree,
    dump_json,
    failure,
    json_fields,
    parse_json,
    quoted,
)
from .mapped import DTYPE_NAMES, DTYPES, MAX_HEADER_BYTES, MappedFile
from .stored import StoredTensor, check_dense, description, upgrade

__all__ = [
    "FORMAT_VERSION",
    "FileInfo",
    "FormatError",
    "TensorInfo",
    "Writer",
    "describe",
    "from_bytes",
    "load_file",
    "save_file",
    "to_bytes",
]

FORMAT_VERSION = 2  # that is written; a reader knows those before it, too
METADATA_KEY = "rbe"

_FREE_BYTES = (
    56 << 20
)  # of memory, beyond three times the file, that a file may take before all of it is checked
# A stream of a few bytes may hold billions of zeros. Real ones of calibrated models hold 2 to 50 values a byte.
_VALUES_PER_BYTE = 1024
_FREE_VALUES = 1 << 24

_CHUNK = 1 << 22  # bytes or elements read in one step


# --- reading ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Opened:
    file: MappedFile
    version: int
    config: dict[str, Any]
    tensors: dict[str, RBEBlocks | NDArray[Any]]


def _open(file: MappedFile, max_decoded_bytes: int | None) -> _Opened:
    fail = failure(str(file.path))
    if METADATA_KEY not in file.metadata:
        fail(
            f"no {quoted(METADATA_KEY)} entry in __metadata__; this is a safetensors file without RBE weights"
        )
    where = f"{file.path}: the {quoted(METADATA_KEY)} entry"
    root = parse_json(file.metadata.pop(METADATA_KEY), where, file.file_bytes)
    if type(root) is not dict:
        fail(f"the {quoted(METADATA_KEY)} entry is not a JSON object")
    version = root.get("version")
    if type(version) is not int:
        fail("version is not an integer")
    if not 1 <= version <= FORMAT_VERSION:
        fail(f"format version {version}; this reader knows versions 1 to {FORMAT_VERSION}")
    _, config, described = json_fields(root, ("version", "config", "tensors"), "the description", fail)
    if type(config) is not dict:
        fail("config is not a JSON object")
    if type(described) is not dict:
        fail("tensors is not a JSON object")
    if max_decoded_bytes is None:
        max_decoded_bytes = memory.total_bytes()
    if version < FORMAT_VERSION:
        for name, tensor in described.items():
            upgrade(tensor, version, failure(f"{file.path}: tensor {quoted(name)}"))
    stored = _claims(file, described, max_decoded_bytes)
    return _Opened(file, version, config, _tensors(file, stored))


def _claims(
    file: MappedFile, described: dict[str, Any], max_decoded_bytes: int
) -> dict[str, tuple[StoredTensor | None, dict[str, str]]]:
    """What the description says, before any array is read: name -> (tensor or None for a dense one, its arrays).

    Every array belongs to one tensor, and what all tensors take together is within the limits.
    """
    owned: set[str] = set()
    array_names = ("basis", *dict.fromkeys(n for codec in CODECS.values() for n in codec.array_names))
    tensors: dict[str, tuple[StoredTensor | None, dict[str, str]]] = {}
    decoded = decompressed = 0
    max_values = _FREE_VALUES + _VALUES_PER_BYTE * file.file_bytes
    for name, stored in described.items():
        fail = failure(f"{file.path}: tensor {quoted(name)}")
        tensor = None
        if type(stored) is dict and stored.get("kind") == "dense":
            json_fields(stored, ("kind",), "the description of a dense tensor", fail)
            if name not in file.entries:
                fail("its array is missing")
            entry = file.entries[name]
            decoded += entry.stop - entry.start
            arrays = {"": name}
        else:
            tensor = StoredTensor(stored, fail)
            decoded += tensor.decoded_bytes
            decompressed += tensor.cost.decompressed
            arrays = {part: f"{name}.{part}" for part in array_names if f"{name}.{part}" in file.entries}
        for array in arrays.values():
            if array in owned:
                fail(f"the array {quoted(array)} belongs to two tensors")
            owned.add(array)
            entry = file.entries[array]
            if entry.start % DTYPES[entry.dtype].itemsize:
                fail(f"the array {quoted(array)} is not aligned to its dtype")
        if decoded > max_decoded_bytes:
            fail(f"decodes to more than the limit of {max_decoded_bytes} bytes (max_decoded_bytes)")
        if decompressed > max_values:
            fail(
                f"its stream claims more values than the {max_values} that a file of {file.file_bytes} bytes may hold"
            )
        tensors[name] = tensor, arrays
    for array in file.entries:
        if array not in owned:
            failure(str(file.path))(f"the array {quoted(array)} belongs to no tensor")
    return tensors


def _tensors(
    file: MappedFile, stored: dict[str, tuple[StoredTensor | None, dict[str, str]]]
) -> dict[str, RBEBlocks | NDArray[Any]]:
    """The tensors, everything checked. What they take is compared with the memory that is available first."""
    costs = [tensor.cost for tensor, _ in stored.values() if tensor is not None]
    resident = sum(cost.resident for cost in costs)
    working = sorted((cost.working for cost in costs), reverse=True)
    workers = _reading_threads(sum(cost.decompressed for cost in costs))
    available = memory.available_bytes()
    if resident + sum(working[:workers]) > available:
        workers = 1
    needed = resident + sum(working[:workers])
    if needed > available:
        raise MemoryError(f"{file.path} takes {needed} bytes of memory to load, {available} are available")

    def read(item: tuple[str, tuple[StoredTensor | None, dict[str, str]]]) -> RBEBlocks | NDArray[Any]:
        name, (tensor, names) = item
        arrays = {part: file.array(array) for part, array in names.items()}
        if tensor is not None:
            return tensor.blocks(arrays)
        check_dense(arrays[""], failure(f"{file.path}: tensor {quoted(name)}"))
        return arrays[""]

    if needed > 3 * file.file_bytes + _FREE_BYTES:  # a false file is refused before it has taken that much
        for tensor, names in stored.values():
            if tensor is not None:
                tensor.check({part: file.array(array) for part, array in names.items()})
    if workers == 1:
        return dict(zip(stored, map(read, stored.items()), strict=True))
    with ThreadPoolExecutor(workers) as pool:
        try:
            return dict(zip(stored, pool.map(read, stored.items()), strict=True))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _reading_threads(decompressed: int) -> int:
    """Threads that read tensors: several where streams are long."""
    if decompressed < _CHUNK:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(threads.asked or cores, 4)


def load_file(
    path: str | os.PathLike[str], *, max_decoded_bytes: int | None = None
) -> tuple[dict[str, RBEBlocks | NDArray[Any]], dict[str, Any]]:
    """Open a file. Returns its tensors, as views of the mapped file (grid codes: unpacked from it), and its config.

    Parameters
    ----------
    path : a file written by `save_file`, `Writer` or another writer of `FORMAT.md`
    max_decoded_bytes : refuse a file whose tensors would take more as dense float32, padding included; None: more
        than the memory of the machine, or of the process's control group

    Returns
    -------
    (dict name -> RBEMatrix, RBEVectors or dense array; dict config)

    Raises
    ------
    FormatError
        Any defect of the file; nothing of it is returned.
    MemoryError
        The file is valid so far, and takes more memory than is available.
    OSError
        The file cannot be opened.

    Notes
    -----
    Positions and counts, which kernels use as addresses, are copied from the file: nothing that is written to the
    file later makes a kernel read elsewhere. Values stay views; a file that changes changes them, and one that is
    truncated ends the process (SIGBUS). Replace a file by renaming another one to its name, as `save_file` does.
    """
    opened = _open(MappedFile(path), max_decoded_bytes)
    return opened.tensors, opened.config


def from_bytes(
    data: bytes | memoryview, name: str = "the bytes", *, max_decoded_bytes: int | None = None
) -> tuple[dict[str, RBEBlocks | NDArray[Any]], dict[str, Any]]:
    """`load_file` of the contents of a file, with the same checks. `name` stands for the path in messages."""
    opened = _open(MappedFile.of_bytes(data, name), max_decoded_bytes)
    return opened.tensors, opened.config


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file. `dense_bytes` is its size as float32; 0 for a dense tensor of integers."""

    name: str
    kind: str
    shape: tuple[int, ...]
    codes: str
    block: int | None
    transform: str | None
    basis: bool
    nbytes: int
    dense_bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8.0 * self.nbytes / max(prod(self.shape), 1)


@dataclass(frozen=True)
class FileInfo:
    """The contents of a file. `dense_bytes` sums the float tensors as float32."""

    path: str
    version: int
    file_bytes: int
    header_bytes: int
    dense_bytes: int
    config: dict[str, Any]
    tensors: tuple[TensorInfo, ...]

    @property
    def ratio(self) -> float:
        """dense float32 bytes / all bytes of the file."""
        return self.dense_bytes / self.file_bytes


def describe(path: str | os.PathLike[str], *, max_decoded_bytes: int | None = None) -> FileInfo:
    """The contents of a file, after the same checks as `load_file`."""
    opened = _open(MappedFile(path), max_decoded_bytes)
    rows = tuple(tensor_info(name, value) for name, value in opened.tensors.items())
    return FileInfo(
        path=str(opened.file.path),
        version=opened.version,
        file_bytes=opened.file.file_bytes,
        header_bytes=opened.file.header_bytes,
        dense_bytes=sum(row.dense_bytes for row in rows),
        config=opened.config,
        tensors=rows,
    )


def tensor_info(name: str, value: RBEBlocks | NDArray[Any]) -> TensorInfo:
    """The row of `describe` for one tensor."""
    if isinstance(value, RBEBlocks):
        return TensorInfo(
            name,
            value.kind,
            value.shape,
            value.codes.name,
            value.block,
            value.transform,
            value.basis is not None,
            value.nbytes,
            value.dense_nbytes,
        )
    floats = DTYPE_NAMES[value.dtype] in ("F64", "F32", "F16", "BF16")
    dense = 4 * value.size if floats else 0
    return TensorInfo(name, "dense", value.shape, str(value.dtype), None, None, False, value.nbytes, dense)


# --- writing ------------------------------------------------------------------------------------------


class _Spooled(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    at: int  # in the spool
    nbytes: int


def _payload_order(arrays: Mapping[str, Any]) -> list[str]:
    """Widest elements first, then by name: every array is aligned, and the order of `add` does not matter."""
    return sorted(arrays, key=lambda name: (-DTYPES[arrays[name].dtype].itemsize, name))


def header(arrays: Mapping[str, Any], tensors: Mapping[str, Any], config: Mapping[str, Any]) -> bytes:
    """The length, the JSON and its padding.

    Parameters
    ----------
    arrays : name -> object with dtype (a safetensors name), shape and nbytes
    tensors : name -> description
    config : JSON object
    """
    root = {"version": FORMAT_VERSION, "config": dict(config), "tensors": dict(tensors)}
    entries: dict[str, Any] = {"__metadata__": {METADATA_KEY: dump_json(root)}}
    at = 0
    for name in _payload_order(arrays):
        a = arrays[name]
        entries[name] = {"dtype": a.dtype, "shape": list(a.shape), "data_offsets": [at, at + a.nbytes]}
        at += a.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def file_bytes(tensors: Mapping[str, RBEBlocks | NDArray[Any]], config: Mapping[str, Any]) -> int:
    """Bytes of the file that `save_file` would write."""
    arrays: dict[str, _Spooled] = {}
    described: dict[str, dict[str, Any]] = {}
    for name, value in tensors.items():
        parts: dict[str, Any] = {name: value}
        described[name] = {"kind": "dense"}
        if isinstance(value, RBEBlocks):
            parts = {f"{name}.{part}": a for part, a in value.arrays.items()}
            described[name] = description(value)
        arrays |= {array: _Spooled(DTYPE_NAMES[a.dtype], a.shape, 0, a.nbytes) for array, a in parts.items()}
    return len(header(arrays, described, config)) + sum(a.nbytes for a in arrays.values())


def _host(a: Any, name: str) -> NDArray[Any]:
    """A C-contiguous NumPy array; CuPy arrays come back from their GPU."""
    if not isinstance(a, np.ndarray) and hasattr(a, "__cuda_array_interface__"):
        a = a.get()
    if not isinstance(a, np.ndarray):
        raise TypeError(f"{name} is a {type(a).__name__}; pass an RBEMatrix, RBEVectors or numpy array")
    if a.dtype not in DTYPE_NAMES:
        raise TypeError(f"{name} has dtype {a.dtype}; a file holds {', '.join(map(str, DTYPES.values()))}")
    return a if a.flags.c_contiguous else np.ascontiguousarray(a).reshape(a.shape)


class Writer:
    """Write a file one tensor at a time.

    >>> with Writer("model.rbe.safetensors") as writer:
    ...     writer.config = {"model_type": "bert"}
    ...     writer.add("pooler.weight", rbe.compress(w, grade="A"))
    ...     writer.add("pooler.bias", bias)

    Arrays go to an unnamed temporary file in the folder of `path` (as large as the result); leaving the `with`
    block writes them in order after the header, syncs, and renames the result to `path` (`output.replacing`:
    symbolic links are followed, a pipe is written as it is). After an exception no file is left behind, and an
    existing file at `path` is unchanged. The same tensors and config give the same bytes, in whatever order they are
    added.

    Attributes
    ----------
    config : JSON object, stored in the file
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config: dict[str, Any] = {}
        self._arrays: dict[str, _Spooled] = {}
        self._tensors: dict[str, dict[str, Any]] = {}
        self._spool: BinaryIO | None = None
        self._end = 0

    def __enter__(self) -> Writer:
        place = output.destination(self.path)
        if not place.through:
            output.sweep(place.path.parent)
        with output.naming(self.path):
            self._spool = tempfile.TemporaryFile(dir=None if place.through else place.path.parent)
        return self

    def add(self, name: str, value: RBEBlocks | NDArray[Any]) -> None:
        """Store a tensor; its arrays are in the file system when this returns.

        Raises
        ------
        ValueError
            The name is taken, or the value breaks a rule of the format.
        TypeError
            Neither a compressed weight nor an array of a dtype that a file holds.
        """
        if self._spool is None:
            raise ValueError("the writer is not open; use it in a with block")
        if not isinstance(name, str) or not name or name == "__metadata__":
            raise ValueError(f"{name!r} is no name for a tensor")
        fail = failure(f"{self.path}: tensor {quoted(name)}")
        check_tree(name, fail)
        if isinstance(value, RBEBlocks):
            if isinstance(value, RBEMatrix) and not (value.row_transformed and value.col_transformed):
                fail("one of its transforms is switched off; save the matrix that it was made from")
            parts = {part: _host(a, f"{name}.{part}") for part, a in value.arrays.items()}
            stored = description(value)
            value.codes.check_read_back(StoredTensor(stored, fail).blocks(parts).codes, fail)
            arrays = {f"{name}.{part}": a for part, a in parts.items()}
        else:
            arrays = {name: _host(value, name)}
            stored = {"kind": "dense"}
            check_dense(arrays[name], fail)
        for array in arrays:
            if array in self._arrays:
                raise ValueError(f"{self.path}: the array {quoted(array)} is there already")
        if name in self._tensors:
            raise ValueError(f"{self.path}: the tensor {quoted(name)} is there already")
        for array, a in arrays.items():
            self._arrays[array] = _Spooled(DTYPE_NAMES[a.dtype], a.shape, self._end, a.nbytes)
            with output.naming(self.path):
                self._spool.write(a.reshape(-1).view(np.uint8).data)
            self._end += a.nbytes
        self._tensors[name] = stored

    @property
    def nbytes(self) -> int:
        """Size of the file if it were closed now."""
        return len(header(self._arrays, self._tensors, self.config)) + self._end

    def _commit(self, spool: BinaryIO) -> None:
        if not isinstance(self.config, dict):
            raise TypeError(f"config is a {type(self.config).__name__}; use a dict")
        check_tree([self.config], failure(f"{self.path}: config"))  # a level below the header
        try:
            head = header(self._arrays, self._tensors, self.config)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.path}: config is not JSON ({error})") from None
        if len(head) - 8 > MAX_HEADER_BYTES:
            raise ValueError(f"{self.path}: the header takes {len(head)} bytes, more than {MAX_HEADER_BYTES}")
        check_cost(head, len(head) + self._end, failure(str(self.path)))
        with self._destination() as file:
            file.write(head)
            for name in _payload_order(self._arrays):
                array = self._arrays[name]
                spool.seek(array.at)
                for start in range(0, array.nbytes, _CHUNK):
                    file.write(spool.read(min(_CHUNK, array.nbytes - start)))

    def _destination(self) -> AbstractContextManager[Any]:
        """What the finished file is written to."""
        return output.replacing(self.path)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        spool, self._spool = self._spool, None
        assert spool is not None
        with output.naming(self.path), spool:  # closing it writes what is buffered
            if kind is None:
                self._commit(spool)


def save_file(
    path: str | os.PathLike[str],
    tensors: Mapping[str, RBEBlocks | NDArray[Any]],
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write tensors to a file; see `Writer`.

    Parameters
    ----------
    path : the file, by custom `<name>.rbe.safetensors`
    tensors : name -> RBEMatrix, RBEVectors or dense array
    config : JSON object stored with them
    """
    with Writer(path) as writer:
        writer.config = dict(config or {})
        for name, value in tensors.items():
            writer.add(name, value)


class _MemoryWriter(Writer):
    """A `Writer` into memory."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.file = BytesIO()

    def __enter__(self) -> Writer:
        self._spool = BytesIO()
        return self

    def _destination(self) -> AbstractContextManager[Any]:
        return nullcontext(self.file)


def to_bytes(
    tensors: Mapping[str, RBEBlocks | NDArray[Any]], config: Mapping[str, Any] | None = None
) -> bytes:
    """The bytes of the file that `save_file` would write."""
    writer = _MemoryWriter("the bytes")
    with writer:
        writer.config = dict(config or {})
        for name, value in tensors.items():
            writer.add(name, value)
    return writer.file.getvalue()

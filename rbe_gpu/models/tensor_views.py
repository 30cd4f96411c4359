"""Tensors of a checkpoint under other names, in parts, or transposed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..json_checks import quoted
from ..mapped import Entry


class Part(NamedTuple):
    """Rows of a tensor.

    Attributes
    ----------
    name : of the tensor in the file
    start, stop : the rows, after transposition; stop None: up to the last one
    transposed : whether the tensor is stored with the axes exchanged
    """

    name: str
    start: int = 0
    stop: int | None = None
    transposed: bool = False


class TensorFile(Protocol):
    """What is asked of a file with tensors: `MappedFile`, `GGUFFile` or `TensorViews`."""

    path: Path
    file_bytes: int
    entries: dict[str, Entry]

    def array(self, name: str) -> NDArray[Any]:
        """The tensor of that name."""


class TensorViews:
    """Parts of a file's tensors, each a tensor of its own.

    Parameters
    ----------
    file : with the tensors
    parts : name here -> `Part`

    Raises
    ------
    ValueError
        The parts of a tensor are not all of it.
    """

    def __init__(self, file: TensorFile, parts: Mapping[str, Part]) -> None:
        self.path, self.file_bytes, self._file = file.path, file.file_bytes, file
        self._parts = dict(parts)
        self.entries: dict[str, Entry] = {}
        rows: dict[str, int] = {}
        for name, part in parts.items():
            entry = file.entries[part.name]
            if part.stop is not None and not entry.shape:
                raise ValueError(f"{file.path}: tensor {quoted(part.name)} is one number, not rows of them")
            shape = entry.shape[::-1] if part.transposed else entry.shape
            if part.stop is not None:
                shape = (max(0, min(part.stop, shape[0]) - part.start), *shape[1:])
                rows[part.name] = max(rows.get(part.name, 0), part.stop)
            self.entries[name] = entry._replace(shape=tuple(shape))
        for name, count in rows.items():
            transposed = any(part.transposed for part in parts.values() if part.name == name)
            shape = tuple(file.entries[name].shape)
            if shape[-1 if transposed else 0] != count:
                raise ValueError(
                    f"{file.path}: tensor {quoted(name)} has shape {shape}, but config.json says {count} "
                    f"{'columns' if transposed else 'rows'}"
                )

    def array(self, name: str) -> NDArray[Any]:
        """The tensor of that name: a view of the file, of a transposed one a copy."""
        part = self._parts[name]
        stored = self._file.array(part.name)
        rows = (stored.T if part.transposed else stored)[part.start : part.stop]
        return np.ascontiguousarray(rows) if part.transposed else rows

"""One tensor of a checkpoint compressed: in this process, or as a task of a worker.

A worker reads the weight from the checkpoint and writes its codes to a folder `.NAME.parts` beside the output, which
this process reads: neither passes through the scheduler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..blocks import RBEBlocks
from ..cluster import TaskPool
from ..container import load_file, save_file
from ..encode import compress
from .parts_folder import Files, PartsFolder, files_of
from .source import FLOATS, Source, open_source

_TENSOR = "tensor"  # its name in a file of one


class EncodedTensor(NamedTuple):
    """How a tensor is stored: compressed or dense, ||W - W'|| / ||W||, and ||W||^2 (0 of dense ones)."""

    value: RBEBlocks | NDArray[Any]
    relative_error: float
    energy: float


@dataclass
class Budget:
    """Bytes left for tensors that are not compressed yet. Bytes that one does not use go to the next ones."""

    nbytes: int
    dense_bytes: int  # of those tensors, as float32

    def ratio(self) -> float:
        return self.dense_bytes / max(self.nbytes, 1)

    def spend(self, nbytes: int, dense_bytes: int) -> None:
        """Of one tensor: the bytes that it takes, and those of it as float32."""
        self.nbytes -= nbytes
        self.dense_bytes -= dense_bytes


def widened(a: NDArray[Any], where: str) -> NDArray[np.float32]:
    """A float tensor as float32, finite."""
    with np.errstate(over="ignore"):
        w = np.asarray(a, np.float32)
    flat = w.reshape(-1)
    for start in range(0, flat.size, 1 << 20):
        if not np.isfinite(flat[start : start + (1 << 20)]).all():
            raise ValueError(
                f"{where} holds NaN or Inf (or values beyond float32); repair the checkpoint first"
            )
    return w


def halved(a: NDArray[Any]) -> NDArray[Any]:
    """A float32 tensor as float16, if that changes no value by more than 2^-11 of the largest; others as they are.

    Biases and norms stay dense, and beside codes of a few bits half of their bytes is worth more than their last
    13 bits: 2% of MiniLM at ratio 32.
    """
    if a.dtype != np.float32 or not a.size:
        return a
    with np.errstate(over="ignore", invalid="ignore"):
        half = a.astype(np.float16)
        error = np.abs(half - a).max()
    return half if error <= np.abs(a).max() * 2.0**-11 else a  # NaN and Inf: as they are


@contextmanager
def _naming_tensor(source: Source, name: str) -> Iterator[None]:
    """Name the tensor in a ValueError."""
    try:
        yield
    except ValueError as problem:
        raise ValueError(f"{source.files[name].path}: tensor {name}: {problem}") from None


def _array(source: Source, name: str) -> NDArray[Any]:
    array = source.files[name].array(name)
    if source.entry(name)[0] not in FLOATS:
        return array
    return widened(array, f"{source.files[name].path}: tensor {name}")


def stored(
    source: Source, name: str, value: RBEBlocks | NDArray[Any] | None, halve: bool = False
) -> EncodedTensor:
    """A tensor whose stored value is known; None: that of the checkpoint.

    halve : a dense one is stored as float16
    """
    array = _array(source, name)
    if isinstance(value, RBEBlocks):
        return EncodedTensor(value, value.error_report(array).relative_error, _energy(array))
    dense = array if value is None else value
    return EncodedTensor(halved(dense) if halve else dense, 0.0, 0.0)


def encode_tensor(source: Source, name: str, settings: Mapping[str, Any]) -> EncodedTensor:
    """Compress a tensor; it stays dense where that is smaller.

    settings : arguments of `rbe_gpu.compress`
    """
    array = _array(source, name)
    with _naming_tensor(source, name):
        packed = compress(array, **settings)
    if packed.nbytes >= array.nbytes:
        return EncodedTensor(array, 0.0, _energy(array))
    return EncodedTensor(packed, packed.error_report(array).relative_error, _energy(array))


def _energy(array: NDArray[Any]) -> float:
    return float(np.linalg.norm(array)) ** 2


# --- on workers ---------------------------------------------------------------------------------------


class _Task(NamedTuple):
    source: str
    files: Files
    name: str
    settings: dict[str, Any]
    part: str  # the file that it writes; none where the tensor stays dense


class _Answer(NamedTuple):
    dense: bool
    nbytes: int
    relative_error: float
    energy: float


def _encode_part(task: _Task) -> _Answer:
    """Run by a worker."""
    source = _source(task.source, task.files)
    value, error, energy = encode_tensor(source, task.name, task.settings)
    dense = not isinstance(value, RBEBlocks)
    if not dense:
        save_file(task.part, {_TENSOR: value})
    return _Answer(dense, value.nbytes, error, energy)


@lru_cache(maxsize=1)
def _source(path: str, files: Files) -> Source:
    source = open_source(Path(path))
    if files_of(source) != files:
        raise ValueError(f"{path} is another checkpoint on a worker than where the run was started")
    return source


class TensorTasks:
    """The tensors of one output file as tasks, some of them ahead of the one that is asked for; a context manager.

    With a ratio as its target, a tensor's own ratio depends on the bytes that all earlier ones took, to the last bit.
    Ratios of tensors ahead are predicted: each takes the bytes of the latest one of its shape, as dense codes do.
    While predictions are right more and more tensors run ahead; after a wrong one none do, and those that ran are
    compressed again.

    Parameters
    ----------
    source : the checkpoint
    parts : where workers write
    names : the tensors that are compressed, in the order in which `result` is called
    settings_of : arguments of `rbe_gpu.compress` by name and target
    """

    def __init__(
        self,
        source: Source,
        parts: PartsFolder,
        names: Sequence[str],
        settings_of: Callable[[str, Mapping[str, Any]], dict[str, Any]],
    ) -> None:
        self._pool = TaskPool(parts.client)
        self._source, self._names, self._settings_of = source, list(names), settings_of
        self._parts = parts
        self._futures: dict[tuple[str, tuple[tuple[str, Any], ...]], tuple[Any, Path]] = {}
        self._count = 0
        self._nbytes: dict[tuple[Any, ...], int] = {}  # of the latest tensor, by shape
        self._predicted: dict[str, float] = {}
        self._depth = 0  # tensors that run ahead with predicted ratios

    def __enter__(self) -> TensorTasks:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.cancel(future for future, _ in self._futures.values())

    def result(self, name: str, target: Mapping[str, Any], budget: Budget | None) -> EncodedTensor:
        """The tensor `name`, compressed to a target; meanwhile others are compressed.

        budget : with a ratio as its target: what is left for this tensor and those after it
        """
        future, part = self._submitted(name, target)
        if budget is None:
            for after in self._after(name, self._pool.window() - 1):
                self._submitted(after, target)
        else:
            right = self._predicted.pop(name, None) == target["ratio"]
            self._depth = min(2 * self._depth + 1, self._pool.window() - 1) if right else 0
            self._run_ahead(name, target, budget)
        answer: _Answer = self._pool.result(future)
        del self._futures[_key(name, target)]
        if budget is not None:
            self._nbytes[self._shape(name)] = answer.nbytes
            self._drop_wrong(name)
        if answer.dense:
            return EncodedTensor(_array(self._source, name), answer.relative_error, answer.energy)
        value = load_file(part)[0][_TENSOR]
        with suppress(OSError):  # Windows removes no file that is mapped
            part.unlink()
        return EncodedTensor(value, answer.relative_error, answer.energy)

    def _submitted(self, name: str, target: Mapping[str, Any]) -> tuple[Any, Path]:
        key = _key(name, target)
        if key not in self._futures:
            part = self._parts.path / f"{self._count:06d}.safetensors"
            self._count += 1
            task = _Task(
                self._parts.source, self._parts.files, name, self._settings_of(name, target), str(part)
            )
            self._futures[key] = self._pool.submit(_encode_part, task), part
        return self._futures[key]

    def _after(self, name: str, count: int) -> list[str]:
        first = self._names.index(name) + 1
        return self._names[first : first + count]

    def _run_ahead(self, name: str, target: Mapping[str, Any], budget: Budget) -> None:
        """Predict the ratios of tensors after `name`, one at least, and submit the next `_depth` ones."""
        left = replace(budget)
        for i, after in enumerate(self._after(name, max(self._depth, 1))):
            dense = 4 * prod(self._shape(name))
            left.spend(self._nbytes.get(self._shape(name), round(dense / left.ratio())), dense)
            self._predicted[after] = left.ratio()
            if i < self._depth:
                self._submitted(after, {**target, "ratio": left.ratio()})
            name = after

    def _drop_wrong(self, name: str) -> None:
        """Cancel what was submitted for `name` with another ratio."""
        for key in [key for key in self._futures if key[0] == name]:
            future, part = self._futures.pop(key)
            self._pool.cancel([future])
            part.unlink(missing_ok=True)

    def _shape(self, name: str) -> tuple[Any, ...]:
        return tuple(self._source.entry(name)[1])


def _key(name: str, target: Mapping[str, Any]) -> tuple[str, tuple[tuple[str, Any], ...]]:
    return name, tuple(sorted(target.items()))

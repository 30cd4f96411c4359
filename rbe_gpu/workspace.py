"""Scratch memory that is kept between calls, so that the second call of a layer allocates nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from math import prod
from typing import Any

import numpy as np

from .dispatch import device_memory_errors

_BYTES = np.dtype(np.uint8).str
_MOST_ENTRIES = 1024  # views and arguments; a layer needs about ten


class Workspace:
    """Named scratch buffers, grown on demand and reused.

    A buffer keeps the largest size asked for under its name; `get` returns a view of it. The contents are
    undefined. A workspace belongs to one thread, and on a GPU to one stream, at a time: two layers may share one, two
    threads or streams may not. Stream capture needs a call of the same shapes before it, which makes the buffers and
    sets the counters to zero.

    Buffers are NumPy arrays; `on("cuda:0")` is the part whose buffers are CuPy arrays of that GPU. The ops and
    layers take whichever part belongs to their arrays.

    Attributes
    ----------
    arguments : arguments of kernels that point into the buffers
    constants : small arrays that calls read, on the device of the buffers
    owners : for a buffer whose contents are reused, the object that computed them

    >>> ws = Workspace()
    >>> a = ws.get("scores", (4, 8))
    >>> ws.get("scores", (2, 8)).base is a.base
    True
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.arguments = ArgumentCache()
        self.constants = ConstantCache(device)
        self.owners: dict[str, object] = {}
        self._buffers: dict[tuple[str, str], Any] = {}
        self._views: dict[tuple[str, str, tuple[int, ...]], Any] = {}
        self._counters: dict[str, Any] = {}
        self._parts: dict[str, Workspace] = {}

    def on(self, device: str) -> Workspace:
        """The part of this workspace for arrays of a device ("cpu", "cuda:0"): itself, if it is that one."""
        if device == self.device:
            return self
        part = self._parts.get(device)
        if part is None:
            part = self._parts[device] = Workspace(device)
        return part

    def _allocate(self, nbytes: int, zero: bool = False) -> Any:
        """Bytes, aligned to 64; uninitialised unless `zero`."""
        if self.device != "cpu":
            import cupy

            with cupy.cuda.Device(int(self.device.partition(":")[2])), device_memory_errors():
                return (cupy.zeros if zero else cupy.empty)(nbytes, np.uint8)
        raw = (np.zeros if zero else np.empty)(nbytes + 64, np.uint8)
        start = -raw.ctypes.data % 64
        return raw[start : start + nbytes]

    def get(self, name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
        """An uninitialised C-contiguous array of `shape` and `dtype`, 64-byte aligned."""
        dtype = np.dtype(dtype)
        known = self._views.get((name, dtype.str, shape))
        if known is not None:
            return known
        nbytes = prod(shape) * dtype.itemsize
        view = self._buffer(name, dtype.str, nbytes)[:nbytes].view(dtype).reshape(shape)
        if len(self._views) >= _MOST_ENTRIES:  # varying sequence lengths ask for ever new shapes
            self._views.clear()
        self._views[name, dtype.str, shape] = view
        return view

    def zeros(self, name: str, count: int) -> Any:
        """At least (count,) uint32: counters that are zero at first, and that every kernel leaves at zero."""
        counters = self._counters.get(name)
        if counters is None or counters.size < count:
            counters = self._counters[name] = self._allocate(4 * count, zero=True).view(np.uint32)
        return counters

    def buffer(self, name: str, nbytes: int = 0) -> Any:
        """The whole buffer that `get` takes uint8 arrays from, at least `nbytes` long; None if there is none yet."""
        return self._buffer(name, _BYTES, nbytes) if nbytes else self._buffers.get((name, _BYTES))

    def _buffer(self, name: str, dtype: str, nbytes: int) -> Any:
        key = (name, dtype)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.nbytes < nbytes:
            buffer = self._buffers[key] = self._allocate(nbytes)
            # views of the smaller buffer would keep it alive
            self._views = {k: v for k, v in self._views.items() if k[:2] != key}
        return buffer

    @property
    def nbytes(self) -> int:
        """Bytes held by all buffers, on every device."""
        own = sum(int(b.nbytes) for b in (*self._buffers.values(), *self._counters.values()))
        own += self.constants.nbytes
        return own + sum(part.nbytes for part in self._parts.values())

    def clear(self) -> None:
        """Drop every buffer. Arrays handed out before stay valid."""
        self.arguments.clear()
        self.constants.clear()
        self.owners.clear()
        self._buffers.clear()
        self._views.clear()
        self._counters.clear()
        self._parts.clear()


class ThreadWorkspaces(threading.local):
    """A workspace for each Python thread that asks; it is freed when the thread ends.

    A copy, also a pickled one, starts empty.
    """

    def __init__(self) -> None:
        self.own = Workspace()

    def __reduce__(self) -> tuple[type[ThreadWorkspaces], tuple[()]]:
        return ThreadWorkspaces, ()


class ArgumentCache:
    """Arguments of kernels by call, kept as long as the scratch buffer that they point into is not replaced."""

    def __init__(self) -> None:
        self._by_buffer: dict[str, tuple[Any, dict[Hashable, Any]]] = {}

    def get(
        self, workspace: Workspace, name: str, key: Hashable, make: Callable[[Callable[[int], Any]], Any]
    ) -> Any:
        """The arguments that an earlier call with `key` made, or new ones.

        Parameters
        ----------
        name : of the buffer
        make : called with a function that takes a number of bytes and returns the buffer, at least that long
        """
        kept = self._by_buffer.get(name)
        if kept is not None and kept[0] is workspace._buffers.get(
            (name, _BYTES)
        ):  # buffer() costs 0.1 us more
            arguments = kept[1].get(key)
            if arguments is not None:
                return arguments
        arguments = make(lambda nbytes: workspace.buffer(name, nbytes))
        buffer = workspace.buffer(name)
        if kept is None or kept[0] is not buffer:
            self._by_buffer[name] = buffer, {key: arguments}
        else:
            if len(kept[1]) >= _MOST_ENTRIES:
                kept[1].clear()
            kept[1][key] = arguments
        return arguments

    def clear(self) -> None:
        self._by_buffer.clear()


class ConstantCache:
    """Small arrays that depend on shapes alone, such as positions, on a device."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._constants: dict[str, tuple[Hashable, Any]] = {}

    def get(self, name: str, key: Hashable, make: Callable[[], Any]) -> Any:
        """The array of a name, not to be written to; made again if the key is not that of the last call.

        make : returns a NumPy array
        """
        kept = self._constants.get(name)
        if kept is not None and kept[0] == key:
            return kept[1]
        array = make()
        if self._device != "cpu":
            import cupy

            with cupy.cuda.Device(int(self._device.partition(":")[2])):
                array = cupy.asarray(array)
        self._constants[name] = key, array
        return array

    @property
    def nbytes(self) -> int:
        return sum(int(array.nbytes) for _, array in self._constants.values())

    def clear(self) -> None:
        self._constants.clear()

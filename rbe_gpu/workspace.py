"""Scratch memory that is kept between calls, so that the second call of a layer allocates nothing."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import numpy as np

from .dispatch import device_memory_errors

_VIEWS = 1024  # shapes remembered; a layer asks for about ten


class Workspace:
    """Named scratch buffers, grown on demand and reused.

    A buffer keeps the largest size asked for under its name; `get` returns a view of it. The contents are
    undefined. A workspace belongs to one thread at a time: two layers may share one, two threads may not.

    Buffers are NumPy arrays; `on("cuda:0")` is the part whose buffers are CuPy arrays of that GPU. The ops and
    layers take whichever part belongs to their arrays.

    >>> ws = Workspace()
    >>> a = ws.get("scores", (4, 8))
    >>> ws.get("scores", (2, 8)).base is a.base
    True
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._buffers: dict[tuple[str, str], Any] = {}
        self._views: dict[tuple[str, str, tuple[int, ...]], Any] = {}
        self._plans: dict[tuple[Any, ...], Any] = {}
        self._parts: dict[str, Workspace] = {}
        self._constants: dict[str, tuple[Hashable, Any]] = {}
        #: Whether what an op made of its input may serve the next one that gets the same (see `keeping`).
        self.unchanged = False
        self.last: Any = None

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Inside, arrays that ops read do not change, so that products of one input transform it once."""
        self.unchanged, self.last = True, None
        try:
            yield
        finally:
            self.unchanged, self.last = False, None

    def on(self, device: str) -> Workspace:
        """The part of this workspace for arrays of a device ("cpu", "cuda:0"): itself, if it is that one."""
        if device == self.device:
            return self
        part = self._parts.get(device)
        if part is None:
            part = self._parts[device] = Workspace(device)
        return part

    def _allocate(self, nbytes: int) -> Any:
        """Uninitialised bytes, aligned to 64."""
        if self.device != "cpu":
            import cupy

            with cupy.cuda.Device(int(self.device.partition(":")[2])), device_memory_errors():
                return cupy.empty(nbytes, np.uint8)
        raw = np.empty(nbytes + 64, np.uint8)
        start = -raw.ctypes.data % 64
        return raw[start : start + nbytes]

    def get(self, name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
        """An uninitialised C-contiguous array of `shape` and `dtype`, 64-byte aligned."""
        dtype = np.dtype(dtype)
        known = self._views.get((name, dtype.str, shape))
        if known is not None:
            return known
        key = (name, dtype.str)
        nbytes = prod(shape) * dtype.itemsize
        buffer = self._buffers.get(key)
        if buffer is None or buffer.nbytes < nbytes:
            buffer = self._buffers[key] = self._allocate(nbytes)
            # views of the smaller buffer would keep it alive
            self._views = {k: v for k, v in self._views.items() if k[:2] != key}
        view = buffer[:nbytes].view(dtype).reshape(shape)
        if len(self._views) >= _VIEWS:  # texts of ever new lengths ask for ever new shapes
            self._views.clear()
        self._views[name, dtype.str, shape] = view
        return view

    def plan(self, key: tuple[Any, ...], name: str, make: Callable[[Callable[[int], Any]], Any]) -> Any:
        """What `make` made for `key` at an earlier call; made again when its scratch memory has moved.

        make : called with a function that takes a number of bytes and returns the buffer `name`, uint8, at least that
            long; what it returns has that buffer as its attribute `buffer`
        """
        plan = self._plans.get(key)
        if plan is None or plan.buffer is not self._buffers.get((name, "|u1")):
            if len(self._plans) >= _VIEWS:
                self._plans.clear()
            plan = self._plans[key] = make(lambda nbytes: self._buffer(name, nbytes))
        return plan

    def _buffer(self, name: str, nbytes: int) -> Any:
        key = (name, "|u1")
        buffer = self._buffers.get(key)
        if buffer is None or buffer.nbytes < nbytes:
            buffer = self._buffers[key] = self._allocate(nbytes)
            # views of the smaller buffer would keep it alive
            self._views = {k: v for k, v in self._views.items() if k[:2] != key}
            self._plans = {k: p for k, p in self._plans.items() if p.buffer is buffer or k[0] != name}
        return buffer

    def constant(self, name: str, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives, a NumPy array, moved to where this workspace is; not to be written to.

        It is kept, and made again only when another `key` is asked for under the name.
        """
        known = self._constants.get(name)
        if known is not None and known[0] == key:
            return known[1]
        found = make()
        if self.device != "cpu":
            import cupy

            with cupy.cuda.Device(int(self.device.partition(":")[2])):
                found = cupy.asarray(found)
        self._constants[name] = (key, found)
        return found

    @property
    def nbytes(self) -> int:
        """Bytes held by all buffers, on every device."""
        own = sum(int(b.nbytes) for b in self._buffers.values())
        own += sum(int(a.nbytes) for _, a in self._constants.values())
        return own + sum(part.nbytes for part in self._parts.values())

    def clear(self) -> None:
        """Forget every buffer. Arrays handed out before stay valid."""
        self._buffers.clear()
        self._constants.clear()
        self._views.clear()
        self._plans.clear()
        self._parts.clear()

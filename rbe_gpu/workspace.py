"""Scratch memory that is kept between calls, so that the second call of a layer allocates nothing."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

_VIEWS = 1024  # shapes remembered; a layer asks for about ten


class Workspace:
    """Named scratch buffers, grown on demand and reused.

    A buffer keeps the largest size asked for under its name; `get` returns a view of it. The contents are
    undefined. A workspace belongs to one thread at a time: two layers may share one, two threads may not.

    >>> ws = Workspace()
    >>> a = ws.get("scores", (4, 8))
    >>> ws.get("scores", (2, 8)).base is a.base
    True
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], np.ndarray[Any, Any]] = {}
        self._views: dict[tuple[str, str, tuple[int, ...]], np.ndarray[Any, Any]] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray[Any, Any]:
        """An uninitialised C-contiguous NumPy array of `shape` and `dtype`, 64-byte aligned."""
        dtype = np.dtype(dtype)
        known = self._views.get((name, dtype.str, shape))
        if known is not None:
            return known
        key = (name, dtype.str)
        nbytes = prod(shape) * dtype.itemsize
        buffer = self._buffers.get(key)
        if buffer is None or buffer.nbytes < nbytes:
            raw = np.empty(nbytes + 64, np.uint8)
            start = -raw.ctypes.data % 64
            buffer = raw[start : start + nbytes]
            self._buffers[key] = buffer
            # views of the smaller buffer would keep it alive
            self._views = {k: v for k, v in self._views.items() if k[:2] != key}
        view: np.ndarray[Any, Any] = buffer[:nbytes].view(dtype).reshape(shape)
        if len(self._views) >= _VIEWS:  # texts of ever new lengths ask for ever new shapes
            self._views.clear()
        self._views[name, dtype.str, shape] = view
        return view

    @property
    def nbytes(self) -> int:
        """Bytes held by all buffers."""
        return sum(b.nbytes for b in self._buffers.values())

    def clear(self) -> None:
        """Forget every buffer. Arrays handed out before stay valid."""
        self._buffers.clear()
        self._views.clear()

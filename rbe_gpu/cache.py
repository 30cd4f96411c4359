"""A cache of decoded panels of compressed weights, with a byte budget."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from .blocks import Array, RBEBlocks


class PanelCache:
    """Cache of decoded row panels of compressed weights, up to `budget` bytes; counts hits and misses.

    A model needs its panels in the same order at every call. With that access pattern, least-recently-used eviction
    would never hit once the weights exceed the budget, so nothing is evicted: with half of the needed budget, half of
    all lookups hit. `clear()` empties the cache. Several layers, and several threads, may share one.

    Attributes
    ----------
    budget : bytes; 0 keeps nothing
    nbytes : bytes in use
    hits, misses : lookups that found a panel, and that did not
    """

    def __init__(self, budget: int) -> None:
        if budget < 0:
            raise ValueError(f"budget={budget} is negative; use 0 to keep nothing")
        self.budget = budget
        self._lock = threading.Lock()
        self.nbytes = 0
        self.hits = 0
        self.misses = 0
        # the weight is stored with its panel, so that its id is not reused while it is a key
        self._panels: dict[tuple[int, int, int], tuple[RBEBlocks, np.ndarray[Any, Any]]] = {}

    def panel(
        self, weight: RBEBlocks, start: int, stop: int, decode_into: Callable[[Array], None], scratch: Array
    ) -> Array:
        """Rows start..stop of `weight`, float32: from the cache, or decoded, into the cache if it fits."""
        key = (id(weight), start, stop)
        with self._lock:
            entry = self._panels.get(key)
            if entry is not None:
                self.hits += 1
                return entry[1]
            self.misses += 1
            fits = self.nbytes + scratch.nbytes <= self.budget
            if fits:
                self.nbytes += scratch.nbytes
        if not fits:
            decode_into(scratch)
            return scratch
        panel = np.empty_like(scratch)
        decode_into(panel)
        with self._lock:
            if self._panels.setdefault(key, (weight, panel))[1] is not panel:  # another thread was first
                self.nbytes -= panel.nbytes
        return panel

    def clear(self) -> None:
        """Drop every panel and reset the counters."""
        with self._lock:
            self._panels.clear()
            self.nbytes = self.hits = self.misses = 0

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the lock, for copies and pickles."""
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

"""A cache of decoded panels of compressed weights, with a byte budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .blocks import Array, RBEBlocks


class PanelCache:
    """Cache of decoded row panels of compressed weights, up to `budget` bytes; counts hits and misses.

    A model needs its panels in the same order at every call. With that access pattern, least-recently-used eviction
    would never hit once the weights exceed the budget, so nothing is evicted: with half of the needed budget, half of
    all lookups hit. `clear()` empties the cache. Several layers may share one.

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
        entry = self._panels.get(key)
        if entry is not None:
            self.hits += 1
            return entry[1]
        self.misses += 1
        if self.nbytes + scratch.nbytes > self.budget:
            decode_into(scratch)
            return scratch
        panel = np.empty_like(scratch)
        decode_into(panel)
        self._panels[key] = (weight, panel)
        self.nbytes += panel.nbytes
        return panel

    def clear(self) -> None:
        """Drop every panel and reset the counters."""
        self._panels.clear()
        self.nbytes = self.hits = self.misses = 0

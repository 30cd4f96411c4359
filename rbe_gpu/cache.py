"""Decoded panels of compressed weights, kept under a byte budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .blocks import Array, RBEBlocks


class PanelCache:
    """Keeps decoded row panels of compressed weights until `budget` bytes are used; counts hits and misses.

    A model asks for its panels in the same order at every call. Under that pattern a cache that evicts the
    least recently used panel never hits once the weights exceed the budget, so panels that are in stay in:
    with half the budget needed, half of all look-ups hit. `clear()` starts over. One cache may serve many
    layers.

    Attributes
    ----------
    budget : bytes; 0 keeps nothing
    nbytes : bytes held now
    hits, misses : look-ups answered from the cache, and not
    """

    def __init__(self, budget: int) -> None:
        if budget < 0:
            raise ValueError(f"budget={budget} is negative; use 0 to keep nothing")
        self.budget = budget
        self.nbytes = 0
        self.hits = 0
        self.misses = 0
        # the weight is kept beside its panels: its id stays taken for as long as it is a key
        self._panels: dict[tuple[int, int, int], tuple[RBEBlocks, np.ndarray[Any, Any]]] = {}

    def panel(
        self, weight: RBEBlocks, start: int, stop: int, decode_into: Callable[[Array], None], scratch: Array
    ) -> Array:
        """Rows start..stop of `weight`, float32: from the cache, or decoded (into the cache if it fits)."""
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
        """Drop every panel and set the counters to zero."""
        self._panels.clear()
        self.nbytes = self.hits = self.misses = 0

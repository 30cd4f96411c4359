"""Batches of texts of similar length, the same for the same seed and step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_POOL = 8  # batches that are cut from one pool of texts, sorted by length


class Batch(NamedTuple):
    """Token ids (batch, seq) int64, zero in the padding; `text` (batch, seq) bool, false there."""

    ids: Tensor
    text: Tensor


def padded(sequences: Sequence[NDArray[np.int32]], device: str) -> Batch:
    longest = max(map(len, sequences))
    ids = np.zeros((len(sequences), longest), np.int64)
    text = np.zeros(ids.shape, bool)
    for row, keep, sequence in zip(ids, text, sequences, strict=True):
        row[: len(sequence)], keep[: len(sequence)] = sequence, True
    return Batch(torch.from_numpy(ids).to(device), torch.from_numpy(text).to(device))


class Batches:
    """All texts in a random order, then in another one, and so on."""

    def __init__(self, sequences: Sequence[NDArray[np.int32]], size: int, seed: int, device: str) -> None:
        self._sequences = sequences
        self._size = size
        self._seed = seed
        self._device = device
        self._pool = min(_POOL, max(1, len(sequences) // size))
        self._pools = max(1, len(sequences) // (size * self._pool))
        self._order = lru_cache(maxsize=1)(self._shuffled)

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng((self._seed, epoch)).permutation(len(self._sequences))

    def at(self, step: int) -> Batch:
        """The batch of a step."""
        pool, index = divmod(step, self._pool)
        epoch, pool = divmod(pool, self._pools)
        count = self._size * self._pool
        texts = sorted(
            self._order(epoch)[pool * count : (pool + 1) * count], key=lambda i: len(self._sequences[i])
        )
        # every batch of a pool in turn, in an order of its own: lengths must not follow the step
        index = int(np.random.default_rng((self._seed, epoch, pool)).permutation(self._pool)[index])
        return padded(
            [self._sequences[i] for i in texts[index * self._size : (index + 1) * self._size]], self._device
        )


def in_order(
    sequences: Sequence[NDArray[np.int32]], size: int, device: str
) -> Iterator[tuple[list[int], Batch]]:
    """All texts once, by length, with their indices."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for start in range(0, len(order), size):
        part = order[start : start + size]
        yield part, padded([sequences[i] for i in part], device)

"""KVCache: keys and values of the tokens that a decoder has seen, so that each token is computed once."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from ..blocks import Array
from ..dispatch import device_memory_errors


class KVLayer(NamedTuple):
    """The part of a `KVCache` that one `RBEAttention` reads and writes.

    Attributes
    ----------
    keys, values : (batch, capacity, num_kv_heads, head_dim), dtype of the hidden states
    lengths : (batch,) int64 on the host, tokens of each sequence before the call
    """

    keys: Array
    values: Array
    lengths: NDArray[np.int64]


class KVCache:
    """Keys and values of all layers for a batch of sequences.

    Parameters
    ----------
    num_layers, batch : layers and sequences
    capacity : tokens of a sequence at most
    num_kv_heads, head_dim : of the attention layers
    dtype : float32, float16 or bfloat16: that of the hidden states
    device : "cpu" or "cuda:0"

    Attributes
    ----------
    lengths : (batch,) int64 on the host, tokens that each sequence has; `Decoder.forward` adds those that it was
        called with. Smaller values forget tokens from the end
    long : (batch,) bool on the host, whether keys are rotated as of texts beyond the first context of a decoder with
        LongRoPE, which the first tokens of a sequence decide
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: Any = np.float32,
        device: str = "cpu",
    ) -> None:
        sizes = {
            "num_layers": num_layers, "batch": batch, "capacity": capacity, "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
        }  # fmt: skip
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}={value} is not positive")
        self.device = device
        self.lengths = np.zeros(batch, np.int64)
        self.long = np.zeros(batch, bool)
        # a layer is a contiguous array: its keys and values lie together
        shape = (num_layers, 2, batch, capacity, num_kv_heads, head_dim)
        self._memory = _zeros(shape, np.dtype(dtype), device)

    @property
    def batch(self) -> int:
        return int(self._memory.shape[2])

    @property
    def capacity(self) -> int:
        """Tokens of a sequence at most."""
        return int(self._memory.shape[3])

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values, taken when the cache is made."""
        return int(self._memory.nbytes)

    @property
    def memory(self) -> Array:
        """(num_layers, 2, batch, capacity, num_kv_heads, head_dim): the keys and values of each layer."""
        return self._memory

    def layer(self, index: int) -> KVLayer:
        keys, values = self._memory[index]
        return KVLayer(keys, values, self.lengths)

    def check_room(self, counts: NDArray[np.int64]) -> None:
        """Raise a ValueError unless there is room for `counts` (batch,) more tokens."""
        if counts.shape != (self.batch,) or self.lengths.shape != (self.batch,):
            raise ValueError(f"the cache is of {self.batch} sequences, the batch has {counts.size}")
        after = self.lengths + counts
        if self.lengths.size and int(self.lengths.min()) < 0:
            raise ValueError(f"the cache's lengths begin at {self.lengths.min()}; use 0 or more")
        if after.size and int(after.max()) > self.capacity:
            raise ValueError(
                f"a sequence has {after.max()} tokens with these, the cache has room for {self.capacity}; make one "
                "with a larger capacity"
            )

    def keep(self, sequences: list[int]) -> None:
        """Forget all sequences but these, which are numbered 0, 1, 2, ... from then on. The memory is not freed.

        sequences : ascending
        """
        if sequences != sorted(set(sequences)) or not set(sequences) <= set(range(self.batch)):
            raise ValueError(f"sequences={sequences} are not ascending numbers from 0 to {self.batch - 1}")
        for new, old in enumerate(sequences):
            if new != old:  # ascending: what is overwritten has been read
                used = int(self.lengths[old])
                self._memory[:, :, new, :used] = self._memory[:, :, old, :used]
        self._memory = self._memory[:, :, : len(sequences)]
        self.lengths, self.long = self.lengths[sequences], self.long[sequences]

    def reset(self) -> None:
        """Forget all tokens, and keep the memory."""
        self.lengths[:] = 0

    def __repr__(self) -> str:
        layers, _, batch, capacity, heads, head_dim = self._memory.shape
        return (
            f"KVCache({layers} layers, {batch} x {capacity} tokens, {heads} heads of {head_dim}, "
            f"{self._memory.dtype}, {self.nbytes / 1e6:.1f} MB, {self.device})"
        )


def _zeros(shape: tuple[int, ...], dtype: Any, device: str) -> Array:
    if device == "cpu":
        return np.zeros(shape, dtype)  # pages that no token reaches are never touched
    import cupy

    with cupy.cuda.Device(int(device.partition(":")[2])), device_memory_errors():
        return cast(Array, cupy.zeros(shape, dtype))

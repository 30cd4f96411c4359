"""RBERotary: rotary position embeddings (Su et al. 2021) with tables that grow with the positions asked for."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from .. import ops
from ..blocks import Array
from ..dispatch import as_cupy, device_of, module_of

_MIN_POSITIONS = 256  # positions of the first tables


class RBERotary:
    """y = x rotated by its position: feature j and feature j + rotary_dim/2 by position * frequencies[j].

    Parameters
    ----------
    frequencies : (rotary_dim/2,) radians per position. `ops.rope` is called with tables of the cosines and sines
        of float32(position * float32(frequency)), the angles that models were trained with
    factor : of the cosines and sines
    interleaved : the pairs are (2j, 2j + 1) instead
    long_frequencies, context : of texts with more than `context` tokens the frequencies at every position (LongRoPE,
        Ding et al. 2024); position p of such a text is passed as context + p
    """

    def __init__(
        self,
        frequencies: Any,
        factor: float = 1.0,
        interleaved: bool = False,
        long_frequencies: Any = None,
        context: int = 0,
    ) -> None:
        self.frequencies: NDArray[np.float32] = np.ascontiguousarray(frequencies, np.float32)
        if self.frequencies.ndim != 1 or not self.frequencies.size:
            raise ValueError(f"frequencies have shape {self.frequencies.shape}, need (rotary_dim/2,)")
        self.long_frequencies: NDArray[np.float32] | None = None
        if long_frequencies is not None:
            self.long_frequencies = np.ascontiguousarray(long_frequencies, np.float32)
            if self.long_frequencies.shape != self.frequencies.shape or context < 1:
                raise ValueError(
                    f"long_frequencies have shape {self.long_frequencies.shape}, frequencies "
                    f"{self.frequencies.shape}, with context={context}; give the same number, and a context from 1"
                )
        self.context = context
        self.factor = float(factor)
        self.interleaved = interleaved
        self._tables: dict[str, tuple[Array, Array]] = {}

    @property
    def rotary_dim(self) -> int:
        return 2 * int(self.frequencies.size)

    @property
    def nbytes(self) -> int:
        """Bytes of the tables on all devices."""
        return sum(int(a.nbytes) for pair in self._tables.values() for a in pair)

    def tables(self, positions: int, device: str = "cpu") -> tuple[Array, Array]:
        """Cosines and sines for at least `positions` positions, (rows, rotary_dim/2) float32 on a device."""
        known = self._tables.get(device)
        if known is not None and known[0].shape[0] >= positions:
            return known
        rows = max(_MIN_POSITIONS, 1 << max(positions - 1, 0).bit_length())
        row = np.arange(rows, dtype=np.float32)[:, None]
        angles = row * self.frequencies
        if self.long_frequencies is not None:
            angles[self.context :] = row[: max(0, rows - self.context)] * self.long_frequencies
        pair: Any = tuple(
            (self.factor * f(angles.astype(np.float64))).astype(np.float32) for f in (np.cos, np.sin)
        )
        if device != "cpu":
            import cupy

            with cupy.cuda.Device(int(device.partition(":")[2])):
                pair = tuple(map(cupy.asarray, pair))
        self._tables[device] = (
            pair  # several threads may do this at once: each returns tables that are long enough
        )
        return cast("tuple[Array, Array]", pair)

    def __call__(self, x: Array, positions: Array, count: int, out: Array | None = None) -> Array:
        """Rotate queries or keys.

        Parameters
        ----------
        x : (..., seq, num_heads, head_dim), head_dim >= rotary_dim
        positions : integers, x.shape[:-2], on the device of x
        count : a number above all positions; on a GPU they are not read on the host
        out : like x; may be x

        Returns
        -------
        Like x.
        """
        x = as_cupy(x)
        cos, sin = self.tables(count, device_of(x, "x"))
        return ops.rope(x, cos, sin, module_of(x).asarray(positions), self.interleaved, out=out)

    def __repr__(self) -> str:
        pairs = ", interleaved" if self.interleaved else ""
        return f"RBERotary({self.rotary_dim} features{pairs})"

"""Bytes of a file in training: estimated from the integers' entropies between steps, exact when a file is written."""

from __future__ import annotations

from collections.abc import Mapping

from ..feedback import stream_bits
from .quantizer import Grid

_SAMPLE = 1 << 20  # integers of a weight that its entropy is estimated on: 5 ms


def stream_bytes(grids: Mapping[str, Grid]) -> float:
    """Bytes of the streams of all grids, as `feedback.stream_bits` estimates them by classes of columns."""
    return sum(
        stream_bits(grid.integers(max(1, grid.size // _SAMPLE))) * grid.size / 8 for grid in grids.values()
    )


class Rate:
    """The size of the file that holds these grids.

    Attributes
    ----------
    integers : how many there are
    fixed : bytes beside the streams, so that the estimate is right for the file that training starts from
    """

    def __init__(self, grids: Mapping[str, Grid], file_bytes: int) -> None:
        self._grids = grids
        self.integers = sum(grid.size for grid in grids.values())
        self.fixed = file_bytes - stream_bytes(grids)

    def file_bytes(self) -> float:
        return self.fixed + stream_bytes(self._grids)

    def bits(self, file_bytes: float) -> float:
        """Bits of an integer, on average, in a file of this size."""
        return 8 * (file_bytes - self.fixed) / self.integers

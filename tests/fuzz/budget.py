"""What one input may cost: a second of processor time, and memory in proportion to its size."""

from __future__ import annotations

import mmap
import resource
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS = 1.0
BYTES = 64 << 20  # and four times the input
_UNIT = 1 if sys.platform == "darwin" else 1024


class Tally:
    """What the inputs of a run cost, in a file that outlives the process: libFuzzer ends it without a word.

    Attributes
    ----------
    inputs : how many were tried
    longest : the most processor time that one took, in seconds
    peak : the largest resident memory of the process, in bytes
    """

    _FIELDS = struct.Struct("<QdQ")

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(self._FIELDS.size))
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), self._FIELDS.size)
        self.inputs, self.longest, self.peak = self._FIELDS.unpack_from(self._map)

    def add(self, seconds: float) -> None:
        """One more input."""
        self.inputs, self.longest, self.peak = self.inputs + 1, max(self.longest, seconds), peak()
        self._FIELDS.pack_into(self._map, 0, self.inputs, self.longest, self.peak)

    def __str__(self) -> str:
        return (
            f"{self.inputs:,} inputs, at most {self.longest:.2f} s of processor time each, "
            f"peak memory {self.peak / 1e6:.0f} MB"
        )


class Overrun(AssertionError):
    """An input cost more than it may."""


class Slow(Overrun):
    """An input took longer than it may."""


def peak() -> int:
    """The largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT


@contextmanager
def allowed(size: int, decoded: int = 0, seconds: float = 0.0) -> Iterator[None]:
    """Raise `Overrun` where the block takes too long, or makes the peak of the process grow by too much.

    size : bytes of the input. decoded : bytes that it may decode to, where it is accepted. seconds : instead of
    `SECONDS`, where an input may ask for work.
    """
    memory, start = peak(), time.process_time()
    yield
    took, grew = time.process_time() - start, peak() - memory
    if took > max(seconds, SECONDS):
        raise Slow(f"{took:.2f} s of processor time for {size} bytes")
    if grew > 4 * size + decoded + BYTES:
        raise Overrun(f"{grew >> 20} MB for {size} bytes")

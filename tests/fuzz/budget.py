"""What one input may cost: a second of processor time, and memory in proportion to its size."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 1.0
BYTES = 64 << 20  # and four times the input
_UNIT = 1 if sys.platform == "darwin" else 1024


class Overrun(AssertionError):
    """An input cost more than it may."""


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
        raise Overrun(f"{took:.2f} s of processor time for {size} bytes")
    if grew > 4 * size + decoded + BYTES:
        raise Overrun(f"{grew >> 20} MB for {size} bytes")

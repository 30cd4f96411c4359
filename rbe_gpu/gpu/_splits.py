"""How tall the tiles of a matmul on tensor cores are, and how many blocks of threads share the sums over k of one.

More blocks than multiprocessors hide each other's barriers and loads; shorter tiles unpack the codes more often; sums
of parts are written, read and added by another launch. The costs below weigh that. They are counted from the machine
code for sm_90 (docs/kernels.md), not measured; the numbers of an H100 stand for all GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

from ._launch import ceil_div

_BLOCKS_WANTED = 512  # of threads, so that every multiprocessor has some

_MULTIPROCESSORS = 132
_CYCLE = 1 / 1.755e9  # seconds
_COLUMNS = 128  # outputs of a tile
#: Cycles of a step of 64 values of k, by the tokens of a tile. With another block on the multiprocessor the larger of
#: issue (257 and 290 instructions of 8 warps on 4 schedulers) and tensor cores at 62% of their rate (398 and 796);
#: alone the tensor cores, then unpacking (182), copies and the wait at a barrier.
_STEP_SHARED = {64: 520, 128: 800}
_STEP_ALONE = {64: 780, 128: 1150}
_BLOCK = 2000  # cycles before the first step and after the last
_LAUNCH = 2.5e-6
_PART = 8 / 4e12  # a float written and read, from the second-level cache
_MIN_STEPS = 4  # that a split is worth
_MAX_SPLITS = 16
#: (tokens of a tile, whether k is split): those for which there are kernels of their own
KINDS = ((128, False), (64, False), (64, True))


@dataclass(frozen=True, slots=True)
class Tiling:
    """Tokens of a tile; steps of k of a split, and splits."""

    height: int
    each: int
    splits: int

    @property
    def kind(self) -> tuple[int, bool]:
        """Its item of `KINDS`."""
        return self.height, self.splits > 1


_preferred: tuple[int, bool] | None = None


def splits_of(pieces: int, blocks: int, wanted: int = _BLOCKS_WANTED) -> tuple[int, int]:
    """Pieces of k a split, and splits: enough for `wanted` blocks of threads where one split has `blocks`."""
    each = ceil_div(pieces, min(pieces, ceil_div(wanted, blocks)))
    return each, ceil_div(pieces, each)


def seconds(tokens: int, rows: int, tiling: Tiling) -> float:
    """Estimated time of a matmul with `rows` outputs, without the input transform."""
    blocks = ceil_div(tokens, tiling.height) * ceil_div(rows, _COLUMNS) * tiling.splits
    pairs, alone = divmod(ceil_div(blocks, _MULTIPROCESSORS), 2)  # of the busiest multiprocessor
    steps = 2 * pairs * _STEP_SHARED[tiling.height] + alone * _STEP_ALONE[tiling.height]
    cycles = steps * tiling.each + (pairs + alone) * _BLOCK
    parts = 0.0 if tiling.splits == 1 else _LAUNCH + _PART * tiling.splits * tokens * rows
    return cycles * _CYCLE + parts


@lru_cache(maxsize=1024)
def _fastest(tokens: int, rows: int, steps: int, kind: tuple[int, bool] | None) -> Tiling:
    candidates = [Tiling(height, steps, 1) for height in (128, 64)]
    for wanted in range(2, min(_MAX_SPLITS, steps // _MIN_STEPS) + 1):
        each = ceil_div(steps, wanted)
        candidates.append(Tiling(64, each, ceil_div(steps, each)))
    preferred = [t for t in candidates if t.kind == kind]
    return min(preferred or candidates, key=lambda t: seconds(tokens, rows, t))


def tiling(tokens: int, rows: int, steps: int) -> Tiling:
    """The fastest for codes times float16 x^, of `steps` steps of k. Only tiles of 64 tokens are split."""
    return _fastest(tokens, rows, steps, _preferred)


@contextmanager
def preferring(kind: tuple[int, bool]) -> Iterator[None]:
    """Within the block `tiling` returns the fastest of one of `KINDS` wherever there is one. Not thread-safe."""
    global _preferred
    before, _preferred = _preferred, kind
    try:
        yield
    finally:
        _preferred = before

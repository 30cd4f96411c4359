"""How many blocks of threads share the sums over k of one tile of results."""

from __future__ import annotations

from ._launch import ceil_div

_BLOCKS_WANTED = 512  # of threads, so that every multiprocessor has some


def splits_of(pieces: int, blocks: int, wanted: int = _BLOCKS_WANTED) -> tuple[int, int]:
    """Pieces of k a split, and splits: enough for `wanted` blocks of threads where one split has `blocks`."""
    each = ceil_div(pieces, min(pieces, ceil_div(wanted, blocks)))
    return each, ceil_div(pieces, each)

"""attention by the warpgroup matmuls of Hopper (`attention_wgmma.cu`): when it runs, and its tiles.

It has not run on a GPU yet, so `attention.cu` runs unless the environment says `RBE_GPU_ATTENTION=wgmma`, or a block
`with preferring("wgmma")` asks for it. It takes half types, head_dim 33 to 128, rows of whole chunks of 16 bytes, a
positive scale, lengths, windows, causal and packed sequences, on GPUs of compute capability 9.0. The rest is left to
`attention.cu`: masks, softcap, other rows, types and GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from . import _execute

VARIABLE = "RBE_GPU_ATTENTION"
#: What can be preferred: mma.sync, which runs everywhere, and wgmma.
KERNELS = ("mma", "wgmma")
CAPABILITY = (9, 0)
_NARROW = 32  # up to this head_dim, half of a tile would be zeros


@dataclass(frozen=True, slots=True)
class Tile:
    """What a block works on: `queries` at once, `keys` at a time, in `shared` bytes, by `threads`."""

    queries: int
    keys: int
    shared: int
    threads: int = 128


def _tile(head_dim: int, queries: int, keys: int) -> Tile:
    return Tile(queries, keys, (queries + 4 * keys) * head_dim * 2 + 1024, 2 * queries)


#: The kernels by the most values of a row that they take.
TILES = {64: _tile(64, 192, 128), 128: _tile(128, 128, 128)}


def from_environment() -> str:
    """The kernel that the environment asks for.

    Raises
    ------
    ValueError
        Its value is none of `KERNELS`.
    """
    value = os.environ.get(VARIABLE) or KERNELS[0]
    if value not in KERNELS:
        raise ValueError(f"{VARIABLE}={value!r} is not known; use one of {', '.join(KERNELS)}")
    return value


_preferred: str | None = None


@contextmanager
def preferring(kernel: str) -> Iterator[None]:
    """Within the block `kernel`, of `KERNELS`, is preferred, whatever the environment says. Not thread-safe."""
    global _preferred
    before, _preferred = _preferred, kernel
    try:
        yield
    finally:
        _preferred = before


def runs(q: Any) -> bool:
    """Whether these kernels take attention of queries `q`, if its rows, scale and options are what they need."""
    return (
        (_preferred or from_environment()) == "wgmma"
        and q.itemsize == 2
        and _NARROW < q.shape[-1] <= max(TILES)
        and _execute.capability(q) == CAPABILITY
    )

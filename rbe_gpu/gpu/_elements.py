"""Launches over elements (gelu, silu, swiglu, dropout): blocks of chunks, and division by a row's chunks."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from ._launch import NO_TYPE, SUFFIX, TYPE, Launch, ceil_div, grid_1d, in_chunks

BLOCK = (256, 1, 1)


def vector(x: Any) -> int:
    """Elements of x in a chunk of 16 bytes."""
    return int(16 // x.itemsize)


def grid(count: int, chunk: int) -> tuple[int, int, int]:
    """A thread for every `chunk` elements."""
    return grid_1d(ceil_div(ceil_div(count, chunk), BLOCK[0]))


@lru_cache(maxsize=1024)
def divider(divisor: int) -> tuple[np.uint64, np.int32]:
    """Factor and shift with n // divisor == (n * factor >> 64) >> shift for 0 <= n < 2^63; (0, 0) for 1.

    With shift = ceil(log2(divisor)) - 1 and factor = ceil(2^(64 + shift) / divisor), which fits 64 bits, the
    product is too large by less than n * divisor <= n * 2^(shift + 1), so the quotient is exact below 2^63.
    Source: Granlund and Montgomery 1994, "Division by invariant integers using multiplication".
    """
    if divisor == 1:
        return np.uint64(0), np.int32(0)
    shift = (divisor - 1).bit_length() - 1
    return np.uint64(((1 << (64 + shift)) + divisor - 1) // divisor), np.int32(shift)


def map_plan(op: str, variant: str, x: Any, bias: Any, out: Any) -> Launch:
    """The launch of an op on every element of `out`, by rows where there is a bias or rows are halves.

    The kernel's arguments: x, bias, its type, out, elements of out, columns of out, and the divider by the chunks
    of a row of out.
    """
    cols = out.shape[1]
    by_rows = bias is not None or x.shape[1] != cols
    chunk = vector(x)
    single = not in_chunks(x, (out,), (bias,)) or (by_rows and cols % chunk != 0)
    if single:
        chunk = 1
    entry = f"{op}_{SUFFIX[x.dtype]}{variant}{'_single' if single else ''}"
    args = (
        x,
        bias,
        NO_TYPE if bias is None else TYPE[bias.dtype],
        out,
        np.int64(out.size),
        np.int64(cols),
        *divider(cols // chunk if by_rows else 1),
    )
    return Launch(op, entry, grid(out.size, chunk), BLOCK, args)

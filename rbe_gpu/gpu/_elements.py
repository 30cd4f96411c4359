"""Launches over elements (gelu, silu, swiglu, rope, dropout): blocks of chunks, and division by a row's chunks."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from ..kernel_struct import Params
from ._launch import SUFFIX, Launch, ceil_div, grid_1d, in_chunks, type_of
from ._params import DIVIDER, ELEMENTWISE

BLOCK = (256, 1, 1)


def vector(x: Any) -> int:
    """Elements of x in a chunk of 16 bytes."""
    return int(16 // x.itemsize)


def grid(count: int, chunk: int) -> tuple[int, int, int]:
    """A thread for every `chunk` elements."""
    return grid_1d(ceil_div(ceil_div(count, chunk), BLOCK[0]))


@lru_cache(maxsize=1024)
def divider(divisor: int) -> Params:
    """Factor and shift with n // divisor == (n * factor >> 64) >> shift for 0 <= n < 2^63; zeros for 1.

    With shift = ceil(log2(divisor)) - 1 and factor = ceil(2^(64 + shift) / divisor), which fits 64 bits, the
    product is too large by less than n * divisor <= n * 2^(shift + 1), so the quotient is exact below 2^63.
    Source: Granlund and Montgomery 1994, "Division by invariant integers using multiplication".
    """
    if divisor == 1:
        return DIVIDER.fill(factor=0, shift=0)
    shift = (divisor - 1).bit_length() - 1
    return DIVIDER.fill(factor=((1 << (64 + shift)) + divisor - 1) // divisor, shift=shift)


def map_elements(op: str, variant: str, x: Any, bias: Any, out: Any) -> tuple[Launch, ...]:
    """The launch of an op on every element of `out`, by rows where there is a bias or rows are halves."""
    cols = out.shape[1]
    by_rows = bias is not None or x.shape[1] != cols
    chunk = vector(x)
    single = not in_chunks(x, (out,), (bias,)) or (by_rows and cols % chunk != 0)
    if single:
        chunk = 1
    entry = f"{op}_{SUFFIX[x.dtype]}{variant}{'_single' if single else ''}"
    params = ELEMENTWISE.fill(
        x=x,
        bias=bias,
        out=out,
        bias_type=type_of(bias),
        count=out.size,
        cols=cols,
        by_cols=divider(cols // chunk if by_rows else 1),
    )
    return (Launch(op, entry, grid(out.size, chunk), BLOCK, params),)

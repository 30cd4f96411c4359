"""How the kernels over rows (softmax and the norms) share the rows out: which entry, which team, which grid."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ._launch import SUFFIX, TYPE, WARP, Launch, ceil_div, grid_1d, in_chunks, type_of
from ._params import NORM

_BLOCK = 128  # threads of a block of teams that are a warp or less
_LONG_BLOCK = 512  # of the kernels that go through a row in steps: up to 128 registers a thread
_NORM_THREADS = 512  # launch bounds of the norms over rows in registers: 64 registers would not do

_TINIEST = np.finfo(np.float32).smallest_subnormal


def float_eps(eps: float) -> np.float32:
    """`eps` as kernels take it: an eps above 0 stays above 0, or a row of zeros would give NaN."""
    return max(np.float32(eps), _TINIEST) if eps else np.float32(0.0)


@dataclass(frozen=True, slots=True)
class Rows:
    """A launch over rows: `entry` ends the kernel's name after the type, e.g. "_16" or "_single_long"."""

    entry: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]


@lru_cache(maxsize=1024)
def share_rows(rows: int, cols: int, itemsize: int, in_chunks: bool, threads: int) -> Rows:
    """Teams of threads for `rows` rows of `cols` columns.

    A thread of `_8`, `_16` and `_32` holds that many columns in registers, in chunks of 16 bytes. One of
    `_single_8` takes them one by one, where the arrays do not allow `in_chunks` or the row size is not a
    multiple of 16 bytes. As long as 32 columns a thread suffice a team is 1 to 32 lanes, several to a block of
    128 threads, since that needs no barrier; above, the team is a block of whole warps, up to `threads` (the
    launch bounds of `_32` and `_single_8`). Longer rows go to `_long`, a block each.
    """
    vector = 16 // itemsize
    sizes: tuple[int, ...]
    if in_chunks and cols % vector == 0:
        prefix, sizes = "", (8, 16, 32)
    else:
        prefix, sizes = "_single", (8,)
    most = sizes[-1]
    if cols > threads * most:
        return Rows(f"{prefix}_long", grid_1d(rows), (_LONG_BLOCK, 1, 1))
    items = next((n for n in sizes if cols <= WARP * n), most)
    team = ceil_div(cols, items)
    if team > WARP:
        return Rows(f"{prefix}_{items}", grid_1d(rows), (ceil_div(team, WARP) * WARP, 1, 1))
    team = 1 << (team - 1).bit_length()
    teams = _BLOCK // team
    return Rows(f"{prefix}_{items}", grid_1d(ceil_div(rows, teams)), (team, teams, 1))


def norm_launches(
    op: str, x: Any, weight: Any, bias: Any, eps: float, residual: Any, out: Any, residual_out: Any
) -> tuple[Launch, ...]:
    """The launch of "layer_norm" or "rms_norm" (whose bias is None), from shapes, dtypes and addresses."""
    rows, cols = x.shape
    chunks = in_chunks(x, (residual, out, residual_out), (weight, bias))
    share = share_rows(rows, cols, x.itemsize, chunks, _NORM_THREADS)
    params = NORM.fill(
        x=x,
        residual=residual,
        out=out,
        residual_out=residual_out,
        weight=weight,
        bias=bias,
        weight_type=TYPE[weight.dtype],
        bias_type=type_of(bias),
        rows=rows,
        cols=cols,
        eps=float_eps(eps),
    )
    return (Launch(op, f"{op}_{SUFFIX[x.dtype]}{share.entry}", share.grid, share.block, params),)

"""rope: y[a] = x[a] c[j] - x[b] s[j], y[b] = x[b] c[j] + x[a] s[j], c = cos[p], s = sin[p], for pair j of a head."""

from __future__ import annotations

from typing import Any

from ..kernel_struct import address
from ._elements import BLOCK, divider, grid, vector
from ._execute import run
from ._launch import SUFFIX, Launch, aligned
from ._params import ROPE


def launches(x: Any, cos: Any, sin: Any, positions: Any, interleaved: bool, out: Any) -> tuple[Launch, ...]:
    """The launch of `rope`, from shapes, dtypes and addresses."""
    batch, seq, heads, head_dim = x.shape
    max_positions, half = cos.shape
    rest = 0 if address(x) == address(out) else head_dim - 2 * half  # what is copied
    chunk = vector(x)
    pairs = chunk // 2 if interleaved else chunk
    single = half % pairs != 0 or head_dim % chunk != 0 or not aligned(x, cos, sin, out)
    if single:
        chunk = pairs = 1
    units = half // pairs + rest // chunk
    count = batch * seq * heads * units
    params = ROPE.fill(
        x=x,
        cos=cos,
        sin=sin,
        positions=positions,
        wide=positions is not None and positions.itemsize == 8,
        out=out,
        count=count,
        units=units,
        by_units=divider(units),
        by_heads=divider(heads),
        seq=seq,
        by_seq=divider(seq),
        head_dim=head_dim,
        half=half,
        max_positions=max_positions,
    )
    form = f"{'_interleaved' if interleaved else ''}{'_single' if single else ''}"
    return (Launch("rope", f"rope_{SUFFIX[x.dtype]}{form}", grid(count, 1), BLOCK, params),)


def rope(x: Any, cos: Any, sin: Any, positions: Any, interleaved: bool, out: Any) -> None:
    """Write x, rotated by its positions, to `out`.

    Parameters
    ----------
    x, out : (batch, seq, num_heads, head_dim) float32/float16/bfloat16, one dtype, C-contiguous; `out` may be `x`
    cos, sin : (max_positions, rotary_dim / 2) float32, C-contiguous, at least one row
    positions : (batch * seq,) int32/int64, clamped to 0 .. max_positions - 1; None: 0 .. seq - 1 in every sequence
    interleaved : pairs (2j, 2j + 1) instead of (j, j + rotary_dim / 2)
    """
    run(*launches(x, cos, sin, positions, interleaved, out))

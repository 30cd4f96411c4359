"""rope: y[a] = x[a] c[j] - x[b] s[j], y[b] = x[b] c[j] + x[a] s[j], c = cos[p], s = sin[p], (a, b) pair j of a head.

Pairs are (j, j + half) or, interleaved, (2j, 2j + 1), for j < half, the columns of cos. Both forms round alike: a
fused multiply-add of a product. 16 columns of cos and sin stay in registers for all heads of a token.
Source: Su et al. 2021, "RoFormer: enhanced transformer with rotary position embedding".
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._jit import cpu_inline
from ._parts import in_parts
from ._pool import num_threads
from .simd import (
    bits,
    vfma,
    vload,
    vload_n,
    vmul,
    vnegate_even,
    vsplat,
    vstore,
    vstore_n,
    vswap,
    vtwice_high,
    vtwice_low,
)

_PARALLEL_FROM = 65536  # elements: 17 us with one thread, as long as `add` takes where a second begins to pay
_IN_ORDER = np.empty(0, np.int64)
_MINUS_ONE = np.float32(-1.0)


@cpu_inline
def _row(positions, token, seq, half):
    """Where the token's row of cos and sin begins."""
    return (positions[token] if positions.size else token % seq) * half


@cpu_inline
def _copy(x, out, token, rotary_dim):
    """Features from rotary_dim on of a token, bit by bit."""
    _, seq, heads, head_dim = x.shape
    b, t = token // seq, token % seq
    for head in range(heads):
        for i in range(rotary_dim, head_dim):
            out[b, t, head, i] = x[b, t, head, i]


@cpu_inline
def rotate_halves(x, first, heads, head_dim, cos, sin, row, half, out):
    """The heads of a token, which begin at `first`, by pairs (j, j + half); cos and sin from `row` on."""
    whole = half - half % 16
    left = half - whole
    for j in range(0, whole, 16):
        c, s = vload(cos, row + j), vload(sin, row + j)
        minus_s = vmul(s, vsplat(_MINUS_ONE))
        for head in range(heads):
            at = first + head * head_dim + j
            a, b = vload(x, at), vload(x, at + half)
            vstore(out, at, vfma(a, c, vmul(b, minus_s)))
            vstore(out, at + half, vfma(b, c, vmul(a, s)))
    if left:
        c, s = vload_n(cos, row + whole, left), vload_n(sin, row + whole, left)
        minus_s = vmul(s, vsplat(_MINUS_ONE))
        for head in range(heads):
            at = first + head * head_dim + whole
            a, b = vload_n(x, at, left), vload_n(x, at + half, left)
            vstore_n(out, at, vfma(a, c, vmul(b, minus_s)), left)
            vstore_n(out, at + half, vfma(b, c, vmul(a, s)), left)


def _halves(x, cos, sin, positions, copies, out, start, stop):
    """Tokens start..stop, pairs (j, j + half)."""
    _, seq, heads, head_dim = x.shape
    half = cos.shape[1]
    for token in range(start, stop):
        first = token * heads * head_dim
        rotate_halves(x, first, heads, head_dim, cos, sin, _row(positions, token, seq, half), half, out)
        if copies:
            _copy(x, out, token, 2 * half)


def _pairs(x, cos, sin, positions, copies, out, start, stop):
    """Tokens start..stop, pairs (2j, 2j + 1): 16 of them are two vectors of x."""
    _, seq, heads, head_dim = x.shape
    half = cos.shape[1]
    whole = half - half % 16
    for token in range(start, stop):
        row = _row(positions, token, seq, half)
        first = token * heads * head_dim
        for j in range(0, whole, 16):
            c, s = vload(cos, row + j), vload(sin, row + j)
            c0, c1 = vtwice_low(c), vtwice_high(c)
            s0, s1 = vnegate_even(vtwice_low(s)), vnegate_even(vtwice_high(s))
            for head in range(heads):
                at = first + head * head_dim + 2 * j
                v0, v1 = vload(x, at), vload(x, at + 16)
                vstore(out, at, vfma(v0, c0, vmul(vswap(v0), s0)))
                vstore(out, at + 16, vfma(v1, c1, vmul(vswap(v1), s1)))
        for j in range(whole, half, 8):
            left = min(8, half - j)
            c, s = vtwice_low(vload_n(cos, row + j, left)), vtwice_low(vload_n(sin, row + j, left))
            s = vnegate_even(s)
            for head in range(heads):
                at = first + head * head_dim + 2 * j
                v = vload_n(x, at, 2 * left)
                vstore_n(out, at, vfma(v, c, vmul(vswap(v), s)), 2 * left)
        if copies:
            _copy(x, out, token, 2 * half)


_rotate_halves, _rotate_pairs = in_parts(_halves), in_parts(_pairs)


def rope(
    x: NDArray[Any],
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    positions: NDArray[Any] | None,
    interleaved: bool,
    out: NDArray[Any],
) -> None:
    """Write x, rotated by its positions, to `out`.

    Parameters
    ----------
    x, out : (batch, seq, num_heads, head_dim) float32/float16/bfloat16, one dtype, C-contiguous; `out` may be `x`
    cos, sin : (max_positions, rotary_dim / 2), C-contiguous
    positions : (batch * seq,) int32/int64 of 0 .. max_positions - 1; None: 0 .. seq - 1 in every sequence
    interleaved : pairs (2j, 2j + 1) instead of (j, j + rotary_dim / 2)
    """
    tokens = x.shape[0] * x.shape[1]
    positions = _IN_ORDER if positions is None else positions.astype(np.int64, copy=False)
    copies = x.shape[3] > 2 * cos.shape[1] and out is not x
    parts = min(num_threads(), tokens) if x.size >= _PARALLEL_FROM else 1
    (_rotate_pairs if interleaved else _rotate_halves)(
        tokens, parts, bits(x), cos, sin, positions, copies, bits(out)
    )

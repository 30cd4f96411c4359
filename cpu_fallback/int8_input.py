"""z[k, t] = round(127 x^[t, k] s[k] / a[t]), a[t] = max_k |x^[t, k] s[k]|: activations as int8, a scale a token.

    x^ : x (tokens, in_features), any storage type, through the weight's input transform
    s : the column scales of a grid, or 1
    z : (tiles, depth / 4, width, 4) int8; a token's scale is a / 127

Products with int8 activations are integers times that scale. Column scales grow where activations are small, so that
they even out the range of a token (what SmoothQuant, Xiao et al. 2022, does by a change of the weights). A token with
a value that is not finite has scale NaN.
"""

from __future__ import annotations

import numpy as np

from . import params
from ._jit import cpu_inline
from ._parts import SHARE, count_up, next_unit, part_kernel
from .arrays import F32, bytes_at, floats_at, halves_at, ints_at, load_any, longs_at
from .fast_transform import apply_transform
from .int8_simd import RUN, int8_block, store_rounded
from .simd import vdiv, vfma, vload, vmax, vmaxval, vmul, vsplat, vstore, vsub, vsum, vtranspose

LEVELS = np.float32(127)
#: Tokens of a smaller absmax are scaled as if they had this one: 127 / absmax stays finite.
SMALLEST = np.float32(1e-30)
_ZERO, _NAN = np.float32(0), np.float32(np.nan)
TOKENS = 16  # of a unit of work
DONE, _COUNTERS = 0, SHARE  # elements of `state`


@cpu_inline
def quantize_row(x, kind, at, count, column_scale, columns, line, line_at, out, out_at):
    """A token's activations to int8 at bytes out_at on; returns its scale.

    x : address; `count` values of a kind, from element `at` on
    column_scale : address of float16, 0 for none
    columns : a multiple of 16; those behind `count` become 0
    line : float32, from line_at on room for the columns
    """
    zero = vsplat(_ZERO)
    top, finite = zero, zero
    for k in range(0, columns, 16):
        values = load_any(x, kind, at + k, count - k)
        if column_scale != 0:
            values = vmul(values, vload(halves_at(column_scale), k))
        vstore(line, line_at + k, values)
        top = vmax(vmax(values, vsub(zero, values)), top)
        finite = vfma(values, zero, finite)
    absmax = max(vmaxval(top), SMALLEST)
    usable = vsum(finite) == _ZERO  # 0 * x is NaN where x is not finite
    # of vectors, which fast-math leaves alone: a division by 127 must not become a multiplication
    levels, largest = vsplat(LEVELS), vsplat(absmax)
    factor = vdiv(levels, largest)
    for k in range(0, columns, 16):
        store_rounded(vmul(vload(line, line_at + k), factor) if usable else zero, out, out_at + k)
    return vmaxval(vdiv(largest, levels)) if usable else _NAN


@cpu_inline
def _transform_rows(p, first, count, rows, rows_at, scratch, at):
    """`count` tokens from `first` on through the input transform: rows (16, columns) float32, from rows_at on.

    scratch : from `at` on room for two blocks of 16 tokens
    """
    block, columns, in_features = p.block, p.columns, p.in_features
    for column in range(0, columns, block):
        for k in range(0, block, 16):
            for i in range(TOKENS):
                left = in_features - column - k if i < count else 0
                line = load_any(p.input.x, p.input.kind, (first + i) * in_features + column + k, left)
                vstore(rows, rows_at + i * columns + column + k, line)
            vtranspose(rows, rows_at + column + k, columns, scratch, at + k * TOKENS, TOKENS)
        apply_transform(p.transform, scratch, at, TOKENS, scratch, at + block * TOKENS, TOKENS, 1)
        for k in range(0, block, 16):
            vtranspose(scratch, at + (block + k) * TOKENS, TOKENS, rows, rows_at + column + k, columns)


@cpu_inline
def _quantize_tokens(p, unit, part):
    """Sixteen tokens, or what there is of them."""
    width, depth, columns, in_features = p.width, p.depth, p.columns, p.in_features
    first = unit * TOKENS
    tile, token = first // width, first % width
    count = min(TOKENS, p.tokens - first)
    own = p.scratch + part * p.scratch_stride
    lines, scales = bytes_at(own), floats_at(p.scale)
    line = floats_at(own + TOKENS * depth)
    rows_at = own + TOKENS * depth + 4 * columns
    if p.transform != 0:
        rows = floats_at(rows_at)
        _transform_rows(p, first, count, rows, 0, rows, TOKENS * columns)
    for i in range(TOKENS):
        x, kind, at, values = p.input.x, p.input.kind, (first + i) * in_features, in_features
        if p.transform != 0:
            x, kind, at, values = rows_at, np.int64(F32), i * columns, columns
        if i >= count:
            values = np.int64(0)
        scale = quantize_row(x, kind, at, values, p.column_scale, columns, line, 0, lines, i * depth)
        scales[tile * width + token + i] = scale
    out = p.out + tile * depth * width
    for k in range(0, depth // 4, 16):  # words of four columns, as floats
        vtranspose(floats_at(own), k, depth // 4, floats_at(out), k * width + token, width)
    _sum_groups(p, tile, token, out)


@cpu_inline
def _sum_groups(p, tile, token, out):
    """sums[tile, g, token + t] = sum of the activations of group g of columns: a product with ones."""
    width, zero = p.width, vsplat(_ZERO)
    for g in range(p.groups):
        column = g * p.group
        runs = (min(p.group, p.columns - column)) // RUN
        at = (tile * p.groups + g) * width + token
        vstore(floats_at(p.sums), at, zero)
        int8_block(
            1, 1, 5, runs, bytes_at(p.ones), 0, 0, bytes_at(out), column * width + 4 * token, 4 * width,
            ints_at(p.sums), at, 0, ints_at(p.ones), ints_at(p.ones + p.columns), 0,
        )  # fmt: skip


def _input_part(part, p, like):
    """Units of 16 tokens, as long as there are some."""
    state, counters = longs_at(p.state), longs_at(p.state + 8 * _COUNTERS)
    unit = next_unit(counters, p.units, part, p.parts)
    while unit < p.units:
        _quantize_tokens(p, unit, part)
        count_up(state, DONE)
        unit = next_unit(counters, p.units, part, p.parts)


INT8_INPUT = part_kernel(_input_part, params.INT8_INPUT.dtype)

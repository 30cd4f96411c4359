"""y = C x^ in registers: what a product with a weight, compressed or dense, is made of.

Activations lie feature by feature in tiles of up to 64 tokens: x^[tile, feature, token]. Sixteen tokens are a
vector, a tile is one to four of them, and a stored coefficient is one broadcast and one fused multiply-add
per vector; nothing is unpacked for positions that are not stored, and no dense weight exists.

Transforms work on the same layout, a block of features at a time (`fast_transform`).
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from ._jit import cpu_inline
from ._parts import SHARE, count_up, next_unit, part_kernel
from .fast_transform import apply_transform
from .simd import (
    element,
    vadd,
    vblock,
    verf,
    vfma,
    vload,
    vload_n,
    vmul,
    vselect_less,
    vsigmoid,
    vsplat,
    vstore,
    vstore_n,
    vsum,
    vtanh,
    vtranspose,
    wide_registers,
)
from .unpack import vbroadcast

TILE = 64  # tokens of a tile
_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)
_SQRT_HALF = np.float32(0.7071067811865476)
_SQRT_2_PI, _CUBIC = np.float32(0.7978845608028654), np.float32(0.044715)
_LOWEST = np.float32(-3.4028235e38)
#: What codes and transforms may multiply activations by before scales: twelve bits, blocks of 128, long sums.
HEADROOM = np.float32(2.0**40)
NONE, RELU, GELU, GELU_TANH, SILU = range(5)


# --- arrays by address ----------------------------------------------------------------------------------


def _array_at(name: str, dtype: types.Type) -> object:
    """Intrinsic (address) -> one-dimensional array of `dtype` there, of no known end.

    The arrays of a weight come from memory maps or not, are read-only or not, have one axis or two: to a
    kernel they are the same, and it is compiled once.
    """

    def at(typingctx, address):  # type: ignore[no-untyped-def]
        array = types.Array(dtype, 1, "C")

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            made = context.make_array(array)(context, builder)
            data = builder.inttoptr(args[0], made.data.type)
            size = ir.Constant(ir.IntType(64), dtype.bitwidth // 8)
            count = ir.Constant(ir.IntType(64), 1 << 40)
            populate_array(made, data=data, shape=[count], strides=[size], itemsize=size, meminfo=None)
            return made._getvalue()

        return array(types.int64), codegen

    at.__name__ = at.__qualname__ = name
    return intrinsic(at)


bytes_at = _array_at("bytes_at", types.uint8)
halves_at = _array_at("halves_at", types.uint16)
bfloats_at = _array_at("bfloats_at", types.int16)
floats_at = _array_at("floats_at", types.float32)
longs_at = _array_at("longs_at", types.int64)
words_at = _array_at("words_at", types.uint32)
ints_at = _array_at("ints_at", types.int32)

#: How a stored value is encoded: floats of three types, b-bit codes with scales, integers on a grid.
F32, F16, BF16, INT, GRID = range(5)


@cpu_inline
def load_any(address, kind, at, count):
    """Up to 16 stored floats from place `at` on, widened; zeros behind `count`, and for a count below 1."""
    if count >= 16:
        if kind == F32:
            return vload(floats_at(address), at)
        if kind == F16:
            return vload(halves_at(address), at)
        return vload(bfloats_at(address), at)
    if count < 1:
        return vsplat(_ZERO)
    if kind == F32:
        return vload_n(floats_at(address), at, count)
    if kind == F16:
        return vload_n(halves_at(address), at, count)
    return vload_n(bfloats_at(address), at, count)


@cpu_inline
def store_any(address, kind, at, vector, count):
    """The first `count` of 16 values to place `at`, rounded to the stored type."""
    if kind == F32:
        if count >= 16:
            vstore(floats_at(address), at, vector)
        else:
            vstore_n(floats_at(address), at, vector, count)
    elif kind == F16:
        vstore_n(halves_at(address), at, vector, min(count, 16))
    else:
        vstore_n(bfloats_at(address), at, vector, min(count, 16))


# --- rows of positions and values -----------------------------------------------------------------------


@cpu_inline
def _row_4(start, stop, offset, step, value, x, x_at, fresh, c, at):
    if fresh:
        zero = vsplat(_ZERO)
        c0, c1, c2, c3 = zero, zero, zero, zero
    else:
        c0, c1, c2, c3 = vload(c, at), vload(c, at + 16), vload(c, at + 32), vload(c, at + 48)
    for e in range(start, stop):
        o = x_at + np.int64(element(offset, e)) * step
        s = vbroadcast(value, e)
        c0, c1 = vfma(s, vload(x, o), c0), vfma(s, vload(x, o + 16), c1)
        c2, c3 = vfma(s, vload(x, o + 32), c2), vfma(s, vload(x, o + 48), c3)
    vstore(c, at, c0)
    vstore(c, at + 16, c1)
    vstore(c, at + 32, c2)
    vstore(c, at + 48, c3)


@cpu_inline
def _row_2(start, stop, offset, step, value, x, x_at, fresh, c, at):
    """Two entries at a time: four independent sums hide the latency of an addition."""
    zero = vsplat(_ZERO)
    c0, c1, d0, d1 = zero, zero, zero, zero
    if not fresh:
        c0, c1 = vload(c, at), vload(c, at + 16)
    pairs = start + (stop - start) // 2 * 2
    for e in range(start, pairs, 2):
        o = x_at + np.int64(element(offset, e)) * step
        s = vbroadcast(value, e)
        c0, c1 = vfma(s, vload(x, o), c0), vfma(s, vload(x, o + 16), c1)
        o = x_at + np.int64(element(offset, e + 1)) * step
        s = vbroadcast(value, e + 1)
        d0, d1 = vfma(s, vload(x, o), d0), vfma(s, vload(x, o + 16), d1)
    if pairs < stop:
        o = x_at + np.int64(element(offset, pairs)) * step
        s = vbroadcast(value, pairs)
        c0, c1 = vfma(s, vload(x, o), c0), vfma(s, vload(x, o + 16), c1)
    vstore(c, at, vadd(c0, d0))
    vstore(c, at + 16, vadd(c1, d1))


@cpu_inline
def _row_1(start, stop, offset, step, value, x, x_at, fresh, c, at):
    """Four entries at a time."""
    zero = vsplat(_ZERO)
    c0, c1, c2, c3 = zero, zero, zero, zero
    if not fresh:
        c0 = vload(c, at)
    fours = start + (stop - start) // 4 * 4
    for e in range(start, fours, 4):
        o0 = x_at + np.int64(element(offset, e)) * step
        o1 = x_at + np.int64(element(offset, e + 1)) * step
        o2 = x_at + np.int64(element(offset, e + 2)) * step
        o3 = x_at + np.int64(element(offset, e + 3)) * step
        c0 = vfma(vbroadcast(value, e), vload(x, o0), c0)
        c1 = vfma(vbroadcast(value, e + 1), vload(x, o1), c1)
        c2 = vfma(vbroadcast(value, e + 2), vload(x, o2), c2)
        c3 = vfma(vbroadcast(value, e + 3), vload(x, o3), c3)
    for e in range(fours, stop):
        o = x_at + np.int64(element(offset, e)) * step
        c0 = vfma(vbroadcast(value, e), vload(x, o), c0)
    vstore(c, at, vadd(vadd(c0, c1), vadd(c2, c3)))


@cpu_inline
def sparse_rows(rows, start, first, step_start, offset, step, value, x, x_at, vectors, fresh, c, at, width):
    """c[r] (+)= sum_e value[e] x[offset[e]], e from start[first + r * step_start] to the next start, r <
    rows.

    c and x hold rows of `width` tokens, of which 16 * `vectors` are computed; `offset` counts in units of
    `step` floats from x_at. `fresh` overwrites c, otherwise it is added to.
    """
    for r in range(rows):
        a = start[first + r * step_start]
        b = start[first + r * step_start + 1]
        if b > a or fresh:
            if vectors == 4:
                _row_4(a, b, offset, step, value, x, x_at, fresh, c, at + r * width)
            else:
                if vectors >= 2:
                    _row_2(a, b, offset, step, value, x, x_at, fresh, c, at + r * width)
                if vectors != 2:
                    skip = vectors // 2 * 32
                    _row_1(a, b, offset, step, value, x, x_at + skip, fresh, c, at + r * width + skip)


@cpu_inline
def dense_rows(rows, depth, a, a_at, a_row, x, x_at, vectors, fresh, c, at, width):
    """c[r] (+)= sum_k a[r, k] x[k], r < rows: the product of `a` (rows, depth) and a tile, 16 sums in
    registers."""
    fours = rows // 4 * 4
    accumulate = not fresh
    for r in range(0, fours, 4):
        a_r, c_r = a_at + r * a_row, at + r * width
        if wide_registers():
            if vectors == 4:
                vblock(4, 4, accumulate, depth, a, a_r, a_row, 1, x, x_at, width, c, c_r, width)
            else:
                if vectors >= 2:
                    vblock(4, 2, accumulate, depth, a, a_r, a_row, 1, x, x_at, width, c, c_r, width)
                if vectors != 2:
                    skip = vectors // 2 * 32
                    vblock(
                        4, 1, accumulate, depth, a, a_r, a_row, 1, x, x_at + skip, width, c, c_r + skip, width
                    )
        else:
            for v in range(vectors):
                vblock(
                    4, 1, accumulate, depth, a, a_r, a_row, 1, x, x_at + 16 * v, width, c, c_r + 16 * v, width
                )
    for r in range(fours, rows):
        for v in range(vectors):
            vblock(
                1, 1, accumulate, depth, a, a_at + r * a_row, a_row, 1, x, x_at + 16 * v, width,
                c, at + r * width + 16 * v, width,
            )  # fmt: skip


# --- activations in -------------------------------------------------------------------------------------


@cpu_inline
def _turn_in(x, kind, first, tokens, cols, in_features, column, vectors, c, at, width, corner, corner_at):
    """c[k, t] = x[first + t, column + k] for a block of `cols` columns; zero beyond the tokens and features.

    x : address of rows of `in_features` values
    """
    for v in range(vectors):
        for k in range(0, cols, 16):
            token, feature = first + 16 * v, column + k
            if kind == F32 and 16 * v + 16 <= tokens and feature + 16 <= in_features:
                place = token * in_features + feature
                vtranspose(floats_at(x), place, in_features, c, at + k * width + 16 * v, width)
            else:
                for i in range(16):
                    count = min(16, in_features - feature) if 16 * v + i < tokens else 0
                    line = load_any(x, kind, (token + i) * in_features + feature, count)
                    vstore(corner, corner_at + 16 * i, line)
                vtranspose(corner, corner_at, 16, c, at + k * width + 16 * v, width)


@cpu_inline
def _finite(c, at, rows, vectors, width):
    """Whether every value of a block is finite, and stays so times HEADROOM: then times 0 is 0, and NaN otherwise."""
    zero, room = vsplat(_ZERO), vsplat(HEADROOM)
    a, b = zero, zero
    for v in range(vectors):
        place = at + 16 * v
        for r in range(0, rows, 2):  # a block has an even number of rows
            a = vfma(vmul(vload(c, place + r * width), room), zero, a)
            b = vfma(vmul(vload(c, place + (r + 1) * width), room), zero, b)
    return vsum(vadd(a, b)) == _ZERO


#: Places of the table that `TRANSFORM_IN` gets.
(
    IN_BLOCK, IN_FEATURES, IN_DEPTH, IN_WIDTH, IN_TRANSFORM, IN_F_START, IN_F_OFFSET, IN_F_VALUE, IN_SCRATCH,
    IN_ROOM, IN_OUT, IN_X, IN_KIND, IN_TOKENS, IN_COLUMNS, IN_UNITS, IN_PARTS, IN_STATE, IN_PLACES,
) = range(19)  # fmt: skip
#: Places of the array at IN_STATE, zeros before a run: units done, whether a value is not finite, counters of parts.
DONE, WRONG, _COUNTERS = 0, 1, SHARE


@cpu_inline
def _block_in(table, tile, j, own):
    """One block of one tile; whether its values are finite."""
    n, in_features, x, kind = table[IN_TOKENS], table[IN_COLUMNS], table[IN_X], table[IN_KIND]
    block, features, width, depth = table[IN_BLOCK], table[IN_FEATURES], table[IN_WIDTH], table[IN_DEPTH]
    transform = table[IN_TRANSFORM]
    blocks = (in_features + block - 1) // block
    tokens = min(width, n - tile * width)
    vectors = (tokens + 15) // 16
    flat, buffer = floats_at(table[IN_OUT]), floats_at(table[IN_SCRATCH])
    own *= table[IN_ROOM]
    corner = own + block * width
    target = (tile * depth + j * block) * width
    if transform == 0 and features == 0:
        _turn_in(
            x,
            kind,
            tile * width,
            tokens,
            block,
            in_features,
            j * block,
            vectors,
            flat,
            target,
            width,
            buffer,
            corner,
        )
        return _finite(flat, target, block, vectors, width)
    _turn_in(
        x,
        kind,
        tile * width,
        tokens,
        block,
        in_features,
        j * block,
        vectors,
        buffer,
        own,
        width,
        buffer,
        corner,
    )
    if features > 0:
        place = (tile * depth + blocks * block + j * features) * width
        sparse_rows(
            features, longs_at(table[IN_F_START]), 0, 1, ints_at(table[IN_F_OFFSET]), width,
            floats_at(table[IN_F_VALUE]),
            buffer, own, vectors, True, flat, place, width,
        )  # fmt: skip
    if transform != 0:
        apply_transform(transform, buffer, own, width, flat, target, width, vectors)
    else:
        for k in range(block):
            for v in range(vectors):
                vstore(flat, target + k * width + 16 * v, vload(buffer, own + k * width + 16 * v))
    return _finite(buffer, own, block, vectors, width)


def _transform_in_part(part, table, like):
    """out[tile, k, t]: S^T x of every block of columns, then the basis features of every block.

    x : (n, in_features), any storage type
    out : (tiles, depth, width) float32, depth = columns padded to blocks + blocks * features
    """
    t = numba.carray(table, IN_PLACES)
    blocks = (t[IN_COLUMNS] + t[IN_BLOCK] - 1) // t[IN_BLOCK]
    state, counters = longs_at(t[IN_STATE]), longs_at(t[IN_STATE] + 8 * _COUNTERS)
    unit = next_unit(counters, t[IN_UNITS], part, t[IN_PARTS])
    while unit < t[IN_UNITS]:
        if not _block_in(t, unit // blocks, unit % blocks, part):
            state[WRONG] = 1
        count_up(state, DONE)
        unit = next_unit(counters, t[IN_UNITS], part, t[IN_PARTS])


#: The part of a thread in the input transform, called by that in the product.
TRANSFORM_IN = part_kernel(_transform_in_part)


# --- results out ----------------------------------------------------------------------------------------


@cpu_inline
def _positive_part(t, factor):
    """t * factor, and 0 at -inf, the limit of gelu and silu there."""
    return vselect_less(t, vsplat(_LOWEST), vsplat(_ZERO), vmul(t, factor))


@cpu_inline
def activate(t, activation):
    if activation == RELU:
        zero = vsplat(_ZERO)
        return vselect_less(t, zero, zero, t)
    if activation == GELU:
        return _positive_part(t, vmul(vsplat(_HALF), vadd(vsplat(_ONE), verf(vmul(t, vsplat(_SQRT_HALF))))))
    if activation == GELU_TANH:
        inner = vmul(vmul(vsplat(_SQRT_2_PI), t), vfma(vmul(vsplat(_CUBIC), t), t, vsplat(_ONE)))
        return _positive_part(t, vmul(vsplat(_HALF), vadd(vsplat(_ONE), vtanh(inner))))
    if activation == SILU:
        return _positive_part(t, vsigmoid(t))
    return t


@cpu_inline
def turn_out(
    c, at, rows, row, tokens, token, vectors, width, bias, activation, residual, residual_kind, out,
    out_kind, out_features,
    corner, corner_at,
):  # fmt: skip
    """out[token + t, row + r] = activation(c[r, t] + bias[row + r]) + residual, r < rows, t < tokens.

    c : rows of `width` tokens, overwritten
    bias, residual, out : addresses, 0 for a bias or residual that is not there; bias is float32
    """
    if bias != 0 or activation != NONE:
        for r in range(rows):
            b = vsplat(_ZERO)
            if bias != 0:
                b = vbroadcast(floats_at(bias), row + r)
            for v in range(vectors):
                place = at + r * width + 16 * v
                vstore(c, place, activate(vadd(vload(c, place), b), activation))
    for r in range(0, rows, 16):
        wide = rows - r
        for v in range(vectors):
            count = min(16, tokens - 16 * v)
            place = (token + 16 * v) * out_features + row + r
            if out_kind == F32 and wide >= 16 and count == 16 and residual == 0:
                vtranspose(c, at + r * width + 16 * v, width, floats_at(out), place, out_features)
            else:
                vtranspose(c, at + r * width + 16 * v, width, corner, corner_at, 16)
                for t in range(count):
                    line = vload(corner, corner_at + 16 * t)
                    if residual != 0:
                        line = vadd(line, load_any(residual, residual_kind, place + t * out_features, wide))
                    store_any(out, out_kind, place + t * out_features, line, wide)


@cpu_inline
def finish(
    c, at, rows, row, block, features, psi_start, psi_offset, psi_value, transform, tokens, token, vectors,
    width,
    bias, activation, residual, residual_kind, out, out_kind, out_features, corner, corner_at,
):  # fmt: skip
    """From coefficients to results: every block of a unit through its transform, then `turn_out`.

    c : at `at` the unit's rows of coefficients, then `features` basis sums for each of its blocks
    corner : at `corner_at` room for 256 floats, and for a block where there is a transform
    """
    padded = (rows + block - 1) // block * block
    for b in range(padded // block):
        y, place = c, at + b * block * width
        if transform != 0:
            y, place = corner, corner_at + 256
            apply_transform(transform, c, at + b * block * width, width, y, place, width, vectors)
        if features > 0:
            sums = at + (padded + b * features) * width
            sparse_rows(
                block, psi_start, 0, 1, psi_offset, width, psi_value, c, sums, vectors, False, y, place, width
            )
        turn_out(
            y, place, min(block, rows - b * block), row + b * block, tokens, token, vectors, width, bias, activation,
            residual, residual_kind, out, out_kind, out_features, corner, corner_at,
        )  # fmt: skip

"""Int8 dot products with 4-bit codes, for processors that add four products of bytes at once (AVX-512 VNNI).

Sixteen floats are 64 bytes, and so are 128 codes of 4 bits: what makes a matmul of one token slow is to convert codes
to floats. Here the activations become integers instead, once for all rows of the weight:

    x = s q,   s = absmax of 64 columns / LARGEST,   q = 65536 d0 + 256 d1 + d2,   d in -128 ... 127

where s is some 2^-23 of the largest value: q is as exact as a float32 of that size. Then

    sum_c (u_c - 7.5) x_c = s (65536 sum u d0 + 256 sum u d1 + sum u d2 - 7.5 sum q)

has two instructions for 128 products, and no rounding before the last sum. The largest sum that a lane can have is
8 * 15 * LARGEST < 2^30.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ._jit import cpu_inline
from ._numba_internals import cgutils
from .isa import isa_of
from .simd import LANES, vec16, vfma, vload, vmax, vmaxval, vmul, vsplat, vsub, vsum

#: Columns of a register of codes.
COLUMNS_OF_CODES = 128
#: Bytes of `COLUMNS_OF_CODES` activations: three digits for each, and the initial sums of the lanes.
DIGIT_BYTES = 3 * COLUMNS_OF_CODES + 64
LARGEST = 127 * 65536
#: Groups of a smaller absmax have a scale that is subnormal times the least scale of codes, 2^-24.
SMALLEST = 1e-23
_I8, _I32, _FLOAT = ir.IntType(8), ir.IntType(32), ir.FloatType()
_WORDS, _FLOATS = ir.VectorType(_I32, LANES), ir.VectorType(_FLOAT, LANES)


def _words(value: int) -> ir.Constant:
    return ir.Constant(_WORDS, [value] * LANES)


def _has_int8_dot(context: Any) -> bool:
    return isa_of(context).has("avx512f", "avx512vnni")


@intrinsic
def has_int8_dot(typingctx):  # type: ignore[no-untyped-def]
    """has_int8_dot() -> bool, known when the kernel is compiled: whether the processor has the instructions."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return ir.Constant(ir.IntType(1), _has_int8_dot(context))

    return types.boolean(), codegen


def _bytes_at(
    context: Any, builder: ir.IRBuilder, array: types.Type, value: ir.Value, at: ir.Value
) -> ir.Value:
    return builder.gep(context.make_array(array)(context, builder, value).data, [at])


def _load(builder: ir.IRBuilder, pointer: ir.Value, offset: int) -> ir.Value:
    source = builder.gep(pointer, [ir.Constant(ir.IntType(64), offset)])
    return builder.load(builder.bitcast(source, _WORDS.as_pointer()), align=1)


def _sum(builder: ir.IRBuilder, low: ir.Value, high: ir.Value, digits: ir.Value, start: ir.Value) -> ir.Value:
    """start + sum u q in every lane of 32 bits: four codes of `low` and of `high`, bytes, times their activations."""
    # a declaration that newer versions of LLVM, whose arguments are bytes, know and convert
    add_products = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_WORDS, [_WORDS] * 3), "llvm.x86.avx512.vpdpbusd.512"
    )
    total = start
    for digit, shift in ((0, 16), (1, 8), (2, 0)):
        part = _words(0) if shift else total
        for half, codes in enumerate((low, high)):
            values = _load(builder, digits, COLUMNS_OF_CODES * digit + COLUMNS_OF_CODES // 2 * half)
            part = builder.call(add_products, [part, codes, values])
        total = builder.add(total, builder.shl(part, _words(shift))) if shift else part
    return total


@intrinsic
def _digits(typingctx, vector, out, at):  # type: ignore[no-untyped-def]
    """_digits(vector, out, at): 16 floats up to LARGEST, rounded, to their three digits at bytes `at`, + 128 and
    + 256."""
    if not isinstance(out, types.Array):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        vector, out, at = args
        pointer = _bytes_at(context, builder, signature.args[1], out, at)
        rint = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_FLOATS, [_FLOATS]), f"llvm.rint.v{LANES}f32"
        )
        left = builder.fptosi(builder.call(rint, [vector]), _WORDS)
        for digit in (2, 1, 0):
            low = builder.ashr(builder.shl(left, _words(24)), _words(24))
            left = builder.ashr(builder.sub(left, low), _words(8))
            target = builder.gep(pointer, [ir.Constant(ir.IntType(64), COLUMNS_OF_CODES * digit)])
            digits = ir.VectorType(_I8, LANES)
            builder.store(builder.trunc(low, digits), builder.bitcast(target, digits.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(vector, out, types.int64), codegen


@intrinsic
def _centre(typingctx, out, at):  # type: ignore[no-untyped-def]
    """_centre(out, at): behind the digits at byte `at`, -7.5 times the sum of each lane's activations."""
    if not isinstance(out, types.Array):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if _has_int8_dot(context):  # dead code elsewhere
            pointer = _bytes_at(context, builder, signature.args[0], *args)
            ones = _words(0x01010101)
            total = _sum(builder, ones, ones, pointer, _words(0))
            start = builder.ashr(builder.mul(total, _words(-15)), _words(1))
            target = builder.gep(pointer, [ir.Constant(ir.IntType(64), 3 * COLUMNS_OF_CODES)])
            builder.store(start, builder.bitcast(target, _WORDS.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(out, types.int64), codegen


@intrinsic
def _dot(typingctx, packed, at, digits, digits_at):  # type: ignore[no-untyped-def]
    """_dot(packed, at, digits, digits_at) -> vec16: the sums of (u - 7.5) q over 128 columns, those of the
    first 64 in the lower half."""
    if not isinstance(packed, types.Array) or not isinstance(digits, types.Array):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if not _has_int8_dot(context):  # dead code
            return ir.Constant(_FLOATS, ir.Undefined)
        codes = _load(builder, _bytes_at(context, builder, signature.args[0], *args[:2]), 0)
        pointer = _bytes_at(context, builder, signature.args[2], *args[2:])
        mask = _words(0x0F0F0F0F)
        low, high = builder.and_(codes, mask), builder.and_(builder.lshr(codes, _words(4)), mask)
        start = _load(builder, pointer, 3 * COLUMNS_OF_CODES)
        return builder.sitofp(_sum(builder, low, high, pointer, start), _FLOATS)

    i = types.int64
    return vec16(packed, i, digits, i), codegen


@intrinsic
def _pair(typingctx, array, offset):  # type: ignore[no-untyped-def]
    """_pair(array, offset) -> vec16: the float32 at flat `offset` in the lower eight lanes, the next in the upper."""
    if not (isinstance(array, types.Array) and array.dtype == types.float32):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pair = ir.VectorType(_FLOAT, 2)
        pointer = _bytes_at(context, builder, signature.args[0], *args)
        both = builder.load(builder.bitcast(pointer, pair.as_pointer()), align=4)
        lanes = ir.Constant(ir.VectorType(_I32, LANES), [2 * lane // LANES for lane in range(LANES)])
        return builder.shuffle_vector(both, ir.Constant(pair, ir.Undefined), lanes)

    return vec16(array, types.int64), codegen


@cpu_inline
def to_digits(x, x_at, columns, out, scale):
    """Columns x[x_at ...] to digits; scale[g] = s of every 64. False where a group's absmax is too small for that.

    columns : a multiple of COLUMNS_OF_CODES; all values finite
    out : bytes, (columns / COLUMNS_OF_CODES, DIGIT_BYTES): each digit of the columns whose codes are in low halves of
        bytes, then of those in high ones; at last the initial sums
    """
    zero, usable = vsplat(np.float32(0)), True
    for g in range(columns // 64):
        at = x_at + 64 * g
        top = zero
        for k in range(0, 64, 16):
            line = vload(x, at + k)
            top = vmax(top, vmax(line, vsub(zero, line)))
        absmax = vmaxval(top)
        scale[g] = absmax / np.float32(LARGEST)
        factor = np.float32(0)
        if absmax >= np.float32(SMALLEST):
            factor = np.float32(LARGEST) / absmax
        elif absmax > np.float32(0):
            usable = False
        for k in range(4):
            run = g % 2 * 2 + k // 2
            out_at = g // 2 * DIGIT_BYTES + k % 2 * 64 + run * 16
            _digits(vmul(vload(x, at + 16 * k), vsplat(factor)), out, out_at)
        if g % 2 == 1:
            _centre(out, g // 2 * DIGIT_BYTES)
    return usable


@cpu_inline
def digit_rows(rows, stream, byte, scale, s_at, columns, digits, gain, out, at):
    """out[at + r] = gain * sum_c (u_c - 7.5) x_c over the 4-bit codes of row r, r < rows.

    stream : codes of the first row from `byte` on, rows one behind the other
    scale : from s_at on, of the groups of 64 columns of every row, times those of the activations
    """
    zero = vsplat(np.float32(0))
    groups, size = columns // 64, columns // 2
    fours = rows // 4 * 4
    for r in range(0, fours, 4):  # activations are loaded once for four rows
        a, b, c, d = zero, zero, zero, zero
        code, s = byte + r * size, s_at + r * groups
        for k in range(columns // COLUMNS_OF_CODES):
            q = k * DIGIT_BYTES
            a = vfma(_pair(scale, s), _dot(stream, code, digits, q), a)
            b = vfma(_pair(scale, s + groups), _dot(stream, code + size, digits, q), b)
            c = vfma(_pair(scale, s + 2 * groups), _dot(stream, code + 2 * size, digits, q), c)
            d = vfma(_pair(scale, s + 3 * groups), _dot(stream, code + 3 * size, digits, q), d)
            code += 64
            s += 2
        out[at + r], out[at + r + 1] = gain * vsum(a), gain * vsum(b)
        out[at + r + 2], out[at + r + 3] = gain * vsum(c), gain * vsum(d)
    for r in range(fours, rows):
        a = zero
        for k in range(columns // COLUMNS_OF_CODES):
            part = _dot(stream, byte + r * size + 64 * k, digits, k * DIGIT_BYTES)
            a = vfma(_pair(scale, s_at + r * groups + 2 * k), part, a)
        out[at + r] = gain * vsum(a)

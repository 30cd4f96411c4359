"""Matmuls of float activations with b-bit codes in integers, for processors with AVX-512 VNNI.

What makes a matmul of one token slow is to convert codes to floats: a register holds 16 of them, but 64 bytes. Here
the activations become integers instead, once for all rows of the weight:

    x = s q,   s = absmax of 64 columns / LARGEST,   q = 65536 d0 + 256 d1 + d2,   d in -128 ... 127

where s is some 2^-23 of the largest value (2^-22 for codes of 8 bits): q is as exact as a float32 of that size. Then

    sum_k (u_k - c) x_k = s (((sum u d0) 256 + sum u d1) 256 + sum u d2 - c sum q)

with c = 2^(b-1) for grid codes, (2^b - 1) / 2 for dense ones, has three instructions for the products of 64 codes. It
is exact in every lane, of four columns, but for c sum q, which is rounded down to an integer: a lane's result is at
most 4 * 128 * LARGEST < 2^31 for 8 bits, 4 * 64 * LARGEST for 7. Sums before it may overflow, which int32 arithmetic
takes back.

A register holds 128 codes of 4 bits, unpacked by a shift and masks. These are multiplied 128 columns at a time, eight
in a lane.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from . import simd_emit as emit
from ._jit import cpu_inline
from ._numba_internals import cgutils
from .int8_rows import STEP, SUMS, for_width, row_starts
from .int8_simd import load_words, pointer_at, prefetch, splat, unpack_64
from .isa import isa_of
from .simd import LANES, vload, vmax, vmaxval, vmul, vsplat, vsub

_LARGEST, _LARGEST_OF_8_BITS = 127 * 65536, 127 * 32768
#: Groups of a smaller absmax have a scale that is subnormal times the least scale of codes, 2^-24.
_SMALLEST = np.float32(1e-23)
_ZERO, _INFINITY = np.float32(0), np.float32(np.inf)
_I8, _I32, _I64, _FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_WORDS, _FLOATS = ir.VectorType(_I32, LANES), ir.VectorType(_FLOAT, LANES)


#: Bytes of the digits of a block of columns, and of what is added to the lanes.
_BLOCK, _BLOCK_OF_4_BITS = 3 * STEP + 4 * LANES, 3 * 2 * STEP + 4 * LANES


def digit_groups(columns: int, bits: int) -> int:
    """Groups of 64 columns, with what fills up the last block of 4-bit codes."""
    groups = -(-columns // STEP)
    return groups + groups % 2 if bits == 4 else groups


def digits_bytes(columns: int, bits: int) -> int:
    """Bytes of the digits of a token."""
    groups = digit_groups(columns, bits)
    return groups // 2 * _BLOCK_OF_4_BITS if bits == 4 else groups * _BLOCK


def _has_int8_dot(context: Any) -> bool:
    return isa_of(context).has("avx512f", "avx512vnni")


@intrinsic
def has_int8_dot(typingctx):  # type: ignore[no-untyped-def]
    """has_int8_dot() -> bool, known when the kernel is compiled: whether the processor has the instructions."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return ir.Constant(ir.IntType(1), _has_int8_dot(context))

    return types.boolean(), codegen


def _load(builder: ir.IRBuilder, pointer: ir.Value, offset: int, typ: ir.Type = _WORDS) -> ir.Value:
    source = builder.gep(pointer, [_I64(offset)])
    return builder.load(builder.bitcast(source, typ.as_pointer()), align=1)


def _add_products(builder: ir.IRBuilder, total: ir.Value, codes: ir.Value, digits: ir.Value) -> ir.Value:
    """total + sums of four products of bytes, unsigned ones with signed ones."""
    # a declaration that newer versions of LLVM, whose arguments are bytes, know and convert
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_WORDS, [_WORDS] * 3), "llvm.x86.avx512.vpdpbusd.512"
    )
    return builder.call(function, [total, codes, digits])


def _sum(builder: ir.IRBuilder, codes: list[ir.Value], digits: list[list[ir.Value]]) -> ir.Value:
    """sum u q in every lane; digits : of each register of codes, most significant first."""
    total = None
    for place in range(3):
        total = splat(0, _WORDS) if total is None else builder.shl(total, splat(8, _WORDS))
        for u, d in zip(codes, digits, strict=True):
            total = _add_products(builder, total, u, d[place])
    return total


def _digits_at(builder: ir.IRBuilder, pointer: ir.Value, registers: int) -> list[list[ir.Value]]:
    return [
        [_load(builder, pointer, STEP * (registers * place + k)) for place in range(3)]
        for k in range(registers)
    ]


@intrinsic
def _digits(typingctx, vector, out, at, distance):  # type: ignore[no-untyped-def]
    """_digits(vector, out, at, distance): 16 floats up to LARGEST, rounded, to their three digits, the first at byte
    `at`."""
    if not isinstance(out, types.Array):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        vector, out, at, distance = args
        rint = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_FLOATS, [_FLOATS]), f"llvm.rint.v{LANES}f32"
        )
        left = builder.fptosi(builder.call(rint, [vector]), _WORDS)
        for digit in (2, 1, 0):
            low = builder.ashr(builder.shl(left, splat(24, _WORDS)), splat(24, _WORDS))
            left = builder.ashr(builder.sub(left, low), splat(8, _WORDS))
            digits = ir.VectorType(_I8, LANES)
            place = builder.add(at, builder.mul(distance, _I64(digit)))
            target = pointer_at(context, builder, signature.args[1], out, place, digits)
            builder.store(builder.trunc(low, digits), target, align=1)
        return context.get_dummy_value()

    return types.void(vector, out, types.int64, types.int64), codegen


@intrinsic(prefer_literal=True)
def _centre(typingctx, registers, out, at, twice):  # type: ignore[no-untyped-def]
    """_centre(registers, out, at, twice): behind the digits of one or two registers of codes (a literal), which begin
    at byte `at`, minus half of `twice` times the sum of each lane's activations, rounded down."""
    if not isinstance(out, types.Array) or not isinstance(registers, types.IntegerLiteral):
        return None
    count = registers.literal_value

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if not _has_int8_dot(context):  # dead code
            return context.get_dummy_value()
        b, (_, out, at, twice) = builder, args
        pointer = pointer_at(context, b, signature.args[1], out, at, _I8)
        total = _sum(b, [splat(0x01010101, _WORDS)] * count, _digits_at(b, pointer, count))
        twice = b.insert_element(ir.Constant(_WORDS, ir.Undefined), b.trunc(twice, _I32), _I32(0))
        twice = b.shuffle_vector(twice, twice, splat(0, _WORDS))
        # total * twice would overflow for 8 bits
        half = b.mul(b.ashr(total, splat(1, _WORDS)), b.and_(twice, splat(1, _WORDS)))
        whole = b.mul(total, b.lshr(twice, splat(1, _WORDS)))
        target = b.bitcast(b.gep(pointer, [_I64(3 * STEP * count)]), _WORDS.as_pointer())
        b.store(b.neg(b.add(whole, half)), target, align=1)
        return context.get_dummy_value()

    return types.void(registers, out, types.int64, types.int64), codegen


@cpu_inline
def to_digits(x, x_at, columns, groups, bits, twice, out, scale):
    """Columns x[x_at ...] to digits; scale[g] = s of every 64. False where a group's absmax is out of range for that.

    columns, groups : a multiple of 64, of which no value is NaN, and their `digit_groups`
    bits : of the codes
    twice : two times the centre of the codes
    out : bytes, `digits_bytes`. By blocks of columns: the three digits of each register of codes, most significant
        first, and what is added to the lanes. Of 4-bit codes a register has the runs' first halves, another the rest
    scale : (groups)
    """
    zero, usable = vsplat(_ZERO), True
    largest = np.float32(_LARGEST_OF_8_BITS if bits == 8 else _LARGEST)
    for g in range(groups):
        at = x_at + STEP * g
        top = zero
        if STEP * g < columns:
            for k in range(0, STEP, LANES):
                line = vload(x, at + k)
                top = vmax(top, vmax(line, vsub(zero, line)))
        absmax = vmaxval(top)
        scale[g] = absmax / largest
        factor = _ZERO
        if absmax >= _SMALLEST:
            factor = largest / absmax
        elif absmax > _ZERO:
            usable = False
        if absmax == _INFINITY:
            usable = False
        for k in range(STEP // LANES):
            line = vmul(vload(x, at + LANES * k), vsplat(factor)) if STEP * g < columns else zero
            if bits == 4:
                run = g % 2 * 2 + k // 2
                _digits(line, out, g // 2 * _BLOCK_OF_4_BITS + k % 2 * STEP + run * LANES, 2 * STEP)
            else:
                _digits(line, out, g * _BLOCK + k * LANES, STEP)
        if bits != 4:
            _centre(1, out, g * _BLOCK, twice)
        elif g % 2 == 1:
            _centre(2, out, g // 2 * _BLOCK_OF_4_BITS, twice)
    return usable


@intrinsic
def digit_sums(typingctx, bits, packed, at, size, rows, digits, columns, scale, scale_at, scale_row):  # type: ignore[no-untyped-def]
    """digit_sums(...) -> four float32: sum_k scale[r, k // 64] (u[r, k] - c) q[k] of rows 0 to 3.

    Parameters
    ----------
    bits : 2 to 8
    packed, at, size : uint8; the codes of row r from byte at + r size on
    rows : at least 1; sums of rows from there on are those of the last
    digits : uint8, of q, with c: see `to_digits`
    columns : a multiple of 64
    scale, scale_at, scale_row : float32; scale[r, g], g < `digit_groups`, is at scale_at + r scale_row + g
    """
    if any(not isinstance(a, types.Array) for a in (packed, digits, scale)):
        return None
    i = types.int64
    result = types.UniTuple(types.float32, SUMS)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        bits, packed, at, size, rows, digits, columns, scale, scale_at, scale_row = args
        b, of = builder, signature.args
        if not _has_int8_dot(context):  # dead code
            return ir.Constant(context.get_value_type(result), ir.Undefined)
        starts = row_starts(context, b, of[1], (packed, at, size, rows))
        scales = [
            b.bitcast(pointer, _FLOAT.as_pointer())
            for pointer in row_starts(context, b, of[7], (scale, scale_at, scale_row, rows))
        ]
        activations = pointer_at(context, b, of[5], digits, _I64(0), _I8)
        totals = [cgutils.alloca_once_value(b, emit.const(0, _FLOATS)) for _ in range(SUMS)]
        whole = b.udiv(columns, _I64(2 * STEP))
        ahead = b.mul(size, _I64(SUMS))  # to the codes of the next call

        def width(bits: int) -> None:
            def add(step: ir.Value, codes_of: Any) -> None:
                """Add the products of a block."""
                registers = 2 if bits == 4 else 1
                block = _BLOCK_OF_4_BITS if bits == 4 else _BLOCK
                block = b.gep(activations, [b.mul(step, _I64(block))])
                values = _digits_at(b, block, registers)
                centre = _load(b, block, 3 * STEP * registers)
                byte = b.mul(step, _I64(STEP // 8 * registers * bits))
                for start, line, total in zip(starts, scales, totals, strict=True):
                    prefetch(context, b, b.gep(start, [b.add(byte, ahead)]))
                    y = b.add(_sum(b, codes_of(b.gep(start, [byte])), values), centre)
                    s = _scales(b, line, step, registers)
                    b.store(emit.fma(b, s, b.sitofp(y, _FLOATS), b.load(total)), total)

            if bits == 4:
                left = b.udiv(b.and_(columns, _I64(2 * STEP - 1)), _I64(STEP))
                with cgutils.for_range(b, b.add(left, _I64(1))) as part:  # whole blocks, then a half
                    short = b.icmp_signed("!=", part.index, _I64(0))
                    count = b.select(short, _I32(STEP // 2), _I32(STEP))
                    start, stop = b.select(short, whole, _I64(0)), b.add(whole, part.index)
                    with cgutils.for_range_slice(b, start, stop, _I64(1)) as (step, _):
                        add(step, lambda pointer: _nibbles(b, load_words(b, pointer, count)))
            else:
                with cgutils.for_range(b, b.udiv(columns, _I64(STEP))) as loop:
                    add(
                        loop.index,
                        lambda pointer: [_words_of(b, unpack_64(b, bits, pointer, _I32(8 * bits)))],
                    )

        for_width(b, bits, width)
        values = emit.sum_lanes(b, [b.load(total) for total in totals], lambda x, y: emit.add(b, x, y))
        return context.make_tuple(b, result, [b.extract_element(values, _I32(k)) for k in range(SUMS)])

    return result(i, packed, i, i, i, digits, i, scale, i, i), codegen


def _words_of(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return builder.bitcast(value, _WORDS)


def _nibbles(builder: ir.IRBuilder, words: ir.Value) -> list[ir.Value]:
    mask = splat(0x0F0F0F0F, _WORDS)
    return [builder.and_(words, mask), builder.and_(builder.lshr(words, splat(4, _WORDS)), mask)]


def _scales(builder: ir.IRBuilder, line: ir.Value, step: ir.Value, registers: int) -> ir.Value:
    """The scale of every lane: of a group, or of two, whose columns are in half of the lanes each."""
    groups = ir.VectorType(_FLOAT, registers)
    pointer = builder.gep(line, [builder.mul(step, _I64(registers))])
    values = builder.load(builder.bitcast(pointer, groups.as_pointer()), align=4)
    lanes = ir.Constant(_WORDS, [registers * lane // LANES for lane in range(LANES)])
    return builder.shuffle_vector(values, ir.Constant(groups, ir.Undefined), lanes)

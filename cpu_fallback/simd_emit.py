"""What the vector intrinsics are written with: LLVM types, constants, arithmetic and half-precision conversion.

An emitter appends instructions to the function that an LLVM builder is at and returns their result. Those of this
file take a scalar or a vector of any length, and the result has the shape of the argument. Users import the module,
not the names (`emit.add`): `_disk_cache.imports` would take an imported name `add` for the file of that op.

Instructions on which an algorithm depends carry the single flag `nsz`: Numba's fast-math pass adds `reassoc`
only to instructions without flags, and `(t + magic) - magic` must not be simplified to `t`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from ._numba_internals import cgutils
from .isa import isa_of

F32 = ir.FloatType()
_F16 = ir.HalfType()
I16 = ir.IntType(16)
I32 = ir.IntType(32)


# --- arithmetic -------------------------------------------------------------------------------------------


def shaped(scalar: ir.Type, like: ir.Type) -> ir.Type:
    """`scalar` itself when `like` is a scalar type, a vector of its lanes when `like` is a vector type."""
    return ir.VectorType(scalar, like.count) if isinstance(like, ir.VectorType) else scalar


def const(value: float, typ: ir.Type) -> ir.Constant:
    """The constant `value` of a scalar type, or in all lanes of a vector type; floats rounded to float32."""
    element = typ.element if isinstance(typ, ir.VectorType) else typ
    value = float(np.float32(value)) if element == F32 else int(value)
    return ir.Constant(typ, [value] * typ.count if isinstance(typ, ir.VectorType) else value)


def _suffix(typ: ir.Type) -> str:
    return f"v{typ.count}f32" if isinstance(typ, ir.VectorType) else "f32"


def declare(builder: ir.IRBuilder, name: str, result: ir.Type, args: Sequence[ir.Type]) -> ir.Function:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, args), name)


def fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a * b + c: one instruction where the CPU has it, else a product and a sum (never a library call)."""
    function = declare(builder, f"llvm.fmuladd.{_suffix(a.type)}", a.type, [a.type] * 3)
    return builder.call(function, [a, b, c])


def fabs(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return builder.call(declare(builder, f"llvm.fabs.{_suffix(x.type)}", x.type, [x.type]), [x])


def copysign(builder: ir.IRBuilder, magnitude: ir.Value, sign: ir.Value) -> ir.Value:
    function = declare(builder, f"llvm.copysign.{_suffix(sign.type)}", sign.type, [sign.type] * 2)
    return builder.call(function, [magnitude, sign])


def sub(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.fsub(a, b, flags=("nsz",))


def add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.fadd(a, b, flags=("nsz",))


def mul(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.fmul(a, b, flags=("nsz",))


def div(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.fdiv(a, b, flags=("nsz",))


def less(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.fcmp_ordered("<", a, b, flags=("nsz",))


def horner(builder: ir.IRBuilder, x: ir.Value, coefficients: Sequence[float]) -> ir.Value:
    """coefficients[0] + coefficients[1] x + ... (lowest power first)."""
    result: ir.Value = const(coefficients[-1], x.type)
    for coefficient in coefficients[-2::-1]:
        result = fma(builder, result, x, const(coefficient, x.type))
    return result


# --- storage <-> float32 ------------------------------------------------------------------------------------


def half_to_float(context: Any, builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """float16 bits (i16 or a vector of them) -> float32, exact, subnormals included."""
    f32, i32 = shaped(F32, x.type), shaped(I32, x.type)
    if isa_of(context).converts_half:
        return builder.fpext(builder.bitcast(x, shaped(_F16, x.type)), f32)
    wide = builder.zext(x, i32)
    sign = builder.shl(builder.and_(wide, const(0x8000, i32)), const(16, i32))
    magnitude = builder.shl(builder.and_(wide, const(0x7FFF, i32)), const(13, i32))
    # Read as float32, the shifted pattern is 2^-112 of the value, for subnormals too.
    finite = mul(builder, builder.bitcast(magnitude, f32), const(2.0**112, f32))
    special = builder.icmp_unsigned(">=", magnitude, const(0x7C00 << 13, i32))
    pattern = builder.select(
        special, builder.or_(magnitude, const(0x7F800000, i32)), builder.bitcast(finite, i32)
    )
    return builder.bitcast(builder.or_(pattern, sign), f32)


def float_to_half(context: Any, builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """float32 -> float16 bits, to nearest even; NaN stays NaN."""
    i16, i32 = shaped(I16, x.type), shaped(I32, x.type)
    if isa_of(context).converts_half:
        return builder.bitcast(builder.fptrunc(x, shaped(_F16, x.type)), i16)
    pattern = builder.bitcast(x, i32)
    sign = builder.lshr(builder.and_(pattern, const(0x80000000, i32)), const(16, i32))
    magnitude = builder.and_(pattern, const(0x7FFFFFFF, i32))
    # Normal results: move the exponent bias from 127 to 15 and round away 13 bits, ties to even.
    odd = builder.and_(builder.lshr(magnitude, const(13, i32)), const(1, i32))
    rebias = const((-112 << 23) & 0xFFFFFFFF, i32)
    normal = builder.add(builder.add(magnitude, rebias), builder.add(odd, const(0xFFF, i32)))
    normal = builder.lshr(normal, const(13, i32))
    # Subnormal results: 0.5's last bit is worth 2^-24, so adding 0.5 rounds to float16's last place.
    half = const(0.5, x.type)
    subnormal = builder.bitcast(add(builder, builder.bitcast(magnitude, x.type), half), i32)
    subnormal = builder.sub(subnormal, builder.bitcast(half, i32))
    is_nan = builder.icmp_unsigned(">", magnitude, const(0x7F800000, i32))
    special = builder.select(is_nan, const(0x7E00, i32), const(0x7C00, i32))
    result = builder.select(builder.icmp_unsigned("<", magnitude, const(0x38800000, i32)), subnormal, normal)
    result = builder.select(builder.icmp_unsigned(">=", magnitude, const(0x47800000, i32)), special, result)
    return builder.trunc(builder.or_(result, sign), i16)


def bfloat_to_float(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """bfloat16 bits -> float32: the upper half of the pattern."""
    i32 = shaped(I32, x.type)
    return builder.bitcast(builder.shl(builder.zext(x, i32), const(16, i32)), shaped(F32, x.type))


def float_to_bfloat(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """float32 -> bfloat16 bits, to nearest even; NaN stays NaN (made quiet)."""
    i16, i32 = shaped(I16, x.type), shaped(I32, x.type)
    pattern = builder.bitcast(x, i32)
    top = builder.lshr(pattern, const(16, i32))
    odd = builder.and_(top, const(1, i32))
    rounded = builder.lshr(builder.add(pattern, builder.add(odd, const(0x7FFF, i32))), const(16, i32))
    quiet = builder.or_(top, const(0x40, i32))
    is_nan = builder.fcmp_unordered("uno", x, x, flags=("nsz",))
    return builder.trunc(builder.select(is_nan, quiet, rounded), i16)


def widen(context: Any, builder: ir.IRBuilder, storage: types.Type, x: ir.Value) -> ir.Value:
    """A stored scalar or vector -> float32."""
    if storage == types.float32:
        return x
    if storage == types.uint16:
        return half_to_float(context, builder, x)
    return bfloat_to_float(builder, x)


def narrow(context: Any, builder: ir.IRBuilder, storage: types.Type, x: ir.Value) -> ir.Value:
    """float32 -> the storage type, to nearest even."""
    if storage == types.float32:
        return x
    if storage == types.uint16:
        return float_to_half(context, builder, x)
    return float_to_bfloat(builder, x)


def sum_lanes(
    builder: ir.IRBuilder, vectors: list[ir.Value], add: Callable[[ir.Value, ir.Value], ir.Value]
) -> ir.Value:
    """The sums of the lanes of four vectors of four lanes or more, as a vector of four."""

    def pick(x: ir.Value, y: ir.Value, lanes: list[int]) -> ir.Value:
        return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))

    # inside of every four lanes first, where one register takes the place of two
    count = vectors[0].type.count
    fours = [4 * k for k in range(count // 4)]
    low = [lane for k in fours for lane in (k, k + count, k + 1, k + 1 + count)]
    high = [lane + 2 for lane in low]
    vectors = [add(pick(x, y, low), pick(x, y, high)) for x, y in (vectors[:2], vectors[2:])]
    low = [lane for k in fours for lane in (k, k + 1, k + count, k + 1 + count)]
    total = add(pick(*vectors, low), pick(*vectors, [lane + 2 for lane in low]))
    while total.type.count > 4:
        half = list(range(total.type.count // 2))
        total = add(pick(total, total, half), pick(total, total, [lane + len(half) for lane in half]))
    return total

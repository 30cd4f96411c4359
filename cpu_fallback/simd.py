"""Vectors of 16 floats, half-precision conversion and elementary functions for the CPU kernels.

Everything here is an LLVM intrinsic emitted straight into the kernel that uses it. One source serves every
CPU: LLVM splits `<16 x float>` into one AVX-512, two AVX2 or four NEON registers.

Storage types. Numba has neither half type on the CPU, so kernels see bit patterns: float16 arrays as uint16,
bfloat16 arrays as int16 (`bits` makes that view). Loads widen to float32, stores narrow by the array's type.

Elementary functions (float32 in and out, no branches, NaN gives NaN, at most 2 ulp over all float32 values):
`exp_f32`, `tanh_f32`, `erf_f32`, `sigmoid_f32` for one value, `vexp`, `vtanh`, `verf`, `vsigmoid` for a
vector. Both come from the same emitter. LLVM vectorises plain loops over the scalar forms. The polynomials
are minimax fits in the relative error, rounded to float32 coefficient by coefficient; the errors given beside
them are of the fit.

Instructions on which an algorithm depends carry the single flag `nsz`: Numba's fast-math pass adds `reassoc`
only to instructions without flags, and `(t + magic) - magic` must not be simplified to `t`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from ._numba_internals import cgutils
from .isa import isa_of

LANES = 16
_FLOAT32 = np.dtype(np.float32)

_F32 = ir.FloatType()
_F16 = ir.HalfType()
_I1 = ir.IntType(1)
_I8 = ir.IntType(8)
_I16 = ir.IntType(16)
_I32 = ir.IntType(32)
_V_F32 = ir.VectorType(_F32, LANES)

#: Numba's names of the storage types: float32, float16 bits, bfloat16 bits.
_STORAGE = (types.float32, types.uint16, types.int16)


class Vec16Type(types.Type):
    """Numba type of a vector of 16 float32 values. It lives in registers; Python never sees one."""

    def __init__(self) -> None:
        super().__init__(name="vec16_float32")


vec16 = Vec16Type()


@register_model(Vec16Type)
class _Vec16Model(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: types.Type) -> None:
        super().__init__(dmm, fe_type, _V_F32)


def bits(array: np.ndarray) -> np.ndarray:
    """View of an array as kernels take it: float32 as it is, float16 as uint16, bfloat16 as int16.

    Raises
    ------
    TypeError
        For every other dtype.
    """
    if array.dtype is _FLOAT32 or array.dtype == _FLOAT32:  # the first is three times as quick
        return array
    if array.dtype == np.float16:
        return array.view(np.uint16)
    if array.dtype == ml_dtypes.bfloat16:
        return array.view(np.int16)
    raise TypeError(f"dtype {array.dtype} has no CPU kernel; use float32, float16 or bfloat16")


# --- building blocks of the emitters ------------------------------------------------------------------------


def _shaped(scalar: ir.Type, like: ir.Type) -> ir.Type:
    """`scalar` itself when `like` is a scalar type, a vector of its lanes when `like` is a vector type."""
    return ir.VectorType(scalar, like.count) if isinstance(like, ir.VectorType) else scalar


def _const(value: float, typ: ir.Type) -> ir.Constant:
    """The constant `value` of a scalar type, or in all lanes of a vector type; floats rounded to float32."""
    element = typ.element if isinstance(typ, ir.VectorType) else typ
    value = float(np.float32(value)) if element == _F32 else int(value)
    return ir.Constant(typ, [value] * typ.count if isinstance(typ, ir.VectorType) else value)


def _suffix(typ: ir.Type) -> str:
    return f"v{typ.count}f32" if isinstance(typ, ir.VectorType) else "f32"


def _declare(builder: ir.IRBuilder, name: str, result: ir.Type, args: Sequence[ir.Type]) -> ir.Function:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, args), name)


def _fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a * b + c: one instruction where the CPU has it, else a product and a sum (never a library call)."""
    function = _declare(builder, f"llvm.fmuladd.{_suffix(a.type)}", a.type, [a.type] * 3)
    return builder.call(function, [a, b, c])


def _fabs(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return builder.call(_declare(builder, f"llvm.fabs.{_suffix(x.type)}", x.type, [x.type]), [x])


def _copysign(builder: ir.IRBuilder, magnitude: ir.Value, sign: ir.Value) -> ir.Value:
    function = _declare(builder, f"llvm.copysign.{_suffix(sign.type)}", sign.type, [sign.type] * 2)
    return builder.call(function, [magnitude, sign])


def _sub(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.fsub(a, b, flags=("nsz",))


def _add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.fadd(a, b, flags=("nsz",))


def _mul(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.fmul(a, b, flags=("nsz",))


def _div(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.fdiv(a, b, flags=("nsz",))


def _less(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.fcmp_ordered("<", a, b, flags=("nsz",))


def _horner(builder: ir.IRBuilder, x: ir.Value, coefficients: Sequence[float]) -> ir.Value:
    """coefficients[0] + coefficients[1] x + ... (lowest power first)."""
    result: ir.Value = _const(coefficients[-1], x.type)
    for coefficient in coefficients[-2::-1]:
        result = _fma(builder, result, x, _const(coefficient, x.type))
    return result


# --- storage <-> float32 ------------------------------------------------------------------------------------


def _half_to_float(context: Any, builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """float16 bits (i16 or a vector of them) -> float32, exact, subnormals included."""
    f32, i32 = _shaped(_F32, x.type), _shaped(_I32, x.type)
    if isa_of(context).converts_half:
        return builder.fpext(builder.bitcast(x, _shaped(_F16, x.type)), f32)
    wide = builder.zext(x, i32)
    sign = builder.shl(builder.and_(wide, _const(0x8000, i32)), _const(16, i32))
    magnitude = builder.shl(builder.and_(wide, _const(0x7FFF, i32)), _const(13, i32))
    # Read as float32, the shifted pattern is 2^-112 of the value, for subnormals too.
    finite = _mul(builder, builder.bitcast(magnitude, f32), _const(2.0**112, f32))
    special = builder.icmp_unsigned(">=", magnitude, _const(0x7C00 << 13, i32))
    pattern = builder.select(
        special, builder.or_(magnitude, _const(0x7F800000, i32)), builder.bitcast(finite, i32)
    )
    return builder.bitcast(builder.or_(pattern, sign), f32)


def _float_to_half(context: Any, builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """float32 -> float16 bits, to nearest even; NaN stays NaN."""
    i16, i32 = _shaped(_I16, x.type), _shaped(_I32, x.type)
    if isa_of(context).converts_half:
        return builder.bitcast(builder.fptrunc(x, _shaped(_F16, x.type)), i16)
    pattern = builder.bitcast(x, i32)
    sign = builder.lshr(builder.and_(pattern, _const(0x80000000, i32)), _const(16, i32))
    magnitude = builder.and_(pattern, _const(0x7FFFFFFF, i32))
    # Normal results: move the exponent bias from 127 to 15 and round away 13 bits, ties to even.
    odd = builder.and_(builder.lshr(magnitude, _const(13, i32)), _const(1, i32))
    rebias = _const((-112 << 23) & 0xFFFFFFFF, i32)
    normal = builder.add(builder.add(magnitude, rebias), builder.add(odd, _const(0xFFF, i32)))
    normal = builder.lshr(normal, _const(13, i32))
    # Subnormal results: 0.5's last bit is worth 2^-24, so adding 0.5 rounds to float16's last place.
    half = _const(0.5, x.type)
    subnormal = builder.bitcast(_add(builder, builder.bitcast(magnitude, x.type), half), i32)
    subnormal = builder.sub(subnormal, builder.bitcast(half, i32))
    is_nan = builder.icmp_unsigned(">", magnitude, _const(0x7F800000, i32))
    special = builder.select(is_nan, _const(0x7E00, i32), _const(0x7C00, i32))
    result = builder.select(builder.icmp_unsigned("<", magnitude, _const(0x38800000, i32)), subnormal, normal)
    result = builder.select(builder.icmp_unsigned(">=", magnitude, _const(0x47800000, i32)), special, result)
    return builder.trunc(builder.or_(result, sign), i16)


def _bfloat_to_float(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """bfloat16 bits -> float32: the upper half of the pattern."""
    i32 = _shaped(_I32, x.type)
    return builder.bitcast(builder.shl(builder.zext(x, i32), _const(16, i32)), _shaped(_F32, x.type))


def _float_to_bfloat(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """float32 -> bfloat16 bits, to nearest even; NaN stays NaN (made quiet)."""
    i16, i32 = _shaped(_I16, x.type), _shaped(_I32, x.type)
    pattern = builder.bitcast(x, i32)
    top = builder.lshr(pattern, _const(16, i32))
    odd = builder.and_(top, _const(1, i32))
    rounded = builder.lshr(builder.add(pattern, builder.add(odd, _const(0x7FFF, i32))), _const(16, i32))
    quiet = builder.or_(top, _const(0x40, i32))
    is_nan = builder.fcmp_unordered("uno", x, x, flags=("nsz",))
    return builder.trunc(builder.select(is_nan, quiet, rounded), i16)


def _widen(context: Any, builder: ir.IRBuilder, storage: types.Type, x: ir.Value) -> ir.Value:
    if storage == types.float32:
        return x
    if storage == types.uint16:
        return _half_to_float(context, builder, x)
    return _bfloat_to_float(builder, x)


def _narrow(context: Any, builder: ir.IRBuilder, storage: types.Type, x: ir.Value) -> ir.Value:
    if storage == types.float32:
        return x
    if storage == types.uint16:
        return _float_to_half(context, builder, x)
    return _float_to_bfloat(builder, x)


@intrinsic
def widen(typingctx, value):
    """widen(value) -> float32: a stored element (float32, float16 bits, bfloat16 bits) as float32."""
    if value not in _STORAGE:
        return None

    def codegen(context, builder, signature, args):
        return _widen(context, builder, signature.args[0], args[0])

    return types.float32(value), codegen


@intrinsic
def narrow(typingctx, array, value):
    """narrow(array, value) -> array's element type: float32 rounded to nearest even, to store in `array`."""
    if not isinstance(array, types.Array) or array.dtype not in _STORAGE:
        return None

    def codegen(context, builder, signature, args):
        return _narrow(context, builder, signature.args[0].dtype, args[1])

    return array.dtype(array, types.float32), codegen


# --- elementary functions -----------------------------------------------------------------------------------

_LOG2_E = 1.4426950408889634
# ln 2 in two parts; the first has 9 significant bits, so n times it is exact for |n| <= 2^14, FMA or not.
_LN2_HIGH = 0.693359375
_LN2_LOW = -2.12194440054690583e-4
# 1.5 * 2^23: adding it rounds to an integer, which then sits in the low bits of the pattern.
_MAGIC = 12582912.0
_MAGIC_BITS = 0x4B400000

# e^r = 1 + r + r^2 Q(r), |r| <= 0.35: 3.4e-9
_EXP = (0.49999994, 0.16666517, 0.041668285, 0.00836925, 0.0013820468)
# e^r, |r| <= 0.35, two operations fewer: 9.8e-8
_EXP_SHORT = (1.0, 0.9999997, 0.49999118, 0.1666765, 0.04190232, 0.00829062)


def _round_by_ln2(builder: ir.IRBuilder, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """x = n ln2 + r with |r| <= 0.35: (float of n + magic, float of n, r)."""
    typ = x.type
    shifted = _fma(builder, x, _const(_LOG2_E, typ), _const(_MAGIC, typ))
    n = _sub(builder, shifted, _const(_MAGIC, typ))
    r = _fma(builder, n, _const(-_LN2_HIGH, typ), x)
    r = _fma(builder, n, _const(-_LN2_LOW, typ), r)
    return shifted, n, r


def _has_scalef(context: Any, typ: ir.Type) -> bool:
    """Whether x * 2^n, with gradual underflow, is one instruction (AVX-512 has it)."""
    return typ == _V_F32 and isa_of(context).vector_bits == 512


def _scalef(builder: ir.IRBuilder, x: ir.Value, n: ir.Value, keep: ir.Value | None = None) -> ir.Value:
    """x * 2^n, and 0 in the lanes where `keep` is false."""
    function = _declare(
        builder, "llvm.x86.avx512.mask.scalef.ps.512", _V_F32, [_V_F32, _V_F32, _V_F32, _I16, _I32]
    )
    mask = _I16(-1) if keep is None else builder.bitcast(keep, _I16)
    return builder.call(function, [x, n, _const(0.0, _V_F32), mask, _I32(4)])  # 4: the thread's rounding mode


def _emit_exp(context: Any, builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """e^x over the whole float32 range, with gradual underflow."""
    typ, i32 = x.type, _shaped(_I32, x.type)
    # Below -104 the result rounds to 0, above 89 to inf; NaN fails both comparisons and stays.
    low, high = _const(-104.0, typ), _const(89.0, typ)
    x = builder.select(_less(builder, x, low), low, x)
    x = builder.select(_less(builder, high, x), high, x)
    shifted, n, r = _round_by_ln2(builder, x)
    # 1 is added last: the sum below it is at most 0.42, so its own rounding hardly counts.
    power = _fma(builder, _mul(builder, r, r), _horner(builder, r, _EXP), r)
    power = _add(builder, power, _const(1.0, typ))
    if _has_scalef(context, typ):
        return _scalef(builder, power, n)
    # 2^n in two factors, because 2^-150 and 2^128 are no normal floats; only the second product rounds.
    n = builder.sub(builder.bitcast(shifted, i32), _const(_MAGIC_BITS, i32))
    half = builder.ashr(n, _const(1, i32))
    for part in (half, builder.sub(n, half)):
        biased = builder.shl(builder.add(part, _const(127, i32)), _const(23, i32))
        power = _mul(builder, power, builder.bitcast(biased, typ))
    return power


def _times_power_of_two(builder: ir.IRBuilder, x: ir.Value, shifted: ir.Value) -> ir.Value:
    """x * 2^n for -126 <= n <= 127, with n in the low bits of `shifted`."""
    i32 = _shaped(_I32, x.type)
    exponent = builder.shl(builder.bitcast(shifted, i32), _const(23, i32))
    one = builder.bitcast(_const(1.0, x.type), i32)
    return _mul(builder, x, builder.bitcast(builder.add(exponent, one), x.type))


def _emit_exp_narrow(context: Any, builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """e^x for x <= 88, and 0 below -87: no subnormal results. NaN gives NaN."""
    typ = x.type
    low = _const(-87.0, typ)
    if _has_scalef(context, typ):
        _, n, r = _round_by_ln2(builder, x)
        keep = builder.fcmp_unordered(">=", x, low, flags=("nsz",))
        return _scalef(builder, _horner(builder, r, _EXP_SHORT), n, keep)
    below = _less(builder, x, low)
    shifted, _, r = _round_by_ln2(builder, builder.select(below, low, x))
    power = _times_power_of_two(builder, _horner(builder, r, _EXP_SHORT), shifted)
    return builder.select(below, _const(0.0, typ), power)


# tanh(x) = x + x s P(s), s = x^2, |x| <= 0.6: 2.8e-9
_TANH = (-0.333333, 0.13331936, -0.053784717, 0.020798625, -0.0058979667)


def _emit_tanh(context: Any, builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """tanh x: a polynomial up to 0.6, else 1 - 2 / (e^2|x| + 1)."""
    typ = x.type
    magnitude, square, one = _fabs(builder, x), _mul(builder, x, x), _const(1.0, typ)
    inner = _fma(builder, _mul(builder, _horner(builder, square, _TANH), square), x, x)
    power = _emit_exp(context, builder, _mul(builder, magnitude, _const(2.0, typ)))
    outer = _sub(builder, one, _div(builder, _const(2.0, typ), _add(builder, power, one)))
    outer = _copysign(builder, outer, x)
    return builder.select(_less(builder, magnitude, _const(0.6, typ)), inner, outer)


# erf(x) = x + x P(x^2), |x| <= 0.93: 1.8e-8
_ERF_INNER = (0.12837915, -0.3761249, 0.11281731, -0.026762964, 0.0049873474, -0.00059595495)
# erf(x) = 1 - e^(-x + x Q(x)), 0.92 <= x <= 4: 2.9e-9
_ERF_OUTER = (-0.12851076, -0.6357309, -0.1052447, 0.02287866, -0.0032113409, 0.00021353672)


def _emit_erf(context: Any, builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """erf x: a polynomial up to 0.925, else 1 minus the exponential of a polynomial (log erfc is smooth)."""
    typ = x.type
    magnitude, square, four = _fabs(builder, x), _mul(builder, x, x), _const(4.0, typ)
    inner = _fma(builder, _horner(builder, square, _ERF_INNER), x, x)
    # erf is 1 in float32 from 3.92 on.
    t = builder.select(_less(builder, four, magnitude), four, magnitude)
    minus_t = builder.fneg(t, flags=("nsz",))
    exponent = _fma(builder, _horner(builder, t, _ERF_OUTER), t, minus_t)
    outer = _sub(builder, _const(1.0, typ), _emit_exp_narrow(context, builder, exponent))
    outer = _copysign(builder, outer, x)
    return builder.select(_less(builder, magnitude, _const(0.925, typ)), inner, outer)


def _emit_sigmoid(context: Any, builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """1 / (1 + e^-x), as e^x / (1 + e^x) for negative x: neither form overflows."""
    typ, one = x.type, _const(1.0, x.type)
    power = _emit_exp(context, builder, builder.fneg(_fabs(builder, x), flags=("nsz",)))
    negative = _less(builder, x, _const(0.0, typ))
    total = _add(builder, one, power)
    quotient = _div(builder, builder.select(negative, power, one), total)
    # What rounding took from 1 + e^-|x|, times 1 / (1 + e^-|x|): without it the error reaches 2.4 ulp.
    lost = _sub(builder, power, _sub(builder, total, one))
    inverse = builder.select(negative, _sub(builder, one, quotient), quotient)
    correction = _mul(builder, _mul(builder, quotient, lost), inverse)
    return _sub(builder, quotient, correction)


def _function_pair(
    name: str, meaning: str, emit: Callable[[Any, ir.IRBuilder, ir.Value], ir.Value]
) -> tuple[Any, Any]:
    """The scalar and the vector intrinsic of one elementary function."""

    def scalar(typingctx, x):
        def codegen(context, builder, signature, args):
            return emit(context, builder, args[0])

        return types.float32(types.float32), codegen

    def vector(typingctx, x):
        if x != vec16:
            return None

        def codegen(context, builder, signature, args):
            return emit(context, builder, args[0])

        return vec16(vec16), codegen

    for function, own_name in ((scalar, f"{name}_f32"), (vector, f"v{name}")):
        function.__name__ = function.__qualname__ = own_name
        function.__doc__ = f"{own_name}(x): {meaning}"
    return intrinsic(scalar), intrinsic(vector)


exp_f32, vexp = _function_pair("exp", "e^x, <= 2 ulp, subnormal results included.", _emit_exp)
tanh_f32, vtanh = _function_pair("tanh", "tanh x, <= 2 ulp.", _emit_tanh)
erf_f32, verf = _function_pair("erf", "the error function of x, <= 2 ulp.", _emit_erf)
sigmoid_f32, vsigmoid = _function_pair("sigmoid", "1 / (1 + e^-x), <= 2 ulp.", _emit_sigmoid)
exp_narrow_f32, vexp_narrow = _function_pair(
    "exp_narrow", "e^x for x <= 88, 0 below -87; <= 3 ulp, cheaper than exp.", _emit_exp_narrow
)


# --- loads and stores ---------------------------------------------------------------------------------------


def _element_pointer(
    context: Any, builder: ir.IRBuilder, array: types.Array, value: ir.Value, offset: ir.Value
) -> ir.Value:
    """Pointer to the element `offset` places after the first element of the array, whatever its strides."""
    data = context.make_array(array)(context, builder, value).data
    return builder.gep(data, [offset])


def _storage_type(storage: types.Type) -> ir.Type:
    return _F32 if storage == types.float32 else _I16


def _lane_mask(builder: ir.IRBuilder, count: ir.Value) -> ir.Value:
    """True in lanes 0 .. count - 1."""
    index_type = ir.VectorType(ir.IntType(64), LANES)
    ramp = ir.Constant(index_type, list(range(LANES)))
    return builder.icmp_signed("<", ramp, _splat(builder, count))


def _splat(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    typ = ir.VectorType(value.type, LANES)
    first = builder.insert_element(ir.Constant(typ, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(
        first, ir.Constant(typ, ir.Undefined), ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
    )


def _is_stored_array(array: types.Type) -> bool:
    return isinstance(array, types.Array) and array.dtype in _STORAGE


def _load(
    context: Any, builder: ir.IRBuilder, array: types.Array, value: ir.Value, offset: ir.Value
) -> ir.Value:
    """16 elements as float32."""
    vector = ir.VectorType(_storage_type(array.dtype), LANES)
    pointer = builder.bitcast(_element_pointer(context, builder, array, value, offset), vector.as_pointer())
    return _widen(context, builder, array.dtype, builder.load(pointer, align=array.dtype.bitwidth // 8))


def _store(
    context: Any,
    builder: ir.IRBuilder,
    array: types.Array,
    value: ir.Value,
    offset: ir.Value,
    vector: ir.Value,
) -> None:
    """16 float32 values, rounded to the array's type."""
    stored = _narrow(context, builder, array.dtype, vector)
    pointer = _element_pointer(context, builder, array, value, offset)
    builder.store(stored, builder.bitcast(pointer, stored.type.as_pointer()), align=array.dtype.bitwidth // 8)


@intrinsic
def vload(typingctx, array, offset):
    """vload(array, offset) -> vector: the 16 elements from flat offset on, widened to float32."""
    if not _is_stored_array(array):
        return None

    def codegen(context, builder, signature, args):
        return _load(context, builder, signature.args[0], *args)

    return vec16(array, types.intp), codegen


@intrinsic
def vstore(typingctx, array, offset, vector):
    """vstore(array, offset, vector): write 16 elements from flat offset on, rounded to the array's type."""
    if not _is_stored_array(array) or vector != vec16:
        return None

    def codegen(context, builder, signature, args):
        _store(context, builder, signature.args[0], *args)
        return context.get_dummy_value()

    return types.void(array, types.intp, vec16), codegen


@intrinsic
def vload_n(typingctx, array, offset, count):
    """vload_n(array, offset, count) -> vector: `count` elements (0..16), then zeros; reads nothing else."""
    if not _is_stored_array(array):
        return None

    def codegen(context, builder, signature, args):
        storage = signature.args[0].dtype
        element = _storage_type(storage)
        vector = ir.VectorType(element, LANES)
        pointer = _element_pointer(context, builder, signature.args[0], args[0], args[1])
        mask = _lane_mask(builder, args[2])
        name = f"llvm.masked.load.{'v16f32' if element == _F32 else 'v16i16'}.p0"
        function = _declare(builder, name, vector, [vector.as_pointer(), _I32, mask.type, vector])
        loaded = builder.call(
            function,
            [
                builder.bitcast(pointer, vector.as_pointer()),
                _I32(storage.bitwidth // 8),
                mask,
                _const(0, vector),
            ],
        )
        return _widen(context, builder, storage, loaded)

    return vec16(array, types.intp, types.intp), codegen


@intrinsic
def vstore_n(typingctx, array, offset, vector, count):
    """vstore_n(array, offset, vector, count): write the first `count` lanes (0..16) and nothing else."""
    if not _is_stored_array(array) or vector != vec16:
        return None

    def codegen(context, builder, signature, args):
        storage = signature.args[0].dtype
        pointer = _element_pointer(context, builder, signature.args[0], args[0], args[1])
        stored = _narrow(context, builder, storage, args[2])
        mask = _lane_mask(builder, args[3])
        name = f"llvm.masked.store.{'v16f32' if storage == types.float32 else 'v16i16'}.p0"
        function = _declare(
            builder, name, ir.VoidType(), [stored.type, stored.type.as_pointer(), _I32, mask.type]
        )
        builder.call(
            function,
            [
                stored,
                builder.bitcast(pointer, stored.type.as_pointer()),
                _I32(storage.bitwidth // 8),
                mask,
            ],
        )
        return context.get_dummy_value()

    return types.void(array, types.intp, vec16, types.intp), codegen


# --- arithmetic ---------------------------------------------------------------------------------------------


@intrinsic
def vsplat(typingctx, value):
    """vsplat(value) -> vector: a float32 in every lane."""

    def codegen(context, builder, signature, args):
        return _splat(builder, args[0])

    return vec16(types.float32), codegen


def _binary(name: str, meaning: str, emit: Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value]) -> Any:
    """The intrinsic of an operation on two vectors."""

    def operation(typingctx, a, b):
        if a != vec16 or b != vec16:
            return None

        def codegen(context, builder, signature, args):
            return emit(builder, *args)

        return vec16(vec16, vec16), codegen

    operation.__name__ = operation.__qualname__ = name
    operation.__doc__ = f"{name}(a, b) -> vector: {meaning}"
    return intrinsic(operation)


def _larger(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(_less(builder, b, a), a, b)


def _smaller(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(_less(builder, a, b), a, b)


vadd = _binary("vadd", "a + b.", _add)
vsub = _binary("vsub", "a - b.", _sub)
vmul = _binary("vmul", "a * b.", _mul)
vdiv = _binary("vdiv", "a / b.", _div)
vmax = _binary("vmax", "a > b ? a : b, which is b where either is NaN.", _larger)
vmin = _binary("vmin", "a < b ? a : b, which is b where either is NaN.", _smaller)


@intrinsic
def vfma(typingctx, a, b, c):
    """vfma(a, b, c) -> vector: a * b + c, fused where the CPU can."""
    if (a, b, c) != (vec16, vec16, vec16):
        return None

    def codegen(context, builder, signature, args):
        return _fma(builder, *args)

    return vec16(vec16, vec16, vec16), codegen


def _fold(
    builder: ir.IRBuilder, x: ir.Value, combine: Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value]
) -> ir.Value:
    """Combine the 16 lanes into one value: halves, quarters, and so on."""
    width = LANES
    while width > 1:
        width //= 2
        lanes = ir.VectorType(_I32, width)
        low, high = (
            builder.shuffle_vector(x, x, ir.Constant(lanes, list(range(start, start + width))))
            for start in (0, width)
        )
        x = combine(builder, low, high)
    return builder.extract_element(x, _I32(0))


@intrinsic
def vsum(typingctx, vector):
    """vsum(vector) -> float32: sum of the lanes, pairwise."""
    if vector != vec16:
        return None

    def codegen(context, builder, signature, args):
        return _fold(builder, args[0], _add)

    return types.float32(vec16), codegen


@intrinsic
def vmaxval(typingctx, vector):
    """vmaxval(vector) -> float32: largest lane; with NaN lanes the result is unspecified."""
    if vector != vec16:
        return None

    def codegen(context, builder, signature, args):
        return _fold(builder, args[0], _larger)

    return types.float32(vec16), codegen


@intrinsic
def vlanes(typingctx, vector, first, last, other):
    """vlanes(vector, first, last, other) -> vector: lanes first .. last - 1 kept, `other` elsewhere."""
    if vector != vec16:
        return None

    def codegen(context, builder, signature, args):
        vector, first, last, other = args
        index_type = ir.VectorType(ir.IntType(64), LANES)
        ramp = ir.Constant(index_type, list(range(LANES)))
        inside = builder.and_(
            builder.icmp_signed(">=", ramp, _splat(builder, first)),
            builder.icmp_signed("<", ramp, _splat(builder, last)),
        )
        return builder.select(inside, vector, _splat(builder, other))

    return vec16(vec16, types.intp, types.intp, types.float32), codegen


@intrinsic
def vload_keep(typingctx, array, offset):
    """vload_keep(array, offset) -> vector: 1 where 16 bools are True, 0 where False."""
    if not isinstance(array, types.Array) or array.dtype != types.boolean:
        return None

    def codegen(context, builder, signature, args):
        vector = ir.VectorType(_I8, LANES)
        pointer = _element_pointer(context, builder, signature.args[0], *args)
        loaded = builder.load(builder.bitcast(pointer, vector.as_pointer()), align=1)
        return builder.uitofp(loaded, _V_F32)

    return vec16(array, types.intp), codegen


@intrinsic
def vselect_less(typingctx, a, b, yes, no):
    """vselect_less(a, b, yes, no) -> vector: a < b ? yes : no, which is `no` where a or b is NaN."""
    if (a, b, yes, no) != (vec16,) * 4:
        return None

    def codegen(context, builder, signature, args):
        a, b, yes, no = args
        return builder.select(_less(builder, a, b), yes, no)

    return vec16(vec16, vec16, vec16, vec16), codegen


# --- blocks -----------------------------------------------------------------------------------------------


@intrinsic
def element(typingctx, array, offset):
    """element(array, offset): the stored element at a flat offset, any dtype; no bounds, no wrap-around."""
    if not isinstance(array, types.Array):
        return None

    def codegen(context, builder, signature, args):
        array_type = signature.args[0]
        pointer = _element_pointer(context, builder, array_type, *args)
        return context.unpack_value(builder, array_type.dtype, pointer)

    return array.dtype(array, types.intp), codegen


@intrinsic
def wide_registers(typingctx):
    """wide_registers() -> bool, known when the kernel is compiled: 32 registers of 16 floats (AVX-512)."""

    def codegen(context, builder, signature, args):
        return _I1(isa_of(context).vector_bits == 512)

    return types.boolean(), codegen


@intrinsic
def vtranspose(typingctx, source, offset, row, target, target_offset, target_row):
    """vtranspose(source, offset, row, target, target_offset, target_row): a 16 x 16 block, transposed.

    `row` and `target_row` are the distances between rows, in elements. Both arrays may have any stored type.
    """
    if not _is_stored_array(source) or not _is_stored_array(target):
        return None

    def codegen(context, builder, signature, args):
        source_type, target_type = signature.args[0], signature.args[3]
        source, offset, row, target, target_offset, target_row = args
        rows = []
        for r in range(LANES):
            place = builder.add(offset, builder.mul(row, row.type(r)))
            rows.append(_load(context, builder, source_type, source, place))
        # Four rounds of pairwise interleaving: row r meets row r + 8 each time.
        lanes = ir.VectorType(_I32, LANES)
        low = ir.Constant(lanes, [i // 2 + (i % 2) * LANES for i in range(LANES)])
        high = ir.Constant(lanes, [LANES // 2 + i // 2 + (i % 2) * LANES for i in range(LANES)])
        for _ in range(4):
            half = LANES // 2
            rows = [
                builder.shuffle_vector(rows[r // 2], rows[r // 2 + half], high if r % 2 else low)
                for r in range(LANES)
            ]
        for r in range(LANES):
            place = builder.add(target_offset, builder.mul(target_row, target_row.type(r)))
            _store(context, builder, target_type, target, place, rows[r])
        return context.get_dummy_value()

    index = types.intp
    return types.void(source, index, index, target, index, index), codegen


@intrinsic(prefer_literal=True)
def vblock(
    typingctx,
    rows,
    vectors,
    accumulate,
    depth,
    a,
    a_offset,
    a_row,
    a_step,
    b,
    b_offset,
    b_step,
    c,
    c_offset,
    c_row,
):
    """c[r, n] (+)= sum_t a[r, t] b[t, n] for r < rows, n < 16 * vectors: a product held in registers.

    Parameters
    ----------
    rows, vectors : integer literals; rows * vectors sums are live: 24 fit in AVX-512's registers, 8 in AVX2's
    accumulate : bool; True adds to c, False overwrites it
    depth : number of terms t
    a, a_offset, a_row, a_step : float32 array; a[r, t] is at a_offset + r a_row + t a_step
    b, b_offset, b_step : float32 array; b[t, n] is at b_offset + t b_step + n
    c, c_offset, c_row : float32 array; c[r, n] is at c_offset + r c_row + n
    """
    literals = isinstance(rows, types.IntegerLiteral) and isinstance(vectors, types.IntegerLiteral)
    if not literals or any(not isinstance(x, types.Array) or x.dtype != types.float32 for x in (a, b, c)):
        return None
    num_rows, num_vectors = rows.literal_value, vectors.literal_value

    def codegen(context, builder, signature, args):
        accumulate, depth, a, a_offset, a_row, a_step, b, b_offset, b_step, c, c_offset, c_row = args[2:]
        a_type, b_type, c_type = (signature.args[i] for i in (4, 8, 11))
        a_data = context.make_array(a_type)(context, builder, a).data
        b_data = context.make_array(b_type)(context, builder, b).data
        c_data = context.make_array(c_type)(context, builder, c).data

        def vector_at(data, place):
            return builder.bitcast(builder.gep(data, [place]), _V_F32.as_pointer())

        def place_in_c(r, v):
            row_start = builder.add(c_offset, builder.mul(c_row, c_row.type(r)))
            return vector_at(c_data, builder.add(row_start, c_row.type(16 * v)))

        places = [[place_in_c(r, v) for v in range(num_vectors)] for r in range(num_rows)]
        sums = [[cgutils.alloca_once_value(builder, _const(0.0, _V_F32)) for _ in line] for line in places]
        with builder.if_then(accumulate):
            for line, start in zip(sums, places, strict=True):
                for total, place in zip(line, start, strict=True):
                    builder.store(builder.load(place, align=4), total)
        a_places = [builder.add(a_offset, builder.mul(a_row, a_row.type(r))) for r in range(num_rows)]
        with cgutils.for_range(builder, depth) as loop:
            b_place = builder.add(b_offset, builder.mul(loop.index, b_step))
            columns = [
                builder.load(vector_at(b_data, builder.add(b_place, b_place.type(16 * v))), align=4)
                for v in range(num_vectors)
            ]
            step = builder.mul(loop.index, a_step)
            for a_place, line in zip(a_places, sums, strict=True):
                factor = _splat(builder, builder.load(builder.gep(a_data, [builder.add(a_place, step)])))
                for column, total in zip(columns, line, strict=True):
                    builder.store(_fma(builder, factor, column, builder.load(total)), total)
        for line, start in zip(sums, places, strict=True):
            for total, place in zip(line, start, strict=True):
                builder.store(builder.load(total), place, align=4)
        return context.get_dummy_value()

    index = types.intp
    result = types.void(
        rows, vectors, types.boolean, index, a, index, index, index, b, index, index, c, index, index
    )
    return result, codegen


# --- threads ----------------------------------------------------------------------------------------------


@intrinsic
def claim(typingctx, counter):
    """claim(counter) -> int64: counter[0], which grows by one in the same step, whatever other threads do."""
    if not isinstance(counter, types.Array) or counter.dtype != types.int64:
        return None

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", data, ir.IntType(64)(1), "monotonic")

    return types.int64(counter), codegen


# --- gelu -------------------------------------------------------------------------------------------------

# log2 of the normal tail Q(z) = erfc(z / sqrt 2) / 2 is -1 + z P(z): 3.6e-8 (1 + z) in Q itself, for all z >= 0
_TAIL = (
    -1.1511079,
    -0.4591799,
    -0.052594446,
    0.0072209137,
    -0.00026807096,
    -0.00012789881,
    2.633287e-05,
    -1.6848753e-06,
)
# 2^r, |r| <= 0.5, exact at 0: 9.1e-8
_EXP2 = (1.0, 0.693147, 0.24022242, 0.055507336, 0.009671513, 0.0013264727)


def _emit_gelu(context: Any, builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """x Phi(x) = max(x, 0) - |x| Q(|x|), Q the tail of the normal distribution; -inf gives 0, the limit.

    Q as a power of two has neither the cancellation of 1 + erf nor its two branches: 22 operations, not 35.
    """
    typ, zero = x.type, _const(0.0, x.type)
    z, largest = _fabs(builder, x), _const(float(np.finfo(np.float32).max), typ)
    z = builder.select(_less(builder, largest, z), largest, z)  # inf * 0 would be NaN
    power = _fma(builder, _horner(builder, z, _TAIL), z, _const(-1.0, typ))
    # Q(z) must become 0 before z gets so large that z Q(z) is not: at -127 where the exponent is put together
    # from bits, at -200 where an instruction does it and knows subnormals.
    scalef = _has_scalef(context, typ)
    low = _const(-200.0 if scalef else -127.0, typ)
    power = builder.select(_less(builder, power, low), low, power)
    shifted = _add(builder, power, _const(_MAGIC, typ))
    n = _sub(builder, shifted, _const(_MAGIC, typ))
    tail = _horner(builder, _sub(builder, power, n), _EXP2)
    tail = _scalef(builder, tail, n) if scalef else _times_power_of_two(builder, tail, shifted)
    positive = builder.select(_less(builder, x, zero), zero, x)
    return _fma(builder, builder.fneg(z, flags=("nsz",)), tail, positive)


gelu_f32, vgelu = _function_pair("gelu", "x Phi(x), off by at most 1.1e-7 max(1, |x Phi(x)|).", _emit_gelu)

"""Elementary functions for the CPU kernels: one emitter each, from which both a scalar and a vector function come.

float32 in and out, no branches, NaN gives NaN. `exp_f32`, `tanh_f32`, `erf_f32`, `sigmoid_f32` for one value and
`vexp`, `vtanh`, `verf`, `vsigmoid` for a vector: at most 2 ulp over all float32 values. `exp_narrow_f32` and
`vexp_narrow`, `gelu_f32` and `vgelu` have bounds of their own, in their docstrings. LLVM vectorises plain loops
over the scalar forms. The polynomials are minimax fits in the relative error, rounded to float32 coefficient by
coefficient; the errors given beside them are of the fit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from . import simd_emit as emit
from .isa import isa_of
from .simd import V_F32, vec16

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
    shifted = emit.fma(builder, x, emit.const(_LOG2_E, typ), emit.const(_MAGIC, typ))
    n = emit.sub(builder, shifted, emit.const(_MAGIC, typ))
    r = emit.fma(builder, n, emit.const(-_LN2_HIGH, typ), x)
    r = emit.fma(builder, n, emit.const(-_LN2_LOW, typ), r)
    return shifted, n, r


def _has_scalef(context: Any, typ: ir.Type) -> bool:
    """Whether x * 2^n, with gradual underflow, is one instruction (AVX-512 has it)."""
    return typ == V_F32 and isa_of(context).vector_bits == 512


def _scalef(builder: ir.IRBuilder, x: ir.Value, n: ir.Value, keep: ir.Value | None = None) -> ir.Value:
    """x * 2^n, and 0 in the lanes where `keep` is false."""
    function = emit.declare(
        builder, "llvm.x86.avx512.mask.scalef.ps.512", V_F32, [V_F32, V_F32, V_F32, emit.I16, emit.I32]
    )
    mask = emit.I16(-1) if keep is None else builder.bitcast(keep, emit.I16)
    rounding = emit.I32(4)  # the thread's mode
    return builder.call(function, [x, n, emit.const(0.0, V_F32), mask, rounding])


def emit_exp(context: Any, builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """e^x over the whole float32 range, with gradual underflow."""
    typ, i32 = x.type, emit.shaped(emit.I32, x.type)
    # Below -104 the result rounds to 0, above 89 to inf; NaN fails both comparisons and stays.
    low, high = emit.const(-104.0, typ), emit.const(89.0, typ)
    x = builder.select(emit.less(builder, x, low), low, x)
    x = builder.select(emit.less(builder, high, x), high, x)
    shifted, n, r = _round_by_ln2(builder, x)
    # 1 is added last: the sum below it is at most 0.42, so its own rounding hardly counts.
    power = emit.fma(builder, emit.mul(builder, r, r), emit.horner(builder, r, _EXP), r)
    power = emit.add(builder, power, emit.const(1.0, typ))
    if _has_scalef(context, typ):
        return _scalef(builder, power, n)
    # 2^n in two factors, because 2^-150 and 2^128 are no normal floats; only the second product rounds.
    n = builder.sub(builder.bitcast(shifted, i32), emit.const(_MAGIC_BITS, i32))
    half = builder.ashr(n, emit.const(1, i32))
    for part in (half, builder.sub(n, half)):
        biased = builder.shl(builder.add(part, emit.const(127, i32)), emit.const(23, i32))
        power = emit.mul(builder, power, builder.bitcast(biased, typ))
    return power


def _times_power_of_two(builder: ir.IRBuilder, x: ir.Value, shifted: ir.Value) -> ir.Value:
    """x * 2^n for -126 <= n <= 127, with n in the low bits of `shifted`."""
    i32 = emit.shaped(emit.I32, x.type)
    exponent = builder.shl(builder.bitcast(shifted, i32), emit.const(23, i32))
    one = builder.bitcast(emit.const(1.0, x.type), i32)
    return emit.mul(builder, x, builder.bitcast(builder.add(exponent, one), x.type))


def emit_exp_narrow(context: Any, builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """e^x for x <= 88, and 0 below -87: no subnormal results. NaN gives NaN."""
    typ = x.type
    low = emit.const(-87.0, typ)
    if _has_scalef(context, typ):
        _, n, r = _round_by_ln2(builder, x)
        keep = builder.fcmp_unordered(">=", x, low, flags=("nsz",))
        return _scalef(builder, emit.horner(builder, r, _EXP_SHORT), n, keep)
    below = emit.less(builder, x, low)
    shifted, _, r = _round_by_ln2(builder, builder.select(below, low, x))
    power = _times_power_of_two(builder, emit.horner(builder, r, _EXP_SHORT), shifted)
    return builder.select(below, emit.const(0.0, typ), power)


# tanh(x) = x + x s P(s), s = x^2, |x| <= 0.6: 2.8e-9
_TANH = (-0.333333, 0.13331936, -0.053784717, 0.020798625, -0.0058979667)


def emit_tanh(context: Any, builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """tanh x: a polynomial up to 0.6, else 1 - 2 / (e^2|x| + 1)."""
    typ = x.type
    magnitude, square, one = emit.fabs(builder, x), emit.mul(builder, x, x), emit.const(1.0, typ)
    inner = emit.fma(builder, emit.mul(builder, emit.horner(builder, square, _TANH), square), x, x)
    power = emit_exp(context, builder, emit.mul(builder, magnitude, emit.const(2.0, typ)))
    outer = emit.sub(builder, one, emit.div(builder, emit.const(2.0, typ), emit.add(builder, power, one)))
    outer = emit.copysign(builder, outer, x)
    return builder.select(emit.less(builder, magnitude, emit.const(0.6, typ)), inner, outer)


# erf(x) = x + x P(x^2), |x| <= 0.93: 1.8e-8
_ERF_INNER = (0.12837915, -0.3761249, 0.11281731, -0.026762964, 0.0049873474, -0.00059595495)
# erf(x) = 1 - e^(-x + x Q(x)), 0.92 <= x <= 4: 2.9e-9
_ERF_OUTER = (-0.12851076, -0.6357309, -0.1052447, 0.02287866, -0.0032113409, 0.00021353672)


def emit_erf(context: Any, builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """erf x: a polynomial up to 0.925, else 1 minus the exponential of a polynomial (log erfc is smooth)."""
    typ = x.type
    magnitude, square, four = emit.fabs(builder, x), emit.mul(builder, x, x), emit.const(4.0, typ)
    inner = emit.fma(builder, emit.horner(builder, square, _ERF_INNER), x, x)
    # erf is 1 in float32 from 3.92 on.
    t = builder.select(emit.less(builder, four, magnitude), four, magnitude)
    minus_t = builder.fneg(t, flags=("nsz",))
    exponent = emit.fma(builder, emit.horner(builder, t, _ERF_OUTER), t, minus_t)
    outer = emit.sub(builder, emit.const(1.0, typ), emit_exp_narrow(context, builder, exponent))
    outer = emit.copysign(builder, outer, x)
    return builder.select(emit.less(builder, magnitude, emit.const(0.925, typ)), inner, outer)


def emit_sigmoid(context: Any, builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """1 / (1 + e^-x), as e^x / (1 + e^x) for negative x: neither form overflows."""
    typ, one = x.type, emit.const(1.0, x.type)
    power = emit_exp(context, builder, builder.fneg(emit.fabs(builder, x), flags=("nsz",)))
    negative = emit.less(builder, x, emit.const(0.0, typ))
    total = emit.add(builder, one, power)
    quotient = emit.div(builder, builder.select(negative, power, one), total)
    # What rounding took from 1 + e^-|x|, times 1 / (1 + e^-|x|): without it the error reaches 2.4 ulp.
    lost = emit.sub(builder, power, emit.sub(builder, total, one))
    inverse = builder.select(negative, emit.sub(builder, one, quotient), quotient)
    correction = emit.mul(builder, emit.mul(builder, quotient, lost), inverse)
    return emit.sub(builder, quotient, correction)


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


def emit_gelu(context: Any, builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """x Phi(x) = max(x, 0) - |x| Q(|x|), Q the tail of the normal distribution; -inf gives 0, the limit.

    Q as a power of two has neither the cancellation of 1 + erf nor its two branches: 22 operations, not 35.
    """
    typ, zero = x.type, emit.const(0.0, x.type)
    z, largest = emit.fabs(builder, x), emit.const(float(np.finfo(np.float32).max), typ)
    z = builder.select(emit.less(builder, largest, z), largest, z)  # inf * 0 would be NaN
    power = emit.fma(builder, emit.horner(builder, z, _TAIL), z, emit.const(-1.0, typ))
    # Q(z) must become 0 before z gets so large that z Q(z) is not: at -127 where the exponent is put together
    # from bits, at -200 where an instruction does it and knows subnormals.
    scalef = _has_scalef(context, typ)
    low = emit.const(-200.0 if scalef else -127.0, typ)
    power = builder.select(emit.less(builder, power, low), low, power)
    shifted = emit.add(builder, power, emit.const(_MAGIC, typ))
    n = emit.sub(builder, shifted, emit.const(_MAGIC, typ))
    tail = emit.horner(builder, emit.sub(builder, power, n), _EXP2)
    tail = _scalef(builder, tail, n) if scalef else _times_power_of_two(builder, tail, shifted)
    positive = builder.select(emit.less(builder, x, zero), zero, x)
    return emit.fma(builder, builder.fneg(z, flags=("nsz",)), tail, positive)


def _function_pair(
    name: str, meaning: str, emitter: Callable[[Any, ir.IRBuilder, ir.Value], ir.Value]
) -> tuple[Any, Any]:
    """The scalar and the vector intrinsic of one elementary function."""

    def scalar(typingctx, x):
        def codegen(context, builder, signature, args):
            return emitter(context, builder, args[0])

        return types.float32(types.float32), codegen

    def vector(typingctx, x):
        if x != vec16:
            return None

        def codegen(context, builder, signature, args):
            return emitter(context, builder, args[0])

        return vec16(vec16), codegen

    for function, own_name in ((scalar, f"{name}_f32"), (vector, f"v{name}")):
        function.__name__ = function.__qualname__ = own_name
        function.__doc__ = f"{own_name}(x): {meaning}"
    return intrinsic(scalar), intrinsic(vector)


exp_f32, vexp = _function_pair("exp", "e^x, <= 2 ulp, subnormal results included.", emit_exp)
tanh_f32, vtanh = _function_pair("tanh", "tanh x, <= 2 ulp.", emit_tanh)
erf_f32, verf = _function_pair("erf", "the error function of x, <= 2 ulp.", emit_erf)
sigmoid_f32, vsigmoid = _function_pair("sigmoid", "1 / (1 + e^-x), <= 2 ulp.", emit_sigmoid)
exp_narrow_f32, vexp_narrow = _function_pair(
    "exp_narrow", "e^x for x <= 88, 0 below -87; <= 3 ulp, cheaper than exp.", emit_exp_narrow
)
gelu_f32, vgelu = _function_pair("gelu", "x Phi(x), off by at most 1.1e-7 max(1, |x Phi(x)|).", emit_gelu)

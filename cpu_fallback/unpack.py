"""b-bit codes and block matmuls in registers: what `decode` is made of.

A run of 32 codes is stored as bit planes (`rbe_gpu.codecs.packing`). Sixteen codes of a plane are one load, one
variable shift, one mask and one conversion to float32; codes of several planes are put together as bytes first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ._jit import cpu_inline
from .int8_codes import run_bytes
from .int8_simd import run_half
from .simd import LANES, vec16, vfma, vload, vsplat, vstore

_BYTE, _WORD, _FLOAT = ir.IntType(8), ir.IntType(32), ir.FloatType()


def _lanes_of_plane(width: int, half: int) -> Any:
    """Intrinsic (packed, at) -> vec16: the low or high 16 codes of the plane of `width` bits at byte `at`."""
    step = 4 * width  # bytes of the plane
    loaded = min(step, LANES)
    first = LANES * half if step > LANES else 0
    code = [LANES * half + lane for lane in range(LANES)]
    pick = [c % step - first for c in code]
    shift = [c // step * width for c in code]

    @intrinsic
    def lanes(typingctx, packed, at):  # type: ignore[no-untyped-def]
        if not (
            isinstance(packed, types.Array) and packed.dtype == types.uint8 and isinstance(at, types.Integer)
        ):
            return None

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            array_type, at_type = signature.args
            data = context.make_array(array_type)(context, builder, args[0]).data
            at64 = context.cast(builder, args[1], at_type, types.int64)
            offset = builder.add(at64, ir.Constant(at64.type, first))
            pointer = builder.gep(data, [offset])
            source = builder.bitcast(pointer, ir.VectorType(_BYTE, loaded).as_pointer())
            raw = builder.load(source, align=1)
            if pick != list(range(LANES)):
                mask = ir.Constant(ir.VectorType(_WORD, LANES), [ir.Constant(_WORD, p) for p in pick])
                raw = builder.shuffle_vector(raw, ir.Constant(raw.type, ir.Undefined), mask)
            words_type = ir.VectorType(_WORD, LANES)
            words = builder.zext(raw, words_type)
            if any(shift):
                words = builder.lshr(words, ir.Constant(words_type, [ir.Constant(_WORD, s) for s in shift]))
            if width < 8:
                ones = ir.Constant(words_type, [ir.Constant(_WORD, (1 << width) - 1)] * LANES)
                words = builder.and_(words, ones)
            return builder.uitofp(words, ir.VectorType(_FLOAT, LANES))

        return vec16(packed, at), codegen

    return lanes


lanes8_low, lanes8_high = _lanes_of_plane(8, 0), _lanes_of_plane(8, 1)
lanes4_low, lanes4_high = _lanes_of_plane(4, 0), _lanes_of_plane(4, 1)
lanes2_low, lanes2_high = _lanes_of_plane(2, 0), _lanes_of_plane(2, 1)
lanes1_low, lanes1_high = _lanes_of_plane(1, 0), _lanes_of_plane(1, 1)


@cpu_inline
def run_codes(packed, at, width):
    """The 32 codes of `width` bits at byte `at`, as float32: two vectors."""
    # of several planes: as bytes, 5 bits take 18 instructions of AVX2 instead of 40
    if width in (3, 5, 6, 7):
        run = run_bytes(packed, at, width)
        return run_half(0, run), run_half(1, run)
    low, high = vsplat(np.float32(0)), vsplat(np.float32(0))
    if width & 8:
        low, high = lanes8_low(packed, at), lanes8_high(packed, at)
        at += 32
    if width & 4:
        low_4, high_4 = lanes4_low(packed, at), lanes4_high(packed, at)
        at += 16
        if width > 7:
            up = vsplat(np.float32(16))
            low, high = vfma(low, up, low_4), vfma(high, up, high_4)
        else:
            low, high = low_4, high_4
    if width & 2:
        low_2, high_2 = lanes2_low(packed, at), lanes2_high(packed, at)
        at += 8
        if width > 3:
            up = vsplat(np.float32(4))
            low, high = vfma(low, up, low_2), vfma(high, up, high_2)
        else:
            low, high = low_2, high_2
    if width & 1:
        low_1, high_1 = lanes1_low(packed, at), lanes1_high(packed, at)
        if width > 1:
            up = vsplat(np.float32(2))
            low, high = vfma(low, up, low_1), vfma(high, up, high_1)
        else:
            low, high = low_1, high_1
    return low, high


@cpu_inline
def unpack_run(packed, at, width, factor, offset, out, start):
    """out[start : start + 32] = factor * code + offset, for the 32 codes of `width` bits at byte `at`.

    packed : uint8, C-contiguous, `at` counts from its first byte; out : float32, C-contiguous, flat `start`
    """
    low, high = run_codes(packed, at, width)
    f, o = vsplat(factor), vsplat(offset)
    vstore(out, start, vfma(f, low, o))
    vstore(out, start + 16, vfma(f, high, o))


@intrinsic
def vbroadcast(typingctx, array, offset):  # type: ignore[no-untyped-def]
    """vbroadcast(array, offset) -> vec16: the float32 at flat `offset` in every lane."""
    if not (isinstance(array, types.Array) and array.dtype == types.float32):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        value = builder.load(builder.gep(data, [args[1]]))
        typ = ir.VectorType(_FLOAT, LANES)
        lane = builder.insert_element(ir.Constant(typ, ir.Undefined), value, _WORD(0))
        zeros = ir.Constant(ir.VectorType(_WORD, LANES), [0] * LANES)
        return builder.shuffle_vector(lane, ir.Constant(typ, ir.Undefined), zeros)

    return vec16(array, types.int64), codegen


@cpu_inline
def multiply_4x64(a, a_at, a_step, b, b_at, b_step, depth, out, out_at, out_step):
    """out[4, 64] = a[4, depth] @ b[depth, 64]; flat offsets and row steps; 16 accumulators of 16 lanes."""
    zero = vsplat(np.float32(0))
    c00, c01, c02, c03 = zero, zero, zero, zero
    c10, c11, c12, c13 = zero, zero, zero, zero
    c20, c21, c22, c23 = zero, zero, zero, zero
    c30, c31, c32, c33 = zero, zero, zero, zero
    for k in range(depth):
        at = b_at + k * b_step
        b0, b1, b2, b3 = vload(b, at), vload(b, at + 16), vload(b, at + 32), vload(b, at + 48)
        s = vbroadcast(a, a_at + k)
        c00, c01, c02, c03 = vfma(s, b0, c00), vfma(s, b1, c01), vfma(s, b2, c02), vfma(s, b3, c03)
        s = vbroadcast(a, a_at + a_step + k)
        c10, c11, c12, c13 = vfma(s, b0, c10), vfma(s, b1, c11), vfma(s, b2, c12), vfma(s, b3, c13)
        s = vbroadcast(a, a_at + 2 * a_step + k)
        c20, c21, c22, c23 = vfma(s, b0, c20), vfma(s, b1, c21), vfma(s, b2, c22), vfma(s, b3, c23)
        s = vbroadcast(a, a_at + 3 * a_step + k)
        c30, c31, c32, c33 = vfma(s, b0, c30), vfma(s, b1, c31), vfma(s, b2, c32), vfma(s, b3, c33)
    vstore(out, out_at, c00)
    vstore(out, out_at + 16, c01)
    vstore(out, out_at + 32, c02)
    vstore(out, out_at + 48, c03)
    vstore(out, out_at + out_step, c10)
    vstore(out, out_at + out_step + 16, c11)
    vstore(out, out_at + out_step + 32, c12)
    vstore(out, out_at + out_step + 48, c13)
    vstore(out, out_at + 2 * out_step, c20)
    vstore(out, out_at + 2 * out_step + 16, c21)
    vstore(out, out_at + 2 * out_step + 32, c22)
    vstore(out, out_at + 2 * out_step + 48, c23)
    vstore(out, out_at + 3 * out_step, c30)
    vstore(out, out_at + 3 * out_step + 16, c31)
    vstore(out, out_at + 3 * out_step + 32, c32)
    vstore(out, out_at + 3 * out_step + 48, c33)


@cpu_inline
def multiply_4x32(a, a_at, a_step, b, b_at, b_step, depth, out, out_at, out_step):
    """out[4, 32] = a[4, depth] @ b[depth, 32], as `multiply_4x64`."""
    zero = vsplat(np.float32(0))
    c00, c01 = zero, zero
    c10, c11 = zero, zero
    c20, c21 = zero, zero
    c30, c31 = zero, zero
    for k in range(depth):
        at = b_at + k * b_step
        b0, b1 = vload(b, at), vload(b, at + 16)
        s = vbroadcast(a, a_at + k)
        c00, c01 = vfma(s, b0, c00), vfma(s, b1, c01)
        s = vbroadcast(a, a_at + a_step + k)
        c10, c11 = vfma(s, b0, c10), vfma(s, b1, c11)
        s = vbroadcast(a, a_at + 2 * a_step + k)
        c20, c21 = vfma(s, b0, c20), vfma(s, b1, c21)
        s = vbroadcast(a, a_at + 3 * a_step + k)
        c30, c31 = vfma(s, b0, c30), vfma(s, b1, c31)
    vstore(out, out_at, c00)
    vstore(out, out_at + 16, c01)
    vstore(out, out_at + out_step, c10)
    vstore(out, out_at + out_step + 16, c11)
    vstore(out, out_at + 2 * out_step, c20)
    vstore(out, out_at + 2 * out_step + 16, c21)
    vstore(out, out_at + 3 * out_step, c30)
    vstore(out, out_at + 3 * out_step + 16, c31)


@cpu_inline
def multiply_4x16(a, a_at, a_step, b, b_at, b_step, depth, out, out_at, out_step):
    """out[4, 16] = a[4, depth] @ b[depth, 16], as `multiply_4x64`; its sums fit the registers of AVX2 and NEON."""
    zero = vsplat(np.float32(0))
    c0, c1, c2, c3 = zero, zero, zero, zero
    for k in range(depth):
        line = vload(b, b_at + k * b_step)
        c0 = vfma(vbroadcast(a, a_at + k), line, c0)
        c1 = vfma(vbroadcast(a, a_at + a_step + k), line, c1)
        c2 = vfma(vbroadcast(a, a_at + 2 * a_step + k), line, c2)
        c3 = vfma(vbroadcast(a, a_at + 3 * a_step + k), line, c3)
    vstore(out, out_at, c0)
    vstore(out, out_at + out_step, c1)
    vstore(out, out_at + 2 * out_step, c2)
    vstore(out, out_at + 3 * out_step, c3)


@cpu_inline
def multiply_1x32(a, a_at, b, b_at, b_step, depth, out, out_at):
    """out[32] = a[depth] @ b[depth, 32]: the rows that are left over."""
    low, high = vsplat(np.float32(0)), vsplat(np.float32(0))
    for k in range(depth):
        s = vbroadcast(a, a_at + k)
        at = b_at + k * b_step
        low, high = vfma(s, vload(b, at), low), vfma(s, vload(b, at + 16), high)
    vstore(out, out_at, low)
    vstore(out, out_at + 16, high)


@cpu_inline
def multiply_1x64(a, a_at, b, b_at, b_step, depth, out, out_at):
    """out[64] = a[depth] @ b[depth, 64]: four sums in a row hide the latency of one."""
    zero = vsplat(np.float32(0))
    c0, c1, c2, c3 = zero, zero, zero, zero
    for k in range(depth):
        s = vbroadcast(a, a_at + k)
        at = b_at + k * b_step
        c0, c1 = vfma(s, vload(b, at), c0), vfma(s, vload(b, at + 16), c1)
        c2, c3 = vfma(s, vload(b, at + 32), c2), vfma(s, vload(b, at + 48), c3)
    vstore(out, out_at, c0)
    vstore(out, out_at + 16, c1)
    vstore(out, out_at + 32, c2)
    vstore(out, out_at + 48, c3)


@cpu_inline
def add_scaled(p, pattern, pattern_at, out, out_at, count):
    """out[out_at + c] += p * pattern[pattern_at + c], c < count, a multiple of 16."""
    factor = vsplat(p)
    for c in range(0, count, 16):
        vstore(out, out_at + c, vfma(factor, vload(pattern, pattern_at + c), vload(out, out_at + c)))

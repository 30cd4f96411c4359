"""Vectors of 16 floats for the CPU kernels: loads, stores, arithmetic and blocks; conversion of stored elements.

Everything here is an LLVM intrinsic emitted straight into the kernel that uses it. One source serves every
CPU: LLVM splits `<16 x float>` into one AVX-512, two AVX2 or four NEON registers. `simd_emit` has what the
intrinsics are written with, `simd_math` the elementary functions.

Storage types. Numba has neither half type on the CPU, so kernels see bit patterns: float16 arrays as uint16,
bfloat16 arrays as int16 (`bits` makes that view). Loads widen to float32, stores narrow by the array's type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from . import simd_emit as emit
from ._numba_internals import cgutils
from .isa import isa_of

LANES = 16
_FLOAT32 = np.dtype(np.float32)

V_F32 = ir.VectorType(emit.F32, LANES)

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
        super().__init__(dmm, fe_type, V_F32)


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


# --- storage <-> float32 ------------------------------------------------------------------------------------


@intrinsic
def widen(typingctx, value):
    """widen(value) -> float32: a stored element (float32, float16 bits, bfloat16 bits) as float32."""
    if value not in _STORAGE:
        return None

    def codegen(context, builder, signature, args):
        return emit.widen(context, builder, signature.args[0], args[0])

    return types.float32(value), codegen


@intrinsic
def narrow(typingctx, array, value):
    """narrow(array, value) -> array's element type: float32 rounded to nearest even, to store in `array`."""
    if not isinstance(array, types.Array) or array.dtype not in _STORAGE:
        return None

    def codegen(context, builder, signature, args):
        return emit.narrow(context, builder, signature.args[0].dtype, args[1])

    return array.dtype(array, types.float32), codegen


# --- loads and stores ---------------------------------------------------------------------------------------


def _element_pointer(
    context: Any, builder: ir.IRBuilder, array: types.Array, value: ir.Value, offset: ir.Value
) -> ir.Value:
    """Pointer to the element `offset` places after the first element of the array, whatever its strides."""
    data = context.make_array(array)(context, builder, value).data
    return builder.gep(data, [offset])


def _storage_type(storage: types.Type) -> ir.Type:
    return emit.F32 if storage == types.float32 else emit.I16


def _lane_mask(builder: ir.IRBuilder, count: ir.Value) -> ir.Value:
    """True in lanes 0 .. count - 1."""
    index_type = ir.VectorType(ir.IntType(64), LANES)
    ramp = ir.Constant(index_type, list(range(LANES)))
    return builder.icmp_signed("<", ramp, _splat(builder, count))


def _splat(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    typ = ir.VectorType(value.type, LANES)
    first = builder.insert_element(ir.Constant(typ, ir.Undefined), value, emit.I32(0))
    return builder.shuffle_vector(
        first, ir.Constant(typ, ir.Undefined), ir.Constant(ir.VectorType(emit.I32, LANES), [0] * LANES)
    )


def _is_stored_array(array: types.Type) -> bool:
    return isinstance(array, types.Array) and array.dtype in _STORAGE


def _load(
    context: Any, builder: ir.IRBuilder, array: types.Array, value: ir.Value, offset: ir.Value
) -> ir.Value:
    """16 elements as float32."""
    vector = ir.VectorType(_storage_type(array.dtype), LANES)
    pointer = builder.bitcast(_element_pointer(context, builder, array, value, offset), vector.as_pointer())
    return emit.widen(context, builder, array.dtype, builder.load(pointer, align=array.dtype.bitwidth // 8))


def _store(
    context: Any,
    builder: ir.IRBuilder,
    array: types.Array,
    value: ir.Value,
    offset: ir.Value,
    vector: ir.Value,
) -> None:
    """16 float32 values, rounded to the array's type."""
    stored = emit.narrow(context, builder, array.dtype, vector)
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
        name = f"llvm.masked.load.{'v16f32' if element == emit.F32 else 'v16i16'}.p0"
        function = emit.declare(builder, name, vector, [vector.as_pointer(), emit.I32, mask.type, vector])
        loaded = builder.call(
            function,
            [
                builder.bitcast(pointer, vector.as_pointer()),
                emit.I32(storage.bitwidth // 8),
                mask,
                emit.const(0, vector),
            ],
        )
        return emit.widen(context, builder, storage, loaded)

    return vec16(array, types.intp, types.intp), codegen


@intrinsic
def vstore_n(typingctx, array, offset, vector, count):
    """vstore_n(array, offset, vector, count): write the first `count` lanes (0..16) and nothing else."""
    if not _is_stored_array(array) or vector != vec16:
        return None

    def codegen(context, builder, signature, args):
        storage = signature.args[0].dtype
        pointer = _element_pointer(context, builder, signature.args[0], args[0], args[1])
        stored = emit.narrow(context, builder, storage, args[2])
        mask = _lane_mask(builder, args[3])
        name = f"llvm.masked.store.{'v16f32' if storage == types.float32 else 'v16i16'}.p0"
        function = emit.declare(
            builder, name, ir.VoidType(), [stored.type, stored.type.as_pointer(), emit.I32, mask.type]
        )
        builder.call(
            function,
            [
                stored,
                builder.bitcast(pointer, stored.type.as_pointer()),
                emit.I32(storage.bitwidth // 8),
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


def _binary(name: str, meaning: str, emitter: Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value]) -> Any:
    """The intrinsic of an operation on two vectors."""

    def operation(typingctx, a, b):
        if a != vec16 or b != vec16:
            return None

        def codegen(context, builder, signature, args):
            return emitter(builder, *args)

        return vec16(vec16, vec16), codegen

    operation.__name__ = operation.__qualname__ = name
    operation.__doc__ = f"{name}(a, b) -> vector: {meaning}"
    return intrinsic(operation)


def _larger(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(emit.less(builder, b, a), a, b)


vadd = _binary("vadd", "a + b.", emit.add)
vsub = _binary("vsub", "a - b.", emit.sub)
vmul = _binary("vmul", "a * b.", emit.mul)
vdiv = _binary("vdiv", "a / b.", emit.div)
vmax = _binary("vmax", "a > b ? a : b, which is b where either is NaN.", _larger)


@intrinsic
def vfma(typingctx, a, b, c):
    """vfma(a, b, c) -> vector: a * b + c, fused where the CPU can."""
    if (a, b, c) != (vec16, vec16, vec16):
        return None

    def codegen(context, builder, signature, args):
        return emit.fma(builder, *args)

    return vec16(vec16, vec16, vec16), codegen


def _fold(
    builder: ir.IRBuilder, x: ir.Value, combine: Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value]
) -> ir.Value:
    """Combine the 16 lanes into one value: halves, quarters, and so on."""
    width = LANES
    while width > 1:
        width //= 2
        lanes = ir.VectorType(emit.I32, width)
        low, high = (
            builder.shuffle_vector(x, x, ir.Constant(lanes, list(range(start, start + width))))
            for start in (0, width)
        )
        x = combine(builder, low, high)
    return builder.extract_element(x, emit.I32(0))


@intrinsic
def vsum(typingctx, vector):
    """vsum(vector) -> float32: sum of the lanes, pairwise."""
    if vector != vec16:
        return None

    def codegen(context, builder, signature, args):
        return _fold(builder, args[0], emit.add)

    return types.float32(vec16), codegen


@intrinsic
def store_sums(typingctx, a, b, c, d, array, offset):
    """store_sums(a, b, c, d, array, offset): the sums of the lanes of four vectors to float32 at flat `offset` on."""
    if any(x != vec16 for x in (a, b, c, d)) or not (
        isinstance(array, types.Array) and array.dtype == types.float32
    ):
        return None

    def codegen(context, builder, signature, args):
        sums = emit.sum_lanes(builder, list(args[:4]), lambda x, y: emit.add(builder, x, y))
        pointer = _element_pointer(context, builder, signature.args[4], *args[4:])
        builder.store(sums, builder.bitcast(pointer, sums.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(vec16, vec16, vec16, vec16, array, types.intp), codegen


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
        vector = ir.VectorType(ir.IntType(8), LANES)
        pointer = _element_pointer(context, builder, signature.args[0], *args)
        loaded = builder.load(builder.bitcast(pointer, vector.as_pointer()), align=1)
        return builder.uitofp(loaded, V_F32)

    return vec16(array, types.intp), codegen


@intrinsic
def vselect_less(typingctx, a, b, yes, no):
    """vselect_less(a, b, yes, no) -> vector: a < b ? yes : no, which is `no` where a or b is NaN."""
    if (a, b, yes, no) != (vec16,) * 4:
        return None

    def codegen(context, builder, signature, args):
        a, b, yes, no = args
        return builder.select(emit.less(builder, a, b), yes, no)

    return vec16(vec16, vec16, vec16, vec16), codegen


def _rearranged(name: str, meaning: str, lanes: list[int]) -> Any:
    """The intrinsic that gives lane lanes[i] of (vector, -vector) in lane i."""

    def operation(typingctx, vector):
        if vector != vec16:
            return None

        def codegen(context, builder, signature, args):
            order = ir.Constant(ir.VectorType(emit.I32, LANES), lanes)
            return builder.shuffle_vector(args[0], builder.fneg(args[0]), order)

        return vec16(vec16), codegen

    operation.__name__ = operation.__qualname__ = name
    operation.__doc__ = f"{name}(vector) -> vector: {meaning}"
    return intrinsic(operation)


vswap = _rearranged("vswap", "lanes 2i and 2i + 1 exchanged.", [i ^ 1 for i in range(LANES)])
vtwice_low = _rearranged("vtwice_low", "lanes 0 to 7, each of them twice.", [i // 2 for i in range(LANES)])
vtwice_high = _rearranged(
    "vtwice_high", "lanes 8 to 15, each of them twice.", [LANES // 2 + i // 2 for i in range(LANES)]
)
vnegate_even = _rearranged(
    "vnegate_even",
    "the sign of lanes 0, 2, 4, ... changed.",
    [i if i % 2 else LANES + i for i in range(LANES)],
)


# --- blocks -----------------------------------------------------------------------------------------------


@intrinsic
def store_element(typingctx, array, offset, value):
    """store_element(array, offset, value): a float32, rounded to the array's type, to flat `offset`.

    `vstore_n` of one lane is no substitute: LLVM 20 makes a store of 32 bits of a bfloat16 for AVX-512.
    """
    if not _is_stored_array(array) or value != types.float32:
        return None

    def codegen(context, builder, signature, args):
        stored = emit.narrow(context, builder, signature.args[0].dtype, args[2])
        builder.store(stored, _element_pointer(context, builder, signature.args[0], *args[:2]))
        return context.get_dummy_value()

    return types.void(array, types.intp, value), codegen


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
        return ir.IntType(1)(isa_of(context).vector_bits == 512)

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
        lanes = ir.VectorType(emit.I32, LANES)
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
    """c[r, n] (+)= sum_t a[r, t] b[t, n] for r < rows, n < 16 * vectors: a matmul whose sums stay in registers.

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
            return builder.bitcast(builder.gep(data, [place]), V_F32.as_pointer())

        def place_in_c(r, v):
            row_start = builder.add(c_offset, builder.mul(c_row, c_row.type(r)))
            return vector_at(c_data, builder.add(row_start, c_row.type(16 * v)))

        places = [[place_in_c(r, v) for v in range(num_vectors)] for r in range(num_rows)]
        sums = [[cgutils.alloca_once_value(builder, emit.const(0.0, V_F32)) for _ in line] for line in places]
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
                    builder.store(emit.fma(builder, factor, column, builder.load(total)), total)
        for line, start in zip(sums, places, strict=True):
            for total, place in zip(line, start, strict=True):
                builder.store(builder.load(total), place, align=4)
        return context.get_dummy_value()

    index = types.intp
    result = types.void(
        rows, vectors, types.boolean, index, a, index, index, index, b, index, index, c, index, index
    )
    return result, codegen

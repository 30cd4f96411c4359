"""Stored codes to what `product` multiplies with: entries of sparse rows, or rows of dense ones, a few at a
time.

Everything here runs inside a product, on scratch memory of a thread: the positions and values of some rows,
or some columns of them, exist for as long as they are multiplied.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from rbe_gpu.codecs.packing import RUN

from ._jit import cpu_inline
from .isa import isa_of
from .product import BF16, F16, GRID, INT, bfloats_at, bytes_at, floats_at, halves_at, words_at
from .simd import (
    LANES,
    element,
    vec16,
    vfma,
    vload,
    vmul,
    vselect_less,
    vsplat,
    vstore,
    vsub,
    wide_registers,
    widen,
)
from .unpack import unpack_run

_ZERO, _ONE, _HALF = np.float32(0), np.float32(1), np.float32(0.5)
FULL, BITMAP, DELTA = 0, 1, 2


@intrinsic
def _compress_columns(typingctx, index, byte, first, step, out, at):  # type: ignore[no-untyped-def]
    """_compress_columns(index, byte, first, step, out, at) -> how many: out[at ...] = first + c * step for
    the bits c set in the 16 at `byte`. Writes 16 words; those behind the count are undefined."""
    if not isinstance(index, types.Array) or not isinstance(out, types.Array):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        i16, i32 = ir.IntType(16), ir.IntType(32)
        words = ir.VectorType(i32, LANES)
        bits = ir.VectorType(ir.IntType(1), LANES)
        index_data = context.make_array(signature.args[0])(context, builder, args[0]).data
        out_data = context.make_array(signature.args[4])(context, builder, args[4]).data
        source = builder.bitcast(builder.gep(index_data, [args[1]]), i16.as_pointer())
        mask = builder.load(source, align=1)
        zeros = ir.Constant(words, [0] * LANES)
        undefined = ir.Constant(words, ir.Undefined)

        def splat(value):  # type: ignore[no-untyped-def]
            lane = builder.insert_element(undefined, builder.trunc(value, i32), i32(0))
            return builder.shuffle_vector(lane, undefined, zeros)

        ramp = ir.Constant(words, list(range(LANES)))
        places = builder.add(splat(args[2]), builder.mul(ramp, splat(args[3])))
        name = "llvm.experimental.vector.compress.v16i32"
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(words, [words, bits, words]), name
        )
        packed = builder.call(function, [places, builder.bitcast(mask, bits), undefined])
        target = builder.bitcast(builder.gep(out_data, [args[5]]), words.as_pointer())
        builder.store(packed, target, align=4)
        count = builder.ctpop(mask)
        return builder.zext(count, ir.IntType(64))

    index64 = types.int64
    return index64(index, index64, index64, index64, out, index64), codegen


@intrinsic
def expand(typingctx, values, at, index, byte):  # type: ignore[no-untyped-def]
    """expand(values, at, index, byte) -> vec16: the values from place `at` on, one for every bit set in the 16 at
    index[byte], in the lanes of those bits; zeros in the others."""
    if not isinstance(values, types.Array) or not isinstance(index, types.Array):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        floats = ir.VectorType(ir.FloatType(), LANES)
        bits = ir.VectorType(ir.IntType(1), LANES)
        value_data = context.make_array(signature.args[0])(context, builder, args[0]).data
        index_data = context.make_array(signature.args[2])(context, builder, args[2]).data
        source = builder.bitcast(builder.gep(index_data, [args[3]]), ir.IntType(16).as_pointer())
        mask = builder.bitcast(builder.load(source, align=1), bits)
        pointer = builder.gep(value_data, [args[1]])
        if isa_of(context).has("avx512f"):  # from a register: the instruction that reads memory is slower
            kind = ir.FunctionType(floats, [floats, floats, bits])
            name = "llvm.x86.avx512.mask.expand.v16f32"
            function = cgutils.get_or_insert_function(builder.module, kind, name)
            loaded = builder.load(builder.bitcast(pointer, floats.as_pointer()), align=4)
            return builder.call(function, [loaded, ir.Constant(floats, [0.0] * LANES), mask])
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(floats, [pointer.type, bits, floats]),
            "llvm.masked.expandload.v16f32",
        )
        return builder.call(function, [pointer, mask, ir.Constant(floats, [0.0] * LANES)])

    return vec16(values, types.int64, index, types.int64), codegen


@intrinsic
def count_bits(typingctx, index, byte):  # type: ignore[no-untyped-def]
    """count_bits(index, byte) -> how many of the 16 bits at index[byte] are set."""
    if not isinstance(index, types.Array):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        index_data = context.make_array(signature.args[0])(context, builder, args[0]).data
        source = builder.bitcast(builder.gep(index_data, [args[1]]), ir.IntType(16).as_pointer())
        return builder.zext(builder.ctpop(builder.load(source, align=1)), ir.IntType(64))

    return types.int64(index, types.int64), codegen


@intrinsic
def _gaps_to_columns(typingctx, gaps, byte, before, step, out, at):  # type: ignore[no-untyped-def]
    """_gaps_to_columns(gaps, byte, before, step, out, at) -> the last: sixteen entries of a delta stream.

    out[at + i] = before + step * (1 + gaps[byte] + ... + 1 + gaps[byte + i]), i < 16. The last is summed by
    itself, in two words of eight bytes: groups of sixteen wait for that, and not for the running sums.
    """
    if not isinstance(gaps, types.Array) or not isinstance(out, types.Array):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        i8, i32, i64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
        words = ir.VectorType(i32, LANES)
        gap_data = context.make_array(signature.args[0])(context, builder, args[0]).data
        out_data = context.make_array(signature.args[4])(context, builder, args[4]).data
        address = builder.gep(gap_data, [args[1]])
        source = builder.bitcast(address, ir.VectorType(i8, LANES).as_pointer())
        undefined, zero = ir.Constant(words, ir.Undefined), ir.Constant(words, [0] * LANES)

        def splat(value):  # type: ignore[no-untyped-def]
            lane = builder.insert_element(undefined, builder.trunc(value, i32), i32(0))
            return builder.shuffle_vector(lane, undefined, zero)

        total = builder.add(
            builder.zext(builder.load(source, align=1), words), ir.Constant(words, [1] * LANES)
        )
        for shift in (1, 2, 4, 8):  # running sums in four rounds
            lanes = [LANES + lane - shift if lane >= shift else 0 for lane in range(LANES)]
            moved = builder.shuffle_vector(zero, total, ir.Constant(words, lanes))
            total = builder.add(total, moved)
        places = builder.add(builder.mul(total, splat(args[3])), splat(args[2]))
        builder.store(places, builder.bitcast(builder.gep(out_data, [args[5]]), words.as_pointer()), align=4)
        pairs = i64(0)  # four sums of two bytes of each word
        for word in range(2):
            eight = builder.load(
                builder.gep(builder.bitcast(address, i64.as_pointer()), [i32(word)]), align=1
            )
            for half in (eight, builder.lshr(eight, i64(8))):
                pairs = builder.add(pairs, builder.and_(half, i64(0x00FF00FF00FF00FF)))
        gap_sum = builder.lshr(builder.mul(pairs, i64(0x0001000100010001)), i64(48))
        return builder.add(args[2], builder.mul(builder.add(gap_sum, i64(LANES)), args[3]))

    i = types.int64
    return i(gaps, i, i, i, out, i), codegen


@intrinsic
def _count_below(typingctx, array, at, bound):  # type: ignore[no-untyped-def]
    """_count_below(array, at, bound) -> how many of the 16 words from place `at` on are below `bound`."""
    if not isinstance(array, types.Array):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        i32 = ir.IntType(32)
        words = ir.VectorType(i32, LANES)
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        loaded = builder.load(builder.bitcast(builder.gep(data, [args[1]]), words.as_pointer()), align=4)
        undefined = ir.Constant(words, ir.Undefined)
        lane = builder.insert_element(undefined, builder.trunc(args[2], i32), i32(0))
        limit = builder.shuffle_vector(lane, undefined, ir.Constant(words, [0] * LANES))
        below = builder.bitcast(builder.icmp_signed("<", loaded, limit), ir.IntType(LANES))
        return builder.zext(builder.ctpop(below), ir.IntType(64))

    return types.int64(array, types.int64, types.int64), codegen


@intrinsic
def _trailing_zeros(typingctx, word):  # type: ignore[no-untyped-def]
    """_trailing_zeros(word) of a uint32 that is not 0."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        zeros = builder.cttz(args[0], ir.IntType(1)(1))
        return builder.zext(zeros, ir.IntType(64))

    return types.int64(types.uint32), codegen


@cpu_inline
def entry_values(value, scale, kind, width, group, dead_zone, gain, first, stop, out, at):
    """out[at + e - base] = gain * the value of entry e, first <= e < stop; base = first rounded down to a
    run of 32.

    value, scale : addresses of the stream and of its float16 scales; kind : F32,
    F16 or INT (b-bit codes: sign *
    (dead_zone + scale * (m + 1/2))). Up to 31 places behind the last are written too.
    """
    base = first // RUN * RUN
    if kind == INT:
        stream, scales = bytes_at(value), halves_at(scale)
        shift = _HALF - np.float32(1 << (width - 1))  # u + shift is m + 1/2 with its sign
        positive, negative, zero = vsplat(gain * dead_zone), vsplat(-gain * dead_zone), vsplat(_ZERO)
        for run in range(base // RUN, (stop + RUN - 1) // RUN):
            place = at + run * RUN - base
            unpack_run(stream, run * 4 * width, width, _ONE, shift, out, place)
            s = vsplat(gain * widen(element(scales, run * RUN // group)))
            for part in range(2):
                t = vload(out, place + 16 * part)
                vstore(out, place + 16 * part, vfma(t, s, vselect_less(t, zero, negative, positive)))
    elif kind == F16:
        halves = halves_at(value)
        for e in range(first, stop):
            out[at + e - base] = gain * widen(element(halves, e))
    else:
        floats = floats_at(value)
        for e in range(first, stop):
            out[at + e - base] = gain * element(floats, e)


@cpu_inline
def entry_columns(
    kind, index, row, row_bytes, stream, first, count, step, panel, panels, out, at, start, start_at
):
    """out[at + i] = column of the row's i-th entry * step; start[start_at + p] = at + its first entry of
    panel p.

    index : address; bitmap rows have `row_bytes` bytes, a delta stream has a byte per entry, `stream` in all,
        of which the row's are those from `first` on; panel : columns of a panel, a multiple of 32. Up to 16
        places behind the last are written too.
    """
    positions = bytes_at(index)
    start[start_at] = at
    if kind == FULL:
        for i in range(count):
            out[at + i] = np.int32(i * step)
        for p in range(1, panels):
            start[start_at + p] = at + min(p * panel, count)
    elif kind == BITMAP:
        e = np.int64(at)
        words = words_at(index)
        chunk = panel // 8
        for p in range(panels):
            start[start_at + p] = e
            low, high = p * chunk, min((p + 1) * chunk, row_bytes)
            if wide_registers():
                for byte in range(low, high, 2):
                    e += _compress_columns(positions, row * row_bytes + byte, byte * 8 * step, step, out, e)
            else:
                for byte in range(low, high, 4):
                    word = element(words, (row * row_bytes + byte) // 4)
                    while word != np.uint32(0):
                        out[e] = np.int32((byte * 8 + _trailing_zeros(word)) * step)
                        e += 1
                        word &= word - np.uint32(1)
    else:
        place, p, i = np.int64(-step), 1, 0
        bound = panel * step
        while i < count and first + i + 16 <= stream:
            place = _gaps_to_columns(positions, first + i, place, step, out, at + i)
            if p < panels:  # at most one panel begins in most groups: no branch to guess
                below = _count_below(out, at + i, bound)
                start[start_at + p] = at + min(i + below, count)
                begun = 1 if below < 16 else 0
                p += begun
                bound += begun * panel * step
                while begun == 1 and p < panels and place >= bound:
                    start[start_at + p] = at + min(i + _count_below(out, at + i, bound), count)
                    p += 1
                    bound += panel * step
            i += 16
        while i < count:  # where sixteen gaps would reach beyond the stream
            place += (np.int64(element(positions, first + i)) + 1) * step
            out[at + i] = np.int32(place)
            while p < panels and place >= bound:
                start[start_at + p] = at + i
                p += 1
                bound += panel * step
            i += 1
        while p < panels:
            start[start_at + p] = at + count
            p += 1


@cpu_inline
def code_rows(
    value,
    scale,
    column_scale,
    kind,
    width,
    group,
    shrink,
    gain,
    row_values,
    first,
    rows,
    column,
    cols,
    out,
    at,
    out_row,
):
    """out[r, c] = gain * coefficient [first + r, column + c], r < rows, c < cols, both of whole runs of 32
    columns.

    value : address of packed codes, or of float32/float16/bfloat16 rows of `row_values` values
    scale : address of float16 scales: of groups of columns (kind INT) or of rows (GRID); column_scale : of
    columns (GRID)
    """
    if kind == INT:
        stream, scales = bytes_at(value), halves_at(scale)
        middle = np.float32((1 << width) - 1) * _HALF
        groups = (row_values + group - 1) // group
        for r in range(rows):
            row = first + r
            for c in range(0, cols, RUN):
                s = gain * widen(element(scales, row * groups + (column + c) // group))
                byte = (row * row_values + column + c) // 8 * width
                unpack_run(stream, byte, width, s, -s * middle, out, at + r * out_row + c)
    elif kind == GRID:
        stream, scales, columns = bytes_at(value), halves_at(scale), halves_at(column_scale)
        half = np.float32(1 << (width - 1))
        zero, up, down = vsplat(_ZERO), vsplat(shrink), vsplat(-shrink)
        for r in range(rows):
            row = first + r
            s = vsplat(gain * widen(element(scales, row)))
            for c in range(0, cols, RUN):
                byte = (row * row_values + column + c) // 8 * width
                place = at + r * out_row + c
                unpack_run(stream, byte, width, _ONE, -half, out, place)
                for part in range(2):
                    q = vload(out, place + 16 * part)
                    towards = vselect_less(q, zero, down, vselect_less(zero, q, up, zero))
                    step = vmul(s, vload(columns, column + c + 16 * part))
                    vstore(out, place + 16 * part, vmul(step, vsub(q, towards)))
    elif kind == F16:
        halves = halves_at(value)
        for r in range(rows):
            for c in range(cols):
                out[at + r * out_row + c] = widen(element(halves, (first + r) * row_values + column + c))
    elif kind == BF16:
        bfloats = bfloats_at(value)
        for r in range(rows):
            for c in range(cols):
                out[at + r * out_row + c] = widen(element(bfloats, (first + r) * row_values + column + c))


@cpu_inline
def basis_entries(
    params, gain, blocks, count, features, terms, t_row, t_column, t_param, t_factor, first, rows,
    row_functions, depth, step,
    start, start_at, out_offset, out_value, at,
):  # fmt: skip
    """The basis part of `rows` parameter rows as entries: `row_functions` rows of entries for each of them.

    params : address of float16 parameters, (parameter rows, blocks,
    count); t_* : the terms of `transforms.basis_terms`
    depth : where the input's basis features begin; step : floats from one feature to the next
    """
    halves = halves_at(params)
    e = np.int64(at)
    for r in range(rows):
        t = 0
        for f in range(row_functions):
            start[start_at + r * row_functions + f] = e
            t_first = t
            while t < terms and t_row[t] == f:
                t += 1
            for j in range(blocks):
                for term in range(t_first, t):
                    p = widen(element(halves, ((first + r) * blocks + j) * count + t_param[term]))
                    out_value[e] = gain * p * t_factor[term]
                    out_offset[e] = np.int32((depth + j * features + t_column[term]) * step)
                    e += 1
    start[start_at + rows * row_functions] = e

"""Small integers as bits: masks of 64 lanes, and the bits of a stream that belong to a mask's lanes.

A mask is an int64 with a bit for each of 64 columns.

    deposit(bits, mask)   bit i of `bits` to the place of the i-th one of `mask` (x86: pdep)
    collect(bits, mask)   the bits of `bits` at the ones of `mask`, side by side (x86: pext)

Without BMI2 `deposit` is a loop over the ones, for codes that another processor made: it takes longer than all the
rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from . import params
from ._jit import cpu_inline
from ._numba_internals import cgutils
from ._parts import c_function, record_at
from .arrays import bytes_at, halves_at, words_at
from .int8_simd import RUN, V_RUN, pointer_at, run_type, splat, store_run
from .isa import Isa, isa_of
from .simd import element
from .stack import stack_array

_I1, _I8, _I32, _I64 = ir.IntType(1), ir.IntType(8), ir.IntType(32), ir.IntType(64)
_MASK = ir.VectorType(_I1, RUN)
_WEIGHT = params.WEIGHT.dtype
#: Columns whose bits lie together.
CHUNK = 256
LANES_OF_MASK = 64
MOST_PLANES = 4  # with which a chunk has 168 bytes at most: a byte holds its size
ROWS_OF_START = 8  # rows of a start; the sizes of the chunks before are added
FOUR = 4  # columns of a bit where columns are grouped
FIRST_OF_FOUR, ALL_FOUR = 0x1111111111111111, 15
_MASKS = CHUNK // LANES_OF_MASK
_STACK = _MASKS * MOST_PLANES
_BITS_OF_LOAD = 57  # of 64, that are behind any bit of its first byte
#: Processors with BMI2 whose pdep and pext are microcode, some 20 to 300 cycles (Excavator, Zen 1 and 2).
_MICROCODED = ("bdver4", "znver1", "znver2")


def moves_bits(target: Isa, host: Isa) -> bool:
    """Whether `deposit` and `collect` are instructions of a few cycles.

    target : what kernels are compiled for. host : the processor
    """
    return target.architecture == "x86_64" and target.has("bmi2") and host.cpu not in _MICROCODED


@intrinsic
def _has_bmi2(typingctx):
    """_has_bmi2() -> bool, known when the kernel is compiled."""

    def codegen(context, builder, signature, args):
        isa = isa_of(context)
        return _I1(isa.architecture == "x86_64" and isa.has("bmi2"))

    return types.boolean(), codegen


def _bmi2(name: str) -> Callable[..., Any]:
    def instruction(typingctx, bits, mask):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            isa = isa_of(context)
            if isa.architecture != "x86_64" or not isa.has("bmi2"):
                return args[0]  # never called there: see `_has_bmi2`
            kind = ir.FunctionType(_I64, [_I64, _I64])
            return builder.call(
                cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.bmi.{name}.64"), args
            )

        return types.int64(types.int64, types.int64), codegen

    instruction.__name__ = instruction.__qualname__ = name
    return intrinsic(instruction)


_pdep, _pext = _bmi2("pdep"), _bmi2("pext")


@cpu_inline
def deposit(bits, mask):
    """Bit i of `bits` at the place of the i-th one of `mask`."""
    if _has_bmi2():
        return _pdep(bits, mask)
    placed = 0
    while mask != 0:
        lowest = mask & -mask
        placed |= lowest * (bits & 1)
        bits >>= 1
        mask ^= lowest
    return placed


@cpu_inline
def collect(bits, mask):
    """The bits of `bits` at the ones of `mask`, side by side. Not without BMI2: nothing is written there."""
    return _pext(bits, mask)


@intrinsic
def ones(typingctx, mask):
    """ones(mask) -> int64: how many bits of it are one."""

    def codegen(context, builder, signature, args):
        return builder.ctpop(args[0])

    return types.int64(types.int64), codegen


@intrinsic
def word_at(typingctx, stream, at):
    """word_at(stream, at) -> int64: the 64 bits at byte `at` of a uint8 array."""
    if not isinstance(stream, types.Array):
        return None

    def codegen(context, builder, signature, args):
        return builder.load(pointer_at(context, builder, signature.args[0], *args, _I64), align=1)

    return types.int64(stream, types.int64), codegen


@intrinsic
def store_word(typingctx, stream, at, word):
    """store_word(stream, at, word): write 64 bits at byte `at` of a uint8 array."""
    if not isinstance(stream, types.Array):
        return None

    def codegen(context, builder, signature, args):
        stream, at, word = args
        pointer = pointer_at(context, builder, signature.args[0], stream, at, _I64)
        builder.store(word, pointer, align=1)
        return context.get_dummy_value()

    return types.void(stream, types.int64, types.int64), codegen


@intrinsic
def bits_at(typingctx, stream, bit):
    """bits_at(stream, bit) -> int64: 64 bits from bit `bit` of a uint8 array on. Reads 9 bytes."""
    if not isinstance(stream, types.Array):
        return None

    def codegen(context, builder, signature, args):
        b, (stream, bit) = builder, args
        first = pointer_at(context, b, signature.args[0], stream, b.lshr(bit, _I64(3)), _I8)
        low = b.load(b.bitcast(first, _I64.as_pointer()), align=1)
        high = b.zext(b.load(b.gep(first, [_I64(8)])), _I64)
        shift = b.and_(bit, _I64(7))
        # in two steps: nothing of it where the shift is 0
        high = b.shl(b.shl(high, _I64(1)), b.xor(shift, _I64(63)))
        return b.or_(b.lshr(low, shift), high)

    return types.int64(stream, types.int64), codegen


@intrinsic
def _add_half_at(typingctx, stream, bit, bits):
    """_add_half_at(stream, bit, bits): write the low 32 bits where zeros are, from bit `bit` on. Writes 8 bytes."""
    if not isinstance(stream, types.Array):
        return None

    def codegen(context, builder, signature, args):
        b, (stream, bit, bits) = builder, args
        pointer = pointer_at(context, b, signature.args[0], stream, b.lshr(bit, _I64(3)), _I64)
        moved = b.shl(b.and_(bits, _I64(0xFFFFFFFF)), b.and_(bit, _I64(7)))
        b.store(b.or_(b.load(pointer, align=1), moved), pointer, align=1)
        return context.get_dummy_value()

    return types.void(stream, types.int64, types.int64), codegen


@cpu_inline
def add_bits_at(stream, bit, bits):
    """Write 64 bits where zeros are, from bit `bit` on; up to 12 bytes are written."""
    _add_half_at(stream, bit, bits)
    _add_half_at(stream, bit + 32, bits >> 32)


def _lanes(builder: ir.IRBuilder, mask: ir.Value) -> ir.Value:
    """-1 in the lanes of the low 32 bits that are ones, 0 in the others."""
    return builder.sext(builder.bitcast(builder.trunc(mask, _I32), _MASK), V_RUN)


@intrinsic
def minus_ones(typingctx, mask):
    """minus_ones(mask) -> run: -1 at each one of the low 32 bits, 0 elsewhere."""

    def codegen(context, builder, signature, args):
        return _lanes(builder, args[0])

    return run_type(types.int64), codegen


@intrinsic
def add_runs(typingctx, a, b):
    """add_runs(a, b) -> run: a + b modulo 256."""
    if a != run_type or b != run_type:
        return None

    def codegen(context, builder, signature, args):
        return builder.add(*args)

    return run_type(a, b), codegen


@intrinsic
def negated_where(typingctx, run, mask):
    """negated_where(run, mask) -> run: -run at each one of the low 32 bits, run elsewhere."""
    if run != run_type:
        return None

    def codegen(context, builder, signature, args):
        run, mask = args
        lanes = _lanes(builder, mask)
        return builder.sub(builder.xor(run, lanes), lanes)

    return run_type(run, types.int64), codegen


@intrinsic
def beyond(typingctx, run, size):
    """beyond(run, size) -> (int64, int64): low 32 bits for the int8 values above size, and for those below
    -size; 0 <= size < 127."""
    if run != run_type:
        return None
    result = types.UniTuple(types.int64, 2)

    def codegen(context, builder, signature, args):
        run, size = args
        undefined = ir.Constant(V_RUN, ir.Undefined)
        first = builder.insert_element(undefined, builder.trunc(size, _I8), _I32(0))
        every = builder.shuffle_vector(first, undefined, splat(0, ir.VectorType(_I32, RUN)))
        masks = [
            builder.icmp_signed(">", run, every),
            builder.icmp_signed("<", run, builder.neg(every)),
        ]
        return context.make_tuple(
            builder, result, [builder.zext(builder.bitcast(m, _I32), _I64) for m in masks]
        )

    return result(run, types.int64), codegen


@cpu_inline
def _store_half(masks, first, planes, positive, shift, offset, out, at):
    """The integers of 32 of the lanes of masks[first], masks[first + _MASKS], ... plus `offset`, as bytes."""
    total = minus_ones(masks[first] >> shift)
    for plane in range(1, planes):
        total = add_runs(total, minus_ones(masks[first + plane * _MASKS] >> shift))
    store_run(negated_where(total, positive >> shift), -offset, out, at)


@cpu_inline
def _bits(stream, bit, count):
    """`count` bits from bit `bit` of a uint8 array on, and others above them."""
    if count > _BITS_OF_LOAD:
        return bits_at(stream, bit)
    return word_at(stream, bit >> 3) >> (bit & 7)


@cpu_inline
def _columns_of_chunk(w, start, columns, masks, offset, out, at):
    """The integers of a chunk, plus `offset`, as bytes. masks : scratch memory for `_STACK`"""
    stream, planes = bytes_at(w.value), w.planes
    count = (columns + LANES_OF_MASK - 1) // LANES_OF_MASK
    # bits of a plane lie one behind the other, so that where those of a mask begin is known early
    if w.fours != 0:
        bit = 8 * (start + 2 * count)
        for i in range(count):
            four = np.int64(element(halves_at(w.value + start), i))
            length = FOUR * ones(four)
            masks[i] = deposit(_bits(stream, bit, length), deposit(four, FIRST_OF_FOUR) * ALL_FOUR)
            bit += length
    else:
        bit = 8 * (start + 8 * count)
        for i in range(count):
            masks[i] = word_at(stream, start + 8 * i)
    for plane in range(_MASKS, _MASKS * planes, _MASKS):
        for i in range(plane, plane + count):
            length = ones(masks[i - _MASKS])
            masks[i] = deposit(_bits(stream, bit, length), masks[i - _MASKS])
            bit += length
    for i in range(count):
        length = ones(masks[i])
        positive = deposit(_bits(stream, bit, length), masks[i])
        bit += length
        k = LANES_OF_MASK * i
        _store_half(masks, i, planes, positive, 0, offset, out, at + k)
        if k + RUN < columns:
            _store_half(masks, i, planes, positive, 32, offset, out, at + k + RUN)


@cpu_inline
def _chunk(w, start, columns, masks, offset, out, at):
    # with a constant count the loops over masks unroll: 0.73 to 0.75 of the time (AVX2)
    if columns == CHUNK:
        _columns_of_chunk(w, start, CHUNK, masks, offset, out, at)
    elif columns == CHUNK // 2:  # the last of rows of 384
        _columns_of_chunk(w, start, CHUNK // 2, masks, offset, out, at)
    else:
        _columns_of_chunk(w, start, columns, masks, offset, out, at)


def _planes_of_rows(weight, row, rows, column, depth, offset, lines, step):
    """lines[r step + k] = q[row + r, column + k] + offset modulo 256, r < rows, k < depth, without exceptions.

    weight : address of a `params.WEIGHT`. column : a multiple of `CHUNK`; depth : of 32. lines : address of bytes
    """
    w, out, masks = record_at(weight, _WEIGHT), bytes_at(lines), stack_array(_STACK, np.int64)
    sizes, chunks = bytes_at(w.chunk_bytes), (w.row_values + CHUNK - 1) // CHUNK
    chunk = row // ROWS_OF_START * ROWS_OF_START * chunks
    start = np.int64(element(words_at(w.chunk_start), row // ROWS_OF_START))
    for r in range(rows):
        first = (row + r) * chunks + column // CHUNK
        while chunk < first:
            start += np.int64(element(sizes, chunk))
            chunk += 1
        for k in range(0, depth, CHUNK):
            _chunk(w, start, min(CHUNK, depth - k), masks, offset, out, r * step + k)
            start += np.int64(element(sizes, chunk))
            chunk += 1


#: A C function of these arguments.
PLANES_OF_ROWS = c_function(_planes_of_rows)

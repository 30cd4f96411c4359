"""Dot products of packed rows with int8 activations, four at a time.

    grid_sums     sum_k q[r, k] z[k, t]
    dense_sums    sum_g scale[r, g] sum_(k in g) (2 q[r, k] + 1) z[k, t]

q = u - 2^(b-1) for the code u of b bits. What is multiplied is u where an instruction takes unsigned bytes with
signed ones, and 2^(b-1) sum_k z[k, t] is subtracted once: vpdpbusd, and vpmaddubsw for up to 7 bits, whose sums of
two products an int16 holds (2 * 127 * 127 = 32258). Elsewhere q is.

Four rows share the loads of a token's z, four tokens share the unpacked codes of a row, and all hide each other's
latency. With AVX-512 a register holds 64 columns, elsewhere a run of 32 codes is unpacked at a time. Every width has
a loop of its own, chosen once for four sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from . import simd_emit as emit
from ._numba_internals import cgutils
from .int8_simd import RUN, Products, pointer_at, prefetch, splat, unpack, unpack_64
from .isa import isa_of

#: Sums of a call: of four rows and a token, or of a row and four tokens.
SUMS = 4
#: Columns that are added at a time: two runs of codes, a register of AVX-512.
STEP = 2 * RUN
WIDTHS = range(2, 9)
_I8, _I16, _I32, _I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_INT16_MAX = 32767
_FALSE = ir.IntType(1)(0)
_TOTALS = ir.VectorType(_I32, SUMS)


class _Sums:
    """Emits four sums of products with codes of one width: of four rows and a token, or of a row and four tokens.

    Parameters
    ----------
    rows : pointers to the first codes of the rows, four or one
    tokens : pointers to the activations of the tokens, one or four
    size : bytes from one row to the next
    """

    def __init__(
        self,
        context: Any,
        builder: ir.IRBuilder,
        bits: int,
        rows: list[ir.Value],
        tokens: list[ir.Value],
        size: ir.Value,
    ) -> None:
        self.context, self.builder, self.bits, self.rows, self.tokens = context, builder, bits, rows, tokens
        self.make = Products(builder, isa_of(context))
        self.ahead = builder.mul(size, _I64(len(rows)))  # to the codes of the next call
        self.signed = not self.make.vnni and (bits == 8 or not self.make.pairs)
        self.sums = [cgutils.alloca_once(builder, self.make.words) for _ in range(SUMS)]
        self.short: Any = None  # whether a step has 32 columns
        self.step_bytes: Any = None  # of codes

    def clear(self) -> None:
        for total in self.sums:
            self.builder.store(splat(0, self.make.words), total)

    @contextmanager
    def steps(self, columns: ir.Value, runs: ir.Value = _FALSE) -> Iterator[ir.Value]:
        """Loop over the columns, 64 at a time, and then over 32 that are left; yields the index of the step.

        runs : whether all steps have 32 columns. Then 32 zeros are behind each 32 activations
        """
        b = self.builder
        self.step_bytes = b.select(runs, _I64(RUN // 8 * self.bits), _I64(STEP // 8 * self.bits))
        whole = b.select(runs, _I64(0), b.udiv(columns, _I64(STEP)))
        left = b.sub(b.udiv(columns, _I64(RUN)), b.mul(whole, _I64(STEP // RUN)))
        parts = b.select(b.icmp_signed("==", left, _I64(0)), _I64(1), _I64(2))
        with cgutils.for_range(b, parts) as part:
            self.short = b.icmp_signed("!=", part.index, _I64(0))
            start = b.select(self.short, whole, _I64(0))
            stop = b.select(self.short, b.add(whole, left), whole)
            with cgutils.for_range_slice(b, start, stop, _I64(1)) as (step, _):
                yield step

    def add(self, step: ir.Value) -> None:
        """Add the products of a step's columns."""
        b, size = self.builder, self.make.bytes.count
        first = b.mul(step, _I64(STEP))
        activations = []
        for token in self.tokens:
            places = [b.gep(token, [b.add(first, _I64(k))]) for k in range(0, STEP, size)]
            activations.append([b.load(b.bitcast(p, self.make.bytes.as_pointer()), align=1) for p in places])
        byte = b.mul(step, self.step_bytes)
        sums = iter(self.sums)
        for row in self.rows:
            prefetch(self.context, b, b.gep(row, [b.add(byte, self.ahead)]))
            codes = self._codes(b.gep(row, [byte]))
            for z in activations:
                total = next(sums)
                b.store(self._products(b.load(total), codes, z), total)

    def _codes(self, pointer: ir.Value) -> list[ir.Value]:
        """Registers of 64 bytes in all; of a step of 32 columns the others are any, and meet zeros."""
        b, size, run, short = self.builder, self.make.bytes.count, 4 * self.bits, self.short
        if size == STEP:
            return [unpack_64(b, self.bits, pointer, b.select(short, _I32(run), _I32(2 * run)))]
        registers = []
        for start in (_I64(0), b.select(short, _I64(0), _I64(run))):
            codes = unpack(b, self.bits, b.gep(pointer, [start]))
            for k in range(0, RUN, size):
                lanes = ir.Constant(ir.VectorType(_I32, size), list(range(k, k + size)))
                registers.append(b.shuffle_vector(codes, codes, lanes))
        return registers

    def _products(self, total: ir.Value, codes: list[ir.Value], zs: list[ir.Value]) -> ir.Value:
        b, make = self.builder, self.make
        if self.signed:
            half = splat(1 << (self.bits - 1), make.bytes)
            for u, z in zip(codes, zs, strict=True):
                total = make.add_signed(total, b.sub(u, half), z)
        elif make.pairs:
            # registers of pairs that are added before they are widened
            steps = _INT16_MAX // (2 * 127 * ((1 << self.bits) - 1))
            for first in range(0, len(codes), steps):
                pairs = None
                for u, z in zip(codes[first : first + steps], zs[first : first + steps], strict=True):
                    products = make.pair_products(u, z)
                    pairs = products if pairs is None else b.add(pairs, products)
                total = b.add(total, make.widened(pairs))
        else:
            for u, z in zip(codes, zs, strict=True):
                total = make.add(total, u, z)
        return total

    def totals(self, factor: int, z_sums: ir.Value) -> ir.Value:
        """factor * sum_k q[r, k] z[k, t] + (factor - 1) * z_sums, <4 x i32>.

        factor : 1, or 2 for codes q + 1/2 times two
        z_sums : <4 x i32>, of the activations of the columns that were added
        """
        b = self.builder
        total = emit.sum_lanes(b, [b.load(total) for total in self.sums], b.add)
        if factor == 2:
            total = b.add(total, total)
        centre = (factor - 1) - (0 if self.signed else factor << (self.bits - 1))
        return b.add(total, b.mul(z_sums, splat(centre, _TOTALS)))


def for_width(builder: ir.IRBuilder, bits: ir.Value, emit_width: Callable[[int], None]) -> None:
    """Emit the code of every width, of which the value of `bits` chooses one."""
    end = builder.append_basic_block("width.end")
    switch = builder.switch(bits, end)
    for width in WIDTHS:
        block = builder.append_basic_block(f"width.{width}")
        switch.add_case(_I64(width), block)
        builder.position_at_end(block)
        emit_width(width)
        builder.branch(end)
    builder.position_at_end(end)


def row_starts(
    context: Any, builder: ir.IRBuilder, array: types.Type, args: tuple[ir.Value, ...]
) -> list[ir.Value]:
    """Pointers to four rows of bytes from (packed, at, row bytes, rows); the last row stands for those behind it."""
    packed, at, size, rows = args
    last = builder.sub(rows, _I64(1))
    starts = []
    for r in range(SUMS):
        row = builder.select(builder.icmp_signed("<", last, _I64(r)), last, _I64(r))
        place = builder.add(at, builder.mul(size, row))
        starts.append(pointer_at(context, builder, array, packed, place, _I8))
    return starts


def _lines(builder: ir.IRBuilder, pointer: ir.Value, step: ir.Value, count: int) -> list[ir.Value]:
    """`count` pointers, `step` elements from one to the next."""
    return [builder.gep(pointer, [builder.mul(step, _I64(k))]) for k in range(count)]


def _four(builder: ir.IRBuilder, pointers: list[ir.Value], index: ir.Value, typ: ir.VectorType) -> ir.Value:
    """The elements `index` of four lines, or four times that of one."""
    align, vector = typ.element.width // 8, ir.Constant(typ, ir.Undefined)
    for k, pointer in enumerate(pointers):
        value = builder.load(builder.gep(pointer, [index]), align=align)
        vector = builder.insert_element(vector, value, _I32(k))
    if len(pointers) == SUMS:
        return vector
    return builder.shuffle_vector(vector, vector, splat(0, ir.VectorType(_I32, SUMS)))


def _is_one_or_four(tokens: types.Type) -> bool:
    return isinstance(tokens, types.IntegerLiteral) and tokens.literal_value in (1, SUMS)


@intrinsic(prefer_literal=True)
def grid_sums(typingctx, tokens, bits, packed, at, size, rows, z, z_at, depth, columns, z_sums, sums_at):
    """grid_sums(...) -> four int32: sum_k q[r, k] z[k, t], k < columns, of rows 0 to 3 or of tokens 0 to 3.

    Parameters
    ----------
    tokens : literal; 1 for four rows and a token, 4 for a row and four tokens
    bits : 2 to 8
    packed, at, size : uint8; the codes of row r from byte at + r size on
    rows : at least 1; sums of rows from there on are those of the last
    z, z_at, depth : uint8, the bits of int8; z[k, t] is at z_at + t depth + k, zeros behind the last column. depth is
        a multiple of 64
    columns : a multiple of 32
    z_sums, sums_at : int32; sums of the tokens' activations
    """
    if not _is_one_or_four(tokens) or any(not isinstance(a, types.Array) for a in (packed, z, z_sums)):
        return None
    i = types.int64
    result = types.UniTuple(types.int32, SUMS)
    num_tokens = tokens.literal_value

    def codegen(context, builder, signature, args):
        _, bits, packed, at, size, rows, z, z_at, depth, columns, z_sums, sums_at = args
        b, of = builder, signature.args
        starts = row_starts(context, b, of[2], (packed, at, size, rows))[: SUMS // num_tokens]
        lines = _lines(b, pointer_at(context, b, of[6], z, z_at, _I8), depth, num_tokens)
        sums = _lines(b, pointer_at(context, b, of[10], z_sums, sums_at, _I32), _I64(1), num_tokens)
        sums = _four(b, sums, _I64(0), _TOTALS)
        totals = cgutils.alloca_once(b, _TOTALS)

        def width(bits: int) -> None:
            make = _Sums(context, b, bits, starts, lines, size)
            make.clear()
            with make.steps(columns) as step:
                make.add(step)
            b.store(make.totals(1, sums), totals)

        for_width(b, bits, width)
        values = b.load(totals)
        return context.make_tuple(b, result, [b.extract_element(values, _I32(k)) for k in range(SUMS)])

    return result(tokens, i, packed, i, i, i, z, i, i, i, z_sums, i), codegen


@intrinsic(prefer_literal=True)
def dense_sums(
    typingctx,
    tokens,
    bits,
    packed,
    at,
    size,
    rows,
    z,
    z_at,
    depth,
    columns,
    z_sums,
    sums_at,
    group,
    scale,
    scale_at,
):
    """dense_sums(...) -> four float32: sum_g scale[r, g] sum_(k in g) (2 q[r, k] + 1) z[k, t].

    The sums over k are exact; those over g are added one after another.

    Parameters
    ----------
    tokens ... columns : as of `grid_sums`
    z_sums, sums_at : int32; the sum of the activations of group g of token t is at sums_at + t groups + g
    group : columns of a group, 32, 64 or 128; the last may have less. Of groups of 32, z[k, t] is at
        z_at + t depth + 64 (k // 32) + k % 32, and zeros between
    scale, scale_at : uint16, the bits of float16; scale[r, g] is at scale_at + r groups + g
    """
    arrays = packed, z, z_sums, scale
    if not _is_one_or_four(tokens) or any(not isinstance(a, types.Array) for a in arrays):
        return None
    i = types.int64
    result = types.UniTuple(types.float32, SUMS)
    num_tokens = tokens.literal_value

    def codegen(context, builder, signature, args):
        (_, bits, packed, at, size, rows, z, z_at, depth, columns, z_sums, sums_at, group, scale,
         scale_at) = args  # fmt: skip
        b, of, num_rows = builder, signature.args, SUMS // num_tokens
        starts = row_starts(context, b, of[2], (packed, at, size, rows))[:num_rows]
        lines = _lines(b, pointer_at(context, b, of[6], z, z_at, _I8), depth, num_tokens)
        runs = b.icmp_signed("==", group, _I64(RUN))
        steps = b.udiv(b.add(columns, _I64(STEP - 1)), _I64(STEP))
        steps = b.select(runs, b.udiv(columns, _I64(RUN)), steps)
        # a division takes 20 cycles
        shift = b.select(b.icmp_signed("==", group, _I64(2 * STEP)), _I64(1), _I64(0))
        groups = b.lshr(b.add(steps, shift), shift)
        sums = _lines(b, pointer_at(context, b, of[10], z_sums, sums_at, _I32), groups, num_tokens)
        scales = row_starts(context, b, of[13], (scale, scale_at, groups, rows))[:num_rows]
        scales = [b.bitcast(pointer, _I16.as_pointer()) for pointer in scales]
        floats = ir.VectorType(emit.F32, SUMS)
        total = cgutils.alloca_once_value(b, emit.const(0, floats))

        def width(bits: int) -> None:
            make = _Sums(context, b, bits, starts, lines, size)
            make.clear()
            with make.steps(columns, runs) as step:
                make.add(step)
                after = b.add(step, _I64(1))
                ends = b.icmp_signed("==", b.and_(after, shift), _I64(0))
                with b.if_then(b.or_(ends, b.icmp_signed("==", after, steps)), likely=True):
                    g = b.lshr(step, shift)
                    y = b.sitofp(make.totals(2, _four(b, sums, g, _TOTALS)), floats)
                    s = emit.half_to_float(context, b, _four(b, scales, g, ir.VectorType(_I16, SUMS)))
                    b.store(emit.fma(b, s, y, b.load(total)), total)
                    make.clear()

        for_width(b, bits, width)
        values = b.load(total)
        return context.make_tuple(b, result, [b.extract_element(values, _I32(k)) for k in range(SUMS)])

    return result(tokens, i, packed, i, i, i, z, i, i, i, z_sums, i, i, scale, i), codegen

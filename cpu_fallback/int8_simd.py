"""Sums of products of 8-bit codes and 8-bit activations, in int32 and without any rounding.

    x86, VNNI      vpdpbusd    four products are added to an int32
    aarch64        sdot        the same, with the extension dotprod
    x86            vpmaddubsw  two products are added to an int16, which vpmaddwd adds to an int32
    elsewhere      products in int32, as LLVM lowers them

All give the same integers. The instructions of x86 multiply unsigned bytes with signed ones: a code q is multiplied
as q + offset, and the offset times the activations' sum is subtracted afterwards.

An int16 overflows: with vpmaddubsw, codes are cut to `BASE_BITS`, so that 1, 2 or 4 products can be added before
they are widened. What a code lacks then is an exception, a product of its own. Few codes of a weight are large.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from rbe_gpu.codecs.packing import RUN, planes_of

from . import simd_emit as emit
from ._numba_internals import cgutils
from .isa import Isa, isa_of
from .simd import LANES, V_F32, vec16

_I8, _I16, _I32, _I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_WORDS = RUN // 4  # of four columns
_MAGIC = (
    12582912.0  # 1.5 * 2^23: adding it rounds to the nearest integer, even in a tie, which fills the low bits
)
V_RUN = ir.VectorType(_I8, RUN)


class RunType(types.Type):
    """Numba type of 32 bytes in registers."""

    def __init__(self) -> None:
        super().__init__(name="run_uint8")


run_type = RunType()


@register_model(RunType)
class _RunModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: types.Type) -> None:
        super().__init__(dmm, fe_type, V_RUN)


#: Bits that codes are cut to where products are added in int16.
BASE_BITS = (5, 6, 7)
#: Products of such codes that an int16 takes: 2 * steps * (2^bits - 1) * 127 <= 32767. With 8 of 4 bits there is
#: no gain over 4 of 5 bits: loads take as long (Zen 3).
_STEPS = {5: 4, 6: 2, 7: 1}


def _adds_four(isa: Isa) -> bool:
    return isa.has("avx512f", "avx512vnni") or isa.has("dotprod")


def needs_base(isa: Isa) -> bool:
    """Whether codes are cut to `BASE_BITS`: products are added in int16."""
    return isa.has("ssse3") and not _adds_four(isa)


@intrinsic
def int16_sums(typingctx):
    """int16_sums() -> bool, known when the kernel is compiled: `needs_base`."""

    def codegen(context, builder, signature, args):
        return ir.IntType(1)(needs_base(isa_of(context)))

    return types.boolean(), codegen


@intrinsic
def many_registers(typingctx):
    """many_registers() -> bool, known when the kernel is compiled: 32 of them, and none for sums of int16."""

    def codegen(context, builder, signature, args):
        isa = isa_of(context)
        return ir.IntType(1)(isa.vector_registers == 32 and not needs_base(isa))

    return types.boolean(), codegen


def splat(value: int, typ: ir.VectorType) -> ir.Constant:
    return ir.Constant(typ, [value] * typ.count)


def pointer_at(
    context: Any, builder: ir.IRBuilder, array: Any, value: Any, offset: Any, to: ir.Type
) -> ir.Value:
    data = context.make_array(array)(context, builder, value).data
    return builder.bitcast(builder.gep(data, [offset]), to.as_pointer())


class Products:
    """Products on an instruction set, in registers of `lanes` int32."""

    def __init__(self, builder: ir.IRBuilder, isa: Isa) -> None:
        self.builder = builder
        self.vnni = isa.has("avx512f", "avx512vnni")
        self.sdot = isa.has("dotprod")
        self.pairs = needs_base(isa)
        self.ssse3 = isa.has("ssse3")
        bits = isa.vector_bits
        if bits == 512 and not isa.has("avx512bw"):
            bits = 256
        if bits == 256 and not isa.has("avx2"):
            bits = 128
        self.lanes = bits // 32
        self.words = ir.VectorType(_I32, self.lanes)
        self.halves = ir.VectorType(_I16, 2 * self.lanes)
        self.bytes = ir.VectorType(_I8, 4 * self.lanes)

    def _call(self, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
        function = cgutils.get_or_insert_function(
            self.builder.module, ir.FunctionType(result, [a.type for a in args]), name
        )
        return self.builder.call(function, args)

    def broadcast(self, word: ir.Value) -> ir.Value:
        """An int32 in every lane, as bytes."""
        undefined = ir.Constant(self.words, ir.Undefined)
        first = self.builder.insert_element(undefined, word, _I32(0))
        every = self.builder.shuffle_vector(first, undefined, splat(0, self.words))
        return self.builder.bitcast(every, self.bytes)

    def pair_products(self, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
        """Sums of two products, int16 lanes."""
        name = {4: "ssse3.pmadd.ub.sw.128", 8: "avx2.pmadd.ub.sw", 16: "avx512.pmaddubs.w.512"}[self.lanes]
        return self._call(f"llvm.x86.{name}", self.halves, unsigned, signed)

    def widened(self, pairs: ir.Value, factor: int | ir.Value = 1) -> ir.Value:
        """Neighbours of int16 lanes times `factor`, added: int32 lanes."""
        name = {4: "sse2.pmadd.wd", 8: "avx2.pmadd.wd", 16: "avx512.pmaddw.d.512"}[self.lanes]
        factors = splat(factor, self.halves) if isinstance(factor, int) else factor
        return self._call(f"llvm.x86.{name}", self.words, pairs, factors)

    def add(self, total: ir.Value, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
        """total + sums of four products each, int32 lanes; unsigned : at most 127 where there is only sdot."""
        b = self.builder
        if self.vnni:
            args = total, b.bitcast(unsigned, self.words), b.bitcast(signed, self.words)
            return self._call(f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}", self.words, *args)
        if self.sdot:
            return self._call("llvm.aarch64.neon.sdot.v4i32.v16i8", self.words, total, unsigned, signed)
        if self.pairs:
            return b.add(total, self.widened(self.pair_products(unsigned, signed)))
        return b.add(total, self._plain(b.zext, unsigned, signed))

    def add_signed(self, total: ir.Value, q: ir.Value, z: ir.Value) -> ir.Value:
        """total + sums of four products of signed bytes each; z : not -128."""
        b = self.builder
        if self.sdot:
            return self._call("llvm.aarch64.neon.sdot.v4i32.v16i8", self.words, total, q, z)
        if not self.ssse3:
            return b.add(total, self._plain(b.sext, q, z))
        # |q| is at most 128 as an unsigned byte; two products stay below 2^15
        negative = b.icmp_signed("<", q, splat(0, self.bytes))
        absolute = b.select(negative, b.neg(q), q)
        if self.lanes == 16:
            return self.add(total, absolute, b.select(negative, b.neg(z), z))
        signs = {4: "ssse3.psign.b.128", 8: "avx2.psign.b"}[self.lanes]
        return self.add(total, absolute, self._call(f"llvm.x86.{signs}", self.bytes, z, q))

    def _plain(self, extend: Any, a: ir.Value, signed: ir.Value) -> ir.Value:
        b, wide = self.builder, ir.VectorType(_I32, 4 * self.lanes)
        product = b.mul(extend(a, wide), b.sext(signed, wide))
        for _ in range(2):
            lanes = ir.VectorType(_I32, product.type.count // 2)
            even, odd = (
                b.shuffle_vector(
                    product, product, ir.Constant(lanes, [2 * i + f for i in range(lanes.count)])
                )
                for f in (0, 1)
            )
            product = b.add(even, odd)
        return product


@intrinsic(prefer_literal=True)
def int8_block(
    typingctx, rows, vectors, base_bits, runs, codes, codes_at, codes_row, x, x_at, x_step, c, c_at, c_row,
    entries, entry_start, start_at,
):  # fmt: skip
    """c[r, t] += sum_k u[r, k] z[k, t] + exceptions, r < rows, t < 16 * vectors, k < 32 * runs, sums in registers.

    Parameters
    ----------
    rows, vectors, base_bits : integer literals; base_bits : of the codes where products are added in int16
    codes : uint8; u[r, k] is at codes_at + r codes_row + k
    x : uint8, the bits of int8; z[k, t] is at x_at + k // 4 * x_step + 4 t + k % 4
    c : int32; c[r, t] is at c_at + r c_row + t
    entries : int32, three for each exception: the place of its four columns, four codes of one sign, and the sign.
        Those of row r are entry_start[start_at + r] to the next start
    """
    literals = all(isinstance(a, types.IntegerLiteral) for a in (rows, vectors, base_bits))
    if not literals or any(not isinstance(a, types.Array) for a in (codes, x, c, entries, entry_start)):
        return None
    num_rows, num_vectors, steps = rows.literal_value, vectors.literal_value, _STEPS[base_bits.literal_value]

    def codegen(context, builder, signature, args):
        (runs, codes, codes_at, codes_row, x, x_at, x_step, c, c_at, c_row, entries, entry_start,
         start_at) = args[3:]  # fmt: skip
        types_of = signature.args
        b, make = builder, Products(builder, isa_of(context))
        parts = range(num_vectors * LANES // make.lanes)

        def load(index: int, array: ir.Value, at: ir.Value, to: ir.Type) -> ir.Value:
            return b.load(pointer_at(context, b, types_of[index], array, at, to), align=1)

        def line(at: ir.Value) -> list[ir.Value]:
            """Activations of four columns."""
            return [load(7, x, b.add(at, _I64(4 * make.lanes * part)), make.bytes) for part in parts]

        def place(r: int, part: int) -> ir.Value:
            at = b.add(b.add(c_at, b.mul(c_row, _I64(r))), _I64(make.lanes * part))
            return pointer_at(context, b, types_of[10], c, at, make.words)

        places = [[place(r, part) for part in parts] for r in range(num_rows)]
        sums = [[cgutils.alloca_once_value(b, b.load(p, align=4)) for p in row] for row in places]

        def add_to(r: int, part: int, value: ir.Value) -> None:
            b.store(b.add(b.load(sums[r][part]), value), sums[r][part])

        unrolled = steps if make.pairs else 1
        with cgutils.for_range(b, b.mul(runs, _I64(_WORDS // unrolled))) as loop:
            pairs: list[list[Any]] = [[None for _ in parts] for _ in range(num_rows)]
            for step in range(unrolled):
                word = b.add(b.mul(loop.index, _I64(unrolled)), _I64(step))
                z = line(b.add(x_at, b.mul(x_step, word)))
                for r in range(num_rows):
                    at = b.add(b.add(codes_at, b.mul(codes_row, _I64(r))), b.mul(word, _I64(4)))
                    u = make.broadcast(load(4, codes, at, _I32))
                    for part in parts:
                        if make.pairs:
                            product, old = make.pair_products(u, z[part]), pairs[r][part]
                            pairs[r][part] = product if old is None else b.add(old, product)
                        else:
                            b.store(make.add(b.load(sums[r][part]), u, z[part]), sums[r][part])
            for r, row in enumerate(pairs):
                for part, total in enumerate(row):
                    if total is not None:
                        add_to(r, part, make.widened(total))
        if make.pairs:
            for r in range(num_rows):
                first, stop = (
                    b.zext(load(14, entry_start, b.add(start_at, _I64(r + i)), _I32), _I64) for i in range(2)
                )
                with cgutils.for_range(b, b.sub(stop, first)) as loop:
                    at = b.mul(b.add(first, loop.index), _I64(3))
                    place, word, sign = (load(13, entries, b.add(at, _I64(i)), _I32) for i in range(3))
                    z = line(b.add(x_at, b.mul(b.zext(place, _I64), x_step)))
                    u = make.broadcast(word)
                    signs = b.bitcast(make.broadcast(sign), make.halves)
                    for part in parts:
                        add_to(r, part, make.widened(make.pair_products(u, z[part]), signs))
        for row, start in zip(sums, places, strict=True):
            for total, p in zip(row, start, strict=True):
                b.store(b.load(total), p, align=4)
        return context.get_dummy_value()

    i = types.intp
    result = types.void(rows, vectors, base_bits, i, codes, i, i, x, i, i, c, i, i, entries, entry_start, i)
    return result, codegen


def unpack(builder: ir.IRBuilder, bits: int, pointer: ir.Value) -> ir.Value:
    """The run of 32 codes at `pointer`, as bytes."""
    result, start, below = None, 0, bits
    for plane in planes_of(bits):
        size, below = 4 * plane, below - plane
        source = builder.bitcast(builder.gep(pointer, [_I64(start)]), ir.VectorType(_I8, size).as_pointer())
        raw = builder.load(source, align=1)
        every = builder.shuffle_vector(
            raw, raw, ir.Constant(ir.VectorType(_I32, RUN), [k % size for k in range(RUN)])
        )
        if plane < 8:
            # fields of 4 * plane codes lie in lanes of their own, so bits that cross into a byte are masked off
            lane = 32 if plane == 1 else 64
            lanes = ir.VectorType(ir.IntType(lane), 8 * RUN // lane)
            shifts = [lane // 8 * i // size * plane for i in range(lanes.count)]
            every = builder.lshr(builder.bitcast(every, lanes), ir.Constant(lanes, shifts))
            every = builder.and_(builder.bitcast(every, V_RUN), splat((1 << plane) - 1, V_RUN))
        if below:  # what is shifted out of a byte is zero, so that words can be shifted
            words = builder.bitcast(every, ir.VectorType(_I32, RUN // 4))
            every = builder.bitcast(builder.shl(words, splat(below, words.type)), V_RUN)
        result = every if result is None else builder.or_(result, every)
        start += size
    return result


def prefetch(context: Any, builder: ir.IRBuilder, pointer: ir.Value) -> None:
    """Load the cache line at `pointer`, which may be anywhere, for a later read; on x86, where it was measured."""
    if not isa_of(context).has("ssse3"):
        return
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [pointer, _I32(0), _I32(3), _I32(1)])


def load_words(builder: ir.IRBuilder, pointer: ir.Value, count: ir.Value) -> ir.Value:
    """`count` bytes, a multiple of 4, as 16 words, and then zeros; what is behind them is not read."""
    b, words = builder, ir.VectorType(_I32, 16)
    mask = ir.VectorType(ir.IntType(1), 16)
    load = cgutils.get_or_insert_function(
        b.module,
        ir.FunctionType(words, [words.as_pointer(), _I32, mask, words]),
        "llvm.masked.load.v16i32.p0",
    )
    counts = b.insert_element(ir.Constant(words, ir.Undefined), count, _I32(0))
    counts = b.shuffle_vector(counts, counts, splat(0, words))
    here = b.icmp_unsigned("<", ir.Constant(words, [4 * k for k in range(16)]), counts)
    return b.call(load, [b.bitcast(pointer, words.as_pointer()), _I32(1), here, splat(0, words)])


def unpack_64(builder: ir.IRBuilder, bits: int, pointer: ir.Value, count: ir.Value) -> ir.Value:
    """Two runs of 32 codes at `pointer` as 64 bytes, with AVX-512. Of `count` bytes: what is behind them is not read.

    A plane of w bits is w words of 32 bits in a run: one load has all planes, which a permutation spreads over words,
    and a rotation moves each word's field to the place of these bits in the code.
    """
    b, words = builder, ir.VectorType(_I32, 16)
    raw = load_words(b, pointer, count)
    result, start, below = None, 0, bits
    for plane in planes_of(bits):
        below -= plane
        pick = [bits * (k // 8) + start + k % 8 % plane for k in range(16)]
        every = b.shuffle_vector(raw, raw, ir.Constant(words, pick))
        turns = [(k % 8 // plane * plane - below) % 32 for k in range(16)]
        if any(turns):
            rotate = cgutils.get_or_insert_function(
                b.module, ir.FunctionType(words, [words] * 3), "llvm.fshr.v16i32"
            )
            every = b.call(rotate, [every, every, ir.Constant(words, turns)])
        if plane < 8:
            every = b.and_(every, splat(0x01010101 * (((1 << plane) - 1) << below), words))
        result = every if result is None else b.or_(result, every)
        start += plane
    return b.bitcast(result, ir.VectorType(_I8, 2 * RUN))


@intrinsic(prefer_literal=True)
def unpack_bytes(typingctx, bits, packed, at):
    """unpack_bytes(bits, packed, at) -> run: the 32 codes of `bits` bits (a literal) at byte `at`, as bytes."""
    if not isinstance(bits, types.IntegerLiteral) or not isinstance(packed, types.Array):
        return None
    width = bits.literal_value

    def codegen(context, builder, signature, args):
        _, packed, at = args
        return unpack(builder, width, pointer_at(context, builder, signature.args[1], packed, at, _I8))

    return run_type(bits, packed, types.intp), codegen


@intrinsic(prefer_literal=True)
def run_half(typingctx, half, run):
    """run_half(half, run) -> vec16: the first or last 16 codes (half is 0 or 1, a literal) as float32."""
    if not isinstance(half, types.IntegerLiteral) or run != run_type:
        return None
    first = LANES * half.literal_value

    def codegen(context, builder, signature, args):
        lanes = ir.Constant(ir.VectorType(_I32, LANES), list(range(first, first + LANES)))
        codes = builder.shuffle_vector(args[1], args[1], lanes)
        # signed: AVX2 has no conversion of unsigned words
        return builder.sitofp(builder.zext(codes, ir.VectorType(_I32, LANES)), V_F32)

    return vec16(half, run), codegen


@intrinsic
def store_run(typingctx, run, offset, out, at):
    """store_run(run, offset, out, at): the 32 codes minus `offset`, modulo 256, to bytes `at` on."""
    if run != run_type or not isinstance(out, types.Array):
        return None

    def codegen(context, builder, signature, args):
        run, offset, out, at = args
        value = builder.sub(run, _every_byte(builder, offset))
        builder.store(value, pointer_at(context, builder, signature.args[2], out, at, V_RUN), align=1)
        return context.get_dummy_value()

    return types.void(run, types.int64, out, types.intp), codegen


def _cut(builder: ir.IRBuilder, run: ir.Value, offset: ir.Value, half: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Codes q = run - offset cut to -half ... half - 1, plus half; and what they lack."""
    b, half = builder, _every_byte(builder, half)
    q = b.sub(run, _every_byte(b, offset))
    high, low = b.sub(half, splat(1, V_RUN)), b.neg(half)
    cut = b.select(b.icmp_signed("<", q, high), q, high)
    cut = b.select(b.icmp_signed(">", cut, low), cut, low)
    return b.add(cut, half), b.sub(q, cut)


@intrinsic
def store_cut_run(typingctx, run, offset, half, out, at):
    """store_cut_run(run, offset, half, out, at): codes q = run - offset, cut to -half ... half - 1, plus half."""
    if run != run_type or not isinstance(out, types.Array):
        return None

    def codegen(context, builder, signature, args):
        run, offset, half, out, at = args
        cut, _ = _cut(builder, run, offset, half)
        builder.store(cut, pointer_at(context, builder, signature.args[3], out, at, V_RUN), align=1)
        return context.get_dummy_value()

    i = types.int64
    return types.void(run, i, i, out, i), codegen


@intrinsic
def cut_run(typingctx, run, offset, half, rest, at):
    """cut_run(run, offset, half, rest, at) -> bool: whether codes q = run - offset lack something when they are cut.

    Stores what positive codes lack to bytes `at` on, and behind these 32 what negative ones lack.
    """
    if run != run_type or not isinstance(rest, types.Array):
        return None

    def codegen(context, builder, signature, args):
        run, offset, half, rest, at = args
        b, none = builder, splat(0, V_RUN)
        _, lacking = _cut(b, run, offset, half)
        for side, value in enumerate((lacking, b.neg(lacking))):
            above = b.select(b.icmp_signed(">", value, none), value, none)
            place = b.add(at, _I64(RUN * side))
            b.store(above, pointer_at(context, b, signature.args[3], rest, place, V_RUN), align=1)
        whole = b.bitcast(lacking, ir.IntType(8 * RUN))
        return b.icmp_unsigned("!=", whole, whole.type(0))

    i = types.int64
    return types.boolean(run, i, i, rest, i), codegen


def _every_byte(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    undefined = ir.Constant(V_RUN, ir.Undefined)
    first = builder.insert_element(undefined, builder.trunc(value, _I8), _I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, RUN), [0] * RUN))


@intrinsic
def store_rounded(typingctx, vector, out, at):
    """store_rounded(vector, out, at): 16 floats up to 127.5 to the nearest int8, even in a tie, at bytes `at` on."""
    if vector != vec16 or not isinstance(out, types.Array):
        return None

    def codegen(context, builder, signature, args):
        vector, out, at = args
        rounded = emit.add(builder, vector, emit.const(_MAGIC, V_F32))
        words = builder.bitcast(rounded, ir.VectorType(_I32, LANES))
        target = pointer_at(context, builder, signature.args[1], out, at, ir.VectorType(_I8, LANES))
        builder.store(builder.trunc(words, ir.VectorType(_I8, LANES)), target, align=1)
        return context.get_dummy_value()

    return types.void(vector, out, types.intp), codegen


@intrinsic
def sums_to_floats(typingctx, c, at, z, z_at, offset, factor):
    """sums_to_floats(c, at, z, z_at, offset, factor) -> vec16: factor (c - offset z) + (factor - 1) z, in int32.

    c, z : int32 arrays, 16 from `at` and `z_at` on: sums of (q + offset) times activations, and of activations.
    factor : 1, or 2 for codes q + 1/2 times two
    """
    if not isinstance(c, types.Array) or not isinstance(z, types.Array):
        return None

    def codegen(context, builder, signature, args):
        c, at, z, z_at, offset, factor = args
        words = ir.VectorType(_I32, LANES)

        def every(value: ir.Value) -> ir.Value:
            undefined = ir.Constant(words, ir.Undefined)
            first = builder.insert_element(undefined, builder.trunc(value, _I32), _I32(0))
            return builder.shuffle_vector(first, undefined, splat(0, words))

        total, sums = (
            builder.load(pointer_at(context, builder, signature.args[k], a, place, words), align=4)
            for k, a, place in ((0, c, at), (2, z, z_at))
        )
        factor = every(factor)
        total = builder.mul(factor, builder.sub(total, builder.mul(every(offset), sums)))
        total = builder.add(total, builder.mul(builder.sub(factor, splat(1, words)), sums))
        return builder.sitofp(total, V_F32)

    i = types.int64
    return vec16(c, i, z, i, i, i), codegen

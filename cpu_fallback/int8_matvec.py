"""y = activation(C z a + b) + residual for grid codes and int8 activations of one to a few tokens.

Vectors run along a row of the weight: 32 codes are unpacked in a register, where each token's int8 meet them.
Products, scales and their order are those of `int8_tiles`, so that a token has the same bits in a batch of any size.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import params
from ._atomics import call_address
from ._jit import cpu_inline, cpu_kernel
from ._parts import c_function, record_at, run_shares
from .arrays import ENCODING, address, bytes_at, floats_at, halves_at
from .int8_codes import run_bytes
from .int8_input import quantize_row
from .int8_simd import RUN, add_products, no_sums, sum_of
from .matvec import store_results
from .operand import MatmulCall, Operand
from .simd import element, widen

_MATVEC, _INPUT_AT = params.INT8_MATVEC.dtype, params.INT8_MATVEC.offset("input")


@cpu_inline
def _dot_1(stream, byte, bits, columns, z, z_at):
    """sum_k q[k] z[k] of one token."""
    half = 1 << (bits - 1)
    a = no_sums()
    for k in range(0, columns, RUN):
        a = add_products(a, run_bytes(stream, byte, bits), half, z, z_at + k)
        byte += 4 * bits
    return sum_of(a)


@cpu_inline
def _dot_4(stream, byte, bits, columns, z, z_at):
    """The same of four tokens, whose rows of z follow each other."""
    half = 1 << (bits - 1)
    a, b, c, d = no_sums(), no_sums(), no_sums(), no_sums()
    for k in range(z_at, z_at + columns, RUN):
        run = run_bytes(stream, byte, bits)
        a = add_products(a, run, half, z, k)
        b = add_products(b, run, half, z, k + columns)
        c = add_products(c, run, half, z, k + 2 * columns)
        d = add_products(d, run, half, z, k + 3 * columns)
        byte += 4 * bits
    return sum_of(a), sum_of(b), sum_of(c), sum_of(d)


@cpu_inline(exact=True)
def _block(p, first, part):
    """The results of a block of rows; without fast-math, so that scales are multiplied in the order of the tiles."""
    w, block, columns, tokens = p.weight, p.block, p.columns, p.tokens
    rows, bits = min(block, w.rows_padded - first), w.bits
    stream, z, scale = bytes_at(w.value), bytes_at(p.z), floats_at(p.scale)
    lines, at = floats_at(p.lines), part * p.lines_stride
    for r in range(rows):
        byte = (first + r) * columns // 8 * bits
        s = w.gain * widen(element(halves_at(w.scale), first + r))
        whole = tokens // 4 * 4
        for t in range(0, whole, 4):
            sums = _dot_4(stream, byte, bits, columns, z, t * columns)
            for i in range(4):
                lines[at + (t + i) * block + r] = np.float32(sums[i]) * (s * scale[t + i])
        for t in range(whole, tokens):
            total = _dot_1(stream, byte, bits, columns, z, t * columns)
            lines[at + t * block + r] = np.float32(total) * (s * scale[t])
    for t in range(tokens):
        store_results(w, p.output, t, first, min(rows, w.rows - first), lines, at + t * block)


@cpu_inline(exact=True, inline=False)
def _part(params_at, blocks, parts, begin, end):
    """The blocks of rows of parts begin .. end, each with its own scratch memory."""
    p = record_at(params_at, _MATVEC)
    for part in range(begin, end):
        for b in range(blocks * part // parts, blocks * (part + 1) // parts):
            _block(p, b * p.block, part)


def _int8_matvec(params_at):
    p = record_at(params_at, _MATVEC)
    w = p.weight
    scale, z, line = floats_at(p.scale), bytes_at(p.z), floats_at(p.line)
    for t in range(p.tokens):
        scale[t] = quantize_row(
            p.input.x, p.input.kind, t * p.in_features, p.in_features, w.column_scale, p.columns, line, 0, z,
            t * p.columns,
        )  # fmt: skip
    blocks = (w.rows_padded + p.block - 1) // p.block
    run_shares(_part, p.parts, 1, p.parts, (params_at, blocks, p.parts))


#: out = activation(x W^T + bias) + residual with int8 activations: a C function of the address of a
#: `params.INT8_MATVEC`
INT8_MATVEC = c_function(_int8_matvec)


@cpu_kernel
def _call(function, params_at):
    call_address(function, (params_at,))


def int8_matvec(params_at: int) -> None:
    """Run `INT8_MATVEC`."""
    _call(INT8_MATVEC(), params_at)


class Int8MatvecCall(MatmulCall):
    """The filled struct of such a matmul, and its memory."""

    __slots__ = ()

    def __init__(self, w: Operand, n: int, in_features: int, threads: int, buffer: Any) -> None:
        z_bytes = -(-n * w.columns // 64) * 64
        scale_bytes = -(-4 * n // 64) * 64
        line = z_bytes + scale_bytes
        lines = line + -(-4 * w.columns // 64) * 64
        scratch = buffer(lines + 4 * threads * n * w.block)
        z = address(scratch)
        record = params.INT8_MATVEC.record(
            weight=w.params.item(),
            tokens=n,
            in_features=in_features,
            block=w.block,
            columns=w.columns,
            z=z,
            scale=z + z_bytes,
            line=z + line,
            lines=z + lines,
            lines_stride=n * w.block,
            parts=threads,
        )
        super().__init__(w, params.INT8_MATVEC, record, scratch)

    kernel = staticmethod(INT8_MATVEC)
    written_at = 0  # it always writes

    def set_input(self, x: Any) -> None:
        """Read x (n, in_features) at the next call."""
        params.pack_input(self._bytes, _INPUT_AT, address(x), ENCODING[x.dtype])

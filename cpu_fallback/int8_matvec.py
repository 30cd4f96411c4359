"""y = activation(C z a + b) + residual for int8 activations of one to a few tokens: see `int8_tiles`.

Vectors run along the rows of the weight: codes are unpacked in registers, where the int8 of a token meet them
(`int8_rows`). Products, scales and their order are those of `int8_tiles`, so that a token has the same bits in a
batch of any size.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import params
from ._atomics import call_address
from ._jit import cpu_inline, cpu_kernel
from ._parts import address_at, c_function, record_at, run_shares
from .arrays import ENCODING, GRID, address, bytes_at, floats_at, halves_at, ints_at
from .exceptions import times_bytes
from .int8_input import quantize_row
from .int8_rows import STEP, SUMS, dense_sums, grid_sums
from .int8_simd import RUN
from .matvec import store_results
from .operand import MatmulCall, Operand
from .simd import element, widen

_MATVEC, _INPUT_AT = params.INT8_MATVEC.dtype, params.INT8_MATVEC.offset("input")
_HALF = np.float32(0.5)
_BYTE_OFFSET = np.int64(128)  # of codes of 8 bits


@cpu_inline(exact=True)
def _four(tokens, p, row, rows, t, codes, bits, at):
    """Sums over columns as float32, of up to four rows and a token, or of a row and up to four tokens.

    tokens : literal, 1 or 4
    rows : of four tokens, how many of their sums are read
    codes, bits, at : the packed codes of `row` begin at codes[at]
    """
    w, columns, depth = p.weight, p.columns, p.depth
    z, sums = bytes_at(p.z), ints_at(p.sums)
    size, z_at = columns // 8 * bits, t * depth
    if w.kind == GRID:
        a, b, c, d = grid_sums(tokens, bits, codes, at, size, rows, z, z_at, depth, columns, sums, t)
        if w.exception_start != 0:
            down, along = (1, 0) if tokens == 1 else (0, depth)
            a += times_bytes(w, row, z, z_at)
            if rows > 1:
                b += times_bytes(w, row + down, z, z_at + along)
            if rows > 2:
                c += times_bytes(w, row + 2 * down, z, z_at + 2 * along)
            if rows > 3:
                d += times_bytes(w, row + 3 * down, z, z_at + 3 * along)
        return np.float32(a), np.float32(b), np.float32(c), np.float32(d)
    return dense_sums(
        tokens, bits, codes, at, size, rows, z, z_at, depth, columns, sums, t * p.groups, p.group,
        halves_at(w.scale), row * p.groups,
    )  # fmt: skip


@cpu_inline(exact=True)
def _gain(w, row):
    """What sums are multiplied with, besides the scale of their token."""
    return w.gain * widen(element(halves_at(w.scale), row)) if w.kind == GRID else w.gain * _HALF


@cpu_inline(exact=True)
def _block(p, first, part):
    """The results of a block of rows; without fast-math, so that scales are multiplied in the order of the tiles."""
    w, block, tokens, scale = p.weight, p.block, p.tokens, floats_at(p.scale)
    rows = min(block, w.rows_padded - first)
    left = tokens % SUMS
    together = (
        tokens - left if left < 3 else tokens
    )  # one or two left are multiplied with four rows at a time
    lines, at = floats_at(p.lines), part * p.lines_stride
    bits = w.bits
    codes, size = bytes_at(w.value), p.columns // 8 * bits
    codes_at = first * size
    if w.planes_of_rows != 0:
        codes, bits, size, codes_at = bytes_at(p.codes), 8, p.columns, part * p.codes_stride
        call_address(
            w.planes_of_rows,
            (address_at(w), first, rows, 0, p.columns, _BYTE_OFFSET, p.codes + codes_at, size),
        )
    for t in range(0, together, SUMS):
        count = min(SUMS, tokens - t)
        for r in range(rows):
            y, gain = (
                _four(SUMS, p, first + r, count, t, codes, bits, codes_at + r * size),
                _gain(w, first + r),
            )
            for i in range(count):
                lines[at + (t + i) * block + r] = y[i] * (gain * scale[t + i])
    for t in range(together, tokens):
        for r in range(0, rows, SUMS):
            count = min(SUMS, rows - r)
            y = _four(1, p, first + r, count, t, codes, bits, codes_at + r * size)
            for i in range(count):
                lines[at + t * block + r + i] = y[i] * (_gain(w, first + r + i) * scale[t])
    for t in range(tokens):
        store_results(w, p.output, t, first, min(rows, w.rows - first), lines, at + t * block)


@cpu_inline(exact=True, inline=False)
def _part(params_at, blocks, parts, begin, end):
    """The blocks of rows of parts begin .. end, each with its own scratch memory."""
    p = record_at(params_at, _MATVEC)
    for part in range(begin, end):
        for b in range(blocks * part // parts, blocks * (part + 1) // parts):
            _block(p, b * p.block, part)


@cpu_inline
def _spread(z, z_at, groups):
    """Groups of 32 bytes to each 64, with zeros behind them."""
    for g in range(groups - 1, -1, -1):
        for k in range(RUN):
            z[z_at + STEP * g + k] = z[z_at + RUN * g + k]
    for g in range(groups):
        for k in range(RUN, STEP):
            z[z_at + STEP * g + k] = 0


def _int8_matvec(params_at):
    p = record_at(params_at, _MATVEC)
    w = p.weight
    scale, z, line, sums = floats_at(p.scale), bytes_at(p.z), floats_at(p.line), ints_at(p.sums)
    for t in range(p.tokens):
        z_at = t * p.depth
        scale[t] = quantize_row(
            p.input.x,
            p.input.kind,
            t * p.in_features,
            p.in_features,
            w.column_scale,
            p.columns,
            line,
            0,
            z,
            z_at,
        )
        distance = p.group
        if p.spread != 0:
            distance = STEP
            _spread(z, z_at, p.groups)
        else:
            for k in range(p.columns, p.depth):
                z[z_at + k] = 0
        for g in range(p.groups):
            total = np.int32(0)
            for k in range(min(p.group, p.columns - g * p.group)):
                total += np.int32(np.int8(z[z_at + g * distance + k]))
            sums[t * p.groups + g] = total
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
        group = w.columns if w["kind"] == GRID else w["group"]
        groups = -(-w.columns // group)
        spread = w["kind"] != GRID and group == RUN
        depth = STEP * groups if spread else -(-w.columns // STEP) * STEP
        of_four = -(-n // SUMS) * SUMS  # tokens that are read; what is behind the last has no meaning
        sizes = {
            "z": of_four * depth,
            "scale": 4 * n,
            "sums": 4 * of_four * groups,
            "line": 4 * w.columns,
            "lines": 4 * threads * n * w.block,
            "codes": threads * w.block * w.columns if w["planes_of_rows"] else 0,
        }
        scratch = buffer(sum(-(-size // 64) * 64 for size in sizes.values()))
        at, fields = address(scratch), {}
        for name, size in sizes.items():
            fields[name] = at
            at += -(-size // 64) * 64
        record = params.INT8_MATVEC.record(
            weight=w.params.item(),
            tokens=n,
            in_features=in_features,
            block=w.block,
            columns=w.columns,
            depth=depth,
            spread=int(spread),
            group=group,
            groups=groups,
            lines_stride=n * w.block,
            codes_stride=w.block * w.columns,
            parts=threads,
            **fields,
        )
        super().__init__(w, params.INT8_MATVEC, record, scratch)

    kernel = staticmethod(INT8_MATVEC)
    written_at = 0  # it always writes

    def set_input(self, x: Any) -> None:
        """Read x (n, in_features) at the next call."""
        params.pack_input(self._bytes, _INPUT_AT, address(x), ENCODING[x.dtype])

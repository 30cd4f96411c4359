"""y = activation(C z a + b) + residual for int8 activations z with scales a of tokens: tiles of up to 64 tokens.

    grid codes     y[r, t] = gain row_scale[r] a[t] sum_k q[r, k] z[k, t]
    dense codes    y[r, t] = gain a[t] / 2 sum_g scale[r, g] sum_(k in g) (2 q[r, k] + 1) z[k, t]

The sums over k are int32 and exact. `int8_input` makes z in the same run of threads; a unit of work is some rows of
blocks times some tiles of tokens, as in `matmul_tiles`: it unpacks each code once, to bytes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from . import isa, params
from ._atomics import call_address
from ._jit import cpu_inline
from ._parts import SHARE, address_at, c_function, next_unit, part_kernel, record_at, run_parts, wait_for
from .arrays import ENCODING, GRID, address, bytes_at, floats_at, halves_at, ints_at, longs_at
from .epilogue import EPILOGUE
from .fast_transform import transform_address
from .int8_codes import rows_of_bytes
from .int8_input import DONE, INT8_INPUT, TOKENS
from .int8_simd import RUN, int8_block, many_registers, sums_to_floats
from .matmul_rows import TILE
from .matmul_tiles import scratch_memory
from .operand import MatmulCall, Operand
from .simd import element, vfma, vload, vmul, vsplat, vstore, wide_registers, widen

_INT8_INPUT, _INPUT_AT = params.INT8_INPUT.dtype, params.INT8_INPUT.offset("input")
_GROUP_TILES = 8
_UNITS = 4
_PANEL = 256
_MOST_ROWS = 128
_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)


# fmt: off
@cpu_inline
def _rows(
    base_bits, nrows, runs, lines, at, row, x, x_at, x_step, vectors, c, c_at, width, entries, starts, s_at
):
    """c[r, t] += sum_k u[r, k] z[k, t]; base_bits : a literal. Rows up to a multiple of four may be written."""
    if many_registers():
        for r in range(0, nrows, 4):
            if vectors == 4 and wide_registers():
                int8_block(
                    4, 4, 5, runs, lines, at + r * row, row, x, x_at, x_step, c, c_at + r * width, width, entries,
                    starts, s_at + r,
                )
            else:
                for v in range(vectors):
                    int8_block(
                        4, 1, 5, runs, lines, at + r * row, row, x, x_at + 64 * v, x_step, c,
                        c_at + r * width + 16 * v, width, entries, starts, s_at + r,
                    )
    elif vectors == 4:
        for r in range(nrows):
            int8_block(
                1, 4, base_bits, runs, lines, at + r * row, row, x, x_at, x_step, c, c_at + r * width, width,
                entries, starts, s_at + r,
            )
    else:
        for r in range(0, nrows, 2):
            for v in range(vectors):
                int8_block(
                    2, 1, base_bits, runs, lines, at + r * row, row, x, x_at + 64 * v, x_step, c,
                    c_at + r * width + 16 * v, width, entries, starts, s_at + r,
                )


def _multiply_5(nrows, runs, lines, row, x, vectors, c, width, entries, starts):
    """c[r, t] += sum_k u[r, k] z[k, t] for the unpacked rows of a unit, columns of one panel; all addresses."""
    _rows(
        5, nrows, runs, bytes_at(lines), 0, row, bytes_at(x), 0, 4 * width, vectors, ints_at(c), 0, width,
        ints_at(entries), ints_at(starts), 0,
    )


def _multiply_6(nrows, runs, lines, row, x, vectors, c, width, entries, starts):
    _rows(
        6, nrows, runs, bytes_at(lines), 0, row, bytes_at(x), 0, 4 * width, vectors, ints_at(c), 0, width,
        ints_at(entries), ints_at(starts), 0,
    )


def _multiply_7(nrows, runs, lines, row, x, vectors, c, width, entries, starts):
    _rows(
        7, nrows, runs, bytes_at(lines), 0, row, bytes_at(x), 0, 4 * width, vectors, ints_at(c), 0, width,
        ints_at(entries), ints_at(starts), 0,
    )


#: By the bits of codes where products are added in int16; elsewhere all are the same.
MULTIPLY = {5: c_function(_multiply_5), 6: c_function(_multiply_6), 7: c_function(_multiply_7)}


@cpu_inline
def _multiply(p, a, panel, r0, nrows, depth, part, x_at, vectors, c):
    """Call `MULTIPLY` for the columns of one panel; c : address."""
    call_address(
        p.multiply,
        (nrows, depth // RUN, p.lines + part * p.lines_stride, p.panel, a.out + x_at, vectors, c, a.width, p.entries,
         p.entry_start + 4 * (panel * (p.weight.rows_padded + 4) + r0)),
    )
# fmt: on


@cpu_inline
def _clear(c, at, count):
    zero = vsplat(_ZERO)
    for k in range(at, at + count, 16):
        vstore(c, k, zero)


@cpu_inline
def _unit(p, a, r0, nrows, first_tile, last_tile, part):
    w = p.weight
    width, columns = a.width, a.columns
    c, sums, at, tile_sums = floats_at(p.sums), ints_at(p.sums), part * p.sums_stride, p.unit_rows * width
    group_sums, group_at = ints_at(p.group_sums), part * p.group_sums_stride
    z_sums, grid = ints_at(a.sums), w.kind == GRID
    _clear(c, at, (last_tile - first_tile) * tile_sums)
    for panel in range((columns + p.panel - 1) // p.panel):
        column = panel * p.panel
        depth = min(p.panel, columns - column)
        rows_of_bytes(
            w,
            p.offset,
            p.base_bits,
            r0,
            nrows,
            column,
            depth,
            bytes_at(p.lines),
            part * p.lines_stride,
            p.panel,
        )
        for tile in range(first_tile, last_tile):
            vectors = (min(width, a.tokens - tile * width) + 15) // 16
            x_at, c_at = (tile * a.depth + column) * width, at + (tile - first_tile) * tile_sums
            if grid:
                _multiply(p, a, panel, r0, nrows, depth, part, x_at, vectors, p.sums + 4 * c_at)
            else:  # a panel is a group
                _clear(floats_at(p.group_sums), group_at, tile_sums)
                _multiply(p, a, panel, r0, nrows, depth, part, x_at, vectors, p.group_sums + 4 * group_at)
                z_at = (tile * a.groups + panel) * width
                for r in range(nrows):
                    s = vsplat(widen(element(halves_at(w.scale), (r0 + r) * a.groups + panel)))
                    for k in range(r * width, r * width + 16 * vectors, 16):
                        y = sums_to_floats(
                            group_sums, group_at + k, z_sums, z_at + k - r * width, p.offset, 2
                        )
                        vstore(c, c_at + k, vfma(s, y, vload(c, c_at + k)))
    for tile in range(first_tile, last_tile):
        vectors = (min(width, a.tokens - tile * width) + 15) // 16
        c_at, z_at = at + (tile - first_tile) * tile_sums, tile * a.groups * width
        for r in range(nrows):
            gain = w.gain * _HALF
            if grid:
                gain = w.gain * widen(element(halves_at(w.scale), r0 + r))
            s = vsplat(gain)
            for v in range(vectors):
                k = c_at + r * width + 16 * v
                y = sums_to_floats(sums, k, z_sums, z_at + 16 * v, p.offset, 1) if grid else vload(c, k)
                scale = vmul(s, vload(floats_at(a.scale), tile * width + 16 * v))
                vstore(c, k, vmul(y, scale))
        call_address(
            p.epilogue,
            (address_at(w), address_at(p.output), p.block, p.transform_out, p.sums + 4 * c_at,
             min(nrows, w.rows - r0), w.first_row + r0, min(width, a.tokens - tile * width), tile * width, vectors,
             width, p.corner + 4 * part * p.corner_stride, np.int64(0)),
        )  # fmt: skip


def _part(part, p, like):
    """Activations to int8, together with the other parts; then units, as long as there are some."""
    a, w = record_at(p.input, _INT8_INPUT), p.weight
    if p.input_kernel != 0:
        call_address(p.input_kernel, (part, p.input, np.int64(0)))
        wait_for(longs_at(a.state), DONE, a.units)
    tiles = (a.tokens + a.width - 1) // a.width
    groups = (tiles + p.group_tiles - 1) // p.group_tiles
    units = (w.rows_padded + p.unit_rows - 1) // p.unit_rows * groups
    counters = longs_at(p.counters)
    unit = next_unit(counters, units, part, p.parts)
    while unit < units:
        r0, tile = unit // groups * p.unit_rows, unit % groups * p.group_tiles
        rows = min(p.unit_rows, w.rows_padded - r0)
        _unit(p, a, r0, rows, tile, min(tile + p.group_tiles, tiles), part)
        unit = next_unit(counters, units, part, p.parts)


#: The matmul of an `Int8TilesCall`: a function of (part, address of a `params.INT8_TILES`, 0).
INT8_TILES = part_kernel(_part, params.INT8_TILES.dtype)


@cache
def _ones(columns: int) -> Any:
    """Codes of 1, and behind them a list of no exceptions."""
    return np.repeat(np.array([1, 0], np.uint8), (columns, 64))


class Int8Activations:
    """Activations as int8 for a weight. While they are `pending`, the next matmul fills them."""

    __slots__ = (
        "_bytes",
        "buffer",
        "n",
        "operand",
        "params",
        "params_at",
        "pending",
        "state",
        "tiles",
        "width",
    )

    def __init__(self, w: Operand, n: int, in_features: int, threads: int, buffer: Any) -> None:
        block, columns = w.block, w.columns
        self.n, self.operand = n, w
        self.width = min(TILE, -(-n // TOKENS) * TOKENS)
        self.tiles = -(-n // self.width)
        depth = -(-columns // 64) * 64
        group = columns if w["kind"] == GRID else w["group"]
        groups = -(-columns // group)
        scratch = TOKENS * depth + 4 * columns
        if w.transform_in != "none":
            scratch += 4 * TOKENS * (columns + 2 * block)
        tokens = self.tiles * self.width
        sizes = {
            "out": tokens * depth,
            "scale": 4 * tokens,
            "sums": 4 * tokens * groups,
            "scratch": threads * scratch,
            "state": 8 * SHARE * (threads + 1),
        }
        self.buffer = buffer(sum(-(-size // 64) * 64 for size in sizes.values()))
        at, start, fields = 0, address(self.buffer), {}
        for name, size in sizes.items():
            fields[name] = start + at
            if name == "state":
                self.state = self.buffer[at : at + size].view(np.int64)
            at += -(-size // 64) * 64
        self.params = params.INT8_INPUT.record(
            tokens=n,
            in_features=in_features,
            block=block,
            transform=transform_address(w.transform_in, block, True),
            column_scale=w["column_scale"],
            columns=columns,
            depth=depth,
            group=group,
            groups=groups,
            width=self.width,
            ones=address(_ones(columns)),
            scratch_stride=scratch,
            units=tokens // TOKENS,
            parts=threads,
            **fields,
        )
        self._bytes = self.params.view(np.uint8)
        self.params_at = address(self._bytes)
        self.pending = True

    def set_input(self, x: Any) -> None:
        """Read x (n, in_features) at the next matmul."""
        params.pack_input(self._bytes, _INPUT_AT, address(x), ENCODING[x.dtype])
        self.pending = True


class Int8TilesCall(MatmulCall):
    """The filled struct of a matmul: which rows and columns a unit takes, and where its scratch memory lies."""

    __slots__ = ("counters", "input", "input_kernel")

    def __init__(self, a: Int8Activations, threads: int, buffer: Any) -> None:
        w = a.operand
        block, width = w.block, a.width
        group_tiles = min(a.tiles, _GROUP_TILES)
        groups = -(-a.tiles // group_tiles)
        blocks = -(-w.rows_padded // block)
        rows = block * max(1, min(blocks * groups // (_UNITS * threads), _MOST_ROWS // block))
        grid = w["kind"] == GRID
        panel = min(_PANEL if grid else w["group"], w.columns)
        scratch = (
            ("sums", "sums_stride", group_tiles * rows * width, 4),
            ("group_sums", "group_sums_stride", 0 if grid else rows * width, 4),
            ("lines", "lines_stride", rows * panel, 1),
            ("corner", "corner_stride", 256 + (block * width if w.transform_out else 0), 4),
        )
        memory, self.counters, fields = scratch_memory(scratch, threads, buffer)
        exceptions = w.int8_exceptions(panel)
        record = params.INT8_TILES.record(
            weight=w.params.item(),
            input=a.params_at,
            offset=_offset(w.bits, exceptions.base_bits),
            base_bits=exceptions.base_bits,
            multiply=MULTIPLY[exceptions.base_bits or 5](),
            epilogue=EPILOGUE(),
            entries=address(exceptions.entries),
            entry_start=address(exceptions.starts),
            block=block,
            transform_out=w.transform_out,
            unit_rows=rows,
            panel=panel,
            group_tiles=group_tiles,
            parts=threads,
            **fields,
        )
        super().__init__(w, params.INT8_TILES, record, memory)
        self.input, self.input_kernel = a, record["input_kernel"]

    kernel = staticmethod(INT8_TILES)


def _offset(bits: int, base: int) -> int:
    """What is added to codes before they are multiplied."""
    if base:
        return 1 << (base - 1)
    return 0 if isa.active().has("dotprod") else 1 << (bits - 1)


def int8_tiles(call: Int8TilesCall, threads: int) -> None:
    """Run a call whose struct is filled."""
    a = call.input
    call.counters.fill(0)
    call.input_kernel[0] = INT8_INPUT() if a.pending else 0
    if a.pending:
        a.state.fill(0)
    run_parts(call.kernel(), threads, call.params_at)
    a.pending = False

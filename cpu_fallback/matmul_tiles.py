"""y = activation(C x^ + b) + residual in tiles of up to 64 tokens, without ever forming W.

`product` has the loops, `codes` turns stored bytes into what they read, `operand` describes a weight to them.
A unit of work is some rows of blocks times some tiles of tokens: it reads each code byte once, keeps its sums
in the second-level cache and ends with the transform of its rows, bias, activation, residual and storage
type. A dense weight takes the same path, without transforms.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from ._jit import cpu_inline
from ._parts import SHARE, call_part, next_unit, part_kernel, run_parts, wait_for
from .codes import (
    BITMAP,
    RUN,
    basis_entries,
    code_rows,
    count_bits,
    entry_columns,
    entry_values,
    expand,
)
from .fast_transform import transform_address
from .operand import (
    ACTIVATION,
    B_OFFSET,
    B_ROOM,
    B_START,
    B_START_ROOM,
    B_VALUE,
    BIAS,
    BITS,
    BLOCK,
    COLUMN_SCALE,
    COLUMNS,
    CORNER,
    CORNER_ROOM,
    COUNTERS,
    DEPTH,
    E_OFFSET,
    E_ROOM,
    E_START,
    E_START_ROOM,
    E_VALUE,
    ENCODING,
    FEATURES,
    GROUP,
    GROUP_TILES,
    IN_PART,
    IN_TABLE,
    INDEX,
    INDEX_KIND,
    KIND,
    LINE_ROOM,
    LINES,
    OUT,
    OUT_FEATURES,
    OUT_KIND,
    PANEL,
    PANELS,
    PARAM_BLOCKS,
    PARAM_COUNT,
    PARAMS,
    PARTS,
    PLACES,
    PSI_OFFSET,
    PSI_START,
    PSI_VALUE,
    REALS,
    RESIDUAL,
    RESIDUAL_KIND,
    ROW,
    ROW_BYTES,
    ROW_START,
    ROW_VALUES,
    ROWS,
    ROWS_PAD,
    SCALE,
    SUM_FEATURES,
    SUM_ROOM,
    SUMS,
    T_COLUMN,
    T_FACTOR,
    T_PARAM,
    T_ROW,
    TERMS,
    TOKENS,
    TRANSFORM,
    UNIT_ROWS,
    VALUE,
    WIDTH,
    Operand,
    X,
    address,
    feature_arrays,
)  # fmt: skip
from .product import (
    DONE,
    F32,
    IN_KIND,
    IN_STATE,
    IN_UNITS,
    IN_X,
    TILE,
    TRANSFORM_IN,
    WRONG,
    bytes_at,
    dense_rows,
    finish,
    floats_at,
    ints_at,
    longs_at,
    sparse_rows,
)  # fmt: skip
from .simd import vload, vstore

_GROUP_TILES = 8  # tiles that a unit's sums are kept for at a time: 512 tokens
_UNITS = 4  # of work for a thread, at least, where there are rows for them
_PANEL = 256  # columns of dense codes multiplied at a time
_ENTRIES = 48 << 10  # entries of a unit: 400 kB of positions and values in the second-level cache


@cpu_inline
def _basis_of_unit(t, gain, r0, nrows, own):
    """The basis entries of a unit: of its blocks, or, for vectors, of its rows."""
    if t[FEATURES] > 0:
        matrix = t[SUM_FEATURES] > 0
        functions, first, count = 1, r0, nrows
        if matrix:
            functions, first, count = t[SUM_FEATURES], r0 // t[BLOCK], (nrows + t[BLOCK] - 1) // t[BLOCK]
        basis_entries(
            t[PARAMS], gain, t[PARAM_BLOCKS], t[PARAM_COUNT], t[FEATURES], t[TERMS], longs_at(t[T_ROW]),
            longs_at(t[T_COLUMN]),
            longs_at(t[T_PARAM]), floats_at(t[T_FACTOR]), first, count, functions, t[COLUMNS], t[WIDTH],
            longs_at(t[B_START]),
            own * t[B_START_ROOM], ints_at(t[B_OFFSET]), floats_at(t[B_VALUE]), own * t[B_ROOM],
        )  # fmt: skip


@cpu_inline
def _finish_tile(t, tile, r0, nrows, own, x, vectors, c, at):
    """Basis part, transform, bias, activation, residual of a unit's sums for one tile.

    The basis entries meet the input's basis features: in rows of their own behind the coefficients' (matrix),
    or in the rows themselves (vectors).
    """
    block, width = t[BLOCK], t[WIDTH]
    if t[FEATURES] > 0:
        rows, place = nrows, at
        if t[SUM_FEATURES] > 0:
            blocks = (nrows + block - 1) // block
            rows, place = blocks * t[SUM_FEATURES], at + blocks * block * width
        sparse_rows(
            rows, longs_at(t[B_START]), own * t[B_START_ROOM], 1, ints_at(t[B_OFFSET]), 1,
            floats_at(t[B_VALUE]), x,
            tile * t[DEPTH] * width, vectors, t[SUM_FEATURES] > 0, c, place, width,
        )  # fmt: skip
    finish(
        c, at, min(nrows, t[ROWS] - r0), t[ROW] + r0, block, t[SUM_FEATURES], longs_at(t[PSI_START]),
        ints_at(t[PSI_OFFSET]),
        floats_at(t[PSI_VALUE]), t[TRANSFORM], min(width, t[TOKENS] - tile * width), tile * width, vectors,
        width, t[BIAS],
        t[ACTIVATION], t[RESIDUAL], t[RESIDUAL_KIND], t[OUT], t[OUT_KIND], t[OUT_FEATURES],
        floats_at(t[CORNER]), own * t[CORNER_ROOM],
    )  # fmt: skip


@cpu_inline
def _sparse_unit(t, reals, r0, nrows, first_tile, last_tile, own):
    gain, panels, width = reals[0], t[PANELS], t[WIDTH]
    row_start = longs_at(t[ROW_START])
    first, stop = row_start[r0], row_start[r0 + nrows]
    e_own, s_own, at = own * t[E_ROOM], own * t[E_START_ROOM], own * t[SUM_ROOM]
    values, offsets, starts = floats_at(t[E_VALUE]), ints_at(t[E_OFFSET]), longs_at(t[E_START])
    x, c = floats_at(t[X]), floats_at(t[SUMS])
    entry_values(t[VALUE], t[SCALE], t[KIND], t[BITS], t[GROUP], reals[1], gain, first, stop, values, e_own)
    base = first // 32 * 32
    for r in range(nrows):
        row = r0 + r
        entry_columns(
            t[INDEX_KIND], t[INDEX], row, t[ROW_BYTES], row_start[t[ROWS_PAD]], row_start[row],
            row_start[row + 1] - row_start[row], width, t[PANEL], panels, offsets,
            e_own + row_start[row] - base, starts, s_own + r * panels,
        )  # fmt: skip
    starts[s_own + nrows * panels] = e_own + stop - base
    _basis_of_unit(t, gain, r0, nrows, own)
    for tile in range(first_tile, last_tile):
        vectors = (min(width, t[TOKENS] - tile * width) + 15) // 16
        x_at = tile * t[DEPTH] * width
        for p in range(panels):
            sparse_rows(
                nrows, starts, s_own + p, panels, offsets, 1, values, x, x_at, vectors, p == 0, c, at, width
            )  # fmt: skip
        _finish_tile(t, tile, r0, nrows, own, x, vectors, c, at)


@cpu_inline
def _laid_out(t, reals, r0, nrows, p, depth, own):
    """Columns p * panel to depth behind of sparse rows, zeros and all, to the unit's lines.

    Entries of a row follow each other, so the panels must come in order: where a row's next one begins is kept.
    """
    row_start, after, at = longs_at(t[ROW_START]), longs_at(t[E_START]), own * t[E_START_ROOM]
    values, v, index = floats_at(t[E_VALUE]), own * t[E_ROOM], bytes_at(t[INDEX])
    lines = floats_at(t[LINES])
    for r in range(nrows):
        if p == 0:
            after[at + r] = row_start[r0 + r]
        first, line = after[at + r], own * t[LINE_ROOM] + r * t[PANEL]
        byte = (r0 + r) * t[ROW_BYTES] + p * t[PANEL] // 8
        count = depth
        if t[INDEX_KIND] == BITMAP:
            count = np.int64(0)
            for k in range(0, depth // 8, 2):
                count += count_bits(index, byte + k)
        entry_values(
            t[VALUE], t[SCALE], t[KIND], t[BITS], t[GROUP], reals[1], reals[0], first, first + count, values, v
        )  # fmt: skip
        e = v + first % RUN
        if t[INDEX_KIND] == BITMAP:
            for k in range(0, depth // 8, 2):
                vstore(lines, line + 8 * k, expand(values, e, index, byte + k))
                e += count_bits(index, byte + k)
        else:
            for k in range(0, depth, 16):
                vstore(lines, line + k, vload(values, e + k))
        after[at + r] = first + count


@cpu_inline
def _dense_unit(t, reals, r0, nrows, first_tile, last_tile, own):
    gain, panel, width = reals[0], t[PANEL], t[WIDTH]
    row_values = t[ROW_VALUES]
    x, c, lines = floats_at(t[X]), floats_at(t[SUMS]), floats_at(t[LINES])
    blocks = (nrows + t[BLOCK] - 1) // t[BLOCK]
    at, tile_sums = own * t[SUM_ROOM], blocks * (t[BLOCK] + t[SUM_FEATURES]) * width
    for p in range(t[PANELS]):
        column = p * panel
        depth = min(panel, row_values - column)
        a, a_at, a_row = t[VALUE], r0 * row_values + column, row_values
        if t[ROW_START] != 0:
            a, a_at, a_row = t[LINES], own * t[LINE_ROOM], panel
            _laid_out(t, reals, r0, nrows, p, depth, own)
        elif t[KIND] != F32:
            a, a_at, a_row = t[LINES], own * t[LINE_ROOM], panel
            code_rows(
                t[VALUE], t[SCALE], t[COLUMN_SCALE], t[KIND], t[BITS], t[GROUP], reals[2], gain, row_values,
                r0, nrows, column,
                depth, lines, a_at, panel,
            )  # fmt: skip
        for tile in range(first_tile, last_tile):
            vectors = (min(width, t[TOKENS] - tile * width) + 15) // 16
            dense_rows(
                nrows, depth, floats_at(a), a_at, a_row, x, (tile * t[DEPTH] + column) * width, vectors,
                p == 0, c,
                at + (tile - first_tile) * tile_sums, width,
            )  # fmt: skip
    _basis_of_unit(t, gain, r0, nrows, own)
    for tile in range(first_tile, last_tile):
        vectors = (min(width, t[TOKENS] - tile * width) + 15) // 16
        place = at + (tile - first_tile) * tile_sums
        _finish_tile(t, tile, r0, nrows, own, x, vectors, c, place)


@cpu_inline
def _activations_ready(t, part):
    """Transforms the activations, together with the other parts, if that is still to be done.

    Whether there is something to multiply: not where values are not finite and the weight is compressed.
    """
    if t[IN_TABLE] == 0:
        return True
    x = longs_at(t[IN_TABLE])
    call_part(t[IN_PART], part, x)
    state = longs_at(x[IN_STATE])
    wait_for(state, DONE, x[IN_UNITS])
    return state[WRONG] == 0 or (t[ROW_START] == 0 and t[BITS] == 0)


def _sparse_part(part, table, like):
    """out = activation(x W^T + bias) + residual for sparse codes: units of it, as long as there are some.

    table : as `operand` describes it, filled by `TilesCall`
    """
    t = numba.carray(table, PLACES)
    if not _activations_ready(t, part):
        return
    reals = floats_at(t[REALS])
    tiles = (t[TOKENS] + t[WIDTH] - 1) // t[WIDTH]
    groups = (tiles + t[GROUP_TILES] - 1) // t[GROUP_TILES]
    units = (t[ROWS_PAD] + t[UNIT_ROWS] - 1) // t[UNIT_ROWS] * groups
    counters = longs_at(t[COUNTERS])
    unit = next_unit(counters, units, part, t[PARTS])
    while unit < units:
        r0, tile = unit // groups * t[UNIT_ROWS], unit % groups * t[GROUP_TILES]
        rows = min(t[UNIT_ROWS], t[ROWS_PAD] - r0)
        _sparse_unit(t, reals, r0, rows, tile, min(tile + t[GROUP_TILES], tiles), part)
        unit = next_unit(counters, units, part, t[PARTS])


def _dense_part(part, table, like):
    """The same for codes of every coefficient, sparse ones with few zeros, and dense weights."""
    t = numba.carray(table, PLACES)
    if not _activations_ready(t, part):
        return
    reals = floats_at(t[REALS])
    tiles = (t[TOKENS] + t[WIDTH] - 1) // t[WIDTH]
    groups = (tiles + t[GROUP_TILES] - 1) // t[GROUP_TILES]
    units = (t[ROWS_PAD] + t[UNIT_ROWS] - 1) // t[UNIT_ROWS] * groups
    counters = longs_at(t[COUNTERS])
    unit = next_unit(counters, units, part, t[PARTS])
    while unit < units:
        r0, tile = unit // groups * t[UNIT_ROWS], unit % groups * t[GROUP_TILES]
        rows = min(t[UNIT_ROWS], t[ROWS_PAD] - r0)
        _dense_unit(t, reals, r0, rows, tile, min(tile + t[GROUP_TILES], tiles), part)
        unit = next_unit(counters, units, part, t[PARTS])


_SPARSE, _DENSE = part_kernel(_sparse_part), part_kernel(_dense_part)


def matmul_tiles(call: TilesCall, a: Activations, threads: int) -> None:
    """Run a call whose table is filled; `a` is transformed first where it is not yet."""
    call.counters.fill(0)
    if a.pending:
        a.state.fill(0)
        call.table[IN_TABLE] = a.table_at
    else:
        call.table[IN_TABLE] = 0
    run_parts((_SPARSE if call.sparse else _DENSE)(), threads, call.table)
    if a.pending:
        a.finite, a.pending = not a.state[WRONG], False


class Activations:
    """Activations as products read them: feature by feature, tiles of `width` tokens, blocks transformed.

    Made by `activations`; the memory is the workspace's. While they are `pending`, the next product transforms them;
    then `finite` is False where some value is NaN, Inf, or too large (`product.HEADROOM`).
    """

    __slots__ = (
        "address", "buffer", "columns", "depth", "finite", "n", "pending", "state", "table", "table_at", "width",
    )  # fmt: skip

    def __init__(
        self,
        n: int,
        in_features: int,
        transform: str,
        block: int,
        basis: tuple[int, bool] | None,
        threads: int,
        buffer: Any,
    ) -> None:
        self.n = n
        self.width = min(TILE, -(-n // 16) * 16)
        blocks = -(-in_features // block)
        start, offset, value = feature_arrays(basis)
        features = 0 if basis is None else len(start) - 1
        self.columns = blocks * block
        self.depth = blocks * (block + features)
        self.finite, self.pending = True, True
        room = block * self.width + 256
        tiles = -(-n // self.width)
        floats = tiles * self.depth * self.width
        scratch_end = 4 * (floats + threads * room)
        state_end = scratch_end + 8 * (threads + 1) * SHARE
        self.buffer = buffer(state_end)
        self.address = self.buffer.ctypes.data
        self.state = self.buffer[scratch_end:state_end].view(np.int64)  # of `IN_STATE`
        self.table = np.array(
            [
                block, features, self.depth, self.width, transform_address(transform, block, True),
                start.ctypes.data,
                offset.ctypes.data, value.ctypes.data, self.address + 4 * floats, room, self.address, 0, 0,
                n, in_features, tiles * blocks, threads, self.address + scratch_end,
            ],
            np.int64,
        )  # fmt: skip
        self.table_at = self.table.ctypes.data

    @property
    def input(self) -> int:
        """Address of the array that was read last, or is to be."""
        return int(self.table[IN_X])

    def set_input(self, x: Any) -> None:
        """Read x (n, in_features) at the next matmul."""
        self.table[IN_X], self.table[IN_KIND] = address(x), ENCODING[x.dtype]
        self.pending = True


class TilesCall:
    """The filled table of a product: which rows and columns a unit takes, and where its scratch memory
    lies."""

    __slots__ = ("buffer", "counters", "operand", "reals", "sparse", "table")

    def __init__(self, w: Operand, a: Activations, threads: int, buffer: Any) -> None:
        block, width = w.block, a.width
        tiles = -(-a.n // width)
        group_tiles = min(tiles, _GROUP_TILES)
        groups = -(-tiles // group_tiles)
        sparse = w.sparse and not w.laid_out
        most = block
        if sparse:
            most = max(block, int(_ENTRIES * w.rows_pad / max(w.entries, 1)))
        rows = _unit_rows(w.rows_pad, block, most, groups, threads)
        panel = min(_panel(w) if sparse else _PANEL, w.columns)
        panels = -(-w.columns // panel)
        self.table = t = np.zeros(PLACES, np.int64)
        t[: len(w.codes)] = w.codes
        # entries of a unit; or of a row and panel, at the place in a run of the stream that they have there
        entries = w.entry_room(rows) if sparse else panel + 3 * RUN if w.sparse else 0
        starts = rows * panels + 1 if sparse else rows if w.sparse else 0
        basis, basis_starts = w.basis_room(rows)
        tiles_kept = 1 if sparse else group_tiles
        rooms = {
            (SUMS, SUM_ROOM): 4 * tiles_kept * rows // block * (block + w.sum_features) * width,
            (LINES, LINE_ROOM): 0 if sparse or w.plain else 4 * rows * panel,
            (E_VALUE, E_ROOM): 4 * entries,
            (E_OFFSET, E_ROOM): 4 * entries,
            (E_START, E_START_ROOM): 8 * (-(-starts // 8) * 8),
            (B_VALUE, B_ROOM): 4 * basis,
            (B_OFFSET, B_ROOM): 4 * basis,
            (B_START, B_START_ROOM): 8 * basis_starts,
            (CORNER, CORNER_ROOM): 4 * (256 + (block * width if w.transform_out else 0)),
        }
        shares = 8 * threads * SHARE
        self.buffer = buffer(shares + threads * sum(rooms.values()))
        self.counters = self.buffer[:shares].view(np.int64)
        address = self.counters.ctypes.data + shares
        for (place, room), nbytes in rooms.items():
            assert nbytes % 64 == 0
            t[place], t[room] = address, nbytes // (8 if place in (E_START, B_START) else 4)
            address += threads * nbytes
        t[[UNIT_ROWS, PANEL, PANELS, GROUP_TILES, BLOCK, TRANSFORM]] = (
            rows, panel, panels, group_tiles, block, w.transform_out
        )  # fmt: skip
        t[[X, TOKENS, DEPTH, COLUMNS, WIDTH]] = a.address, a.n, a.depth, a.columns, width
        t[[COUNTERS, PARTS, IN_PART]] = self.counters.ctypes.data, threads, TRANSFORM_IN()
        self.sparse, self.reals = sparse, w.reals
        t[REALS] = w.reals.ctypes.data
        self.operand = w  # its id is part of the call's key: it stays taken


def _panel(w: Operand) -> int:
    """Columns of sparse codes multiplied at a time.

    Rows want some 26 entries of a row, to pay for loading and storing its sums, but few columns, whose
    activations then stay in the first-level cache; measured best at 50, 25, 12 and 5% kept: 128, 128, 256 and
    384 to 1024.
    """
    wanted = 26 * w.rows_pad * w.columns // max(w.entries, 1)
    return min(max(-(-wanted // 64) * 64, 128), 1024)


def _unit_rows(rows_pad: int, block: int, most: int, groups: int, threads: int) -> int:
    """Rows of a unit, whole blocks: as many as fit, but two units for every thread where there are blocks
    for them."""
    blocks = -(-rows_pad // block)
    wanted = max(1, blocks * groups // (_UNITS * threads))
    return block * max(1, min(wanted, most // block))

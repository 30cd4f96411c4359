"""y = activation(C x^ + b) + residual in tiles of up to 64 tokens, without ever forming W.

`matmul_rows` has the loops, `codes` turns stored bytes into what they read, `operand` describes a weight to them.
A unit of work is some rows of blocks times some tiles of tokens: it reads each code byte once, keeps its sums
in the second-level cache and ends with the `epilogue`. A dense weight takes the same path, without transforms.

In the kernels `p` is a record of `params.TILES`, `w` its weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import params
from ._atomics import call_address
from ._jit import cpu_inline
from ._parts import SHARE, address_at, c_function, next_unit, part_kernel, record_at, run_parts, wait_for
from .arrays import F32, address, bytes_at, floats_at, ints_at, longs_at
from .codes import BASIS_ENTRIES, BITMAP, CODE_ROWS, RUN, count_bits, entry_columns, entry_values, expand
from .epilogue import EPILOGUE
from .matmul_rows import SPARSE_ROWS, dense_rows, sparse_rows
from .operand import MatmulCall, Operand
from .simd import vload, vstore
from .transform_in import DONE, NOT_FINITE, TRANSFORM_IN, Activations

_GROUP_TILES = 8  # tiles that a unit's sums are kept for at a time: 512 tokens
_UNITS = 4  # of work for a thread, at least, where there are rows for them
_PANEL = 256  # columns of dense codes multiplied at a time
_ENTRIES = 48 << 10  # entries of a unit: 400 kB of positions and values in the second-level cache

_TILES, _TRANSFORM_IN = params.TILES.dtype, params.TRANSFORM_IN.dtype


@cpu_inline
def _basis_of_unit(p, w, r0, nrows, part):
    """The basis entries of a unit: of its blocks, or, for vectors, of its rows."""
    if w.features > 0:
        functions, first, count = np.int64(1), r0, nrows
        if w.sum_features > 0:
            functions, first, count = w.sum_features, r0 // p.block, (nrows + p.block - 1) // p.block
        call_address(
            p.basis_entries,
            (address_at(w), first, count, functions, p.columns, p.width,
             p.basis_start + 8 * part * p.basis_start_stride, p.basis_offset + 4 * part * p.basis_stride,
             p.basis_value + 4 * part * p.basis_stride),
        )  # fmt: skip


@cpu_inline
def _end_tile(p, w, tile, r0, nrows, part, vectors, at):
    """Basis part and epilogue of a unit's sums for one tile.

    The basis entries meet the input's basis features: in rows of their own behind the coefficients' (matrix),
    or in the rows themselves (vectors).
    """
    block, width = p.block, p.width
    if w.features > 0:
        rows, rows_at = nrows, at
        if w.sum_features > 0:
            blocks = (nrows + block - 1) // block
            rows, rows_at = blocks * w.sum_features, at + blocks * block * width
        call_address(
            p.basis_rows,
            (rows, p.basis_start + 8 * part * p.basis_start_stride, np.int64(1),
             p.basis_offset + 4 * part * p.basis_stride, np.int64(1), p.basis_value + 4 * part * p.basis_stride,
             p.x + 4 * tile * p.depth * width, vectors, np.int64(w.sum_features > 0), p.sums + 4 * rows_at, width),
        )  # fmt: skip
    call_address(
        p.epilogue,
        (address_at(w), address_at(p.output), block, p.transform_out, p.sums + 4 * at, min(nrows, w.rows - r0),
         w.first_row + r0, min(width, p.tokens - tile * width), tile * width, vectors, width,
         p.corner + 4 * part * p.corner_stride, p.basis_rows),
    )  # fmt: skip


@cpu_inline
def _sparse_unit(p, w, r0, nrows, first_tile, last_tile, part):
    panels, width = p.panels, p.width
    row_start = longs_at(w.row_start)
    first, stop = row_start[r0], row_start[r0 + nrows]
    e_at, s_at, at = part * p.entry_stride, part * p.entry_start_stride, part * p.sums_stride
    values, offsets, starts = floats_at(p.entry_value), ints_at(p.entry_offset), longs_at(p.entry_start)
    x, c = floats_at(p.x), floats_at(p.sums)
    entry_values(w, first, stop, values, e_at)
    base = first // RUN * RUN
    for r in range(nrows):
        row = r0 + r
        entry_columns(
            w, row_start, row, width, p.panel, panels, offsets, e_at + row_start[row] - base, starts,
            s_at + r * panels,
        )  # fmt: skip
    starts[s_at + nrows * panels] = e_at + stop - base
    _basis_of_unit(p, w, r0, nrows, part)
    for tile in range(first_tile, last_tile):
        vectors = (min(width, p.tokens - tile * width) + 15) // 16
        x_at = tile * p.depth * width
        for i in range(panels):
            sparse_rows(
                nrows, starts, s_at + i, panels, offsets, 1, values, x, x_at, vectors, i == 0, c, at, width
            )
        _end_tile(p, w, tile, r0, nrows, part, vectors, at)


def _densify_panel(params_at, r0, nrows, panel, depth, part):
    """Columns panel * p.panel to depth behind of sparse rows, zeros and all, to the unit's lines.

    Entries of a row follow each other, so the panels must come in order: where a row's next one begins is kept.
    """
    p = record_at(params_at, _TILES)
    w = p.weight
    row_start, next_entry, at = longs_at(w.row_start), longs_at(p.entry_start), part * p.entry_start_stride
    values, v, index = floats_at(p.entry_value), part * p.entry_stride, bytes_at(w.index)
    lines = floats_at(p.lines)
    for r in range(nrows):
        if panel == 0:
            next_entry[at + r] = row_start[r0 + r]
        first, line = next_entry[at + r], part * p.lines_stride + r * p.panel
        byte = (r0 + r) * w.row_bytes + panel * p.panel // 8
        count = depth
        if w.index_kind == BITMAP:
            count = np.int64(0)
            for k in range(0, depth // 8, 2):
                count += count_bits(index, byte + k)
        entry_values(w, first, first + count, values, v)
        e = v + first % RUN
        if w.index_kind == BITMAP:
            for k in range(0, depth // 8, 2):
                vstore(lines, line + 8 * k, expand(values, e, index, byte + k))
                e += count_bits(index, byte + k)
        else:
            for k in range(0, depth, 16):
                vstore(lines, line + k, vload(values, e + k))
        next_entry[at + r] = first + count


_DENSIFY = c_function(_densify_panel)


@cpu_inline
def _dense_unit(p, w, r0, nrows, first_tile, last_tile, part):
    panel, width, row_values = p.panel, p.width, w.row_values
    x, c = floats_at(p.x), floats_at(p.sums)
    blocks = (nrows + p.block - 1) // p.block
    at, tile_sums = part * p.sums_stride, blocks * (p.block + w.sum_features) * width
    for i in range(p.panels):
        column = i * panel
        depth = min(panel, row_values - column)
        a, a_at, a_row = w.value, r0 * row_values + column, row_values
        if w.row_start != 0:
            a, a_at, a_row = p.lines, part * p.lines_stride, panel
            call_address(p.densify, (address_at(p), r0, nrows, i, depth, part))
        elif w.kind != F32:
            a, a_at, a_row = p.lines, part * p.lines_stride, panel
            call_address(p.code_rows, (address_at(w), r0, nrows, column, depth, p.lines + 4 * a_at, panel))
        for tile in range(first_tile, last_tile):
            vectors = (min(width, p.tokens - tile * width) + 15) // 16
            dense_rows(
                nrows, depth, floats_at(a), a_at, a_row, x, (tile * p.depth + column) * width, vectors, i == 0, c,
                at + (tile - first_tile) * tile_sums, width,
            )  # fmt: skip
    _basis_of_unit(p, w, r0, nrows, part)
    for tile in range(first_tile, last_tile):
        vectors = (min(width, p.tokens - tile * width) + 15) // 16
        _end_tile(p, w, tile, r0, nrows, part, vectors, at + (tile - first_tile) * tile_sums)


@cpu_inline
def _activations_ready(p, part):
    """Transforms the activations, together with the other parts, if that is still to be done.

    Returns whether there is something to multiply: not where values are not finite and the weight is compressed.
    """
    if p.transform_in == 0:
        return True
    call_address(p.transform_in_kernel, (part, p.transform_in, np.int64(0)))
    a = record_at(p.transform_in, _TRANSFORM_IN)
    state = longs_at(a.state)
    wait_for(state, DONE, a.units)
    return state[NOT_FINITE] == 0 or (p.weight.row_start == 0 and p.weight.bits == 0)


def _sparse_part(part, p, like):
    """out = activation(x W^T + bias) + residual for sparse codes: units of it, as long as there are some."""
    if not _activations_ready(p, part):
        return
    w = p.weight
    tiles = (p.tokens + p.width - 1) // p.width
    groups = (tiles + p.group_tiles - 1) // p.group_tiles
    units = (w.rows_padded + p.unit_rows - 1) // p.unit_rows * groups
    counters = longs_at(p.counters)
    unit = next_unit(counters, units, part, p.parts)
    while unit < units:
        r0, tile = unit // groups * p.unit_rows, unit % groups * p.group_tiles
        rows = min(p.unit_rows, w.rows_padded - r0)
        _sparse_unit(p, w, r0, rows, tile, min(tile + p.group_tiles, tiles), part)
        unit = next_unit(counters, units, part, p.parts)


def _dense_part(part, p, like):
    """The same for codes of every coefficient, sparse ones with few zeros, and dense weights."""
    if not _activations_ready(p, part):
        return
    w = p.weight
    tiles = (p.tokens + p.width - 1) // p.width
    groups = (tiles + p.group_tiles - 1) // p.group_tiles
    units = (w.rows_padded + p.unit_rows - 1) // p.unit_rows * groups
    counters = longs_at(p.counters)
    unit = next_unit(counters, units, part, p.parts)
    while unit < units:
        r0, tile = unit // groups * p.unit_rows, unit % groups * p.group_tiles
        rows = min(p.unit_rows, w.rows_padded - r0)
        _dense_unit(p, w, r0, rows, tile, min(tile + p.group_tiles, tiles), part)
        unit = next_unit(counters, units, part, p.parts)


_SPARSE, _DENSE = part_kernel(_sparse_part, _TILES), part_kernel(_dense_part, _TILES)


Scratch = tuple[tuple[str, str, int, int], ...]


def scratch_memory(scratch: Scratch, threads: int, buffer: Any) -> tuple[Any, Any, dict[str, int]]:
    """The memory of a call: the counters of units (int64), and the fields of the struct that point into it.

    scratch : field of an address, field of its stride, elements of a thread, bytes of an element
    """
    shares = 8 * threads * SHARE
    memory = buffer(shares + threads * sum(count * size for *_, count, size in scratch))
    fields = {"counters": address(memory)}
    at = fields["counters"] + shares
    for name, stride, count, size in scratch:
        assert count * size % 64 == 0
        fields[name], fields[stride] = at, count
        at += threads * count * size
    return memory, memory[:shares].view(np.int64), fields


class TilesCall(MatmulCall):
    """The filled struct of a matmul: which rows and columns a unit takes, and where its scratch memory lies."""

    __slots__ = ("counters", "sparse", "transform_in")

    def __init__(self, w: Operand, a: Activations, threads: int, buffer: Any) -> None:
        block, width = w.block, a.width
        tiles = -(-a.n // width)
        group_tiles = min(tiles, _GROUP_TILES)
        groups = -(-tiles // group_tiles)
        sparse = w.sparse and not w.densified
        most = block
        if sparse:
            most = max(block, int(_ENTRIES * w.rows_padded / max(w.entries, 1)))
        rows = _unit_rows(w.rows_padded, block, most, groups, threads)
        panel = min(_panel(w) if sparse else _PANEL, w.columns)
        panels = -(-w.columns // panel)
        # entries of a unit; or of a row and panel, at the offset in a run of the stream that they have there
        entries = w.entry_room(rows) if sparse else panel + 3 * RUN if w.sparse else 0
        starts = rows * panels + 1 if sparse else rows if w.sparse else 0
        basis, basis_starts = w.basis_room(rows)
        tiles_kept = 1 if sparse else group_tiles
        scratch = (
            ("sums", "sums_stride", tiles_kept * rows // block * (block + w.sum_features) * width, 4),
            ("lines", "lines_stride", 0 if sparse or w.read_in_place else rows * panel, 4),
            ("entry_value", "entry_stride", entries, 4),
            ("entry_offset", "entry_stride", entries, 4),
            ("entry_start", "entry_start_stride", -(-starts // 8) * 8, 8),
            ("basis_value", "basis_stride", basis, 4),
            ("basis_offset", "basis_stride", basis, 4),
            ("basis_start", "basis_start_stride", basis_starts, 8),
            ("corner", "corner_stride", 256 + (block * width if w.transform_out else 0), 4),
        )
        memory, self.counters, fields = scratch_memory(scratch, threads, buffer)
        record = params.TILES.record(
            weight=w.params.item(),
            x=a.address,
            tokens=a.n,
            depth=a.depth,
            columns=a.columns,
            width=width,
            transform_in_kernel=TRANSFORM_IN(),
            densify=_DENSIFY() if w.densified else 0,
            code_rows=0 if w.sparse or w.read_in_place else CODE_ROWS[w["kind"]](),
            epilogue=EPILOGUE(),
            basis_entries=0 if w.basis is None else BASIS_ENTRIES(),
            basis_rows=0 if w.basis is None else SPARSE_ROWS(),
            block=block,
            transform_out=w.transform_out,
            unit_rows=rows,
            panel=panel,
            panels=panels,
            group_tiles=group_tiles,
            parts=threads,
            **fields,
        )
        super().__init__(w, params.TILES, record, memory)
        self.sparse, self.transform_in = sparse, record["transform_in"]

    def kernel(self) -> int:
        """Address of the function of (part, `params_at`, 0)."""
        return (_SPARSE if self.sparse else _DENSE)()


def matmul_tiles(call: TilesCall, a: Activations, threads: int) -> None:
    """Run a call whose struct is filled; `a` is transformed first where it is not yet."""
    call.counters.fill(0)
    if a.pending:
        a.state.fill(0)
        call.transform_in[0] = a.params_at
    else:
        call.transform_in[0] = 0
    run_parts(call.kernel(), threads, call.params_at)
    if a.pending:
        a.finite, a.pending = not a.state[NOT_FINITE], False


def _panel(w: Operand) -> int:
    """Columns of sparse codes multiplied at a time.

    Rows want some 26 entries of a row, to pay for loading and storing its sums, but few columns, whose
    activations then stay in the first-level cache; measured best at densities of 50, 25, 12 and 5%: 128, 128, 256
    and 384 to 1024.
    """
    wanted = 26 * w.rows_padded * w.columns // max(w.entries, 1)
    return min(max(-(-wanted // 64) * 64, 128), 1024)


def _unit_rows(rows_padded: int, block: int, most: int, groups: int, threads: int) -> int:
    """Rows of a unit, whole blocks: as many as fit, but two units for every thread where there are blocks
    for them."""
    blocks = -(-rows_padded // block)
    wanted = max(1, blocks * groups // (_UNITS * threads))
    return block * max(1, min(wanted, most // block))

"""Grid codes as nested bit planes, for matmuls with int8 activations: `rbe_gpu.codecs.grid.GridPlanes`."""

from __future__ import annotations

from typing import Any

import numpy as np

from rbe_gpu.codecs.cut import EXCEPTION_BITS, Exceptions

from . import isa, params
from ._jit import cpu_inline, cpu_kernel
from ._parts import in_parts
from ._pool import num_threads
from .arrays import address
from .bit_planes import (
    ALL_FOUR,
    CHUNK,
    FIRST_OF_FOUR,
    FOUR,
    LANES_OF_MASK,
    MOST_PLANES,
    ROWS_OF_START,
    add_bits_at,
    beyond,
    collect,
    deposit,
    moves_bits,
    ones,
)
from .codes import scale_integers
from .int8_codes import ROW_OF_BYTES, write_row_of_bytes
from .int8_simd import RUN, unpack_bytes
from .operand import grid_fields, planes_fields
from .simd import bits, widen

_SLACK = 12  # bytes behind the last chunk, of which `bits_at` reads 9 and `add_bits_at` writes 12
_PLANE_BITS = 0.02  # of a weight, that a further plane must save: it takes time
_MOST_BYTES, _MOST_COLUMNS = (1 << 32) - 1, 1 << 16  # that `chunk_start` counts, and columns of exceptions
#: A weight is held so where that takes at most this share of the memory.
_WORTH = 4 / 5


@cpu_inline
def _masks(line, at, columns, size):
    """Masks of the bytes of up to 64 columns whose integers are above `size`, and below -size."""
    above, below = beyond(unpack_bytes(8, line, at), size)
    if columns > RUN:
        high_above, high_below = beyond(unpack_bytes(8, line, at + RUN), size)
        above, below = above | high_above << RUN, below | high_below << RUN
    return above, below


@cpu_inline
def _fours_of(mask):
    """A bit for each four lanes of a mask: whether one of them is one."""
    some = mask | mask >> 1
    some |= some >> 2
    return collect(some, FIRST_OF_FOUR)


@cpu_kernel
def _count(row_of_bytes, weight, rows, line, at_least):
    """at_least[s] += integers of at least size s > 0; at_least[0] += groups of four that are not all zeros.

    row_of_bytes : address of `ROW_OF_BYTES`. weight : of a `params.WEIGHT`. line (cols,) uint8 : scratch memory
    """
    for r in range(rows):
        write_row_of_bytes(row_of_bytes, weight, r, line)
        for c in range(0, line.shape[0], LANES_OF_MASK):
            for size in range(at_least.shape[0] - 1):
                above, below = _masks(line, c, line.shape[0] - c, size)
                at_least[size + 1] += ones(above | below)
                if size == 0:
                    at_least[0] += ones(_fours_of(above | below))


@cpu_kernel
def _write(row_of_bytes, weight, line, planes, fours, value, start, sizes, row_start, column, delta):
    """The chunks of all rows, and the exceptions.

    value (bytes,) uint8 : zeros. start (rows / 8,) uint32, sizes (rows, chunks) uint8, row_start (rows + 1,) int64,
    column (exceptions,) uint16, delta (exceptions,) int8 : written

    Returns
    -------
    Bytes written
    """
    at, e, cols = 0, 0, line.shape[0]
    masks = np.empty(
        (CHUNK // LANES_OF_MASK, planes + 2), np.int64
    )  # above each size, and those that are positive
    for r in range(sizes.shape[0]):
        if r % ROWS_OF_START == 0:
            start[r // ROWS_OF_START] = at
        write_row_of_bytes(row_of_bytes, weight, r, line)
        for first in range(0, cols, CHUNK):
            count = (min(CHUNK, cols - first) + LANES_OF_MASK - 1) // LANES_OF_MASK
            for i in range(count):
                place = first + LANES_OF_MASK * i
                for size in range(planes + 1):
                    above, below = _masks(line, place, cols - place, size)
                    masks[i, size] = above | below
                    if size == 0:
                        masks[i, planes + 1] = above
            if fours:
                bit = 8 * (at + 2 * count)
                for i in range(count):
                    four = _fours_of(masks[i, 0])
                    value[at + 2 * i], value[at + 2 * i + 1] = four & 255, four >> 8
                    add_bits_at(value, bit, collect(masks[i, 0], deposit(four, FIRST_OF_FOUR) * ALL_FOUR))
                    bit += FOUR * ones(four)
            else:
                bit = 8 * (at + 8 * count)
                for i in range(count):
                    add_bits_at(value, 8 * (at + 8 * i), masks[i, 0])
            for size in range(1, planes):
                for i in range(count):
                    add_bits_at(value, bit, collect(masks[i, size], masks[i, size - 1]))
                    bit += ones(masks[i, size - 1])
            for i in range(count):
                add_bits_at(value, bit, collect(masks[i, planes + 1], masks[i, 0]))
                bit += ones(masks[i, 0])
                place, mask = first + LANES_OF_MASK * i, masks[i, planes]
                while mask != 0:
                    c = place + ones((mask & -mask) - 1)
                    q = np.int64(np.int8(line[c]))
                    column[e], delta[e] = c, q - planes if q > 0 else q + planes
                    mask &= mask - 1
                    e += 1
            stop = (bit + 7) // 8
            sizes[r, first // CHUNK] = stop - at
            at = stop
        row_start[r + 1] = e
    return at


def planes_of(codes: Any) -> dict[str, Any] | None:
    """The fields of `GridPlanes` with the integers of `GridCodes`; None where they would not take less memory.

    So it is on processors that do not deposit bits in a few cycles: NEON has no such instruction.
    """
    rows, cols = codes.value.shape[0], len(codes.col_scale)
    if not moves_bits(isa.active(), isa.host()) or cols > _MOST_COLUMNS or rows * cols > _MOST_BYTES:
        return None
    record = params.WEIGHT.record(
        value=address(codes.value), row_values=cols, rows_padded=rows, **grid_fields(codes)
    )
    weight, line = address(record.view(np.uint8)), np.empty(cols, np.uint8)
    at_least = np.zeros(MOST_PLANES + 2, np.int64)
    _count(ROW_OF_BYTES(), weight, rows, line, at_least)
    chunks, masks = -(-cols // CHUNK), -(-cols // LANES_OF_MASK)
    one_by_one, by_four = 64 * rows * masks, 16 * rows * masks + FOUR * int(at_least[0])
    fours = by_four < one_by_one

    def size_in_bits(planes: int) -> int:
        """Of the chunks with what completes their last byte, and of their sizes and starts."""
        counted = min(one_by_one, by_four) + int(at_least[1] + at_least[1:planes].sum())
        return counted + 16 * rows * chunks + 32 * -(-rows // ROWS_OF_START)

    def cost(planes: int) -> float:
        time = _PLANE_BITS * (planes - 1) * rows * cols
        return size_in_bits(planes) + time + EXCEPTION_BITS * int(at_least[planes + 1])

    planes = min(range(1, MOST_PLANES + 1), key=cost)
    held = 0 if codes.exceptions is None else len(codes.exceptions.column)
    if cost(planes) > _WORTH * (8 * codes.value.nbytes + EXCEPTION_BITS * held):
        return None
    count = int(at_least[planes + 1])
    value = np.zeros(size_in_bits(planes) // 8 + _SLACK, np.uint8)
    start = np.empty(-(-rows // ROWS_OF_START), np.uint32)
    sizes, row_start = np.empty((rows, chunks), np.uint8), np.zeros(rows + 1, np.int64)
    column, delta = np.empty(count, np.uint16), np.empty(count, np.int8)
    size = _write(ROW_OF_BYTES(), weight, line, planes, fours, value, start, sizes, row_start, column, delta)
    starts = row_start.astype(np.uint16 if count < 1 << 16 else np.int32)
    return {
        "value": value[: size + _SLACK].copy(),
        "exceptions": Exceptions(starts, column, delta) if count else None,
        "planes": planes,
        "fours": fours,
        "chunk_start": start,
        "chunk_bytes": sizes,
    }


def _rows(row_of_bytes, weight, row_scale, col_scale, gain, shrink, rows, first, lines, out, begin, end):
    """out[i] = gain * row_scale * col_scale[c] * (q - sign(q) * shrink) of row rows[i], or first + i for None.

    row_of_bytes : address of `ROW_OF_BYTES`. weight : of a `params.WEIGHT`. lines (rows, cols) uint8 : scratch
    memory, one row of it for each of out
    """
    flat, cols = out.reshape(-1), out.shape[1]
    for i in range(begin, end):
        row = first + i
        if rows is not None:
            row = rows[i]
        write_row_of_bytes(row_of_bytes, weight, row, lines[i])
        for c in range(cols):
            flat[i * cols + c] = np.float32(np.int8(lines[i, c]))
        scale_integers(gain * widen(row_scale[row]), col_scale, shrink, 0, cols, flat, i * cols)


_rows_in_parts = in_parts(_rows)


def _record(codes: Any) -> Any:
    fields = planes_fields(codes)
    return params.WEIGHT.record(value=address(codes.value), row_values=len(codes.col_scale), **fields)


def rows_of(codes: Any, gain: float, rows: Any, first: int, out: Any) -> None:
    """gain * coefficients of the rows `rows` (int64), or first, first + 1, ... for None; out (n, cols) float32."""
    record, lines = _record(codes), np.empty(out.shape, np.uint8)
    _rows_in_parts(
        out.shape[0], num_threads(), ROW_OF_BYTES(), address(record.view(np.uint8)),
        bits(codes.row_scale), bits(codes.col_scale),
        np.float32(gain), np.float32(codes.shrink), rows, first, lines, out,
    )  # fmt: skip


@cpu_kernel
def _integers(row_of_bytes, weight, q):
    for r in range(q.shape[0]):
        write_row_of_bytes(row_of_bytes, weight, r, q[r])


def integers_of(codes: Any) -> Any:
    """q of `GridPlanes`, (rows_pad, cols_pad) int8."""
    record = _record(codes)
    q = np.empty((len(codes.row_scale), len(codes.col_scale)), np.int8)
    _integers(ROW_OF_BYTES(), address(record.view(np.uint8)), q.view(np.uint8))
    return q

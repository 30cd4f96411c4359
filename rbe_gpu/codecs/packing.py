"""b-bit codes in bytes: runs of 32 codes, stored as bit planes of 8, 4, 2 and 1 bits.

A width b is a sum of powers of two (3 = 2 + 1, 6 = 4 + 2, 11 = 8 + 2 + 1), so a run of 32 codes is one
plane for each of them, the most significant first, 4b bytes in all. In a plane of w bits, byte k holds the
codes k, k + 4w, k + 8w, ... in its bit fields from the lowest up. A vector unit therefore unpacks a plane
with one shift and one mask per field, and the codes come out in order.

`pack` and `unpack` here define the layout with NumPy; `cpu_fallback/decode.py` reads it in kernels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

RUN = 32  # codes per run
PLANES = (8, 4, 2, 1)
MAX_BITS = 12
_CHUNK = 1 << 18  # codes that are packed together: they fit a level-2 cache


def planes_of(bits: int) -> tuple[int, ...]:
    """The plane widths of a code of `bits` bits, most significant first: 6 -> (4, 2)."""
    return tuple(w for w in PLANES if bits & w)


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes take: whole runs of 32."""
    return -(-count // RUN) * 4 * bits


def pack(codes: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Pack unsigned codes.

    Parameters
    ----------
    codes : (..., n) unsigned integers below 2**bits; n is padded with zeros to a multiple of 32
    bits : 1 to 12

    Returns
    -------
    (..., packed_bytes(n, bits)) uint8
    """
    *lead, count = codes.shape
    runs = -(-count // RUN)
    u = np.zeros((*lead, runs * RUN), np.uint16)
    u[..., :count] = codes
    u = u.reshape(*lead, runs, RUN)
    out = np.zeros((*lead, runs, 4 * bits), np.uint8)
    start, below = 0, bits
    for w in planes_of(bits):
        below -= w
        plane = ((u >> below) & ((1 << w) - 1)).astype(np.uint8)
        for field in range(8 // w):
            out[..., start : start + 4 * w] |= plane[..., 4 * w * field : 4 * w * (field + 1)] << (field * w)
        start += 4 * w
    return out.reshape(*lead, runs * 4 * bits)


def pack_columns(
    codes: NDArray[np.uint8], bits: int, rows: int, row_order: NDArray[np.int64] | None = None
) -> NDArray[np.uint8]:
    """Pack unsigned codes that are held column by column; `pack` of the transposed codes, several times faster.

    Eight rows at a time: a 64-bit word holds the codes of eight rows of a column, and shifting it and masking its
    bytes takes a field of all of them.

    Parameters
    ----------
    codes : (cols, rows rounded up to a multiple of 8) uint8, C-contiguous, below 2**bits; cols is a multiple of 32
    bits : 1 to 8
    rows : rows in use
    row_order : (rows,) int64, the row of the result that each row of the codes is; None: the same

    Returns
    -------
    (rows, packed_bytes(cols, bits)) uint8
    """
    runs = len(codes) // RUN
    words = codes.view(np.uint64).reshape(runs, RUN, -1)
    out = np.empty((rows, packed_bytes(len(codes), bits)), np.uint8)
    step = max(1, _CHUNK // len(codes) // 8)
    for at in range(0, words.shape[2], step):
        part = words[:, :, at : at + step]
        planes = np.empty((runs, 4 * bits, part.shape[2]), np.uint64)
        start, below = 0, bits
        for w in planes_of(bits):
            below -= w
            plane = planes[:, start : start + 4 * w]
            mask = np.uint64(((1 << w) - 1 << below) * 0x0101010101010101)
            for field in range(8 // w):
                # the bits of a byte from `below` on, to those from `field * w` on
                x = part[:, 4 * w * field : 4 * w * (field + 1)] & mask
                if field * w > below:
                    x <<= np.uint64(field * w - below)
                elif field * w < below:
                    x >>= np.uint64(below - field * w)
                if field:
                    plane |= x
                else:
                    plane[...] = x
            start += 4 * w
        first = 8 * at
        count = min(8 * part.shape[2], rows - first)
        place = slice(first, first + count) if row_order is None else row_order[first : first + count]
        out[place] = planes.reshape(-1, part.shape[2]).view(np.uint8)[:, :count].T
    return out


def unpack(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint16]:
    """The inverse of `pack`: (..., bytes) uint8 to the first `count` codes of a row, (..., count) uint16."""
    *lead, nbytes = packed.shape
    runs = packed.reshape(*lead, nbytes // (4 * bits), 4 * bits)
    u = np.zeros((*lead, runs.shape[-2], RUN), np.uint16)
    start = 0
    for w in planes_of(bits):
        plane = runs[..., start : start + 4 * w]
        for field in range(8 // w):
            part = u[..., 4 * w * field : 4 * w * (field + 1)]
            part <<= w
            part |= (plane >> (field * w)) & np.uint8((1 << w) - 1)
        start += 4 * w
    return u.reshape(*lead, -1)[..., :count]

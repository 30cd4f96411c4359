"""Codes that are too large for the int8 matmul where products are added in int16, found once for a weight.

Codes are cut to a number of bits (`int8_simd`): fewer bits let more products be added before they are widened, but
leave more exceptions. What four codes of a row lack is an exception, multiplied like them; one of positive and one of
negative parts where both are there. They are made of whole integers, whatever these are cut to in memory
(`exceptions`).

Of MiniLM at ratio 8 they take 15% of the bytes of the linear layers' codes (half of the weights less than 12%, one
40%), and as much as the codes where all sizes of 8-bit codes are as frequent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import isa, params
from ._parts import in_parts, record_at
from ._pool import num_threads
from .arrays import address
from .int8_codes import row_of_bytes
from .int8_simd import BASE_BITS, RUN, cut_run, needs_base, unpack_bytes

#: Time of four columns of a row and 64 tokens, by the bits: relative, measured on AVX2 (Zen 3).
_TIME = {5: 1.0, 6: 1.13, 7: 1.4}
#: Time of an exception: that of four columns, and what it takes to find them.
_EXCEPTION = 1.5
_WEIGHT = params.WEIGHT.dtype
_SIGNS = (0x00010001, -1)  # in both halves of a word


@dataclass(frozen=True)
class Exceptions:
    """Exceptions of a weight.

    Attributes
    ----------
    base_bits : that codes are cut to; 0 where they are not cut
    entries : (entries, 3) int32: place of the four columns in the panel, four bytes, their sign
    starts : (panels, rows_padded + 4) int32: the first entry of each row of a panel, then the end of the last
    """

    base_bits: int
    entries: Any
    starts: Any

    @property
    def nbytes(self) -> int:
        return int(self.entries.nbytes + self.starts.nbytes)


def _find(params_at, bases, panel, counts, starts, entries, begin, end):
    """Count exceptions, or write them.

    bases : of the codes: their largest size for each count
    counts : (bases, panels, rows) int32, written
    starts : (panels, rows + 4) int32; without elements, exceptions are counted only, else those of bases[0] go to
        entries (n, 3) int32
    """
    w = record_at(params_at, _WEIGHT)
    cols = w.row_values
    line, rest = np.empty(cols, np.uint8), np.empty(2 * RUN, np.uint8)
    words = rest.view(np.int32)
    for r in range(begin, end):
        row_of_bytes(w, 0, r, 0, cols, line, 0)
        for i in range(bases.shape[0]):
            for p in range(counts.shape[1]):
                count = 0
                for k in range(p * panel, min((p + 1) * panel, cols), RUN):
                    if cut_run(unpack_bytes(8, line, k), 0, bases[i], rest, 0):
                        for j in range(2 * RUN // 4):
                            if words[j] != 0:
                                if starts.size:
                                    e = starts[p, r] + count
                                    entries[e, 0] = (k - p * panel) // 4 + j % (RUN // 4)
                                    entries[e, 1] = words[j]
                                    entries[e, 2] = _SIGNS[j // (RUN // 4)]
                                count += 1
                counts[i, p, r] = count


_find_in_parts = in_parts(_find)
_NONE = np.zeros((0, 0), np.int32)


def find_exceptions(weight: Any, rows: int, columns: int, panel: int) -> Exceptions:
    """The exceptions of a weight of b-bit codes, for the number of bits that takes the least time.

    weight : a record of `params.WEIGHT`
    rows, columns : of its stored codes
    panel : columns that are multiplied at a time
    """
    if not needs_base(isa.active()):
        return Exceptions(0, _NONE, _NONE)
    at, panels = address(weight.view(np.uint8)), -(-columns // panel)
    sizes = np.array([1 << (b - 1) for b in BASE_BITS])
    counts = np.empty((len(sizes), panels, rows), np.int32)
    _find_in_parts(rows, num_threads(), at, sizes, panel, counts, _NONE, _NONE)
    shares = counts.sum(axis=(1, 2)) / (rows * columns / 4)
    best = min(range(len(sizes)), key=lambda i: _TIME[BASE_BITS[i]] + _EXCEPTION * float(shares[i]))
    starts = np.zeros((panels, rows + 4), np.int32)
    ends = np.cumsum(counts[best], dtype=np.int32).reshape(panels, rows)
    starts[:, 1 : rows + 1], starts[:, rows + 1 :] = ends, ends[:, -1:]
    starts[1:, 0] = ends[:-1, -1]
    entries = np.empty((int(ends[-1, -1]), 3), np.int32)
    if len(entries):
        _find_in_parts(
            rows, num_threads(), at, sizes[best : best + 1], panel, counts[best : best + 1], starts, entries
        )
    return Exceptions(BASE_BITS[best], entries, starts)

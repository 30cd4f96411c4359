"""y[i, :] = W[ids[i], :]: rows of a table, decoding only what is asked for.

`RBEVectors` decode exactly the rows asked for, each once where that costs more than a copy: in a batch of real text
most tokens are repeats.
`RBEMatrix` decodes each block row that holds one of them, once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rbe_gpu.blocks import RBEBlocks, RBEVectors
from rbe_gpu.codecs import DenseCodes
from rbe_gpu.workspace import Workspace

from ._jit import cpu_kernel
from ._parts import in_parts
from ._pool import num_threads
from .decode import decode_rows
from .simd import bits, narrow, widen

_PARALLEL_FROM = 98304  # elements of dense rows: 30/35 us with one/two threads at 49152, 46/42 us at 98304
_CHUNK = 2048  # ids whose rows are decoded at a time: 3 MB of float32 at 384 columns at most


def _rows(table, ids, out, start, stop):
    """out[i] = table[ids[i]] for start <= i < stop, the stored bits of one type."""
    for i in range(start, stop):
        row = ids[i]
        for c in range(out.shape[1]):
            out[i, c] = table[row, c]


_in_parts = in_parts(_rows)


@cpu_kernel
def _distinct(ids, first, rows, slots):
    """rows = the distinct ids, in the order they come; rows[slots[i]] = ids[i]. Returns their number.

    first : int32, one entry for each row of the table, of any contents: entries are checked against `rows`
    rows, slots : int64, as long as ids
    """
    count = 0
    for i in range(ids.shape[0]):
        row = ids[i]
        slot = np.int64(first[row])
        if slot < 0 or slot >= count or rows[slot] != row:
            slot = count
            first[row] = count
            rows[count] = row
            count += 1
        slots[i] = slot
    return count


@cpu_kernel
def _place(rows, ids, positions, first, out):
    """out[positions[i]] = rows[ids[positions[i]] - first], float32 to the storage type of `out`."""
    for i in range(positions.shape[0]):
        position = positions[i]
        row = ids[position] - first
        for c in range(out.shape[1]):
            out[position, c] = narrow(out, widen(rows[row, c]))


def embedding(ids: Any, weight: Any, out: Any, ws: Workspace) -> None:
    """ids (n,) int64, in range; weight (rows, cols); out (n, cols)."""
    if not ids.size:
        return
    if not isinstance(weight, RBEBlocks):
        _gather(weight, ids, out)
    elif isinstance(weight, RBEVectors):
        for start in range(0, ids.size, _CHUNK):
            _from_vectors(ids[start : start + _CHUNK], weight, out[start : start + _CHUNK], ws)
    else:
        _from_block_rows(ids, weight, out, ws)


def _gather(table: Any, ids: Any, out: Any) -> None:
    """out[i] = table[ids[i]]; both of one dtype."""
    parts = min(num_threads(), ids.size) if out.size >= _PARALLEL_FROM else 1
    _in_parts(ids.size, parts, bits(table), ids, bits(out))


def _from_vectors(ids: Any, weight: RBEVectors, out: Any, ws: Workspace) -> None:
    if weight.transform == "none" and weight.basis is None and isinstance(weight.codes, DenseCodes):
        decode_rows(weight, ids, 0, ids.size, out, ws)  # as fast as copying: 1227 rows 70 us, else 136 us
        return
    first = ws.get("embedding.first", (weight.rows,), np.int32)
    rows, slots = (ws.get(f"embedding.{name}", ids.shape, np.int64) for name in ("distinct", "slots"))
    count = _distinct(ids, first, rows, slots)
    if count == ids.size:
        decode_rows(weight, ids, 0, count, out, ws)
        return
    decoded = ws.get("embedding.decoded", (count, weight.cols), out.dtype)
    decode_rows(weight, rows[:count], 0, count, decoded, ws)
    _gather(decoded, slots, out)


def _from_block_rows(ids: Any, weight: RBEBlocks, out: Any, ws: Workspace) -> None:
    order = np.argsort(ids, kind="stable")
    block_rows, starts = np.unique(ids[order] // weight.row_block, return_index=True)
    stops = np.append(starts[1:], ids.size)
    rows = ws.get("embedding.rows", (weight.row_block, weight.cols))
    for block_row, start, stop in zip(block_rows, starts, stops, strict=True):
        first = int(block_row) * weight.row_block
        count = min(weight.row_block, weight.rows - first)
        decode_rows(weight, None, first, count, rows[:count], ws)
        _place(rows, ids, order[start:stop], first, bits(out))

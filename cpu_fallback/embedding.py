"""y[i, :] = W[ids[i], :]: rows of a table, decoding only what is asked for.

`RBEVectors` decode exactly the rows asked for. `RBEMatrix` decodes each block row that holds one of them,
once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rbe_gpu.blocks import RBEBlocks, RBEVectors
from rbe_gpu.workspace import Workspace

from ._jit import cpu_kernel
from ._parts import in_parts
from ._pool import num_threads
from .decode import decode_rows
from .simd import bits, narrow, widen

_PARALLEL_FROM = 98304  # elements of dense rows: 30/35 us with one/two threads at 49152, 46/42 us at 98304
_CHUNK = 1024  # rows decoded at a time: 1.5 MB of float32 at 384 columns


def _rows(table, ids, out, start, stop):
    """out[i] = table[ids[i]] for start <= i < stop, the stored bits of one type."""
    for i in range(start, stop):
        row = ids[i]
        for c in range(out.shape[1]):
            out[i, c] = table[row, c]


_in_parts = in_parts(_rows)


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
        arrays = (bits(weight), ids, bits(out))
        parts = min(num_threads(), ids.size) if out.size >= _PARALLEL_FROM else 1
        _in_parts(ids.size, parts, *arrays)
    elif isinstance(weight, RBEVectors):
        for start in range(0, ids.size, _CHUNK):
            chunk = ids[start : start + _CHUNK]
            decode_rows(weight, chunk, 0, chunk.size, out[start : start + _CHUNK], ws)
    else:
        _from_block_rows(ids, weight, out, ws)


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

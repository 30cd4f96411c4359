"""Coefficients to stored codes: `DenseCodes` and `SparseCodes` from a coefficient matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import packing
from .blocks import MAX_GAP, DenseCodes, SparseCodes

F32 = NDArray[np.float32]


def count_dtype(cols_pad: int) -> Any:
    """The stored type of entries per row: uint16 where it suffices."""
    return np.uint16 if cols_pad <= 0xFFFF else np.uint32


def delta_bytes(entries: int, rows: int, cols: int) -> int:
    """Bytes of a delta index: one per entry, and the entries of each row."""
    return entries + rows * int(np.dtype(count_dtype(cols)).itemsize)


def encode_dense(c: F32, bits: int, group: int) -> DenseCodes:
    """Every coefficient of c (rows, cols) float32 as a code of `bits` bits."""
    from .cpu_fallback.quantize import quantize_rows

    rows, cols = c.shape
    scale = np.empty((rows, -(-cols // group)), np.uint16)
    value = np.empty((rows, packing.packed_bytes(cols, bits)), np.uint8)
    step = max(1, (1 << 21) // cols)
    codes = np.empty((min(step, rows), cols), np.uint16)
    error = np.empty(min(step, rows))
    for start in range(0, rows, step):
        part = c[start : start + step]
        n = len(part)
        quantize_rows(part, bits, group, np.float32(0), scale[start : start + n], codes[:n], error[:n])
        value[start : start + n] = packing.pack(codes[:n], bits)
    return DenseCodes(bits, group, value, scale.view(np.float16))


def _threshold(magnitudes: F32, kept: float) -> float:
    """The magnitude that `kept` of all coefficients exceed."""
    drop = magnitudes.size - round(kept * magnitudes.size)
    if drop <= 0:
        return -1.0
    return float(np.partition(magnitudes, drop - 1)[drop - 1])


def encode_sparse(c: F32, value: str, group: int, kept: float) -> SparseCodes:
    """The `kept` fraction of the coefficients c (rows, cols) float32 that is largest."""
    from .cpu_fallback import quantize

    rows, cols = c.shape
    threshold = _threshold(np.abs(c).reshape(-1), kept)
    keep = np.empty((rows, cols), np.uint8)
    count = np.empty(rows, np.int64)
    # the delta form needs gaps below 256 and fills longer ones; it is kept if that still makes it the smaller
    quantize.mark_kept(c, np.float32(threshold), MAX_GAP, keep)
    quantize.row_counts(keep, count)
    entries = int(count.sum())
    if entries == rows * cols:
        index_kind = "full"
    elif delta_bytes(entries, rows, cols) < rows * cols // 8:
        index_kind = "delta"
    else:
        index_kind = "bitmap"
        quantize.mark_kept(c, np.float32(threshold), 0, keep)
        quantize.row_counts(keep, count)
        entries = int(count.sum())
    row_start = np.zeros(rows + 1, np.int64)
    np.cumsum(count, out=row_start[1:])
    stream = np.empty(entries, np.float32)
    skipped = np.empty(entries, np.uint8)
    quantize.collect(c, keep, row_start, stream, skipped)
    bitmap = np.packbits(keep, axis=1, bitorder="little") if index_kind == "bitmap" else None
    index = skipped if index_kind == "delta" else bitmap
    counts = count.astype(count_dtype(cols)) if index_kind == "delta" else None
    if value in ("f32", "f16"):
        stored = stream if value == "f32" else stream.astype(np.float16)
        return SparseCodes(value, index_kind, 0, stored, None, index, counts, 0.0, row_start)
    bits = int(value[3:])
    dead_zone = np.float32(max(threshold, 0.0))
    codes, scale, _ = quantize_stream(stream, bits, group, dead_zone, store=True)
    packed = packing.pack(codes, bits)
    return SparseCodes(value, index_kind, group, packed, scale, index, counts, float(dead_zone), row_start)


def quantize_stream(
    stream: F32, bits: int, group: int, dead_zone: np.float32, store: bool
) -> tuple[NDArray[np.uint16], NDArray[np.float16], float]:
    """Codes, scales and squared error of a run of kept values, `group` of them to a scale."""
    from .cpu_fallback.quantize import quantize_rows

    groups = -(-stream.size // group)
    padded = np.zeros(groups * group, np.float32)
    padded[: stream.size] = stream
    rest = groups * group - stream.size
    if rest and stream.size:  # a copy of a real value does not pull the last scale
        padded[stream.size :] = stream[-1]
    codes = np.empty((groups if store else 0, group), np.uint16)
    scale = np.empty((groups, 1), np.uint16)
    error = np.empty(groups)
    if groups:
        quantize_rows(padded.reshape(groups, group), bits, group, dead_zone, scale, codes, error)
    return codes.reshape(-1)[: stream.size], scale.reshape(-1).view(np.float16), float(error.sum())

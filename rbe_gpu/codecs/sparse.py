"""Sparse codes: the largest coefficients of a matrix, and their positions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .. import dispatch
from ..json_checks import Fail, json_choice, json_fields, json_integer, json_number
from . import packing
from .base import (
    DEFAULT_GROUP,
    F32,
    GROUPS,
    Array,
    Codes,
    EncodeConfig,
    LoadCost,
    Sample,
    Take,
    total_nbytes,
)

SPARSE_BITS = tuple(range(1, 9))
INDEX_KINDS = ("full", "bitmap", "delta")
MAX_GAP = 256  # delta index: two stored positions of a row, or the row's start, are at most this far apart

_CHUNK = 1 << 20  # bytes or rows read in one step
_FLOAT_BITS = {"f16": 16, "f32": 32}


@dataclass(frozen=True)
class SparseCodes(Codes):
    """The stored coefficients of each row, in column order, and their positions.

    Entries are stored row after row. Their columns are given by `index_kind`:

    - "full": every coefficient is stored; there is no index
    - "bitmap": bit (c % 8) of index[row, c // 8] is 1 where column c is stored
    - "delta": one byte per entry, the number of columns skipped since the previous entry of the row
      (since the row's start for the first), and `count` entries per row

    Values are float32, float16, or b-bit codes with a scale per group of 32/64/128 consecutive entries:
    with u the code and h = 2**(bits-1), m = u - h if u >= h else h - 1 - u,
    c = sign * (dead_zone + scale * (m + 1/2)), sign = +1 if u >= h else -1.

    Attributes
    ----------
    value_kind : "f32", "f16" or "int<b>", b = 1 to 8
    index_kind : "full", "bitmap" or "delta"
    group : entries per scale; 0 for f32 and f16
    value : (entries,) float32/float16, or (packed_bytes,) uint8
    scale : (ceil(entries / group),) float16, or None
    index : (rows_pad, cols_pad / 8) uint8, (entries,) uint8, or None
    count : (rows_pad,) uint16 or uint32 for "delta", else None
    dead_zone : float, integer values only
    row_start : (rows_pad + 1,) int64; derived, not stored
    """

    value_kind: str
    index_kind: str
    group: int
    value: Array
    scale: Array | None
    index: Array | None
    count: Array | None
    dead_zone: float
    row_start: Array = field(repr=False)
    kind: ClassVar[str] = "sparse"
    array_names: ClassVar[tuple[str, ...]] = ("value", "scale", "index", "count")

    @property
    def name(self) -> str:
        return f"sparse-{self.value_kind}"

    @property
    def bits(self) -> int:
        """Bits of one value."""
        return _FLOAT_BITS.get(self.value_kind) or int(self.value_kind[3:])

    @property
    def entries(self) -> int:
        """Number of stored coefficients."""
        return int(self.row_start[-1])

    @property
    def arrays(self) -> dict[str, Array]:
        named = {"value": self.value, "scale": self.scale, "index": self.index, "count": self.count}
        return {k: v for k, v in named.items() if v is not None}

    def has_size(self, rows: int, cols: int) -> bool:
        if self.index_kind == "bitmap" and (self.index is None or self.index.shape != (rows, cols // 8)):
            return False
        if self.index_kind == "full" and self.value_kind in _FLOAT_BITS and len(self.value) != rows * cols:
            return False
        return len(self.row_start) == rows + 1

    @property
    def resident_nbytes(self) -> int:
        """Bytes in memory: the arrays and `row_start`."""
        return total_nbytes(self.arrays) + int(self.row_start.nbytes)

    def description(self) -> dict[str, Any]:
        return {
            "kind": "sparse",
            "value_kind": self.value_kind,
            "index_kind": self.index_kind,
            "group": int(self.group),
            "dead_zone": float(self.dead_zone),
            "entries": self.entries,
        }

    @classmethod
    def from_file(cls, stored: Any, rows: int, cols: int, take: Take, fail: Fail) -> SparseCodes:
        names = ("kind", "value_kind", "index_kind", "group", "dead_zone", "entries")
        _, value_kind, index_kind, group, dead_zone, entries = json_fields(stored, names, "codes", fail)
        value_kind = json_choice(
            value_kind, ("f32", "f16", *(f"int{b}" for b in SPARSE_BITS)), "value_kind", fail
        )
        index_kind = json_choice(index_kind, INDEX_KINDS, "index_kind", fail)
        entries = json_integer(entries, 0, rows * cols, "entries", fail)
        dead_zone = json_number(dead_zone, "dead_zone", fail)
        scale = None
        if value_kind in _FLOAT_BITS:
            if json_integer(group, 0, 0, "group", fail) or dead_zone != 0.0:
                fail(f"dead_zone={dead_zone} belongs to integer values")
            value = take("value", (value_kind.upper(),), (entries,), finite=True)
        else:
            group = json_choice(group, GROUPS, "group", fail)
            if not 0.0 <= dead_zone <= float(np.finfo(np.float32).max):
                fail(f"dead_zone={dead_zone} is not a float32 of 0 or more")
            value = take("value", ("U8",), (packing.packed_bytes(entries, int(value_kind[3:])),))
            scale = take("scale", ("F16",), (-(-entries // group),), finite=True)
        index, count, row_start = _positions(index_kind, entries, rows, cols, take, fail)
        return cls(value_kind, index_kind, group, value, scale, index, count, dead_zone, row_start)

    @classmethod
    def load_cost(cls, stored: Any, rows: int, cols: int) -> LoadCost:
        # row_start; the copies of index and count are no larger than the file
        return LoadCost(8 * (rows + 1), 0, 0)

    @classmethod
    def header_bound(cls, rows: int, cols: int) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
        size = 4 * rows * cols
        description = {
            "kind": "sparse",
            "value_kind": "int8",
            "index_kind": "bitmap",
            "group": max(GROUPS),
            "dead_zone": -1.2345678901234567e-123,
            "entries": size,
        }
        packed = packing.packed_bytes(cols, packing.MAX_BITS)
        return description, {
            "value": (rows, packed),
            "scale": (size,),
            "index": (rows, size),
            "count": (rows,),
        }

    @classmethod
    def candidates(cls) -> Iterator[EncodeConfig]:
        for bits in SPARSE_BITS:
            yield SparseConfig(bits, DEFAULT_GROUP)
        for bits in _FLOAT_BITS.values():
            yield SparseConfig(bits)


def _positions(
    kind: str, entries: int, rows: int, cols: int, take: Take, fail: Fail
) -> tuple[NDArray[Any] | None, NDArray[Any] | None, NDArray[np.int64]]:
    """`index`, `count` and `row_start` of a file. They become addresses, so they are copied, then checked."""
    index = count = None
    if kind == "full":
        if entries != rows * cols:
            fail(f"entries={entries}, but a full index has {rows * cols}")
        return None, None, np.arange(0, entries + 1, cols, dtype=np.int64)
    if kind == "bitmap":
        index = np.array(take("index", ("U8",), (rows, cols // 8)))
        words = index.view(np.uint16)
    else:
        index = np.array(take("index", ("U8",), (entries,)))
        count = np.array(take("count", ("U16", "U32"), (rows,)))
        if int(count.max()) > cols:
            fail(f"count holds {int(count.max())}, but a row has {cols} columns")
    step = _CHUNK if count is not None else max(1, _CHUNK // words.shape[1])

    def counts(first: int) -> NDArray[np.int64]:
        part = slice(first, first + step)
        if count is not None:
            return count[part].astype(np.int64)
        return np.asarray(_POPCOUNT[words[part]].sum(axis=1, dtype=np.int64))

    total = 0
    for first in range(0, rows, step):
        in_rows = counts(first)
        start, total = total, total + int(in_rows.sum())
        if count is not None and total <= entries:
            _check_columns(index[start:total], in_rows, first, cols, fail)  # type: ignore[index]
    if total != entries:
        fail(f"its rows hold {total} entries, the description says {entries}")
    row_start = np.zeros(rows + 1, np.int64)  # up to four times the size of count, and so after the checks
    for first in range(0, rows, step):
        row_start[first + 1 : first + 1 + step] = counts(first)
    np.cumsum(row_start, out=row_start)
    return index, count, row_start


def _check_columns(
    index: NDArray[np.uint8], counts: NDArray[np.int64], first: int, cols: int, fail: Fail
) -> None:
    """The entries of some rows, the first of them `first`, must be in the columns. index : the gaps before them."""
    used = np.flatnonzero(counts)
    if not used.size:
        return
    starts = np.cumsum(counts[used]) - counts[used]
    skipped = np.add.reduceat(index, starts, dtype=np.int64)
    past = skipped + counts[used] > cols  # the last entry of a row is in column skipped + count - 1
    if past.any():
        fail(f"index leaves the {cols} columns in row {first + int(used[past.argmax()])}")


_POPCOUNT = np.unpackbits(np.arange(65536, dtype=np.uint16).view(np.uint8).reshape(-1, 2), axis=1).sum(
    axis=1, dtype=np.uint8
)


# --- encoding -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SparseConfig(EncodeConfig):
    """The largest coefficients, `density` of them all: as codes of 1 to 8 bits, float16 or float32."""

    prunes: ClassVar[bool] = True

    @property
    def value_kind(self) -> str:
        return {16: "f16", 32: "f32"}.get(self.bits) or f"int{self.bits}"

    @property
    def name(self) -> str:
        return f"sparse-{self.value_kind}"

    def quantize(self, c: F32) -> SparseCodes:
        return quantize_sparse(c, self.value_kind, self.group, self.density)

    def nbytes(self, rows: int, cols: int) -> int:
        entries = round(self.density * rows * cols)
        if not self.group:
            values = entries * self.bits // 8
        else:
            values = packing.packed_bytes(entries, self.bits) + 2 * -(-entries // self.group)
        return values + _index_bytes(entries, rows, cols)

    def squared_error(self, sample: Sample) -> float:
        drop = sample.sorted.size - round(self.density * sample.sorted.size)
        threshold = sample.sorted[drop - 1] if drop else np.float32(-1)
        pruned = float(sample.pruned[drop])
        if self.value_kind == "f32":
            return pruned
        stream = sample.coefficients.reshape(-1)[sample.magnitudes > threshold]
        if self.value_kind == "f16":
            diff = stream.astype(np.float64) - stream.astype(np.float16)
            return pruned + float(diff @ diff)
        dead_zone = np.float32(max(threshold, 0.0))
        return pruned + _quantize_entries(stream, self.bits, self.group, dead_zone, store=False)[2]


def _count_dtype(cols_pad: int) -> Any:
    """The stored type of entries per row: uint16 where it suffices."""
    return np.uint16 if cols_pad <= 0xFFFF else np.uint32


def _delta_bytes(entries: int, rows: int, cols: int) -> int:
    """Bytes of a delta index: one per entry, and the entries of each row."""
    return entries + rows * int(np.dtype(_count_dtype(cols)).itemsize)


def _index_bytes(entries: int, rows: int, cols: int) -> int:
    if entries == rows * cols:
        return 0
    return min(rows * cols // 8, _delta_bytes(entries, rows, cols))


def _threshold(magnitudes: F32, density: float) -> float:
    """The magnitude that a fraction `density` of all coefficients exceeds."""
    drop = magnitudes.size - round(density * magnitudes.size)
    if drop <= 0:
        return -1.0
    return float(np.partition(magnitudes, drop - 1)[drop - 1])


def quantize_sparse(c: F32, value_kind: str, group: int, density: float) -> SparseCodes:
    """The largest of the coefficients c (rows, cols) float32, a fraction `density` of them."""
    quantize = dispatch.CPU.module("quantize")
    rows, cols = c.shape
    threshold = _threshold(np.abs(c).reshape(-1), density)
    keep = np.empty((rows, cols), np.uint8)
    count = np.empty(rows, np.int64)
    # a delta index needs gaps below 256 and fills longer ones; it is used if it is still the smaller one then
    quantize.mark_stored(c, np.float32(threshold), MAX_GAP, keep)
    quantize.row_counts(keep, count)
    entries = int(count.sum())
    if entries == rows * cols:
        index_kind = "full"
    elif _delta_bytes(entries, rows, cols) < rows * cols // 8:
        index_kind = "delta"
    else:
        index_kind = "bitmap"
        quantize.mark_stored(c, np.float32(threshold), 0, keep)
        quantize.row_counts(keep, count)
        entries = int(count.sum())
    row_start = np.zeros(rows + 1, np.int64)
    np.cumsum(count, out=row_start[1:])
    stream = np.empty(entries, np.float32)
    skipped = np.empty(entries, np.uint8)
    quantize.collect(c, keep, row_start, stream, skipped)
    bitmap = np.packbits(keep, axis=1, bitorder="little") if index_kind == "bitmap" else None
    index = skipped if index_kind == "delta" else bitmap
    counts = count.astype(_count_dtype(cols)) if index_kind == "delta" else None
    if value_kind in _FLOAT_BITS:
        value = stream if value_kind == "f32" else stream.astype(np.float16)
        return SparseCodes(value_kind, index_kind, 0, value, None, index, counts, 0.0, row_start)
    bits = int(value_kind[3:])
    dead_zone = np.float32(max(threshold, 0.0))
    codes, scale, _ = _quantize_entries(stream, bits, group, dead_zone, store=True)
    packed = packing.pack(codes, bits)
    return SparseCodes(
        value_kind, index_kind, group, packed, scale, index, counts, float(dead_zone), row_start
    )


def _quantize_entries(
    stream: F32, bits: int, group: int, dead_zone: np.float32, store: bool
) -> tuple[NDArray[np.uint16], NDArray[np.float16], float]:
    """Codes, scales and squared error of the entries in stored order, `group` of them to a scale."""
    groups = -(-stream.size // group)
    padded = np.zeros(groups * group, np.float32)
    padded[: stream.size] = stream
    padding = groups * group - stream.size
    if padding and stream.size:  # a copy of a real value does not affect the last scale
        padded[stream.size :] = stream[-1]
    codes = np.empty((groups if store else 0, group), np.uint16)
    scale = np.empty((groups, 1), np.uint16)
    error = np.empty(groups)
    if groups:
        quantize_rows = dispatch.CPU.module("quantize").quantize_rows
        quantize_rows(padded.reshape(groups, group), bits, group, dead_zone, scale, codes, error)
    return codes.reshape(-1)[: stream.size], scale.reshape(-1).view(np.float16), float(error.sum())

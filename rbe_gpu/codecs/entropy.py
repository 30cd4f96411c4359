"""Compress the integers of a grid: tuples of similar columns, one byte each, in one zstd frame.

Rows of a grid differ in spread (those of a table most, whose rare words are nearly all zeros), so they are grouped
into bands, and each band is coded as a grid of its own. Columns (transform coefficients, scaled) differ by a factor
of 3 and more: in a band they are grouped into classes. A class is read column by column, n integers to a byte: the
byte is the rank of the n-tuple in the order of rising sums of squares, which for peaked integers is nearly the order
of falling probability. The first 255 tuples have a byte of their own; the others, a few per cent, are stored verbatim
at the end. n is 1 for integers of 4 bits of entropy and 8 for columns that are nearly all zero, so that a byte always
carries 2 to 7 bits and zstd's Huffman code stays within 2% of the entropy. `FORMAT.md`, section 3, has every byte.

zstd (RFC 8878) has a maintained library in every language and is in Python's standard library from 3.14 on.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import zstandard

LENGTHS = tuple(range(1, 9))  # integers of one byte
ESCAPE = 255  # the byte of a tuple that has no rank
LOWEST, HIGHEST = -128, 127
MAX_WINDOW = (
    1 << 23
)  # bytes that a decoder of a frame must remember: RFC 8878 asks for this much of every decoder

_REACH = {1: 127, 2: 9, 3: 4, 4: 2, 5: 2, 6: 2, 7: 1, 8: 1}  # largest magnitude in the 255 first tuples
_GROUPS = 24  # columns are joined into classes by groups: at most 25 * 24 / 2 joins are compared
MAX_BANDS = 32
MAX_CLASSES = 256  # of all bands: what a class costs to read does not depend on how much it holds
_LENGTH_OF = np.arange(256) % 8 + 1  # of class g
_ROW_GROUPS = 32  # rows are joined into bands by groups, on counts of integers in groups of columns
_COLUMN_GROUPS = 12
# Estimated cost in bits of a band, beside its integers' entropy: code tables of its classes, the class of a column
_BAND, _CLASS = 1200.0, 2.0
_CHUNK = 1 << 20  # integers worked on at a time
# Estimated cost in bits, for choosing classes: Huffman's loss per byte, a block with its code table, a symbol
# of that table. Fitted to frames of MiniLM's weights at 1 to 4 bits.
_LOSS, _TABLE, _SYMBOL, _ESCAPED = 0.03, 120.0, 3.5, 1.1


class StreamError(ValueError):
    """A stream that `FORMAT.md` does not allow."""


@lru_cache(maxsize=8)
def tuples(length: int) -> NDArray[np.int8]:
    """The tuple of every rank, (255, length) int8: rising sums of squares, equal ones in lexicographic order."""
    reach = _REACH[length]
    every = np.array(list(product(range(-reach, reach + 1), repeat=length)), np.int8)
    order = np.argsort((every.astype(np.int64) ** 2).sum(axis=1), kind="stable")
    table: NDArray[np.int8] = every[order[:ESCAPE]]
    table.flags.writeable = False
    return table


@lru_cache(maxsize=8)
def _ranks(length: int) -> NDArray[np.uint8]:
    """The inverse: rank by the digits of a tuple in base 2 * reach + 3; a tuple with an extreme digit has none."""
    base = 2 * _REACH[length] + 3
    place = base ** np.arange(length)
    ranks = np.full(base**length, ESCAPE, np.uint8)
    ranks[(tuples(length).astype(np.int64) + _REACH[length] + 1) @ place] = np.arange(ESCAPE)
    return ranks


def _as_tuples(flat: NDArray[np.int8], length: int) -> NDArray[np.int8]:
    """A run of integers, padded with zeros, as (tuples, length)."""
    missing = -flat.size % length
    if missing:
        flat = np.concatenate([flat, np.zeros(missing, np.int8)])
    return flat.reshape(-1, length)


def _rank(parts: NDArray[np.int8], length: int) -> NDArray[np.uint8]:
    """The byte of each tuple. parts (tuples, length) int8."""
    reach, ranks = _REACH[length], _ranks(length)
    base = 2 * reach + 3
    out = np.empty(len(parts), np.uint8)
    step = max(1, _CHUNK // length)
    for start in range(0, len(parts), step):
        part = np.clip(parts[start : start + step], -reach - 1, min(reach + 1, HIGHEST))
        at = np.full(len(part), (reach + 1) * ((base**length - 1) // (base - 1)), np.int32)
        for k in range(length):
            at += part[:, k].astype(np.int32) * np.int32(base**k)
        out[start : start + step] = ranks[at]
    return out


def _escaped(parts: NDArray[np.int8], ranks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The integers of tuples without a rank, plus 128."""
    return np.asarray(parts[ranks == ESCAPE].reshape(-1).view(np.uint8) ^ 0x80)


# --- classes ------------------------------------------------------------------------------------------


def _information(counts: NDArray[np.float64], total: NDArray[np.float64]) -> NDArray[np.float64]:
    """total * log2(total) - sum_c c * log2(c), in bits; counts (..., 256), total (...)."""
    return np.asarray(
        total * np.log2(np.maximum(total, 1.0)) - (counts * np.log2(np.maximum(counts, 1.0))).sum(axis=-1)
    )


def _cost(counts: NDArray[np.float64], escaped: NDArray[np.float64]) -> NDArray[np.float64]:
    """Estimated bits of a class from how often each byte occurs, and each escaped integer. (..., 256)."""
    total, top = counts.sum(axis=-1), counts.max(axis=-1)
    coded = _information(counts, total)
    # Huffman coding spends a whole bit on a byte of probability above one half
    pair = np.stack([top, total - top], axis=-1)
    coded = np.where(2 * top > total, coded - _information(pair, total) + total, coded)
    used = (counts > 0).sum(axis=-1)
    coded = np.minimum(coded + _LOSS * total + _SYMBOL * used, 8.0 * total)
    coded = np.where(used <= 1, 8.0, coded)  # one byte repeated
    return np.asarray(
        coded
        + _TABLE * (1 + np.floor(total / 131072))
        + _information(escaped, escaped.sum(axis=-1)) * _ESCAPED
    )


def _cheapest_cuts(cost: NDArray[np.float64]) -> list[int]:
    """Where to cut 0 ... n-1 into runs so that the sum of cost[first, last] is least: the first of every run."""
    reached = [0.0]
    cut: list[int] = []
    for j in range(len(cost)):
        through = [reached[i] + cost[i, j] for i in range(j + 1)]
        cut.append(int(np.argmin(through)))
        reached.append(min(through))
    firsts = []
    j = len(cost) - 1
    while j >= 0:
        firsts.append(cut[j])
        j = cut[j] - 1
    return firsts[::-1]


def _classes(by_column: NDArray[np.int8], most: int) -> NDArray[np.uint8]:
    """The class of every column, `most` classes at most: 8 * (its number among those of its length) + length - 1.

    Columns in the order of their energy are cut into groups, and neighbouring groups are joined into classes
    so that the estimated bits of all classes are fewest (dynamic programming over the cuts).
    """
    cols = len(by_column)
    energy = np.array([float(np.dot(c, c)) for c in (column.astype(np.float64) for column in by_column)])
    order = np.argsort(energy, kind="stable")
    zeros = int((energy == 0).sum())
    groups = [order[:zeros]] if zeros else []
    groups += [g for g in np.array_split(order[zeros:], min(_GROUPS, most - 1)) if g.size]
    count = len(groups)
    width = np.array([g.size for g in groups])
    best = np.full((count, count), np.inf)  # of the class that joins groups i to j
    which = np.zeros((count, count), np.int64)
    first, last = np.triu_indices(count)
    sums = np.zeros((len(LENGTHS), 2, count + 1, 256))  # of bytes, of escaped integers
    for g, columns in enumerate(groups):
        flat = by_column[columns].reshape(-1)
        escaping = False
        for k, length in enumerate(LENGTHS):
            parts = _as_tuples(flat, length)
            if escaping:  # too many, and no fewer for longer tuples: count all as escaped
                sums[k, 0, g + 1, ESCAPE] = len(parts)
                sums[k, 1, g + 1] = np.bincount(flat.view(np.uint8) ^ 0x80, minlength=256)
                continue
            ranks = _rank(parts, length)
            sums[k, 0, g + 1] = np.bincount(ranks, minlength=256)
            sums[k, 1, g + 1] = np.bincount(_escaped(parts, ranks), minlength=256)
            escaping = sums[k, 0, g + 1, ESCAPE] > len(parts) / 4
    np.cumsum(sums, axis=2, out=sums)
    for k, length in enumerate(LENGTHS):
        cost = _cost(*(sums[k][:, last + 1] - sums[k][:, first]))
        better = cost <= best[first, last]  # on ties the longest: zeros take an eighth of the bytes
        best[first[better], last[better]] = cost[better]
        which[first[better], last[better]] = length
    ends = np.concatenate([[0], np.cumsum(width)])
    joined = ends[last + 1] - ends[first]
    best[first, last] += joined * np.log2(cols / joined)  # the class bytes themselves
    classes = np.zeros(cols, np.uint8)
    numbers = dict.fromkeys(LENGTHS, 0)
    firsts = _cheapest_cuts(best)
    for i, end in reversed(list(zip(firsts, [*firsts[1:], count], strict=True))):
        length = int(which[i, end - 1])
        for columns in groups[i:end]:
            classes[columns] = 8 * numbers[length] + length - 1
        numbers[length] += 1
    return classes


# --- bands --------------------------------------------------------------------------------------------


def _groups(energy: NDArray[np.float64], weight: NDArray[np.float64], count: int) -> list[NDArray[np.int64]]:
    """Indices in the order of their energy, cut into at most `count` groups of equal weight; those of none apart."""
    order = np.argsort(energy, kind="stable")
    zeros = int((energy == 0).sum())
    rest = order[zeros:]
    groups = [order[:zeros]] if zeros else []
    if rest.size:
        share = np.cumsum(weight[rest])
        cuts = np.searchsorted(share, share[-1] * np.arange(1, count) / count)
        groups += [g for g in np.split(rest, cuts) if g.size]
    return groups


def _bands(q: NDArray[np.int8]) -> NDArray[np.uint8]:
    """The band of every row, 0 for the least energy.

    Rows in the order of their energy are cut into groups, and neighbouring groups are joined into bands so that the
    estimated bits are fewest.
    """
    rows, cols = q.shape
    energy = np.empty(rows)
    columns = np.zeros(cols)
    step = max(1, _CHUNK // cols)
    for start in range(0, rows, step):
        square = np.square(q[start : start + step].astype(np.float32))
        energy[start : start + step] = square.sum(axis=1)
        columns += square.sum(axis=0)
    # groups of rows hold as many integers as bits, about: half of the weight is that of the rows themselves
    mean = max(float(energy.mean()), 1e-30)
    groups = _groups(energy, 1.0 + np.sqrt(energy / mean), _ROW_GROUPS - 1)
    if len(groups) == 1:
        return np.zeros(rows, np.uint8)
    parts = _groups(columns, np.ones(cols), _COLUMN_GROUPS)
    count = len(groups)
    sums = np.zeros((count + 1, len(parts), 256))
    for g, members in enumerate(groups):
        for start in range(0, members.size, step):
            some = q[members[start : start + step]].view(np.uint8)
            for k, part in enumerate(parts):
                sums[g + 1, k] += np.bincount(some[:, part].ravel(), minlength=256)
    np.cumsum(sums, axis=0, out=sums)
    cost = np.full((count, count), np.inf)
    ends = np.concatenate([[0], np.cumsum([g.size for g in groups])])
    for i in range(count):
        joined = sums[i + 1 :] - sums[i]
        members = ends[i + 1 :] - ends[i]
        coded = _information(joined, joined.sum(axis=-1)).sum(axis=-1)
        cost[i, i:] = coded + _BAND + _CLASS * cols + members * np.log2(rows / members)
    bands = np.empty(rows, np.uint8)
    firsts = _cheapest_cuts(cost)
    for band, (first, end) in enumerate(zip(firsts, [*firsts[1:], count], strict=True)):
        for members in groups[first:end]:
            bands[members] = band
    return bands


# --- the stream ---------------------------------------------------------------------------------------


def _compressor() -> zstandard.ZstdCompressor:
    """Huffman coding and few matches: matches between codes are accidental and mostly cost more than literals.

    The optimal parser compares each match with literals; 64 hash entries leave it little but runs of one byte.
    """
    import zstandard  # here and below: importing it takes 10 ms, and only grid codes need it

    parameters = zstandard.ZstdCompressionParameters(
        strategy=zstandard.STRATEGY_BTOPT,
        window_log=20,
        hash_log=6,
        chain_log=6,
        search_log=1,
        min_match=6,
        target_length=32,
        write_content_size=True,
        write_checksum=False,
        write_dict_id=False,
    )
    return zstandard.ZstdCompressor(compression_params=parameters)


class Stream(NamedTuple):
    """The integers of a grid as a file holds them.

    Attributes
    ----------
    data : (bytes,) uint8
    bands : the groups of rows that are coded one by one, 1 to 32
    """

    data: NDArray[np.uint8]
    bands: int


def compress_integers(q: NDArray[np.int8]) -> Stream:
    """The stream of a grid.

    Parameters
    ----------
    q : (rows, cols) int8

    Returns
    -------
    Stream. The same integers give the same bytes with the same version of zstd.
    """
    bands = _bands(q)
    count = int(bands.max()) + 1
    parts = [bands] if count > 1 else []
    runs, escaped = [], []
    for band in range(count):
        by_column = np.ascontiguousarray(q[bands == band].T if count > 1 else q.T)
        classes = _classes(by_column, MAX_CLASSES // count)
        parts.append(classes)
        for c in np.unique(classes):
            length = int(c) % 8 + 1
            run = _as_tuples(by_column[classes == c].reshape(-1), length)
            runs.append(_rank(run, length))
            escaped.append(_escaped(run, runs[-1]))
    parts += [*runs, np.concatenate(escaped)]
    import zstandard

    packer = _compressor().compressobj(size=sum(p.size for p in parts))
    out = []
    for part in parts:
        out.append(packer.compress(part.data))
        if part.size:  # a block, with a code table of its own, ends here
            out.append(packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
    out.append(packer.flush())
    return Stream(np.frombuffer(b"".join(out), np.uint8), count)


def _frame(stream: NDArray[np.uint8], largest: int) -> tuple[bytes, int]:
    """The frame, copied (the file under it may change), and the size of its content."""
    import zstandard

    data = stream.tobytes()
    if data[:4] != zstandard.FRAME_HEADER:  # skippable frames have other ones
        raise StreamError("not one zstd frame (it does not start as one)")
    try:
        header = zstandard.get_frame_parameters(data)
    except zstandard.ZstdError as error:
        raise StreamError(_zstd_message(error)) from None
    if header.content_size == zstandard.CONTENTSIZE_UNKNOWN:
        raise StreamError("the frame does not give its size")
    if not 0 < header.content_size <= largest:
        raise StreamError(f"the frame holds {header.content_size} bytes, expected at most {largest}")
    if header.window_size > MAX_WINDOW:
        raise StreamError(f"the frame has a window of {header.window_size} bytes, more than {MAX_WINDOW}")
    return data, header.content_size


def frame_content(stream: NDArray[np.uint8], largest: int) -> bytes:
    """The content of one zstd frame, at most `largest` bytes; else `StreamError`."""
    return _content(*_frame(stream, largest))


def _zstd_message(error: Exception) -> str:
    return f"not one zstd frame ({' '.join(str(error).split())[:120]})"


def _content(data: bytes, size: int) -> bytes:
    """The content of the frame, of the size that its header gives."""
    import zstandard

    try:  # an error of zstandard's, too, where it does not have that size
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise StreamError(_zstd_message(error)) from None
    except MemoryError:
        raise StreamError("the frame does not fit into memory") from None


def _head_size(rows: int, cols: int, bands: int) -> int:
    """Bytes of the bands of rows and the classes of columns."""
    return bands * cols + (rows if bands > 1 else 0)


def _largest_content(rows: int, cols: int, bands: int) -> int:
    """Bytes of content that no stream exceeds: every tuple escaped, and each class padded."""
    return _head_size(rows, cols, bands) + 2 * rows * cols + bands * 8 * 256


def _runs(classes: NDArray[np.int64], sizes: list[int]) -> NDArray[np.int64]:
    """Integers of every class of every band, (bands, 256).

    classes : columns by class of each band, (bands, 256)
    sizes : rows of each band
    """
    used = int(np.count_nonzero(classes))
    if used > MAX_CLASSES:
        raise StreamError(f"{used} classes in all bands, more than {MAX_CLASSES}")
    return np.asarray(classes * np.array(sizes)[:, None])


def _ranks_of(runs: NDArray[np.int64]) -> NDArray[np.int64]:
    """The bytes of each run."""
    return np.asarray(-(-runs // _LENGTH_OF))


def _check_bands(counts: NDArray[np.int64], bands: int) -> None:
    """`counts` of rows by band, (256,): every band occurs, and no other."""
    used = np.flatnonzero(counts)
    if used.size != bands or used[-1] != bands - 1:
        raise StreamError(f"rows are in bands {', '.join(map(str, used[:40]))}, expected 0 to {bands - 1}")


def _check_range(low: int, high: int, bits: int) -> None:
    half = 1 << (bits - 1)
    if low < -half or high >= half:
        raise StreamError(f"integers from {low} to {high} are not of {bits} bits")


@lru_cache(maxsize=8)
def _pairs(length: int) -> NDArray[np.unsignedinteger]:
    """The integers of two neighbouring bytes by their little-endian value: (65536,) uint16 or uint32, length 1 or 2.

    Half as many look-ups: 0.7 ns for each byte, and 1.6 one by one.
    """
    table = _with_escape(length)
    both = np.concatenate([np.tile(table, (256, 1)), np.repeat(table, 256, axis=0)], axis=1)
    pairs: NDArray[np.unsignedinteger] = np.ascontiguousarray(both).view(f"<u{2 * length}")[:, 0]
    pairs.flags.writeable = False
    return pairs


@lru_cache(maxsize=8)
def _with_escape(length: int) -> NDArray[np.int8]:
    """`tuples`, and zeros in the place of the escape: (256, length)."""
    table = np.concatenate([tuples(length), np.zeros((1, length), np.int8)])
    table.flags.writeable = False
    return table


def _expand(ranks: NDArray[np.uint8], length: int) -> NDArray[np.int8]:
    """The tuples of these ranks, (ranks, length) int8; zeros for an escape."""
    table: NDArray[Any] = _with_escape(length)
    indices: NDArray[Any] = ranks
    if length <= 2:
        table = _pairs(length)
        even = np.zeros(ranks.size + ranks.size % 2, np.uint8)
        even[: ranks.size] = ranks
        indices = even.view("<u2")
    out = np.empty((indices.size, *table.shape[1:]), table.dtype)
    step = 1 << 15  # indices, which NumPy converts to 8 bytes each: they stay in the cache
    for start in range(0, indices.size, step):
        table.take(indices[start : start + step], 0, out[start : start + step], "clip")
    return out.view(np.int8).reshape(-1, length)[: ranks.size]


class Columns(NamedTuple):
    """The integers of a grid, column by column.

    Attributes
    ----------
    integers : (cols, rows rounded up to a multiple of 8) int8; what is beyond the rows is undefined
    order : (rows,) int64, the row of the grid at each place, those of a band side by side; None: rows in order
    """

    integers: NDArray[np.int8]
    order: NDArray[np.int64] | None


def decompress_columns(stream: NDArray[np.uint8], rows: int, cols: int, bits: int, bands: int = 1) -> Columns:
    """The integers of a stream, column by column.

    Parameters
    ----------
    stream : (bytes,) uint8, C-contiguous; untrusted input
    rows, cols : of the grid; cols is a multiple of 32
    bits : 2 to 8; the integers lie in -2^(bits-1) ... 2^(bits-1) - 1
    bands : 1 to 32

    Raises
    ------
    StreamError
        Anything that `FORMAT.md` does not allow.
    """
    content = np.frombuffer(frame_content(stream, _largest_content(rows, cols, bands)), np.uint8)
    at = _head_size(rows, cols, bands)
    if content.size < at:
        raise StreamError(_too_short(content.size, rows, cols, bands))
    sizes = [rows]
    if bands > 1:
        band = content[:rows]
        counts = np.bincount(band, minlength=256)
        _check_bands(counts, bands)
        sizes = counts[:bands].tolist()
    classes = content[at - bands * cols : at].reshape(bands, cols)
    columns_of = np.stack([np.bincount(c, minlength=256) for c in classes])
    ranks_of = _ranks_of(_runs(columns_of, sizes))
    end = at + int(ranks_of.sum())
    if content.size < end:
        raise StreamError(f"{content.size} bytes, but the classes take {end}")
    by_band = np.empty((cols, -(-rows // 8) * 8), np.int8)
    first = 0
    for in_band, in_class, of_class, size in zip(classes, columns_of, ranks_of, sizes, strict=True):
        by_class, column = np.argsort(in_band, kind="stable"), 0
        for c in of_class.nonzero()[0].tolist():
            length, count, width = c % 8 + 1, int(of_class[c]), int(in_class[c])
            ranks = content[at : at + count]
            integers = _expand(ranks, length)
            escaped = (ranks == ESCAPE).nonzero()[0]
            if escaped.size:
                raw = content[end : end + escaped.size * length]
                if raw.size < escaped.size * length:
                    raise StreamError(f"{content.size} bytes are too few for the escaped integers")
                integers[escaped] = (raw ^ np.uint8(0x80)).view(np.int8).reshape(-1, length)
                end += raw.size
            columns = by_class[column : column + width]
            by_band[columns, first : first + size] = integers.reshape(-1)[: width * size].reshape(width, size)
            column += width
            at += count
        first += size
    if end != content.size:
        raise StreamError(f"{content.size - end} bytes follow the escaped integers")
    _check_range(int(by_band[:, :rows].min()), int(by_band[:, :rows].max()), bits)
    return Columns(by_band, np.argsort(band, kind="stable") if bands > 1 else None)


def _too_short(size: int, rows: int, cols: int, bands: int) -> str:
    of_rows = f" and the bands of {rows} rows" if bands > 1 else ""
    return f"{size} bytes are too few for the classes of {cols} columns{of_rows}"


# --- checking a stream without keeping it ----------------------------------------------------------------


def check_stream(stream: NDArray[np.uint8], rows: int, cols: int, bits: int, bands: int = 1) -> None:
    """The checks of `decompress_columns` in little memory, whatever the stream claims to hold.

    Some 10 MB beyond the stream and its classes. Takes the parameters of `decompress_columns`.

    Raises
    ------
    StreamError
        As `decompress_columns`.
    """
    import zstandard

    data, size = _frame(stream, _largest_content(rows, cols, bands))
    end = _head_size(rows, cols, bands)
    if size < end:
        raise StreamError(_too_short(size, rows, cols, bands))
    # a content size that is wrong, or bytes behind the frame, are left to `decompress_columns`
    with zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).stream_reader(data) as reader:
        sizes = [rows]
        if bands > 1:
            counts = _counts(reader, rows)
            _check_bands(counts, bands)
            sizes = counts[:bands].tolist()
        runs = _runs(np.stack([_counts(reader, cols) for _ in sizes]), sizes)
        end += int(_ranks_of(runs).sum())
        if size < end:
            raise StreamError(f"{size} bytes, but the classes take {end}")
        escaped = []
        low, high = HIGHEST, LOWEST
        for band, c in np.argwhere(runs):
            length = int(c) % 8 + 1
            whole, rest = divmod(int(runs[band, c]), length)
            ranks = _counts(reader, whole)
            used_tuples = tuples(length)[np.flatnonzero(ranks[:ESCAPE])]
            last = b"".join(p.tobytes() for p in _read(reader, 1)) if rest else b""
            if last and last[0] != ESCAPE:
                used_tuples = np.append(used_tuples, tuples(length)[last[0]][:rest])
            if used_tuples.size:
                low, high = min(low, int(used_tuples.min())), max(high, int(used_tuples.max()))
            escaped.append((int(ranks[ESCAPE]) * length, rest if last[:1] == b"\xff" else 0, length))
        end += sum(n + (length if rest else 0) for n, rest, length in escaped)
        if size < end:
            raise StreamError(f"{size} bytes are too few for the escaped integers")
        for count, rest, length in escaped:
            for part in (*_read(reader, count), *_read(reader, rest)):
                low, high = min(low, int(part.min()) - 128), max(high, int(part.max()) - 128)
            for _ in _read(reader, length - rest if rest else 0):
                pass
    if size > end:
        raise StreamError(f"{size - end} bytes follow the escaped integers")
    _check_range(low, high, bits)


def _counts(reader: zstandard.ZstdDecompressionReader, count: int) -> NDArray[np.int64]:
    """How often each value occurs in the next `count` bytes, (256,)."""
    counts = np.zeros(256, np.int64)
    for part in _read(reader, count):
        counts += np.bincount(part, minlength=256)
    return counts


def _read(reader: zstandard.ZstdDecompressionReader, count: int) -> Iterator[NDArray[np.uint8]]:
    """The next `count` bytes, a part at a time."""
    import zstandard

    while count:
        try:
            part = reader.read(min(count, _CHUNK))
        except zstandard.ZstdError as error:
            raise StreamError(_zstd_message(error)) from None
        if not part:
            raise StreamError("not one zstd frame (it ends before its content)")
        count -= len(part)
        yield np.frombuffer(part, np.uint8)

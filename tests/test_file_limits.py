"""Small files that could cost much: time and memory before a refusal are linear in the file's size."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import zstandard

from rbe_gpu import memory
from rbe_gpu.codecs import entropy
from rbe_gpu.container import FormatError, load_file, save_file

from .bounded import limit, readings

SIZES = (400_000, 1_600_000, 6_000_000)  # of a header: the first ones are parsed, then refused


def header_file(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def filled(size: int, start: str, piece: str | Callable[[int], str], end: str) -> str:
    """A text of `size` characters: start, as many pieces as fit, end."""
    if isinstance(piece, str):
        return start + piece * ((size - len(start) - len(end)) // len(piece)) + end
    parts, used = [], len(start) + len(end)
    for i in count():
        parts.append(piece(i))
        used += len(parts[-1])
        if used > size:
            return start + "".join(parts) + end
    raise AssertionError


def in_description(text: str) -> str:
    root = f'{{"version": 1, "tensors": {{}}, "config": {text}}}'
    return json.dumps({"__metadata__": {"rbe": root}}, ensure_ascii=False)


ENTRY = '{"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}'
HEADERS: dict[str, Callable[[int], str | bytes]] = {
    "keys and the first twice": lambda n: filled(n, '{"dup": 0,', lambda i: f'"k{i}": 0,', '"dup": 1}'),
    "keys and the last twice": lambda n: filled(n, "{", lambda i: f'"k{i}": 0,', '"a": 0, "a": 1}'),
    "lists": lambda n: filled(n, '{"a": [', "[],", "0]}"),
    "lists of one": lambda n: filled(n, '{"a": [', "[0],", "0]}"),
    "objects": lambda n: filled(n, '{"a": [', "{},", "0]}"),
    "objects of one": lambda n: filled(n, '{"a": [', '{"b":0},', "0]}"),
    "small integers": lambda n: filled(n, '{"a": [', "1,", "0]}"),
    "integers": lambda n: filled(n, '{"a": [', "999,", "0]}"),
    "fractions": lambda n: filled(n, '{"a": [', "1.5,", "0]}"),
    "texts": lambda n: filled(n, '{"a": [', lambda i: f'"{i:x}",', "0]}"),
    "short keys": lambda n: filled(n, "{", lambda i: f'"{i:x}":0,', '"a": 0}'),
    "keys of an object in a list": lambda n: filled(n, '{"a": [{', lambda i: f'"{i:x}":0,', '"z": 0}]}'),
    "nested as deep as the parser goes": lambda n: filled(n, '{"a": [', "[" * 500 + "]" * 500 + ",", "0]}"),
    "opening brackets": lambda n: "{" + '"a":[' + "[" * n,
    "opening braces": lambda n: '{"a":' * (n // 5),
    "a long name": lambda n: '{"' + "a" * n + '": 0}',
    "a long name of four-byte characters": lambda n: '{"' + "\U0001f600" * (n // 4) + '": 0}',
    "a long name with one four-byte character": lambda n: '{"' + "a" * n + '\U0001f600": 0}',
    "a long name with one escape": lambda n: '{"' + "a" * n + '\\ud83d\\ude00": 0}',
    "half a surrogate pair at the end of a long text": lambda n: '{"a": "' + "a" * n + '\\ud83d"}',
    "a long number": lambda n: '{"a": ' + "9" * n + "}",
    "a long fraction": lambda n: '{"a": 0.' + "3" * n + "}",
    "spaces": lambda n: "{" + " " * n,
    "empty arrays": lambda n: filled(n, "{", lambda i: f'"{i}": {ENTRY},', f'"a": {ENTRY}}}'),
    "lists in the description": lambda n: in_description(filled(n, "[", "[],", "0]")),
    "texts in the description": lambda n: in_description(filled(n, "[", lambda i: f'"{i:x}",', "0]")),
    "escapes in the description": lambda n: in_description('{"a": "' + "\\" * (n // 2) + '"'),
    "dense tensors without an array": lambda n: json.dumps(
        {
            "__metadata__": {
                "rbe": '{"version": 1, "config": {}, "tensors": '
                + filled(n, "{", lambda i: f'"{i}":{{"kind":"dense"}},', '"a":{"kind":"dense"}}')
                + "}"
            }
        }
    ),
}


def check(files: list[Path], seconds: Callable[[int], float]) -> None:
    """Every file is refused, within `limit` and `seconds(size of the file)`."""
    faults = []
    for file, reading in zip(files, readings("load_file", files), strict=True):
        size = file.stat().st_size
        if reading.message is None:
            faults.append(f"{file.name}: accepted")
        elif not reading.message.startswith("FormatError"):
            faults.append(f"{file.name}: {reading.message}")
        if reading.nbytes > limit(file):
            faults.append(f"{file.name}: {reading.nbytes >> 20} MB for {size} bytes")
        if reading.seconds > seconds(size):
            faults.append(f"{file.name}: {reading.seconds:.1f} s for {size} bytes")
    assert not faults


def test_headers(tmp_path: Path) -> None:
    files = []
    for name, make in HEADERS.items():
        for size in SIZES:
            files.append(tmp_path / f"{name}, {size}")
            files[-1].write_bytes(header_file(make(size)))
    # at most 1.9 s on a machine with seven other processes; one key twice among 20,000 took 16 s before
    check(files, lambda size: 5 + 1e-6 * size)


def test_many_small_tensors_load(tmp_path: Path) -> None:
    """What the bound on a header allows: far more tensors than a model has."""
    tensors = {f"encoder.layer.{i}.output.LayerNorm.weight": np.ones(4, np.float32) for i in range(10_000)}
    save_file(tmp_path / "a", tensors)
    assert len(load_file(tmp_path / "a")[0]) == 10_000


def test_the_writer_refuses_a_header_that_a_reader_refuses(tmp_path: Path) -> None:
    tensors = {str(i): np.ones(1, np.uint8) for i in range(40_000)}
    with pytest.raises(FormatError, match="brackets, commas and colons: too many for a file"):
        save_file(tmp_path / "a", tensors)
    assert not list(tmp_path.iterdir())


# --- streams and sizes ----------------------------------------------------------------------------------


def frame(blocks: list[tuple[int, int]], size: int | None = None, single_segment: bool = True) -> bytes:
    """A zstd frame of repeated bytes: blocks (byte, count); `size` is what its header claims.

    Not single_segment: a window of 1 MiB.
    """
    total = sum(n for _, n in blocks)
    out = [struct.pack("<IB", 0xFD2FB528, 0xE0 if single_segment else 0xC0)]
    out.append(b"" if single_segment else bytes([10 << 3]))
    out.append(struct.pack("<Q", total if size is None else size))
    runs = [(byte, min(131072, n - at)) for byte, n in blocks for at in range(0, n, 131072)]
    for i, (byte, n) in enumerate(runs):
        out.append((n << 3 | 2 | (i + 1 == len(runs))).to_bytes(3, "little") + bytes([byte]))
    return b"".join(out)


class Grid:
    """A grid tensor of one class a band (n integers a byte), every byte of it `rank`, and its escapes 128 (a zero).

    classes : a class for each column in place of that
    """

    def __init__(
        self,
        rows: int,
        cols: int,
        n: int,
        rank: int = 0,
        bits: int = 8,
        more: int = 0,
        bands: int = 1,
        classes: Sequence[int] | None = None,
    ) -> None:
        count = -(-(rows - bands + 1) * cols // n) + (bands - 1) * -(-cols // n)
        blocks = [(band, 1) for band in range(1, bands)] + [(0, rows - bands + 1)] if bands > 1 else []
        for _ in range(bands):
            blocks += [(n - 1, cols)] if classes is None else [(c, 1) for c in classes]
        blocks.append((rank, count))
        if rank == 255:
            blocks.append((128, count * n))
        if more:
            blocks.append((0, more))
        self.stream = frame(blocks, single_segment=False)
        self.shape, self.bits, self.bands = [rows, cols], bits, bands

    def description(self) -> dict[str, object]:
        codes = {"kind": "grid", "bits": self.bits, "shrink": 0.0, "row_scale": False, "bands": self.bands}
        return {
            "kind": "vectors", "shape": self.shape, "block": 32, "transform": "none", "gain": 1.0, "basis": False,
            "codes": codes,
        }  # fmt: skip

    def arrays(self) -> dict[str, tuple[str, list[int], bytes]]:
        scale = bytes(2 * self.shape[1])
        return {
            "col_scale": ("F16", [self.shape[1]], scale),
            "stream": ("U8", [len(self.stream)], self.stream),
        }


class Sparse:
    """Sparse float16 values; `entries` and `shape` are claims."""

    def __init__(
        self, shape: list[int], kind: str, entries: int, arrays: dict[str, tuple[str, list[int], bytes]]
    ) -> None:
        self._shape, self._kind, self._entries, self._arrays = shape, kind, entries, arrays

    def description(self) -> dict[str, object]:
        codes = {
            "kind": "sparse", "value_kind": "f16", "index_kind": self._kind, "group": 0, "dead_zone": 0.0,
            "entries": self._entries,
        }  # fmt: skip
        return {
            "kind": "vectors", "shape": self._shape, "block": 32, "transform": "none", "gain": 1.0, "basis": False,
            "codes": codes,
        }  # fmt: skip

    def arrays(self) -> dict[str, tuple[str, list[int], bytes]]:
        return self._arrays


def file_of(*tensors: Grid | Sparse) -> bytes:
    header: dict[str, object] = {}
    described, payload = {}, []
    arrays = {f"t{i}.{part}": a for i, t in enumerate(tensors) for part, a in t.arrays().items()}
    at = 0
    for name in sorted(arrays, key=lambda name: arrays[name][0] == "U8"):
        dtype, shape, raw = arrays[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(raw)]}
        payload.append(raw)
        at += len(raw)
    described = {f"t{i}": t.description() for i, t in enumerate(tensors)}
    header["__metadata__"] = {"rbe": json.dumps({"version": 2, "config": {}, "tensors": described})}
    text = json.dumps(header)
    return header_file(text + " " * (-len(text) % 8)) + b"".join(payload)


def empty_rows(rows: int, entries: int) -> Sparse:
    """Rows without an entry, 2 bytes each."""
    arrays = {
        "value": ("F16", [entries], bytes(2 * entries)),
        "index": ("U8", [entries], bytes(entries)),
        "count": ("U16", [rows], bytes(2 * rows)),
    }
    return Sparse([rows, 32], "delta", entries, arrays)


def full_bitmap(rows: int, entries: int) -> Sparse:
    arrays = {
        "value": ("F16", [entries], bytes(2 * entries)),
        "index": ("U8", [rows, 4], bytes(4 * rows)),
    }
    return Sparse([rows, 32], "bitmap", entries, arrays)


MOST = 1 << 24  # values of streams that any file may hold
REFUSED: dict[str, Callable[[], bytes]] = {
    "512M zeros": lambda: file_of(Grid(1 << 24, 32, 8)),
    "512M zeros of 2 bits": lambda: file_of(Grid(1 << 24, 32, 8, bits=2)),
    "512M zeros, a byte each": lambda: file_of(Grid(1 << 24, 32, 1)),
    "512M zeros and as many bytes more": lambda: file_of(Grid(1 << 24, 32, 8, more=1 << 29)),
    "512M escaped zeros": lambda: file_of(Grid(1 << 24, 32, 8, rank=255)),
    "long rows": lambda: file_of(Grid(1, 1 << 20, 8), Grid(1 << 13, 1 << 20, 8)),
    "40 tensors of 1M zeros": lambda: file_of(*(Grid(1 << 15, 32, 8) for _ in range(40))),
    "a byte too many": lambda: file_of(Grid(MOST // 32, 32, 8, more=1)),
    "16 MB too many": lambda: file_of(Grid(MOST // 32, 32, 1, more=MOST)),
    "integers that take more bits": lambda: file_of(Grid(MOST // 32, 32, 1, rank=200, bits=2)),
    "escaped integers, and a byte too many": lambda: file_of(Grid(MOST // 32, 32, 1, rank=255, more=1)),
    "escaped tuples, and a byte too many": lambda: file_of(Grid(MOST // 32, 32, 8, rank=255, more=1)),
    "32 bands, and 16 MB too many": lambda: file_of(Grid(MOST // 32, 32, 1, more=MOST, bands=32)),
    "32 bands of long rows": lambda: file_of(Grid(32, 1 << 18, 1, rank=200, bits=2, bands=32)),
    "8,192 classes, 60 times": lambda: file_of(*[Grid(32, 256, 1, bands=32, classes=range(256))] * 60),
    "a good tensor, then a bad one": lambda: file_of(Grid(MOST // 64, 32, 8), Grid(MOST // 64, 32, 8, more=1)),
    "a good tensor, then one of other counts": lambda: file_of(Grid(MOST // 32, 32, 8), empty_rows(32, 1)),
    "rows without entries": lambda: file_of(empty_rows(4 << 20, 1)),
    "rows without entries, twice": lambda: file_of(empty_rows(2 << 20, 0), empty_rows(2 << 20, 1)),
    "a bitmap without a bit": lambda: file_of(full_bitmap(2 << 20, 1)),
    "a claim of 2^40 rows": lambda: file_of(empty_rows(32, 0), Sparse([1 << 40, 32], "delta", 0, {})),
    "a claim of 2^28 full rows": lambda: file_of(Sparse([1 << 27, 32], "full", 32 << 27, {})),
}  # fmt: skip


def test_streams_and_sizes(tmp_path: Path) -> None:
    files = []
    for name, make in REFUSED.items():
        files.append(tmp_path / name)
        files[-1].write_bytes(make())
    check(files, lambda size: 10)


def test_what_streams_may_hold_loads_in_bounded_memory(tmp_path: Path) -> None:
    """16M zeros of 17 kB: 4 MB of codes, and what decoding them takes."""
    file = tmp_path / "a"
    file.write_bytes(file_of(Grid(MOST // 32, 32, 8, bits=2)))
    (reading,) = readings("load_file", [file])
    assert reading.message is None
    assert reading.nbytes < 4 * MOST + (16 << 20)


def test_a_window_larger_than_a_decoder_must_have(tmp_path: Path) -> None:
    file = tmp_path / "a"
    grid = Grid(MOST // 64, 32, 1)
    grid.stream = frame([(0, 32), (0, MOST // 2)])
    file.write_bytes(file_of(grid))
    with pytest.raises(FormatError, match="the frame has a window of 8388640 bytes, more than 8388608"):
        load_file(file)


def test_tensors_that_do_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a"
    file.write_bytes(file_of(Grid(1024, 32, 1)))
    monkeypatch.setattr(memory, "available_bytes", lambda: 100_000)
    with pytest.raises(MemoryError, match=r"takes \d+ bytes of memory to load, 100000 are available"):
        load_file(file)
    monkeypatch.undo()
    load_file(file)


def test_the_limit_of_decoding_is_the_memory_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a"
    file.write_bytes(file_of(empty_rows(1024, 0)))
    monkeypatch.setattr(memory, "total_bytes", lambda: 4 * 1024 * 32)
    load_file(file)
    monkeypatch.setattr(memory, "total_bytes", lambda: 4 * 1024 * 32 - 1)
    with pytest.raises(FormatError, match="decodes to more than the limit of 131071 bytes"):
        load_file(file)
    load_file(file, max_decoded_bytes=4 * 1024 * 32)


def test_checking_a_stream_is_decoding_it(tmp_path: Path) -> None:
    """`check_stream` accepts and refuses what `decompress_columns` does, with the same message."""
    rng = np.random.default_rng(0)
    outcomes = set()
    for rows, cols, bits, zeros in (
        (1, 32, 8, 0),
        (7, 64, 3, 0),
        (33, 32, 8, 0),
        (50, 96, 5, 0),
        (900, 64, 4, 600),
    ):
        half = 1 << (bits - 1)
        q = np.clip(np.rint(rng.normal(0, half / 3, (rows, cols))), -half, half - 1).astype(np.int8)
        q[:, ::3] = 0
        q[:zeros] = 0
        stream, bands = entropy.compress_integers(q)
        assert (bands > 1) == (zeros > 0)
        entropy.check_stream(stream, rows, cols, bits, bands)
        content = zstandard.ZstdDecompressor().decompress(stream.data)
        for _ in range(300):
            damaged = bytearray(content)
            for _ in range(rng.integers(1, 4)):
                head = bands * cols + (rows if bands > 1 else 0)
                at = int(rng.integers(head) if rng.random() < 0.2 else rng.integers(len(damaged)))
                damaged[at] = rng.choice([0, 1, 7, 127, 200, 254, 255])
            if rng.random() < 0.3:
                damaged = damaged[: int(rng.integers(1, len(damaged)))] + bytes(int(rng.integers(4)))
            frame = np.frombuffer(zstandard.compress(bytes(damaged)), np.uint8)
            messages = []
            for function in (entropy.check_stream, entropy.decompress_columns):
                try:
                    function(frame, rows, cols, bits, bands)
                    messages.append("")
                except entropy.StreamError as error:
                    messages.append(str(error))
            # an integer that a rank stands for and a wrong size: which is met first differs
            if not all(" are not of " in m or "follow" in m or "too few" in m for m in messages):
                assert messages[0] == messages[1]
            assert bool(messages[0]) == bool(messages[1])
            outcomes.add(" ".join(word for word in messages[1].split() if not word.strip("-").isdecimal()))
    assert len(outcomes) >= 6, outcomes

"""Files: round trips to the bit, a second reader made from FORMAT.md alone, golden bytes, atomic writes."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import struct
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import zstandard
from safetensors import safe_open

from rbe_gpu import DenseCodes, GridCodes, RBEMatrix, RBEVectors, SparseCodes, compress, reference
from rbe_gpu.codecs import entropy, packing
from rbe_gpu.codecs.entropy import Stream
from rbe_gpu.container import FormatError, Writer, describe, from_bytes, load_file, save_file, to_bytes
from rbe_gpu.mapped import MappedFile
from tests import real
from tests.compressed import gridded

NAME = "encoder.layer.2.attention.self.key.weight"
WORDS = "embeddings.word_embeddings.weight"


def small(rows: int = 70, cols: int = 100) -> np.ndarray:
    return np.ascontiguousarray(real.weight(NAME)[:rows, :cols])


# one of every codec, index, transform, block size, kind and basis
ENCODINGS: dict[str, dict[str, Any]] = {
    **{f"dense-int{b}": {"codes": f"dense-int{b}"} for b in range(2, 13)},
    **{f"sparse-int{b}-bitmap": {"codes": f"sparse-int{b}", "density": 0.4} for b in range(1, 9)},
    "sparse-f16-full": {"codes": "sparse-f16"},
    "sparse-f32-bitmap": {"codes": "sparse-f32", "density": 0.3},
    "sparse-f16-delta": {"codes": "sparse-f16", "density": 0.03},
    "sparse-int4-delta": {"codes": "sparse-int4", "density": 0.05, "block": 32},
    "sparse-int5-full": {"codes": "sparse-int5", "block": 128},
    "hadamard": {"codes": "dense-int5", "transform": "hadamard"},
    "haar": {"codes": "dense-int6", "transform": "dwt-haar"},
    "db2-basis": {"codes": "dense-int6", "transform": "dwt-db2", "basis": True, "block": 32},
    "bior": {"codes": "dense-int8", "transform": "dwt-bior3.1"},
    "none-128": {"codes": "dense-int8", "transform": "none", "block": 128, "basis": True},
    "dct-basis": {"codes": "sparse-int3", "density": 0.2, "basis": True},
    "vectors": {"codes": "dense-int5", "kind": "vectors"},
    "vectors-basis": {
        "codes": "sparse-int6",
        "density": 0.06,
        "kind": "vectors",
        "basis": True,
        "transform": "dwt",
    },
    **{f"grid-int{b}": {"grid": b} for b in range(2, 9)},
    "grid-basis": {"grid": 4, "basis": True, "block": 32, "transform": "dwt-bior3.1"},
    "grid-equal-rows": {"grid": 4, "row_steps": False},
    "grid-vectors": {"grid": 5, "kind": "vectors", "block": 128, "shrink": 0.0},
}


def encoded(case: str) -> Any:
    make = gridded if "grid" in ENCODINGS[case] else compress
    return make(small(), **{"basis": False, **ENCODINGS[case]})


def same(a: Any, b: Any) -> None:
    """Equal to the bit, attributes included."""
    if isinstance(a, np.ndarray):
        assert isinstance(b, np.ndarray)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()
        return
    assert type(a) is type(b)
    for name in ("shape", "block", "transform", "gain"):
        assert getattr(a, name) == getattr(b, name)
        assert type(getattr(a, name)) is type(getattr(b, name))
    assert type(a.codes) is type(b.codes)
    assert a.arrays.keys() == b.arrays.keys()
    for name in a.arrays:
        same(a.arrays[name], b.arrays[name])
    plain = {
        DenseCodes: ("bits", "group"),
        GridCodes: ("bits", "shrink"),
        SparseCodes: ("value_kind", "index_kind", "group", "dead_zone"),
    }
    for name in plain[type(a.codes)]:
        assert getattr(a.codes, name) == getattr(b.codes, name)
    if isinstance(a.codes, SparseCodes):
        same(a.codes.row_start, b.codes.row_start)
    same(a.codes.value, b.codes.value)
    if isinstance(a.codes, GridCodes):
        same(a.codes.row_scale, b.codes.row_scale)


# --- round trips --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ENCODINGS)
def test_round_trip(tmp_path: Path, case: str) -> None:
    value = encoded(case)
    save_file(tmp_path / "a", {"w": value}, {"answer": [1, 2.5, None, "ä", {"deep": True}]})
    tensors, config = load_file(tmp_path / "a")
    assert list(tensors) == ["w"]
    same(value, tensors["w"])
    assert config == {"answer": [1, 2.5, None, "ä", {"deep": True}]}


def test_the_index_kinds_are_what_their_names_say() -> None:
    for case in ENCODINGS:
        codes = encoded(case).codes
        kind = case.rpartition("-")[2]
        if kind in ("full", "bitmap", "delta"):
            assert codes.index_kind == kind


DENSE_DTYPES = (
    "float64",
    "float32",
    "float16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint64",
    "uint32",
    "uint16",
    "uint8",
    "bool",
)


def test_dense_tensors_keep_their_bits(tmp_path: Path) -> None:
    w = small(5, 7)
    tensors: dict[str, Any] = {
        name: (
            w > 0 if name == "bool" else (w * 100 if np.dtype(name).kind in "f" else np.abs(w * 100))
        ).astype(name)
        for name in DENSE_DTYPES
    }
    tensors["bfloat16"] = w.astype(ml_dtypes.bfloat16)
    tensors["odd bits"] = np.array([0x7FC1, 0xFF80, 0x0001], np.uint16).view(
        ml_dtypes.bfloat16
    )  # NaN, -Inf, tiny
    tensors["nan"] = np.array([0x7FA00001], np.uint32).view(np.float32)
    tensors["scalar"] = np.array(w[0, 0])
    tensors["empty"] = np.empty((0, 3), np.float16)
    tensors["strided"] = w[::2, ::3]
    tensors["Fortran"] = np.asfortranarray(w)
    tensors["ünïcode.\n"] = w
    save_file(tmp_path / "a", tensors)
    loaded, config = load_file(tmp_path / "a")
    assert config == {}
    assert loaded.keys() == tensors.keys()
    for name, a in tensors.items():
        same(np.ascontiguousarray(a).reshape(a.shape), loaded[name])
        assert loaded[name].flags.c_contiguous
        assert loaded[name].flags.aligned


def test_empty_file_of_tensors(tmp_path: Path) -> None:
    save_file(tmp_path / "a", {})
    assert load_file(tmp_path / "a") == ({}, {})


def test_a_row_without_entries_and_a_matrix_without_any(tmp_path: Path) -> None:
    zeros = compress(np.zeros((40, 40), np.float32), codes="sparse-f16", density=0.1, block=32, basis=False)
    start = np.zeros(65, np.int64)
    nothing = SparseCodes("f16", "delta", 0, np.empty(0, np.float16), None, np.empty(0, np.uint8),
                          np.zeros(64, np.uint16), 0.0, start)  # fmt: skip
    nothing_int = SparseCodes("int4", "bitmap", 64, np.empty(0, np.uint8), np.empty(0, np.float16),
                              np.zeros((64, 8), np.uint8), None, 0.5, start)  # fmt: skip
    tensors = {
        "zeros": zeros,
        "none": RBEMatrix((64, 64), 64, "dct", 1.0, None, nothing),
        "none int": RBEMatrix((64, 64), 64, "dct", 1.0, None, nothing_int),
    }
    save_file(tmp_path / "a", tensors)
    for name, value in load_file(tmp_path / "a")[0].items():
        same(tensors[name], value)
        assert not reference.decode(value).any()


def test_loaded_arrays_are_private_views(tmp_path: Path) -> None:
    save_file(tmp_path / "a", {"w": encoded("dense-int4"), "b": small()})
    before = (tmp_path / "a").read_bytes()
    first, second = load_file(tmp_path / "a")[0], load_file(tmp_path / "a")[0]
    assert not first["b"].flags.owndata
    first["b"][:] = 7
    first["w"].codes.value[:] = 0
    same(small(), second["b"])
    same(encoded("dense-int4"), second["w"])
    assert (tmp_path / "a").read_bytes() == before


@pytest.mark.skipif(sys.platform != "linux", reason="limits the descriptors of a process")
def test_a_file_for_which_no_descriptor_is_left_is_named(tmp_path: Path) -> None:
    import resource

    path, held = tmp_path / "w.rbe.safetensors", []
    save_file(path, {"a": np.ones(3, np.float32)})
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limits[1]))
    try:
        with pytest.raises(OSError, match=r"Too many open files.*w\.rbe\.safetensors"):
            held.extend(MappedFile(path) for _ in range(100))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_replaced_file_leaves_open_tensors_alone(tmp_path: Path) -> None:
    save_file(tmp_path / "a", {"b": small()})
    loaded, _ = load_file(tmp_path / "a")
    save_file(tmp_path / "a", {"b": np.zeros(3, np.float32)})
    same(small(), loaded["b"])


# --- any safetensors tool reads it --------------------------------------------------------------------


def test_the_safetensors_library_lists_it(tmp_path: Path) -> None:
    tensors = {case: encoded(case) for case in ENCODINGS}
    save_file(tmp_path / "a", {**tensors, "bias": small(1, 9)[0], "half": small().astype(ml_dtypes.bfloat16)})
    with safe_open(tmp_path / "a", framework="numpy") as f:
        assert json.loads(f.metadata()["rbe"])["version"] == 2
        expected = {f"{case}.{part}" for case, value in tensors.items() for part in value.arrays}
        assert set(f.keys()) == expected | {"bias", "half"}
        for case, value in tensors.items():
            for part, a in value.arrays.items():
                same(a, f.get_tensor(f"{case}.{part}"))


def test_every_array_is_aligned(tmp_path: Path) -> None:
    tensors = {
        f"t{n}": np.zeros(n, dtype) for n, dtype in enumerate(("u1", "f8", "i2", "f4", "u1", "i8", "f2"), 1)
    }
    save_file(tmp_path / "a", tensors)
    raw = (tmp_path / "a").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    assert length % 8 == 0
    entries = json.loads(raw[8 : 8 + length])
    for name, a in tensors.items():
        assert (8 + length + entries[name]["data_offsets"][0]) % a.itemsize == 0


# --- a second reader, from FORMAT.md and nothing else -------------------------------------------------


class SecondReader:
    """FORMAT.md, sections 1 to 6, with struct, json and numpy."""

    def __init__(self, path: Path) -> None:
        raw = path.read_bytes()
        (n,) = struct.unpack("<Q", raw[:8])
        self.header = json.loads(raw[8 : 8 + n].decode("utf-8"))
        self.payload = raw[8 + n :]
        self.description = json.loads(self.header["__metadata__"]["rbe"])
        assert self.description["version"] == 2

    def array(self, name: str) -> np.ndarray:
        entry = self.header[name]
        dtype = {"F32": "<f4", "F16": "<f2", "U8": "u1", "U16": "<u2", "U32": "<u4"}[entry["dtype"]]
        begin, end = entry["data_offsets"]
        return np.frombuffer(self.payload[begin:end], dtype).reshape(entry["shape"])

    def decode(self, name: str) -> np.ndarray:
        t = self.description["tensors"][name]
        if t["kind"] == "dense":
            return self.array(name)
        size = t["block"]
        matrix = t["kind"] == "matrix"
        rows, cols = t["shape"] if len(t["shape"]) == 2 else (1, t["shape"][0])
        tall = size if matrix else 1
        rows_pad, cols_pad = (rows + tall - 1) // tall * tall, (cols + size - 1) // size * size
        codes = t["codes"]
        read = {"dense": self.dense, "sparse": self.sparse, "grid": self.grid}[codes["kind"]]
        c = read(name, codes, rows_pad, cols_pad)
        s = synthesis(t["transform"], size)
        w = np.zeros((rows_pad, cols_pad))
        for i in range(rows_pad // tall):
            for j in range(cols_pad // size):
                at = np.s_[i * tall : (i + 1) * tall, j * size : (j + 1) * size]
                tile = s @ c[at] @ s.T if matrix else c[at] @ s.T
                if t["basis"]:
                    p = self.array(name + ".basis")[i, j].astype(float)
                    tile = tile + sum(pk * f for pk, f in zip(p, functions(matrix, size), strict=True))
                w[at] = t["gain"] * tile
        return w[:rows, :cols].reshape(t["shape"])

    def dense(self, name: str, codes: dict[str, Any], rows_pad: int, cols_pad: int) -> np.ndarray:
        bits, group = codes["bits"], codes["group"]
        packed, scale = self.array(name + ".value"), self.array(name + ".scale")
        c = np.zeros((rows_pad, cols_pad))
        for r in range(rows_pad):
            u = unpack(packed[r], bits)
            for col in range(cols_pad):
                c[r, col] = float(scale[r, col // group]) * (u[col] - (2**bits - 1) / 2)
        return c

    def sparse(self, name: str, codes: dict[str, Any], rows_pad: int, cols_pad: int) -> np.ndarray:
        value = self.array(name + ".value")
        entries = codes["entries"]
        if codes["value_kind"] in ("f32", "f16"):
            values = [float(v) for v in value]
        else:
            bits = int(codes["value_kind"][3:])
            half, z = 2 ** (bits - 1), codes["dead_zone"]
            scale = self.array(name + ".scale")
            values = []
            for e, u in enumerate(unpack(value, bits)[:entries]):
                step = float(scale[e // codes["group"]])
                values.append(
                    z + step * (u - half + 0.5) if u >= half else -(z + step * (half - 1 - u + 0.5))
                )
        assert len(values) == entries
        c = np.zeros((rows_pad, cols_pad))
        e = 0
        for r in range(rows_pad):
            if codes["index_kind"] == "full":
                columns = list(range(cols_pad))
            elif codes["index_kind"] == "bitmap":
                index = self.array(name + ".index")
                columns = [col for col in range(cols_pad) if index[r, col // 8] >> (col % 8) & 1]
            else:
                columns, at = [], -1
                for k in range(int(self.array(name + ".count")[r])):
                    at += int(self.array(name + ".index")[e + k]) + 1
                    columns.append(at)
            for col in columns:
                c[r, col] = values[e]
                e += 1
        assert e == entries
        return c

    def grid(self, name: str, codes: dict[str, Any], rows_pad: int, cols_pad: int) -> np.ndarray:
        frame = list(zstandard.ZstdDecompressor().decompress(self.array(name + ".stream").tobytes()))
        bands, at = [0] * rows_pad, 0
        if codes["bands"] > 1:
            bands, at = frame[:rows_pad], rows_pad
            assert set(bands) == set(range(codes["bands"]))
        classes = [frame[at + b * cols_pad : at + (b + 1) * cols_pad] for b in range(codes["bands"])]
        at += codes["bands"] * cols_pad
        filled: list[
            tuple[list[int], list[int], list[Any]]
        ] = []  # rows of a band, columns of a class, its tuples
        escaped = []
        for band in range(codes["bands"]):
            rows = [r for r in range(rows_pad) if bands[r] == band]
            for g in sorted(set(classes[band])):
                n = g % 8 + 1
                columns = [c for c in range(cols_pad) if classes[band][c] == g]
                count = (len(columns) * len(rows) + n - 1) // n
                table = [*tuples(n), None]
                filled.append((rows, columns, [table[byte] for byte in frame[at : at + count]]))
                escaped += [(filled[-1][2], k, n) for k in range(count) if filled[-1][2][k] is None]
                at += count
        for run, k, n in escaped:
            run[k] = tuple(byte - 128 for byte in frame[at : at + n])
            at += n
        assert at == len(frame)
        c = np.zeros((rows_pad, cols_pad))
        col_scale = self.array(name + ".col_scale")
        row_scale = self.array(name + ".row_scale") if codes["row_scale"] else [1.0] * rows_pad
        half = 2 ** (codes["bits"] - 1)
        for rows, columns, run in filled:
            integers = iter([q for group in run for q in group])
            for col in columns:
                for r in rows:
                    q = next(integers)
                    assert -half <= q < half
                    sign = (q > 0) - (q < 0)
                    c[r, col] = float(row_scale[r]) * float(col_scale[col]) * (q - sign * codes["shrink"])
        return c


@functools.cache
def tuples(n: int) -> list[tuple[int, ...]]:
    """By growing shells of equal sums of squares, so that no bound on the integers is assumed."""
    found: list[tuple[int, ...]] = []
    squares = 0
    while len(found) < 255:
        found += sorted(shell(n, squares))
        squares += 1
    return found[:255]


def shell(n: int, squares: int) -> list[tuple[int, ...]]:
    """The n-tuples of integers whose squares add up to this."""
    if n == 0:
        return [()] if squares == 0 else []
    reach = math.isqrt(squares)
    return [(x, *rest) for x in range(-reach, reach + 1) for rest in shell(n - 1, squares - x * x)]


def unpack(packed: np.ndarray, bits: int) -> list[int]:
    out: list[int] = []
    data = [int(b) for b in packed]
    for first in range(0, len(data), 4 * bits):
        run, u, start = data[first : first + 4 * bits], [0] * 32, 0
        for w in (8, 4, 2, 1):
            if bits & w:
                for f in range(8 // w):
                    for k in range(4 * w):
                        u[k + 4 * w * f] = u[k + 4 * w * f] << w | run[start + k] >> f * w & 2**w - 1
                start += 4 * w
        out += u
    return out


def synthesis(name: str, size: int) -> np.ndarray:
    if name == "none":
        return np.eye(size)
    if name == "dct":
        i, k = np.mgrid[:size, :size]
        s = np.sqrt(2 / size) * np.cos(np.pi * (2 * i + 1) * k / (2 * size))
        s[:, 0] = np.sqrt(1 / size)
        return s
    if name == "hadamard":
        signs = [[(-1) ** bin(i & k).count("1") for k in range(size)] for i in range(size)]
        return np.array(signs) / size**0.5
    two, three = 2**0.5, 3**0.5
    h = {
        "dwt-haar": np.array([1, 1]) / two,
        "dwt-db2": np.array([1 + three, 3 + three, 3 - three, 1 - three]) / (4 * two),
        "dwt-bior3.1": np.array([1, 3, 3, 1]) * two / 8,
    }[name]
    g = {
        "dwt-haar": np.array([1, -1]) / two,
        "dwt-db2": np.array([h[-1], -h[-2], h[1], -h[0]]),
        "dwt-bior3.1": np.array([-1, -3, 3, 1]) * two / 4,
    }[name]
    s = np.eye(size)
    length = 8
    while length <= size:
        t = np.zeros((length, length))
        for k in range(length // 2):
            for n in range(len(h)):
                t[(2 * k + n) % length, k] += h[n]
                t[(2 * k + n) % length, length // 2 + k] += g[n]
        s[:length] = t @ s[:length]
        length *= 2
    return s


def functions(matrix: bool, size: int) -> list[np.ndarray]:
    t = 2 * np.arange(size) / (size - 1) - 1
    if not matrix:
        return [np.ones(size), abs(t), t**2, np.cos(np.pi * t), np.cos(2 * np.pi * t)]
    x, y = t[None, :] + 0 * t[:, None], t[:, None] + 0 * t[None, :]
    d = np.sqrt(x**2 + y**2)
    cos, pi = np.cos, np.pi
    return [
        d**0,
        d,
        d**2,
        cos(pi * x),
        cos(pi * y),
        cos(2 * pi * x),
        cos(2 * pi * y),
        cos(pi * x) * cos(pi * y),
    ]


@pytest.mark.parametrize("case", ENCODINGS)
def test_a_reader_written_from_the_page_agrees(tmp_path: Path, case: str) -> None:
    value = encoded(case)
    save_file(tmp_path / "a", {"w": value, "b": small()})
    reader = SecondReader(tmp_path / "a")
    expected = reference.decode(value)
    # float64 on both sides, sums of 128 terms in different orders
    np.testing.assert_allclose(
        reader.decode("w"), expected, rtol=0, atol=1e-13 * np.abs(expected).max() * 128
    )
    # decode in float32: rounding of sums over a tile
    np.testing.assert_allclose(value.decode(), expected, rtol=0, atol=2e-6 * np.abs(expected).max() * 16)
    same(small(), reader.decode("b"))


def test_one_vector_agrees_too(tmp_path: Path) -> None:
    value = compress(np.ascontiguousarray(real.weight(WORDS)[100, :300]), codes="dense-int7", basis=True)
    save_file(tmp_path / "a", {"v": value})
    decoded = SecondReader(tmp_path / "a").decode("v")
    assert decoded.shape == (300,)
    np.testing.assert_allclose(decoded, reference.decode(value), rtol=0, atol=1e-13)


# --- golden bytes -------------------------------------------------------------------------------------


def raw_frame(*parts: np.ndarray) -> np.ndarray:
    """A zstd frame of one block that is stored as it stands: these bytes depend on no version of zstd."""
    content = np.concatenate(parts).tobytes()
    head = struct.pack("<IBH", 0xFD2FB528, 0x60, len(content) - 256)  # one segment, its size in 2 bytes
    block = (len(content) << 3 | 1).to_bytes(3, "little")  # the last one, raw
    return np.frombuffer(head + block + content, np.uint8)


def grid_bytes(q: np.ndarray) -> np.ndarray:
    """All columns in class 0, a byte for each integer: 0, -1, 1, -2, 2, ..., and -16 escaped."""
    flat = q.T.reshape(-1).astype(int)
    ranks = np.where(flat > 0, 2 * flat, np.where(flat < 0, -2 * flat - 1, 0))
    ranks[flat == -16] = 255
    return np.concatenate([ranks, np.full((flat == -16).sum(), 128 - 16)]).astype(np.uint8)


def golden_tensors() -> dict[str, Any]:
    """Codes made here, by exact arithmetic, so that a better encoder does not change these bytes."""
    w = np.ascontiguousarray(real.weight(NAME)[:32, :64])
    scale = (np.abs(w).reshape(32, 2, 32).max(axis=2) / np.float32(7.5)).astype(np.float16)
    step = np.repeat(scale.astype(np.float32), 32, axis=1)
    u = np.clip(np.floor(w / step + np.float32(8)), 0, 15).astype(np.uint8)
    dense = DenseCodes(4, 32, packing.pack(u, 4), scale)
    keep = np.abs(w) > np.float32(0.0625)
    count = keep.sum(axis=1)
    start = np.concatenate([[0], np.cumsum(count)]).astype(np.int64)
    columns = [np.flatnonzero(row) for row in keep]
    skipped = np.concatenate([np.diff(c, prepend=-1) - 1 for c in columns]).astype(np.uint8)
    delta = SparseCodes(
        "f16", "delta", 0, w[keep].astype(np.float16), None, skipped, count.astype(np.uint16), 0.0, start
    )
    bits = packing.pack((w[keep] > 0).astype(np.uint8) * 4 + 1, 3)
    groups = np.full(-(-int(start[-1]) // 32), 0.015625, np.float16)
    bitmap = SparseCodes(
        "int3", "bitmap", 32, bits, groups, np.packbits(keep, axis=1, bitorder="little"), None, 0.0625, start
    )
    q = np.clip(np.rint(w * 64), -16, 15).astype(np.int8)
    grid = GridCodes(
        5, 0.0625, packing.pack((q + 16).astype(np.uint8), 5), np.full(32, 0.5, np.float16),
        np.full(64, 0.03125, np.float16), Stream(raw_frame(np.zeros(64, np.uint8), grid_bytes(q)), 1),
    )  # fmt: skip
    q = np.maximum(q, -15)
    band = (np.arange(32) % 3 == 0).astype(np.uint8)
    runs = [grid_bytes(q[band == b]) for b in (0, 1)]
    banded = GridCodes(
        5, 0.0625, packing.pack((q + 16).astype(np.uint8), 5), np.full(32, 0.5, np.float16),
        np.full(64, 0.03125, np.float16), Stream(raw_frame(band, np.zeros(128, np.uint8), *runs), 2),
    )  # fmt: skip
    basis = np.ascontiguousarray(w[:32, :10].reshape(32, 2, 5)).astype(np.float16)
    return {
        "layer.a": RBEMatrix((32, 64), 32, "none", 1.0, None, dense),
        "layer.b": RBEMatrix((30, 61), 32, "dct", 0.5, None, delta),
        "layer.c": RBEVectors((32, 64), 32, "dwt-db2", 2.0, basis, bitmap),
        "layer.g": RBEMatrix((32, 61), 32, "none", 1.0, None, grid),
        "layer.i": RBEMatrix((32, 61), 32, "none", 1.0, None, banded),
        "layer.bias": w[0],
        "layer.half": w[1].astype(ml_dtypes.bfloat16),
    }


GOLDEN_SHA256 = "4ce179686ebfab1d15df9ea7c36e791e04f845f4c940373841d1b73fa98ff866"
GOLDEN_START = '\xc0\x09\x00\x00\x00\x00\x00\x00{"__metadata__":{"rbe":"{\\"config\\":{\\"m'


def test_golden_bytes(tmp_path: Path) -> None:
    save_file(tmp_path / "a", golden_tensors(), {"model_type": "example"})
    raw = (tmp_path / "a").read_bytes()
    assert raw[:48].decode("latin1") == GOLDEN_START  # for a person to see what changed
    assert hashlib.sha256(raw).hexdigest() == GOLDEN_SHA256


def test_a_file_of_version_1(tmp_path: Path) -> None:
    """The description had no bands: there was one."""
    written = {name: golden_tensors()[name] for name in ("layer.a", "layer.g")}
    save_file(tmp_path / "a", written, {"n": 1})
    raw = (tmp_path / "a").read_bytes()
    assert raw.count(b'\\"bands\\":1,') == 1
    assert raw.count(b'\\"version\\":2') == 1
    raw = raw.replace(b'\\"version\\":2', b'\\"version\\":1').replace(b'\\"bands\\":1,', b" " * 12)
    (tmp_path / "b").write_bytes(raw)
    assert describe(tmp_path / "b").version == 1
    tensors, config = load_file(tmp_path / "b")
    assert config == {"n": 1}
    for name, value in written.items():
        same(value, tensors[name])
    save_file(tmp_path / "c", tensors, config)
    assert (tmp_path / "c").read_bytes() == (tmp_path / "a").read_bytes()


def test_rows_in_bands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of three kinds, mixed: the file is smaller than without bands, and says the same."""
    rng = np.random.default_rng(0)
    spread = rng.permutation(np.repeat([0.0, 0.5, 3.0], 400))
    q = np.rint(rng.normal(size=(1200, 64)) * spread[:, None]).astype(np.int8)
    codes = GridCodes.from_integers(q, np.ones(1200), np.ones(64))
    assert codes.stream.bands >= 3
    with monkeypatch.context() as patch:
        patch.setattr(entropy, "_bands", lambda q: np.zeros(len(q), np.uint8))
        assert codes.stream.data.size < 0.85 * entropy.compress_integers(q).data.size
    save_file(tmp_path / "a", {"w": RBEVectors((1200, 64), 32, "none", 1.0, None, codes)})
    np.testing.assert_array_equal(load_file(tmp_path / "a")[0]["w"].codes.integers(), q)
    np.testing.assert_array_equal(SecondReader(tmp_path / "a").decode("w"), q)


@pytest.mark.parametrize("rows", [1001, 2009, 4030])
def test_loaded_codes_take_the_memory_of_codes_that_are_made(rows: int) -> None:
    """The sample that chooses their width is of all rows alike, though rows of a stream are sorted by spread.

    Where two widths cost about the same, either may be chosen: of 4,030 rows 4 and 5 bits differ by 7% in memory.
    """
    rng = np.random.default_rng(0)
    spread = np.exp(rng.normal(0, 1.2, rows))[:, None]
    q = np.clip(np.rint(rng.normal(0, 1, (rows, 768)) * spread), -127, 127).astype(np.int8)
    made = GridCodes.from_integers(q, np.ones(rows), np.ones(768))
    matrix = RBEVectors(q.shape, 32, "none", 1.0, None, made)
    loaded = from_bytes(to_bytes({"w": matrix}), "w")[0]["w"].codes
    assert made.stream.bands > 8
    assert abs(loaded.resident_nbytes / made.resident_nbytes - 1) < 0.1


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    tensors = golden_tensors()
    save_file(tmp_path / "a", tensors, {"x": 1, "y": [2]})
    save_file(tmp_path / "b", dict(reversed(tensors.items())), {"y": [2], "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    loaded, config = load_file(tmp_path / "a")
    save_file(tmp_path / "c", loaded, config)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()


# --- the writer ---------------------------------------------------------------------------------------


def test_nothing_is_left_after_an_exception(tmp_path: Path) -> None:
    def broken() -> None:
        with Writer(tmp_path / "a") as writer:
            writer.add("w", encoded("dense-int4"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken()
    assert os.listdir(tmp_path) == []
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        broken()
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_nothing_is_left_when_the_end_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space"):
        save_file(tmp_path / "a", {"w": small()})
    assert os.listdir(tmp_path) == []


def test_a_killed_writer_leaves_no_result(tmp_path: Path) -> None:
    script = (
        "import sys, time, numpy as np\nfrom rbe_gpu.container import Writer\n"
        "with Writer(sys.argv[1]) as w:\n    w.add('a', np.zeros(1000, np.float32))\n"
        "    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "a"], stdout=subprocess.PIPE, env=env
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.kill()
    process.wait()
    process.stdout.close()
    assert os.listdir(tmp_path) == []


def test_where_a_file_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; make it first"):
        save_file(tmp_path / "no" / "a", {})
    with pytest.raises(IsADirectoryError, match="is a folder"):
        save_file(tmp_path, {})


def test_names_and_values_the_writer_refuses(tmp_path: Path) -> None:
    value = encoded("dense-int4")
    with Writer(tmp_path / "a") as writer:
        writer.add("w", value)
        with pytest.raises(ValueError, match="there already"):
            writer.add("w", value)
        with pytest.raises(ValueError, match="there already"):
            writer.add("w.scale", small())
        writer.add("x.index", small())
        for name in ("", "__metadata__", 3):
            with pytest.raises(ValueError, match="no name"):
                writer.add(name, small())  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="surrogate"):
            writer.add("\ud800", small())
        for wrong in (small().astype(complex), small().astype(">f4"), small().astype(object)):
            with pytest.raises(TypeError, match="dtype"):
                writer.add("y", wrong)
        with pytest.raises(TypeError, match="list"):
            writer.add("y", [1.0])  # type: ignore[arg-type]
    assert set(load_file(tmp_path / "a")[0]) == {"w", "x.index"}
    with pytest.raises(ValueError, match="not open"):
        writer.add("z", small())


def _levels(count: int) -> Any:
    """A list in a dict of a subclass, and so on."""
    value: Any = 0
    for _ in range(count // 2):
        value = [OrderedDict(a=value)]
    return value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([OrderedDict(b="\ud800")], "half of a surrogate pair"),
        ([OrderedDict({"\ud800": 1})], "half of a surrogate pair"),
        ([type("Text", (str,), {})("\ud800")], "half of a surrogate pair"),
        ([type("List", (list,), {})(["\ud800"])], "half of a surrogate pair"),
        (("\ud800",), "half of a surrogate pair"),
        ([_levels(62)], "nested more than 64 deep"),
        (_levels(64), "nested more than 64 deep"),
    ],
)
def test_configs_that_no_reader_loads(value: Any, message: str, tmp_path: Path) -> None:
    """Are not written, whatever their types; and the deepest that one loads is."""
    with pytest.raises(FormatError, match=message):
        save_file(tmp_path / "a", {"w": small()}, {"a": value})
    assert os.listdir(tmp_path) == []
    config = {"a": _levels(62)}  # one more is the config's own, and one that of what holds it in the file
    save_file(tmp_path / "a", {"w": small()}, config)
    assert load_file(tmp_path / "a")[1] == config


def test_the_writer_keeps_the_rules_of_the_reader(tmp_path: Path) -> None:
    good = encoded("dense-int4")
    scale = good.codes.scale.copy()
    scale[3, 1] = np.nan
    bad = RBEMatrix(good.shape, 64, "dct", good.gain, None, DenseCodes(4, 64, good.codes.value, scale))
    with pytest.raises(FormatError, match=r'tensor "w": scale holds NaN or Inf'):
        save_file(tmp_path / "a", {"w": bad})
    bad = RBEMatrix(good.shape, 64, "dct", 0.3, None, good.codes)
    with pytest.raises(FormatError, match="power of two"):
        save_file(tmp_path / "a", {"w": bad})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("config", [{"x": float("nan")}, {"x": {1, 2}}, {"x": b"bytes"}, {"x": "\udc80"}])
def test_a_config_that_is_not_json(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="config"):
        save_file(tmp_path / "a", {}, config)
    assert os.listdir(tmp_path) == []


def test_a_config_too_deep(tmp_path: Path) -> None:
    deep: Any = 1
    for _ in range(60):
        deep = [deep]
    save_file(tmp_path / "a", {}, {"x": deep})
    assert load_file(tmp_path / "a")[1] == {"x": deep}
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(FormatError, match="nested"):
        save_file(tmp_path / "b", {}, {"x": deep})
    while isinstance(deep, list):  # a chain this long must not be freed recursively
        deep = deep[0]


def test_nbytes_is_the_size_of_the_file(tmp_path: Path) -> None:
    with Writer(tmp_path / "a") as writer:
        writer.config = {"a": 1}
        writer.add("w", encoded("sparse-int4-delta"))
        writer.add("b", small())
        expected = writer.nbytes
    assert (tmp_path / "a").stat().st_size == expected


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    """200 MB written, 20 MB at a time: the peak stays near one tensor."""
    script = (
        "import resource, sys, numpy as np\nfrom rbe_gpu.container import Writer\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nstart = peak()\n"
        "with Writer(sys.argv[1]) as w:\n"
        "    for i in range(10): w.add(f't{i}', np.full(5_000_000, i, np.float32))\n"
        "print((peak() - start) // 1024)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    run = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "a"], capture_output=True, text=True, env=env, check=True
    )
    assert int(run.stdout) < 60  # MiB: two tensors and a copy buffer
    assert (tmp_path / "a").stat().st_size > 200_000_000


def test_readers_see_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save_file(path, {"w": np.zeros(100_000, np.float32)})
    stop = threading.Event()

    def write() -> None:
        k = 0
        while not stop.is_set():
            k += 1
            save_file(path, {"w": np.full(100_000, k % 2, np.float32)})

    writer = threading.Thread(target=write)
    writer.start()
    try:
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            w = load_file(path)[0]["w"]
            assert w.min() == w.max()
    finally:
        stop.set()
        writer.join()


# --- describe -----------------------------------------------------------------------------------------


def test_describe(tmp_path: Path) -> None:
    value = encoded("db2-basis")
    ids = np.arange(4)
    save_file(
        tmp_path / "a", {"w": value, "b": small().astype(np.float16), "ids": ids}, {"model_type": "bert"}
    )
    info = describe(tmp_path / "a")
    assert info.file_bytes == (tmp_path / "a").stat().st_size
    assert info.version == 2
    assert info.config == {"model_type": "bert"}
    assert info.header_bytes + sum(t.nbytes for t in info.tensors) == info.file_bytes
    rows = {t.name: t for t in info.tensors}
    w = rows["w"]
    assert (w.kind, w.shape, w.codes, w.block, w.transform, w.basis) == (
        "matrix",
        (70, 100),
        "dense-int6",
        32,
        "dwt-db2",
        True,
    )
    assert (w.nbytes, w.dense_bytes) == (value.nbytes, 28000)
    assert w.bits_per_weight == pytest.approx(value.bits_per_weight)
    assert (rows["b"].kind, rows["b"].codes, rows["b"].nbytes, rows["b"].dense_bytes) == (
        "dense",
        "float16",
        14000,
        28000,
    )
    assert rows["ids"].dense_bytes == 0
    assert info.ratio == pytest.approx(56000 / info.file_bytes)


def test_a_large_file_opens_fast(tmp_path: Path) -> None:
    """50 MB of sparse codes over MiniLM's word table, tiled: every index and value is checked."""
    table = real.weight(WORDS)
    part = compress(
        np.ascontiguousarray(table[:2048]), codes="sparse-f16", density=0.1, kind="vectors", basis=False
    )
    bitmap = compress(
        np.ascontiguousarray(table[:2048]), codes="sparse-f16", density=0.3, kind="vectors", basis=False
    )
    assert part.codes.index_kind == "delta"
    assert bitmap.codes.index_kind == "bitmap"
    copies = 64
    tensors = {}
    for name, m in (("delta", part), ("bitmap", bitmap)):
        c = m.codes
        stack = {k: np.concatenate([a] * copies) for k, a in c.arrays.items()}
        row_start = np.concatenate(
            [c.row_start[:-1] + i * c.entries for i in range(copies)] + [[c.entries * copies]]
        )
        codes = SparseCodes(
            "f16", name, 0, stack["value"], None, stack["index"], stack.get("count"), 0.0, row_start
        )
        tensors[name] = RBEVectors((2048 * copies, 384), 64, "dct", m.gain, None, codes)
    save_file(tmp_path / "a", tensors)
    assert (tmp_path / "a").stat().st_size > 50_000_000
    start = time.perf_counter()
    loaded, _ = load_file(tmp_path / "a")
    assert time.perf_counter() - start < 2.0
    same(tensors["delta"].codes.row_start, loaded["delta"].codes.row_start)


def test_bytes_in_memory_are_those_of_a_file(tmp_path: Path) -> None:
    held = {"w": compress(small(), grade="B"), "g": gridded(small(), 4), "b": np.arange(5.0)}
    save_file(tmp_path / "file", held, {"k": 1})
    data = to_bytes(held, {"k": 1})
    assert (tmp_path / "file").read_bytes() == data
    tensors, config = from_bytes(data)
    assert config == {"k": 1}
    assert tensors["b"].flags.writeable
    np.testing.assert_array_equal(tensors["b"], held["b"])
    for name in ("w", "g"):
        np.testing.assert_array_equal(tensors[name].decode(), held[name].decode())
    for bad in (b"", data[:-1], data + b"\0", data.replace(b"grid", b"grit")):
        with pytest.raises(FormatError, match=r"^here: "):
            from_bytes(bad, "here")
    with pytest.raises(FormatError, match=r"^here: "):
        from_bytes(np.zeros(16, np.float32).data, "here")
    with pytest.raises(FormatError, match="max_decoded_bytes"):
        from_bytes(data, max_decoded_bytes=1000)

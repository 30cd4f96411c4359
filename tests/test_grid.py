"""Grid codes: integers to streams and back, every width, and the ops on weights that are stored this way."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

import rbe_gpu as rbe
from rbe_gpu import reference, transforms
from rbe_gpu.codecs import GridCodes, entropy
from rbe_gpu.container import FormatError, describe, load_file, save_file

from . import real
from .compressed import compressed, gridded, original, relative


def codes_of(q: Any) -> GridCodes:
    q = np.asarray(q)
    return GridCodes.from_integers(q, np.ones(q.shape[0]), np.ones(q.shape[1]), 0.125)


def _by_row(stream: entropy.Stream, rows: int, cols: int, bits: int) -> np.ndarray:
    """The integers of a stream, (rows, cols) int8."""
    integers, order = entropy.decompress_columns(stream.data, rows, cols, bits, stream.bands)
    q = np.empty((rows, cols), np.int8)
    q[slice(None) if order is None else order] = integers[:, :rows].T
    return q


def back(codes: GridCodes) -> np.ndarray:
    """The integers, once from the packed form and once from the stream."""
    rows, cols = codes.row_scale.size, codes.col_scale.size
    q = _by_row(codes.stream, rows, cols, codes.bits)
    np.testing.assert_array_equal(q, codes.integers())
    return q


@cache
def real_coefficients() -> np.ndarray:
    """DCT coefficients of a real weight, (384, 1536)."""
    w = real.layer(2, "output.dense.weight").astype(np.float64)
    a = transforms.analysis("dct", 64)
    return np.matmul(a, (w.reshape(-1, 64) @ a.T).reshape(6, 64, 1536)).reshape(384, 1536)


def real_integers(step: float) -> np.ndarray:
    """The coefficients over `step` standard deviations, rounded: (384, 1536) int8."""
    c = real_coefficients()
    return np.clip(np.rint(c / (step * c.std())), -127, 127).astype(np.int8)


def entropy_of(q: np.ndarray) -> float:
    """Bits per integer without classes or context."""
    p = np.unique(q, return_counts=True)[1] / q.size
    return float(-(p * np.log2(p)).sum())


# --- integers and streams -----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(1, 32), (7, 96), (65, 64), (384, 192)])
def test_round_trip(bits: int, shape: tuple[int, int]) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    q = np.clip(real_integers(2.0 ** (3 - bits))[: shape[0], : shape[1]], low, high)
    q[0, 0], q[-1, -1] = low, high
    codes = codes_of(q)
    assert codes.bits == bits
    assert codes.name == f"grid-int{bits}"
    np.testing.assert_array_equal(back(codes), q)


@pytest.mark.parametrize(
    "q",
    [
        np.zeros((64, 64), int),
        np.zeros((1, 32), int),
        np.full((5, 32), -128),
        np.full((64, 64), 127),
        np.eye(64, dtype=int) * -128,
        np.arange(-128, 128).reshape(8, 32),
        np.repeat(np.arange(64)[None], 3, axis=0),  # every column another integer
        np.repeat(np.arange(-64, 64)[:, None], 32, axis=1),  # every column the same
        np.where(np.arange(300 * 32).reshape(300, 32) % 97 == 0, -128, 0),  # rare and large: escaped
    ],
    ids=["zeros", "one row", "lowest", "highest", "diagonal", "all", "columns", "one class", "rare"],
)
def test_round_trip_of_edges(q: np.ndarray) -> None:
    np.testing.assert_array_equal(back(codes_of(q)), q)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int64, np.uint8])
def test_integers_of_any_type(dtype: Any) -> None:
    q = np.abs(real_integers(0.5))[:64, :64].astype(dtype)
    np.testing.assert_array_equal(back(codes_of(q)), q)
    np.testing.assert_array_equal(back(codes_of(np.asfortranarray(q))), q)


def test_zeros_take_next_to_nothing() -> None:
    assert codes_of(np.zeros((4096, 4096), np.int8)).stream.data.size < 500


@pytest.mark.parametrize("n", entropy.LENGTHS)
def test_tuples_are_the_255_first(n: int) -> None:
    """No tuple with a larger integer comes before the last one."""
    table = entropy.tuples(n)
    assert table.shape == (255, n)
    reach = min(int(np.abs(table).max()) + 1, 127)
    every = product(range(-reach, reach + 1), repeat=n)
    first = sorted(every, key=lambda t: (sum(x * x for x in t), t))[:255]
    assert [tuple(map(int, t)) for t in table] == first


@pytest.mark.parametrize("n", entropy.LENGTHS)
def test_tables_that_are_shared_are_read_only(n: int) -> None:
    """All decoders of a process have the same."""
    for table in (entropy.tuples(n), entropy._with_escape(n), entropy._pairs(min(n, 2))):
        assert not table.flags.writeable


@pytest.mark.parametrize("length", entropy.LENGTHS)
def test_every_length_decodes(length: int) -> None:
    """Streams that another writer may make: one class, tuples of this length, with a few escapes."""
    q = np.clip(real_integers(1.5)[:50, :32], -3, 3)
    table = {tuple(map(int, t)): i for i, t in enumerate(entropy.tuples(length))}
    flat = np.append(q.T.reshape(-1), [1] * (-q.size % length))  # what fills the last tuple has no meaning
    body, escaped = bytearray(), bytearray()
    for k in range(0, flat.size, length):
        t = tuple(map(int, flat[k : k + length]))
        rank = table.get(t, 255) if k % 5 else 255
        body.append(rank)
        escaped += bytes(x + 128 for x in t) if rank == 255 else b""
    content = bytes([248 + length - 1]) * 32 + bytes(body) + bytes(escaped)
    stream = np.frombuffer(zstandard.ZstdCompressor().compress(content), np.uint8)
    np.testing.assert_array_equal(entropy.decompress_columns(stream, 50, 32, 3).integers[:, :50].T, q)


@pytest.mark.parametrize(("step", "limit"), [(0.2, 1.015), (0.5, 1.02), (1.0, 1.02), (2.0, 1.03)])
def test_real_weights_take_their_entropy(step: float, limit: float) -> None:
    """4.4, 3.1, 2.1 and 1.2 bits: class bytes, code tables and Huffman's whole bits included."""
    q = real_integers(step)
    assert 8 * entropy.compress_integers(q).data.size / q.size < limit * entropy_of(q)


def test_classes_beat_one_code_for_all() -> None:
    """Columns of different spread, as a calibrated encoder makes them."""
    q = np.concatenate([real_integers(s) for s in (0.3, 0.6, 1.2, 2.4)], axis=1)
    assert 8 * entropy.compress_integers(q).data.size / q.size < 0.89 * entropy_of(q)


def test_the_same_integers_give_the_same_bytes() -> None:
    q = real_integers(0.7)
    first = entropy.compress_integers(q).data
    assert entropy.compress_integers(np.asfortranarray(q)).data.tobytes() == first.tobytes()
    assert entropy.compress_integers(q.copy()).data.tobytes() == first.tobytes()


# --- codes --------------------------------------------------------------------------------------------


def test_meaning() -> None:
    """c = row_scale * col_scale * (q - sign(q) * shrink), by hand."""
    q = np.zeros((2, 32), int)
    q[0, :4] = 3, -3, 1, -1
    q[1, 3] = 2
    col_scale = np.ones(32)
    col_scale[3] = 0.5
    codes = GridCodes.from_integers(q, np.array([4.0, 0.25]), col_scale, 0.25)
    assert codes.bits == 3
    m = rbe.RBEVectors((2, 32), 32, "none", 2.0, None, codes)
    expected = np.zeros((2, 32))
    expected[0, :4] = 22.0, -22.0, 6.0, -3.0  # 2 * 4 * (3 - 1/4), ..., and half of it in column 3
    expected[1, 3] = 0.4375
    np.testing.assert_array_equal(m.decode(), expected)
    np.testing.assert_array_equal(reference.decode(m), expected)


def test_the_smallest_width() -> None:
    for low, high, bits in ((0, 0, 2), (-2, 1, 2), (0, 2, 3), (-3, 0, 3), (-128, 0, 8), (0, 64, 8)):
        q = np.zeros((1, 32), int)
        q[0, :2] = low, high
        assert codes_of(q).bits == bits


def test_sizes() -> None:
    m = compressed("grid int4 dwt basis")
    c = m.codes
    scales = 2 * (m.rows_pad + m.cols_pad)
    assert m.nbytes == c.stream.data.nbytes + scales + m.basis.nbytes
    assert m.resident_nbytes == m.rows_pad * m.cols_pad // 2 + scales + m.basis.nbytes
    assert m.bits_per_weight == 8 * m.nbytes / (130 * 200)
    assert "grid-int4, basis" in repr(m)
    dense = compressed("dct int2 b64")
    assert dense.resident_nbytes == dense.nbytes
    sparse = compressed("dct f16 bitmap")
    assert sparse.resident_nbytes == sparse.nbytes + sparse.codes.row_start.nbytes


def test_the_stream_is_made_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    m = gridded(original("dct int4 b128"), 4)
    calls = []
    encode = entropy.compress_integers
    monkeypatch.setattr(entropy, "compress_integers", lambda q: calls.append(1) or encode(q))
    assert m.nbytes == m.nbytes
    save_file(tmp_path / "a", {"w": m})
    loaded = load_file(tmp_path / "a")[0]["w"]
    assert loaded.nbytes == m.nbytes
    save_file(tmp_path / "b", {"w": loaded})
    assert len(calls) == 1
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_errors() -> None:
    q, ones = np.zeros((4, 32), np.int8), np.ones(32)
    with pytest.raises(TypeError, match="use integers"):
        GridCodes.from_integers(q.astype(np.float32), ones[:4], ones)
    for shape in ((4, 33), (32,), (0, 32), (4, 0)):
        with pytest.raises(ValueError, match="multiple of 32"):
            GridCodes.from_integers(np.zeros(shape, np.int8), ones[:4], ones)
    with pytest.raises(ValueError, match="q holds 0 to 128"):
        GridCodes.from_integers(np.eye(4, 32, dtype=int) * 128, ones[:4], ones)
    with pytest.raises(ValueError, match=r"row_scale has shape \(5,\), expected \(4,\)"):
        GridCodes.from_integers(q, ones[:5], ones)
    for bad in (np.nan, np.inf, 1e5):
        with pytest.raises(ValueError, match="col_scale holds NaN, Inf or a value beyond float16"):
            GridCodes.from_integers(q, ones[:4], ones * bad)
    for shrink in (-0.01, 0.5, 0.499999999, np.nan):
        with pytest.raises(ValueError, match="shrink"):
            GridCodes.from_integers(q, ones[:4], ones, shrink)


# --- ops and files ------------------------------------------------------------------------------------


def test_linear_and_embedding() -> None:
    m = compressed("grid int5 b128")
    x = np.ascontiguousarray(np.tile(real.activations(19), (1, 4)))
    assert relative(rbe.linear(x, m), x.astype(np.float64) @ reference.decode(m).T) < 1e-5
    table = compressed("grid vectors int4")
    ids = np.array([[299, 0, 7], [7, 7, 12]])
    np.testing.assert_array_equal(rbe.embedding(ids, table), table.decode()[ids])
    assert relative(rbe.embedding(ids, table), reference.embedding(ids, table)) < 1e-6


def test_many_panels_equal_one() -> None:
    """A weight of several panels: rows are not mixed up at the seams."""
    m = gridded(np.tile(original("none int4 delta"), (4, 1)), 5)  # 1536 x 1536: panels of 320 rows
    assert relative(m.decode(), reference.decode(m)) < 1e-6


def test_one_vector() -> None:
    v = original("dct int4 b128")[0]
    m = gridded(v, 6)
    assert isinstance(m, rbe.RBEVectors)
    assert m.decode().shape == v.shape
    assert relative(m.decode(), reference.decode(m)) < 1e-6


def test_bytes_counted_are_the_bytes_in_the_file(tmp_path: Path) -> None:
    tensors = {f: compressed(f) for f in ("grid int2 b32", "grid int4 dwt basis", "grid vectors int4")}
    save_file(tmp_path / "a", tensors)
    info = describe(tmp_path / "a")
    assert info.header_bytes + sum(m.nbytes for m in tensors.values()) == (tmp_path / "a").stat().st_size
    for row in info.tensors:
        assert (row.codes, row.nbytes) == (tensors[row.name].codes.name, tensors[row.name].nbytes)


def test_a_loaded_weight_is_the_weight(tmp_path: Path) -> None:
    for form in ("grid int3 none", "grid int8 no shrink", "grid vectors int6 b32 basis"):
        m = compressed(form)
        save_file(tmp_path / "a", {"w": m})
        np.testing.assert_array_equal(load_file(tmp_path / "a")[0]["w"].decode(), m.decode())


def test_the_writer_refuses_a_stream_of_other_integers(tmp_path: Path) -> None:
    m = compressed("grid int2 b32")
    save_file(tmp_path / "a", {"w": m})
    loaded = load_file(tmp_path / "a")[0]["w"]
    loaded.codes.value[0, 0] ^= 1
    with pytest.raises(FormatError, match="the stream and the value of its codes differ"):
        save_file(tmp_path / "b", {"w": loaded})
    other = replace(loaded.codes, stored=None)  # a new stream, from the value
    save_file(tmp_path / "b", {"w": replace(loaded, codes=other)})
    np.testing.assert_array_equal(load_file(tmp_path / "b")[0]["w"].codes.value, loaded.codes.value)

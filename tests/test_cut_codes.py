"""Grid codes cut to few bits with exceptions: which width is chosen, and the same results as of whole codes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rbe_gpu.cpu_fallback import int8_exceptions, isa
from rbe_gpu.cpu_fallback.int8_simd import BASE_BITS, needs_base
from rbe_gpu.cpu_fallback.operand import operand_of

import rbe_gpu as rbe
from rbe_gpu import reference
from rbe_gpu.codecs import GridCodes, cut, packing
from rbe_gpu.container import from_bytes, load_file, save_file, to_bytes
from rbe_gpu.gpu.decode import codes_params

from . import real
from .compressed import FORMS, compressed, relative

#: one token, a few, part of a tile, several tiles
TOKENS = (1, 3, 4, 8, 9, 70)
#: bits of the integers, and those that they are cut to
WIDTHS = ((3, 2), (4, 3), (5, 2), (6, 4), (7, 5), (8, 2), (8, 6), (8, 7))
ROWS, COLS, BLOCK = 70, 360, 32
PLACES = {
    "none": (slice(0, 0), slice(None)),
    "first and last column": (slice(None), [0, COLS - 1]),
    "around a panel": (slice(None, None, 3), slice(255, 258)),
    "every column of a row": (slice(9, 10), slice(None)),
    "every row of a column": (slice(None), slice(40, 41)),
    "padding": (slice(ROWS, None), slice(COLS - 1, None)),
    "all": (slice(None), slice(None)),
}


def _x(rows: int, cols: int = COLS) -> np.ndarray:
    x = real.activations(rows)[:rows]
    return np.ascontiguousarray(np.tile(x, (1, -(-cols // x.shape[1])))[:, :cols])


def _integers(bits: int, base: int, place: str) -> np.ndarray:
    """Integers of real weights, all of `base` bits but for some of `bits` bits: (rows_pad, cols_pad)."""
    w = real.layer(1, "output.dense.weight")[: -(-ROWS // BLOCK) * BLOCK, : -(-COLS // BLOCK) * BLOCK]
    small, large = 1 << (base - 1), 1 << (bits - 1)
    q = np.clip(np.rint(w / w.std() * small / 2), -small, small - 1).astype(np.int8)
    some = q[PLACES[place]]
    sign = np.where(np.arange(some.size).reshape(some.shape) % 3, 1, -1)
    q[PLACES[place]] = np.where(sign > 0, large - 1 - abs(some) // 2, -large + abs(some) // 2)
    return q


def _cut_to(monkeypatch: pytest.MonkeyPatch, q: np.ndarray, base: int, **arguments: Any) -> GridCodes:
    """Codes of this width, whatever it costs."""
    scales = np.linspace(0.5, 2, len(q)), np.linspace(2, 0.5, q.shape[1])
    with monkeypatch.context() as patch:
        patch.setattr(cut, "_cheapest", lambda *_: base)
        patch.setattr(cut, "_cost", lambda *_: 0)
        codes = GridCodes.from_integers(q, *scales, **arguments)
    assert codes.base_bits == min(base, codes.bits)
    np.testing.assert_array_equal(codes.integers(), q)
    return codes


def _both(codes: GridCodes, transform: str = "none") -> tuple[rbe.RBEMatrix, rbe.RBEMatrix]:
    """The weight of cut codes and that of whole ones."""
    m = rbe.RBEMatrix((ROWS, COLS), BLOCK, transform, 0.7, None, codes)
    return m, replace(m, codes=codes.for_gpu())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("bits", "base"), WIDTHS)
def test_results_are_those_of_whole_codes(
    bits: int, base: int, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit where exceptions join the codes before they are multiplied, and with int8 activations."""
    m, whole = _both(_cut_to(monkeypatch, _integers(bits, base, place), base))
    np.testing.assert_array_equal(m.decode(), whole.decode())
    assert relative(m.decode(), reference.decode(m)) < 1e-6
    for tokens in TOKENS:
        x = _x(tokens)
        y = rbe.linear(x, m)
        if tokens > 4:
            np.testing.assert_array_equal(y, rbe.linear(x, whole))
        assert relative(y, reference.linear(x, m)) < 1e-6
        y = rbe.linear(x, m, activation_bits=8)
        np.testing.assert_array_equal(y, rbe.linear(x, whole, activation_bits=8))
        if tokens == TOKENS[-1]:
            for i in (0, 33, tokens - 1):  # a token alone has the bits that it has in a batch
                np.testing.assert_array_equal(rbe.linear(x[i : i + 1], m, activation_bits=8)[0], y[i])


@pytest.mark.skipif(not needs_base(isa.active()), reason="products are not added in int16")
@pytest.mark.parametrize("int16_base", BASE_BITS)
@pytest.mark.parametrize(("bits", "base"), WIDTHS)
def test_every_base_of_int16_sums(
    bits: int, base: int, int16_base: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    time = {b: 0.0 if b == int16_base else 1e9 for b in BASE_BITS}
    monkeypatch.setattr(int8_exceptions, "_TIME", time)
    for place in PLACES:
        m, whole = _both(_cut_to(monkeypatch, _integers(bits, base, place), base))
        assert operand_of(m).int8_exceptions(256).base_bits == int16_base
        x = _x(70)
        y = rbe.linear(x, m, activation_bits=8)
        np.testing.assert_array_equal(y, rbe.linear(x, whole, activation_bits=8))


@pytest.mark.parametrize("transform", ["none", "dct"])
@pytest.mark.parametrize("shrink", [0.0, 0.125])
def test_shrunk_and_transformed_values(
    transform: str, shrink: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sign of what is cut is that of the integer, so that values are shrunk alike."""
    codes = _cut_to(monkeypatch, _integers(7, 3, "around a panel"), 3, shrink=shrink)
    m, whole = _both(codes, transform)
    np.testing.assert_array_equal(m.decode(), whole.decode())
    for tokens in TOKENS:
        for method in ("transform", "decode"):
            y = rbe.linear(_x(tokens), m, method=method)
            assert relative(y, reference.linear(_x(tokens), m)) < 1e-5


def test_starts_of_many_exceptions(monkeypatch: pytest.MonkeyPatch) -> None:
    """65,535 exceptions are counted in uint16, one more in int32, with the same results."""
    for more, dtype in ((0, np.uint16), (1, np.int32)):
        q = np.zeros((256, 512), np.int8)
        q.reshape(-1)[: (1 << 16) - 1 + more] = 9
        codes = _cut_to(monkeypatch, q, 2)
        assert codes.exceptions is not None
        assert codes.exceptions.row_start.dtype == dtype
        m = rbe.RBEMatrix(q.shape, BLOCK, "none", 0.7, None, codes)
        whole = replace(m, codes=codes.for_gpu())
        for tokens in (1, 9, 20):
            x = _x(tokens, 512)
            y = rbe.linear(x, m, activation_bits=8)
            np.testing.assert_array_equal(y, rbe.linear(x, whole, activation_bits=8))


# --- the width ----------------------------------------------------------------------------------------


def _costs(q: np.ndarray, bits: int) -> dict[int, int]:
    """Bits * integers + EXCEPTION_BITS * exceptions + 32 * (rows + 1) where there are some, for every width."""
    costs = {bits: bits * q.size}
    for b in range(2, bits):
        count = int(((q < -(1 << (b - 1))) | (q >= 1 << (b - 1))).sum())
        costs[b] = b * q.size + cut.EXCEPTION_BITS * count + (32 * (len(q) + 1) if count else 0)
    return costs


@pytest.mark.parametrize("spread", [0.3, 0.8, 2.0, 5.0, 30.0])
@pytest.mark.parametrize("shape", [(8, 64), (65, 96), (384, 384), (1, 1 << 15)])
def test_the_width_costs_least(spread: float, shape: tuple[int, int]) -> None:
    """Exactly for small matrices; a sample of large ones, whose rows are filled up to eights, comes within 3%."""
    w = real.layer(2, "output.dense.weight").reshape(-1)[: shape[0] * shape[1]].reshape(shape)
    q = np.clip(np.rint(w / w.std() * spread), -127, 127).astype(np.int64)
    codes = GridCodes.from_integers(q, np.ones(len(q)), np.ones(q.shape[1]))
    costs = _costs(q, codes.bits)
    assert costs[codes.base_bits] <= (1.03 if -(-len(q) // 8) * 8 * q.shape[1] >= 1 << 16 else 1) * min(
        costs.values()
    )
    np.testing.assert_array_equal(codes.integers(), q)


def test_a_sample_without_the_large_integers() -> None:
    """Nothing is cut where the exceptions turn out to cost more."""
    sampled = cut.sampled_runs(1 << 10)
    q = np.where(np.isin(np.arange(1 << 10), sampled)[:, None], 0, np.full(256, 100)).reshape(512, 512).T
    codes = GridCodes.from_integers(q, np.ones(512), np.ones(512))
    assert (codes.base_bits, codes.bits, codes.exceptions) == (8, 8, None)
    np.testing.assert_array_equal(codes.integers(), q)


def test_rows_longer_than_uint16_are_not_cut() -> None:
    for cols, base in ((1 << 16, 2), ((1 << 16) + 32, 8)):
        q = np.zeros((1, cols), np.int8)
        q[0, -1] = 127
        codes = GridCodes.from_integers(q, np.ones(1), np.ones(cols))
        assert codes.base_bits == base
        np.testing.assert_array_equal(codes.integers(), q)


@pytest.mark.parametrize("rows", [70, (1 << 16) + 9])
def test_exceptions_that_are_found_in_parts(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of several groups of columns have the order of one; also of more rows than 16 bits count."""
    q = np.resize(_integers(6, 4, "around a panel"), (rows, 96))
    ones = np.ones(rows), np.ones(96)
    monkeypatch.setattr(cut, "_CHUNK", q.size)
    whole = GridCodes.from_integers(q, *ones)
    monkeypatch.setattr(cut, "_CHUNK", 3 * rows)
    parts = GridCodes.from_integers(q, *ones)
    r, c = np.nonzero((q < -8) | (q >= 8))
    assert parts.base_bits == 4
    np.testing.assert_array_equal(parts.integers(), q)
    np.testing.assert_array_equal(parts.exceptions.column, c)
    np.testing.assert_array_equal(np.repeat(np.arange(rows), np.diff(parts.exceptions.row_start)), r)
    for name in ("row_start", "column", "delta"):
        np.testing.assert_array_equal(getattr(parts.exceptions, name), getattr(whole.exceptions, name))


# --- memory, files and GPUs ---------------------------------------------------------------------------

CUT = [form for form in FORMS if "exceptions" in form]


@pytest.mark.parametrize("form", CUT)
def test_bytes_in_memory(form: str) -> None:
    codes = compressed(form).codes
    e = codes.exceptions
    assert (e.row_start.dtype, e.column.dtype, e.delta.dtype) == (np.uint16, np.uint16, np.int8)
    assert e.nbytes == 2 * len(e.row_start) + 3 * len(e.delta)
    held = (codes.value, codes.row_scale, codes.col_scale, e.row_start, e.column, e.delta)
    assert codes.resident_nbytes == sum(a.nbytes for a in held)
    assert codes.resident_nbytes < codes.for_gpu().resident_nbytes
    assert (np.diff(e.row_start.astype(int)) >= 0).all()
    for r in range(len(e.row_start) - 1):
        assert (np.diff(e.column[e.row_start[r] : e.row_start[r + 1]].astype(int)) > 0).all()
    assert (e.delta != 0).all()


@pytest.mark.parametrize("form", CUT)
def test_a_loaded_weight_has_the_same_form(form: str, tmp_path: Path) -> None:
    m = compressed(form)
    save_file(tmp_path / "a", {"w": m})
    read = load_file(tmp_path / "a")[0]["w"].codes
    assert (read.bits, read.base_bits) == (m.codes.bits, m.codes.base_bits)
    np.testing.assert_array_equal(read.value, m.codes.value)
    for name in ("row_start", "column", "delta"):
        np.testing.assert_array_equal(getattr(read.exceptions, name), getattr(m.codes.exceptions, name))
    whole = replace(m, codes=m.codes.for_gpu())
    save_file(tmp_path / "b", {"w": whole})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_integers_of_fewer_bits_than_the_file_says() -> None:
    m = compressed("grid int4 none exceptions")
    q = np.clip(m.codes.integers(), -4, 3)
    value = packing.pack(q.astype(np.int16) + 128, 8)
    wide = GridCodes(8, 0.0, value, m.codes.row_scale, m.codes.col_scale)
    read = from_bytes(to_bytes({"w": replace(m, codes=wide)}))[0]["w"].codes
    assert (read.bits, read.base_bits, read.exceptions) == (8, 3, None)
    np.testing.assert_array_equal(read.integers(), q)
    assert codes_params(replace(m, codes=read.for_gpu()))["bits"] == 3


@pytest.mark.parametrize("form", CUT)
def test_gpus_get_whole_codes(form: str) -> None:
    m = compressed(form)
    codes = m.codes.for_gpu()
    assert (codes.base_bits, codes.exceptions) == (codes.bits, None)
    np.testing.assert_array_equal(codes.integers(), m.codes.integers())
    with pytest.raises(
        ValueError, match=r"no CUDA kernel reads exceptions; move the weight with rbe_gpu\.to"
    ):
        codes_params(m)


@pytest.mark.parametrize("form", CUT)
def test_damaged_streams(form: str) -> None:
    """Every byte of a stream, changed: refused, or integers of the width that the file says, which kernels read."""
    m = compressed(form)
    raw = to_bytes({"w": m})
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    begin, end = header["w.stream"]["data_offsets"]
    start = len(raw) - max(entry["data_offsets"][1] for n, entry in header.items() if n != "__metadata__")
    half, refused, x = 1 << (m.codes.bits - 1), 0, _x(9, m.cols)
    for at in range(start + begin, start + end, max(1, (end - begin) // 250)):
        damaged = bytearray(raw)
        damaged[at] ^= 1 << (at % 8)
        try:
            read = from_bytes(bytes(damaged))[0]["w"]
        except rbe.FormatError:
            refused += 1
            continue
        q = read.codes.integers()
        assert -half <= q.min() <= q.max() < half
        assert relative(rbe.linear(x, read), reference.linear(x, read)) < 1e-5
    assert refused > 2

"""Tables of grid codes as Rice codes of rows: the same bits as of packed codes, in less memory."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu import reference
from rbe_gpu.codecs import GridCodes, grid
from rbe_gpu.codecs.grid import GridRows
from rbe_gpu.container import to_bytes
from rbe_gpu.gpu.decode import codes_params
from rbe_gpu.matmul import int8_support
from rbe_gpu.models.decoder import Decoder
from rbe_gpu.models.decoder_tensors import EMBEDDINGS

from . import real
from .architectures.decoder_cases import write_with_tokenizer
from .compressed import few_integers, with_integers

ROWS, COLS = 517, 384
TRAINED = Path(__file__).parents[1] / "reports" / "models" / "minilm-r16.rbe.safetensors"


def _integers(density: float, low: int = -128, high: int = 127) -> np.ndarray:
    return few_integers((ROWS, COLS), density, low, high)


def _table(q: np.ndarray, transform: str = "none", shrink: float = 0.0) -> rbe.RBEVectors:
    table = with_integers(q, "vectors", transform, 128, shrink)
    assert isinstance(table, rbe.RBEVectors)
    return table


def _special() -> dict[str, np.ndarray]:
    """Integers of which a mistake at an end of a range would show."""
    gaps = np.zeros((8, COLS), np.int8)
    for row, gap in enumerate((0, 1, 62, 63, 64, 127, 128, 300)):
        gaps[row, gap :: gap + 1] = 1
    values = np.zeros((9, COLS), np.int8)
    for row, value in enumerate((-128, -3, -2, -1, 1, 2, 3, 126, 127)):
        values[row, 5 + row] = value
    ends = np.zeros((4, COLS), np.int8)
    ends[0, 0], ends[1, -1], ends[2, [0, -1]] = -1, 1, (7, -9)  # the last row is empty
    full = np.zeros((40, COLS), np.int8)
    full[3] = np.where(np.arange(COLS) % 2, 5, -1)
    full[4] = np.where(np.arange(COLS) % 2, 127, -128)  # the longest codes of all integers
    return {"gaps": gaps, "values": values, "ends": ends, "full": full, "zeros": np.zeros((3, COLS), np.int8)}


TABLES = {f"density {d}": _integers(d) for d in (0.002, 0.05, 0.2, 0.5, 0.7, 1.0)} | _special()


@pytest.mark.parametrize("transform", ["none", "dct"])
@pytest.mark.parametrize("shrink", [0.0, 0.125])
@pytest.mark.parametrize("name", TABLES)
def test_rows_are_those_of_packed_codes(name: str, shrink: float, transform: str) -> None:
    """Bit for bit, whole and looked up, in every dtype."""
    table = _table(TABLES[name], transform, shrink)
    rows = table.for_lookup()
    assert isinstance(rows.codes, GridRows)
    assert rows.resident_nbytes < table.resident_nbytes
    np.testing.assert_array_equal(rows.codes.integers(), TABLES[name])
    np.testing.assert_array_equal(rows.decode(), table.decode())
    assert np.abs(rows.decode() - reference.decode(rows)).max() <= 1e-6 * np.abs(table.decode()).max()
    ids = np.arange(3 * len(TABLES[name])).reshape(3, -1)[:, ::-1] * 7 % len(TABLES[name])
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        y = rbe.embedding(ids, rows, dtype=dtype)
        np.testing.assert_array_equal(y, rbe.embedding(ids, table, dtype=dtype))


def test_rows_of_a_padded_table() -> None:
    """Columns beyond the table's have no codes, and are not written."""
    q = _integers(0.05)
    q[:, 300:] = 0
    table = replace(_table(q), shape=(ROWS, 300))
    rows = table.for_lookup()
    np.testing.assert_array_equal(rows.decode(), table.decode())
    np.testing.assert_array_equal(rbe.embedding(np.arange(ROWS), rows), table.decode())


def test_a_matmul_decodes_them() -> None:
    table = _table(_integers(0.1))
    rows = table.for_lookup()
    x = real.activations(5)
    y = rbe.linear(x, rows)
    expected = reference.linear(x, table)
    assert np.abs(y - expected).max() <= 1e-5 * np.abs(expected).max()
    assert int8_support(table) == (True, "")
    assert not int8_support(rows)[0]
    with pytest.raises(NotImplementedError, match="only dense and grid codes are multiplied with int8"):
        rbe.linear(x, rows, activation_bits=8)


def test_a_file_of_them_is_that_of_packed_codes() -> None:
    table = _table(_integers(0.1))
    assert to_bytes({"w": table.for_lookup()}) == to_bytes({"w": table})


def test_gpus_get_packed_codes() -> None:
    table = _table(_integers(0.1))
    rows = table.for_lookup()
    codes = rows.codes.for_gpu()
    assert type(codes) is GridCodes
    assert codes.exceptions is None
    np.testing.assert_array_equal(codes.integers(), table.codes.integers())
    np.testing.assert_array_equal(codes.value, table.codes.for_gpu().value)
    assert codes_params(replace(rows, codes=codes))["bits"] == codes.bits


def test_copies() -> None:
    rows = _table(_integers(0.1)).for_lookup()
    copied = replace(rows, codes=rows.codes.map_arrays(np.copy))
    assert type(copied.codes) is GridRows
    assert copied.codes.row_start is not rows.codes.row_start
    np.testing.assert_array_equal(copied.decode(), rows.decode())


def test_tables_that_would_be_larger_stay() -> None:
    """All integers of a width as often as each other: no code is shorter than that width."""
    for bits in (2, 3, 8):
        values = np.arange(-(1 << (bits - 1)), 1 << (bits - 1))
        table = _table(np.resize(values, (ROWS, COLS)).astype(np.int8))
        assert table.for_lookup() is table
    rows = _table(_integers(0.1)).for_lookup()
    assert rows.for_lookup() is rows


def test_the_longest_gaps_and_sizes() -> None:
    """Rows of as many columns as are held so, with the longest code of each kind in front of others."""
    cols = 32_736
    q = np.zeros((3, cols), np.int8)
    q[0, [cols - 2, cols - 1]] = -128, 127
    q[1, ::977], q[1, ::1954] = 1, -127
    q[2, :] = np.resize([0, 1, -1, 2, -128, 0], cols)
    scales = np.ones(3, np.float16), np.ones(cols, np.float16)
    rows = GridCodes.from_integers(q, *scales).for_lookup()
    assert isinstance(rows, GridRows)
    np.testing.assert_array_equal(rows.integers(), q)


def test_larger_tables_than_the_starts_count_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "_MAX_BYTES", ROWS * (2 * COLS + 3) - 1)
    table = _table(_integers(0.05))
    assert table.for_lookup() is table


def test_an_encoder_holds_its_tables_so(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = real.texts()[:8]
    model = rbe.load(TRAINED)
    assert isinstance(model.word_embeddings.weight.codes, GridRows)
    vectors = model.embed(texts)
    monkeypatch.setattr(GridCodes, "for_lookup", lambda self: self)
    packed = rbe.load(TRAINED)
    np.testing.assert_array_equal(packed.embed(texts), vectors)
    codes = model.word_embeddings.weight.codes
    assert codes.value.nbytes < 1.2 * codes.stream.data.nbytes  # of the entropy-coded table in the file
    assert model.nbytes < packed.nbytes - 2_000_000


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_holds_its_table_so_unless_it_makes_logits(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = rbe.load(write_with_tokenizer(tmp_path / "m", tie_word_embeddings=tied))
    assert isinstance(dense, Decoder)
    values = dense.tensors()[EMBEDDINGS]
    step = 2 * values.std()
    q = np.rint(values / step).astype(np.int8)
    codes = GridCodes.from_integers(q, np.full(len(q), step), np.ones(q.shape[1]))
    tensors = {**dense.tensors(), EMBEDDINGS: rbe.RBEVectors(q.shape, 64, "none", 1.0, None, codes)}
    ids = np.arange(24).reshape(2, 12)
    model = dense.with_tensors(tensors)
    logits = model.logits(ids)
    assert type(model.word_embeddings.weight.codes) is (GridCodes if tied else GridRows)
    monkeypatch.setattr(GridCodes, "for_lookup", lambda self: self)
    np.testing.assert_array_equal(dense.with_tensors(tensors).logits(ids), logits)


def test_loading_imports_no_numba() -> None:
    """It takes longer than the load. The file has codes with exceptions, int8 activations and a table for lookup."""
    script = f"""
import sys
import rbe_gpu as rbe
model = rbe.load({str(TRAINED)!r})
assert model.int8_activations
assert "numba" not in sys.modules
model.embed(["a text"])
assert "numba" in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])

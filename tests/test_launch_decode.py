"""The launches of decode and embedding: which kernels, which sizes, and what they give on the host build."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu import Workspace, reference
from rbe_gpu.codecs import DenseCodes
from rbe_gpu.gpu import decode, embedding
from rbe_gpu.gpu._launch import MAX_GRID
from rbe_gpu.registry import relative_error

from . import real
from .compressed import FORMS, compressed, decoded, for_gpu
from .host.executor import HostExecutor, on_host
from .host.virtual import VirtualWorkspace, entries, matrix, sizes, vectors, virtual

F16 = np.dtype(np.float16)
BIG = 2**31
ORDERS = pytest.mark.parametrize("reverse", [False, True], ids=["ascending", "descending"])


# --- arithmetic ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True])
def test_decode_beyond_31_bits(sparse: bool) -> None:
    rows, cols = BIG // 32, 128  # 2^33 values
    weight = matrix(rows, cols, sparse)
    *before, last = decode.launches(weight, virtual((rows, cols)), VirtualWorkspace())
    assert last.entry == "decode_64"
    assert last.grid == (rows // 64, 1, 1)  # two tiles a block
    assert last.shared == 2 * 4 * 64 * 64
    assert (last.params["rows"], last.params["cols"]) == (rows, cols)
    assert entries(tuple(before)) == (["decode_starts"] if sparse else [])
    if sparse:
        assert before[0].grid == (rows // 8, 1, 1)
        assert before[0].params["starts"].shape == (rows, 3)


def test_decode_of_more_parts_than_a_grid_has() -> None:
    rows = 2**34
    weight = matrix(rows, 64, transform="none")
    (launch,) = decode.launches(weight, virtual((rows, 64), F16), VirtualWorkspace())
    assert launch.entry == "decode_plain"
    assert launch.grid == (MAX_GRID[0], 1, 1)  # 2^31 blocks of 8 rows: the kernel goes on in strides


@pytest.mark.parametrize("count", [1, BIG + 5])
def test_embedding_beyond_31_bits(count: int) -> None:
    ids = virtual((count,), np.int64)
    (launch,) = embedding.launches(ids, vectors(BIG, 128), virtual((count, 128)), VirtualWorkspace())
    assert (launch.op, launch.entry) == ("decode", "decode_64")
    assert launch.grid == (-(-count // 64), 1, 1)
    (launch,) = embedding.launches(ids, matrix(BIG, 128), virtual((count, 128)), VirtualWorkspace())
    assert launch.entry == "embedding_64"
    assert launch.grid == (min(count, MAX_GRID[0]), 1, 1)
    assert BIG in sizes(launch)
    (launch,) = embedding.launches(
        ids, virtual((BIG, 128), F16), virtual((count, 128), F16), VirtualWorkspace()
    )
    assert launch.entry == "embedding_rows"
    assert sizes(launch) == [0, BIG, count, 16]  # 16 units of 16 bytes
    assert launch.grid == (min(-(-count * 16 // 256), MAX_GRID[0]), 1, 1)


@pytest.mark.parametrize(
    ("cols", "unit", "units"), [(64, 4, 8), (63, 1, 63), (62, 2, 31), (4, 2, 2), (1, 1, 1)]
)
def test_embedding_copies_in_the_widest_units(cols: int, unit: int, units: int) -> None:
    ids = virtual((7,), np.int32)
    (launch,) = embedding.launches(ids, virtual((9, cols), F16), virtual((7, cols), F16), VirtualWorkspace())
    assert (launch.params["unit"], launch.params["units"]) == (unit, units)
    assert launch.params["numbers.wide"] == 0  # int32


# --- values -------------------------------------------------------------------------------------------


@ORDERS
@pytest.mark.parametrize("form", FORMS)
def test_decode_and_embedding(form: str, reverse: bool) -> None:
    m, expected = for_gpu(compressed(form)), decoded(form)
    for dtype in (np.dtype(np.float32), F16):
        out = np.full(expected.shape, np.nan, dtype)
        with on_host(reverse):
            decode.decode(m, out, Workspace())
        assert relative_error(out, expected, 2.0**-25) <= (2e-6 if dtype == np.float32 else 5e-4)
    ids = np.array([m.rows - 1, 0, m.rows // 2, 0], np.int32)
    out = np.full((4, m.cols), np.nan, np.float32)
    with on_host(reverse):
        embedding.embedding(ids, m, out, Workspace())
    assert relative_error(out, expected[ids]) <= 2e-6


@ORDERS
@pytest.mark.parametrize("form", ["dct int4 b128", "vectors int6 b32 basis", "none int4 delta"])
def test_rows_that_are_not_there_are_nan(form: str, reverse: bool) -> None:
    m, expected = compressed(form), decoded(form)
    ids = np.array([1, -1, m.rows, 0, 2**40], np.int64)
    out = np.zeros((5, m.cols), np.float32)
    dense = np.zeros((5, m.cols), np.float16)
    with on_host(reverse):
        embedding.embedding(ids, m, out, Workspace())
        embedding.embedding(ids, expected.astype(np.float16), dense, Workspace())
    for found in (out, dense):
        assert np.isnan(found[[1, 2, 4]]).all()
        assert np.isfinite(found[[0, 3]]).all()


def test_values_beyond_4_gigabytes() -> None:
    """Real codes at the end of an array of 2^32 bytes, which the system makes up of nothing until it is touched."""
    source = rbe.compress(
        real.weight("embeddings.word_embeddings.weight")[2000:2064, :64], codes="dense-int8", kind="vectors"
    )
    assert isinstance(source.codes, DenseCodes)
    rows = 2**26 + 64
    value, scale = np.zeros((rows, 64), np.uint8), np.zeros((rows, 1), np.float16)
    value[-64:], scale[-64:] = source.codes.value, source.codes.scale
    codes = DenseCodes(8, source.codes.group, value, scale)
    weight = replace(source, shape=(rows, 64), codes=codes)
    ids = np.arange(rows - 64, rows)
    out = np.full((64, 64), np.nan, np.float32)
    with on_host():
        embedding.embedding(ids, weight, out, Workspace())
    assert relative_error(out, reference.decode(source)) <= 2e-6


def test_same_bits_on_one_block() -> None:
    """The kernels go on in strides of the grid."""
    for form in ("dct int4 b128", "dct int1 delta b32"):
        m = compressed(form)
        many = np.full((m.rows, m.cols), np.nan, np.float32)
        one, ws = np.full_like(many, np.nan), Workspace()
        HostExecutor()(decode.launches(m, many, ws))
        HostExecutor()(tuple(replace(launch, grid=(1, 1, 1)) for launch in decode.launches(m, one, ws)))
        np.testing.assert_array_equal(one, many)

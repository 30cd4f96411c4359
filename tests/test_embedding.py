"""embedding: rows of dense and compressed tables."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from rbe_gpu.cpu_fallback import embedding
from rbe_gpu.cpu_fallback.decode import decode_rows

import rbe_gpu as rbe
from rbe_gpu import reference

from . import real
from .compressed import FORMS, compressed, relative


@pytest.mark.parametrize("form", FORMS)
def test_compressed_rows_equal_decoded_rows(form):
    m = compressed(form)
    ids = (np.arange(41) * 17 % m.shape[0]).reshape(1, 41)
    y = rbe.embedding(ids, m)
    assert y.shape == (1, 41, m.shape[1])
    assert relative(y, reference.embedding(ids, m)) < 1e-6


def test_real_text_through_the_real_table():
    table = real.weight("embeddings.word_embeddings.weight")
    ids, _ = real.batch()
    m = rbe.compress(table, codes="dense-int8", kind="vectors")
    np.testing.assert_array_equal(rbe.embedding(ids, table), table[ids])
    assert relative(rbe.embedding(ids, m), table[ids]) < 1e-2
    np.testing.assert_array_equal(rbe.embedding(ids.astype(np.int32), m), m.decode()[ids])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_types(dtype):
    m = compressed("vectors int4 b64")
    ids = np.array([5, 0, 299, 5])
    y = rbe.embedding(ids, m, dtype=dtype)
    np.testing.assert_array_equal(y, m.decode()[ids].astype(dtype))
    table = m.decode().astype(dtype)
    np.testing.assert_array_equal(rbe.embedding(ids, table), table[ids])


def test_more_ids_than_a_chunk():
    m = compressed("vectors int4 b64")
    ids = np.arange(2500) % m.shape[0]
    np.testing.assert_array_equal(rbe.embedding(ids, m), m.decode()[ids])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_row_that_is_asked_for_again_is_decoded_once(dtype, monkeypatch):
    m = compressed("vectors int4 b64")
    decoded = []

    def counted(weight, rows, first, count, out, ws):
        decoded.append(rows.tolist())
        decode_rows(weight, rows, first, count, out, ws)

    monkeypatch.setattr(embedding, "decode_rows", counted)
    ids = np.array([7, 7, 299, 0, 7, 299, 5, 0])
    out, ws = np.empty((8, m.shape[1]), dtype), rbe.Workspace()
    ws.get("embedding.first", (m.shape[0],), np.int32)[:] = (
        3  # what the workspace held before does not matter
    )
    for _ in range(2):
        rbe.embedding(ids, m, dtype=dtype, out=out, workspace=ws)
        np.testing.assert_array_equal(out, m.decode()[ids].astype(dtype))
    assert decoded == [[7, 299, 0, 5]] * 2
    many = np.arange(5000) * 7 % 300
    np.testing.assert_array_equal(
        rbe.embedding(many, m, dtype=dtype, workspace=ws), m.decode()[many].astype(dtype)
    )
    assert [len(rows) for rows in decoded[2:]] == [300, 300, 300]


def test_no_ids():
    m = compressed("vectors int4 b64")
    assert rbe.embedding(np.empty((3, 0), np.int64), m).shape == (3, 0, m.shape[1])


def test_errors():
    m = compressed("vectors int4 b64")
    with pytest.raises(IndexError, match="rows 0 to 299"):
        rbe.embedding(np.array([300]), m)
    with pytest.raises(IndexError, match="rows 0 to 299"):
        rbe.embedding(np.array([-1]), m)
    with pytest.raises(TypeError, match="use integers"):
        rbe.embedding(np.array([1.0]), m)

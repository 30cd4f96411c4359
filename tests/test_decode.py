"""decode: every stored form against the float64 reference."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu import reference

from .compressed import FORMS, compressed, original, relative


@pytest.mark.parametrize("form", FORMS)
def test_against_reference(form):
    m = compressed(form)
    y = m.decode()
    assert y.shape == m.shape == original(form).shape
    assert y.dtype == np.float32
    assert relative(y, reference.decode(m)) < 1e-6  # float32 sums over 32 to 128 terms, twice


@pytest.mark.parametrize(("dtype", "step"), [(np.float16, 2**-11), (ml_dtypes.bfloat16, 2**-8)])
@pytest.mark.parametrize("form", ["dct int3 b32 basis", "dct f16 bitmap", "vectors int6 b32 basis"])
def test_half_types_are_the_rounded_float32(form, dtype, step):
    m = compressed(form)
    y = rbe.decode(m, dtype=dtype)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, m.decode().astype(dtype))
    assert relative(y, reference.decode(m)) < step


def test_out_and_workspace():
    m = compressed("dct int4 b128")
    ws = rbe.Workspace()
    out = np.full(m.shape, np.nan, np.float32)
    assert rbe.decode(m, out=out, workspace=ws) is out
    np.testing.assert_array_equal(out, m.decode())
    held = ws.nbytes
    rbe.decode(m, out=out, workspace=ws)
    assert ws.nbytes == held


def test_many_panels_equal_one():
    """A weight of several panels: rows are not mixed up at the seams."""
    w = np.tile(original("none int4 delta"), (4, 1))  # 1536 x 1536: panels of 320 rows
    m = rbe.compress(w, codes="dense-int4")
    y = m.decode()
    assert relative(y, reference.decode(m)) < 1e-6
    np.testing.assert_array_equal(y[:384], y[384:768])


def test_extreme_magnitudes():
    """The gain carries any magnitude that float32 holds; scales stay float16."""
    w = original("dct int4 b128")
    for factor in (2.0**-100, 2.0**100):
        m = rbe.compress(w * np.float32(factor), codes="dense-int8")
        assert relative(m.decode() / factor, w) < 1e-2
        np.testing.assert_array_equal(m.codes.value, rbe.compress(w, codes="dense-int8").codes.value)


def test_one_vector():
    v = original("dct int4 b128")[0]
    m = rbe.compress(v, codes="dense-int8")
    assert isinstance(m, rbe.RBEVectors)
    assert m.decode().shape == v.shape
    assert relative(m.decode(), v) < 1e-2


def test_errors():
    m = compressed("dct int4 b128")
    with pytest.raises(TypeError, match="pass an RBEMatrix"):
        rbe.decode(original("dct int4 b128"))
    with pytest.raises(TypeError, match="float32, float16 or bfloat16"):
        rbe.decode(m, dtype=np.float64)
    with pytest.raises(ValueError, match="expected"):
        rbe.decode(m, out=np.empty((3, 3), np.float32))

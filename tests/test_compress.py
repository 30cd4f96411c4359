"""compress: targets are met on the decoded weight, bytes are all bytes, bad input says what is wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu.codecs.sparse import MAX_GAP, SparseCodes

from . import real
from .compressed import FORMS, compressed


@pytest.fixture(scope="module")
def weight():
    return real.layer(2, "intermediate.dense.weight")


def _stored(m):
    return sum(a.nbytes for a in m.arrays.values())


@pytest.mark.parametrize("transform", ["dct", "dwt", "none", "adaptive", "dwt-bior3.1"])
@pytest.mark.parametrize("grade", ["S", "A", "B", "C"])
def test_grade_holds(weight, grade, transform):
    m = rbe.compress(weight, grade=grade, transform=transform)
    assert m.error_report(weight).relative_error <= rbe.GRADES[grade]
    assert m.nbytes == _stored(m) <= weight.nbytes
    if transform != "dwt-bior3.1":  # its patterns overlap: errors of coefficients grow, grade S takes float32
        assert m.nbytes < weight.nbytes / 2


@pytest.mark.parametrize("kind", ["matrix", "vectors"])
@pytest.mark.parametrize("ratio", [2, 4, 8, 16, 50, 200])
def test_ratio_holds(weight, ratio, kind):
    m = rbe.compress(weight, ratio=ratio, kind=kind)
    assert m.ratio >= ratio
    assert m.nbytes * ratio <= weight.nbytes
    assert m.nbytes * ratio > 0.85 * weight.nbytes  # the bytes allowed are used


def test_more_bytes_less_error(weight):
    errors = [rbe.compress(weight, ratio=r).error_report(weight).relative_error for r in (50, 16, 8, 4, 2)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 1.0


@pytest.mark.parametrize("rmse", [1e155, 1e308])
def test_an_rmse_whose_square_is_infinite(rmse, weight):
    """As of any other error that zeros have, too."""
    assert rbe.compress(weight, rmse=rmse).nbytes == rbe.compress(weight, rmse=100.0).nbytes


def test_better_grade_more_bytes(weight):
    sizes = [rbe.compress(weight, grade=g).nbytes for g in "CBAS"]
    assert sizes == sorted(sizes)


def test_rmse_holds(weight):
    m = rbe.compress(weight, rmse=2e-3)
    report = m.error_report(weight)
    assert report.rmse <= 2e-3
    decoded = m.decode().astype(np.float64)
    diff = weight - decoded
    assert report.rmse == pytest.approx(np.sqrt((diff**2).mean()), rel=1e-9)
    assert report.max_error == pytest.approx(np.abs(diff).max(), rel=1e-9)
    relative = np.linalg.norm(diff) / np.linalg.norm(weight.astype(np.float64))
    assert report.relative_error == pytest.approx(relative, rel=1e-9)
    assert report.snr_db == pytest.approx(-20 * np.log10(relative), rel=1e-9)


@pytest.mark.parametrize("density", [0.001, 0.05, 0.25, 0.9, 1.0])
@pytest.mark.parametrize("codes", [None, "sparse-int4"])
def test_density_counts_coefficients(weight, density, codes):
    m = rbe.compress(weight, density=density, codes=codes)
    wanted = density * weight.size
    assert m.codes.entries >= round(wanted)
    if m.codes.index_kind != "delta":
        assert m.codes.entries == round(wanted)
    else:  # long gaps of a delta index are filled with real coefficients, at most one per half gap
        assert m.codes.entries <= wanted + weight.size / (MAX_GAP // 2)


def test_positions_take_the_smaller_form(weight):
    assert rbe.compress(weight, density=0.05).codes.index_kind == "delta"
    assert rbe.compress(weight, density=0.3).codes.index_kind == "bitmap"
    assert rbe.compress(weight, density=1.0).codes.index_kind == "full"


def test_the_largest_are_stored(weight):
    m = rbe.compress(weight, density=0.3, codes="sparse-f32", transform="none")
    magnitudes = np.sort(np.abs(weight).reshape(-1))
    threshold = magnitudes[-round(0.3 * weight.size)]
    decoded = m.decode()
    np.testing.assert_array_equal(decoded != 0, np.abs(weight) >= threshold)
    np.testing.assert_array_equal(decoded[decoded != 0], weight[decoded != 0])


def test_the_basis_pays_on_smooth_blocks_only(weight):
    """The basis is for slow trends, which trained weights do not have; position tables come closest."""
    assert rbe.compress(weight, ratio=8).basis is None
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    smooth = (np.hypot(x, y) + 0.5 * np.cos(np.pi * x) * np.cos(np.pi * y)).astype(np.float32)
    m = rbe.compress(smooth + 1e-3 * weight[:64, :64], ratio=16, transform="none")
    assert m.basis is not None


def test_the_basis_is_a_least_squares_fit():
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    trend = (3 + 2 * np.hypot(x, y) - np.cos(2 * np.pi * y)).astype(np.float32)
    m = rbe.compress(trend, density=0.001, basis=True)
    np.testing.assert_allclose(m.gain * m.basis[0, 0].astype(float), [3, 2, 0, 0, 0, 0, -1, 0], atol=5e-3)
    assert m.error_report(trend).relative_error < 1e-3


def test_same_input_same_bytes(weight):
    for kwargs in ({"grade": "B"}, {"ratio": 16}, {"density": 0.05, "transform": "adaptive"}):
        a, b = rbe.compress(weight, **kwargs), rbe.compress(weight.copy(), **kwargs)
        assert a.transform == b.transform
        for name, array in a.arrays.items():
            np.testing.assert_array_equal(array.view(np.uint8), b.arrays[name].view(np.uint8))


@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (64, 1), (63, 65), (3, 500), (129, 31)])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_any_shape(weight, shape, block):
    w = np.ascontiguousarray(np.resize(weight, shape))
    m = rbe.compress(w, codes="dense-int8", block=block)
    assert m.shape == shape
    assert m.error_report(w).relative_error < 0.02
    v = rbe.compress(w, grade="A", block=block, kind="vectors")
    assert v.error_report(w).relative_error <= 1e-2


@pytest.mark.parametrize("dtype", ["float16", "float64", "bfloat16"])
def test_other_float_types(weight, dtype):
    import ml_dtypes

    cast = weight.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    m = rbe.compress(cast, grade="B")
    assert m.error_report(cast.astype(np.float32)).relative_error <= 0.1


def test_zeros():
    z = np.zeros((70, 70), np.float32)
    for kwargs in ({"grade": "S"}, {"ratio": 8}, {"codes": "dense-int2"}, {"density": 0.5}, {"rmse": 1e-6}):
        m = rbe.compress(z, **kwargs)
        np.testing.assert_array_equal(m.decode(), z)
        assert m.error_report(z).relative_error == 0.0


def test_numbers_describe_themselves(weight):
    m = rbe.compress(weight, codes="dense-int4")
    assert m.bits_per_weight == 4.25  # 4 bits and a float16 scale per 64
    assert m.ratio == pytest.approx(32 / 4.25)
    assert repr(m) == "RBEMatrix(1536x384, dct, block=64, dense-int4, 4.25 bits/weight, ratio 7.5)"
    assert m.device == "cpu"


def test_bad_input(weight):
    bad = weight[:64, :64].copy()
    bad[3, 5] = np.nan
    cases = [
        (TypeError, "numpy or cupy array", lambda: rbe.compress([[1.0]], grade="A")),
        (TypeError, "int64", lambda: rbe.compress(np.zeros((64, 64), np.int64), grade="A")),
        (ValueError, "NaN or Inf", lambda: rbe.compress(bad, grade="A")),
        (ValueError, "NaN or Inf", lambda: rbe.compress(np.full((64, 64), 1e300), grade="A")),
        (ValueError, "empty", lambda: rbe.compress(np.zeros((0, 64), np.float32), grade="A")),
        (ValueError, "vectors and matrices", lambda: rbe.compress(weight.reshape(4, 384, 384), grade="A")),
        (ValueError, "give one target", lambda: rbe.compress(weight, grade="A", ratio=8)),
        (ValueError, "no target", lambda: rbe.compress(weight)),
        (ValueError, "unknown grade 'D'", lambda: rbe.compress(weight, grade="D")),
        (ValueError, "block=48", lambda: rbe.compress(weight, grade="A", block=48)),
        (ValueError, "unknown transform", lambda: rbe.compress(weight, grade="A", transform="fft")),
        (ValueError, "unknown codes", lambda: rbe.compress(weight, codes="dense-int1")),
        (ValueError, "unknown kind", lambda: rbe.compress(weight, grade="A", kind="rows")),
        (ValueError, "1-D array", lambda: rbe.compress(weight[0], grade="A", kind="matrix")),
        (ValueError, "basis='yes'", lambda: rbe.compress(weight, grade="A", basis="yes")),
        (ValueError, "fraction", lambda: rbe.compress(weight, density=1.5)),
        (ValueError, "needs sparse codes", lambda: rbe.compress(weight, density=0.5, codes="dense-int4")),
        (ValueError, "not positive", lambda: rbe.compress(weight, ratio=0)),
        (ValueError, "lower ratio", lambda: rbe.compress(weight, ratio=1e9)),
        (ValueError, "lower ratio", lambda: rbe.compress(weight, ratio=20, codes="dense-int4")),
        (ValueError, "out of reach", lambda: rbe.compress(weight, grade="A", codes="dense-int4")),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("name", FORMS)
def test_codes_of_another_size_are_refused(name: str) -> None:
    """Kernels trust the shapes: fewer rows or columns of codes than blocks need would be read beyond their end."""
    m = compressed(name)
    rows, cols = m.shape
    sizes = [(rows + m.row_block, cols)]
    if not isinstance(m.codes, SparseCodes) or m.codes.index_kind == "bitmap":  # of others no array says it
        sizes.append((rows, cols + m.block))
    for size in sizes:
        with pytest.raises(ValueError, match="the codes are not those of"):
            replace(m, shape=size, basis=None)

"""Synthesis matrices against textbook sums and PyWavelets; the basis functions against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import pywt
from rbe_gpu.cpu_fallback._jit import cpu_kernel
from rbe_gpu.cpu_fallback.fast_transform import apply_transform, transform_address

from rbe_gpu import transforms
from rbe_gpu.transforms import BLOCK_SIZES, TRANSFORMS

from . import real


@cpu_kernel
def apply(address, x, out, vectors):
    apply_transform(address, x, 0, 64, out, 0, 64, vectors)


@pytest.mark.parametrize("size", BLOCK_SIZES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_analysis_inverts_synthesis(name, size):
    s, a = transforms.synthesis(name, size), transforms.analysis(name, size)
    np.testing.assert_allclose(a @ s, np.eye(size), atol=1e-12)
    if transforms.is_orthonormal(name):
        np.testing.assert_allclose(s.T @ s, np.eye(size), atol=1e-13)


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_dct_is_the_orthonormal_type_2(size):
    s = transforms.synthesis("dct", size)
    x = np.cos(0.3 * np.arange(size))  # the textbook sum, coefficient by coefficient
    for k in (0, 1, size // 2, size - 1):
        total = sum(x[i] * np.cos(np.pi * (2 * i + 1) * k / (2 * size)) for i in range(size))
        total *= np.sqrt((1 if k == 0 else 2) / size)
        assert (s.T @ x)[k] == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_hadamard_is_signs_by_common_bits(size):
    s = transforms.synthesis("hadamard", size) * np.sqrt(size)
    for i, k in ((0, 0), (1, 1), (3, 5), (7, 7), (size - 1, size - 1), (size - 1, 1)):
        assert s[i, k] == pytest.approx((-1) ** (i & k).bit_count())
    np.testing.assert_allclose(s, s.T)


@pytest.mark.parametrize("size", BLOCK_SIZES)
@pytest.mark.parametrize("name", ["haar", "db2", "bior3.1"])
def test_wavelets_span_what_pywavelets_spans(name, size):
    """Each band holds PyWavelets' patterns of the periodised transform, up to a rotation of the block."""
    levels = int(np.log2(size)) - 2
    ours = transforms.synthesis(f"dwt-{name}", size)
    start = 0
    for band in range(levels + 1):
        width = 4 << max(band - 1, 0)
        zero = [np.zeros(4 << max(b - 1, 0)) for b in range(levels + 1)]
        zero[band][0] = 1.0
        theirs = pywt.waverec(zero, name, mode="periodization")
        mine = ours[:, start]
        rotations = np.array([np.abs(np.roll(theirs, r) - mine).max() for r in range(size)])
        assert rotations.min() < 1e-12
        start += width


def test_filters_are_pywavelets_filters():
    for name in ("haar", "db2", "bior3.1"):
        h, g = transforms._FILTERS[f"dwt-{name}"]
        wavelet = pywt.Wavelet(name)
        np.testing.assert_allclose(h, wavelet.rec_lo, atol=1e-12)
        # the sign of a wavelet is a convention
        signs = np.array([np.abs(s * g - wavelet.rec_hi).max() for s in (1, -1)])
        assert min(signs.min(), np.abs(np.abs(g[::-1]) - np.abs(wavelet.rec_hi)).max()) < 1e-12


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_basis_functions(size):
    phi = transforms.basis_2d(size)
    row, col = 3, size - 2
    y, x = 2 * row / (size - 1) - 1, 2 * col / (size - 1) - 1
    d = np.hypot(x, y)
    c = np.cos
    p = np.pi
    expected = [1, d, d * d, c(p * x), c(p * y), c(2 * p * x), c(2 * p * y), c(p * x) * c(p * y)]
    np.testing.assert_allclose(phi[:, row, col], expected, atol=1e-14)
    line = transforms.basis_1d(size)
    np.testing.assert_allclose(line[:, col], [1, abs(x), x * x, c(p * x), c(2 * p * x)], atol=1e-14)
    assert np.linalg.matrix_rank(phi.reshape(8, -1)) == 8
    assert np.linalg.matrix_rank(line) == 5


def test_names():
    assert transforms.canonical_transform("dwt") == "dwt-db2"
    with pytest.raises(ValueError, match="unknown transform 'fft'"):
        transforms.canonical_transform("fft")
    with pytest.raises(ValueError, match="block=48"):
        transforms.synthesis("dct", 48)


@pytest.mark.parametrize("name", transforms.TRANSFORMS)
@pytest.mark.parametrize("size", transforms.BLOCK_SIZES)
def test_factors_multiply_to_the_synthesis_matrix(name, size):
    product = np.eye(size)
    for factor in transforms.factors(name, size):
        product = product @ factor
    np.testing.assert_allclose(product, transforms.synthesis(name, size), atol=1e-14)


def test_factors_are_few_operations():
    """Additions and multiplications of a transform of 64 values, against 4,096 of the matrix."""

    def operations(name):
        rows = [row[row != 0] for factor in transforms.factors(name, 64) for row in factor]
        return sum(max(len(row) - 1, 0) + (not np.isclose(np.abs(row), 1).any()) for row in rows)

    assert {name: operations(name) for name in transforms.TRANSFORMS} == {
        "dct": 632, "dwt-haar": 240, "dwt-db2": 480, "dwt-bior3.1": 480, "hadamard": 448, "none": 0
    }  # fmt: skip


@pytest.mark.parametrize("name", transforms.TRANSFORMS[:-1])
@pytest.mark.parametrize("size", transforms.BLOCK_SIZES)
@pytest.mark.parametrize("inward", [True, False])
def test_compiled_transforms(name, size, inward):
    """One, three and four vectors of 16 tokens; rows of 64 tokens."""
    s = transforms.synthesis(name, size)
    x = np.resize(real.layer(0, "output.dense.weight"), (size, 64)).astype(np.float32)
    expected = (s.T if inward else s) @ x.astype(np.float64)
    address = transform_address(name, size, inward)
    for vectors in (1, 3, 4):
        out = np.zeros_like(x)
        apply(address, x.reshape(-1), out.reshape(-1), vectors)
        done = out[:, : 16 * vectors]
        assert np.abs(done - expected[:, : 16 * vectors]).max() < 1e-6 * np.abs(expected).max()
        assert not out[:, 16 * vectors :].any()


@pytest.mark.parametrize("size", transforms.BLOCK_SIZES)
def test_basis_terms_are_the_basis_functions(size):
    terms = transforms.basis_terms(size)
    for k, phi in enumerate(transforms.basis_2d(size)):
        own = terms.param == k
        f = terms.functions
        product = np.einsum("t,ty,tx->yx", terms.factor[own], f[terms.row[own]], f[terms.column[own]])
        np.testing.assert_allclose(product, phi, atol=1e-6)
    vectors = transforms.basis_terms(size, vectors=True)
    np.testing.assert_array_equal(vectors.functions[vectors.column], transforms.basis_1d(size)[vectors.param])

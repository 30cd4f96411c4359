"""Synthesis matrices: block = S_r @ C @ S_c.T, and the 8 basis functions of a block.

Every transform is a B x B matrix S whose columns are the patterns that coefficients weigh. `FORMAT.md`
defines each of them in full, so that a reader needs nothing but this page's arithmetic.

Sources: DCT-II (Ahmed, Natarajan and Rao 1974), orthonormal wavelets and their filters (Daubechies 1988),
biorthogonal 3.1 (Cohen, Daubechies and Feauveau 1992), Hadamard (Sylvester 1867).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

BLOCK_SIZES = (32, 64, 128)
DEFAULT_BLOCK = 64

# What a file may name. "dwt" is accepted by the encoder as a short name of DEFAULT_WAVELET.
TRANSFORMS = ("dct", "dwt-haar", "dwt-db2", "dwt-bior3.1", "hadamard", "none")
DEFAULT_WAVELET = "dwt-db2"

_R2, _R3 = np.sqrt(2.0), np.sqrt(3.0)
# Synthesis filters (low pass h, high pass g) of one wavelet step: x[2k+n mod L] += h[n] a[k] + g[n] d[k].
_HAAR_H = np.array([1.0, 1.0]) / _R2
_DB2_H = np.array([1 + _R3, 3 + _R3, 3 - _R3, 1 - _R3]) / (4 * _R2)
_FILTERS: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = {
    "dwt-haar": (_HAAR_H, _HAAR_H[::-1] * [1, -1]),
    "dwt-db2": (_DB2_H, _DB2_H[::-1] * [1, -1, 1, -1]),
    "dwt-bior3.1": (np.array([1.0, 3, 3, 1]) * _R2 / 8, np.array([-1.0, -3, 3, 1]) * _R2 / 4),
}
_COARSEST = 4  # the wavelet recursion stops at 4 scaling coefficients


def canonical_transform(name: str) -> str:
    """The concrete name a file carries; `ValueError` for an unknown one."""
    name = DEFAULT_WAVELET if name == "dwt" else name
    if name not in TRANSFORMS:
        raise ValueError(f"unknown transform {name!r}; use one of {', '.join(('dwt', *TRANSFORMS))}")
    return name


def is_orthonormal(name: str) -> bool:
    """Whether S.T @ S is the identity, so that errors of coefficients are errors of weights."""
    return canonical_transform(name) != "dwt-bior3.1"


def _dct(size: int) -> NDArray[np.float64]:
    i, k = np.arange(size)[:, None], np.arange(size)[None, :]
    s: NDArray[np.float64] = np.sqrt(2.0 / size) * np.cos(np.pi * (2 * i + 1) * k / (2 * size))
    s[:, 0] = np.sqrt(1.0 / size)
    return s


def _hadamard(size: int) -> NDArray[np.float64]:
    s = np.ones((1, 1))
    while len(s) < size:
        s = np.block([[s, s], [s, -s]])
    return np.asarray(s / np.sqrt(size))


def _dwt(size: int, name: str) -> NDArray[np.float64]:
    h, g = _FILTERS[name]
    s = np.eye(size)
    length = 2 * _COARSEST
    while length <= size:  # coarse to fine: [a | d] of this length becomes the next scaling band
        s[:length] = _step(length, h, g) @ s[:length]
        length *= 2
    return s


def _step(length: int, h: NDArray[np.float64], g: NDArray[np.float64]) -> NDArray[np.float64]:
    """One wavelet step: [a | d] of `length` values to the next scaling band."""
    half = length // 2
    step = np.zeros((length, length))
    for k in range(half):
        for n in range(len(h)):
            step[(2 * k + n) % length, k] += h[n]
            step[(2 * k + n) % length, half + k] += g[n]
    return step


@lru_cache(maxsize=64)
def synthesis(name: str, size: int) -> NDArray[np.float64]:
    """S of a transform.

    Parameters
    ----------
    name : one of `TRANSFORMS`, or "dwt"
    size : 32, 64 or 128

    Returns
    -------
    (size, size) float64, read-only. `block = S @ coefficients @ S.T`.
    """
    if size not in BLOCK_SIZES:
        raise ValueError(f"block={size} is not supported; use one of {BLOCK_SIZES}")
    name = canonical_transform(name)
    if name == "none":
        s = np.eye(size)
    elif name == "dct":
        s = _dct(size)
    else:
        s = _hadamard(size) if name == "hadamard" else _dwt(size, name)
    s.flags.writeable = False
    return s


@lru_cache(maxsize=64)
def analysis(name: str, size: int) -> NDArray[np.float64]:
    """The inverse of `synthesis(name, size)`: `coefficients = A @ block @ A.T`."""
    s = synthesis(name, size)
    a = np.array(s.T if is_orthonormal(name) else np.linalg.inv(s), np.float64, order="C")
    a.flags.writeable = False
    return a


@lru_cache(maxsize=64)
def cast_synthesis(name: str, size: int, transposed: bool = False) -> NDArray[np.float32]:
    """`synthesis` (or its transpose) rounded to float32, C-contiguous, as the kernels read it."""
    s = synthesis(name, size)
    s32 = np.ascontiguousarray(s.T if transposed else s, np.float32)
    s32.flags.writeable = False
    return s32


@lru_cache(maxsize=64)
def factors(name: str, size: int) -> tuple[NDArray[np.float64], ...]:
    """Sparse matrices F_1, ..., F_m with F_1 @ ... @ F_m = `synthesis(name, size)`: the fast transform.

    Most rows have two non-zeros, many of them 1 or -1. For 64 values a DCT costs about 620 operations, a
    Hadamard transform 384 and a wavelet 500, where the matrix has 4,096 non-zeros. "none" has no factors.

    - DCT-II of N: sums and differences of a DCT-II of the N/2 even coefficients and a DCT-IV of the odd ones;
      DCT-IV of n: rotations, two transposed DCT-II of n/2, sums and differences (Chen, Smith and Fralick
      1977; Wang 1984). Every factor is orthogonal up to a scale, so rounding errors do not grow.
    - Hadamard: butterflies.
    - wavelets: one factor per level.
    """
    name = canonical_transform(name)
    synthesis(name, size)  # checks the size
    if name == "none":
        return ()
    if name == "dct":
        return tuple(_dct2_factors(size, 1.0))
    if name == "hadamard":
        return tuple(_hadamard_factors(size))
    levels: Factors = []
    length = 2 * _COARSEST
    while length <= size:
        levels.insert(0, _embedded(_step(length, *_FILTERS[name]), size))
        length *= 2
    return tuple(levels)


Factors = list[NDArray[np.float64]]


def _embedded(a: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """`a` in the upper left corner of an identity."""
    out = np.eye(size)
    out[: len(a), : len(a)] = a
    return out


def _side_by_side(a: Factors, b: Factors) -> Factors:
    """Factors of the block-diagonal matrix of two matrices that are given by their factors."""
    count = max(len(a), len(b))
    na, nb = len(a[0]), len(b[0])
    a = a + [np.eye(na)] * (count - len(a))
    b = b + [np.eye(nb)] * (count - len(b))
    zero = np.zeros((na, nb))
    return [np.block([[x, zero], [zero.T, y]]) for x, y in zip(a, b, strict=True)]


def _dct2_factors(size: int, scale: float) -> Factors:
    """scale * S, the orthonormal DCT-II synthesis."""
    if size == 2:
        return [scale * _dct(2)]
    half = size // 2
    one, back = np.eye(half), np.eye(half)[::-1]
    butterfly = np.block([[one, one], [back, -back]])
    gather = np.zeros((size, size))  # even coefficients first, then the odd ones
    k = np.arange(half)
    gather[k, 2 * k] = 1
    gather[half + k, 2 * k + 1] = 1
    scale /= _R2
    return [butterfly, *_side_by_side(_dct2_factors(half, scale), _dct4_factors(half, scale)), gather]


def _dct4_factors(size: int, scale: float) -> Factors:
    """scale * sqrt(2/n) cos(pi (2i+1)(2k+1) / 4n), the orthonormal DCT-IV."""
    i = np.arange(size)
    if size == 2:
        return [scale * np.cos(np.pi * np.outer(2 * i + 1, 2 * i + 1) / (4 * size))]
    half = size // 2
    k = np.arange(half)
    theta = np.pi * (2 * k + 1) / (4 * size)
    c, s, sign = scale / _R2 * np.cos(theta), scale / _R2 * np.sin(theta), (-1.0) ** k
    rotation = np.zeros((size, size))  # u = x cos + x' sin; w = (-1)^k (x' cos - x sin), x' from the far end
    rotation[k, k], rotation[k, size - 1 - k] = c, s
    rotation[half + k, k], rotation[half + k, size - 1 - k] = -sign * s, sign * c
    inner = [f.T for f in reversed(_dct2_factors(half, 1.0))]
    post = np.zeros((size, size))  # U is the first half, V the second, from its far end
    post[0, 0] = _R2
    post[size - 1, half] = -_R2
    m = np.arange(1, half)
    post[2 * m, m], post[2 * m, size - m] = 1, 1
    post[2 * m - 1, m], post[2 * m - 1, size - m] = 1, -1
    return [post, *_side_by_side(inner, inner), rotation]


def _hadamard_factors(size: int) -> Factors:
    out, before = [], 1
    while before < size:
        out.append(np.kron(np.kron(np.eye(before), _hadamard(2)), np.eye(size // before // 2)))
        before *= 2
    # butterflies of 1 and -1, and the scale once
    return [_R2 * f for f in out[:-1]] + [out[-1] * _R2 ** (1 - len(out))]


def block_axis(size: int) -> NDArray[np.float64]:
    """The block coordinates t_j = 2j/(B-1) - 1, j = 0..B-1."""
    return 2.0 * np.arange(size) / (size - 1) - 1.0


@lru_cache(maxsize=16)
def basis_2d(size: int) -> NDArray[np.float64]:
    """The 8 RBE functions on a block, (8, size, size) float64: index [k, row (y), column (x)].

    `1, d, d^2, cos(pi x), cos(pi y), cos(2 pi x), cos(2 pi y), cos(pi x) cos(pi y)`, d = sqrt(x^2 + y^2).
    """
    x, y = np.meshgrid(block_axis(size), block_axis(size))
    d = np.sqrt(x * x + y * y)
    cx, cy = np.cos(np.pi * x), np.cos(np.pi * y)
    phi = np.stack([np.ones_like(d), d, d * d, cx, cy, np.cos(2 * np.pi * x), np.cos(2 * np.pi * y), cx * cy])
    phi.flags.writeable = False
    return phi


@lru_cache(maxsize=16)
def basis_1d(size: int) -> NDArray[np.float64]:
    """The 5 distinct RBE functions on a run, (5, size) float64: `1, |x|, x^2, cos(pi x), cos(2 pi x)`."""
    x = block_axis(size)
    phi = np.stack([np.ones_like(x), np.abs(x), x * x, np.cos(np.pi * x), np.cos(2 * np.pi * x)])
    phi.flags.writeable = False
    return phi


@dataclass(frozen=True)
class BasisTerms:
    """The basis functions of a block as a sum of products of functions of one coordinate.

    Phi_k(y, x) = sum over the terms t with `param[t]` = k of `factor[t]` f_row[t](y) f_column[t](x), so that
    the basis part of a matmul costs `len(param)` multiplications per block, token and set of parameters, not
    B * B.

    Attributes
    ----------
    functions : (count, size) float64, the f of one coordinate at `block_axis(size)`
    row, column, param : (terms,) int64; rows ascend
    factor : (terms,) float64
    """

    functions: NDArray[np.float64]
    row: NDArray[np.int64]
    column: NDArray[np.int64]
    param: NDArray[np.int64]
    factor: NDArray[np.float64]


@lru_cache(maxsize=16)
def basis_terms(size: int, vectors: bool = False) -> BasisTerms:
    """`basis_2d(size)`, or with `vectors` `basis_1d(size)` (one row function, 1), as products.

    All functions but d = sqrt(x^2 + y^2) are products of 1, t^2, cos(pi t) and cos(2 pi t); d is a sum of
    eigenvectors' products, taken down to 1e-7 of the largest (9 to 11 terms).
    """
    if vectors:
        functions = basis_1d(size)
        count = len(functions)
        k = np.arange(count)
        return BasisTerms(functions, np.zeros(count, np.int64), k, k, np.ones(count))
    t = block_axis(size)
    plain = np.stack([np.ones(size), t * t, np.cos(np.pi * t), np.cos(2 * np.pi * t)])
    value, vector = np.linalg.eigh(basis_2d(size)[1])
    large = np.abs(value) > 1e-7 * np.abs(value).max()
    value, vector = value[large], vector[:, large].T
    # (row, column, parameter): 1 | x^2 and y^2 | cos pi x | cos pi y | cos 2 pi x | cos 2 pi y | the product
    terms = [(0, 0, 0), (0, 1, 2), (1, 0, 2), (0, 2, 3), (2, 0, 4), (0, 3, 5), (3, 0, 6), (2, 2, 7)]
    rows = [(*term, 1.0) for term in terms] + [(4 + i, 4 + i, 1, v) for i, v in enumerate(value)]
    rows.sort()
    row, column, param = (np.array([r[i] for r in rows], np.int64) for i in range(3))
    return BasisTerms(np.concatenate([plain, vector]), row, column, param, np.array([r[3] for r in rows]))

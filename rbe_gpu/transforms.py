"""Synthesis matrices: block = S_r @ C @ S_c.T, and the 8 basis functions of a block.

Every transform is a B x B matrix S whose columns are the patterns that coefficients weigh. `FORMAT.md`
defines each of them in full, so that a reader needs nothing but this page's arithmetic.

Sources: DCT-II (Ahmed, Natarajan and Rao 1974), orthonormal wavelets and their filters (Daubechies 1988),
biorthogonal 3.1 (Cohen, Daubechies and Feauveau 1992), Hadamard (Sylvester 1867).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

BLOCK_SIZES = (32, 64, 128)

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
        half = length // 2
        step = np.zeros((length, length))
        for k in range(half):
            for n in range(len(h)):
                step[(2 * k + n) % length, k] += h[n]
                step[(2 * k + n) % length, half + k] += g[n]
        s[:length] = step @ s[:length]
        length *= 2
    return s


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

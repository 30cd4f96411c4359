"""linear of grid codes on tensor cores, in the host build: coefficients of any size are rounded once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu import Workspace, reference
from rbe_gpu.codecs import GridCodes
from rbe_gpu.gpu import linear

from . import real
from .compressed import gridded, relative
from .host.executor import HostExecutor

#: Two numbers of 11 bits in a product, and the result.
ROUNDED_ONCE = 3.5e-4


def weight_of(bits: int, row: float, column: float) -> rbe.RBEMatrix:
    """Real weights on a grid of `bits` bits with these mean scales, and a gain that gives results near 1."""
    m = gridded(real.layer(1, "attention.self.query.weight")[:192, :224], bits, transform="none")
    codes = m.codes
    rows, columns = (np.asarray(s, np.float64) for s in (codes.row_scale, codes.col_scale))
    factor = rows.mean() * columns.mean() / (row * column)
    scaled = GridCodes.from_integers(
        codes.integers(), rows / rows.mean() * row, columns / columns.mean() * column, codes.shrink
    )
    return replace(m, codes=scaled.for_gpu(), gain=float(m.gain * 2.0 ** np.rint(np.log2(factor))))


def error(m: rbe.RBEMatrix, tokens: int, entry: str, method: str | None = None) -> float:
    x = np.ascontiguousarray(real.activations(tokens)[:tokens, : m.shape[1]]).astype(np.float16)
    out = np.full((tokens, m.shape[0]), np.nan, np.float16)
    launches = linear.launches(x, m, None, None, None, out, Workspace(), None, method)
    assert entry in [launch.entry for launch in launches]
    HostExecutor()(launches)
    return relative(out, reference.linear(x, reference.decode(m)))


@pytest.mark.parametrize(("tokens", "entry"), [(16, "linear_few_mma"), (40, "linear_mma_codes_64")])
@pytest.mark.parametrize(
    ("row", "column"),
    [
        (1, 1),
        (3e-3, 3e-3),
        (1e-3, 1e-3),
        (1, 1e-6),
        (1e-6, 1),
        (1e4, 1e-6),
        (1, 200),
        (300, 300),
        (1e-3, 1e4),
    ],
)
def test_scales_of_any_size(tokens: int, entry: str, row: float, column: float) -> None:
    """Coefficients from 1e-6 to 1e7, some in float16 subnormal, some infinite."""
    assert error(weight_of(8, row, column), tokens, entry) < ROUNDED_ONCE


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width(bits: int) -> None:
    m = weight_of(bits, 1, 1)
    assert m.codes.bits == bits
    assert error(m, 40, "linear_mma_codes_64") < ROUNDED_ONCE


def test_with_a_basis() -> None:
    """x^ is rounded too."""
    m = gridded(real.layer(1, "attention.self.query.weight")[:192, :224], 5, basis=True)
    assert error(m, 40, "linear_transform_codes", "transform") < 6e-4

"""rms_norm: y[r,c] = s[r,c] / sqrt(mean_c(s[r]^2) + eps) * weight[c], s = x + residual."""

from __future__ import annotations

from typing import Any

from ._execute import run
from ._launch import SUFFIX, TYPE, Launch, in_chunks, type_of
from ._params import NORM
from ._rows import float_eps, share_rows

_THREADS = 512  # launch bounds of the kernels over rows in registers: 64 registers would not do


def launches(
    x: Any, weight: Any, eps: float, residual: Any, out: Any, residual_out: Any
) -> tuple[Launch, ...]:
    """The launch of `rms_norm`, from shapes, dtypes and addresses."""
    rows, cols = x.shape
    share = share_rows(
        rows, cols, x.itemsize, in_chunks(x, (residual, out, residual_out), (weight,)), _THREADS
    )
    params = NORM.fill(
        x=x,
        residual=residual,
        out=out,
        residual_out=residual_out,
        weight=weight,
        bias=None,
        weight_type=TYPE[weight.dtype],
        bias_type=type_of(None),
        rows=rows,
        cols=cols,
        eps=float_eps(eps),
    )
    entry = f"rms_norm_{SUFFIX[x.dtype]}{share.entry}"
    return (Launch("rms_norm", entry, share.grid, share.block, params),)


def rms_norm(x: Any, weight: Any, eps: float, residual: Any, out: Any, residual_out: Any) -> None:
    """Write the normalised rows of s = x + residual to `out`, and s to `residual_out`.

    Parameters
    ----------
    x, residual, out, residual_out : (rows, cols) float32/float16/bfloat16, one dtype, C-contiguous; the second
        and the last may be None. `out` or `residual_out` may be `x` or `residual`.
    weight : (cols,) of any of the three dtypes
    """
    run(*launches(x, weight, eps, residual, out, residual_out))

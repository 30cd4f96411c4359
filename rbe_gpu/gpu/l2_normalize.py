"""l2_normalize: y[r,c] = x[r,c] / max(||x[r]||_2, eps)."""

from __future__ import annotations

from typing import Any

from ._execute import run
from ._launch import SUFFIX, Launch, in_chunks
from ._params import L2_NORMALIZE
from ._rows import float_eps, share_rows

_THREADS = 512  # launch bounds of the kernels over rows in registers, as of rms_norm


def launches(x: Any, eps: float, out: Any) -> tuple[Launch, ...]:
    """The launch of `l2_normalize`, from shapes, dtypes and addresses."""
    rows, cols = x.shape
    share = share_rows(rows, cols, x.itemsize, in_chunks(x, (out,)), _THREADS)
    params = L2_NORMALIZE.fill(x=x, out=out, rows=rows, cols=cols, eps=float_eps(eps))
    entry = f"l2_normalize_{SUFFIX[x.dtype]}{share.entry}"
    return (Launch("l2_normalize", entry, share.grid, share.block, params),)


def l2_normalize(x: Any, eps: float, out: Any) -> None:
    """Write every row of `x`, divided by its L2 norm or by `eps` if that is larger, to `out`.

    Parameters
    ----------
    x, out : (rows, cols) float32/float16/bfloat16, one dtype, C-contiguous; `out` may be `x`
    """
    run(*launches(x, eps, out))

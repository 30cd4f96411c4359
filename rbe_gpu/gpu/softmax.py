"""softmax: y[r,c] = exp(s[r,c] - max s[r]) / sum_c exp(s[r,c] - max s[r]), s = scale * x + mask."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..kernel_struct import address
from ._execute import run
from ._launch import SUFFIX, Launch, aligned
from ._params import SOFTMAX
from ._rows import share_rows

_THREADS = 1024  # launch bounds of the kernels over rows in registers

# how the kernel reads the mask: MASK_... of softmax.cu
_NONE, _ADDED, _KEEP, _ADDED_ROWS, _KEEP_ROWS = range(5)


def _mask_kind(mask: Any, cols: int) -> int:
    if mask is None:
        return _NONE
    keep = mask.dtype == np.bool_
    row, col = mask.strides
    by_rows = col == mask.itemsize or cols == 1
    if by_rows and keep and row % 8 == 0 and address(mask) % 8 == 0:
        return _KEEP_ROWS
    if by_rows and not keep and row % 16 == 0 and address(mask) % 16 == 0:
        return _ADDED_ROWS
    return _KEEP if keep else _ADDED


def launches(x: Any, scale: float, mask: Any, out: Any) -> tuple[Launch, ...]:
    """The launch of `softmax`, from shapes, strides, dtypes and addresses."""
    rows, cols = x.shape
    share = share_rows(rows, cols, x.itemsize, aligned(x, out), _THREADS)
    row_stride, col_stride = (0, 0) if mask is None else (s // mask.itemsize for s in mask.strides)
    params = SOFTMAX.fill(
        x=x,
        out=out,
        rows=rows,
        cols=cols,
        scale=scale,
        mask_kind=_mask_kind(mask, cols),
        mask=mask,
        mask_row_stride=row_stride,
        mask_col_stride=col_stride,
    )
    entry = f"softmax_{SUFFIX[x.dtype]}{share.entry}"
    return (Launch("softmax", entry, share.grid, share.block, params),)


def softmax(x: Any, scale: float, mask: Any, out: Any) -> None:
    """Write softmax(scale * x + mask) of every row to `out`.

    Parameters
    ----------
    x, out : (rows, cols) float32/float16/bfloat16, C-contiguous; `out` may be `x`
    mask : (rows, cols) float32 (added) or bool (True keeps), any strides, or None
    """
    run(*launches(x, scale, mask, out))

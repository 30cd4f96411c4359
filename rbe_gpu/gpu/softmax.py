"""softmax: y[r,c] = exp(s[r,c] - max s[r]) / sum_c exp(s[r,c] - max s[r]), s = scale * x + mask."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._launch import SUFFIX, Launch, address, aligned, run
from ._rows import share_rows

_THREADS = 1024  # launch bounds of the kernels over rows in registers

# how the kernel reads the mask: MASK_... of softmax.cu
_NONE, _ADDED, _KEEP, _ADDED_ROWS, _KEEP_ROWS = (np.int32(i) for i in range(5))


def _mask_kind(mask: Any, cols: int) -> Any:
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


def plan(x: Any, scale: float, mask: Any, out: Any) -> Launch:
    """The launch of `softmax`, from shapes, strides, dtypes and addresses."""
    rows, cols = x.shape
    share = share_rows(rows, cols, x.itemsize, aligned(x, out), _THREADS)
    row_stride, col_stride = (0, 0) if mask is None else (s // mask.itemsize for s in mask.strides)
    args = (
        x,
        out,
        np.int64(rows),
        np.int64(cols),
        np.float32(scale),
        mask,
        _mask_kind(mask, cols),
        np.int64(row_stride),
        np.int64(col_stride),
    )
    entry = f"softmax_{SUFFIX[x.dtype]}{share.entry}"
    return Launch("softmax", entry, share.grid, share.block, args)


def softmax(x: Any, scale: float, mask: Any, out: Any) -> None:
    """Write softmax(scale * x + mask) of every row to `out`.

    Parameters
    ----------
    x, out : (rows, cols) float32/float16/bfloat16, C-contiguous; `out` may be `x`
    mask : (rows, cols) float32 (added) or bool (True keeps), any strides, or None
    """
    run(plan(x, scale, mask, out))

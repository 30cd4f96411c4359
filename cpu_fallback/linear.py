"""y = activation(x W^T + b) + residual.

A compressed W is decoded a panel of rows at a time into scratch memory (or taken from the cache) and
multiplied by BLAS; bias, activation, residual and storage type are one pass over the result.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numba
import numpy as np

from rbe_gpu.blocks import RBEBlocks
from rbe_gpu.cache import PanelCache
from rbe_gpu.workspace import Workspace

from ._jit import cpu_inline, cpu_kernel
from .decode import convert, decode_rows, panel_rows
from .simd import bits, erf_f32, narrow, sigmoid_f32, tanh_f32, widen

_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)
_SQRT_HALF = np.float32(0.7071067811865476)
_SQRT_2_PI, _CUBIC = np.float32(0.7978845608028654), np.float32(0.044715)
_INFINITY = np.float32(np.inf)
_NONE, _RELU, _GELU, _GELU_TANH, _SILU = range(5)
_ACTIVATION = {None: _NONE, "relu": _RELU, "gelu": _GELU, "gelu_tanh": _GELU_TANH, "silu": _SILU}


@cpu_inline
def _activate(row, activation):
    """row[c] = activation(row[c]), float32 in place. -inf gives 0 for gelu and silu, its limit."""
    if activation == _RELU:
        for c in range(row.shape[0]):
            t = row[c]
            row[c] = _ZERO if t < _ZERO else t
    elif activation == _GELU:
        for c in range(row.shape[0]):
            t = row[c]
            row[c] = _ZERO if t == -_INFINITY else t * (_HALF * (_ONE + erf_f32(t * _SQRT_HALF)))
    elif activation == _GELU_TANH:
        for c in range(row.shape[0]):
            t = row[c]
            row[c] = (
                _ZERO
                if t == -_INFINITY
                else t * (_HALF * (_ONE + tanh_f32(_SQRT_2_PI * t * (_ONE + _CUBIC * t * t))))
            )
    elif activation == _SILU:
        for c in range(row.shape[0]):
            t = row[c]
            row[c] = _ZERO if t == -_INFINITY else t * sigmoid_f32(t)


@cpu_kernel(parallel=True)
def _epilogue(y, bias, activation, residual, out):
    """out = activation(y + bias) + residual; y (rows, cols) float32 is overwritten."""
    for r in numba.prange(y.shape[0]):
        row = y[r]
        if bias is not None:
            for c in range(row.shape[0]):
                row[c] += widen(bias[c])
        _activate(row, activation)
        if residual is not None:
            for c in range(row.shape[0]):
                out[r, c] = narrow(out, row[c] + widen(residual[r, c]))
        else:
            for c in range(row.shape[0]):
                out[r, c] = narrow(out, row[c])


def _as_float32(a: Any, name: str, ws: Workspace) -> Any:
    if a.dtype == np.float32:
        return a
    wide = ws.get(name, a.shape)
    convert(bits(a), wide)
    return wide


def linear(
    x: Any,
    weight: Any,
    bias: Any,
    activation: str | None,
    residual: Any,
    out: Any,
    ws: Workspace,
    cache: PanelCache | None,
) -> None:
    """x (n, in), weight (out, in), residual and out (n, out)."""
    if not out.size:
        return
    x = _as_float32(x, "linear.x", ws)
    in_place = out.dtype == np.float32 and (residual is None or not np.may_share_memory(out, residual))
    y = out if in_place else ws.get("linear.y", out.shape)
    if isinstance(weight, RBEBlocks):
        rows, step = weight.rows, panel_rows(weight)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            scratch = ws.get("linear.panel", (stop - start, weight.cols))
            decode = partial(_decode_panel, weight, start, stop, ws)
            if cache is None:
                decode(scratch)
                panel = scratch
            else:
                panel = cache.panel(weight, start, stop, decode, scratch)
            np.matmul(x, panel.T, out=y[:, start:stop])
    else:
        np.matmul(x, _as_float32(weight, "linear.weight", ws).T, out=y)
    if bias is not None or activation is not None or residual is not None or y is not out:
        _epilogue(
            y,
            None if bias is None else bits(bias),
            _ACTIVATION[activation],
            None if residual is None else bits(residual),
            bits(out),
        )


def _decode_panel(weight: RBEBlocks, start: int, stop: int, ws: Workspace, out: Any) -> None:
    decode_rows(weight, None, start, stop - start, out, ws)

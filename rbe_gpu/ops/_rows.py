"""softmax, the norms and mean_pool: ops along rows, or along the rows of a sequence."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from ..blocks import Array
from ..dispatch import Backend, backend_of
from ._checks import (
    FLOAT32,
    FLOAT_NAMES,
    FLOATS,
    as_rows,
    check_contiguous,
    check_float,
    check_rank,
    check_residual,
    check_vector,
    int64_cu_seqlens,
    int64_lengths,
    is_plain,
    op,
    output,
)


@op
def softmax(x: Array, scale: float = 1.0, mask: Array | None = None, out: Array | None = None) -> Array:
    """y[r,c] = exp(s[r,c] - max s[r]) / sum_c exp(s[r,c] - max s[r]), s = scale * x + mask.

    Parameters
    ----------
    x : (..., cols); the softmax runs over the last axis
    mask : broadcastable to x; float32 is added, bool keeps where True. A row that is masked everywhere gives zeros.

    Returns
    -------
    Like x.
    """
    backend = backend_of(x=x, mask=mask, out=out)
    if not (x.dtype is FLOAT32 and x.flags.c_contiguous):
        check_float(x=x)
        check_contiguous(x=x)
    if not x.ndim:
        check_rank("x", x, 1)
    shape = x.shape
    result = output(backend, out, shape, x.dtype)
    if mask is not None:
        mask = _rows_mask(backend, mask, shape)
    if x.size:
        if x.ndim == 2:
            backend.softmax(x, float(scale), mask, result)
        else:
            backend.softmax(as_rows(x, shape[-1]), float(scale), mask, as_rows(result, shape[-1]))
    return result


def _rows_mask(backend: Backend, mask: Array, shape: tuple[int, ...]) -> Array:
    """`mask` broadcast to `shape`, as rows."""
    if mask.dtype != np.float32 and mask.dtype != np.bool_:
        raise TypeError(f"mask has dtype {mask.dtype}; use float32 (added) or bool (True keeps)")
    try:
        mask = backend.xp.broadcast_to(mask, shape)
    except ValueError:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, which does not broadcast to {shape}") from None
    return mask.reshape(-1 if shape[-1] else prod(shape[:-1]), shape[-1])


def _norm(
    name: str,
    x: Array,
    weight: Array,
    bias: Array | None,
    eps: float,
    residual: Array | None,
    out: Array | None,
    residual_out: Array | None,
) -> Array:
    backend = backend_of(x=x, weight=weight, bias=bias, residual=residual, out=out, residual_out=residual_out)
    if not is_plain(x):
        check_float(x=x)
        check_contiguous(x=x)
    check_rank("x", x, 1)
    cols = x.shape[-1]
    check_vector("weight", weight, cols)
    check_vector("bias", bias, cols)
    if residual is not None:
        check_residual(x, residual)
    if not eps >= 0:
        raise ValueError(f"eps={eps} is not valid; use 0 or more")
    if residual_out is not None:
        output(backend, residual_out, x.shape, x.dtype, "residual_out")
    result = output(backend, out, x.shape, x.dtype)
    if x.size:
        rows = [residual, result, residual_out]
        if x.ndim != 2:
            x, *rows = (as_rows(a, cols) for a in (x, *rows))
        if name == "rms_norm":
            backend.rms_norm(x, weight, float(eps), *rows)
        else:
            backend.layer_norm(x, weight, bias, float(eps), *rows)
    return result


@op
def layer_norm(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    eps: float = 1e-5,
    residual: Array | None = None,
    out: Array | None = None,
    residual_out: Array | None = None,
) -> Array:
    """y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias, s = x + residual, over the last axis.

    Parameters
    ----------
    x : (..., cols)
    weight, bias : (cols,)
    residual : like x
    residual_out : like x; receives s

    Returns
    -------
    Like x, right for every row of finite values. Source: Ba, Kiros and Hinton 2016.
    """
    return _norm("layer_norm", x, weight, bias, eps, residual, out, residual_out)


@op
def rms_norm(
    x: Array,
    weight: Array,
    eps: float = 1e-6,
    residual: Array | None = None,
    out: Array | None = None,
    residual_out: Array | None = None,
) -> Array:
    """y = s / sqrt(mean(s^2) + eps) * weight, s = x + residual, over the last axis.

    Parameters
    ----------
    x : (..., cols)
    weight : (cols,)
    residual : like x
    residual_out : like x; receives s

    Returns
    -------
    Like x, right for every row of finite values. Source: Zhang and Sennrich 2019.
    """
    return _norm("rms_norm", x, weight, None, eps, residual, out, residual_out)


@op
def l2_normalize(x: Array, eps: float = 1e-12, out: Array | None = None) -> Array:
    """y = x / max(||x||_2, eps) over the last axis, as `torch.nn.functional.normalize`.

    A norm beyond float32 does not overflow as it does there: every row of finite values has its right result.

    Parameters
    ----------
    x : (..., cols)
    eps : at least 0; with 0 a row of zeros gives NaN

    Returns
    -------
    Like x.
    """
    backend = backend_of(x=x, out=out)
    if not is_plain(x):
        check_float(x=x)
        check_contiguous(x=x)
    check_rank("x", x, 1)
    if not eps >= 0:
        raise ValueError(f"eps={eps} is not valid; use 0 or more")
    result = output(backend, out, x.shape, x.dtype)
    if x.size:
        cols = x.shape[-1]
        backend.l2_normalize(as_rows(x, cols), float(eps), as_rows(result, cols))
    return result


@op
def mean_pool(
    x: Array,
    lengths: Array | None = None,
    cu_seqlens: Array | None = None,
    dtype: Any = None,
    out: Array | None = None,
) -> Array:
    """y[b] = mean of x over the tokens of sequence b, zeros where it has none.

    The result of a sequence has the same bits in every batch, padded or packed.

    Parameters
    ----------
    x : (batch, seq, cols), padded on the right; or packed (tokens, cols), with `cu_seqlens`
    lengths : (batch,) integers, tokens of each padded sequence, 0 to seq; None: seq. On a GPU they are clamped, not
        checked
    cu_seqlens : (batch + 1,) int32/int64 from 0 to tokens, nondecreasing: packed sequence b has the tokens
        cu_seqlens[b] to cu_seqlens[b + 1] - 1. On a GPU they are not checked
    dtype : of the result; None: that of x. Ignored when `out` is passed

    Returns
    -------
    (batch, cols), dtype; finite where the values are
    """
    backend = backend_of(x=x, lengths=lengths, cu_seqlens=cu_seqlens, out=out)
    check_float(x=x)
    check_contiguous(x=x)
    axes = ("batch", "seq", "cols") if cu_seqlens is None else ("tokens", "cols")
    if x.ndim != len(axes):
        raise ValueError(f"x has {x.ndim} axes, needs ({', '.join(axes)})")
    if cu_seqlens is None:
        batch, seq, cols = x.shape
        lengths = None if lengths is None else int64_lengths(backend, lengths, batch, "seq", seq)
    elif lengths is not None:
        raise ValueError("lengths are for padded sequences; packed ones (cu_seqlens) have none")
    else:
        tokens, cols = x.shape
        cu_seqlens = int64_cu_seqlens(backend, "cu_seqlens", cu_seqlens, "x", tokens)
        batch = cu_seqlens.size - 1
    dtype = (x.dtype if dtype is None else np.dtype(dtype)) if out is None else out.dtype
    if dtype not in FLOATS:
        raise TypeError(f"dtype {dtype} is not supported; use {FLOAT_NAMES}")
    result = output(backend, out, (batch, cols), dtype)
    if out is not None and backend.xp.may_share_memory(out, x):
        raise ValueError("out shares memory with x; pass another array")
    if result.size:
        backend.mean_pool(x, lengths, cu_seqlens, result)
    return result

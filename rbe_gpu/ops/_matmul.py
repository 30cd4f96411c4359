"""decode, linear and embedding: the ops on weights, dense or compressed."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from ..blocks import Array, RBEBlocks
from ..cache import PanelCache
from ..dispatch import backend_of
from ..matmul import PreparedInput
from ..workspace import Workspace
from ._checks import (
    ACTIVATIONS,
    FLOAT_NAMES,
    FLOATS,
    as_rows,
    check_contiguous,
    check_float,
    check_rank,
    check_shape,
    check_vector,
    is_plain,
    op,
    output,
    scratch_of,
)


@op
def decode(
    weight: RBEBlocks, dtype: Any = np.float32, out: Array | None = None, workspace: Workspace | None = None
) -> Array:
    """Decode a compressed weight: W = gain * (S_r C S_c^T + basis).

    Parameters
    ----------
    weight : RBEMatrix or RBEVectors
    dtype : float32, float16 or bfloat16; ignored if `out` is passed
    out : array of weight.shape, C-contiguous

    Returns
    -------
    weight.shape, dtype
    """
    if not isinstance(weight, RBEBlocks):
        raise TypeError(f"weight is a {type(weight).__name__}; pass an RBEMatrix or RBEVectors")
    return weight.decode(dtype, out, workspace)


@op
def linear(
    x: Array | PreparedInput,
    weight: Array | RBEBlocks,
    bias: Array | None = None,
    activation: str | None = None,
    residual: Array | None = None,
    out: Array | None = None,
    workspace: Workspace | None = None,
    cache: PanelCache | None = None,
    method: str | None = None,
    activation_bits: int | None = None,
) -> Array:
    """y = activation(x W^T + bias) + residual.

    Parameters
    ----------
    x : (..., in_features) float32/float16/bfloat16, or `rbe_gpu.prepare_input` of it
    weight : RBEMatrix, RBEVectors or dense array, (out_features, in_features)
    bias : (out_features,)
    activation : None, "relu", "gelu" (erf), "gelu_tanh" or "silu"
    residual : (..., out_features), added after the activation
    out : (..., out_features), dtype of x; must not share memory with x; may be `residual`
    cache : keeps decoded panels of a compressed weight between calls, under its byte budget
    method : restricts the choice of the matmul algorithm for a compressed weight (`rbe_gpu.matmul`): "transform"
        (multiply in the transform domain, W is never decoded), "decode" (decode panels of W) or "cache" (panels that
        `cache` keeps). None takes the algorithm of the lowest estimated time on the CPU. On a GPU, where times have
        not been measured yet, it takes "transform" for up to 16 tokens and for dense and grid codes without a basis
        and half-precision x, else "decode", or "cache" where there is one
    activation_bits : 8 rounds the activations of each token to int8, with a scale of their own, and adds integers:
        for dense and grid codes of up to 8 bits; two to three times faster on the CPU, not measured on a GPU.
        `reference.int8_activations` says how. None leaves them as they are

    Returns
    -------
    (..., out_features), dtype of x
    """
    prepared = None
    if type(x) is PreparedInput:
        prepared, x = x, x.array
        workspace = prepared.workspace if workspace is None else workspace
    compressed = isinstance(weight, RBEBlocks)
    # a fast path: with x in NumPy, a compressed weight on the CPU needs no check
    beside = None if compressed and type(x) is np.ndarray and weight.device == "cpu" else weight
    backend = backend_of(x=x, weight=beside, bias=bias, residual=residual, out=out)
    checked = compressed and residual is None and is_plain(x)
    if not checked:
        check_float(x=x, residual=residual, **({} if compressed else {"weight": weight}))
    check_rank("x", x, 1)
    if len(weight.shape) != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, needs (out_features, in_features)")
    out_features, in_features = weight.shape
    if x.shape[-1] != in_features:
        raise ValueError(
            f"x has {x.shape[-1]} features, weight (out_features, in_features) takes {in_features}"
        )
    check_vector("bias", bias, out_features, "out_features")
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; use one of {ACTIVATIONS}")
    shape = (*x.shape[:-1], out_features)
    check_shape("residual", residual, shape, "the shape of the result")
    if not checked:
        check_contiguous(x=x, residual=residual, **({} if compressed else {"weight": weight}))
    if out is not None and backend.xp.may_share_memory(out, x):
        raise ValueError("out shares memory with x; a matmul cannot overwrite its input")
    result = output(backend, out, shape, x.dtype)
    backend.linear(
        as_rows(x, in_features),
        weight,
        bias,
        activation,
        as_rows(residual, out_features),
        as_rows(result, out_features),
        scratch_of(workspace, result),
        cache,
        method,
        prepared,
        activation_bits,
    )
    return result


@op
def embedding(
    ids: Array,
    weight: Array | RBEBlocks,
    dtype: Any = np.float32,
    out: Array | None = None,
    workspace: Workspace | None = None,
) -> Array:
    """y[..., :] = W[ids[...], :]; only the requested rows are decoded.

    Parameters
    ----------
    ids : integer array of any shape, 0 <= ids < rows. Other ids raise an `IndexError`; on a GPU, where that would
        need a host synchronisation, they give rows of NaN
    weight : (rows, cols): RBEVectors (rows are decoded one by one), RBEMatrix (whole block rows are) or dense
    dtype : of the result, for a compressed weight; a dense weight determines it

    Returns
    -------
    (*ids.shape, cols)
    """
    weight = cast(Any, weight)
    compressed = isinstance(weight, RBEBlocks)
    backend = backend_of(ids=ids, weight=weight, out=out)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"ids has dtype {ids.dtype}; use integers (ids.astype(numpy.int64))")
    if len(weight.shape) != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, needs (rows, cols)")
    if not compressed:
        check_float(weight=weight)
        check_contiguous(weight=weight)
    dtype = (np.dtype(dtype) if compressed else weight.dtype) if out is None else out.dtype
    if dtype not in FLOATS:
        raise TypeError(f"dtype {dtype} is not supported; use {FLOAT_NAMES}")
    rows, cols = weight.shape
    if backend.checks_values and ids.size and not (int(ids.min()) >= 0 and int(ids.max()) < rows):
        raise IndexError(f"ids run from {ids.min()} to {ids.max()}, but weight has rows 0 to {rows - 1}")
    if not compressed and dtype != weight.dtype:
        raise TypeError(f"out has dtype {dtype}, expected {weight.dtype} (the dtype of a dense weight)")
    out = output(backend, out, (*ids.shape, cols), dtype)
    flat = backend.xp.ascontiguousarray(ids).reshape(-1).astype(np.int64, copy=False)
    backend.embedding(flat, weight, out.reshape(-1, cols), scratch_of(workspace, out))
    return out

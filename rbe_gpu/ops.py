"""The ops: validate once, then hand over to the backend of the arrays.

Every function takes NumPy arrays, or CuPy arrays, or compressed weights over either, and runs where they are; an
array of another library on a GPU (PyTorch, JAX) is taken without a copy, and the result is a CuPy array. On a GPU
work is queued on CuPy's current stream and nothing waits for it. Activations are float32, float16 or bfloat16
(`ml_dtypes.bfloat16`), C-contiguous, and sums are taken in float32 or better. `out=`
receives the result and is returned; it may be the input itself for the elementwise ops and the norms.
`workspace=` keeps scratch memory between calls.

Wrong shapes are a `ValueError`, wrong array types, dtypes and devices a `TypeError`, a GPU without room a
`MemoryError`; all name the fix.
`rbe_gpu.reference` gives each op's exact meaning.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from math import prod, sqrt
from typing import Any, ParamSpec, TypeVar, cast

import ml_dtypes
import numpy as np

from .blocks import Array, RBEBlocks
from .cache import PanelCache
from .dispatch import Backend, accepted, backend_of, device_of, explained, module_of
from .workspace import Workspace

FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
_FLOAT32 = FLOATS[0]  # comparing dtypes takes 0.1 us, looking whether they are one object a quarter of it
ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu")
_FLOAT_NAMES = "float32, float16 or bfloat16"

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _op(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """An op whose arguments may be arrays of any library on a GPU.

    `backend_of`, first in every op, refuses what is neither NumPy's nor CuPy's; only then is it worth looking whether
    an argument is an array of another library.
    """

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            try:
                return function(*args, **kwargs)
            except TypeError:
                values: Any = [accepted(a) for a in args]
                named: Any = {name: accepted(a) for name, a in kwargs.items()}
                given = [*args, *kwargs.values()]
                if all(a is b for a, b in zip(given, [*values, *named.values()], strict=True)):
                    raise
            return function(*values, **named)
        except MemoryError as error:
            told = explained(error)
            raise told from (None if told is error else error)

    return call


# --- checks -------------------------------------------------------------------------------------------


def _is_plain(a: Array) -> bool:
    """Whether an array is float32 and C-contiguous, as most are: a look that saves two checks by name."""
    return a.dtype is _FLOAT32 and bool(a.flags.c_contiguous)


def _need_float(**arrays: Array | None) -> None:
    for name, a in arrays.items():
        if a is not None and a.dtype is not _FLOAT32 and a.dtype not in FLOATS:
            raise TypeError(f"{name} has dtype {a.dtype}; use {_FLOAT_NAMES} ({name}.astype(numpy.float32))")


def _need_contiguous(**arrays: Array | None) -> None:
    for name, a in arrays.items():
        if a is not None and not a.flags.c_contiguous:
            module = module_of(a).__name__
            raise ValueError(f"{name} is not C-contiguous; pass {module}.ascontiguousarray({name})")


def _need_shape(name: str, a: Array | None, shape: tuple[int, ...], why: str) -> None:
    if a is not None and a.shape != shape and tuple(a.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(a.shape)}, expected {tuple(shape)} ({why})")


def _need_rank(name: str, a: Array, least: int) -> None:
    if a.ndim < least:
        raise ValueError(f"{name} has {a.ndim} axes, needs at least {least}")


def _output(
    backend: Backend, out: Array | None, shape: tuple[int, ...], dtype: Any, name: str = "out"
) -> Array:
    """`out` checked, or a new array."""
    if out is None:
        return cast(Array, backend.xp.empty(shape, dtype))
    if type(out) is np.ndarray and out.dtype is dtype and out.shape == shape and out.flags.carray:
        return out
    if out.dtype != dtype:
        raise TypeError(f"{name} has dtype {out.dtype}, expected {np.dtype(dtype)}")
    _need_shape(name, out, shape, "the shape of the result")
    _need_contiguous(**{name: out})
    if not getattr(out.flags, "writeable", True):  # CuPy's always are
        raise ValueError(f"{name} is read-only; pass a writable array")
    return out


def _scratch(workspace: Workspace | None, a: Array) -> Workspace:
    """Scratch memory where `a` is."""
    return (workspace or Workspace()).on(device_of(a))


def _rows(a: Array | None, cols: int) -> Array | None:
    """The last axis kept, all others merged. No copy: the array is contiguous."""
    if a is None or (a.ndim == 2 and a.shape[1] == cols):
        return a
    return a.reshape(-1 if cols else prod(a.shape[:-1]), cols)


def _need_rows(x: Array) -> None:
    """x is an array, with a last axis."""
    if type(x) is not np.ndarray:
        backend_of(x=x)
    _need_rank("x", x, 1)


def _need_vector(name: str, a: Array | None, cols: int, what: str = "the last axis of x") -> None:
    if a is None or (a.shape == (cols,) and _is_plain(a)):
        return
    _need_float(**{name: a})
    _need_shape(name, a, (cols,), what)
    _need_contiguous(**{name: a})


# --- compressed weights -------------------------------------------------------------------------------


@_op
def decode(
    weight: RBEBlocks, dtype: Any = np.float32, out: Array | None = None, workspace: Workspace | None = None
) -> Array:
    """Decode a compressed weight: W = gain * (S_r C S_c^T + basis).

    Parameters
    ----------
    weight : RBEMatrix or RBEVectors
    dtype : float32, float16 or bfloat16; ignored when `out` is given
    out : array of weight.shape, C-contiguous

    Returns
    -------
    weight.shape, dtype
    """
    if not isinstance(weight, RBEBlocks):
        raise TypeError(f"weight is a {type(weight).__name__}; pass an RBEMatrix or RBEVectors")
    backend = backend_of(weight=weight, out=out)
    dtype = np.dtype(dtype) if out is None else out.dtype
    if dtype not in FLOATS:
        raise TypeError(f"dtype {dtype} is not supported; use {_FLOAT_NAMES}")
    out = _output(backend, out, weight.shape, dtype)
    backend.decode(weight, out.reshape(weight.rows, weight.cols), _scratch(workspace, out))
    return out


@_op
def linear(
    x: Array,
    weight: Array | RBEBlocks,
    bias: Array | None = None,
    activation: str | None = None,
    residual: Array | None = None,
    out: Array | None = None,
    workspace: Workspace | None = None,
    cache: PanelCache | None = None,
    method: str | None = None,
) -> Array:
    """y = activation(x W^T + bias) + residual.

    Parameters
    ----------
    x : (..., in_features) float32/float16/bfloat16
    weight : RBEMatrix, RBEVectors or dense array, (out_features, in_features)
    bias : (out_features,)
    activation : None, "relu", "gelu" (erf), "gelu_tanh" or "silu"
    residual : (..., out_features), added after the activation
    out : (..., out_features), dtype of x; must not share memory with x; may be `residual`
    cache : keeps decoded panels of a compressed weight between calls, under its byte budget
    method : the way a product with a compressed weight takes: "transform" (W is never decoded), "decode" (panels of
        it are) or "cache" (panels that `cache` keeps). None takes the one estimated cheapest on the CPU
        (`rbe_gpu.planner`); on a GPU, where the ways have not been timed yet, that of "transform" for up to 16 tokens
        and for dense and grid codes without a basis and half-precision x, and else that of "decode" with `cache`

    Returns
    -------
    (..., out_features), dtype of x
    """
    compressed = isinstance(weight, RBEBlocks)
    # next to a NumPy array, a weight in the same memory decides nothing more
    beside = None if compressed and type(x) is np.ndarray and weight.device == "cpu" else weight
    backend = backend_of(x=x, weight=beside, bias=bias, residual=residual, out=out)
    checked = compressed and residual is None and _is_plain(x)
    if not checked:
        _need_float(x=x, residual=residual, **({} if compressed else {"weight": weight}))
    _need_rank("x", x, 1)
    if len(weight.shape) != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, needs (out_features, in_features)")
    out_features, in_features = weight.shape
    if x.shape[-1] != in_features:
        raise ValueError(
            f"x has {x.shape[-1]} features, weight (out_features, in_features) takes {in_features}"
        )
    _need_vector("bias", bias, out_features, "out_features")
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; use one of {ACTIVATIONS}")
    shape = (*x.shape[:-1], out_features)
    _need_shape("residual", residual, shape, "the shape of the result")
    if not checked:
        _need_contiguous(x=x, residual=residual, **({} if compressed else {"weight": weight}))
    if out is not None and backend.xp.may_share_memory(out, x):
        raise ValueError("out shares memory with x; a product cannot be written over its input")
    result = _output(backend, out, shape, x.dtype)
    backend.linear(
        _rows(x, in_features),
        weight,
        bias,
        activation,
        _rows(residual, out_features),
        _rows(result, out_features),
        _scratch(workspace, result),
        cache,
        method,
    )
    return result


@_op
def embedding(
    ids: Array,
    weight: Array | RBEBlocks,
    dtype: Any = np.float32,
    out: Array | None = None,
    workspace: Workspace | None = None,
) -> Array:
    """y[..., :] = W[ids[...], :], decoding only the rows asked for.

    Parameters
    ----------
    ids : integer array of any shape, 0 <= ids < rows; otherwise an `IndexError`, or, on a GPU, where looking would
        mean waiting for it, rows of NaN
    weight : (rows, cols): RBEVectors (rows decode alone), RBEMatrix (with their block row) or dense
    dtype : of the result, for a compressed weight; a dense weight keeps its own

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
        _need_float(weight=weight)
        _need_contiguous(weight=weight)
    dtype = (np.dtype(dtype) if compressed else weight.dtype) if out is None else out.dtype
    if dtype not in FLOATS:
        raise TypeError(f"dtype {dtype} is not supported; use {_FLOAT_NAMES}")
    rows, cols = weight.shape
    if backend.checks_values and ids.size and not (int(ids.min()) >= 0 and int(ids.max()) < rows):
        raise IndexError(f"ids run from {ids.min()} to {ids.max()}, but weight has rows 0 to {rows - 1}")
    if not compressed and dtype != weight.dtype:
        raise TypeError(f"out has dtype {dtype}, expected {weight.dtype} (the dtype of a dense weight)")
    out = _output(backend, out, (*ids.shape, cols), dtype)
    flat = backend.xp.ascontiguousarray(ids).reshape(-1).astype(np.int64, copy=False)
    backend.embedding(flat, weight, out.reshape(-1, cols), _scratch(workspace, out))
    return out


# --- attention ----------------------------------------------------------------------------------------


@_op
def attention(
    q: Array,
    k: Array,
    v: Array,
    causal: bool = False,
    scale: float | None = None,
    mask: Array | None = None,
    lengths: Array | None = None,
    window: tuple[int, int] | None = None,
    out: Array | None = None,
    workspace: Workspace | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    return_lse: bool = False,
) -> Any:
    """o[i] = sum_j softmax_j(scale * q[i].k[j] + mask[i,j]) v[j], in O(seq) memory.

    With off = seq_k - seq_q, query i sees key j when j < lengths[batch], j <= i + off if `causal`, and
    i + off - left <= j <= i + off + right for `window=(left, right)`, -1 being no limit (FlashAttention's
    conventions). A query that sees no key gives zeros.

    Sequences of unlike lengths may be packed end to end, without padding: `cu_seqlens_q[b]` is where the queries
    of sequence b begin, `cu_seqlens_q[b + 1]` where they end, and so on for the keys (FlashAttention's varlen
    convention). seq_q and seq_k are then each sequence's own.

    Parameters
    ----------
    q : (batch, seq_q, num_heads, head_dim); the last axis contiguous, the others of any stride. Packed:
        (total_q, num_heads, head_dim)
    k, v : (batch, seq_k, num_kv_heads, head_dim), dtype of q; num_heads is a multiple of num_kv_heads
        (1: multi-query, fewer than num_heads: grouped-query attention). Packed: (total_k, num_kv_heads, head_dim)
    scale : 1/sqrt(head_dim) by default
    mask : broadcastable to (batch, num_heads, seq_q, seq_k); float32 is added to the scores, bool keeps
        where True
    lengths : (batch,) integers, valid keys of each sequence, 0 to seq_k; on a GPU they are cut to that, not checked
    cu_seqlens_q, cu_seqlens_k : (batch + 1,) int32/int64 from 0 to total_q and total_k, never falling; those of
        the keys are by default those of the queries. Not with `mask` or `lengths`. On a GPU they are not looked at
    return_lse : also return the log-sum-exp of the scores

    Returns
    -------
    Like q; with `return_lse` a pair (like q, lse): lse[b, h, i] = ln sum_j exp(scale * q[i].k[j] + mask[i,j]) over
    the keys that query i sees, -inf where it sees none, float32 (batch, num_heads, seq_q), packed (num_heads,
    total_q).

    References
    ----------
    Dao 2023, "FlashAttention-2"; Milakov and Gimelshein 2018, "Online normalizer calculation for softmax".
    """
    backend = backend_of(
        q=q,
        k=k,
        v=v,
        mask=mask,
        lengths=lengths,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        out=out,
    )
    _need_float(q=q)
    packed = cu_seqlens_q is not None
    axes = ("total", "heads", "head_dim") if packed else ("batch", "seq", "heads", "head_dim")
    for name, a in (("q", q), ("k", k), ("v", v)):
        if a.ndim != len(axes):
            raise ValueError(f"{name} has {a.ndim} axes, needs ({', '.join(axes)})")
        if a.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {a.dtype}, q has {q.dtype}; use one dtype")
        if a.size and a.shape[-1] > 1 and a.strides[-1] != a.itemsize:
            module = module_of(a).__name__
            raise ValueError(f"{name}'s last axis is not contiguous; pass {module}.ascontiguousarray({name})")
    *lead, seq_q, num_heads, head_dim = q.shape
    seq_k, num_kv_heads = k.shape[-3:-1]
    _need_shape("k", k, (*lead, seq_k, num_kv_heads, head_dim), "batch and head_dim of q")
    _need_shape("v", v, k.shape, "the shape of k")
    if not 1 <= head_dim <= 256:
        raise ValueError(f"head_dim={head_dim} is not supported; use 1 to 256")
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_heads={num_heads} is not a multiple of num_kv_heads={num_kv_heads}")
    cu_seqlens = None
    if packed:
        if mask is not None or lengths is not None:
            raise ValueError(
                "mask and lengths are for padded sequences; packed ones (cu_seqlens_q) take neither"
            )
        cu_q = _cumulative(backend, "cu_seqlens_q", cu_seqlens_q, "q", seq_q)
        if cu_seqlens_k is None and seq_k != seq_q:
            raise ValueError(f"k has {seq_k} rows, q has {seq_q}; pass cu_seqlens_k too")
        cu_k = (
            cu_q if cu_seqlens_k is None else _cumulative(backend, "cu_seqlens_k", cu_seqlens_k, "k", seq_k)
        )
        _need_shape("cu_seqlens_k", cu_k, cu_q.shape, "the shape of cu_seqlens_q")
        cu_seqlens = (cu_q, cu_k)
    elif cu_seqlens_k is not None:
        raise ValueError("cu_seqlens_k is given without cu_seqlens_q; packed sequences need cu_seqlens_q")
    if mask is not None:
        mask = _scores_mask(backend, mask, (*lead, num_heads, seq_q, seq_k))
    if lengths is not None:
        if lengths.dtype.kind not in "iu":
            raise TypeError(f"lengths has dtype {lengths.dtype}; use integers")
        _need_shape("lengths", lengths, tuple(lead), "one per sequence")
        if (
            backend.checks_values
            and lengths.size
            and not (int(lengths.min()) >= 0 and int(lengths.max()) <= seq_k)
        ):
            raise ValueError(f"lengths must be between 0 and seq_k={seq_k}")
        lengths = backend.xp.ascontiguousarray(lengths, np.int64)
    left, right = (-1, -1) if window is None else (int(window[0]), int(window[1]))
    if left < -1 or right < -1:
        raise ValueError(f"window={window} is not valid; use (left, right), each -1 (no limit) or more")
    out = _output(backend, out, q.shape, q.dtype)
    scale = 1.0 / sqrt(head_dim) if scale is None else float(scale)
    lse = backend.xp.empty((*lead, num_heads, seq_q), np.float32) if return_lse else None
    scratch = _scratch(workspace, out)
    backend.attention(
        q, k, v, bool(causal), scale, mask, lengths, (left, right), out, scratch, cu_seqlens, lse
    )
    return out if lse is None else (out, lse)


def _scores_mask(backend: Backend, mask: Array, shape: tuple[int, ...]) -> Array:
    """`mask` seen as (batch, num_heads, seq_q, seq_k)."""
    if mask.dtype != np.float32 and mask.dtype != np.bool_:
        raise TypeError(f"mask has dtype {mask.dtype}; use float32 (added) or bool (True keeps)")
    try:
        return backend.xp.broadcast_to(mask, shape)
    except ValueError:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, which does not broadcast to (batch, num_heads, seq_q, "
            f"seq_k) = {shape}"
        ) from None


def _cumulative(backend: Backend, name: str, ends: Array, rows: str, total: int) -> Array:
    """Cumulative lengths of packed sequences, checked, as int64."""
    if ends.dtype not in (np.int32, np.int64):
        raise TypeError(f"{name} has dtype {ends.dtype}; use int32 or int64")
    if ends.ndim != 1 or ends.size < 1:
        raise ValueError(f"{name} has shape {tuple(ends.shape)}, expected (batch + 1,)")
    if backend.checks_values and not (ends[0] == 0 and ends[-1] == total and (ends[1:] >= ends[:-1]).all()):
        raise ValueError(f"{name} must start at 0, never fall and end at {total}, the rows of {rows}")
    return backend.xp.ascontiguousarray(ends, np.int64)


# --- rows ---------------------------------------------------------------------------------------------


@_op
def softmax(x: Array, scale: float = 1.0, mask: Array | None = None, out: Array | None = None) -> Array:
    """y[r,c] = exp(s[r,c] - max s[r]) / sum_c exp(s[r,c] - max s[r]), s = scale * x + mask.

    Parameters
    ----------
    x : (..., cols); the softmax runs over the last axis
    mask : broadcastable to x; float32 is added, bool keeps where True. A row with nothing kept gives zeros.

    Returns
    -------
    Like x.
    """
    backend = backend_of(x=x, mask=mask, out=out)
    if not (x.dtype is _FLOAT32 and x.flags.c_contiguous):
        _need_float(x=x)
        _need_contiguous(x=x)
    if not x.ndim:
        _need_rank("x", x, 1)
    shape = x.shape
    result = _output(backend, out, shape, x.dtype)
    if mask is not None:
        mask = _rows_mask(backend, mask, shape)
    if x.size:
        if x.ndim == 2:
            backend.softmax(x, float(scale), mask, result)
        else:
            backend.softmax(_rows(x, shape[-1]), float(scale), mask, _rows(result, shape[-1]))
    return result


def _rows_mask(backend: Backend, mask: Array, shape: tuple[int, ...]) -> Array:
    """`mask` broadcast to `shape`, seen as rows."""
    if mask.dtype != np.float32 and mask.dtype != np.bool_:
        raise TypeError(f"mask has dtype {mask.dtype}; use float32 (added) or bool (True keeps)")
    try:
        mask = backend.xp.broadcast_to(mask, shape)
    except ValueError:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, which does not broadcast to {shape}") from None
    return mask.reshape(-1 if shape[-1] else prod(shape[:-1]), shape[-1])


def _norm(
    op: str,
    x: Array,
    weight: Array,
    bias: Array | None,
    eps: float,
    residual: Array | None,
    out: Array | None,
    residual_out: Array | None,
) -> Array:
    backend = backend_of(x=x, weight=weight, bias=bias, residual=residual, out=out, residual_out=residual_out)
    if not _is_plain(x):
        _need_float(x=x)
        _need_contiguous(x=x)
    _need_rank("x", x, 1)
    cols = x.shape[-1]
    _need_vector("weight", weight, cols)
    _need_vector("bias", bias, cols)
    if residual is not None:
        _need_shape("residual", residual, x.shape, "the shape of x")
        if residual.dtype != x.dtype:
            raise TypeError(f"residual has dtype {residual.dtype}, x has {x.dtype}; use one dtype")
        _need_contiguous(residual=residual)
    if eps < 0:
        raise ValueError(f"eps={eps} is negative")
    if residual_out is not None:
        _output(backend, residual_out, x.shape, x.dtype, "residual_out")
    result = _output(backend, out, x.shape, x.dtype)
    if x.size:
        rows = [residual, result, residual_out]
        if x.ndim != 2:
            x, *rows = (_rows(a, cols) for a in (x, *rows))
        if op == "rms_norm":
            backend.rms_norm(x, weight, float(eps), *rows)
        else:
            backend.layer_norm(x, weight, bias, float(eps), *rows)
    return result


@_op
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
    Like x. Source: Ba, Kiros and Hinton 2016.
    """
    return _norm("layer_norm", x, weight, bias, eps, residual, out, residual_out)


@_op
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
    Like x. Source: Zhang and Sennrich 2019.
    """
    return _norm("rms_norm", x, weight, None, eps, residual, out, residual_out)


# --- elementwise --------------------------------------------------------------------------------------


def _elementwise(
    op: str, x: Array, bias: Array | None, out: Array | None, cols_out: int, *extra: Any
) -> Array:
    backend = backend_of(x=x, bias=bias, out=out)
    cols = x.shape[-1]
    if not _is_plain(x):
        _need_float(x=x)
        _need_contiguous(x=x)
    _need_vector("bias", bias, cols)
    result = _output(backend, out, (*x.shape[:-1], cols_out), x.dtype)
    if x.size:
        rows = (x, result) if x.ndim == 2 else (_rows(x, cols), _rows(result, cols_out))
        getattr(backend, op)(rows[0], bias, *extra, rows[1])
    return result


@_op
def gelu(x: Array, bias: Array | None = None, approximate: str = "none", out: Array | None = None) -> Array:
    """y = t/2 (1 + erf(t/sqrt 2)), t = x + bias; `approximate="tanh"` for the tanh form.

    x : (..., cols); bias : (cols,). Returns like x. Source: Hendrycks and Gimpel 2016.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate={approximate!r} is not supported; use 'none' (erf) or 'tanh'")
    _need_rows(x)
    return _elementwise("gelu", x, bias, out, x.shape[-1], approximate)


@_op
def silu(x: Array, bias: Array | None = None, out: Array | None = None) -> Array:
    """y = t / (1 + exp(-t)), t = x + bias. x : (..., cols); bias : (cols,). Returns like x."""
    _need_rows(x)
    return _elementwise("silu", x, bias, out, x.shape[-1])


@_op
def swiglu(x: Array, bias: Array | None = None, out: Array | None = None) -> Array:
    """y = silu(gate) * up, x + bias = [gate | up] along the last axis.

    x : (..., 2n); bias : (2n,). Returns (..., n), dtype of x. Source: Shazeer 2020.
    """
    _need_rows(x)
    if x.shape[-1] % 2:
        raise ValueError(f"x has {x.shape[-1]} columns; swiglu needs an even number, [gate | up]")
    return _elementwise("swiglu", x, bias, out, x.shape[-1] // 2)


@_op
def dropout(
    x: Array,
    p: float,
    seed: int,
    offset: int = 0,
    residual: Array | None = None,
    out: Array | None = None,
) -> Array:
    """y[i] = x[i] / (1 - p) where element i is kept, else 0; plus residual[i].

    Element i is kept when word i % 4 of the Philox4x32-10 block with counter `offset + i // 4` and key `seed`
    is at least floor(p * 2^32): the same mask on every backend. A following call that must be independent
    takes offset + ceil(x.size / 4).

    Parameters
    ----------
    x : any shape
    p : probability of dropping, 0 <= p <= 1
    seed, offset : 0 <= value < 2^64

    Returns
    -------
    Like x. Source: Salmon et al. 2011.
    """
    backend = backend_of(x=x, residual=residual, out=out)
    _need_float(x=x)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p={p} is not a probability; use 0 to 1")
    for name, value in (("seed", seed), ("offset", offset)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name}={value} is out of range; use 0 to 2**64 - 1")
    _need_shape("residual", residual, x.shape, "the shape of x")
    if residual is not None and residual.dtype != x.dtype:
        raise TypeError(f"residual has dtype {residual.dtype}, x has {x.dtype}; use one dtype")
    _need_contiguous(x=x, residual=residual)
    result = _output(backend, out, x.shape, x.dtype)
    if x.size:
        flat = None if residual is None else residual.reshape(-1)
        backend.dropout(x.reshape(-1), float(p), int(seed), int(offset), flat, result.reshape(-1))
    return result

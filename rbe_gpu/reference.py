"""The definition of every op in float64 NumPy, written for reading.

Each docstring begins with the equation. Every backend is tested against these functions. Arguments are those of
`rbe_gpu.ops`, without `out` and `workspace`; results are float64 unless stated otherwise.
"""

from __future__ import annotations

from itertools import pairwise
from math import erf, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import transforms
from .blocks import RBEBlocks, RBEMatrix
from .codecs import DenseCodes, GridCodes, SparseCodes, packing

F64 = NDArray[np.float64]


# --- compressed weights -------------------------------------------------------------------------------


def coefficients(weight: RBEBlocks) -> F64:
    """C[row, col] from the stored codes, without `gain`. Returns (rows_pad, cols_pad)."""
    rows, cols = weight.rows_pad, weight.cols_pad
    codes = weight.codes
    if isinstance(codes, DenseCodes):
        u = packing.unpack(codes.value, codes.bits, cols).astype(np.float64)
        scale = np.repeat(codes.scale.astype(np.float64), codes.group, axis=1)[:, :cols]
        return np.asarray(scale * (u - (2**codes.bits - 1) / 2))
    if isinstance(codes, GridCodes):
        q = codes.integers().astype(np.float64)
        step = np.outer(codes.row_scale.astype(np.float64), codes.col_scale.astype(np.float64))
        return np.asarray(step * (q - np.sign(q) * codes.shrink))
    assert isinstance(codes, SparseCodes), codes.name
    c = np.zeros((rows, cols))
    values = sparse_values(codes)
    for row in range(rows):
        start, stop = int(codes.row_start[row]), int(codes.row_start[row + 1])
        if codes.index_kind == "full":
            at = np.arange(cols)
        elif codes.index_kind == "bitmap":
            assert codes.index is not None
            at = np.flatnonzero(np.unpackbits(codes.index[row], bitorder="little")[:cols])
        else:
            assert codes.index is not None
            at = np.cumsum(codes.index[start:stop].astype(np.int64) + 1) - 1
        c[row, at] = values[start:stop]
    return c


def sparse_values(codes: SparseCodes) -> F64:
    """The values of sparse codes in stored order, (entries,)."""
    if codes.value_kind in ("f32", "f16"):
        return np.asarray(codes.value, np.float64)
    assert codes.scale is not None
    u = packing.unpack(codes.value, codes.bits, codes.entries).astype(np.float64)
    half = 2 ** (codes.bits - 1)
    magnitude = np.where(u >= half, u - half, half - 1 - u)
    scale = np.repeat(codes.scale.astype(np.float64), codes.group)[: codes.entries]
    return np.asarray(np.where(u >= half, 1.0, -1.0) * (codes.dead_zone + scale * (magnitude + 0.5)))


def decode(weight: RBEBlocks) -> F64:
    """W = gain * (S_r C S_c^T + sum_k p_k Phi_k), block by block; padding is cut off."""
    b = weight.block
    s = transforms.synthesis(weight.transform, b)
    w = coefficients(weight)
    for i in range(0, weight.rows_pad, weight.row_block):
        for j in range(0, weight.cols_pad, b):
            tile = w[i : i + weight.row_block, j : j + b]
            tile = s @ tile if weight.row_transformed else tile
            tile = tile @ s.T if weight.col_transformed else tile
            if weight.basis is not None:
                p = np.asarray(weight.basis[i // weight.row_block, j // b], np.float64)
                phi = transforms.basis_2d(b) if isinstance(weight, RBEMatrix) else transforms.basis_1d(b)
                tile = tile + np.tensordot(p, phi, axes=1)
            w[i : i + weight.row_block, j : j + b] = tile
    return np.asarray(weight.gain * w[: weight.rows, : weight.cols], np.float64).reshape(weight.shape)


def dense(weight: Any) -> F64:
    """A weight as a dense float64 array, compressed or not."""
    return decode(weight) if isinstance(weight, RBEBlocks) else np.asarray(weight, np.float64)


# --- matmul and look-ups ------------------------------------------------------------------------------


def linear(x: Any, weight: Any, bias: Any = None, activation: str | None = None, residual: Any = None) -> F64:
    """y = activation(x W^T + bias) + residual."""
    y = np.asarray(x, np.float64) @ dense(weight).T
    if bias is not None:
        y = y + np.asarray(bias, np.float64)
    y = np.asarray(ACTIVATIONS[activation](y), np.float64)
    return np.asarray(y if residual is None else y + np.asarray(residual, np.float64))


def int8_activations(x: Any, scales: Any) -> tuple[Any, Any]:
    """z = round(127 x s / a), a = max |x s| of a token: int8 activations, and a token's scale a / 127.

    All in float32, one operation after the other, ties to even: z is defined bit by bit. A token with a value that is
    not finite has z = 0 and scale NaN.

    Parameters
    ----------
    x : (tokens, columns) float32, through the weight's input transform
    scales : (columns,) float32, the column scales of grid codes, or ones

    Returns
    -------
    z : (tokens, columns) int8
    scale : (tokens,) float32
    """
    scaled = np.asarray(x, np.float32) * np.asarray(scales, np.float32)
    finite = np.isfinite(scaled).all(axis=1)
    scaled[~finite] = 0
    absmax = np.maximum(np.abs(scaled).max(axis=1, initial=0), np.float32(1e-30))
    z = np.rint(scaled * (np.float32(127) / absmax)[:, None]).astype(np.int8)
    return z, np.where(finite, absmax / np.float32(127), np.float32(np.nan))


def linear_int8(
    x: Any, weight: RBEBlocks, bias: Any = None, activation: str | None = None, residual: Any = None
) -> F64:
    """`linear` of (tokens, in_features) with int8 activations; the sums over columns are exact.

    Grid codes: y^[r] = gain row_scale[r] scale[t] sum_k q[r, k] z[k, t]. Dense codes: the same of q + 1/2, with a
    scale for every group of columns. The weight's output transform follows.
    """
    b, codes = weight.block, weight.codes
    assert isinstance(codes, GridCodes | DenseCodes)
    x = np.asarray(x, np.float32)
    x = np.pad(x, ((0, 0), (0, weight.cols_pad - x.shape[1])))
    s = transforms.synthesis(weight.transform, b)
    if weight.col_transformed:
        x = np.asarray((x.reshape(len(x), -1, b) @ s).reshape(x.shape), np.float32)
    if isinstance(codes, GridCodes):
        z, scale = int8_activations(x, codes.col_scale)
        y = (z.astype(np.float64) @ codes.integers().astype(np.float64).T) * codes.row_scale.astype(
            np.float64
        )
    else:
        u = packing.unpack(codes.value, codes.bits, weight.cols_pad)
        z, scale = int8_activations(x, np.ones(weight.cols_pad))
        steps = np.repeat(codes.scale.astype(np.float64), codes.group, axis=1)[:, : weight.cols_pad]
        y = z.astype(np.float64) @ ((u - (2**codes.bits - 1) / 2) * steps).T
    y = weight.gain * y * scale.astype(np.float64)[:, None]
    if weight.row_transformed:
        y = (y.reshape(len(y), -1, b) @ s.T).reshape(y.shape)
    y = y[:, : weight.rows] + (0 if bias is None else np.asarray(bias, np.float64))
    y = np.asarray(ACTIVATIONS[activation](y), np.float64)
    return np.asarray(y if residual is None else y + np.asarray(residual, np.float64))


def embedding(ids: Any, weight: Any) -> F64:
    """y[..., :] = W[ids[...], :]."""
    return np.asarray(dense(weight)[np.asarray(ids)])


def attention(
    q: Any,
    k: Any,
    v: Any,
    causal: bool = False,
    scale: float | None = None,
    mask: Any = None,
    lengths: Any = None,
    window: tuple[int, int] | None = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    return_lse: bool = False,
    softcap: float | None = None,
) -> Any:
    """o[i] = sum_j softmax_j(scale * q[i].k[j] + mask[i,j]) v[j] over the keys j that query i may see.

    With off = seq_k - seq_q, query i sees key j when j < length, j <= i + off (causal), and
    i + off - left <= j <= i + off + right (window; -1 is no limit). A query that sees nothing gives zeros.

    With `return_lse` a pair: o, and lse[i] = ln sum_j exp(scale * q[i].k[j] + mask[i,j]), -inf where nothing is
    seen. Packed sequences (`cu_seqlens_q`) attend each for itself, with the first rows and columns of the mask.
    With `softcap` c, c tanh(scale * q[i].k[j] / c) stands in the place of scale * q[i].k[j].
    """
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    if cu_seqlens_q is not None:
        cu_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        o, lse = np.zeros_like(q), np.zeros((q.shape[1], q.shape[0]))
        for b in range(len(cu_seqlens_q) - 1):
            own, keys = slice(*cu_seqlens_q[b : b + 2]), slice(*cu_k[b : b + 2])
            shape = (1, q.shape[1], own.stop - own.start, keys.stop - keys.start)
            part = None if mask is None else _mask_of(np.asarray(mask), len(cu_seqlens_q) - 1, b, shape)
            alone = _attend(
                q[None, own], k[None, keys], v[None, keys], causal, scale, part, None, window, softcap
            )
            o[own], lse[:, own] = alone[0][0], alone[1][0]
    else:
        o, lse = _attend(q, k, v, causal, scale, mask, lengths, window, softcap)
    return (o, lse) if return_lse else o


def _mask_of(mask: Any, batch: int, b: int, shape: tuple[int, ...]) -> Any:
    """The part of a mask (..., rows, columns) of packed sequences for sequence b, of this shape."""
    full = np.broadcast_to(mask, (batch, shape[1], *mask.shape[-2:]))
    return full[b : b + 1, :, : shape[2], : shape[3]]


def _attend(
    q: F64,
    k: F64,
    v: F64,
    causal: bool,
    scale: float | None,
    mask: Any,
    lengths: Any,
    window: Any,
    softcap: float | None,
) -> tuple[F64, F64]:
    """`attention` of padded sequences: o and lse."""
    batch, seq_q, num_heads, head_dim = q.shape
    seq_k, num_kv_heads = k.shape[1], k.shape[2]
    scale = 1.0 / sqrt(head_dim) if scale is None else scale
    left, right = (-1, -1) if window is None else window
    if causal:
        right = 0
    i = np.arange(seq_q)[:, None] + (seq_k - seq_q)
    j = np.arange(seq_k)[None, :]
    visible = np.ones((seq_q, seq_k), bool)
    if left >= 0:
        visible &= j >= i - left
    if right >= 0:
        visible &= j <= i + right
    if mask is not None:
        mask = np.broadcast_to(np.asarray(mask), (batch, num_heads, seq_q, seq_k))
    out, lse = np.zeros_like(q), np.zeros((batch, num_heads, seq_q))
    for b in range(batch):
        for h in range(num_heads):
            kv = h // (num_heads // num_kv_heads)
            scores = scale * (q[b, :, h] @ k[b, :, kv].T)
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            seen = visible if lengths is None else visible & (j < int(lengths[b]))
            if mask is not None and mask.dtype == bool:
                seen = seen & mask[b, h]
            elif mask is not None:
                scores = scores + mask[b, h].astype(np.float64)
            scores = np.where(seen, scores, -np.inf)
            weights = softmax(scores)
            top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
            with np.errstate(invalid="ignore", divide="ignore"):
                total = np.exp(scores - np.where(top == -np.inf, 0.0, top)).sum(axis=-1)
                lse[b, h] = top[:, 0] + np.log(total)
            # an unseen key contributes nothing, whatever its value holds
            for r in range(seq_q):
                use = seen[r] & (scores[r] != -np.inf)
                out[b, r, h] = weights[r, use] @ v[b, use, kv] if use.any() else 0.0
    return out, lse


# --- rows ---------------------------------------------------------------------------------------------


def softmax(x: Any, scale: float = 1.0, mask: Any = None) -> F64:
    """y[r,c] = exp(s[r,c] - max s[r]) / sum_c exp(s[r,c] - max s[r]), s = scale * x + mask.

    A boolean mask keeps where it is True. A row whose every s is -inf gives zeros.
    """
    s = scale * np.asarray(x, np.float64)
    if mask is not None:
        mask = np.asarray(mask)
        s = np.where(mask, s, -np.inf) if mask.dtype == bool else s + mask.astype(np.float64)
    top = s.max(axis=-1, keepdims=True, initial=-np.inf)
    with np.errstate(invalid="ignore"):
        e = np.exp(s - np.where(top == -np.inf, 0.0, top))
        total = e.sum(axis=-1, keepdims=True)
        return np.asarray(e / np.where(total == 0.0, 1.0, total))


def layer_norm(
    x: Any, weight: Any, bias: Any = None, eps: float = 1e-5, residual: Any = None
) -> tuple[F64, F64]:
    """y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias, s = x + residual. Returns (y, s)."""
    s = np.asarray(x, np.float64)
    s = s if residual is None else s + np.asarray(residual, np.float64)
    centred = s - s.mean(axis=-1, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps) * np.asarray(weight, np.float64)
    return (y if bias is None else y + np.asarray(bias, np.float64)), s


def rms_norm(x: Any, weight: Any, eps: float = 1e-6, residual: Any = None) -> tuple[F64, F64]:
    """y = s / sqrt(mean(s^2) + eps) * weight, s = x + residual. Returns (y, s)."""
    s = np.asarray(x, np.float64)
    s = s if residual is None else s + np.asarray(residual, np.float64)
    return s / np.sqrt((s**2).mean(axis=-1, keepdims=True) + eps) * np.asarray(weight, np.float64), s


def l2_normalize(x: Any, eps: float = 1e-12) -> F64:
    """y = x / max(||x||_2, eps) over the last axis."""
    x = np.asarray(x, np.float64)
    with np.errstate(invalid="ignore"):
        return np.asarray(x / np.maximum(np.sqrt((x**2).sum(axis=-1, keepdims=True)), eps))


def mean_pool(x: Any, lengths: Any = None, cu_seqlens: Any = None) -> F64:
    """y[b] = sum_t x[t] / n[b] over the n[b] tokens t of sequence b; zeros where n[b] = 0."""
    x = np.asarray(x, np.float64)
    if cu_seqlens is not None:
        sequences = [x[start:stop] for start, stop in pairwise(cu_seqlens)]
    elif lengths is not None:
        sequences = [sequence[:length] for sequence, length in zip(x, lengths, strict=True)]
    else:
        sequences = list(x)
    y = np.zeros((len(sequences), x.shape[-1]))
    for b, tokens in enumerate(sequences):
        if len(tokens):
            y[b] = tokens.sum(axis=0) / len(tokens)
    return y


# --- elementwise --------------------------------------------------------------------------------------


def _biased(x: Any, bias: Any) -> F64:
    t: F64 = np.asarray(x, np.float64)
    return t if bias is None else np.asarray(t + np.asarray(bias, np.float64))


def gelu(x: Any, bias: Any = None, approximate: str = "none") -> F64:
    """y = t/2 (1 + erf(t / sqrt 2)), or t/2 (1 + tanh(sqrt(2/pi) (t + 0.044715 t^3))); t = x + bias.

    -inf gives 0 (the limit), as +inf gives +inf.
    """
    t = _biased(x, bias)
    with np.errstate(invalid="ignore", over="ignore"):
        if approximate == "tanh":
            y = t * 0.5 * (1 + np.tanh(sqrt(2 / np.pi) * (t + 0.044715 * t**3)))
        else:
            y = t * 0.5 * (1 + np.vectorize(erf, otypes=[np.float64])(t / sqrt(2)))
    return np.asarray(np.where(t == -np.inf, 0.0, y))


def silu(x: Any, bias: Any = None) -> F64:
    """y = t / (1 + exp(-t)), t = x + bias. -inf gives 0 (the limit)."""
    t = _biased(x, bias)
    with np.errstate(over="ignore", invalid="ignore"):
        y = t / (1 + np.exp(-t))
    return np.asarray(np.where(t == -np.inf, 0.0, y))


def swiglu(x: Any, bias: Any = None) -> F64:
    """y = silu(t[..., :n]) * t[..., n:], t = x + bias, n half of the last axis.

    silu of a finite number other than 0 is not 0, also where exp leaves the range of float64: times Inf it is Inf.
    """
    t = _biased(x, bias)
    n = t.shape[-1] // 2
    gate, up = t[..., :n], t[..., n:]
    with np.errstate(invalid="ignore", over="ignore"):
        return np.asarray(np.where(np.isinf(up) & np.isfinite(gate), gate * up, silu(gate) * up))


def rope(x: Any, cos: Any, sin: Any, positions: Any = None, interleaved: bool = False) -> F64:
    """y[a] = x[a] c[j] - x[b] s[j], y[b] = x[b] c[j] + x[a] s[j], c = cos[p], s = sin[p].

    Pair j of a head is (a, b) = (j, j + half), or (2j, 2j + 1) if interleaved, for j < half, the columns of cos. p is
    the position of the token, 0, 1, 2, ... along the third axis from the last by default. The other features stay.
    """
    x = np.asarray(x, np.float64)
    p = np.arange(x.shape[-3]) if positions is None else np.asarray(positions)
    c, s = (np.asarray(table, np.float64)[p][..., None, :] for table in (cos, sin))  # one row for all heads
    half = c.shape[-1]
    a, b = slice(0, half), slice(half, 2 * half)
    if interleaved:
        a, b = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    y: F64 = x.copy()
    with np.errstate(invalid="ignore"):
        y[..., a] = x[..., a] * c - x[..., b] * s
        y[..., b] = x[..., b] * c + x[..., a] * s
    return y


ACTIVATIONS: dict[str | None, Any] = {
    None: lambda t: t,
    "relu": lambda t: np.where(np.isnan(t), t, np.maximum(t, 0.0)),
    "gelu": gelu,
    "gelu_tanh": lambda t: gelu(t, approximate="tanh"),
    "silu": silu,
}


# --- dropout ------------------------------------------------------------------------------------------


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Ten rounds of Philox4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def dropout_keep(count: int, p: float, seed: int, offset: int = 0) -> NDArray[np.bool_]:
    """Which elements stay: word i % 4 of Philox block offset + i // 4 is at least floor(p 2^32)."""
    words = np.empty((-(-count // 4), 4), np.uint64)
    for block in range(len(words)):
        n = (offset + block) % 2**64
        words[block] = philox4x32((n & 0xFFFFFFFF, n >> 32, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))
    return np.asarray(words.reshape(-1)[:count] >= np.uint64(int(p * 2**32)))


def dropout(x: Any, p: float, seed: int, offset: int = 0, residual: Any = None) -> F64:
    """y[i] = x[i] / (1 - p) where element i is kept, else 0; plus residual[i]."""
    x = np.asarray(x, np.float64)
    keep = dropout_keep(x.size, p, seed, offset).reshape(x.shape)
    y = np.where(keep, x / (1 - p) if p < 1 else 0.0, 0.0)
    return y if residual is None else y + np.asarray(residual, np.float64)


def add(x: Any, residual: Any) -> F64:
    """y = x + residual."""
    return np.asarray(x, np.float64) + np.asarray(residual, np.float64)

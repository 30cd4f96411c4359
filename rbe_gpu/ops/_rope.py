"""rope: rotary position embedding."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..blocks import Array
from ..dispatch import Backend, backend_of
from ._checks import FLOAT32, check_contiguous, check_float, check_shape, is_plain, op, output


@op
def rope(
    x: Array,
    cos: Array,
    sin: Array,
    positions: Array | None = None,
    interleaved: bool = False,
    out: Array | None = None,
) -> Array:
    """y[a] = x[a] c[j] - x[b] s[j], y[b] = x[b] c[j] + x[a] s[j], c = cos[p], s = sin[p], for pair j of every head.

    Features from rotary_dim on are copied. In float32, rounded once to the dtype of x.

    Parameters
    ----------
    x : (..., seq, num_heads, head_dim): padded (batch, seq, num_heads, head_dim) or packed (tokens, num_heads,
        head_dim)
    cos, sin : (max_positions, rotary_dim / 2) float32, rotary_dim even, 2 to head_dim: of the angles
        p * theta ** (-2 j / rotary_dim), theta for instance 10000, with whatever scaling a model has
    positions : p of every token, x.shape[:-2] int32/int64; None: 0, 1, 2, ... along seq. Positions outside 0 to
        max_positions - 1 raise a `ValueError`; on a GPU, where that would need a host synchronisation, they are
        clamped
    interleaved : pair j is (2j, 2j + 1), as in GPT-J; otherwise (j, j + rotary_dim / 2), as in GPT-NeoX and in
        Hugging Face's Llama
    out : like x; may be x

    Returns
    -------
    Like x. Source: Su et al. 2021, "RoFormer".
    """
    backend = backend_of(x=x, cos=cos, sin=sin, positions=positions, out=out)
    if not is_plain(x):
        check_float(x=x)
        check_contiguous(x=x)
    if x.ndim < 3:
        raise ValueError(f"x has {x.ndim} axes, needs (..., seq, num_heads, head_dim)")
    seq, heads, head_dim = x.shape[-3:]
    _check_tables(cos, sin, head_dim)
    if positions is not None:
        positions = _checked_positions(backend, positions, x.shape[:-2], cos.shape[0])
    elif seq > cos.shape[0]:
        raise ValueError(
            f"x has {seq} tokens along seq, but cos and sin have {cos.shape[0]} rows; make longer tables or pass "
            "positions"
        )
    result = output(backend, out, x.shape, x.dtype)
    if x.size:
        y = result
        if x.ndim != 4:
            y = result.reshape(-1, seq, heads, head_dim)
            x = y if result is x else x.reshape(y.shape)
        backend.rope(x, cos, sin, positions, bool(interleaved), y)
    return result


def _check_tables(cos: Array, sin: Array, head_dim: int) -> None:
    for name, a in (("cos", cos), ("sin", sin)):
        if is_plain(a):
            continue
        if a.dtype != FLOAT32:
            raise TypeError(f"{name} has dtype {a.dtype}; use float32 ({name}.astype(numpy.float32))")
        check_contiguous(**{name: a})
    if cos.ndim != 2 or not cos.shape[0]:
        raise ValueError(
            f"cos has shape {tuple(cos.shape)}, needs (max_positions, rotary_dim / 2), max_positions from 1 on"
        )
    if not 2 <= 2 * cos.shape[1] <= head_dim:
        raise ValueError(
            f"cos has {cos.shape[1]} columns, one per pair; for a head_dim of {head_dim} use 1 to {head_dim // 2}"
        )
    check_shape("sin", sin, cos.shape, "the shape of cos")


def _checked_positions(backend: Backend, positions: Array, shape: tuple[int, ...], rows: int) -> Any:
    """Positions as one contiguous axis of int32 or int64."""
    if positions.dtype not in (np.int32, np.int64):
        raise TypeError(
            f"positions has dtype {positions.dtype}; use int32 or int64 (positions.astype(numpy.int64))"
        )
    check_shape("positions", positions, shape, "one per token, x.shape[:-2]")
    if backend.checks_values and positions.size and not 0 <= positions.min() <= positions.max() < rows:
        wrong = positions[(positions < 0) | (positions >= rows)]
        raise ValueError(f"positions has {wrong[0]}; cos and sin have rows for 0 to {rows - 1}")
    return backend.xp.ascontiguousarray(positions).reshape(-1)

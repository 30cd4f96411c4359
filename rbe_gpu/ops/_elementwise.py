"""gelu, silu, swiglu, dropout and add: ops on every element."""

from __future__ import annotations

from typing import Any

from ..blocks import Array
from ..dispatch import backend_of
from ._checks import (
    as_rows,
    check_contiguous,
    check_float,
    check_residual,
    check_rows,
    check_vector,
    is_plain,
    op,
    output,
)


def _elementwise(
    name: str, x: Array, bias: Array | None, out: Array | None, cols_out: int, *extra: Any
) -> Array:
    backend = backend_of(x=x, bias=bias, out=out)
    cols = x.shape[-1]
    if not is_plain(x):
        check_float(x=x)
        check_contiguous(x=x)
    check_vector("bias", bias, cols)
    result = output(backend, out, (*x.shape[:-1], cols_out), x.dtype)
    if x.size:
        rows = (x, result) if x.ndim == 2 else (as_rows(x, cols), as_rows(result, cols_out))
        getattr(backend, name)(rows[0], bias, *extra, rows[1])
    return result


@op
def gelu(x: Array, bias: Array | None = None, approximate: str = "none", out: Array | None = None) -> Array:
    """y = t/2 (1 + erf(t/sqrt 2)), t = x + bias; `approximate="tanh"` for the tanh form.

    x : (..., cols); bias : (cols,). Returns like x. Source: Hendrycks and Gimpel 2016.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate={approximate!r} is not supported; use 'none' (erf) or 'tanh'")
    check_rows(x)
    return _elementwise("gelu", x, bias, out, x.shape[-1], approximate)


@op
def silu(x: Array, bias: Array | None = None, out: Array | None = None) -> Array:
    """y = t / (1 + exp(-t)), t = x + bias. x : (..., cols); bias : (cols,). Returns like x."""
    check_rows(x)
    return _elementwise("silu", x, bias, out, x.shape[-1])


@op
def swiglu(x: Array, bias: Array | None = None, out: Array | None = None) -> Array:
    """y = silu(gate) * up, x + bias = [gate | up] along the last axis.

    x : (..., 2n); bias : (2n,). Returns (..., n), dtype of x. Source: Shazeer 2020.
    """
    check_rows(x)
    if x.shape[-1] % 2:
        raise ValueError(f"x has {x.shape[-1]} columns; swiglu needs an even number, [gate | up]")
    return _elementwise("swiglu", x, bias, out, x.shape[-1] // 2)


@op
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
    check_float(x=x)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p={p} is not a probability; use 0 to 1")
    for name, value in (("seed", seed), ("offset", offset)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name}={value} is out of range; use 0 to 2**64 - 1")
    if residual is not None:
        check_residual(x, residual)
    check_contiguous(x=x)
    result = output(backend, out, x.shape, x.dtype)
    if x.size:
        flat = None if residual is None else residual.reshape(-1)
        backend.dropout(x.reshape(-1), float(p), int(seed), int(offset), flat, result.reshape(-1))
    return result


@op
def add(x: Array, residual: Array, out: Array | None = None) -> Array:
    """y = x + residual.

    x : any shape; residual : like x. Returns like x.
    """
    backend = backend_of(x=x, residual=residual, out=out)
    if not is_plain(x):
        check_float(x=x)
        check_contiguous(x=x)
    check_residual(x, residual)
    result = output(backend, out, x.shape, x.dtype)
    if x.size:
        backend.add(x.reshape(-1), residual.reshape(-1), result.reshape(-1))
    return result

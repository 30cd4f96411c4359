"""layer_norm: y[r,c] = (s[r,c] - mean s[r]) / sqrt(var s[r] + eps) * weight[c] + bias[c], s = x + residual."""

from __future__ import annotations

from typing import Any

from ._execute import run
from ._launch import Launch
from ._rows import norm_launches


def launches(
    x: Any, weight: Any, bias: Any, eps: float, residual: Any, out: Any, residual_out: Any
) -> tuple[Launch, ...]:
    """The launch of `layer_norm`, from shapes, dtypes and addresses."""
    return norm_launches("layer_norm", x, weight, bias, eps, residual, out, residual_out)


def layer_norm(
    x: Any, weight: Any, bias: Any, eps: float, residual: Any, out: Any, residual_out: Any
) -> None:
    """Write the normalised rows of s = x + residual to `out`, and s to `residual_out`.

    Parameters
    ----------
    x, residual, out, residual_out : (rows, cols) float32/float16/bfloat16, one dtype, C-contiguous; the second
        and the last may be None. `out` or `residual_out` may be `x` or `residual`.
    weight, bias : (cols,), each of any of the three dtypes; bias may be None
    """
    run(*launches(x, weight, bias, eps, residual, out, residual_out))

"""rms_norm: y[r,c] = s[r,c] / sqrt(mean_c(s[r]^2) + eps) * weight[c], s = x + residual."""

from __future__ import annotations

from typing import Any

from ._execute import run
from ._launch import Launch
from ._rows import norm_launches


def launches(
    x: Any, weight: Any, eps: float, residual: Any, out: Any, residual_out: Any
) -> tuple[Launch, ...]:
    """The launch of `rms_norm`, from shapes, dtypes and addresses."""
    return norm_launches("rms_norm", x, weight, None, eps, residual, out, residual_out)


def rms_norm(x: Any, weight: Any, eps: float, residual: Any, out: Any, residual_out: Any) -> None:
    """Write the normalised rows of s = x + residual to `out`, and s to `residual_out`.

    Parameters
    ----------
    x, residual, out, residual_out : (rows, cols) float32/float16/bfloat16, one dtype, C-contiguous; the second
        and the last may be None. `out` or `residual_out` may be `x` or `residual`.
    weight : (cols,) of any of the three dtypes
    """
    run(*launches(x, weight, eps, residual, out, residual_out))

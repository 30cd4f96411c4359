"""gelu: y = t/2 (1 + erf(t / sqrt 2)), or t/2 (1 + tanh(sqrt(2/pi) (t + 0.044715 t^3))), t = x + bias."""

from __future__ import annotations

from typing import Any

from ._elements import map_elements
from ._execute import run
from ._launch import Launch

_VARIANT = {"none": "_erf", "tanh": "_tanh"}


def launches(x: Any, bias: Any, approximate: str, out: Any) -> tuple[Launch, ...]:
    """The launch of `gelu`, from shapes, dtypes and addresses."""
    return map_elements("gelu", _VARIANT[approximate], x, bias, out)


def gelu(x: Any, bias: Any, approximate: str, out: Any) -> None:
    """Write gelu(x + bias) to `out`.

    Parameters
    ----------
    x, out : (rows, cols) float32/float16/bfloat16, C-contiguous; `out` may be `x`
    bias : (cols,) of any of the three dtypes, or None
    approximate : "none" (erf) or "tanh"
    """
    run(*launches(x, bias, approximate, out))

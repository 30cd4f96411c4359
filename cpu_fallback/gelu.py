"""gelu: y = t/2 (1 + erf(t / sqrt 2)), or t/2 (1 + tanh(sqrt(2/pi) (t + 0.044715 t^3))), t = x + bias.

The erf form is `simd_math.vgelu`: t Phi(t), with the normal tail as a power of two. The tanh form is computed as
t / (1 + exp(-2 sqrt(2/pi) (t + 0.044715 t^3))), the same function with one exponential.
Source: Hendrycks and Gimpel 2016, "Gaussian error linear units".
"""

from __future__ import annotations

from math import pi, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._jit import cpu_inline
from ._parts import LINE, in_parts
from ._pool import num_threads
from .simd import bits, vadd, vdiv, vfma, vload, vload_n, vmax, vmul, vsplat, vstore, vstore_n
from .simd_math import vexp, vgelu

_PARALLEL_FROM = 16384  # elements: 9/9 us with one/two threads at 16384, 17/13 us at 32768
_LOWEST = np.finfo(np.float32).min
_ONE = np.float32(1.0)
_LINEAR = np.float32(-2 * sqrt(2 / pi))
_CUBIC = np.float32(-2 * sqrt(2 / pi) * 0.044715)


@cpu_inline
def _gelu(t, tanh):
    if tanh:
        t = vmax(vsplat(_LOWEST), t)  # -inf * 0 would be NaN; NaN, the second argument, stays
        power = vexp(vmul(t, vfma(vmul(t, t), vsplat(_CUBIC), vsplat(_LINEAR))))
        y = vdiv(t, vadd(vsplat(_ONE), power))
    else:
        y = vgelu(t)
    return y


def _span(x, bias, tanh, out, start, stop):
    """Elements start..stop of the flat arrays, one run after another of what lies in one row."""
    cols = x.shape[1]
    at = start
    while at < stop:
        col = 0 if bias is None else at % cols
        count = stop - at if bias is None else min(cols - col, stop - at)
        whole = count - count % 16
        for i in range(0, whole, 16):
            t = vload(x, at + i)
            if bias is not None:
                t = vadd(t, vload(bias, col + i))
            vstore(out, at + i, _gelu(t, tanh))
        if whole < count:
            left = count - whole
            t = vload_n(x, at + whole, left)
            if bias is not None:
                t = vadd(t, vload_n(bias, col + whole, left))
            vstore_n(out, at + whole, _gelu(t, tanh), left)
        at += count


_in_parts = in_parts(_span, LINE)


def gelu(x: NDArray[Any], bias: NDArray[Any] | None, approximate: str, out: NDArray[Any]) -> None:
    """Write gelu(x + bias) to `out`.

    Parameters
    ----------
    x, out : (rows, cols) float32/float16/bfloat16, C-contiguous; `out` may be `x`
    bias : (cols,) of any of the three dtypes, or None
    approximate : "none" (erf) or "tanh"
    """
    arrays = (bits(x), None if bias is None else bits(bias), approximate == "tanh", bits(out))
    parts = num_threads() if x.size >= _PARALLEL_FROM else 1
    _in_parts(x.size, parts, *arrays)

"""silu: y = t / (1 + exp(-t)), t = x + bias.

exp overflows to Inf from 88.7 on, so a t below -88.7 gives 0; the exact value is under 3e-37 there.
Source: Elfwing, Uchibe and Doya 2017, "Sigmoid-weighted linear units".
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._jit import cpu_inline
from ._parts import LINE, in_parts
from ._pool import num_threads
from .simd import bits, vadd, vdiv, vload, vload_n, vmax, vmul, vsplat, vstore, vstore_n
from .simd_math import vexp

_PARALLEL_FROM = 32768  # elements: 4/6 us with one/two threads at 16384, 11/8 us at 32768
_LOWEST = np.finfo(np.float32).min
_ONE = np.float32(1.0)
_MINUS_ONE = np.float32(-1.0)


@cpu_inline
def _silu(t):
    t = vmax(vsplat(_LOWEST), t)  # -inf / inf would be NaN; NaN, the second argument, stays
    return vdiv(t, vadd(vsplat(_ONE), vexp(vmul(t, vsplat(_MINUS_ONE)))))


def _span(x, bias, out, start, stop):
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
            vstore(out, at + i, _silu(t))
        if whole < count:
            left = count - whole
            t = vload_n(x, at + whole, left)
            if bias is not None:
                t = vadd(t, vload_n(bias, col + whole, left))
            vstore_n(out, at + whole, _silu(t), left)
        at += count


_in_parts = in_parts(_span, LINE)


def silu(x: NDArray[Any], bias: NDArray[Any] | None, out: NDArray[Any]) -> None:
    """Write silu(x + bias) to `out`.

    Parameters
    ----------
    x, out : (rows, cols) float32/float16/bfloat16, C-contiguous; `out` may be `x`
    bias : (cols,) of any of the three dtypes, or None
    """
    arrays = (bits(x), None if bias is None else bits(bias), bits(out))
    parts = num_threads() if x.size >= _PARALLEL_FROM else 1
    _in_parts(x.size, parts, *arrays)

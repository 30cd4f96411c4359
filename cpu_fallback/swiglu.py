"""swiglu: y = gate / (1 + exp(-gate)) * up, x + bias = [gate | up] along the last axis.

exp overflows to Inf from 88.7 on, so a gate below -88.7 gives 0; the exact value is under 3e-37 there.
Source: Shazeer 2020, "GLU variants improve transformer".
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._jit import cpu_inline, cpu_kernel
from ._parts import LINE, in_parts
from ._pool import num_threads
from .simd import bits, vadd, vdiv, vload, vload_n, vmax, vmul, vsplat, vstore, vstore_n
from .simd_math import vexp

_PARALLEL_FROM = 16384  # results: 3/4 us with one/two threads at 8192, 6/6 us at 16384
_LOWEST = np.finfo(np.float32).min
_ONE = np.float32(1.0)
_MINUS_ONE = np.float32(-1.0)


@cpu_inline
def _swiglu(gate, up):
    gate = vmax(vsplat(_LOWEST), gate)  # -inf / inf would be NaN; NaN, the second argument, stays
    return vmul(vdiv(gate, vadd(vsplat(_ONE), vexp(vmul(gate, vsplat(_MINUS_ONE))))), up)


@cpu_kernel
def _span(x, bias, out, start, stop):
    """Results start..stop of the flat output, one run after another of what lies in one row."""
    half = out.shape[1]
    at = start
    while at < stop:
        col = at % half
        gates = at // half * 2 * half + col
        ups = gates + half
        count = min(half - col, stop - at)
        whole = count - count % 16
        for i in range(0, whole, 16):
            gate = vload(x, gates + i)
            up = vload(x, ups + i)
            if bias is not None:
                gate = vadd(gate, vload(bias, col + i))
                up = vadd(up, vload(bias, half + col + i))
            vstore(out, at + i, _swiglu(gate, up))
        if whole < count:
            left = count - whole
            gate = vload_n(x, gates + whole, left)
            up = vload_n(x, ups + whole, left)
            if bias is not None:
                gate = vadd(gate, vload_n(bias, col + whole, left))
                up = vadd(up, vload_n(bias, half + col + whole, left))
            vstore_n(out, at + whole, _swiglu(gate, up), left)
        at += count


_in_parts = in_parts(_span, LINE)


def swiglu(x: NDArray[Any], bias: NDArray[Any] | None, out: NDArray[Any]) -> None:
    """Write silu(gate) * up to `out`.

    Parameters
    ----------
    x : (rows, 2n) float32/float16/bfloat16, C-contiguous: n gates, then n ups
    bias : (2n,) of any of the three dtypes, or None
    out : (rows, n), dtype of x, C-contiguous, no memory shared with x
    """
    arrays = (bits(x), None if bias is None else bits(bias), bits(out))
    parts = num_threads() if out.size >= _PARALLEL_FROM else 1
    if parts > 1:
        _in_parts(out.size, parts, *arrays)
    else:
        _span(*arrays, 0, out.size)

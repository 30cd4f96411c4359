"""swiglu: y = gate / (1 + exp(-gate)) * up, x + bias = [gate | up] along the last axis.

Below a gate of -87, where 1 + exp(-gate) is exp(-gate) in float32 and near its largest number, exp(-87) is split off
and multiplied into up: a large or infinite up counts however small silu(gate) is. Below -174 it is computed as at
-174; for finite up the exact value is under 1.6e-35 there.
Source: Shazeer 2020, "GLU variants improve transformer".
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._jit import cpu_inline
from ._parts import LINE, in_parts
from ._pool import num_threads
from .simd import bits, vadd, vdiv, vload, vload_n, vmax, vmul, vselect_less, vsplat, vstore, vstore_n, vsub
from .simd_math import vexp

_PARALLEL_FROM = 16384  # results: 3/4 us with one/two threads at 8192, 6/6 us at 16384
_LOWEST = np.finfo(np.float32).min
_LOWEST_GATE = np.float32(-174.0)
_SPLIT = np.float32(-87.0)
_EXP_SPLIT = np.exp(_SPLIT)  # a normal float
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@cpu_inline
def _swiglu(gate, up):
    t = vmax(vsplat(_LOWEST_GATE), gate)  # NaN, the second argument, stays
    split = vsplat(_SPLIT)
    factor = vselect_less(t, split, vsplat(_EXP_SPLIT), vsplat(_ONE))
    factor = vselect_less(gate, vsplat(_LOWEST), vsplat(_ZERO), factor)  # silu(-inf) is 0, the limit
    one = vselect_less(t, split, vsplat(_ZERO), vsplat(_ONE))
    power = vexp(vsub(vselect_less(t, split, split, vsplat(_ZERO)), t))
    # up is divided, not the gate: half of the smallest subnormal would be 0, and 0 * inf is NaN
    return vmul(t, vdiv(vmul(factor, up), vadd(one, power)))


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
    _in_parts(out.size, parts, *arrays)

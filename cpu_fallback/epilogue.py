"""From sums of coefficients to results: y = activation(S_r c + psi s + bias) + residual, for a tile of tokens."""

from __future__ import annotations

import numpy as np

from . import params
from ._atomics import call_address
from ._jit import cpu_inline
from ._parts import c_function, record_at
from .arrays import F32, floats_at, load_any, store_any
from .fast_transform import apply_transform
from .simd import vadd, vfma, vload, vmul, vselect_less, vsplat, vstore, vtranspose
from .simd_math import verf, vsigmoid, vtanh
from .unpack import vbroadcast

NONE, RELU, GELU, GELU_TANH, SILU = range(5)
ACTIVATIONS = {None: NONE, "relu": RELU, "gelu": GELU, "gelu_tanh": GELU_TANH, "silu": SILU}
_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)
_SQRT_HALF = np.float32(0.7071067811865476)
_SQRT_2_PI, _CUBIC = np.float32(0.7978845608028654), np.float32(0.044715)
_LOWEST = np.float32(-3.4028235e38)
_WEIGHT, _OUTPUT = params.WEIGHT.dtype, params.OUTPUT.dtype


@cpu_inline
def _positive_part(t, factor):
    """t * factor, and 0 at -inf, the limit of gelu and silu there."""
    return vselect_less(t, vsplat(_LOWEST), vsplat(_ZERO), vmul(t, factor))


@cpu_inline
def activate(t, activation):
    if activation == RELU:
        zero = vsplat(_ZERO)
        return vselect_less(t, zero, zero, t)
    if activation == GELU:
        return _positive_part(t, vmul(vsplat(_HALF), vadd(vsplat(_ONE), verf(vmul(t, vsplat(_SQRT_HALF))))))
    if activation == GELU_TANH:
        inner = vmul(vmul(vsplat(_SQRT_2_PI), t), vfma(vmul(vsplat(_CUBIC), t), t, vsplat(_ONE)))
        return _positive_part(t, vmul(vsplat(_HALF), vadd(vsplat(_ONE), vtanh(inner))))
    if activation == SILU:
        return _positive_part(t, vsigmoid(t))
    return t


@cpu_inline
def _transpose_store(o, c, at, rows, row, tokens, token, vectors, width, corner, corner_at):
    """out[token + t, row + r] = activation(c[r, t] + bias[row + r]) + residual, r < rows, t < tokens.

    o : record of `OUTPUT`
    c : rows of `width` tokens, overwritten
    """
    bias, activation, residual, residual_kind = o.bias, o.activation, o.residual, o.residual_kind
    out, out_kind, out_features = o.out, o.out_kind, o.out_features
    if bias != 0 or activation != NONE:
        for r in range(rows):
            b = vsplat(_ZERO)
            if bias != 0:
                b = vbroadcast(floats_at(bias), row + r)
            for v in range(vectors):
                y_at = at + r * width + 16 * v
                vstore(c, y_at, activate(vadd(vload(c, y_at), b), activation))
    for r in range(0, rows, 16):
        wide = rows - r
        for v in range(vectors):
            count = min(16, tokens - 16 * v)
            out_at = (token + 16 * v) * out_features + row + r
            if out_kind == F32 and wide >= 16 and count == 16 and residual == 0:
                vtranspose(c, at + r * width + 16 * v, width, floats_at(out), out_at, out_features)
            else:
                vtranspose(c, at + r * width + 16 * v, width, corner, corner_at, 16)
                for t in range(count):
                    line = vload(corner, corner_at + 16 * t)
                    if residual != 0:
                        line = vadd(line, load_any(residual, residual_kind, out_at + t * out_features, wide))
                    store_any(out, out_kind, out_at + t * out_features, line, wide)


def _epilogue(
    weight, output, block, transform, c_at, rows, row, tokens, token, vectors, width, corner_at, sum_rows
):
    """Every block of a unit through its transform and its basis sums, then `_transpose_store`.

    weight, output : addresses of `WEIGHT` and `OUTPUT`
    c_at : address of the unit's rows of coefficients, then of `sum_features` basis sums for each of its blocks
    rows, row : how many results, and the first; tokens, token : the same of tokens
    corner_at : address of room for 256 floats, and for a block where there is a transform
    sum_rows : `matmul_rows.SPARSE_ROWS`, where the weight has basis sums
    """
    w, o = record_at(weight, _WEIGHT), record_at(output, _OUTPUT)
    features = w.sum_features
    padded = (rows + block - 1) // block * block
    for b in range(padded // block):
        y_at = c_at + 4 * b * block * width
        if transform != 0:
            y_at = corner_at + 4 * 256
            apply_transform(
                transform, floats_at(c_at), b * block * width, width, floats_at(y_at), 0, width, vectors
            )
        if features > 0:
            sums_at = c_at + 4 * (padded + b * features) * width
            call_address(
                sum_rows,
                (block, w.psi_start, np.int64(1), w.psi_offset, width, w.psi_value, sums_at, vectors,
                 np.int64(0), y_at, width),
            )  # fmt: skip
        _transpose_store(
            o, floats_at(y_at), 0, min(block, rows - b * block), row + b * block, tokens, token, vectors, width,
            floats_at(corner_at), 0,
        )  # fmt: skip


EPILOGUE = c_function(_epilogue)

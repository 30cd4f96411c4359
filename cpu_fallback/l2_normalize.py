"""l2_normalize: y[r,c] = x[r,c] / max(||x[r]||_2, eps).

Squares are summed pairwise (Higham 1993, "The accuracy of floating point summation"), in the order of `numpy.sum`, so
float32 rows have the bits of `x / numpy.maximum(numpy.linalg.norm(x, axis=1, keepdims=True), eps)`. A row whose
squares leave float32 is computed again in float64 (`norm_rows`), so that every finite row has its right result.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from . import simd_emit as emit
from ._jit import cpu_inline
from ._numba_internals import cgutils
from ._parts import in_parts
from ._pool import num_threads
from .norm_rows import SMALLEST, in_range, wide_value
from .simd import bits, element, store_element, vdiv, vload, vload_n, vsplat, vstore, vstore_n, widen

_PARALLEL_FROM = 65536  # elements: 27/35 us with one/two threads at 49152, 61/38 us at 98304
_PAIRWISE_FROM = 128  # terms; fewer are summed in eight lanes


def _lanes(first: int, count: int) -> ir.Constant:
    """The lanes first, first + 2, ... below `count`, for a shuffle."""
    lanes = [emit.I32(lane) for lane in range(first, count, 2)]
    return ir.Constant(ir.VectorType(emit.I32, len(lanes)), lanes)


@intrinsic
def _sum_of_eights(typingctx, x, start, count):  # type: ignore[no-untyped-def]
    """_sum_of_eights(x, start, count) -> float32: the sum of x[i]^2 for start <= i < start + count, a multiple of 8.

    Eight sums of every eighth term, then ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7)).
    """
    if not isinstance(x, types.Array):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        storage = signature.args[0].dtype
        loaded = ir.VectorType(emit.F32 if storage == types.float32 else emit.I16, 8)
        data = context.make_array(signature.args[0])(context, builder, args[0]).data

        def squares(at: ir.Value) -> ir.Value:
            pointer = builder.bitcast(builder.gep(data, [at]), loaded.as_pointer())
            value = builder.load(pointer, align=storage.bitwidth // 8)
            value = emit.widen(context, builder, storage, value)
            return emit.mul(builder, value, value)

        sums = cgutils.alloca_once_value(builder, squares(args[1]))
        eight = ir.Constant(args[1].type, 8)
        first, stop = builder.add(args[1], eight), builder.add(args[1], args[2])
        with cgutils.for_range_slice(builder, first, stop, eight) as (at, _):
            builder.store(emit.add(builder, builder.load(sums), squares(at)), sums)
        total = builder.load(sums)
        while total.type.count > 1:
            even, odd = (
                builder.shuffle_vector(total, total, _lanes(first, total.type.count)) for first in (0, 1)
            )
            total = emit.add(builder, even, odd)
        return builder.extract_element(total, emit.I32(0))

    return types.float32(x, types.intp, types.intp), codegen


@cpu_inline(exact=True, inline=False)  # every rounding as written
def _sum_of_squares(x, start, count):
    """Sum of x[i]^2 for start <= i < start + count, float32."""
    if count > _PAIRWISE_FROM:
        half = count // 2 // 8 * 8
        return _sum_of_squares(x, start, half) + _sum_of_squares(x, start + half, count - half)
    whole = count // 8 * 8
    total = _sum_of_eights(x, start, whole) if whole else np.float32(0.0)
    for i in range(start + whole, start + count):
        value = widen(element(x, i))
        total += value * value
    return total


@cpu_inline(exact=True, inline=False)
def _wide_row(x, eps, out, start, cols):
    """The row that begins at `start`, in float64."""
    total = 0.0
    for i in range(start, start + cols):
        value = wide_value(x, None, i)
        total += value * value
    norm = np.sqrt(total)
    divisor = eps if norm < eps else norm  # NaN stays
    for i in range(start, start + cols):
        store_element(out, i, np.float32(wide_value(x, None, i) / divisor))


def _rows(x, cols, wide_eps, out, first, stop):
    """Rows first .. stop - 1 of the flat arrays."""
    eps = np.float32(wide_eps)
    # a mean square below SMALLEST is surely a norm below eps: a row of zeros need not be taken twice
    eps_rules = wide_eps * wide_eps > 2.0 * SMALLEST * cols
    per_col = 1.0 / cols
    for row in range(first, stop):
        start = row * cols
        squares = _sum_of_squares(x, start, cols)
        mean_square = np.float64(squares) * per_col
        if not in_range(mean_square) and not (mean_square < SMALLEST and eps_rules):
            _wide_row(x, wide_eps, out, start, cols)
            continue
        norm = np.sqrt(squares)
        divisor = vsplat(eps if norm < eps else norm)
        whole = cols - cols % 16
        for i in range(start, start + whole, 16):
            vstore(out, i, vdiv(vload(x, i), divisor))
        if whole < cols:
            left = cols - whole
            vstore_n(out, start + whole, vdiv(vload_n(x, start + whole, left), divisor), left)


_in_parts = in_parts(_rows, exact=True)


def l2_normalize(x: NDArray[Any], eps: float, out: NDArray[Any]) -> None:
    """Write every row of `x`, divided by its L2 norm or by `eps` if that is larger, to `out`.

    Parameters
    ----------
    x, out : (rows, cols) float32/float16/bfloat16, one dtype, C-contiguous; `out` may be `x`
    """
    rows, cols = x.shape
    arguments = (bits(x).reshape(-1), cols, eps, bits(out).reshape(-1))
    parts = min(num_threads(), rows) if x.size >= _PARALLEL_FROM else 1
    _in_parts(rows, parts, *arguments)

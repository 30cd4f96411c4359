"""Arrays by address, and loads and stores of 16 values of any storage type.

The arrays of a weight come from memory maps or not, are read-only or not, have one axis or two: to a kernel they are
an address each, and it is compiled once.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ._jit import cpu_inline, cpu_kernel
from ._numba_internals import populate_array
from .simd import vload, vload_n, vsplat, vstore, vstore_n

_ZERO = np.float32(0)
_FLOAT32, _BYTES = np.dtype(np.float32), np.dtype(np.uint8)

#: How a stored value is encoded: floats of three types, b-bit codes with scales, integers on a grid.
F32, F16, BF16, INT, GRID = range(5)
#: The encoding of an array's values, by its dtype.
ENCODING = {
    np.dtype(np.float32): F32,
    np.dtype(np.float16): F16,
    np.dtype(ml_dtypes.bfloat16): BF16,
}


def _array_at(name: str, dtype: types.Type) -> object:
    """Intrinsic (address) -> one-dimensional array of `dtype` there, of no known end."""

    def at(typingctx, address):  # type: ignore[no-untyped-def]
        array = types.Array(dtype, 1, "C")

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            made = context.make_array(array)(context, builder)
            data = builder.inttoptr(args[0], made.data.type)
            size = ir.Constant(ir.IntType(64), dtype.bitwidth // 8)
            count = ir.Constant(ir.IntType(64), 1 << 40)
            populate_array(made, data=data, shape=[count], strides=[size], itemsize=size, meminfo=None)
            return made._getvalue()

        return array(types.int64), codegen

    at.__name__ = at.__qualname__ = name
    return intrinsic(at)


bytes_at = _array_at("bytes_at", types.uint8)
halves_at = _array_at("halves_at", types.uint16)
bfloats_at = _array_at("bfloats_at", types.int16)
floats_at = _array_at("floats_at", types.float32)
longs_at = _array_at("longs_at", types.int64)
words_at = _array_at("words_at", types.uint32)
ints_at = _array_at("ints_at", types.int32)


@intrinsic
def array_address(typingctx, a):  # type: ignore[no-untyped-def]
    """array_address(a) -> int64: where an array's values begin, for the functions that take addresses."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(data, ir.IntType(64))

    return types.int64(a), codegen


@cpu_kernel
def _pointer(a):  # type: ignore[no-untyped-def]
    return array_address(a)


def address(a: Any) -> int:
    """Where an array's values begin; 0 for None.

    `a.ctypes.data` takes a microsecond, and a matmul asks three times; Numba takes a third of it.
    """
    if a is None:
        return 0
    if (a.dtype is _FLOAT32 or a.dtype is _BYTES) and type(a) is np.ndarray:
        return int(_pointer(a))
    return int(a.__array_interface__["data"][0])


@cpu_inline
def load_any(address, kind, at, count):
    """Up to 16 stored floats from element `at` on, widened; zeros behind `count`, and for a count below 1."""
    if count >= 16:
        if kind == F32:
            return vload(floats_at(address), at)
        if kind == F16:
            return vload(halves_at(address), at)
        return vload(bfloats_at(address), at)
    if count < 1:
        return vsplat(_ZERO)
    if kind == F32:
        return vload_n(floats_at(address), at, count)
    if kind == F16:
        return vload_n(halves_at(address), at, count)
    return vload_n(bfloats_at(address), at, count)


@cpu_inline
def store_any(address, kind, at, vector, count):
    """The first `count` of 16 values to element `at`, rounded to the stored type."""
    if kind == F32:
        if count >= 16:
            vstore(floats_at(address), at, vector)
        else:
            vstore_n(floats_at(address), at, vector, count)
    elif kind == F16:
        vstore_n(halves_at(address), at, vector, min(count, 16))
    else:
        vstore_n(bfloats_at(address), at, vector, min(count, 16))

"""run_parts(address, count, table): function(part, table) for part = 0 .. count - 1, on the threads of the pool.

A parallel loop of Numba's compiles what it calls four times over: by itself, in the loop's body, in the body's
wrapper, and in the function around the loop. For a kernel of a thousand lines of vector code that is most of
its first call. Here the loop is compiled once for all such kernels, and knows them by their address.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ._jit import FASTMATH, cpu_kernel, named_for_the_cache

_I64 = ir.IntType(64)


def part_kernel(function: Callable[..., Any]) -> Callable[..., int]:
    """Compile function(part, table, like) for its address; it is cached on disk as every kernel is.

    Parameters
    ----------
    function : part is an int64, table a pointer to int64, and `like` a null pointer to an element type of arrays:
        `pointer_like(table[i], like)` points to the array at the address table[i]. Nothing may be raised in it

    Returns
    -------
    element type -> address; without one for a kernel that does not look at `like`
    """
    known: dict[types.Type | None, int] = {}
    compiled = []  # the code lives as long as these do

    def address(element: types.Type | None = None) -> int:
        found = known.get(element)
        if found is None:
            like = types.CPointer(types.float32 if element is None else element)
            signature = types.void(types.int64, types.CPointer(types.int64), like)
            with named_for_the_cache(function):
                kernel = numba.cfunc(signature, cache=True, error_model="numpy", fastmath=set(FASTMATH))(
                    function
                )
            compiled.append(kernel)
            found = known[element] = int(kernel.address)
        return found

    return address


@intrinsic
def pointer(typingctx, address):
    """pointer(address) -> void pointer, for `numba.carray(pointer, shape, dtype)`."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.voidptr(types.int64), codegen


@intrinsic
def pointer_like(typingctx, address, like):
    """pointer_like(address, like) -> pointer of the type of `like`, for `numba.carray(pointer, shape)`."""
    if not isinstance(like, types.CPointer):
        return None

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return like(types.int64, like), codegen


@intrinsic
def take(typingctx, table, place):
    """take(table, place) -> table[place]++ for all threads at once: the next unit of work.

    Parts that take units, rather than own them, end together when one thread is slower than another.
    """
    if not isinstance(table, types.Array) or table.dtype != types.int64:
        return None

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", builder.gep(data, [args[1]]), _I64(1), "monotonic")

    return types.int64(table, types.int64), codegen


@intrinsic
def _call(typingctx, address, part, table):
    if not isinstance(table, types.Array) or table.dtype != types.int64:
        return None

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[2])(context, builder, args[2]).data
        null = ir.IntType(8).as_pointer()
        function = ir.FunctionType(ir.VoidType(), [_I64, data.type, null])
        pointer = builder.inttoptr(args[0], function.as_pointer())
        builder.call(pointer, [args[1], data, ir.Constant(null, None)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, table), codegen


@cpu_kernel(parallel=True)
def run_parts(address, count, table):
    for part in numba.prange(count):
        _call(address, part, table)

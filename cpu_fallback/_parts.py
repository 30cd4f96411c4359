"""run_parts(kernel, count, params): kernel(part, params) for part = 0 .. count - 1, on the threads of the pool.

A parallel loop of Numba's compiles what it calls four times over: by itself, in the loop's body, in the body's
wrapper, and in the function around the loop. For a kernel of a thousand lines of vector code that is most of
its first call. Here the loop is compiled once for all such kernels, and calls them by their address.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ._disk_cache import named_for_the_cache
from ._jit import FASTMATH, cpu_inline, cpu_kernel
from ._numba_internals import cgutils, compiler_lock

_I64 = ir.IntType(64)
#: int64 elements of a part's counter for `next_unit`: a cache line of its own.
SHARE = 8
#: The instruction of a waiting loop, by the name of the architecture.
_HINTS = {
    "x86_64": ("llvm.x86.sse2.pause", []),
    "aarch64": ("llvm.aarch64.hint", [ir.IntType(32)(1)]),
    "arm64": ("llvm.aarch64.hint", [ir.IntType(32)(1)]),
}


def part_kernel(function: Callable[..., Any], struct: np.dtype[Any]) -> Callable[..., int]:
    """Compile function(part, params, like) for its address; it is cached on disk as every kernel is.

    Parameters
    ----------
    function : part is an int64, params a record of `struct`, and `like` a null pointer to an element type of arrays:
        `pointer_like(params.x, like)` points to the array at the address params.x. It must not raise
    struct : one of `params`

    Returns
    -------
    element type -> address; without one for a kernel that does not use `like`
    """
    addresses: dict[types.Type | None, int] = {}
    compiled = []  # the code lives as long as these do

    def address(element: types.Type | None = None) -> int:
        known = addresses.get(element)
        return compile_for(element) if known is None else known

    @compiler_lock  # one Python thread at a time: the function has another name meanwhile
    def compile_for(element: types.Type | None) -> int:
        if element not in addresses:
            like = types.CPointer(types.float32 if element is None else element)
            signature = types.void(types.int64, numba.from_dtype(struct), like)
            with named_for_the_cache(function, f"_{like.dtype}"):  # each form alone in its files
                kernel = numba.cfunc(signature, cache=True, error_model="numpy", fastmath=set(FASTMATH))(
                    function
                )
            compiled.append(kernel)
            addresses[element] = int(kernel.address)
        return addresses[element]

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
def record_at(typingctx, address, struct):
    """record_at(address, struct) -> record of a struct of `params` there; its fields are read where they are used."""
    if not isinstance(struct, types.DType):
        return None

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return struct.dtype(types.int64, struct), codegen


@intrinsic
def count_up(typingctx, array, index):
    """count_up(array, index) -> array[index]++ atomically; whoever sees the count (`wait_for`) sees what was written
    before it."""
    if not isinstance(array, types.Array) or array.dtype != types.int64:
        return None

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", builder.gep(data, [args[1]]), _I64(1), "acq_rel")

    return types.int64(array, types.int64), codegen


@intrinsic
def wait_for(typingctx, array, index, count):
    """wait_for(array, index, count): until array[index] has been counted up to `count`.

    For work that other threads have claimed: they end it whatever this one does. Work that nobody has claimed must
    not be waited for, since parts may run one after the other.
    """
    if not isinstance(array, types.Array) or array.dtype != types.int64:
        return None

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        pointer = builder.gep(data, [args[1]])
        test, idle = builder.append_basic_block("wait.test"), builder.append_basic_block("wait.idle")
        done = builder.append_basic_block("wait.done")
        builder.branch(test)
        builder.position_at_end(test)
        counted = builder.load_atomic(pointer, "acquire", 8)
        builder.cbranch(builder.icmp_signed("<", counted, args[2]), idle, done)
        builder.position_at_end(idle)
        hint = _HINTS.get(builder.module.triple.partition("-")[0])
        if hint is not None:
            name, operands = hint
            kind = ir.FunctionType(ir.VoidType(), [o.type for o in operands])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), operands)
        builder.branch(test)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64), codegen


@cpu_inline
def next_unit(counters, units, part, parts):
    """Claim the next unit of work for a part; `units` when all are claimed.

    counters : int64 (parts, SHARE), zero at the start. Every part has an equal run of the units, the same from
        call to call, so that their memory stays in its core's cache; a part that is done takes from the others
    """
    for k in range(parts):
        owner = part + k if part + k < parts else part + k - parts
        first = units * owner // parts
        size = units * (owner + 1) // parts - first
        if counters[owner * SHARE] < size:
            i = count_up(counters, owner * SHARE)
            if i < size:
                return first + i
    return units


@intrinsic
def call_part(typingctx, kernel, part, params):
    """call_part(kernel, part, params): the part kernel at address `kernel` with the struct at address `params`."""

    def codegen(context, builder, signature, args):
        null = ir.IntType(8).as_pointer()
        function = ir.FunctionType(ir.VoidType(), [_I64, null, null])
        callee = builder.inttoptr(args[0], function.as_pointer())
        builder.call(callee, [args[1], builder.inttoptr(args[2], null), ir.Constant(null, None)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@cpu_kernel(parallel=True)
def run_parts(kernel, count, params):
    for part in numba.prange(count):
        call_part(kernel, part, params)

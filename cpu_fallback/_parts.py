"""run_parts(kernel, count, params): kernel(part, params, 0) for part = 0 .. count - 1, on the threads of the pool.

`in_parts` is the same for a kernel of rows or elements, whose parts are equal shares. Threads call a kernel by its
address, so that it is compiled once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from ._atomics import atomic_add, atomic_load, call_symbol, pause_once, yield_core
from ._disk_cache import named_for_the_cache
from ._jit import FASTMATH, cpu_inline, cpu_kernel
from ._numba_internals import compiler_lock, share_function
from ._workers import RUN

#: int64 elements of a part's counter for `next_unit`: a cache line of its own.
SHARE = 8
#: A grain of `in_parts` for elements: whole cache lines of every dtype.
LINE = 64
#: Turns of `wait_for` between two offers of the core to other threads: some 20 us.
YIELD_EVERY = 1024


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


def c_function(function: Callable[..., Any]) -> Callable[[], int]:
    """Compile function(int64, ...) when its address is first asked for, for `call_address`; cached on disk.

    Kernels that share it are compiled without it, and what no weight needs is not compiled at all. A call takes some
    nanoseconds. It must not raise.

    Returns
    -------
    () -> address
    """
    compiled: list[Any] = []

    def address() -> int:
        if not compiled:
            with compiler_lock, named_for_the_cache(function):
                signature = types.void(*[types.int64] * function.__code__.co_argcount)
                flags = {"error_model": "numpy", "fastmath": set(FASTMATH)}
                compiled.append(numba.cfunc(signature, cache=True, **flags)(function))
        return int(compiled[0].address)

    return address


@intrinsic
def address_at(typingctx, record):
    """address_at(record) -> where a record of a struct lies, for `record_at`."""
    if not isinstance(record, types.Record):
        return None

    def codegen(context, builder, signature, args):
        return builder.ptrtoint(args[0], context.get_value_type(types.int64))

    return types.int64(record), codegen


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


@cpu_inline
def count_up(array, index):
    """array[index]++ atomically; a thread that sees the count (`wait_for`) sees all writes before it."""
    return atomic_add(array, index, np.int64(1))


@cpu_inline
def wait_for(array, index, count):
    """Wait until array[index] has been counted up to `count`.

    For work that other threads have claimed: they end it whatever this one does. Work that nobody has claimed must
    not be waited for, since parts may run one after the other. A long wait offers the core to other threads: one of
    them may be what is waited for.
    """
    turns = 0
    while atomic_load(array, index) < count:
        pause_once()
        turns += 1
        if turns % YIELD_EVERY == 0:
            yield_core()


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


@cpu_inline
def run_shares(kernel, count, grain, parts, args):
    """kernel(*args, start, stop) for `parts` equal shares of 0 .. count, on the threads of the pool.

    kernel : a `cpu_inline` that does not raise
    grain : every start is a multiple of it
    args : a tuple
    """
    function, params = share_function(kernel, count, grain, parts, args)
    call_symbol(RUN, (function, np.int64(parts), params))


# of the function below, each in its own copy
_kernel: Any = None
_grain = 1


def _in_parts(count, parts, *args):
    run_shares(_kernel, count, _grain, parts, args)


def in_parts(function: Callable[..., Any], grain: int = 1, *, exact: bool = False) -> Callable[..., Any]:
    """A compiled function (count, parts, *args): function(*args, start, stop) for equal shares of 0 .. count.

    A parallel loop of Numba's would compile what it calls again, in the loop's body, in the body's wrapper and in the
    function around the loop. It also takes and gives back the interpreter lock at every call.

    Parameters
    ----------
    function : must not raise
    grain : every start is a multiple of it, for instance `LINE`
    exact : no fast-math in the function's own arithmetic
    """
    # a copy with its own globals: the disk cache does not know a closure over a kernel again
    own = {**globals(), "_kernel": cpu_inline(function, exact=exact), "_grain": grain}
    run = FunctionType(_in_parts.__code__, own, "in_parts")
    run.__qualname__ = f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}.in_parts"
    run.__module__ = __name__
    return cpu_kernel(run, home=Path(function.__code__.co_filename))


@cpu_kernel
def run_parts(kernel, count, params):
    call_symbol(RUN, (np.int64(kernel), np.int64(count), np.int64(params)))

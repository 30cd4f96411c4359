"""prange(parts) = the parts on at most `limit` threads of Numba's pool, or one after another on the caller's own.

Numba hands the parts of a `prange` to its threading layer, and no layer takes every call: GNU OpenMP ends a
forked process that calls it, workqueue ends one whose threads call it at once, and each Python thread that calls
OpenMP gets a whole team of its own. So the kernels of this package call a gate in front of the layer:

    threads = min(Numba's number for the calling thread, limit)
    threads > 1, and nobody in the gate: the layer, on that many threads
    otherwise:                           all parts here, one after another

A forked child has limit 1, a second Python thread that comes while a kernel runs works alone, and a kernel inside
a kernel does too. What a part computes never depends on who computes it, so all of these give the same bits.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

from rbe_gpu import threads

from . import _numba_internals as internals

SPINS = 5_000
_VOID, _I64 = ir.VoidType(), ir.IntType(64)
_POINTER = ir.IntType(8).as_pointer()

#: Read by the gate: how many threads a kernel may use, and whether one is using the pool.
_limit = ctypes.c_int64(1)
_busy = ctypes.c_int64(0)


def _start() -> Any:
    """Start Numba's threads so that they sleep soon after they become idle; the module of the threading layer.

    GNU OpenMP's idle threads spin, about a millisecond each time by default, on cores that another library may
    want. Without any spinning every kernel waits 40 us for its threads to wake up; with `SPINS` turns, some
    0.1 ms, the kernels of a layer find them awake (2 us). The variable is read when the OpenMP library is
    loaded; it is put back afterwards, so that other libraries of the process keep their own setting.
    """
    before = os.environ.get("GOMP_SPINCOUNT")
    if before is None:
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
    try:
        return internals.start_threads()
    finally:
        if before is None:
            del os.environ["GOMP_SPINCOUNT"]


def _at(b: ir.IRBuilder, address: int, kind: ir.Type) -> ir.Value:
    return b.inttoptr(ir.Constant(_I64, address), kind.as_pointer())


def _gate(layer: Any) -> tuple[int, Any]:
    """The address of the gate in front of `layer`, and what must live as long as it is called."""
    # part(args, dimensions, steps, data): the parts 0..dimensions[0]
    part = ir.FunctionType(_VOID, [_POINTER] * 4)
    # gate(part, args, dimensions, steps, data, inner dimensions, arrays, threads)
    gate = ir.FunctionType(_VOID, [_POINTER] * 5 + [_I64] * 3)
    module = ir.Module("rbe_gpu.gate")
    module.triple = llvm.get_process_triple()
    function = ir.Function(module, gate, "rbe_gpu_parallel_for")
    entry, several, together, alone = (
        function.append_basic_block(name) for name in ("entry", "several", "together", "alone")
    )
    *forwarded, wanted = function.args
    zero, one = ir.Constant(_I64, 0), ir.Constant(_I64, 1)

    b = ir.IRBuilder(entry)
    limit, busy = (_at(b, ctypes.addressof(word), _I64) for word in (_limit, _busy))
    most = b.load_atomic(limit, "monotonic", 8)
    count = b.select(b.icmp_signed("<", wanted, most), wanted, most)
    b.cbranch(b.icmp_signed(">", count, one), several, alone)

    b.position_at_end(several)
    taken = b.extract_value(b.cmpxchg(busy, zero, one, "acq_rel", "monotonic"), 1)
    b.cbranch(taken, together, alone)

    b.position_at_end(together)
    b.call(_at(b, layer.parallel_for, gate), [*forwarded, count])
    # the layer leaves its count as the number of the calling thread: put that back
    set_count = ir.FunctionType(_VOID, [ir.IntType(32)])
    b.call(_at(b, layer.set_num_threads, set_count), [b.trunc(wanted, ir.IntType(32))])
    b.store_atomic(zero, busy, "release", 8)
    b.ret_void()

    b.position_at_end(alone)
    b.call(b.bitcast(function.args[0], part.as_pointer()), function.args[1:5])
    b.ret_void()

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_triple(module.triple).create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), machine)
    engine.finalize_object()
    return engine.get_function_address(function.name), engine


#: As many threads as Numba has.
MOST = internals.NUM_THREADS
_alone = threads.forked and internals.threads_started()
_layer = _start()
_address, _engine = _gate(_layer)


def gated(dispatcher: Any) -> Any:
    """A compiled function whose `prange` loops go through the gate."""
    return internals.link_loops(dispatcher, _address, _layer)


def set_limit(count: int) -> None:
    """Let kernels use at most `count` threads, in the whole process."""
    _limit.value = count


def alone() -> bool:
    """Whether kernels of this process run on the caller's thread, because it was forked."""
    return _alone


def num_threads() -> int:
    """How many threads a kernel called now from this Python thread may use.

    For splitting work. Scratch that a kernel indexes by thread number needs `most_threads()` rows.
    """
    return min(int(_limit.value), internals.num_threads())


def most_threads() -> int:
    """Numba's number of threads for this Python thread: no other can raise that between here and a call."""
    return internals.num_threads()


def _after_fork() -> None:
    """In a child: the layer's threads are gone, and so is whoever held a lock or was in the gate."""
    global _alone
    _alone = True
    _limit.value = 1
    internals.renew_locks()


def _first_limit() -> int:
    """What the environment asks for, or all that Numba has."""
    if _alone:
        return 1
    if threads.asked is not None and threads.asked > MOST:
        warnings.warn(
            f"{threads.VARIABLE}={threads.asked}, but Numba has {MOST} threads; kernels use {MOST}. "
            f"To have more, set NUMBA_NUM_THREADS={threads.asked} before Numba is imported.",
            RuntimeWarning,
            stacklevel=2,
        )
    return min(threads.asked or MOST, MOST)


set_limit(_first_limit())
if hasattr(os, "register_at_fork"):  # where processes can fork
    os.register_at_fork(after_in_child=_after_fork)

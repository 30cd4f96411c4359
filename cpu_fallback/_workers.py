"""The threads that kernels share: the parts of a job run on the caller and on the workers that come in time.

    caller                                        worker
    take a free slot, write the job, open it      asleep until a slot opens (awake for SPINS turns first)
    run part 0, then the next unclaimed one ...   claim the next part, run it, count it as done ...
    wait for claimed parts that are not done      none left: look into the other slots

A caller waits only for parts that a worker has claimed: a worker that the system schedules late finds nothing to do
and delays nobody. Callers from several Python threads have a slot each, and a part may itself be a caller. Where no
slot is free, the caller runs all parts. No thread spins for longer than SPINS turns.

Workers are Python threads that stay in `_serve`, without the interpreter lock, until the process ends. A forked child
has none until `set_limit` starts them there.

All state is one array of int64 words with the symbol `rbe_gpu_pool`: compiled code on disk holds no address of it.
"""

from __future__ import annotations

import atexit
import ctypes
import threading
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from numba import types

from ._atomics import (
    CAN_SLEEP,
    atomic_add,
    atomic_load,
    atomic_replace,
    atomic_store,
    call_address,
    pause_once,
    sleep_while,
    symbol_address,
    wake,
    words_at,
)
from ._disk_cache import named_for_the_cache

#: Turns of a waiting loop before a thread sleeps, some 50 us: the next kernel of a layer comes sooner.
SPINS = 2_000

_LINE = 8  # words of a cache line; words that different threads write are on different lines
_EPOCH, _SLEEPING, _STOP, _LIMIT, _WORKERS = (_LINE * i for i in range(5))
_FIRST_SLOT, _SLOT_WORDS, _SLOTS = _LINE * 5, _LINE * 5, 32
_WORDS = _FIRST_SLOT + _SLOTS * _SLOT_WORDS
# of a slot: its state, workers inside, the next unclaimed part, parts done
_STATE, _ENTERED, _NEXT, _DONE = (_LINE * i for i in range(4))
_CALLER_SLEEPS = _DONE + 1
# of a slot: the job, and how many workers may work on it
_FUNCTION, _PARTS, _PARAMS, _SEATS = (_LINE * 4 + i for i in range(4))
_FREE, _TAKEN, _OPEN = 0, 1, 2

_SYMBOL = "rbe_gpu_pool"
_memory = np.zeros(_WORDS + _LINE, np.int64)
_state = _memory[-_memory.ctypes.data // 8 % _LINE :][:_WORDS]
llvm.add_symbol(_SYMBOL, _state.ctypes.data)

_inner = numba.njit(nogil=True, error_model="numpy")


@_inner
def _run_parts(state, slot, part):
    """Run `part`, if it is not negative, then unclaimed parts of an open job until there are none."""
    function, parts, params = state[slot + _FUNCTION], state[slot + _PARTS], state[slot + _PARAMS]
    if part < 0:
        part = atomic_add(state, slot + _NEXT, 1)
    while part < parts:
        call_address(function, (part, params, np.int64(0)))
        done = atomic_add(state, slot + _DONE, 1) + 1
        if done == parts and atomic_load(state, slot + _CALLER_SLEEPS) != 0:
            wake(state, slot + _DONE, 1)
        part = atomic_add(state, slot + _NEXT, 1)


@_inner
def _take_slot(state):
    """A slot for a job, or -1: no slot is free and empty."""
    for s in range(_SLOTS):
        slot = _FIRST_SLOT + s * _SLOT_WORDS
        if atomic_load(state, slot + _STATE) == _FREE and atomic_replace(state, slot + _STATE, _FREE, _TAKEN):
            # a worker that is late in leaving the last job may still read this slot
            if atomic_load(state, slot + _ENTERED) == 0:
                return slot
            atomic_store(state, slot + _STATE, _FREE)
    return -1


def _run(function, parts, params):
    """function(part, params, 0) for part = 0 .. parts - 1, on up to `parts` threads."""
    state = words_at(symbol_address("rbe_gpu_pool"), _WORDS)
    count = min(parts, min(atomic_load(state, _LIMIT), atomic_load(state, _WORKERS) + 1))
    slot = _take_slot(state) if count > 1 else -1
    if slot < 0:
        for part in range(parts):
            call_address(function, (np.int64(part), params, np.int64(0)))
        return
    state[slot + _FUNCTION] = function
    state[slot + _PARTS] = parts
    state[slot + _PARAMS] = params
    state[slot + _SEATS] = count - 1
    state[slot + _CALLER_SLEEPS] = 0
    state[slot + _DONE] = 0
    state[slot + _NEXT] = 1  # the caller has part 0: what it touched in the last call is in its core's cache
    atomic_store(state, slot + _STATE, _OPEN)
    atomic_add(state, _EPOCH, 1)
    sleeping = min(atomic_load(state, _SLEEPING), count - 1)
    if sleeping > 0:
        wake(state, _EPOCH, sleeping)
    _run_parts(state, slot, 0)
    for _ in range(SPINS):
        if atomic_load(state, slot + _DONE) >= parts:
            break
        pause_once()
    done = atomic_load(state, slot + _DONE)
    if done < parts:
        atomic_store(state, slot + _CALLER_SLEEPS, 1)
        done = atomic_load(state, slot + _DONE)
        while done < parts:
            sleep_while(state, slot + _DONE, done)
            done = atomic_load(state, slot + _DONE)
    atomic_store(state, slot + _STATE, _FREE)


def _serve(worker):
    """The loop of a worker thread, until the process ends."""
    state = words_at(symbol_address("rbe_gpu_pool"), _WORDS)
    while atomic_load(state, _STOP) == 0:
        epoch = atomic_load(state, _EPOCH)
        for s in range(_SLOTS):
            slot = _FIRST_SLOT + s * _SLOT_WORDS
            if atomic_load(state, slot + _STATE) == _OPEN:
                entered = atomic_add(state, slot + _ENTERED, 1)
                # the slot may have another job by now, which is as good; not one that is being written
                if atomic_load(state, slot + _STATE) == _OPEN and entered < state[slot + _SEATS]:
                    _run_parts(state, slot, -1)
                atomic_add(state, slot + _ENTERED, -1)
        for _ in range(SPINS):
            if atomic_load(state, _EPOCH) != epoch:
                break
            pause_once()
        if atomic_load(state, _EPOCH) == epoch:
            atomic_add(state, _SLEEPING, 1)
            sleep_while(state, _EPOCH, epoch)
            atomic_add(state, _SLEEPING, -1)


def _end(all_workers):
    """Let every worker thread return after its current part."""
    state = words_at(symbol_address("rbe_gpu_pool"), _WORDS)
    atomic_store(state, _WORKERS, 0)
    atomic_store(state, _STOP, 1)
    atomic_add(state, _EPOCH, 1)
    wake(state, _EPOCH, all_workers)


def _compiled(function: Callable[..., Any], arguments: int) -> Any:
    """A C function of int64 arguments without a result; it is kept in the disk cache."""
    with named_for_the_cache(function):
        signature = types.void(*[types.int64] * arguments)
        return numba.cfunc(signature, cache=True, nogil=True, error_model="numpy")(function)


_run_code, _serve_code, _end_code = _compiled(_run, 3), _compiled(_serve, 1), _compiled(_end, 1)
_serve_without_lock = ctypes.CFUNCTYPE(None, ctypes.c_int64)(_serve_code.address)
#: Symbol of `_run` as a C function, for `call_symbol`.
RUN = "rbe_gpu_run"
llvm.add_symbol(RUN, _run_code.address)
_workers: list[threading.Thread] = []


def set_limit(count: int) -> None:
    """Let at most `count` threads work on a job, the caller included; workers are started as they are needed."""
    while CAN_SLEEP and len(_workers) < count - 1:
        name = f"rbe_gpu-{len(_workers) + 1}"
        worker = threading.Thread(target=_serve_without_lock, args=(len(_workers),), name=name, daemon=True)
        worker.start()
        _workers.append(worker)
    _state[_WORKERS] = len(_workers)
    _state[_LIMIT] = count


def limit() -> int:
    """The limit that `set_limit` set."""
    return int(_state[_LIMIT])


def after_fork() -> None:
    """In a forked child: there are no worker threads and no other callers. The limit is 1."""
    _workers.clear()
    _state[:] = 0
    _state[_LIMIT] = 1


def _stop() -> None:
    """End the worker threads before the interpreter frees the code that they run."""
    if not _workers:  # nor may the code be run where it was compiled for another machine
        return
    _end_code.ctypes(len(_workers))
    for worker in _workers:
        worker.join(1.0)


atexit.register(_stop)

"""Units of work that the threads of a kernel share, and the wait for those that others are at."""

import threading

import numba
import numpy as np
import pytest
from rbe_gpu.cpu_fallback._atomics import call_address
from rbe_gpu.cpu_fallback._jit import cpu_inline, cpu_kernel
from rbe_gpu.cpu_fallback._parts import (
    LINE,
    SHARE,
    c_function,
    count_up,
    in_parts,
    next_unit,
    part_kernel,
    run_parts,
    wait_for,
)
from rbe_gpu.cpu_fallback.arrays import address, floats_at, longs_at

import rbe_gpu as rbe
from rbe_gpu.kernel_struct import Struct

#: counters (2, parts, SHARE); done: the count of the first phase; marks (units) of the first phase, and what the
#: second phase saw of them
_PHASES = Struct("Phases", units="i64", parts="i64", counters="i64*", done="i64*", marks="i64*", seen="i64*")


def _two_phases(part, p, like):
    """Every unit of a first phase is done before one of the second begins."""
    units, parts = p.units, p.parts
    counters, done, marks, seen = longs_at(p.counters), longs_at(p.done), longs_at(p.marks), longs_at(p.seen)
    unit = next_unit(counters, units, part, parts)
    while unit < units:
        marks[unit] += 1
        count_up(done, 0)
        unit = next_unit(counters, units, part, parts)
    wait_for(done, 0, units)
    second = longs_at(p.counters + 8 * parts * SHARE)
    unit = next_unit(second, units, part, parts)
    while unit < units:
        for other in range(units):
            seen[unit] += marks[other]
        unit = next_unit(second, units, part, parts)


_kernel = part_kernel(_two_phases, _PHASES.dtype)


def _run(units, parts):
    counters, done = np.zeros((2, parts, SHARE), np.int64), np.zeros(1, np.int64)
    marks, seen = np.zeros(units, np.int64), np.zeros(units, np.int64)
    arrays = {"counters": counters, "done": done, "marks": marks, "seen": seen}
    filled = _PHASES.record(units=units, parts=parts, **{name: a.ctypes.data for name, a in arrays.items()})
    run_parts(_kernel(), parts, filled.ctypes.data)
    assert (marks == 1).all()
    assert (seen == units).all()
    assert done[0] == units


@pytest.mark.parametrize("units", [0, 1, 2, 7, 64])
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_every_unit_is_done_once_and_the_first_phase_before_the_second(units, parts):
    """Also with more parts than threads, some of which then run after others have ended."""
    for _ in range(50):
        _run(units, parts)


def test_parts_that_run_one_after_the_other_do_not_wait_for_ever():
    """What a kernel does where the pool is taken: here on one thread, and beside another Python thread."""
    before = rbe.get_num_threads()
    rbe.set_num_threads(1)
    try:
        _run(9, 4)
    finally:
        rbe.set_num_threads(before)
    workers = [threading.Thread(target=lambda: [_run(9, 2) for _ in range(200)]) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive()


@numba.njit
def _take(counters, units, part, parts):
    return next_unit(counters, units, part, parts)


def test_a_part_begins_with_its_own_share():
    """Memory stays in a core's cache from call to call; who is through helps the others."""
    counters = np.zeros(2 * SHARE, np.int64)
    assert [_take(counters, 7, 1, 2) for _ in range(5)] == [3, 4, 5, 6, 0]
    assert [_take(counters, 7, 0, 2) for _ in range(3)] == [1, 2, 7]
    assert _take(counters, 7, 1, 2) == 7


def _nothing(part, p, like):
    """A part for the test below."""


def test_threads_that_come_at_once_compile_once():
    address, name, start, found = (
        part_kernel(_nothing, _PHASES.dtype),
        _nothing.__qualname__,
        threading.Barrier(4),
        [],
    )

    def work():
        start.wait()
        found.append(address())

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len(found) == 4
    assert len(set(found)) == 1
    assert _nothing.__qualname__ == name


def test_an_inlined_function_is_not_called_from_python():
    """It has no machine code of its own to call."""
    array = np.zeros(SHARE, np.int64)
    with pytest.raises(TypeError, match="count_up has no machine code"):
        count_up(array, 0)


def _times(x, factor, out, start, stop):
    for i in range(start, stop):
        out[i] = _own_function(x[i], factor)


@cpu_inline(inline=False)
def _own_function(value, factor):
    return value * factor


_times_in_parts = in_parts(_times, LINE)


def _squared(source, target):
    floats_at(target)[0] = floats_at(source)[0] ** 2


_square = c_function(_squared)


@cpu_kernel
def _call(function, source, target):
    call_address(function, (source, target))


def test_shares_of_a_function():
    x = np.arange(1000, dtype=np.float32)
    out = np.zeros_like(x)
    _times_in_parts(x.size, 3, x, np.float32(2), out)
    assert np.array_equal(out, 2 * x)


def test_c_function_is_called_by_its_address():
    values = np.array([3.0, 0.0], np.float32)
    _call(_square(), address(values), address(values) + 4)
    assert values.tolist() == [3.0, 9.0]
    assert _square() == _square()

"""Paired timing on the CPU and on a GPU: all providers of a case in one process, in alternating order.

Rounds run A B C, C B A, A B C, ... What slows the machine for a while then slows all of them, and a speedup is the
median of the ratios within each round, not the ratio of two medians taken at different times.

On a GPU, CUDA events time calls that are queued behind a spinning kernel. Launching a small kernel from Python takes
longer than running it, so the GPU spins for as long as queueing takes; then the calls run back to back, and the
events see the GPU alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any, Protocol

import numpy as np

TURN = 2e-3  # seconds measured per turn: 10,000 times the resolution of a clock, 4000 times that of an event
#: a call shorter than this is preceded by one untimed call in its turn, which brings its data back into the cache
#: and lets the threads of the previous provider go to sleep
SHORT = 20e-3
MAX_QUEUED = 100  # calls per turn on a GPU: the queue of a stream holds about 1000 launches
TRIES = 5
LEAD = 200_000  # nanoseconds that the GPU spins at first
MAX_LEAD = 500_000_000

SPIN = r"""
extern "C" __global__ void spin(unsigned long long nanoseconds) {
    unsigned long long start, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
    do {
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    } while (now - start < nanoseconds);
}
"""

#: the same call, once for each set of buffers
Calls = Sequence[Callable[[], Any]]


def rotated(calls: Calls, count: int, first: int) -> list[Callable[[], Any]]:
    """calls[first], calls[first + 1], ... (from the start again), `count` calls."""
    return [calls[(first + i) % len(calls)] for i in range(count)]


class Clock(Protocol):
    """What `paired_times` measures with."""

    def seconds(self, calls: Calls, count: int, first: int) -> float:
        """Mean seconds per call of `rotated(calls, count, first)`."""

    def synchronize(self) -> None:
        """Wait until all queued work is done."""


class WallClock:
    """Wall time. With `wait` the launch counts, as for a caller that launches and waits for the result."""

    def __init__(
        self, wait: Callable[[], None] | None = None, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self._wait = wait
        self._now = now

    def synchronize(self) -> None:
        if self._wait is not None:
            self._wait()

    def seconds(self, calls: Calls, count: int, first: int) -> float:
        turn, wait = rotated(calls, count, first), self._wait
        self.synchronize()
        start = self._now()
        if wait is None:
            for call in turn:
                call()
        else:
            for call in turn:
                call()
                wait()
        return (self._now() - start) / count


class EventClock:
    """CUDA events on the null stream, which CuPy and PyTorch both use by default."""

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._spin = cupy.RawKernel(SPIN, "spin")
        self._leads: dict[int, int] = {}  # nanoseconds, by the list of calls

    def synchronize(self) -> None:
        self._cupy.cuda.Device().synchronize()

    def seconds(self, calls: Calls, count: int, first: int) -> float:
        cuda, turn = self._cupy.cuda, rotated(calls, count, first)
        for _ in range(TRIES):
            lead = self._leads.setdefault(id(calls), LEAD)
            start, end = cuda.Event(), cuda.Event()
            self._spin((1, 1, 1), (1, 1, 1), (np.uint64(lead),))
            start.record()
            began = time.perf_counter_ns()
            for call in turn:
                call()
            queued = time.perf_counter_ns() - began
            end.record()
            end.synchronize()
            if queued < lead:
                return float(cuda.get_elapsed_time(start, end)) * 1e-3 / count
            self._leads[id(calls)] = min(2 * queued, MAX_LEAD)
        raise RuntimeError(
            f"queueing {count} calls took {queued / 1e6:.1f} ms, longer than the GPU could be kept waiting"
        )


def paired_times(
    providers: Mapping[str, Calls],
    *,
    seconds: float,
    least: int = 5,
    most: int = 100,
    warm_up: int = 1,
    short: float = SHORT,
    max_calls: int | None = None,
    clock: Clock | None = None,
    now: Callable[[], float] = time.perf_counter,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds per call of every provider, one value per round, providers in alternating order.

    Every call of a provider runs `warm_up` times first (compilation, caches, thread pools), and once more to
    estimate how long it takes; neither counts. Rounds go on until `seconds` have passed and at least `least` were
    made, and stop at `most`.

    Parameters
    ----------
    providers : name -> its calls, over different buffers where no call may find its data in the cache
    seconds : time to spend on all providers together, warm-up not counted
    short : calls shorter than this are preceded by an untimed one in each turn; 0: none is
    max_calls : most calls in a turn
    clock : default: wall time
    now : the time that `seconds` is measured by
    on_round : called after every round

    Returns
    -------
    name -> seconds per call; entry i of every list comes from round i
    """
    clock = clock or WallClock()
    counts, primed = {}, set()
    for name, calls in providers.items():
        for _ in range(warm_up):
            for call in calls:
                call()
        clock.synchronize()
        once = max(clock.seconds(calls, len(calls), 0), 1e-9)
        counts[name] = min(max(1, ceil(TURN / once)), max_calls or ceil(TURN / 1e-9))
        if once < short:
            primed.add(name)
    names = list(providers)
    times: dict[str, list[float]] = {name: [] for name in names}
    position = dict.fromkeys(names, 0)
    began, rounds = now(), 0
    while rounds < least or (rounds < most and now() - began < seconds):
        for name in names if rounds % 2 == 0 else reversed(names):
            calls = providers[name]
            if name in primed:
                calls[position[name] % len(calls)]()
            times[name].append(clock.seconds(calls, counts[name], position[name]))
            position[name] += counts[name]
        rounds += 1
        on_round()
    return times


def speedups(times: Mapping[str, Sequence[float]], baseline: str) -> dict[str, list[float]]:
    """time(baseline) / time(provider) of every provider, round by round."""
    base = times[baseline]
    return {name: [b / t for b, t in zip(base, own, strict=True)] for name, own in times.items()}

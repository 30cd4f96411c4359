"""Time on a GPU: CUDA events around calls that are queued behind a spinning kernel, rivals in turn.

Launching a small kernel from Python takes longer than running it. So the GPU first spins for as long as queueing the
calls takes; then the calls run back to back, and the events see the GPU alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any, Protocol

import numpy as np

TURN = 2e-3  # seconds of GPU time in a turn: 4000 times the resolution of an event
MOST_CALLS = 100  # in a turn: the queue of a stream holds about 1000 launches
TRIES = 5
LEAD = 200_000  # nanoseconds that the GPU spins at first
MOST_LEAD = 500_000_000

SPIN = r"""
extern "C" __global__ void spin(unsigned long long nanoseconds) {
    unsigned long long start, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
    do {
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    } while (now - start < nanoseconds);
}
"""

Calls = Sequence[Callable[[], Any]]


class Clock(Protocol):
    """What `paired` measures with."""

    def seconds(self, calls: Calls, count: int, first: int) -> float:
        """Seconds per call of calls[first], calls[first + 1], ... (from the start again), `count` calls."""

    def synchronize(self) -> None:
        """Wait until everything queued is done."""


class EventClock:
    """CUDA events on the null stream, which CuPy and PyTorch both use by default."""

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._spin = cupy.RawKernel(SPIN, "spin")
        self._leads: dict[int, int] = {}  # nanoseconds, by the list of calls

    def synchronize(self) -> None:
        self._cupy.cuda.Device().synchronize()

    def seconds(self, calls: Calls, count: int, first: int) -> float:
        cuda = self._cupy.cuda
        for _ in range(TRIES):
            lead = self._leads.setdefault(id(calls), LEAD)
            start, end = cuda.Event(), cuda.Event()
            self._spin((1, 1, 1), (1, 1, 1), (np.uint64(lead),))
            start.record()
            began = time.perf_counter_ns()
            for i in range(count):
                calls[(first + i) % len(calls)]()
            queued = time.perf_counter_ns() - began
            end.record()
            end.synchronize()
            if queued < lead:
                return float(cuda.get_elapsed_time(start, end)) * 1e-3 / count
            self._leads[id(calls)] = min(2 * queued, MOST_LEAD)
        raise RuntimeError(
            f"queueing {count} calls took {queued / 1e6:.1f} ms, longer than the GPU could be kept waiting"
        )


class WallClock:
    """A clock on the wall: launching counts, as it does for who calls once and waits."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait

    def synchronize(self) -> None:
        self._wait()

    def seconds(self, calls: Calls, count: int, first: int) -> float:
        self._wait()
        began = time.perf_counter()
        for i in range(count):
            calls[(first + i) % len(calls)]()
            self._wait()
        return (time.perf_counter() - began) / count


def paired(
    clock: Clock,
    rivals: Mapping[str, Calls],
    seconds: float,
    least: int = 7,
    most: int = 60,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds per call of every rival, one value per round, rivals in turn and in alternating order.

    Parameters
    ----------
    rivals : name -> the same call over different memory, gone through in turn so that no call finds its data in the
        cache
    seconds : time to spend on all rivals together, warm-up not counted
    least, most : rounds

    Returns
    -------
    name -> seconds per call; entry i of every list comes from round i
    """
    counts = {}
    for name, calls in rivals.items():
        for call in calls:
            call()
        clock.synchronize()
        clock.seconds(calls, len(calls), 0)
        once = max(clock.seconds(calls, len(calls), 0), 1e-7)
        counts[name] = min(MOST_CALLS, max(1, ceil(TURN / once)))
    names = list(rivals)
    times: dict[str, list[float]] = {name: [] for name in names}
    position = dict.fromkeys(names, 0)
    began, rounds = now(), 0
    while rounds < least or (rounds < most and now() - began < seconds):
        for name in names if rounds % 2 == 0 else reversed(names):
            times[name].append(clock.seconds(rivals[name], counts[name], position[name]))
            position[name] += counts[name]
        rounds += 1
    return times

"""How quiet the machine is while a case is measured.

Two figures stand with each case: how much longer a fixed piece of work took before and after it than the fastest time
in this run (clock, a shared core), and the share of the cores' time that processes other than the report's took while
it ran. A case that was disturbed is measured again, as long as there is time left for that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import psutil

from .rows import DISTURBED, Row, own_cores

SPINS = 5
STEPS = 40_000  # additions of a spin: some 2 ms
TRIES = 3
_WORK = ("user", "system", "nice", "irq", "softirq", "steal")  # guest time is part of user time
LEAST_SECONDS = 0.05  # counters of processor time have steps of 10 ms: a shorter case says nothing of others


def _spin() -> float:
    """Seconds that a fixed number of additions takes, the least of some."""
    best = float("inf")
    for _ in range(SPINS):
        total, began = 0, time.perf_counter()
        for i in range(STEPS):
            total += i
        best = min(best, time.perf_counter() - began)
    return best


def _busy(cores: Collection[int]) -> float:
    """Seconds that these cores have worked since the machine was started, for any process or another guest."""
    times = psutil.cpu_times(percpu=True)
    chosen = [t for i, t in enumerate(times) if i in cores] or times
    return sum(getattr(t, name, 0.0) for t in chosen for name in _WORK)


def _own(pids: Iterable[int]) -> float:
    """Processor seconds of these processes; one that has ended counts nothing."""
    total = 0.0
    for pid in pids:
        try:
            used = psutil.Process(pid).cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += used.user + used.system
    return total


@dataclass(frozen=True)
class Conditions:
    """`noise` and `others` as in `Row`; `others` is None for what was too short."""

    noise: float
    others: float | None

    @property
    def worst(self) -> float:
        return max(self.noise, self.others or 0.0)


@dataclass
class Watch:
    """Watches the machine while cases are measured.

    Attributes
    ----------
    pids : the processes of the report
    patience : seconds that may be spent on repetitions
    """

    pids: Callable[[], Iterable[int]]
    patience: float
    spin: Callable[[], float] = _spin
    now: Callable[[], float] = time.perf_counter
    busy: Callable[[], float] = field(default_factory=lambda: _busy_of_here())
    own: Callable[[Iterable[int]], float] = _own
    cores: int = field(default_factory=lambda: len(own_cores()))
    fastest: float = float("inf")

    def conditions(self, work: Callable[[], Any]) -> tuple[Any, Conditions, float]:
        """The result of some work, the conditions it ran under, and the seconds it took."""
        before = self._spin()
        busy, own, began = self.busy(), self.own(self.pids()), self.now()
        result = work()
        seconds = self.now() - began
        others = (self.busy() - busy) - (self.own(self.pids()) - own)
        slowest = max(before, self._spin())
        share = None if seconds < LEAST_SECONDS else max(0.0, others / (self.cores * seconds))
        return result, Conditions(slowest / self.fastest - 1, share), seconds

    def _spin(self) -> float:
        took = self.spin()
        self.fastest = min(self.fastest, took)
        return took

    def measure(self, work: Callable[[], Iterable[Row]]) -> list[Row]:
        """The rows of a case with its conditions, of the quietest of up to three tries."""
        best: tuple[Conditions, list[Row]] | None = None
        for attempt in range(TRIES):
            rows, conditions, seconds = self.conditions(lambda: list(work()))
            if best is None or conditions.worst < best[0].worst:
                best = conditions, rows
            if attempt:
                self.patience -= seconds
            if best[0].worst <= DISTURBED or self.patience < seconds:
                break
        assert best is not None
        return [replace(row, noise=best[0].noise, others=best[0].others) for row in best[1]]


def _busy_of_here() -> Callable[[], float]:
    cores = frozenset(own_cores())
    return lambda: _busy(cores)

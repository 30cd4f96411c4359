"""Run a function on any number of tasks, of which few are in memory at a time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import CancelledError
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from .. import __version__
from .connect import ClusterError, distributed
from .workers import check_version

T = TypeVar("T")
R = TypeVar("R")

PER_THREAD = 2  # tasks for each thread of the workers: one runs, and the next one is there when it ends
_REFRESH = 5.0  # seconds between two looks at the workers
_PATIENCE = 120.0  # seconds without any worker, after which no new one is waited for


def run_tasks(
    client: Any, function: Callable[[T], R], tasks: Iterable[T]
) -> Generator[tuple[T, R], None, None]:
    """The result of every task, in the order in which they end.

    `tasks` is read as far as the workers are busy: `PER_THREAD` tasks for each of their threads are under way. A
    task whose worker dies runs again on another one. Closing the iterator cancels those that have not started.

    Parameters
    ----------
    client : a `distributed.Client`
    function, tasks : picklable; results should be small, because they pass through the scheduler

    Raises
    ------
    ClusterError
        The scheduler is lost, there has been no worker for two minutes, the workers of a task died each time, or one
        has another version of the package.
    OSError
        Of a task, with the name of its worker. Other exceptions are raised as they are.
    """
    source = iter(tasks)
    pending: dict[Any, tuple[T, Any]] = {}
    ended: SimpleQueue[Any] = SimpleQueue()
    pool = TaskPool(client)
    exhausted = False
    try:
        while True:
            while not exhausted and len(pending) < pool.window():
                try:
                    task = next(source)
                except StopIteration:
                    exhausted = True
                    break
                future = pool.submit(function, task)
                pending[future.key] = task, future
                future.add_done_callback(ended.put)
            if not pending:
                return
            try:
                future = ended.get(timeout=1.0)
            except Empty:
                pool.check()
                continue
            task, _ = pending.pop(future.key)
            yield task, pool.result(future)
    finally:
        pool.cancel(future for _, future in pending.values())


class TaskPool:
    """Tasks of one client: submitted, waited for, cancelled.

    Parameters
    ----------
    client : a `distributed.Client`
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._threads = 0
        self._asked = -_REFRESH
        self._seen = time.monotonic()  # the last time that there was a worker

    def window(self) -> int:
        """Tasks that keep the workers busy."""
        return PER_THREAD * max(1, self._thread_count())

    def submit(self, function: Callable[[T], R], task: T) -> Any:
        """The future of a task, for `result`."""
        return self._client.submit(_on_worker, function, task, __version__, pure=False)

    def result(self, future: Any) -> Any:
        """The result of a task when it is there; exceptions as of `run_tasks`."""
        ended = threading.Event()
        future.add_done_callback(lambda _: ended.set())
        while not ended.wait(1.0):
            self.check()
        return _result(future)

    def cancel(self, futures: Iterable[Any]) -> None:
        """Take back tasks that have not started."""
        unwanted = list(futures)
        if unwanted and self._client.status == "running":
            self._client.cancel(unwanted)

    def check(self) -> None:
        """A ClusterError if the scheduler is lost, or there have been no workers for long."""
        if self._client.status != "running":
            raise ClusterError("the connection to the scheduler was lost")
        if not self._thread_count() and time.monotonic() - self._seen > _PATIENCE:
            raise ClusterError(f"there has been no worker for {_PATIENCE:.0f} s")

    def _thread_count(self) -> int:
        now = time.monotonic()
        if now - self._asked >= _REFRESH:
            self._asked = now
            self._threads = sum(self._client.nthreads().values()) if self._client.status == "running" else 0
            if self._threads:
                self._seen = now
        return self._threads


def _on_worker(function: Callable[[T], R], task: T, expected: str) -> R:
    """Run a task of a process with the version `expected` of the package: workers may join after `check_workers`.

    An OSError names the worker, whose disk is another than that of this process.
    """
    where = distributed().get_worker().address
    check_version(where, __version__, expected)
    try:
        return function(task)
    except ClusterError:
        raise
    except OSError as error:
        name = "" if error.filename is None else f"{error.filename}: "
        raise ClusterError(f"worker {where}: {name}{error.strerror or error}") from None


def scratch_folder() -> Path:
    """Of the worker that calls this in a task: its own folder on its machine, removed with it."""
    return Path(distributed().get_worker().local_directory)


def _result(future: Any) -> Any:
    scheduling = distributed()
    try:
        return future.result()
    except scheduling.KilledWorker as error:
        raise ClusterError(
            f"{error.allowed_failures + 1} workers died in the same task, the last one {error.last_worker.address}; "
            "they may have too little memory"
        ) from None
    except (CancelledError, asyncio.CancelledError):
        raise ClusterError("the connection to the scheduler was lost") from None
    except ModuleNotFoundError as error:
        raise ClusterError(f"a worker lacks the module {error.name}; install what this process has") from None

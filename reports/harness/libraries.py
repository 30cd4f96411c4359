"""One process for each library that is measured, so that the idle threads of one cannot slow another.

BLAS, OpenMP and the thread pools of PyTorch and ONNX Runtime let idle threads spin for a while, on the cores that the
next provider wants. Each library therefore computes in a process of its own, which answers when its threads have gone
to sleep; only then is it another's turn. Calls are timed inside the process, in the order that `paired_times` asks
for; every process builds the cases by itself, from the same files.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from .measure import Provider, build_only, library_of
from .timing import Calls, WallClock

PATIENCE = 2.0  # seconds that a process has to end
PAUSE = 1e-3  # seconds between two checks of the threads
LONGEST = 1.0  # seconds; Intel's OpenMP spins for 0.2


class LibraryFailed(RuntimeError):
    """A library's process has ended, or raised an error; the message has its last lines."""


class Library:
    """The process of one library.

    Parameters
    ----------
    name : as `library_of` gives it
    setup : "package.module:function", called in the process with `arguments`; returns an object whose methods
        `request` calls
    """

    def __init__(self, name: str, setup: str, **arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(theirs, name, setup, arguments),
            daemon=True,
            name=f"measure {name}",
        )
        self._process.start()
        theirs.close()

    def wait(self) -> Library:
        """Wait until it is set up. An error there is raised here."""
        self.receive()
        return self

    @property
    def pid(self) -> int:
        pid = self._process.pid
        assert pid is not None
        return pid

    def request(self, method: str, *arguments: Any) -> Any:
        """Call a method of the object in the process. An error there is raised here."""
        self.send(method, *arguments)
        return self.receive()

    def send(self, method: str, *arguments: Any) -> None:
        """Ask, without waiting; `receive` has the answer."""
        with self._explained():
            self._pipe.send((method, arguments))

    def ready(self, seconds: float) -> bool:
        """Wait for an answer at most so long; whether it is there, or the process has ended."""
        return bool(self._pipe.poll(seconds))

    def receive(self) -> Any:
        """The answer to `send`. An error there is raised here."""
        with self._explained():
            error, value = self._pipe.recv()
        if error is not None:
            raise error
        return value

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join(PATIENCE)
            raise LibraryFailed(
                f"the process that measures {self.name} ended with status {self._process.exitcode}"
            ) from None

    def close(self) -> None:
        """End the process."""
        self._pipe.close()  # it ends when it reads the next request
        self._process.join(PATIENCE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


class RemoteCalls(Sequence[Callable[[], Any]]):
    """The calls of a provider in the process of its library; a call returns nothing."""

    def __init__(self, library: Library, provider: str, count: int) -> None:
        self.library, self.provider, self._count = library, provider, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return lambda: self.library.request("call", self.provider, index)


class RemoteClock:
    """Wall time inside the processes of `RemoteCalls`."""

    def seconds(self, calls: Calls, count: int, first: int) -> float:
        assert isinstance(calls, RemoteCalls)
        return float(calls.library.request("seconds", calls.provider, count, first))

    def synchronize(self) -> None:
        pass


class Server:
    """What a process answers to `RemoteCalls` and `RemoteClock`; `providers` are the ones that are measured now."""

    def __init__(self) -> None:
        self.providers: Mapping[str, Provider] = {}
        self._clock = WallClock()

    def call(self, provider: str, index: int) -> None:
        self.providers[provider].calls[index]()

    def seconds(self, provider: str, count: int, first: int) -> float:
        return self._clock.seconds(self.providers[provider].calls, count, first)


def remote(libraries: Mapping[str, Library], counts: Mapping[str, int]) -> dict[str, RemoteCalls]:
    """Providers by name, each with so many calls, in the processes of their libraries."""
    return {name: RemoteCalls(libraries[library_of(name)], name, count) for name, count in counts.items()}


def _serve(pipe: Any, name: str, setup: str, arguments: Mapping[str, Any]) -> None:
    """The process: set up, then answer requests until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    build_only(name)
    try:
        module, function = setup.split(":")
        server = getattr(import_module(module), function)(**arguments)
    except Exception as error:
        pipe.send((_portable(error), None))
        return
    pipe.send((None, None))
    while True:
        try:
            method, values = pipe.recv()
        except (EOFError, OSError):
            return
        failed, value = None, None
        try:
            value = getattr(server, method)(*values)
        except Exception as error:
            failed = _portable(error)
        _sleep_until_idle()
        try:
            pipe.send((failed, value))
        except OSError:  # nobody waits for it: the report has been interrupted
            return


def _portable(error: Exception) -> Exception:
    """An error that can be sent; one of a class of this package as it is."""
    if type(error).__module__.partition(".")[0] in ("rbe_gpu", "builtins"):
        return error
    return LibraryFailed("".join(traceback.format_exception_only(error)).strip())


def _sleep_until_idle() -> None:
    """Wait until no other thread of this process works or spins, at most `LONGEST`."""
    deadline = time.monotonic() + LONGEST
    while time.monotonic() < deadline:
        before = time.process_time()
        time.sleep(PAUSE)
        used = time.process_time() - before
        working = _others_work()
        if not (used > PAUSE / 10 if working is None else working):
            return


def _others_work() -> bool | None:
    """Whether another thread of this process runs or waits for a core; None where the system does not say."""
    tasks, own = Path("/proc/self/task"), str(threading.get_native_id())
    try:
        for task in tasks.iterdir():
            if task.name != own and (task / "stat").read_text().rpartition(")")[2].split()[0] == "R":
                return True
    except OSError:
        return None if not tasks.exists() else True  # a thread that has just ended: check again
    return False

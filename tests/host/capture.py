"""Streams, graphs, and a record of what allocates or waits, for the stand-in of CuPy.

`with installed() as (cupy, events):` is `stand_in.installed()` with `cupy.cuda.Stream`, whose capture keeps launches
instead of running them, as CUDA does. `events` names every allocation of device memory and every wait for the device
since it was last cleared; within a capture either is a `CaptureError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from rbe_gpu.gpu import _execute
from rbe_gpu.gpu._launch import Launch

from . import stand_in
from .executor import CAPABILITY, HostExecutor

#: Methods of arrays that wait for the device, and those that make a new array.
WAITS = ("get", "set", "item", "tolist", "__int__", "__float__", "__bool__", "__index__")
ALLOCATES = ("copy", "min", "max", "sum", "mean", "any", "all", "cumsum", "nonzero", "repeat")


class CaptureError(RuntimeError):
    """What CUDA does not allow while a stream is captured."""


class Graph:
    def __init__(self, launches: list[Launch], run: Callable[[tuple[Launch, ...]], None]) -> None:
        self.launches = launches
        self._run = run

    def launch(self, stream: Stream | None = None) -> None:
        self._run(tuple(self.launches))


class Stream:
    """Work of the stand-in is done at once, so that streams and events order nothing."""

    current: list[Stream]
    captured: list[Launch] | None = None  # of the stream under capture, if there is one

    def __init__(self, non_blocking: bool = False) -> None:
        self.non_blocking = non_blocking

    def __enter__(self) -> Stream:
        Stream.current.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        Stream.current.pop()

    def record(self) -> SimpleNamespace:
        assert Stream.captured is None or self is not Stream.current[-1]
        return SimpleNamespace(stream=self)

    def wait_event(self, event: SimpleNamespace) -> None:
        assert isinstance(event.stream, Stream)

    def begin_capture(self) -> None:
        assert self.non_blocking, "the default stream cannot be captured"
        assert self is Stream.current[-1]
        Stream.captured = []

    def end_capture(self) -> Graph:
        launches, Stream.captured = Stream.captured, None
        assert launches is not None
        return Graph(launches, HostExecutor())


Stream.current = [Stream()]


def captured(call: Callable[[], Any]) -> Graph:
    """The launches of a call on a stream of its own."""
    stream = Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        call()
        return stream.end_capture()


def _record(launches: tuple[Launch, ...]) -> None:
    if Stream.captured is None:
        HostExecutor()(launches)
    else:
        Stream.captured.extend(launches)


@contextmanager
def installed() -> Iterator[tuple[Any, list[str]]]:
    """The stand-in with streams, and the record."""
    events: list[str] = []

    def note(event: str) -> None:
        if Stream.captured is not None:
            raise CaptureError(f"{event} while a stream is captured")
        events.append(event)

    def noted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            note(name)
            return method(*args, **kwargs)

        return call

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of the module: an allocation where the result is none of its arguments' memory."""

        def call(*args: Any, **kwargs: Any) -> Any:
            found = function(*args, **kwargs)
            given = [a for a in (*args, *kwargs.values()) if isinstance(a, np.ndarray)]
            if isinstance(found, np.ndarray) and not any(np.may_share_memory(found, a) for a in given):
                note(name)
            return found

        return call

    def ufunc(self: Any, function: Any, method: str, *inputs: Any, out: Any = None, **kwargs: Any) -> Any:
        note(f"{function.__name__}{'' if out is None else ' by CuPy'}")
        plain = [np.asarray(a).view(np.ndarray) if isinstance(a, np.ndarray) else a for a in inputs]
        if out is not None:
            kwargs["out"] = tuple(a.view(np.ndarray) for a in out)
        found = getattr(function, method)(*plain, **kwargs)
        return out[0] if out is not None else np.asarray(found).view(stand_in.ndarray)

    def astype(self: Any, dtype: Any, copy: bool = True, **_: Any) -> Any:
        if not copy and self.dtype == dtype:
            return self
        note("astype")
        return np.ndarray.astype(self, dtype)

    def setitem(self: Any, key: Any, value: Any) -> None:
        if Stream.captured is not None:
            raise CaptureError(
                "an assignment by CuPy, which the stand-in cannot keep, while a stream is captured"
            )
        np.ndarray.__setitem__(self, key, value)

    methods: dict[str, Any] = {
        n: noted(n, getattr(stand_in.ndarray, n))
        for n in (*WAITS, *ALLOCATES)
        if hasattr(stand_in.ndarray, n)
    }
    methods |= {"__array_ufunc__": ufunc, "astype": astype, "__setitem__": setitem}
    with stand_in.installed() as cupy, _execute.executor(_record, CAPABILITY):
        plain = cupy.__getattr__
        cupy.__getattr__ = lambda name: watched(name, plain(name))
        cupy.asarray = watched("asarray", cupy.asarray)
        cupy.cuda.Stream = Stream
        cupy.cuda.get_current_stream = lambda: Stream.current[-1]
        with mock.patch.multiple(stand_in.ndarray, create=True, **methods):
            yield cupy, events

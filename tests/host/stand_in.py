"""A stand-in for CuPy over host memory: the path of CuPy arrays through the package, without a GPU.

`with installed():` makes `import cupy` give it, and runs launches with the host build. Its arrays are NumPy arrays
that say they are CuPy's; what CuPy does on a device is not shown by this, only what this package does with its
arrays.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import numpy as np

from rbe_gpu import dispatch
from rbe_gpu.gpu import _execute

from .executor import CAPABILITY, HostExecutor

GPUS = 2
FREE, TOTAL = 250 * 10**6, 80 * 10**9  # bytes, as memGetInfo tells


class ndarray(np.ndarray):
    """An array of GPU `gpu`. NumPy refuses to be mixed in unseen, as CuPy does."""

    __module__ = "cupy"
    __array_priority__ = 100
    gpu = 0

    def __array_finalize__(self, parent: Any) -> None:
        self.gpu = getattr(parent, "gpu", _current[-1])

    @property
    def device(self) -> Any:
        return SimpleNamespace(id=self.gpu)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return dict(self.__array_interface__)

    def get(self) -> np.ndarray:
        return np.array(self, subok=False)

    def set(self, host: np.ndarray) -> None:
        assert type(host) is np.ndarray
        assert (host.shape, host.dtype) == (self.shape, self.dtype)
        self[...] = host


class Foreign:
    """An array of another library: nothing but `__cuda_array_interface__`."""

    def __init__(self, array: np.ndarray) -> None:
        self.held = array
        self.__cuda_array_interface__ = dict(array.__array_interface__)


class CUDARuntimeError(RuntimeError):
    pass


class OutOfMemoryError(MemoryError):
    """As CuPy raises it: `size` bytes asked for."""

    __module__ = "cupy.cuda.memory"

    def __init__(self, size: int) -> None:
        super().__init__(f"Out of memory allocating {size:,} bytes (allocated so far: 512 bytes).")


_current = [0]


class _Device:
    compute_capability = "90"

    def __init__(self, number: int = 0) -> None:
        self.id = number

    def __enter__(self) -> _Device:
        _current.append(self.id)
        return self

    def __exit__(self, *_: object) -> None:
        _current.pop()

    def synchronize(self) -> None:
        pass


class RawModule:
    """Takes a source; `compiled` holds those that were compiled ahead of a launch."""

    compiled: ClassVar[list[str]] = []

    def __init__(self, code: str, options: tuple[str, ...]) -> None:
        self._code = code

    def compile(self) -> None:
        self.compiled.append(self._code)


def RawKernel(code: str, name: str) -> Any:
    """A kernel that does nothing."""
    return lambda grid, block, args: None


class Event:
    """An event whose time is the host's when it is recorded."""

    def record(self) -> None:
        self.at = perf_counter()

    def synchronize(self) -> None:
        pass


class Nvtx:
    """Keeps the names of the ranges that were opened, and how many are open."""

    available = True

    def __init__(self) -> None:
        self.names: list[str] = []
        self.open = 0

    def RangePush(self, message: str) -> None:
        self.names.append(message)
        self.open += 1

    def RangePop(self) -> None:
        self.open -= 1


PROPERTIES = {
    "name": b"Stand-in GPU",
    "major": 9,
    "minor": 0,
    "multiProcessorCount": 2,
    "totalGlobalMem": 80 << 30,
    "l2CacheSize": 50 << 20,
}


def _asarray(a: Any, dtype: Any = None) -> ndarray:
    if isinstance(a, ndarray) and a.gpu == _current[-1]:
        return a if dtype is None else a.astype(dtype, copy=False)
    foreign = not isinstance(a, np.ndarray) and hasattr(a, "__cuda_array_interface__")
    there = SimpleNamespace(__array_interface__=a.__cuda_array_interface__, held=a) if foreign else None
    view = (np.array(a, dtype, subok=False) if there is None else np.asarray(there)).view(ndarray)
    view.gpu = _current[-1]
    return view


def _module() -> ModuleType:
    cupy = ModuleType("cupy")

    def wrapped(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        function = getattr(np, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            for a in (*args, *kwargs.values()):
                if isinstance(a, np.ndarray) and a.ndim:
                    assert isinstance(a, ndarray), f"cupy.{name} was given a NumPy array"
            found = function(*args, **kwargs)
            return found.view(ndarray) if type(found) is np.ndarray else found

        return call

    cupy.__getattr__ = wrapped  # type: ignore[method-assign]
    cupy.__version__ = "0"  # type: ignore[attr-defined]
    cupy.capturing = False  # type: ignore[attr-defined]
    cupy.RawModule = RawModule  # type: ignore[attr-defined]
    cupy.RawKernel = RawKernel  # type: ignore[attr-defined]
    cupy.ndarray = ndarray  # type: ignore[attr-defined]
    cupy.asarray = _asarray  # type: ignore[attr-defined]
    tricks = SimpleNamespace(as_strided=partial(np.lib.stride_tricks.as_strided, subok=True))
    cupy.lib = SimpleNamespace(stride_tricks=tricks)  # type: ignore[attr-defined]
    cupy.cuda = SimpleNamespace(  # type: ignore[attr-defined]
        Device=_Device,
        nvrtc=SimpleNamespace(getVersion=lambda: (13, 2), getSupportedArchs=lambda: (75, 90)),
        Event=Event,
        get_elapsed_time=lambda before, after: 1e3 * (after.at - before.at),
        get_current_stream=lambda: SimpleNamespace(is_capturing=lambda: cupy.capturing),
        nvtx=Nvtx(),
        memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
        set_allocator=lambda allocator: None,
        runtime=SimpleNamespace(
            getDeviceCount=lambda: GPUS,
            getDevice=lambda: _current[-1],
            memGetInfo=lambda: (FREE, TOTAL),
            free=lambda pointer: None,
            getDeviceProperties=lambda number: dict(PROPERTIES),
            runtimeGetVersion=lambda: 13020,
            CUDARuntimeError=CUDARuntimeError,
        ),
    )
    cupy.get_default_memory_pool = lambda: SimpleNamespace(total_bytes=lambda: 10**9)  # type: ignore[attr-defined]
    return cupy


@contextmanager
def installed() -> Iterator[ModuleType]:
    """Within the block CuPy is this stand-in, and kernels are those of the host build."""
    cupy = _module()
    cuda = dispatch.Backend("cuda", "rbe_gpu.gpu", "cupy")
    before = sys.modules.get("cupy")
    sys.modules["cupy"] = cupy  # by hand: mock.patch.dict would forget every module imported meanwhile
    try:
        with mock.patch.object(dispatch, "CUDA", cuda), _execute.executor(HostExecutor(), CAPABILITY):
            yield cupy
    finally:
        if before is None:
            del sys.modules["cupy"]
        else:
            sys.modules["cupy"] = before

"""Runs `Launch`es over NumPy arrays with the host build, and checks what CuPy would not.

CuPy passes any argument on; here the number, kind and width of the arguments must be those of the kernel.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from rbe_gpu.gpu import _execute, _source
from rbe_gpu.gpu._launch import Kernel, Launch
from rbe_gpu.kernel_struct import address

from . import build

_SCALARS = {"f4": np.float32, "i4": np.int32, "u4": np.uint32, "i8": np.int64, "u8": np.uint64}
#: Compute capability that the host build stands for where a test does not choose: of the one with every kernel.
CAPABILITY = (9, 0)
_lock = threading.Lock()  # a library runs one block at a time


class KernelError(RuntimeError):
    """What a kernel did that a GPU leaves undefined, or a launch whose arguments are not the kernel's."""


class Library:
    """The kernels of one compiled source; or one kernel, compiled for the constants of a launch (`for_launch`)."""

    def __init__(self, path: Path, for_launch: bool = False) -> None:
        self._for_launch = for_launch
        self._lib = ctypes.CDLL(str(path))
        for name in ("rbe_name", "rbe_parameters", "rbe_launch"):
            getattr(self._lib, name).restype = ctypes.c_char_p
        self.index = {self._lib.rbe_name(i).decode(): i for i in range(self._lib.rbe_count())}
        self.parameters = {
            name: self._lib.rbe_parameters(i).decode().split() for name, i in self.index.items()
        }
        self.bounds = {name: self._lib.rbe_bounds(i) for name, i in self.index.items()}

    def check(self, launch: Launch) -> None:
        """A launch that does not fit its kernel is an error."""
        self._slots(launch.entry, prod(launch.block), self._values(launch))

    def launch(self, launch: Launch, reverse: bool = False) -> None:
        """Run one launch; `reverse` runs blocks, warps and lanes in descending order."""
        self.run(
            launch.entry,
            launch.grid,
            launch.block,
            *self._values(launch),
            shared=launch.shared,
            reverse=reverse,
        )

    def run(
        self, entry: str, grid: Any, block: Any, *args: Any, shared: int = 0, reverse: bool = False
    ) -> None:
        """Run a kernel with these arguments: arrays, None and NumPy scalars of the parameters' types."""
        slots = self._slots(entry, prod(block), args)
        base = slots.ctypes.data
        pointers = (ctypes.c_void_p * max(1, len(slots)))(*(base + 8 * i for i in range(len(slots))))
        sizes = ((ctypes.c_uint * 3)(*size) for size in (grid, block))
        with _lock:
            error = self._lib.rbe_launch(
                self.index[entry], pointers, *sizes, ctypes.c_size_t(shared), int(reverse)
            )
        if error:
            raise KernelError(f"{entry}: {error.decode()}")

    def _values(self, launch: Launch) -> tuple[Any, ...]:
        values = launch.params.values
        return tuple(values[i] for i in launch.params.struct.passed) if self._for_launch else values

    def _slots(self, entry: str, threads: int, args: tuple[Any, ...]) -> np.ndarray:
        """The arguments in 8 bytes each; arguments and threads that do not fit the kernel are an error."""
        if entry not in self.index:
            raise KernelError(f"there is no kernel {entry}")
        if threads > self.bounds[entry]:
            raise KernelError(f"{entry}: {threads} threads, launch bounds {self.bounds[entry]}")
        parameters = self.parameters[entry]
        if len(args) != len(parameters):
            raise KernelError(f"{entry} takes {len(parameters)} arguments, got {len(args)}")
        slots = np.zeros(len(parameters), np.uint64)
        for i, (arg, code) in enumerate(zip(args, parameters, strict=True)):
            if code == "P" and (arg is None or isinstance(arg, np.ndarray)):
                slots[i] = 0 if arg is None else address(arg)
            elif code != "P" and isinstance(arg, np.generic) and arg.dtype == _SCALARS[code]:
                slots[i : i + 1].view(arg.dtype)[0] = arg
            else:
                raise KernelError(
                    f"{entry}: argument {i} is {type(arg).__name__}, the parameter is "
                    f"{'a pointer' if code == 'P' else _SCALARS[code].__name__}"
                )
        return slots


@lru_cache
def library(op: str, sanitize: bool = False) -> Library:
    """The kernels of `cuda_src/<op>.cu`."""
    return Library(build.library(op, sanitize))


@cache
def kernel_library(kernel: Kernel) -> Library:
    """One kernel, compiled for its configuration from the text that a GPU gets."""
    return Library(build.build(_source.kernel_source(kernel)), for_launch=True)


class HostExecutor:
    """`_execute.executor(HostExecutor())`: the launches of `rbe_gpu.gpu` on NumPy arrays.

    specialised : each kernel is compiled for its configuration, as on a GPU; else one library of a source takes the
        numbers of the configuration as parameters
    """

    def __init__(self, reverse: bool = False, sanitize: bool = False, specialised: bool = False) -> None:
        self.reverse = reverse
        self.sanitize = sanitize
        self.specialised = specialised

    def __call__(self, launches: tuple[Launch, ...]) -> None:
        for launch in launches:
            kernels = kernel_library(launch.kernel) if self.specialised else library(launch.op, self.sanitize)
            kernels.launch(launch, self.reverse)


@contextmanager
def on_host(reverse: bool = False) -> Iterator[None]:
    """Within the block launches run on the host build, in ascending or descending order."""
    with _execute.executor(HostExecutor(reverse)):
        yield

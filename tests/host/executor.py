"""Runs `Launch`es over NumPy arrays with the host build, and checks what CuPy would not.

CuPy passes any argument on; here the number, kind and width of the arguments must be those of the kernel.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from pathlib import Path

import numpy as np

from rbe_gpu.gpu import _launch
from rbe_gpu.gpu._launch import Launch, address

from . import build

_STRUCT = {"f4": np.float32, "i4": np.int32, "u4": np.uint32, "i8": np.int64, "u8": np.uint64}
_lock = threading.Lock()  # a library runs one block at a time


class KernelError(RuntimeError):
    """What a kernel did that a GPU leaves undefined, or a launch whose arguments are not the kernel's."""


class Library:
    """The kernels of one compiled source."""

    def __init__(self, path: Path) -> None:
        self._lib = ctypes.CDLL(str(path))
        for name in ("rbe_name", "rbe_parameters", "rbe_launch"):
            getattr(self._lib, name).restype = ctypes.c_char_p
        self.index = {self._lib.rbe_name(i).decode(): i for i in range(self._lib.rbe_count())}
        self.parameters = {
            name: self._lib.rbe_parameters(i).decode().split() for name, i in self.index.items()
        }
        self.bounds = {name: self._lib.rbe_bounds(i) for name, i in self.index.items()}

    def check(self, launch: Launch) -> np.ndarray:
        """The arguments in 8 bytes each; a launch that does not fit its kernel is an error."""
        if launch.entry not in self.index:
            raise KernelError(f"{launch.op}.cu has no kernel {launch.entry}")
        if prod(launch.block) > self.bounds[launch.entry]:
            raise KernelError(
                f"{launch.entry}: {prod(launch.block)} threads, launch bounds {self.bounds[launch.entry]}"
            )
        return _slots(launch, self.parameters[launch.entry])

    def launch(self, launch: Launch, reverse: bool = False) -> None:
        """Run one launch; `reverse` runs blocks, warps and lanes in descending order."""
        slots = self.check(launch)
        base = slots.ctypes.data
        pointers = (ctypes.c_void_p * max(1, len(slots)))(*(base + 8 * i for i in range(len(slots))))
        grid, block = ((ctypes.c_uint * 3)(*size) for size in (launch.grid, launch.block))
        with _lock:
            error = self._lib.rbe_launch(
                self.index[launch.entry],
                pointers,
                grid,
                block,
                ctypes.c_size_t(launch.shared),
                int(reverse),
            )
        if error:
            raise KernelError(f"{launch.entry}: {error.decode()}")


def _slots(launch: Launch, parameters: list[str]) -> np.ndarray:
    if len(launch.args) != len(parameters):
        raise KernelError(f"{launch.entry} takes {len(parameters)} arguments, got {len(launch.args)}")
    slots = np.zeros(len(parameters), np.uint64)
    for i, (arg, code) in enumerate(zip(launch.args, parameters, strict=True)):
        if code == "P" and (arg is None or isinstance(arg, np.ndarray)):
            slots[i] = 0 if arg is None else address(arg)
        elif code != "P" and isinstance(arg, np.generic) and arg.dtype == _STRUCT[code]:
            slots[i : i + 1].view(arg.dtype)[0] = arg
        else:
            raise KernelError(
                f"{launch.entry}: argument {i} is {type(arg).__name__}, the parameter is "
                f"{'a pointer' if code == 'P' else _STRUCT[code].__name__}"
            )
    return slots


@lru_cache
def library(op: str, sanitize: bool = False) -> Library:
    """The kernels of `cuda_src/<op>.cu`."""
    return Library(build.library(op, sanitize))


class HostExecutor:
    """`_launch.executor(HostExecutor())`: the launches of `rbe_gpu.gpu` on NumPy arrays."""

    def __init__(self, reverse: bool = False, sanitize: bool = False) -> None:
        self.reverse = reverse
        self.sanitize = sanitize

    def __call__(self, launches: tuple[Launch, ...]) -> None:
        for launch in launches:
            library(launch.op, self.sanitize).launch(launch, self.reverse)


@contextmanager
def on_host(reverse: bool = False) -> Iterator[None]:
    """Within the block launches run on the host build, in ascending or descending order."""
    with _launch.executor(HostExecutor(reverse)):
        yield

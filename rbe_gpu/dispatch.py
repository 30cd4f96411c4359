"""Which backend runs an op: decided by the types of the arrays.

numpy arrays run on the `cpu` backend (`cpu_fallback/<op>.py`), CuPy arrays on the `cuda` backend
(`rbe_gpu/gpu/<op>.py`). CuPy is imported only where its arrays are used.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np


class BackendOp:
    """An op of a `Backend`: its module is imported on first use; the function then is a plain attribute."""

    def __set_name__(self, owner: type[Backend], name: str) -> None:
        self.name = name

    def __get__(self, backend: Backend | None, owner: type[Backend]) -> Any:
        if backend is None:
            return self
        function = self.resolve(backend)
        setattr(backend, self.name, function)
        return function

    def resolve(self, backend: Backend) -> Callable[..., Any]:
        """The function of a backend; `NotImplementedError` where it has none."""
        if self.name in backend.without:
            raise NotImplementedError(
                f"the {backend.name} backend has no {self.name}: {backend.without[self.name]}"
            )
        function: Callable[..., Any] = getattr(
            importlib.import_module(f"{backend.package}.{self.name}"), self.name
        )
        return function


class Backend:
    """The ops of one backend: `backend.softmax(...)` calls `<package>.softmax.softmax(...)`.

    A backend offers every op of `registry.OPS`, or gives the reason in `without`.

    Attributes
    ----------
    package : the package with one module per op
    array_module : the module whose arrays it works on, "numpy" or "cupy"
    without : the ops that it does not have, with the reason
    checks_values : whether values of arguments are validated; on a GPU that would need a host synchronisation
    """

    add = BackendOp()
    attention = BackendOp()
    decode = BackendOp()
    dropout = BackendOp()
    embedding = BackendOp()
    gelu = BackendOp()
    l2_normalize = BackendOp()
    layer_norm = BackendOp()
    linear = BackendOp()
    mean_pool = BackendOp()
    rms_norm = BackendOp()
    rope = BackendOp()
    silu = BackendOp()
    softmax = BackendOp()
    swiglu = BackendOp()

    def __init__(
        self,
        name: str,
        package: str,
        array_module: str = "numpy",
        without: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.name = name
        self.package = package
        self.array_module = array_module
        self.without = without
        self.checks_values = array_module == "numpy"

    @cached_property
    def xp(self) -> Any:
        """The array module."""
        return importlib.import_module(self.array_module)

    def module(self, name: str) -> Any:
        """A module of the backend that is not an op: `CPU.module("quantize")` has the kernels of the encoder."""
        return importlib.import_module(f"{self.package}.{name}")

    def __repr__(self) -> str:
        return f"Backend({self.name!r})"


CPU = Backend("cpu", "rbe_gpu.cpu_fallback")
CUDA = Backend("cuda", "rbe_gpu.gpu", "cupy")
_ON_CPU = frozenset((np.ndarray, type(None)))
_DLPACK_CUDA = 2  # kDLCUDA of dlpack.h
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def as_cupy(value: Any) -> Any:
    """A GPU array of another library (PyTorch, JAX) as a CuPy array over the same memory; anything else unchanged.

    Uses `__cuda_array_interface__` or DLPack: no copy, and work on the array is ordered after the work queued on the
    other library's current stream.
    """
    if value is None or isinstance(value, np.ndarray | int | float | str) or is_cupy(value):
        return value
    interface = getattr(value, "__cuda_array_interface__", None)
    if interface is not None:
        if interface["typestr"] == _BFLOAT16.str:  # "<V2", which CuPy reads as two bytes of any type
            return CUDA.xp.asarray(_AsUint16(value, interface)).view(_BFLOAT16)
        return CUDA.xp.asarray(value)
    device = getattr(value, "__dlpack_device__", None)
    if device is not None and device()[0] == _DLPACK_CUDA:
        return CUDA.xp.from_dlpack(value)
    return value


class _AsUint16:
    """The `__cuda_array_interface__` of a bfloat16 array with dtype uint16."""

    def __init__(self, value: Any, interface: dict[str, Any]) -> None:
        self._owner = value  # keeps the memory alive
        self.__cuda_array_interface__ = {**interface, "typestr": "<u2"}


def is_cupy(value: Any) -> bool:
    """Whether `value` is a CuPy array. Does not import CuPy."""
    return type(value).__module__.partition(".")[0] == "cupy" and hasattr(value, "__cuda_array_interface__")


def module_of(value: Any) -> Any:
    """`numpy` or `cupy`: the module of an array or a compressed weight."""
    return np if device_of(value) == "cpu" else CUDA.xp


def to_host(a: Any) -> Any:
    """A CuPy array as a NumPy array; any other value unchanged."""
    return a.get() if hasattr(a, "__cuda_array_interface__") and hasattr(a, "get") else a


def device_of(value: Any, name: str = "array") -> str:
    """`"cpu"` for a NumPy array, `"cuda:<index>"` for a CuPy array.

    A compressed weight is on the device of its arrays. Raises `TypeError` for anything else.
    """
    if type(value) is np.ndarray:
        return "cpu"
    if is_cupy(value):
        return f"cuda:{value.device.id}"
    if isinstance(value, np.ndarray):  # e.g. a memory map
        return "cpu"
    device = getattr(value, "device", None)
    if isinstance(device, str) and hasattr(value, "codes"):  # a compressed weight
        return device
    raise TypeError(
        f"{name} is a {type(value).__module__}.{type(value).__name__}; pass a numpy or cupy array "
        "(numpy.asarray(...) or cupy.asarray(...); arrays of other libraries on a GPU are taken as they are)"
    )


def backend_of(**arrays: Any) -> Backend:
    """The backend that all arrays are on. `None` values are ignored.

    Raises
    ------
    TypeError
        An unknown array type, or arrays on different devices.
    """
    if _ON_CPU.issuperset(map(type, arrays.values())):
        return CPU
    first_name, first_device = "", ""
    for name, value in arrays.items():
        if value is None:
            continue
        device = device_of(value, name)
        if not first_device:
            first_name, first_device = name, device
        elif device != first_device:
            raise TypeError(
                f"{first_name} is on {first_device} but {name} is on {device}; move one of them "
                '(rbe_gpu.to(..., "cuda") or rbe_gpu.to(..., "cpu"))'
            )
    return CPU if first_device == "cpu" else CUDA


@contextmanager
def numpy_backend(backend: Backend) -> Iterator[None]:
    """Within the block, ops on NumPy arrays run on `backend`. Not thread-safe."""
    global CPU
    before, CPU = CPU, backend
    try:
        yield
    finally:
        CPU = before


def canonical_device(device: str) -> str:
    """ "cpu", or "cuda:<index>"; plain "cuda" is CuPy's current GPU.

    Raises
    ------
    ValueError
        Another name, or a GPU that is not there.
    ImportError
        A GPU is asked for and CuPy is not installed; the message says what to install.
    """
    if device == "cpu":
        return device
    kind, colon, index = device.partition(":")
    if kind != "cuda" or (colon and not index.isdecimal()):
        raise ValueError(f'unknown device {device!r}; use "cpu", "cuda" or "cuda:0"')
    try:
        import cupy
    except ImportError:
        raise ImportError(
            "CuPy is not installed; for a GPU: pip install 'rbe-gpu[cuda13]' (or [cuda12], as the driver allows)"
        ) from None
    try:
        count = int(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise ValueError(f"no GPU can be used: {error}") from None
    number = int(index) if colon else int(cupy.cuda.runtime.getDevice())
    if number >= count:
        raise ValueError(f"{device} is not there; this machine has {count} GPUs")
    return f"cuda:{number}"


def move_array(a: Any, device: str) -> Any:
    """The array on a device that `canonical_device` named; as it is where it is there already."""
    if device_of(a) == device:
        return a
    if device == "cpu":
        return a.get()
    with CUDA.xp.cuda.Device(int(device.partition(":")[2])):
        return CUDA.xp.asarray(a)


# --- memory of a GPU ----------------------------------------------------------------------------------


class DeviceMemoryError(MemoryError):
    """A GPU lacks free memory for an array. The message has the requested and the free size, and what to do."""


def device_memory_error(error: MemoryError) -> MemoryError:
    """CuPy's `OutOfMemoryError` as a `DeviceMemoryError` of the current GPU; any other error unchanged."""
    if not type(error).__module__.startswith("cupy"):
        return error
    from rich.filesize import decimal

    def size(nbytes: int) -> str:
        return decimal(nbytes, precision=2)

    match = re.search(r"allocating ([\d,]+) bytes", str(error))
    requested = "more" if match is None else size(int(match[1].replace(",", "")))
    cupy = CUDA.xp
    free, total = cupy.cuda.runtime.memGetInfo()
    held = cupy.get_default_memory_pool().total_bytes()
    return DeviceMemoryError(
        f"cuda:{cupy.cuda.runtime.getDevice()} is out of memory: {requested} asked for, {size(free)} free of "
        f"{size(total)}, {size(held)} held by this process. Use a smaller batch or cache_bytes=0, drop arrays that "
        "are no longer needed, or end other programs on this GPU"
    )


@contextmanager
def device_memory_errors() -> Iterator[None]:
    """A context manager and decorator: a GPU without enough free memory raises `DeviceMemoryError`."""
    try:
        yield
    except MemoryError as error:
        device_error = device_memory_error(error)
        if device_error is error:
            raise
        raise device_error from error

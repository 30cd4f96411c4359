"""Which backend runs an op: decided by the arrays, never guessed.

numpy arrays run on the `cpu` backend (`cpu_fallback/<op>.py`), CuPy arrays on the `cuda` backend
(`rbe_gpu/gpu/<op>.py`). CuPy is never imported for NumPy users.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np


class Backend:
    """The ops of one backend as attributes: `backend.softmax(...)` is `<package>.softmax.softmax(...)`."""

    def __init__(self, name: str, package: str) -> None:
        self.name = name
        self._package = package

    def __getattr__(self, op: str) -> Callable[..., Any]:
        if op.startswith("_"):
            raise AttributeError(op)
        module = importlib.import_module(f"{self._package}.{op}")
        function: Callable[..., Any] = getattr(module, op)
        setattr(self, op, function)  # the next lookup is a plain attribute
        return function

    def __repr__(self) -> str:
        return f"Backend({self.name!r})"


CPU = Backend("cpu", "rbe_gpu.cpu_fallback")


def device_of(value: Any, name: str = "array") -> str:
    """`"cpu"` for a NumPy array, `"cuda:<index>"` for a CuPy array.

    Compressed weights answer for their arrays. Anything else is a `TypeError`.
    """
    if isinstance(value, np.ndarray):
        return "cpu"
    device = getattr(value, "device", None)
    if isinstance(device, str) and hasattr(value, "codes"):  # a compressed weight
        return device
    if type(value).__module__.partition(".")[0] == "cupy" and hasattr(value, "__cuda_array_interface__"):
        return f"cuda:{value.device.id}"
    raise TypeError(
        f"{name} is a {type(value).__module__}.{type(value).__name__}; pass a numpy or cupy array "
        "(numpy.asarray(...) or cupy.asarray(...))"
    )


def backend_of(**arrays: Any) -> Backend:
    """The backend that all given arrays live on. `None` values are passed over.

    Raises
    ------
    TypeError
        An unknown array type, arrays on different devices, or a CuPy array where this installation has
        no CUDA kernels.
    """
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
                "(cupy.asarray(...) or cupy.asnumpy(...))"
            )
    if first_device == "cpu":
        return CPU
    raise TypeError(
        f"{first_name} is on {first_device}, and this version of rbe_gpu has no CUDA kernels yet; "
        "pass NumPy arrays (cupy.asnumpy(...))"
    )

"""PyTorch tensors as arrays of this package and back, over the same memory; modules whose weights are no tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from ..blocks import Array
from ..dispatch import CUDA, as_cupy, canonical_device

#: Decorates what `torch.compile` runs as it is, between two graphs. torch.compiler.disable does the same, but imports
#: the compiler at once, 2 s for every program; this imports it at the first call, so make that from graphs alone.
outside_of_graphs: Any = getattr(torch, "_disable_dynamo", torch.compiler.disable)
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def as_array(tensor: Tensor) -> Array:
    """A tensor as a NumPy or CuPy array over its memory. It must not require grad.

    NumPy knows no bfloat16: it passes as int16 and is viewed as ml_dtypes' type.
    """
    half = tensor.dtype is torch.bfloat16
    if half:
        tensor = tensor.view(torch.int16)
    array: Any = tensor.numpy() if tensor.is_cpu else as_cupy(tensor)
    return array.view(_BFLOAT16) if half else array


def as_tensor(array: Array) -> Tensor:
    """A NumPy or CuPy array as a tensor over its memory; a CuPy array within `current_stream`."""
    make = torch.from_numpy if isinstance(array, np.ndarray) else torch.from_dlpack
    if array.dtype == _BFLOAT16:
        return make(array.view(np.int16)).view(torch.bfloat16)
    return make(array)


def device_name(device: torch.device) -> str:
    """PyTorch's device as this package names it: "cpu" or "cuda:0".

    Raises
    ------
    TypeError
        Neither the CPU nor an NVIDIA GPU.
    ImportError, ValueError
        A GPU, and CuPy is not installed or does not see it.
    """
    if device.type not in ("cpu", "cuda"):
        raise TypeError(
            f"compressed weights are on the CPU or an NVIDIA GPU, not on {device}; use .to('cpu')"
        )
    return canonical_device(str(device))


@contextmanager
def current_stream(device: torch.device) -> Iterator[None]:
    """On a GPU, queue CuPy's work on PyTorch's current stream, in order with the tensors it reads and writes.

    `__cuda_array_interface__` of PyTorch's tensors names no stream, so CuPy's own would be ordered with nothing.
    """
    if device.type == "cpu":
        yield
        return
    cupy, stream = CUDA.xp, torch.cuda.current_stream(device).cuda_stream
    with cupy.cuda.Device(device.index), cupy.cuda.ExternalStream(stream, device.index):
        yield


class ArrayModule(torch.nn.Module):  # type: ignore[misc]
    """A module with weights in NumPy or CuPy arrays, which `.to(device)` moves as it does tensors.

    A subclass moves them in `_move(device)`. `_place`, an empty buffer, says where the module is and in which dtype
    `.half()` and the like have put it; it is in no state_dict.
    """

    _place: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("_place", torch.empty(0), persistent=False)

    def _move(self, device: str) -> None:
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What `.to`, `.cuda`, `.half` and `.share_memory` call with the change of a tensor."""
        place = fn(self._place).device
        name = device_name(place)
        with current_stream(place):
            self._move(name)
            if place.type == "cuda":  # other streams may be the first to read the weights
                CUDA.xp.cuda.get_current_stream().synchronize()
        return super()._apply(fn, recurse)

"""RBELinearModule: y = x W^T + b for a compressed W, as a PyTorch module."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..blocks import Array, RBEBlocks
from ..container import from_bytes, to_bytes
from ..encode import compress
from ..matmul import check_activation_bits
from ..models.int8_check import check_takes_int8
from ..workspace import ThreadWorkspaces
from .tensors import ArrayModule, as_array, as_tensor, current_stream, outside_of_graphs

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_workspaces = ThreadWorkspaces()  # one for each thread, whatever the number of layers


class RBELinearModule(ArrayModule):
    """y = x W^T + b, for inference: `torch.nn.Linear` with a compressed weight.

    Inputs are (..., in_features) float32, float16 or bfloat16 on the device of the module, of any strides; the result
    has their dtype. The memory of tensors is used in place (strides that are not C-contiguous are copied first). On a
    GPU the matmul is queued on PyTorch's current stream.

    Parameters
    ----------
    compressed : RBEMatrix or RBEVectors, (out_features, in_features)
    bias : (out_features,) float32, float16 or bfloat16, or None; a parameter that requires no grad
    activation_bits : 8 rounds x to int8, token by token (`rbe_gpu.linear`); None: x as it is

    Raises
    ------
    RuntimeError
        (calls) The input requires grad: there is no backward pass.
    TypeError
        (calls) The input has another dtype or device.

    Notes
    -----
    The state_dict holds the weight as `NAME._extra_state`, a uint8 tensor with the bytes of a `.rbe.safetensors` file
    (FORMAT.md). Loading treats it as untrusted input.
    """

    def __init__(
        self, compressed: RBEBlocks, bias: Tensor | None = None, activation_bits: int | None = None
    ) -> None:
        super().__init__()
        if len(compressed.shape) != 2:
            raise ValueError(f"the weight has shape {compressed.shape}, needs (out_features, in_features)")
        if bias is not None and tuple(bias.shape) != (compressed.shape[0],):
            raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({compressed.shape[0]},)")
        check_takes(compressed, activation_bits)
        self.compressed = compressed
        self.activation_bits = activation_bits
        self.out_features, self.in_features = compressed.shape
        self.bias = None if bias is None else torch.nn.Parameter(bias.detach(), requires_grad=False)
        if bias is not None:
            self.to(bias.device, bias.dtype)

    @classmethod
    def from_linear(
        cls, linear: torch.nn.Linear, *, activation_bits: int | None = None, **options: Any
    ) -> RBELinearModule:
        """Compress the weight of `linear`, which stays as it is: grade=, ratio=, rmse=, density=, block=, transform=,
        basis=, codes= are passed to `rbe_gpu.compress`. The bias is shared.
        """
        return cls(compress(dense_weight(linear), **options), linear.bias, activation_bits).placed_as(linear)

    def placed_as(self, linear: torch.nn.Linear) -> RBELinearModule:
        """This module on the device of a dense one, with its dtype, training mode included."""
        self.to(linear.weight.device, linear.weight.dtype)
        self.train(linear.training)
        return self

    @property
    def weight(self) -> Tensor:
        """The dense weight, decoded at every access, for code that reads it; `forward` decodes nothing."""
        if self._place.is_cpu:
            return as_tensor(self.compressed.decode()).to(self._place.dtype)
        out = torch.empty(self.compressed.shape, dtype=self._place.dtype, device=self._place.device)
        with current_stream(out.device):
            self.compressed.decode(out=as_array(out))
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of the weight and the bias in memory."""
        return self.compressed.resident_nbytes + (0 if self.bias is None else int(self.bias.nbytes))

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return _outside_of_graphs(self, input)
        return self._matmul(input)

    def _matmul(self, input: Tensor) -> Tensor:
        self._check(input)
        x = input.detach().contiguous()
        shape = (*x.shape[:-1], self.out_features)
        if not x.numel():
            return x.new_empty(shape)
        if x.is_cpu:
            return as_tensor(self._linear(as_array(x), workspace=_workspaces.own))
        # PyTorch allocates the result; scratch memory of CuPy's pool is freed in the order of the stream
        y = torch.empty(shape, dtype=x.dtype, device=x.device)
        with current_stream(x.device):
            self._linear(as_array(x), out=as_array(y))
        return y

    def _linear(self, x: Array, **memory: Any) -> Array:
        """`rbe_gpu.linear` of an array; memory : `out` or `workspace`."""
        return ops.linear(x, self.compressed, self._bias(), activation_bits=self.activation_bits, **memory)

    def _bias(self) -> Array | None:
        return None if self.bias is None else as_array(self.bias.detach())

    def _check(self, input: Tensor) -> None:
        if input.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "the input requires grad, and compressed layers have no backward pass; run the model under "
                "torch.inference_mode() (or torch.no_grad())"
            )
        if input.layout is not torch.strided or input.is_nested:
            raise TypeError("the input is nested or sparse; RBELinearModule takes dense tensors")
        if input.dtype not in FLOATS:
            fix = "input.float()" if input.dtype is torch.float64 else "input.to(torch.float32)"
            raise TypeError(
                f"the input has dtype {input.dtype}; RBELinearModule takes float32, float16 or bfloat16 ({fix})"
            )
        if input.device != self._place.device:
            raise TypeError(
                f"the input is on {input.device}, the weights are on {self._place.device}; move one of them "
                f"(module.to({str(input.device)!r}) or input.to({str(self._place.device)!r}))"
            )
        if not input.ndim or input.shape[-1] != self.in_features:
            raise ValueError(
                f"the input has shape {tuple(input.shape)}, expected (..., {self.in_features}) (in_features)"
            )

    def _move(self, device: str) -> None:
        self.compressed = self.compressed.to(device)

    # --- state ----------------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """The weight and `activation_bits` as the bytes of a file: (bytes,) uint8, on the CPU."""
        data = to_bytes({"weight": self.compressed}, {"activation_bits": self.activation_bits})
        return torch.from_numpy(np.frombuffer(bytearray(data), np.uint8))

    def set_extra_state(self, state: Any) -> None:
        """What `load_state_dict` calls with `NAME._extra_state`.

        Raises
        ------
        ValueError
            Not the bytes of a file with one weight of this shape.
        """
        compressed, activation_bits = read_state(state)
        if compressed.shape != (self.out_features, self.in_features):
            raise ValueError(
                f"the state has a weight of shape {compressed.shape}, expected "
                f"{(self.out_features, self.in_features)} (out_features, in_features)"
            )
        check_takes(compressed, activation_bits)
        self.compressed, self.activation_bits = compressed, activation_bits
        self.to(self._place.device)

    def extra_repr(self) -> str:
        c = self.compressed
        bits = "" if self.activation_bits is None else ", int8 activations"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{c.transform}, {c.codes.name}, {c.bits_per_weight:.2f} bits/weight{bits}"
        )


def check_takes(weight: RBEBlocks, activation_bits: int | None) -> None:
    """Raise a ValueError unless a matmul algorithm takes the weight with these activations."""
    check_activation_bits(activation_bits)
    if activation_bits is not None:
        check_takes_int8(weight)


def read_state(state: Any) -> tuple[RBEBlocks, int | None]:
    """The weight and `activation_bits` of an extra state. ValueError for anything else."""
    if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.ndim != 1:
        raise ValueError(
            f"the extra state is a {type(state).__name__}; expected the bytes of a compressed weight, a uint8 tensor"
        )
    data = state.detach().cpu().contiguous().numpy().data
    tensors, config = from_bytes(data, "the extra state")
    weight = tensors.get("weight")
    if len(tensors) != 1 or not isinstance(weight, RBEBlocks) or len(weight.shape) != 2:
        raise ValueError("the extra state holds other tensors than one compressed matrix")
    bits = config.get("activation_bits")
    if set(config) != {"activation_bits"} or not (bits is None or type(bits) is int):
        raise ValueError(f"the extra state has the settings {sorted(config)}, expected activation_bits alone")
    check_activation_bits(bits)
    return weight, bits


def dense_weight(linear: torch.nn.Linear) -> Any:
    """The weight of a dense layer as a NumPy array.

    Raises
    ------
    TypeError
        It has a dtype that does not compress, or no memory (device "meta").
    """
    weight = linear.weight.detach()
    if weight.dtype not in FLOATS:
        raise TypeError(
            f"the weight has dtype {weight.dtype}; use float32, float16 or bfloat16 (model.float())"
        )
    if weight.is_meta:
        raise TypeError("the weight is on the device meta and has no values; load them first")
    return as_array(weight.cpu().contiguous())


_outside_of_graphs = outside_of_graphs(RBELinearModule._matmul)

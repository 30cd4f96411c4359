"""RBEFFN: the feed-forward part of a transformer layer."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import ops
from ..blocks import Array
from ..cache import PanelCache
from ..dispatch import as_cupy, device_of, module_of
from ..matmul import prepare_input
from ..workspace import Workspace
from .rbe_linear import RBELinear, compressed

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu", "swiglu")


class RBEFFN:
    """y = down(h) + residual; h = activation(up(x)), or for "swiglu" h = silu(gate(x)) * up(x).

    SwiGLU has two forms with the same result. With `gate=None`, `up` is the stacked projection [gate; up] of 2n
    rows (as `from_dense` makes it): one matmul, then the `swiglu` op on its [gate | up] columns. With a separate
    `gate`, silu is in the epilogue of the gate's matmul, and the two results are multiplied in place. Neither copies
    an activation.

    Parameters
    ----------
    up : RBELinear, hidden -> intermediate (or hidden -> 2 * intermediate, stacked); its own activation is
        None
    down : RBELinear, intermediate -> hidden
    gate : RBELinear like `up`, for "swiglu" only
    activation : "gelu" (erf), "gelu_tanh", "silu", "relu" or "swiglu"
    """

    def __init__(
        self, up: RBELinear, down: RBELinear, gate: RBELinear | None = None, activation: str = "gelu"
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; use one of {ACTIVATIONS}")
        if gate is not None and activation != "swiglu":
            raise ValueError(f"gate is given but activation is {activation!r}; pass activation='swiglu'")
        for name, linear in (("up", up), ("gate", gate)):
            if linear is not None and linear.activation is not None:
                raise ValueError(f"{name} has activation {linear.activation!r}; pass it to RBEFFN instead")
        stacked = activation == "swiglu" and gate is None
        if stacked and up.out_features % 2:
            raise ValueError(
                f"up gives {up.out_features} features; a stacked [gate; up] needs an even number"
            )
        width = up.out_features // 2 if stacked else up.out_features
        if down.in_features != width:
            raise ValueError(f"down takes {down.in_features} features, up gives {width}")
        if gate is not None and gate.weight.shape != up.weight.shape:
            raise ValueError(f"gate has shape {tuple(gate.weight.shape)}, up has {tuple(up.weight.shape)}")
        fused = None if activation == "swiglu" else activation

        def with_activation(linear: RBELinear, activation: str | None) -> RBELinear:
            return RBELinear(
                linear.weight, linear.bias, activation, linear.cache, linear.method, linear.activation_bits
            )

        self.up = with_activation(up, fused)
        self.gate = None if gate is None else with_activation(gate, "silu")
        self.down = down
        self.activation = activation
        self.intermediate_size = width

    @classmethod
    def from_dense(
        cls,
        up: Array,
        down: Array,
        gate: Array | None = None,
        activation: str = "gelu",
        *,
        up_bias: Array | None = None,
        down_bias: Array | None = None,
        gate_bias: Array | None = None,
        cache: PanelCache | int | None = None,
        method: str | None = None,
        activation_bits: int | None = None,
        **options: Any,
    ) -> RBEFFN:
        """Compress the weights, `up` and `gate` (intermediate, hidden) stacked as one matrix: grade=, ratio=,
        rmse=, density=, block=, transform=, basis=, codes= are passed to `rbe_gpu.compress`. Without any of them they
        stay dense. All matmuls of the layer share `cache`, and each has this `method` and `activation_bits`
        (`RBELinear`).
        """
        if (gate is None) != (activation != "swiglu"):
            raise ValueError("activation='swiglu' and gate= belong together; pass both or neither")
        if gate is not None:
            if gate.shape != up.shape:
                raise ValueError(f"gate has shape {tuple(gate.shape)}, up has {tuple(up.shape)}")
            if (up_bias is None) != (gate_bias is None):
                raise ValueError("up_bias and gate_bias belong together; pass both or neither")
            up = np.concatenate([gate, up])
            if up_bias is not None:
                up_bias = np.concatenate([gate_bias, up_bias])
        shared = PanelCache(cache) if isinstance(cache, int) else cache
        up_linear, down_linear = (
            RBELinear(compressed(w, "matrix", options), b, None, shared, method, activation_bits)
            for w, b in ((up, up_bias), (down, down_bias))
        )
        return cls(up_linear, down_linear, activation=activation)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights in memory."""
        return self.up.nbytes + self.down.nbytes + (0 if self.gate is None else self.gate.nbytes)

    def __call__(
        self,
        x: Array,
        residual: Array | None = None,
        out: Array | None = None,
        workspace: Workspace | None = None,
    ) -> Array:
        """x : (..., hidden); residual : like the result. Returns (..., hidden), dtype of x."""
        x = as_cupy(x)
        workspace = (workspace or Workspace()).on(device_of(x, "x"))
        shape = (*x.shape[:-1], self.up.out_features)
        inputs = x if self.gate is None else prepare_input(x, workspace)
        hidden = self.up(inputs, out=workspace.get("layer.ffn.up", shape, x.dtype), workspace=workspace)
        if self.gate is not None:
            gate = self.gate(inputs, out=workspace.get("layer.ffn.gate", shape, x.dtype), workspace=workspace)
            module_of(hidden).multiply(gate, hidden, out=hidden)
        elif self.activation == "swiglu":
            half = (*x.shape[:-1], self.intermediate_size)
            hidden = ops.swiglu(hidden, out=workspace.get("layer.ffn.gate", half, x.dtype))
        return self.down(hidden, residual, out=out, workspace=workspace)

    def __repr__(self) -> str:
        gate = "" if self.gate is None else f"\n  gate={self.gate!r},"
        return f"RBEFFN({self.activation},\n  up={self.up!r},{gate}\n  down={self.down!r})"

"""RBEFFN: the feed-forward part of a transformer layer."""

from __future__ import annotations

from copy import copy
from typing import Any

import numpy as np

from .. import ops
from ..blocks import Array
from ..cache import PanelCache
from ..dispatch import as_cupy, device_of, module_of
from ..matmul import prepare_input
from ..workspace import Workspace
from .rbe_linear import RBELinear, compressed

#: gated activations -> the activation of the gate
GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}
ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu", *GATED)


class RBEFFN:
    """y = down(h) + residual; h = activation(up(x)), or with a gate h = activation(gate(x)) * up(x).

    Gated are "swiglu" (silu), "geglu" (gelu), "geglu_tanh" (gelu_tanh) and "reglu" (relu) (Shazeer 2020). The
    activation is in the epilogue of the gate's matmul, and the two results are multiplied in place. SwiGLU has
    another form with the same result: with `gate=None`, `up` is the stacked projection [gate; up] of 2n rows (as
    `from_dense` makes it), one matmul, then the `swiglu` op on its [gate | up] columns. Neither copies an activation.

    Parameters
    ----------
    up : RBELinear, hidden -> intermediate (or hidden -> 2 * intermediate, stacked); its own activation is
        None
    down : RBELinear, intermediate -> hidden
    gate : RBELinear like `up`, for gated activations only
    activation : "gelu" (erf), "gelu_tanh", "silu", "relu", or a gated one
    """

    def __init__(
        self, up: RBELinear, down: RBELinear, gate: RBELinear | None = None, activation: str = "gelu"
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; use one of {ACTIVATIONS}")
        if gate is not None and activation not in GATED:
            raise ValueError(f"gate is given but activation is {activation!r}; use one of {tuple(GATED)}")
        if gate is None and activation in GATED and activation != "swiglu":
            raise ValueError(f"activation {activation!r} needs gate=; only swiglu takes a stacked [gate; up]")
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
        shapes = [None if part is None else (part.out_features, part.in_features) for part in (gate, up)]
        if gate is not None and shapes[0] != shapes[1]:
            raise ValueError(f"gate has shape {shapes[0]}, up has {shapes[1]}")
        fused = None if activation in GATED else activation

        def with_activation(linear: RBELinear, activation: str | None) -> RBELinear:
            linear = copy(linear)
            linear.activation = activation
            return linear

        self.up = with_activation(up, fused)
        self.gate = None if gate is None else with_activation(gate, GATED[activation])
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
        """Compress the weights: grade=, ratio=, rmse=, density=, block=, transform=, basis=, codes= are passed to
        `rbe_gpu.compress`. Without any of them they stay dense. For "swiglu" `up` and `gate` (intermediate, hidden)
        are stacked as one matrix. All matmuls of the layer share `cache`, and each has this `method` and
        `activation_bits` (`RBELinear`).
        """
        if (gate is None) != (activation not in GATED):
            raise ValueError(
                f"a gated activation {tuple(GATED)} and gate= belong together; pass both or neither"
            )
        if gate is not None:
            if gate.shape != up.shape:
                raise ValueError(f"gate has shape {tuple(gate.shape)}, up has {tuple(up.shape)}")
            if (up_bias is None) != (gate_bias is None):
                raise ValueError("up_bias and gate_bias belong together; pass both or neither")
        shared = PanelCache(cache) if isinstance(cache, int) else cache

        def linear(weight: Array, bias: Array | None) -> RBELinear:
            return RBELinear(
                compressed(weight, "matrix", options), bias, None, shared, method, activation_bits
            )

        if gate is not None and activation != "swiglu":
            return cls(linear(up, up_bias), linear(down, down_bias), linear(gate, gate_bias), activation)
        if gate is not None:
            up = np.concatenate([gate, up])
            if up_bias is not None:
                up_bias = np.concatenate([gate_bias, up_bias])
        return cls(linear(up, up_bias), linear(down, down_bias), activation=activation)

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

"""RBELinear: y = activation(x W^T + bias) + residual."""

from __future__ import annotations

from threading import Lock
from typing import Any

import numpy as np

from .. import ops
from ..blocks import Array, RBEBlocks
from ..cache import PanelCache
from ..dispatch import backend_of
from ..encode import compress
from ..matmul import METHODS, MatmulPlan, PreparedInput, algorithms_of, check_activation_bits
from ..workspace import Workspace

_CONVERSION = Lock()


def compressed(weight: Array, kind: str | None, options: dict[str, Any]) -> Array | RBEBlocks:
    """`rbe_gpu.compress(weight)` with the options that are not None; without any, `weight` itself.

    For `from_dense` of the layers.
    """
    options = {name: value for name, value in options.items() if value is not None}
    return compress(weight, kind=kind, **options) if options else weight


def describe(weight: Array | RBEBlocks | None) -> str:
    """A short description of a weight, for the repr of a layer."""
    if weight is None:
        return "None"
    if isinstance(weight, RBEBlocks):
        return repr(weight)
    return f"dense({'x'.join(map(str, weight.shape))}, {weight.dtype})"


def resident_nbytes(weight: Array | RBEBlocks) -> int:
    """Bytes of a weight in memory. Grid codes, which a file compresses further, take more there."""
    return int(weight.resident_nbytes if isinstance(weight, RBEBlocks) else weight.nbytes)


class RBELinear:
    """y = activation(x W^T + bias) + residual.

    Parameters
    ----------
    weight : RBEMatrix, RBEVectors or dense array, (out_features, in_features)
    bias : (out_features,) float32/float16/bfloat16, or None
    activation : None, "relu", "gelu" (erf), "gelu_tanh" or "silu"
    cache : keeps decoded panels of a compressed weight between calls: a `PanelCache` (several layers may
        share one), a budget in bytes for a cache of this layer alone, or None
    method : "transform", "decode" or "cache" restricts the choice of the matmul algorithm for every batch
        (`rbe_gpu.matmul`); None leaves it to the cost model (`plan`)
    activation_bits : 8 rounds x to int8, token by token (`rbe_gpu.linear`); None: x as it is
    for_int8 : while x is rounded, hold a compressed weight as `RBEBlocks.for_int8` makes it: smaller, and slower for
        a few tokens. It is converted when it is next needed, and back when `activation_bits` becomes None
    """

    def __init__(
        self,
        weight: Array | RBEBlocks,
        bias: Array | None = None,
        activation: str | None = None,
        cache: PanelCache | int | None = None,
        method: str | None = None,
        activation_bits: int | None = None,
        *,
        for_int8: bool = False,
    ) -> None:
        backend_of(weight=weight, bias=bias)
        if len(weight.shape) != 2:
            raise ValueError(f"weight has shape {tuple(weight.shape)}, needs (out_features, in_features)")
        if bias is not None and tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(
                f"bias has shape {tuple(bias.shape)}, expected ({weight.shape[0]},) (out_features)"
            )
        if activation not in ops.ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; use one of {ops.ACTIVATIONS}")
        self._weight = weight
        #: Whether the weight is as `for_int8` makes it; None: it is never converted.
        self._held_for_int8: bool | None = None
        if for_int8 and isinstance(weight, RBEBlocks):
            self._held_for_int8 = weight.codes.is_for_int8
        self.bias = bias
        self.activation = activation
        self.cache = PanelCache(cache) if isinstance(cache, int) else cache
        if method not in (None, *METHODS):
            raise ValueError(f"unknown method {method!r}; use one of {METHODS}, or None")
        self.method = method
        check_activation_bits(activation_bits)
        self.activation_bits = activation_bits

    @classmethod
    def from_dense(
        cls,
        weight: Array,
        bias: Array | None = None,
        activation: str | None = None,
        cache: PanelCache | int | None = None,
        method: str | None = None,
        activation_bits: int | None = None,
        **options: Any,
    ) -> RBELinear:
        """Compress `weight`: grade=, ratio=, rmse=, density=, block=, transform=, basis=, codes= are passed to
        `rbe_gpu.compress`. Without any of them the weight stays dense. The bias always stays dense.
        """
        return cls(compressed(weight, "matrix", options), bias, activation, cache, method, activation_bits)

    @property
    def weight(self) -> Array | RBEBlocks:
        """The weight, in the form for the activations that it is multiplied with."""
        for_int8 = self.activation_bits == 8
        if self._held_for_int8 not in (None, for_int8):
            with _CONVERSION:  # one thread converts, and the others get the same weight
                if self._held_for_int8 not in (None, for_int8):
                    assert isinstance(self._weight, RBEBlocks)
                    self._weight = self._weight.for_int8() if for_int8 else self._weight.for_float()
                    self._held_for_int8 = for_int8
        return self._weight

    @weight.setter
    def weight(self, weight: Array | RBEBlocks) -> None:
        self._weight, self._held_for_int8 = weight, None

    def keep_codes(self) -> None:
        """Hold the weight as it is from now on: GPUs read other codes than `RBEBlocks.for_int8` makes."""
        self._held_for_int8 = None

    @property
    def in_features(self) -> int:
        return int(self._weight.shape[1])

    @property
    def out_features(self) -> int:
        return int(self._weight.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of the weight and the bias in memory, without the cache (`cache.nbytes`), when it multiplies."""
        return resident_nbytes(self.weight) + (0 if self.bias is None else int(self.bias.nbytes))

    def __call__(
        self,
        x: Array | PreparedInput,
        residual: Array | None = None,
        out: Array | None = None,
        workspace: Workspace | None = None,
    ) -> Array:
        """x : (..., in_features), or `rbe_gpu.prepare_input` of it; residual : (..., out_features).

        Returns (..., out_features), dtype of x.
        """
        return ops.linear(
            x,
            self.weight,
            self.bias,
            self.activation,
            residual,
            out=out,
            workspace=workspace,
            cache=self.cache,
            method=self.method,
            activation_bits=self.activation_bits,
        )

    def plan(self, batch: int, dtype: Any = np.float32) -> MatmulPlan:
        """The matmul algorithm for `batch` rows of a dtype, and the estimated costs of all that could run.

        Raises
        ------
        TypeError
            The weight is dense.
        """
        if not isinstance(self.weight, RBEBlocks):
            raise TypeError(f"{describe(self.weight)} has no plan; only compressed weights have")
        algorithms = algorithms_of(backend_of(weight=self.weight))
        return algorithms.plan(
            self.weight, batch, np.dtype(dtype), self.cache, self.method, self.activation_bits
        )

    def __repr__(self) -> str:
        activation = "" if self.activation is None else f", {self.activation}"
        bias = "" if self.bias is None else ", bias"
        bias += "" if self.activation_bits is None else ", int8 activations"
        return f"RBELinear({self.in_features} -> {self.out_features}{bias}{activation}, {describe(self._weight)})"

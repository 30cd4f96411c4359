"""RBELayerNorm and RBERMSNorm: normalise rows, then scale."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import ops
from ..blocks import Array, RBEBlocks
from ..dispatch import backend_of
from ..workspace import Workspace
from .rbe_linear import compressed, describe


def _vector(name: str, vector: Array | RBEBlocks, cols: int) -> None:
    if tuple(vector.shape) != (cols,):
        raise ValueError(f"{name} has shape {tuple(vector.shape)}, expected ({cols},)")


def _dense(vector: Array | RBEBlocks | None, name: str, workspace: Workspace) -> Array | None:
    """A gain or bias as an array; a compressed one is decoded into scratch memory."""
    if not isinstance(vector, RBEBlocks):
        return vector
    workspace = workspace.on(vector.device)
    scratch = workspace.get(f"layer.norm.{name}", vector.shape, np.float32)
    return ops.decode(vector, out=scratch, workspace=workspace)


class RBELayerNorm:
    """y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias, s = x + residual, over the last axis.

    Parameters
    ----------
    weight : (cols,) dense array, or RBEVectors of that shape, decoded at every call
    bias : the same, or None
    eps : added to the variance
    """

    def __init__(
        self, weight: Array | RBEBlocks, bias: Array | RBEBlocks | None = None, eps: float = 1e-5
    ) -> None:
        backend_of(weight=weight, bias=bias)
        if len(weight.shape) != 1:
            raise ValueError(f"weight has shape {tuple(weight.shape)}, needs (cols,)")
        if bias is not None:
            _vector("bias", bias, weight.shape[0])
        self.weight = weight
        self.bias = bias
        self.eps = eps

    @classmethod
    def from_dense(
        cls, weight: Array, bias: Array | None = None, eps: float = 1e-5, **options: Any
    ) -> RBELayerNorm:
        """Compress gain and bias: grade=, ratio=, rmse=, density=, block=, transform=, basis=, codes= are passed
        to `rbe_gpu.compress`. Without any of them they stay dense, which is best for all but very wide layers.
        """
        compact = None if bias is None else compressed(bias, "vectors", options)
        return cls(compressed(weight, "vectors", options), compact, eps)

    @property
    def nbytes(self) -> int:
        """Bytes of gain and bias, as they are stored."""
        return int(self.weight.nbytes) + (0 if self.bias is None else int(self.bias.nbytes))

    def __call__(
        self,
        x: Array,
        residual: Array | None = None,
        out: Array | None = None,
        residual_out: Array | None = None,
        workspace: Workspace | None = None,
    ) -> Array:
        """x, residual : (..., cols); residual_out receives s. Returns like x; `out` may be x."""
        workspace = workspace or Workspace()
        weight = _dense(self.weight, "weight", workspace)
        bias = _dense(self.bias, "bias", workspace)
        return ops.layer_norm(x, weight, bias, self.eps, residual, out=out, residual_out=residual_out)

    def __repr__(self) -> str:
        return f"RBELayerNorm(eps={self.eps:g}, weight={describe(self.weight)}, bias={describe(self.bias)})"


class RBERMSNorm:
    """y = s / sqrt(mean(s^2) + eps) * weight, s = x + residual, over the last axis.

    Parameters
    ----------
    weight : (cols,) dense array, or RBEVectors of that shape, decoded at every call
    eps : added to the mean square
    """

    def __init__(self, weight: Array | RBEBlocks, eps: float = 1e-6) -> None:
        backend_of(weight=weight)
        if len(weight.shape) != 1:
            raise ValueError(f"weight has shape {tuple(weight.shape)}, needs (cols,)")
        self.weight = weight
        self.eps = eps

    @classmethod
    def from_dense(cls, weight: Array, eps: float = 1e-6, **options: Any) -> RBERMSNorm:
        """Compress the gain, as `RBELayerNorm.from_dense`."""
        return cls(compressed(weight, "vectors", options), eps)

    @property
    def nbytes(self) -> int:
        """Bytes of the gain, as it is stored."""
        return int(self.weight.nbytes)

    def __call__(
        self,
        x: Array,
        residual: Array | None = None,
        out: Array | None = None,
        residual_out: Array | None = None,
        workspace: Workspace | None = None,
    ) -> Array:
        """x, residual : (..., cols); residual_out receives s. Returns like x; `out` may be x."""
        weight = _dense(self.weight, "weight", workspace or Workspace())
        return ops.rms_norm(x, weight, self.eps, residual, out=out, residual_out=residual_out)

    def __repr__(self) -> str:
        return f"RBERMSNorm(eps={self.eps:g}, weight={describe(self.weight)})"

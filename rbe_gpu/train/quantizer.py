"""The trained form of a weight in grid codes: real latents in units of the step, rounded in the forward pass.

    w[r, k] = gain row_scale[r] col_scale[k] (q - sign(q) shrink),    q = sign(x) floor(|x| + 0.4)

x are the latents. Rounding has a dead zone around zero, where codes are cheap (`feedback.DEAD`); its gradient is
taken as 1 (straight-through estimator: Bengio et al. 2013). Column scales are trained too, as logarithms of a
factor. The forward pass rounds them to float16, as the file holds them, so that a file decodes to the weights that
were trained.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..blocks import RBEBlocks
from ..codecs import GridCodes
from ..feedback import DEAD
from ..transforms import analysis, cast_synthesis

_TOP = 127.0
#: A latent starts at its integer plus this part of what the dense weight has beyond it. Error feedback has moved
#: integers away from their weights; a latent at the edge of its step would flip at the first noise.
_RESIDUE, _MAX_RESIDUE = 0.9, 0.4


def rounded(x: Tensor) -> Tensor:
    """The integers of latents, as floats."""
    return x.sign() * (x.abs() + (0.5 - DEAD)).floor_()


class _Rounded(torch.autograd.Function):  # type: ignore[misc]
    """The values of latents in steps; the gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shrink: float) -> Tensor:
        q = rounded(x)
        return q.sub_(q.sign(), alpha=shrink) if shrink else q

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Half(torch.autograd.Function):  # type: ignore[misc]
    """Float16 values in float32; the gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.to(torch.float16).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Grid:
    """One weight in training.

    Attributes
    ----------
    latents : (rows_pad, cols_pad) float32; a parameter, or the rows of a table that are trained a batch at a time
    factor : (cols_pad,) float32, the logarithms of the factors of the column scales; a parameter
    """

    def __init__(self, weight: RBEBlocks, dense: NDArray[np.float32], device: str) -> None:
        codes = weight.codes
        if not isinstance(codes, GridCodes) or weight.basis is not None:
            raise ValueError(f"its codes are {codes.name}, and only grid codes without a basis are trained")
        self._weight = weight
        self._codes = codes
        q = codes.integers().astype(np.float32)
        rows = np.asarray(codes.row_scale, np.float32)
        columns = np.asarray(codes.col_scale, np.float32)
        scale = (
            np.maximum(np.abs(rows), 1e-7)[:, None]
            * np.maximum(np.abs(columns), 1e-7)
            * np.float32(weight.gain)
        )
        residue = np.clip(self._coefficients(dense) / scale - q, -_MAX_RESIDUE, _MAX_RESIDUE)
        # within [0.6, 1.6) about 1, and so on: an integer decodes as itself
        q += np.where(q == 0, _RESIDUE * residue, np.sign(q) * DEAD + _RESIDUE * residue)

        def place(a: NDArray[np.float32]) -> Tensor:
            return torch.from_numpy(np.array(a)).to(device)  # a copy: torch takes no read-only array

        self.latents = place(q)
        self.factor = torch.zeros(len(columns), device=device, requires_grad=True)
        self._rows = place(rows * np.float32(weight.gain))[:, None]
        self._columns = place(columns)
        synthesis = weight.transform != "none" and (weight.row_transformed or weight.col_transformed)
        self._synthesis = place(cast_synthesis(weight.transform, weight.block)) if synthesis else None

    @property
    def name(self) -> str:
        return self._codes.name

    @property
    def size(self) -> int:
        return int(self.latents.numel())

    def _blocks(self, a: Any) -> Any:
        b = self._weight.block
        return a.reshape(a.shape[0] // b, b, a.shape[1] // b, b)

    def _coefficients(self, dense: NDArray[np.float32]) -> NDArray[np.float32]:
        weight = self._weight
        rows, cols = weight.shape
        a = np.pad(dense, ((0, weight.rows_pad - rows), (0, weight.cols_pad - cols)))
        if weight.transform == "none":
            return a
        s = analysis(weight.transform, weight.block).astype(np.float32)
        if weight.row_transformed:
            blocks = np.einsum("ij,ajbk->aibk", s, self._blocks(a), optimize=True)
            a = blocks.reshape(a.shape)
        return np.asarray((a.reshape(-1, weight.block) @ s.T).reshape(a.shape))

    def _scales(self) -> Tensor:
        return _Half.apply(self._columns * self.factor.exp())

    def _decoded(self, latents: Tensor, row_scales: Tensor) -> Tensor:
        return _Rounded.apply(latents, self._codes.shrink) * (row_scales * self._scales())

    def weight(self) -> Tensor:
        """The decoded weight (rows, cols), with gradients for `latents` and `factor`."""
        rows, cols = self._weight.shape
        w = self._decoded(self.latents, self._rows)
        if self._synthesis is not None:
            b = self._weight.block
            w = (w.reshape(-1, b) @ self._synthesis.T).reshape(w.shape)
            if self._weight.row_transformed:
                w = torch.einsum("ij,ajbk->aibk", self._synthesis, self._blocks(w)).reshape(w.shape)
        return w[:rows, :cols]

    def rows(self, index: Tensor, latents: Tensor) -> Tensor:
        """Decoded rows of a table, (len(index), cols), from their latents."""
        w = self._decoded(latents, self._rows[index])
        if self._synthesis is not None:
            w = (w.reshape(-1, self._weight.block) @ self._synthesis.T).reshape(w.shape)
        return w[:, : self._weight.shape[1]]

    def coarsen(self, by: float) -> None:
        """Multiply the step by `by`, so that the real-valued weight stays and integers shrink."""
        with torch.no_grad():
            self.latents.div_(by).clamp_(-_TOP, _TOP)
            self.factor.add_(math.log(by))

    def integers(self, every: int = 1) -> NDArray[np.int8]:
        """The integers of each `every`-th row, (rows, cols_pad) int8."""
        with torch.no_grad():
            q = rounded(self.latents[::every]).clamp_(-_TOP, _TOP)
            return np.asarray(q.to(torch.int8).cpu().numpy())

    def stored(self) -> RBEBlocks:
        """The weight as a file holds it."""
        with torch.no_grad():
            columns = self._scales().cpu().numpy().astype(np.float16)
        codes = GridCodes.from_integers(
            self.integers(), np.asarray(self._codes.row_scale), columns, self._codes.shrink
        )
        return replace(self._weight, codes=codes)

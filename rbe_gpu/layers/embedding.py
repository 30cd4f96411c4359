"""RBEEmbedding: y[..., :] = W[ids[...], :]."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import ops
from ..blocks import Array, RBEBlocks
from ..dispatch import backend_of
from ..workspace import Workspace
from .rbe_linear import compressed, describe, resident_nbytes


class RBEEmbedding:
    """y[..., :] = W[ids[...], :]; only the rows asked for of a compressed table are decoded.

    Parameters
    ----------
    weight : RBEVectors (rows decode alone), RBEMatrix (rows decode with their block row) or dense, (rows,
        cols)
    dtype : of the result of a compressed table; a dense table keeps its own
    for_lookup : hold a compressed table as `RBEBlocks.for_lookup` makes it. That is made when it is first needed:
        it imports Numba, which takes longer than loading a model does
    """

    def __init__(
        self, weight: Array | RBEBlocks, dtype: Any = np.float32, *, for_lookup: bool = False
    ) -> None:
        backend_of(weight=weight)
        if len(weight.shape) != 2:
            raise ValueError(f"weight has shape {tuple(weight.shape)}, needs (rows, cols)")
        self._weight = weight
        self._to_convert = for_lookup and isinstance(weight, RBEBlocks)
        self.dtype = np.dtype(dtype) if isinstance(weight, RBEBlocks) else weight.dtype

    @classmethod
    def from_dense(cls, weight: Array, dtype: Any = np.float32, **options: Any) -> RBEEmbedding:
        """Compress the table row by row (`kind="vectors"`): grade=, ratio=, rmse=, density=, block=, transform=,
        basis=, codes= are passed to `rbe_gpu.compress`. Without any of them it stays dense.
        """
        return cls(compressed(weight, "vectors", options), dtype)

    @property
    def weight(self) -> Array | RBEBlocks:
        """The table."""
        if self._to_convert:
            assert isinstance(self._weight, RBEBlocks)
            # of two threads both may do it: what the first one made stays as it is
            self._weight, self._to_convert = self._weight.for_lookup(), False
        return self._weight

    def keep_codes(self) -> None:
        """Hold the table as it is from now on: GPUs look rows up in other codes than `RBEBlocks.for_lookup` makes."""
        self._to_convert = False

    @property
    def rows(self) -> int:
        return int(self._weight.shape[0])

    @property
    def cols(self) -> int:
        return int(self._weight.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of the table in memory."""
        return resident_nbytes(self.weight)

    def __call__(self, ids: Array, out: Array | None = None, workspace: Workspace | None = None) -> Array:
        """ids : integers of any shape, 0 <= ids < rows. Returns (*ids.shape, cols)."""
        return ops.embedding(ids, self.weight, dtype=self.dtype, out=out, workspace=workspace)

    def __repr__(self) -> str:
        return f"RBEEmbedding({self.rows} rows of {self.cols}, {describe(self.weight)})"

"""The matmul algorithms on a GPU: what each supports, and their order of preference.

The first supported algorithm of a method runs. Ranks stand in for times: the number of tokens at which decoded panels
become faster than the transform domain has not been measured on a GPU yet, so linear_transform.cu runs only where
`method="transform"` asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rbe_gpu import transforms
from rbe_gpu.blocks import RBEBlocks
from rbe_gpu.cache import PanelCache
from rbe_gpu.matmul import (
    NOT_COMPRESSED,
    NOT_DENSE,
    SUPPORTED,
    MatmulAlgorithm,
    MatmulAlgorithms,
    Weight,
    int8_support,
)

FEW_TOKENS = 16  # up to so many, each byte of W counts more than the arithmetic
DOT_TOKENS = 4  # dense and grid codes with half-precision x: above, tensor cores
MMA_FEW_TOKENS = 32
INT8_FEW_TOKENS = 64  # tiles of 128 tokens leave most of a GPU idle; more tokens unpack the codes too often
_F32 = np.dtype(np.float32)
_MANY = (False, f"more than {FEW_TOKENS} tokens")
_SPARSE = (False, "the codes are sparse")
_NOT_SPARSE = (False, "the codes are not sparse")
_NO_TENSOR_CORES = (
    False, "tensor cores need half-precision x, and dense or grid codes of an orthonormal transform without a basis"
)  # fmt: skip
_OTHER_RANGE = (False, "the number of tokens is outside the range of the kernel")

#: Adds the launches of a matmul with a weight to a `linear.Call`.
AddLaunches = Callable[[Any, Any], None]


def uses_tensor_cores(weight: RBEBlocks, dtype: Any) -> bool:
    """Whether linear.cu multiplies the codes of W, without decoding them to memory, on tensor cores.

    In float16, x^ of a transform that is not orthonormal would lose digits.
    """
    return (
        dtype != _F32
        and weight.codes.kind != "sparse"
        and weight.basis is None
        and transforms.is_orthonormal(weight.col_transform)
    )


class GpuMatmul(MatmulAlgorithm):
    """An algorithm of kernels of one source.

    Attributes
    ----------
    rank : the cost; the lowest runs
    add_launches : what runs it
    source : name of the .cu file
    """

    rank: int
    source = "linear"

    def __init__(self, add_launches: AddLaunches) -> None:
        self.add_launches = add_launches

    def cost(self, weight: Weight, tokens: int, dtype: Any, cache: PanelCache | None) -> float:
        return self.rank


class DenseDot(GpuMatmul):
    """Dense weight, few tokens: dot products in float32."""

    name, method, rank = "dense_dot", None, 0

    def supports(self, weight: Weight, tokens: int, dtype: Any) -> tuple[bool, str]:
        if isinstance(weight, RBEBlocks):
            return NOT_DENSE
        return SUPPORTED if tokens <= FEW_TOKENS else _MANY


class DenseTiles(GpuMatmul):
    """Dense weight: tiles, on tensor cores where dtypes and alignment allow it, else in float32."""

    name, method, rank = "dense_tiles", None, 1

    def supports(self, weight: Weight, tokens: int, dtype: Any) -> tuple[bool, str]:
        return NOT_DENSE if isinstance(weight, RBEBlocks) else SUPPORTED


class CodesMmaFew(GpuMatmul):
    """Dense and grid codes on tensor cores, 16 tokens at a time."""

    name, method, rank = "codes_mma_few", "transform", 0
    source = "linear_few"

    def supports(self, weight: Weight, tokens: int, dtype: Any) -> tuple[bool, str]:
        if not isinstance(weight, RBEBlocks):
            return NOT_COMPRESSED
        if not DOT_TOKENS < tokens <= MMA_FEW_TOKENS:
            return _OTHER_RANGE
        return SUPPORTED if uses_tensor_cores(weight, dtype) else _NO_TENSOR_CORES


class CodesMma(GpuMatmul):
    """Dense and grid codes on tensor cores, unpacked tile by tile."""

    name, method, rank = "codes_mma", "transform", 0

    def supports(self, weight: Weight, tokens: int, dtype: Any) -> tuple[bool, str]:
        if not isinstance(weight, RBEBlocks):
            return NOT_COMPRESSED
        if tokens <= MMA_FEW_TOKENS:
            return _OTHER_RANGE
        return SUPPORTED if uses_tensor_cores(weight, dtype) else _NO_TENSOR_CORES


class CodesDot(GpuMatmul):
    """Dense and grid codes, few tokens: dot products in float32."""

    name, method, rank = "codes_dot", "transform", 1
    source = "linear_few"

    def supports(self, weight: Weight, tokens: int, dtype: Any) -> tuple[bool, str]:
        if not isinstance(weight, RBEBlocks):
            return NOT_COMPRESSED
        if weight.codes.kind == "sparse":
            return _SPARSE
        return SUPPORTED if tokens <= FEW_TOKENS else _MANY


class SparseDot(GpuMatmul):
    """Sparse codes, few tokens: dot products in float32."""

    name, method, rank = "sparse_dot", "transform", 1

    def supports(self, weight: Weight, tokens: int, dtype: Any) -> tuple[bool, str]:
        if not isinstance(weight, RBEBlocks):
            return NOT_COMPRESSED
        if weight.codes.kind != "sparse":
            return _NOT_SPARSE
        return SUPPORTED if tokens <= FEW_TOKENS else _MANY


class CachedPanels(GpuMatmul):
    """Decoded panels of rows that a cache keeps."""

    name, method, rank = "cache", "cache", 2

    def supports(self, weight: Weight, tokens: int, dtype: Any) -> tuple[bool, str]:
        return SUPPORTED if isinstance(weight, RBEBlocks) else NOT_COMPRESSED


class DecodedPanels(GpuMatmul):
    """Decoded panels of rows."""

    name, method, rank = "decode", "decode", 3

    def supports(self, weight: Weight, tokens: int, dtype: Any) -> tuple[bool, str]:
        return SUPPORTED if isinstance(weight, RBEBlocks) else NOT_COMPRESSED


class TransformTiles(GpuMatmul):
    """Any codes, any number of tokens, in the transform domain."""

    name, method, rank = "transform_tiles", "transform", 4
    source = "linear_transform"

    def supports(self, weight: Weight, tokens: int, dtype: Any) -> tuple[bool, str]:
        return SUPPORTED if isinstance(weight, RBEBlocks) else NOT_COMPRESSED


class Int8Few(GpuMatmul):
    """Dense and grid codes times int8 activations, 16 tokens at a time."""

    name, method, rank, activation_bits = "int8_few", "transform", 0, 8
    source = "linear_integers"

    def supports(self, weight: Weight, tokens: int, dtype: Any) -> tuple[bool, str]:
        supported = int8_support(weight)
        return _OTHER_RANGE if supported[0] and tokens > INT8_FEW_TOKENS else supported


class Int8Tiles(GpuMatmul):
    """Dense and grid codes times int8 activations: tiles of 128 tokens, of dense codes 64."""

    name, method, rank, activation_bits = "int8_tiles", "transform", 1, 8
    source = "linear_integers"

    def supports(self, weight: Weight, tokens: int, dtype: Any) -> tuple[bool, str]:
        return int8_support(weight)


class GpuMatmulAlgorithms(MatmulAlgorithms):
    """The algorithms in the order of their ranks."""

    def __init__(self, *algorithms: GpuMatmul) -> None:
        super().__init__(*sorted(algorithms, key=lambda a: a.rank))

    def choose(
        self,
        weight: Weight,
        tokens: int,
        dtype: Any,
        cache: PanelCache | None = None,
        method: str | None = None,
        activation_bits: int | None = None,
    ) -> MatmulAlgorithm:
        """The first supported algorithm, which is 3 us faster to find than the minimum of all ranks."""
        for algorithm in self._candidates(weight, cache, method, activation_bits):
            if algorithm.supports(weight, tokens, dtype)[0]:
                return algorithm
        return super().choose(
            weight, tokens, dtype, cache, method, activation_bits
        )  # which says why none can

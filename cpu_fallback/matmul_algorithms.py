"""The matmul algorithms on the CPU: what each supports, and its estimated time.

A time is a sum of few terms, each a count times nanoseconds of one thread (`MatmulCosts`):

    transform   calls + values x vectors x transform + (entries x (entry + vectors x entry_vector)  or
                weights x (unpack + vectors x dense)); sparse rows of high density: spread in place of unpack
    decode      calls of every panel + weights x (unpack + block x synthesis) + dense matmul
    cache       calls of every panel + dense matmul, and `decode` for the part that the cache does not hold
    dense       weights x the larger of vectors x dense / threads and stream

with vectors = tokens / 16, rounded up; a few tokens have terms of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rbe_gpu.blocks import RBEBlocks
from rbe_gpu.cache import PanelCache
from rbe_gpu.codecs import DenseCodes, SparseCodes
from rbe_gpu.matmul import (
    BASIS,
    NOT_COMPRESSED,
    NOT_DENSE,
    SUPPORTED,
    MatmulAlgorithm,
    MatmulAlgorithms,
    Weight,
    int8_support,
)

from ._pool import num_threads
from .decode import panel_rows
from .matmul_costs import DENSE_ROWS_DENSITY, FEW_TOKENS, INT8_FEW_TOKENS, MatmulCosts, costs
from .operand import CODE_FIELDS

_MANY = (False, "too many tokens to multiply one by one")
_FEW = (False, "so few tokens are multiplied one by one")
_UNREAD = (False, "no matmul kernel reads the codes of the weight (CODE_FIELDS in cpu_fallback/operand.py)")


class CpuMatmul(MatmulAlgorithm):
    """An algorithm, and the function that runs it (see `linear`)."""

    def __init__(self, run: Callable[..., bool]) -> None:
        self.run = run


def _one_by_one(weight: RBEBlocks, tokens: int) -> bool:
    """Whether a compressed weight is multiplied token by token."""
    few = 1 if isinstance(weight.codes, SparseCodes) else FEW_TOKENS
    return weight.basis is None and tokens <= few


class DenseMatvec(CpuMatmul):
    """Dense weight, token by token."""

    name, method = "dense_matvec", None

    def supports(self, weight: Weight, tokens: int, dtype: Any) -> tuple[bool, str]:
        if isinstance(weight, RBEBlocks):
            return NOT_DENSE
        # there are no panels of no columns
        return SUPPORTED if tokens <= FEW_TOKENS or not weight.shape[1] else _MANY

    def cost(self, weight: Weight, tokens: int, dtype: Any, cache: PanelCache | None) -> float:
        return 1e-9 * _dense(weight.shape[0] * weight.shape[1], tokens, num_threads(), costs())


class DenseTiles(CpuMatmul):
    """Dense weight, tiles of up to 64 tokens."""

    name, method = "dense_tiles", None

    def supports(self, weight: Weight, tokens: int, dtype: Any) -> tuple[bool, str]:
        if isinstance(weight, RBEBlocks):
            return NOT_DENSE
        return _FEW if tokens <= FEW_TOKENS or not weight.shape[1] else SUPPORTED

    def cost(self, weight: Weight, tokens: int, dtype: Any, cache: PanelCache | None) -> float:
        return 1e-9 * _dense(weight.shape[0] * weight.shape[1], tokens, num_threads(), costs())


class TransformMatvec(CpuMatmul):
    """In the transform domain, token by token."""

    name, method = "transform_matvec", "transform"

    def supports(self, weight: Weight, tokens: int, dtype: Any) -> tuple[bool, str]:
        if not isinstance(weight, RBEBlocks):
            return NOT_COMPRESSED
        if type(weight.codes) not in CODE_FIELDS:
            return _UNREAD
        if weight.basis is not None:
            return BASIS
        return SUPPORTED if _one_by_one(weight, tokens) else _MANY

    def cost(self, weight: Weight, tokens: int, dtype: Any, cache: PanelCache | None) -> float:
        return 1e-9 * _transform(weight, tokens, num_threads(), costs())


class TransformTiles(CpuMatmul):
    """In the transform domain, tiles of up to 64 tokens."""

    name, method = "transform_tiles", "transform"

    def supports(self, weight: Weight, tokens: int, dtype: Any) -> tuple[bool, str]:
        if not isinstance(weight, RBEBlocks):
            return NOT_COMPRESSED
        if type(weight.codes) not in CODE_FIELDS:
            return _UNREAD
        return _FEW if _one_by_one(weight, tokens) else SUPPORTED

    def cost(self, weight: Weight, tokens: int, dtype: Any, cache: PanelCache | None) -> float:
        return 1e-9 * _transform(weight, tokens, num_threads(), costs())


class DecodedPanels(CpuMatmul):
    """Decoded panels of rows."""

    name, method = "decode", "decode"

    def supports(self, weight: Weight, tokens: int, dtype: Any) -> tuple[bool, str]:
        return SUPPORTED if isinstance(weight, RBEBlocks) else NOT_COMPRESSED

    def cost(self, weight: Weight, tokens: int, dtype: Any, cache: PanelCache | None) -> float:
        return 1e-9 * _panels(weight, tokens, num_threads(), costs(), None)


class CachedPanels(CpuMatmul):
    """Decoded panels of rows that a cache keeps."""

    name, method = "cache", "cache"

    def supports(self, weight: Weight, tokens: int, dtype: Any) -> tuple[bool, str]:
        return SUPPORTED if isinstance(weight, RBEBlocks) else NOT_COMPRESSED

    def cost(self, weight: Weight, tokens: int, dtype: Any, cache: PanelCache | None) -> float:
        assert cache is not None
        held = min(1.0, cache.budget / weight.dense_nbytes)
        return 1e-9 * _panels(weight, tokens, num_threads(), costs(), held)


def _has_int8_matvec(weight: RBEBlocks) -> bool:
    codes = weight.codes
    if isinstance(codes, DenseCodes) and codes.group not in (32, 64, 128):
        return False
    return weight.row_transform == weight.col_transform == "none"


class Int8Matvec(CpuMatmul):
    """Grid and dense codes without a transform times int8 activations, token by token."""

    name, method, activation_bits = "int8_matvec", "transform", 8

    def supports(self, weight: Weight, tokens: int, dtype: Any) -> tuple[bool, str]:
        supported = int8_support(weight)
        if not supported[0]:
            return supported
        assert isinstance(weight, RBEBlocks)
        return SUPPORTED if _has_int8_matvec(weight) and tokens <= INT8_FEW_TOKENS else _MANY

    def cost(self, weight: Weight, tokens: int, dtype: Any, cache: PanelCache | None) -> float:
        return 1e-9 * _int8(weight, tokens, num_threads(), costs())


class Int8Tiles(CpuMatmul):
    """Dense or grid codes times int8 activations, tiles of up to 64 tokens."""

    name, method, activation_bits = "int8_tiles", "transform", 8

    def supports(self, weight: Weight, tokens: int, dtype: Any) -> tuple[bool, str]:
        supported = int8_support(weight)
        if not supported[0]:
            return supported
        assert isinstance(weight, RBEBlocks)
        return _FEW if _has_int8_matvec(weight) and tokens <= INT8_FEW_TOKENS else SUPPORTED

    def cost(self, weight: Weight, tokens: int, dtype: Any, cache: PanelCache | None) -> float:
        return 1e-9 * _int8(weight, tokens, num_threads(), costs())


class CpuMatmulAlgorithms(MatmulAlgorithms):
    def favors_transform_domain(
        self,
        weight: Weight,
        tokens: int,
        dtype: Any,
        cache: PanelCache | None = None,
        method: str | None = None,
        activation_bits: int | None = None,
    ) -> bool:
        """Without a cache always: panels, too, are decoded faster without one of the transforms. What a cache holds
        has them.
        """
        return isinstance(weight, RBEBlocks) and cache is None


def _int8(weight: Any, tokens: int, threads: int, c: MatmulCosts) -> float:
    """Products with int8 activations take a third of those of floats; nothing else could run for them."""
    return c.call + weight.rows_pad * weight.cols_pad * -(-tokens // 16) * c.dense / (3 * threads)


# --- nanoseconds --------------------------------------------------------------------------------------


def _transform_of_x(weight: RBEBlocks, tokens: int, c: MatmulCosts) -> float:
    """Input and output transforms."""
    vectors = tokens / 16 if tokens <= FEW_TOKENS else -(-tokens // 16)
    transform = c.transform * (1.0 if weight.transform != "none" else 0.25)
    return (weight.cols_pad + weight.rows_pad) * vectors * transform


def _transform(weight: RBEBlocks, tokens: int, threads: int, c: MatmulCosts) -> float:
    codes, weights, vectors = weight.codes, weight.rows_pad * weight.cols_pad, -(-tokens // 16)
    few = tokens <= FEW_TOKENS
    if not isinstance(codes, SparseCodes):
        matmul = weights * (c.few * tokens if few else c.unpack + vectors * c.dense)
    elif tokens == 1:
        matmul = weights * c.spread if codes.index_kind == "bitmap" else codes.entries * c.entry_few
    elif codes.index_kind != "delta" and codes.entries > DENSE_ROWS_DENSITY * weights:
        matmul = weights * (c.spread + vectors * c.dense)
    else:
        matmul = codes.entries * (c.entry + vectors * c.entry_vector)
    calls = 1 if few else 2
    return calls * c.call + (_transform_of_x(weight, tokens, c) + matmul) / threads


def _dense(weights: int, tokens: int, threads: int, c: MatmulCosts) -> float:
    vectors = tokens / 4 if tokens <= FEW_TOKENS else -(-tokens // 16)
    return weights * max(c.dense * vectors / threads, c.stream)


def _panels(weight: RBEBlocks, tokens: int, threads: int, c: MatmulCosts, held: float | None) -> float:
    """held : the part of the decoded weight that a cache holds; None without a cache"""
    weights = weight.rows_pad * weight.cols_pad
    panels = -(-weight.rows // panel_rows(weight))
    calls = (0 if tokens <= FEW_TOKENS else 1) + panels * (4 if held is None else 1)
    decoded = weights * (c.scatter if isinstance(weight.codes, SparseCodes) else c.unpack)
    decoded += weights * weight.block * c.synthesis if weight.transform != "none" else 0.0
    x = _transform_of_x(weight, tokens, c) / 4
    part = decoded if held is None else (1 - held) * decoded
    return calls * c.call + (x + part) / threads + _dense(weights, tokens, threads, c)

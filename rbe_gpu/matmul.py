"""The matmul algorithms of a backend, and the choice between them.

    y = activation(x W^T + bias) + residual

A backend lists its algorithms in one table, `ALGORITHMS` of its `linear` module. Each algorithm says whether it
supports a weight, a number of tokens and a dtype, and what it costs; the cheapest supported one runs. `method=` of
the public functions restricts the choice for a compressed weight:

    transform   multiply in the transform domain: W is never decoded
    decode      decode panels of rows of W, and multiply with them
    cache       multiply with decoded panels that a `PanelCache` keeps (panels that do not fit are decoded)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, cast

from .blocks import Array, RBEBlocks
from .cache import PanelCache
from .codecs import DenseCodes, GridCodes
from .codecs.grid import GridRows
from .dispatch import Backend, as_cupy, device_of
from .workspace import Workspace

METHODS = ("transform", "decode", "cache")
#: None: activations as they are; 8: rounded to int8, token by token
ACTIVATION_BITS = (None, 8)
Weight = Array | RBEBlocks

SUPPORTED = (True, "")
_METHOD_AND_BITS = (
    "int8 activations are multiplied by method='transform' only: leave out one of the two options"
)
NOT_COMPRESSED = (False, "the weight is dense")
NOT_DENSE = (False, "the weight is compressed")
_NOT_INT8 = (False, "only dense and grid codes are multiplied with int8 activations")
_WIDE = (False, "the codes have more than 8 bits")
_SHRINK = (False, "the grid's values are shrunk towards zero (shrink > 0): calibrate again")
BASIS = (False, "the weight has a basis")
_INT8_COLUMNS = (1 << 31) // (
    2 * 255 * 128
)  # 32,896: an int32 holds the sums of every kernel with a factor to spare
_LONG = (
    False,
    f"its rows, padded to whole blocks, have more than {_INT8_COLUMNS} columns: int32 sums could overflow",
)


def int8_support(weight: Weight) -> tuple[bool, str]:
    """Whether int8 activations can be multiplied with a weight's codes; if not, also the reason."""
    if not isinstance(weight, RBEBlocks):
        return NOT_COMPRESSED
    codes = weight.codes
    if not isinstance(codes, DenseCodes | GridCodes) or isinstance(codes, GridRows):
        return _NOT_INT8
    if codes.bits > 8:
        return _WIDE
    if isinstance(codes, GridCodes) and codes.shrink:
        return _SHRINK
    if weight.basis is not None:
        return BASIS
    return SUPPORTED if weight.cols_pad <= _INT8_COLUMNS else _LONG


class MatmulAlgorithm(ABC):
    """A matmul algorithm of a backend.

    Attributes
    ----------
    name : unique within the backend
    method : the value of `method=` that selects the algorithm; None for algorithms of dense weights
    activation_bits : 8 for algorithms that round activations to int8; None for those that do not
    """

    name: str
    method: str | None
    activation_bits: int | None = None

    @abstractmethod
    def supports(self, weight: Weight, tokens: int, dtype: Any) -> tuple[bool, str]:
        """Whether the algorithm can multiply `tokens` rows of a dtype with `weight`; if not, also the reason."""

    @abstractmethod
    def cost(self, weight: Weight, tokens: int, dtype: Any, cache: PanelCache | None) -> float:
        """Estimated seconds, or a rank where a backend has no estimate; comparable within a backend only."""


@dataclass(frozen=True)
class MatmulPlan:
    """The algorithm chosen for a matmul.

    Attributes
    ----------
    algorithm : name of the algorithm
    method : the value of `method=` that selects it
    costs : the cost of every supported algorithm by name: seconds on the CPU, a rank on a GPU
    """

    algorithm: str
    method: str | None
    costs: dict[str, float]


class MatmulAlgorithms:
    """The algorithms of a backend, in the order in which equal costs are resolved."""

    def __init__(self, *algorithms: MatmulAlgorithm) -> None:
        self._algorithms = algorithms
        self._dense = tuple(a for a in algorithms if a.method is None)
        compressed = tuple(a for a in algorithms if a.method is not None)
        self._compressed: dict[tuple[str | None, bool, int | None], tuple[MatmulAlgorithm, ...]] = {
            (method, has_cache, bits): tuple(
                a
                for a in compressed
                if method in (None, a.method)
                and (has_cache or a.method != "cache")
                and a.activation_bits == bits
            )
            for method in (None, *METHODS)
            for has_cache in (False, True)
            for bits in ACTIVATION_BITS
        }

    def __iter__(self) -> Iterator[MatmulAlgorithm]:
        return iter(self._algorithms)

    def supported(
        self,
        weight: Weight,
        tokens: int,
        dtype: Any,
        cache: PanelCache | None = None,
        method: str | None = None,
        activation_bits: int | None = None,
    ) -> list[MatmulAlgorithm]:
        """The algorithms that can run; with `method`, those that it selects."""
        return [
            a
            for a in self._candidates(weight, cache, method, activation_bits)
            if a.supports(weight, tokens, dtype)[0]
        ]

    def _candidates(
        self, weight: Weight, cache: PanelCache | None, method: str | None, activation_bits: int | None
    ) -> tuple[MatmulAlgorithm, ...]:
        if isinstance(weight, RBEBlocks):
            return self._compressed[method, cache is not None, activation_bits]
        return self._dense if activation_bits is None else self._compressed[None, False, activation_bits]

    def choose(
        self,
        weight: Weight,
        tokens: int,
        dtype: Any,
        cache: PanelCache | None = None,
        method: str | None = None,
        activation_bits: int | None = None,
    ) -> MatmulAlgorithm:
        """The cheapest algorithm that can run; `NotImplementedError` with the reasons where none can."""
        supported = self.supported(weight, tokens, dtype, cache, method, activation_bits)
        if len(supported) == 1:
            return supported[0]
        if not supported:
            reasons = {
                a.supports(weight, tokens, dtype)[1]: None
                for a in self._candidates(weight, cache, method, activation_bits)
            }
            options = {"method": method, "activation_bits": activation_bits}
            wanted = ", ".join(f"{name}={value!r}" for name, value in options.items() if value is not None)
            why = "; ".join(reasons) or _METHOD_AND_BITS
            raise NotImplementedError(f"{wanted} cannot multiply this weight: {why}")
        return min(supported, key=lambda a: a.cost(weight, tokens, dtype, cache))

    def plan(
        self,
        weight: Weight,
        tokens: int,
        dtype: Any,
        cache: PanelCache | None = None,
        method: str | None = None,
        activation_bits: int | None = None,
    ) -> MatmulPlan:
        """The choice as `choose` makes it, and the costs of all algorithms that could run without `method`."""
        check_method(method, cache)
        check_activation_bits(activation_bits)
        chosen = self.choose(weight, tokens, dtype, cache, method, activation_bits)
        supported = self.supported(weight, tokens, dtype, cache, None, activation_bits)
        costs = {a.name: a.cost(weight, tokens, dtype, cache) for a in supported}
        return MatmulPlan(chosen.name, chosen.method, costs)

    def favors_transform_domain(
        self,
        weight: Weight,
        tokens: int,
        dtype: Any,
        cache: PanelCache | None = None,
        method: str | None = None,
        activation_bits: int | None = None,
    ) -> bool:
        """Whether leaving out one of the transforms of `weight` makes the matmul cheaper."""
        return (
            isinstance(weight, RBEBlocks)
            and self.choose(weight, tokens, dtype, cache, method, activation_bits).method == "transform"
        )


@cache
def algorithms_of(backend: Backend) -> MatmulAlgorithms:
    """The matmul algorithms of a backend."""
    return cast(MatmulAlgorithms, import_module(f"{backend.package}.linear").ALGORITHMS)


class PreparedInput:
    """The input of several matmuls. What one of them computes from it, such as its transform, the next ones reuse.

    Made by `prepare_input`. The array must not change as long as it is used.

    Attributes
    ----------
    array : (..., in_features)
    workspace : holds what is computed from the array
    """

    __slots__ = ("_computed", "array", "workspace")

    def __init__(self, array: Array, workspace: Workspace) -> None:
        self.array = array
        self.workspace = workspace
        self._computed: dict[str, object] = {}

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    def is_computed(self, buffer: str, value: object) -> bool:
        """Whether a scratch buffer holds a value computed from the array; if not, the caller computes it there now.

        Parameters
        ----------
        buffer : name of the buffer in `workspace`
        value : describes the value, and its place in the buffer
        """
        owners = self.workspace.owners
        if owners.get(buffer) is self._computed and self._computed[buffer] == value:
            return True
        # the dict stands for this object: with the object itself, the workspace would keep the array alive
        owners[buffer], self._computed[buffer] = self._computed, value
        return False


def prepare_input(x: Array, workspace: Workspace | None = None) -> PreparedInput:
    """Input that several calls of `linear` share, each in the place of x.

    Parameters
    ----------
    x : (..., in_features) float32/float16/bfloat16
    workspace : holds what is computed from x, and is the default workspace of the calls
    """
    x = as_cupy(x)
    return PreparedInput(x, (workspace or Workspace()).on(device_of(x, "x")))


def check_method(method: str | None, cache: PanelCache | None) -> None:
    """Raise `ValueError` unless `method` is known, or None, and has the cache that it needs."""
    if method not in (None, *METHODS):
        raise ValueError(f"unknown method {method!r}; use one of {METHODS}, or None")
    if method == "cache" and cache is None:
        raise ValueError("method='cache' needs a cache: pass cache=PanelCache(bytes)")


def check_activation_bits(activation_bits: int | None) -> None:
    """Raise `ValueError` unless `activation_bits` is None or 8."""
    if activation_bits not in ACTIVATION_BITS:
        raise ValueError(f"activation_bits={activation_bits!r}; use one of {ACTIVATION_BITS}")

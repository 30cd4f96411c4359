"""Matmuls whose arguments are prepared once, for kernels that run all layers of a model in one call.

`PreparedMatmul` chooses the algorithm as `linear` does and fills the kernel's struct; `multiply` runs it inside
another kernel. It is computed by the kernel that `linear` calls, so that results are the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from rbe_gpu.blocks import RBEBlocks

from . import params
from ._atomics import call_address, call_symbol
from ._jit import cpu_inline
from ._workers import RUN
from .arrays import address, longs_at
from .int8_input import INT8_INPUT
from .int8_matvec import Int8MatvecCall
from .int8_tiles import Int8Activations, Int8TilesCall
from .linear import ALGORITHMS
from .matmul_algorithms import DenseMatvec, DenseTiles, Int8Matvec, Int8Tiles, TransformMatvec, TransformTiles
from .matmul_tiles import TilesCall
from .matvec import MatvecCall
from .operand import DenseWeight, MatmulCall, Operand, operand_of
from .transform_in import NOT_FINITE, Activations

_FLOAT32 = np.dtype(np.float32)


class StepLinear(NamedTuple):
    """A linear layer, as `linear` takes it."""

    weight: Any
    bias: Any
    activation: str | None
    cache: Any
    method: str | None
    activation_bits: int | None

    @classmethod
    def of(cls, layer: Any) -> StepLinear:
        """Of an `RBELinear`."""
        return cls(
            layer.weight, layer.bias, layer.activation, layer.cache, layer.method, layer.activation_bits
        )


@cpu_inline
def _clear(counters, count):
    for i in range(count):
        counters[i] = 0


@cpu_inline
def multiply(m, tokens):
    """Run a matmul of so many tokens; m : record of `PREPARED_MATMUL`. Returns whether it wrote its results."""
    longs_at(m.tokens)[0] = tokens
    if m.parts == 0:
        call_address(m.kernel, (m.params,))
        return m.written == 0 or longs_at(m.written)[0] != 0
    _clear(longs_at(m.counters), m.num_counters)
    if m.state != 0:
        longs_at(m.input_tokens)[0] = tokens
        _clear(longs_at(m.state), m.state_size)
    call_symbol(RUN, (m.kernel, m.parts, m.params))
    return m.not_finite == 0 or longs_at(m.not_finite)[0] == 0


Buffer = Callable[[int], Any]


class Buffers(NamedTuple):
    """Where prepared matmuls get scratch memory, aligned to 64 bytes: one call uses both at once.

    Attributes
    ----------
    call : of the matmul
    activations : of its transformed or rounded input, which the next matmul may share
    """

    call: Buffer
    activations: Buffer


class Measure:
    """Buffers whose sizes are remembered: what matmuls that run one after another need.

    Attributes
    ----------
    call, activations : the largest sizes in bytes
    """

    def __init__(self) -> None:
        self.call = self.activations = 0

    def _call(self, nbytes: int) -> Any:
        self.call = max(self.call, nbytes)
        return np.empty(nbytes, np.uint8)

    def _activations(self, nbytes: int) -> Any:
        self.activations = max(self.activations, nbytes)
        return np.empty(nbytes, np.uint8)

    @property
    def buffers(self) -> Buffers:
        return Buffers(self._call, self._activations)


def aligned(nbytes: int) -> int:
    """Bytes up to the next cache line."""
    return -(-nbytes // 64) * 64


def rows_bytes(widths: Mapping[str, int], rows: int) -> int:
    """What `scratch_rows` takes."""
    return sum(aligned(4 * rows * width) for width in widths.values())


def scratch_rows(memory: Any, widths: Mapping[str, int], rows: int) -> dict[str, Any]:
    """Arrays (rows, width) float32 at the start of scratch memory, each from a cache line on."""
    arrays, start = {}, 0
    for name, width in widths.items():
        nbytes = 4 * rows * width
        arrays[name] = memory[start : start + nbytes].view(np.float32).reshape(rows, width)
        start += aligned(nbytes)
    return arrays


class PreparedMatmul:
    """The filled struct of a matmul.

    Parameters
    ----------
    linear : the layer
    call : its filled struct
    activations : the input of a call in tiles; `shared` : the matmul before has prepared it
    threads : of a call in tiles
    """

    def __init__(
        self, linear: StepLinear, call: MatmulCall, activations: Any, shared: bool, threads: int
    ) -> None:
        self._linear, self._call, self._shared, self._threads = linear, call, shared, threads
        self._activations: Activations | Int8Activations | None = activations
        self._bias: Any = None

    def connect(self, x: Any, residual: Any, out: Any, record: Any) -> None:
        """Read x (tokens, in_features), write `out` and fill a record of `params.PREPARED_MATMUL`.

        x, residual, out : float32, which must live as long as this object
        """
        for name, value in self._fields(x, residual, out).items():
            record[name] = value

    def _fields(self, x: Any, residual: Any, out: Any) -> dict[str, int]:
        call, linear = self._call, self._linear
        self._bias = None if linear.bias is None else np.ascontiguousarray(linear.bias, np.float32)
        call.set_output(self._bias, linear.activation, residual, out)
        fields = {"kernel": call.kernel(), "params": call.params_at}
        if isinstance(call, MatvecCall | Int8MatvecCall):
            call.set_input(x)
            struct = params.MATVEC if isinstance(call, MatvecCall) else params.INT8_MATVEC
            return {**fields, "tokens": call.params_at + struct.offset("tokens"), "written": call.written_at}
        a = self._activations
        assert isinstance(call, TilesCall | Int8TilesCall)
        assert a is not None
        fields |= {
            "parts": self._threads,
            "counters": address(call.counters),
            "num_counters": call.counters.size,
        }
        struct = params.TRANSFORM_IN if isinstance(a, Activations) else params.INT8_INPUT
        tokens = a.params_at + struct.offset("tokens")
        if not self._shared:
            a.set_input(x)
            fields |= {"state": address(a.state), "state_size": a.state.size, "input_tokens": tokens}
        if isinstance(call, Int8TilesCall):
            call.input_kernel[0] = INT8_INPUT()
            return {**fields, "tokens": tokens}
        call.transform_in[0] = 0 if self._shared else a.params_at
        if isinstance(linear.weight, RBEBlocks):
            fields["not_finite"] = address(a.state) + 8 * NOT_FINITE
        return {**fields, "tokens": call.params_at + params.TILES.offset("tokens")}


def prepare(
    linear: StepLinear, tokens: int, threads: int, buffers: Buffers, before: PreparedMatmul | None = None
) -> PreparedMatmul | None:
    """A matmul of up to so many float32 tokens; None where `linear` decodes the weight.

    Parameters
    ----------
    before : the matmul that runs before this one, if it reads the same input
    """
    algorithm = ALGORITHMS.choose(
        linear.weight, tokens, _FLOAT32, linear.cache, linear.method, linear.activation_bits
    )
    weight, in_features = linear.weight, linear.weight.shape[1]
    w = operand_of(weight) if isinstance(weight, RBEBlocks) else DenseWeight(weight, 0).operand()
    if isinstance(algorithm, DenseMatvec | TransformMatvec):
        call: MatmulCall = MatvecCall(w, tokens, in_features, threads, buffers.call)
        return PreparedMatmul(linear, call, None, False, threads)
    if isinstance(algorithm, Int8Matvec):
        call = Int8MatvecCall(w, tokens, in_features, threads, buffers.call)
        return PreparedMatmul(linear, call, None, False, threads)
    if isinstance(algorithm, Int8Tiles):
        rounded = Int8Activations(w, tokens, in_features, threads, buffers.activations)
        return PreparedMatmul(linear, Int8TilesCall(rounded, threads, buffers.call), rounded, False, threads)
    if isinstance(algorithm, DenseTiles | TransformTiles):
        a = _shared(w, before)
        shared = a is not None
        if a is None:
            a = Activations(
                tokens, in_features, w.transform_in, w.block, w.basis, threads, buffers.activations
            )
        return PreparedMatmul(linear, TilesCall(w, a, threads, buffers.call), a, shared, threads)
    return None


def _shared(w: Operand, before: PreparedMatmul | None) -> Activations | None:
    """The input of the matmul before, if this one reads it in the same form."""
    if before is None or not isinstance(before._activations, Activations):
        return None
    operand = before._call.operand
    same = (operand.transform_in, operand.block, operand.basis) == (w.transform_in, w.block, w.basis)
    return before._activations if same else None

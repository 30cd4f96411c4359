"""A few tokens, of one or several packed texts, through all layers of an encoder in a single call.

    a       = LayerNorm(attention(x_l) + x_l)
    x_(l+1) = LayerNorm(down(activation(up(a))) + a)

as `models.bert` has it. Every step is computed by the kernel that computes it op by op, so that results are the same
bits. It saves the calls from Python.

In the kernel `p` is a record of `params.ENCODER_STEP`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import carray
from numpy.typing import NDArray

from . import params
from ._atomics import call_symbol
from ._jit import cpu_kernel
from ._parts import pointer, record_at
from ._workers import RUN
from .arrays import address, floats_at, longs_at
from .attention import prepare as prepare_attention
from .layer_norm import PARALLEL_FROM, normalize_rows
from .prepared_matmul import (
    Buffers,
    Measure,
    StepLinear,
    aligned,
    multiply,
    prepare,
    rows_bytes,
    scratch_rows,
)

_STEP, _LAYER, _ATTENTION = params.ENCODER_STEP.dtype, params.ENCODER_LAYER.dtype, params.ATTENTION.dtype
_LINEARS = ("query", "key", "value", "output", "up", "down")
_NORMS = ("attention_gain", "attention_bias", "ffn_gain", "ffn_bias")
#: Calls of so many tokens are made for each number of tokens, others for multiples of it.
_EXACT, _MULTIPLE = 8, 16
#: With more, the calls from Python are a small part of the time.
MOST_TOKENS = 128


@cpu_kernel
def _step(params_at, eps):
    """Run a step; False where a matmul does not take its input."""
    p = record_at(params_at, _STEP)
    layers = carray(pointer(p.layers), p.num_layers, _LAYER)
    tokens, shape = p.tokens, (p.tokens, p.hidden_size)
    x, y = carray(pointer(p.x), shape, np.float32), carray(pointer(p.y), shape, np.float32)
    for index in range(p.num_layers):
        layer = layers[index]
        if not (
            multiply(layer.query, tokens) and multiply(layer.key, tokens) and multiply(layer.value, tokens)
        ):
            return False
        longs_at(record_at(p.attention, _ATTENTION).counter)[0] = 0
        call_symbol(RUN, (p.attention_kernel, p.attention_parts, p.attention))
        if not multiply(layer.output, tokens):
            return False
        gain, bias = floats_at(layer.attention_gain), floats_at(layer.attention_bias)
        normalize_rows(y, gain, bias, eps, None, y, None, 0, tokens)
        if not (multiply(layer.up, tokens) and multiply(layer.down, tokens)):
            return False
        gain, bias = floats_at(layer.ffn_gain), floats_at(layer.ffn_bias)
        normalize_rows(x, gain, bias, eps, None, x, None, 0, tokens)
    return True


def compile_step() -> None:
    """Compile the kernel, without those that it calls by their addresses."""
    none = params.ENCODER_STEP.record()
    _step(address(none.view(np.uint8)), 0.0)


class StepLayer(NamedTuple):
    """A layer of an encoder.

    Attributes
    ----------
    query, key, value, output, up, down : `up` has the activation
    norms : float32 gain and bias of the norm behind attention, and of the one behind the FFN
    """

    query: StepLinear
    key: StepLinear
    value: StepLinear
    output: StepLinear
    up: StepLinear
    down: StepLinear
    norms: Sequence[NDArray[np.float32]]


def rounded_tokens(tokens: int) -> int:
    """The number of tokens that a step for so many is made for: steps are kept, and texts differ."""
    return tokens if tokens <= _EXACT else -(-tokens // _MULTIPLE) * _MULTIPLE


def takes(tokens: int, hidden_size: int) -> bool:
    """Whether a step is worth while for so many tokens; its norms run on one thread."""
    return 0 < tokens <= MOST_TOKENS and tokens * hidden_size < PARALLEL_FROM


class EncoderStep:
    """The filled structs of a model's step, and the memory that they point to.

    Parameters
    ----------
    layers, eps : of the model
    num_heads, head_dim, scale : of attention
    tokens : the most that are run
    threads : number of threads of a kernel
    buffer : called with a number of bytes; returns scratch memory, aligned to 64

    Attributes
    ----------
    supported : whether the step can be run: no matmul decodes its weight
    weight_bytes : of the weights that a run reads, as they are stored
    x : (tokens, hidden_size) float32: the first rows are the normalised embeddings before a run, and the last states
        afterwards
    y : the same, for the caller before a run
    """

    def __init__(
        self,
        layers: Sequence[StepLayer],
        eps: float,
        num_heads: int,
        head_dim: int,
        scale: float,
        tokens: int,
        threads: int,
        buffer: Callable[[int], Any],
    ) -> None:
        measure = Measure()
        self.supported = all(
            prepare(getattr(layer, name), tokens, threads, measure.buffers) is not None
            for layer in layers
            for name in _LINEARS
        )
        if not self.supported:
            return
        self.weight_bytes = sum(getattr(layer, name).weight.nbytes for layer in layers for name in _LINEARS)
        hidden, inner = layers[0].output.weight.shape[0], layers[0].up.weight.shape[0]
        width = num_heads * head_dim
        widths = {"x": hidden, "y": hidden, "q": width, "k": width, "v": width, "mixed": width, "up": inner}
        of_rows, of_call = rows_bytes(widths, tokens), aligned(measure.call)
        memory = buffer(of_rows + of_call + measure.activations)
        arrays = scratch_rows(memory, widths, tokens)
        call, activations = memory[of_rows : of_rows + of_call], memory[of_rows + of_call :]
        buffers = Buffers(lambda _: call, lambda _: activations)
        self.x, self.y = arrays["x"], arrays["y"]
        self._heads = [arrays[name].reshape(tokens, num_heads, head_dim) for name in ("q", "k", "v", "mixed")]
        self._eps, self._scale = eps, scale
        self._layers = np.zeros(len(layers), _LAYER)
        self._kept: list[Any] = [memory]
        reads = dict(zip(_LINEARS, ("x", "x", "x", "mixed", "y", "up"), strict=True))
        writes = dict(zip(_LINEARS, ("q", "k", "v", "y", "up", "x"), strict=True))
        adds = {"output": "x", "down": "y"}
        for record, layer in zip(self._layers, layers, strict=True):
            before = None
            for name in _LINEARS:
                matmul = prepare(
                    getattr(layer, name),
                    tokens,
                    threads,
                    buffers,
                    before if name in ("key", "value") else None,
                )
                assert matmul is not None
                residual = arrays[adds[name]] if name in adds else None
                matmul.connect(arrays[reads[name]], residual, arrays[writes[name]], record[name])
                self._kept.append(matmul)
                before = matmul
            for name, values in zip(_NORMS, layer.norms, strict=True):
                record[name] = address(values)
            self._kept.append(layer.norms)
        self._params = params.ENCODER_STEP.record(
            layers=address(self._layers.view(np.uint8)), num_layers=len(layers), hidden_size=hidden,
            x=address(self.x), y=address(self.y),
        )  # fmt: skip
        self._params_at = address(self._params.view(np.uint8))

    def run(self, cu_seqlens: NDArray[np.int64], mask: NDArray[np.float32] | None, workspace: Any) -> bool:
        """Run the tokens whose embeddings are in `x`.

        Parameters
        ----------
        cu_seqlens : (texts + 1,) from 0 to the number of tokens
        mask : added to the scores, (texts, num_heads, rows, columns) of any strides, or None
        workspace : of the scratch memory of attention

        Returns
        -------
        Whether `x` has the result. If not, a state is not finite or too large for a transform.
        """
        tokens = int(cu_seqlens[-1])
        q, k, v, out = (a[:tokens] for a in self._heads)
        attention = prepare_attention(
            q, k, v, False, self._scale, mask, None, (-1, -1), out, workspace, (cu_seqlens, cu_seqlens)
        )
        record = self._params[0]
        record["tokens"], record["attention"] = tokens, attention.params_at
        record["attention_kernel"], record["attention_parts"] = attention.kernel, attention.parts
        return bool(_step(self._params_at, self._eps))

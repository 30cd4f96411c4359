"""One token of one text through all layers of a decoder: a single call, with arguments that are prepared once.

    a       = x_l + output(attention(RMSNorm(x_l)))                 queries and keys rotated by the token's position
    x_(l+1) = a + down(activation(gate(h)) * up(h)),  h = RMSNorm(a)

as `models.decoder` has it, also with norms of heads and Gemma's norms of what is added, and with GPT-2's LayerNorms,
without rotations and gate. Every step is computed by the
kernel that computes it op by op, so results are the same bits (of attention up to 8 query heads for a key head, where
`attention` takes another kernel from there on). It saves some 500 calls from Python: 6.5 ms beside
the 11.5 ms that a token of SmolLM2-135M takes in one (AMD EPYC, AVX-512 VNNI, one thread, 5-bit codes).

In the kernel `p` is a record of `params.DECODER_STEP`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import carray, types
from numpy.typing import NDArray

from . import params
from ._atomics import call_symbol
from ._jit import cpu_inline, cpu_kernel
from ._parts import pointer, record_at
from ._workers import RUN
from .arrays import address, floats_at
from .attention_few_queries import HEADS, PARALLEL_FROM, scratch_floats
from .layer_norm import normalize_rows
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
from .rms_norm import deviation, write_row
from .rope import rotate_halves
from .simd import vload, vload_n, vmul, vstore, vstore_n

_STEP, _LAYER, _ATTENTION = params.DECODER_STEP.dtype, params.DECODER_LAYER.dtype, params.ATTENTION_FEW.dtype


@cpu_inline
def _norm(x, at, weight, eps, residual, out, residual_out, cols):
    """RMSNorm of cols values from `at` on; weight : address."""
    rstd = deviation(x, residual, at, cols, eps, 1.0 / cols)
    write_row(x, floats_at(weight), eps, residual, out, residual_out, at, cols, rstd)


@cpu_inline(inline=False)
def _layer_norm(x_at, gain, bias, eps, out_at, cols):
    """LayerNorm of a row; all but eps and cols are addresses."""
    x, out = carray(pointer(x_at), (1, cols), np.float32), carray(pointer(out_at), (1, cols), np.float32)
    normalize_rows(x, floats_at(gain), floats_at(bias), eps, None, out, None, 0, 1)


@cpu_inline
def _copy(source, out, out_at, count):
    for i in range(0, count, 16):
        left = min(16, count - i)
        vstore_n(out, out_at + i, vload_n(source, i, left), left)


@cpu_inline
def _times(a, b, out, count):
    """out = a * b."""
    whole = count - count % 16
    for i in range(0, whole, 16):
        vstore(out, i, vmul(vload(a, i), vload(b, i)))
    if whole < count:
        left = count - whole
        vstore_n(out, whole, vmul(vload_n(a, whole, left), vload_n(b, whole, left)), left)


@cpu_inline
def _add(a, b, out, count):
    """out = a + b, as `add` does it."""
    for i in range(count):
        out[i] = a[i] + b[i]


@cpu_inline
def _attend(p, layer, index):
    """Queries q to the cached keys and values of a layer, to `mixed`. The token is the last that is seen."""
    a = record_at(p.attention, _ATTENTION)
    a.k = p.cache + 4 * index * p.cache_layer
    a.v = a.k + 4 * p.cache_values
    a.keys = p.position + 1
    a.first_key = max(0, p.position - layer.window) if layer.window >= 0 else 0
    a.parts = min(p.parts, a.units) if a.units * (a.keys - a.first_key) * a.head_dim >= PARALLEL_FROM else 1
    call_symbol(RUN, (p.attention_kernel, a.parts, p.attention))


@cpu_inline
def _self_attention(p, layer, index, eps):
    """Attention of the normalised h to `mixed`; whether all matmuls wrote."""
    if not (multiply(layer.query, 1) and multiply(layer.key, 1) and multiply(layer.value, 1)):
        return False
    q, k, v = floats_at(p.q), floats_at(p.k), floats_at(p.v)
    head_dim, heads, kv_heads, half = p.head_dim, p.num_heads, p.num_kv_heads, p.rotary_half
    if layer.query_norm != 0:
        for head in range(heads):
            _norm(q, head * head_dim, layer.query_norm, eps, None, q, None, head_dim)
        for head in range(kv_heads):
            _norm(k, head * head_dim, layer.key_norm, eps, None, k, None, head_dim)
    if half != 0:
        cos, sin, row = floats_at(layer.cos), floats_at(layer.sin), p.position * half
        rotate_halves(q, 0, heads, head_dim, cos, sin, row, half, q)
        rotate_halves(k, 0, kv_heads, head_dim, cos, sin, row, half, k)
    width = kv_heads * head_dim
    cached, at = floats_at(p.cache), index * p.cache_layer + p.position * width
    _copy(k, cached, at, width)
    _copy(v, cached, at + p.cache_values, width)
    _attend(p, layer, index)
    return True


@cpu_kernel
def _step(params_at, eps, layer_norms):
    """Run a step; False where a matmul does not take its input. The token's place in the cache then is undefined.

    layer_norms : None for RMSNorms; the kernel is compiled for the one or the other
    """
    p = record_at(params_at, _STEP)
    layers = carray(pointer(p.layers), p.num_layers, _LAYER)
    x, y, h = floats_at(p.x), floats_at(p.y), floats_at(p.h)
    gate, up = floats_at(p.gate), floats_at(p.up)
    hidden, sandwich = p.hidden_size, p.sandwich != 0
    for index in range(p.num_layers):
        layer = layers[index]
        if layer_norms is None:
            _norm(x, 0, layer.norm, eps, None, h, None, hidden)
        else:
            _layer_norm(p.x, layer.norm, layer.norm_bias, eps, p.h, hidden)
        if not (_self_attention(p, layer, index, eps) and multiply(layer.output, 1)):
            return False
        if layer_norms is not None:
            _layer_norm(p.y, layer.ffn_norm, layer.ffn_norm_bias, eps, p.h, hidden)
        elif sandwich:  # y is what attention adds
            _norm(y, 0, layer.attention_norm, eps, None, y, None, hidden)
            _norm(y, 0, layer.ffn_norm, eps, x, h, x, hidden)
        else:  # y is x plus that
            _norm(y, 0, layer.ffn_norm, eps, None, h, None, hidden)
        if not multiply(layer.up, 1):
            return False
        if p.gated != 0:
            if not multiply(layer.gate, 1):
                return False
            _times(gate, up, up, p.intermediate_size)
        if not multiply(layer.down, 1):
            return False
        if sandwich:
            _norm(y, 0, layer.output_norm, eps, None, y, None, hidden)
            _add(x, y, x, hidden)
    if layer_norms is None:
        _norm(x, 0, p.final_norm, eps, None, x, None, hidden)
    else:
        _layer_norm(p.x, p.final_norm, p.final_norm_bias, eps, p.x, hidden)
    return True


class StepLayer(NamedTuple):
    """A layer of a decoder.

    Attributes
    ----------
    norms : float32 gains of the input, of the FFN's input, or with four of Gemma's: input, attention's result, FFN's
        input, FFN's result
    biases : of the first two as LayerNorms; none of RMSNorms
    query, key, value, output, gate, up, down : the gate has the activation; without one (None) `up` has it
    query_norm, key_norm : (head_dim,) float32, or None
    window : keys in front of a token that it sees, or -1 for all
    rotary : number of the tables of cosines and sines
    """

    norms: Sequence[NDArray[np.float32]]
    biases: Sequence[NDArray[np.float32]]
    query: StepLinear
    key: StepLinear
    value: StepLinear
    output: StepLinear
    gate: StepLinear | None
    up: StepLinear
    down: StepLinear
    query_norm: NDArray[np.float32] | None
    key_norm: NDArray[np.float32] | None
    window: int
    rotary: int


_LINEARS = ("query", "key", "value", "output", "gate", "up", "down")
_NORMS = {2: ("norm", "ffn_norm"), 4: ("norm", "attention_norm", "ffn_norm", "output_norm")}


class DecoderStep:
    """The filled structs of a model's step, and the memory that they point to.

    Parameters
    ----------
    layers, eps : of the model
    final_norm : its gain, and of a LayerNorm its bias
    num_heads, num_kv_heads, head_dim, rotary_dim, scale, softcap : of attention
    threads : number of threads of a kernel
    buffer : called with a number of bytes; returns scratch memory, aligned to 64

    Attributes
    ----------
    supported : whether the step can be run: no matmul decodes its weight
    weight_bytes : of the weights that a run reads, as they are stored
    x : (1, hidden_size) float32: the token's embedding before a run, its normalised last states afterwards
    """

    def __init__(
        self,
        layers: Sequence[StepLayer],
        final_norm: Sequence[NDArray[np.float32]],
        eps: float,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rotary_dim: int,
        scale: float,
        softcap: float,
        threads: int,
        buffer: Callable[[int], Any],
    ) -> None:
        measure = Measure()
        gated = layers[0].gate is not None
        names_of_linears = [name for name in _LINEARS if gated or name != "gate"]
        linears = [getattr(layer, name) for layer in layers for name in names_of_linears]
        self.supported = all(prepare(linear, 1, threads, measure.buffers) is not None for linear in linears)
        if not self.supported:
            return
        self.weight_bytes = sum(linear.weight.nbytes for linear in linears)
        hidden, inner = layers[0].output.weight.shape[0], layers[0].up.weight.shape[0]
        q_width, kv_width = num_heads * head_dim, num_kv_heads * head_dim
        widths = {
            "x": hidden, "y": hidden, "h": hidden, "q": q_width, "k": kv_width, "v": kv_width, "mixed": q_width,
            "gate": inner, "up": inner,
        }  # fmt: skip
        scratch = threads * scratch_floats(num_heads // num_kv_heads, head_dim)
        of_rows, of_attention, of_call = rows_bytes(widths, 1), aligned(4 * scratch), aligned(measure.call)
        memory = buffer(of_rows + of_attention + of_call + measure.activations)
        arrays = scratch_rows(memory, widths, 1)
        own = memory[of_rows:]
        call = own[of_attention : of_attention + of_call]
        activations = own[of_attention + of_call :]
        buffers = Buffers(lambda _: call, lambda _: activations)  # of one matmul at a time
        self.x = arrays["x"]
        self._eps = eps
        self._attention = params.ATTENTION_FEW.record(
            q=address(arrays["q"]), q_head=head_dim, k_row=kv_width, k_head=head_dim, v_row=kv_width,
            v_head=head_dim, out=address(arrays["mixed"]), out_head=head_dim, num_kv_heads=num_kv_heads,
            group=num_heads // num_kv_heads, head_dim=head_dim, seq_q=1, scratch=address(own),
            scratch_stride=scratch // threads, units=num_kv_heads, scale=scale, softcap=softcap,
        )  # fmt: skip
        self._layers = np.zeros(len(layers), _LAYER)
        self._kept: list[Any] = [memory, final_norm]
        self._layer_norms = True if layers[0].biases else None
        sandwich = len(layers[0].norms) == 4
        reads = dict(zip(_LINEARS, ("h", "h", "h", "mixed", "h", "h", "up"), strict=True))
        writes = dict(
            zip(_LINEARS, ("q", "k", "v", "y", "gate", "up", "y" if sandwich else "x"), strict=True)
        )
        adds = {} if sandwich else {"output": "x", "down": "y"}
        for record, layer in zip(self._layers, layers, strict=True):
            for name in names_of_linears:
                matmul = prepare(getattr(layer, name), 1, threads, buffers)
                assert matmul is not None
                residual = arrays[adds[name]] if name in adds else None
                matmul.connect(arrays[reads[name]], residual, arrays[writes[name]], record[name])
                self._kept.append(matmul)
            names = _NORMS[len(layer.norms)]
            for name, gain in (*zip(names, layer.norms, strict=True), ("query_norm", layer.query_norm)):
                record[name] = address(gain)
            for name, bias in zip(names, layer.biases, strict=False):
                record[f"{name}_bias"] = address(bias)
            record["key_norm"], record["window"] = address(layer.key_norm), layer.window
            self._kept += [*layer.norms, *layer.biases, layer.query_norm, layer.key_norm]
        self._rotary = np.array([layer.rotary for layer in layers])
        self._tables: list[Any] = []
        self._params = params.DECODER_STEP.record(
            layers=address(self._layers.view(np.uint8)), num_layers=len(layers), hidden_size=hidden,
            intermediate_size=inner, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
            rotary_half=rotary_dim // 2, gated=int(gated), sandwich=int(sandwich),
            final_norm=address(final_norm[0]),
            final_norm_bias=address(final_norm[1]) if len(final_norm) > 1 else 0,
            attention=address(self._attention.view(np.uint8)), attention_kernel=HEADS(types.float32), parts=threads,
            **{name: address(a) for name, a in arrays.items()},
        )  # fmt: skip
        self._params_at = address(self._params.view(np.uint8))

    def run(self, position: int, cache: NDArray[np.float32], tables: Sequence[tuple[Any, Any]]) -> bool:
        """Run the token whose embedding is in `x`.

        Parameters
        ----------
        position : tokens of the text before it
        cache : (num_layers, 2, 1, capacity, num_kv_heads, head_dim) float32; keys and values are written to it
        tables : cosines and sines (positions, rotary_dim / 2) float32, by the number that layers have; none without
            rotations

        Returns
        -------
        Whether `x` has the result. If not, a state is not finite or too large for a transform.
        """
        if len(tables) != len(self._tables) or any(
            a is not b for a, b in zip(tables, self._tables, strict=True)
        ):
            self._tables = list(tables)
            for number, (cos, sin) in enumerate(tables):
                layers = self._rotary == number
                self._layers["cos"][layers], self._layers["sin"][layers] = address(cos), address(sin)
        record = self._params[0]
        record["position"], record["cache"] = position, address(cache)
        record["cache_layer"], record["cache_values"] = cache.strides[0] // 4, cache.strides[1] // 4
        return bool(_step(self._params_at, self._eps, self._layer_norms))

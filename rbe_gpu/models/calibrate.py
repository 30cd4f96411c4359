"""Calibrated compression of a BERT encoder, layer after layer.

The texts run through two models side by side: the dense one, and the one whose layers before are compressed
already. A weight is encoded when its turn comes, from the moments of both inputs (`rbe_gpu.calibrate`), so that
later layers make good what earlier ones lost.

Bits go where they matter. Each weight is first quantised alone and the loss of the sentence vectors (1 - cosine) is
measured; loss grows with the square of the step, so the total loss for given bytes is least when every weight's step
is one common level divided by the root of its sensitivity (a Lagrangian allocation). The level is found by bisection
on the entropy of the codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..calibrate import (
    Geometry,
    Moments,
    corrected_bias,
    encode,
    encode_table,
    entropy_bits,
    geometry,
    quantize,
    quantize_rows,
    row_coefficients,
    row_scales,
    target_coefficients,
)
from ..layers import RBEAttention, RBELinear
from ..workspace import Workspace
from .bert import BertEncoder

F32 = NDArray[np.float32]
Progress = Callable[[str, int, int], None]

WORDS = "embeddings.word_embeddings.weight"
POSITIONS = "embeddings.position_embeddings.weight"
_TOKENS = 4096  # tokens computed together
_PROBE_TEXTS = 64  # texts that sensitivities are measured on
_PLAN_TEXTS = 192  # texts whose moments the allocation is planned with; all are encoded with
_PROBE_BITS = 3.0
_MARGIN = 0.998  # of the budget is planned with: the last weight cannot make good what it takes too much
_SAMPLE_ROWS = 4096  # rows of an embedding table that its entropy is estimated on
#: A table's row takes a step proportional to its norm to this power: 0 is least squares, 1 the same relative error
#: in every row. Tokens are normalised right after the table, which asks for 1; frequent tokens have small norms.
_ROW_POWER = 0.5


@dataclass
class _Batch:
    """Packed hidden states of some texts: in the dense model, and behind the layers compressed so far."""

    ids: NDArray[np.int64]
    lengths: NDArray[np.int64]
    dense: F32 = field(default_factory=lambda: np.empty((0, 0), np.float32))
    compressed: F32 = field(default_factory=lambda: np.empty((0, 0), np.float32))


@dataclass(frozen=True)
class Calibrated:
    """What calibration made of a model.

    Attributes
    ----------
    tensors : name -> RBEMatrix or RBEVectors for weights, float32 for the corrected biases
    bits : name -> bits per weight, all stored bytes counted
    sensitivity : name -> loss of the sentence vectors per squared step, as measured
    """

    tensors: dict[str, Any]
    bits: dict[str, float]
    sensitivity: dict[str, float]


def batches(model: BertEncoder, texts: Sequence[str]) -> list[_Batch]:
    """Texts as packed ids, like lengths together."""
    sequences = sorted(model.token_ids(texts), key=len)
    found: list[_Batch] = []
    start = 0
    while start < len(sequences):
        stop, tokens = start, 0
        while stop < len(sequences) and (stop == start or tokens + len(sequences[stop]) <= _TOKENS):
            tokens += len(sequences[stop])
            stop += 1
        part = sequences[start:stop]
        found.append(
            _Batch(np.concatenate(part).astype(np.int64), np.array([len(s) for s in part], np.int64))
        )
        start = stop
    return found


class _Layer:
    """One encoder layer in stages, each ending where the next weight reads its input."""

    def __init__(self, model: BertEncoder, index: int, ws: Workspace) -> None:
        attention, self._attention_norm, ffn, self._ffn_norm = model.layers[index]
        self._heads = attention.num_heads
        self._ws = ws
        at = f"encoder.layer.{index}."
        self.names = {
            "qkv": [f"{at}attention.self.{n}" for n in ("query", "key", "value")],
            "output": [f"{at}attention.output.dense"],
            "up": [f"{at}intermediate.dense"],
            "down": [f"{at}output.dense"],
        }
        linears = (attention.query, attention.key, attention.value, attention.output, ffn.up, ffn.down)
        names = [n for stage in self.names.values() for n in stage]
        self.linears: dict[str, RBELinear] = dict(zip(names, linears, strict=True))

    def with_linears(self, other: Mapping[str, RBELinear]) -> _Layer:
        """The same layer, with the linears that `other` has in place of its own."""
        layer = copy(self)
        layer.linears = {name: other.get(name, linear) for name, linear in self.linears.items()}
        return layer

    def _linear(self, stage: str) -> RBELinear:
        return self.linears[self.names[stage][0]]

    def heads(self, x: F32, lengths: NDArray[np.int64]) -> F32:
        """What the output projection reads."""
        q, k, v = (self.linears[name] for name in self.names["qkv"])
        attention = RBEAttention(q, k, v, self._linear("output"), self._heads)
        return np.array(attention.mix(x, lengths, workspace=self._ws))

    def attended(self, heads: F32, x: F32) -> F32:
        y = self._linear("output")(heads, residual=x, workspace=self._ws)
        return np.asarray(self._attention_norm(y, workspace=self._ws))

    def inner(self, x: F32) -> F32:
        """What the down projection reads."""
        return np.asarray(self._linear("up")(x, workspace=self._ws))

    def finished(self, inner: F32, x: F32) -> F32:
        y = self._linear("down")(inner, residual=x, workspace=self._ws)
        return np.asarray(self._ffn_norm(y, workspace=self._ws))

    def run(self, x: F32, lengths: NDArray[np.int64]) -> F32:
        y = self.attended(self.heads(x, lengths), x)
        return self.finished(self.inner(y), y)


def _linear_weight(linear: RBELinear) -> F32:
    return np.asarray(linear.weight, np.float32)


def _loss(model: BertEncoder, states: Sequence[F32], parts: Sequence[_Batch], dense: F32) -> float:
    """Mean of 1 - cosine between the pooled states and the dense model's."""
    v = np.concatenate([model.pool(x, b.lengths) for x, b in zip(states, parts, strict=True)])
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    return float(1.0 - (v * dense).sum(axis=1).mean())


# --- how sensitive the vectors are --------------------------------------------------------------------


@dataclass
class _Weight:
    """A weight, what it costs at a step, and what a step does to the vectors."""

    name: str
    values: F32
    coefficients: F32
    geometry: Geometry | None  # None: an embedding table
    scales: F32 | None = None
    sensitivity: float = 1.0

    @property
    def overhead(self) -> float:
        """Bytes of the scales."""
        rows, cols = (int(n) for n in self.coefficients.shape)
        return 2.0 * (rows if self.geometry is None else rows + cols)

    def codes(self, step: float) -> NDArray[np.int8]:
        if self.geometry is not None:
            return quantize(self.coefficients, self.geometry, step)[0]
        assert self.scales is not None
        every = max(1, len(self.coefficients) // _SAMPLE_ROWS)
        return quantize_rows(self.coefficients[::every], self.scales[::every], step)

    def nbytes(self, step: float) -> float:
        """Estimated bytes at a step."""
        bits: float = entropy_bits(self.codes(step)) * self.coefficients.size
        return bits / 8 + self.overhead

    def step_for(self, bits: float) -> float:
        """The step at which codes take `bits` bits on average."""
        step: float = float(self.coefficients.std()) * 2.0 ** (2.05 - bits)
        for _ in range(8):
            found = entropy_bits(self.codes(step))
            if abs(found - bits) < 5e-3:
                break
            step *= 2.0 ** float(found - bits)
        return step


def _tables(model: BertEncoder) -> dict[str, F32]:
    return {
        WORDS: np.asarray(model.word_embeddings.weight, np.float32),
        POSITIONS: np.asarray(model.position_embeddings.weight, np.float32),
    }


def _embed(model: BertEncoder, tables: dict[str, F32], ids: NDArray[np.int64], lengths: Any) -> F32:
    """Hidden states before the first layer, with the given tables."""
    positions = np.concatenate([np.arange(n) for n in lengths.tolist()])
    first_type = np.asarray(model.token_type_embeddings.weight)[0]
    x = tables[WORDS][ids] + tables[POSITIONS][positions] + first_type
    return np.asarray(model.embedding_norm(np.ascontiguousarray(x, np.float32)))


def _dense_pass(model: BertEncoder, parts: list[_Batch], layers: list[_Layer]) -> dict[str, Moments]:
    """Moments of every linear layer's input in the dense model."""
    found: dict[str, Moments] = {}
    tables = _tables(model)
    for part in parts:
        part.dense = _embed(model, tables, part.ids, part.lengths)
    for layer in layers:
        moments = {
            stage: Moments(layer.linears[names[0]].in_features) for stage, names in layer.names.items()
        }
        for part in parts:
            x = part.dense
            moments["qkv"].add(x, x)
            heads = layer.heads(x, part.lengths)
            moments["output"].add(heads, heads)
            y = layer.attended(heads, x)
            moments["up"].add(y, y)
            inner = layer.inner(y)
            moments["down"].add(inner, inner)
            part.dense = layer.finished(inner, y)
        for stage, names in layer.names.items():
            for name in names:
                found[name] = moments[stage]
    return found


def _measure(model: BertEncoder, weights: dict[str, _Weight], parts: list[_Batch], report: Progress) -> None:
    """Set each weight's sensitivity: quantise it alone, run the rest of the model, divide by the squared step.

    The step of a linear weight counts in output error (its geometry's level), so that weights compare.
    """
    tables = _tables(model)
    states = [[_embed(model, tables, p.ids, p.lengths) for p in parts]]
    ws = Workspace()
    layers = [_Layer(model, i, ws) for i in range(len(model.layers))]
    for layer in layers:
        states.append([layer.run(x, p.lengths) for x, p in zip(states[-1], parts, strict=True)])
    dense = np.concatenate([model.pool(x, p.lengths) for x, p in zip(states[-1], parts, strict=True)])
    dense /= np.linalg.norm(dense, axis=1, keepdims=True)

    def finish(x: list[F32], first: int) -> float:
        for layer in layers[first:]:
            x = [layer.run(a, p.lengths) for a, p in zip(x, parts, strict=True)]
        return max(_loss(model, x, parts, dense), 1e-9)

    done = 0
    for name, values in tables.items():
        if name not in weights:
            continue
        weight = weights[name]
        step = weight.step_for(_PROBE_BITS)
        assert weight.scales is not None
        probe = encode_table(values, step, weight.scales).decode()
        x = [_embed(model, {**tables, name: probe}, p.ids, p.lengths) for p in parts]
        weight.sensitivity = finish(x, 0) / step**2
        report("sensitivity", done := done + 1, len(weights))
    for index, layer in enumerate(layers):
        for name, linear in layer.linears.items():
            weight = weights[name]
            assert weight.geometry is not None
            step = weight.step_for(_PROBE_BITS)
            decoded = encode(weight.values, weight.geometry, step).decode()
            probed = layer.with_linears({name: RBELinear(decoded, linear.bias, linear.activation)})
            x = [probed.run(a, p.lengths) for a, p in zip(states[index], parts, strict=True)]
            weight.sensitivity = finish(x, index + 1) / step**2
            report("sensitivity", done := done + 1, len(weights))


def _steps_for(weights: list[_Weight], budget: float) -> dict[str, float]:
    """Steps of least total loss whose estimated bytes fit: step_m = level * sqrt(size_m / sensitivity_m).

    The loss is sum_m sensitivity_m step_m^2, and a step twice as large saves size_m bits. The level moves by secants
    of that rule, which is exact where codes are wide.
    """
    relative = {w.name: (w.coefficients.size / w.sensitivity) ** 0.5 for w in weights}
    size = sum(w.coefficients.size for w in weights)
    bits = 8 * (budget - sum(w.overhead for w in weights)) / size
    if bits <= 0.0:
        raise ValueError(
            f"the target leaves {int(budget)} bytes for all weights: fewer than their scales take"
        )
    spread = sum(np.log2(w.coefficients.std() / relative[w.name]) * w.coefficients.size for w in weights)
    level = spread / size + 2.05 - bits
    for _ in range(10):
        steps = {name: r * 2.0**level for name, r in relative.items()}
        excess = 8 * (sum(w.nbytes(steps[w.name]) for w in weights) - budget) / size
        if abs(excess) < 2e-3:
            break
        level += excess
    return steps


# --- the pass that encodes ----------------------------------------------------------------------------


def calibrate_encoder(
    model: BertEncoder,
    texts: Sequence[str],
    budget: float,
    *,
    with_tables: bool = True,
    transform: str = "dct",
    block: int = 64,
    progress: Progress | None = None,
) -> Calibrated:
    """Encode the weights of a dense model for what real texts do with them.

    Parameters
    ----------
    model : a dense `BertEncoder` with a tokenizer; it is left as it was
    texts : what to calibrate on; some hundreds suffice
    budget : bytes for all encoded weights, everything counted
    with_tables : encode the embedding tables too, from the same budget; else they are left out
    transform, block : an orthonormal transform and its block size
    progress : called with (stage, done, total)

    Returns
    -------
    Calibrated
    """
    report: Progress = progress or (lambda stage, done, total: None)
    if not texts:
        raise ValueError("no texts to calibrate on")
    parts = batches(model, texts)
    ws = Workspace()
    layers = [_Layer(model, i, ws) for i in range(len(model.layers))]
    tables = _tables(model)
    budget *= _MARGIN
    report("moments", 0, 1)
    every = max(1, len(texts) // _PLAN_TEXTS)
    moments = _dense_pass(model, batches(model, texts[::every]), layers)
    report("moments", 1, 1)
    weights: dict[str, _Weight] = {}
    if with_tables:
        for name, values in tables.items():
            scales = row_scales(values, _ROW_POWER)
            weights[name] = _Weight(name, values, row_coefficients(values, transform, block), None, scales)
    known: dict[int, Geometry] = {}
    for layer in layers:
        for name, linear in layer.linears.items():
            geo = known.get(id(moments[name]))
            if geo is None:
                geo = known[id(moments[name])] = geometry(moments[name], transform, block)
            values = _linear_weight(linear)
            weights[name] = _Weight(name, values, target_coefficients(values, geo), geo)
    _measure(model, weights, batches(model, texts[:_PROBE_TEXTS]), report)
    steps = _steps_for(list(weights.values()), budget)
    planned = {name: w.nbytes(steps[name]) for name, w in weights.items()}
    return _encode_all(model, parts, layers, weights, steps, planned, budget, report)


def _encode_all(
    model: BertEncoder,
    parts: list[_Batch],
    layers: list[_Layer],
    weights: dict[str, _Weight],
    steps: dict[str, float],
    planned: dict[str, float],
    left: float,
    report: Progress,
) -> Calibrated:
    """Encode the tables, then layer after layer on the outputs of what is compressed already.

    planned : bytes of each weight; left : bytes for all of them
    """
    tensors: dict[str, Any] = {}
    spent: dict[str, float] = {}
    tables = _tables(model)
    lossy = dict(tables)
    done = 0
    for name in (n for n in tables if n in weights):
        weight = weights[name]
        assert weight.scales is not None
        tensors[name] = encode_table(weight.values, steps[name], weight.scales)
        lossy[name] = tensors[name].decode()
        left -= tensors[name].nbytes
        spent[name] = tensors[name].bits_per_weight
        report("encoding", done := done + 1, len(weights))
    for part in parts:
        part.dense = _embed(model, tables, part.ids, part.lengths)
        part.compressed = _embed(model, lossy, part.ids, part.lengths)

    def stage(layer: _Layer, key: str, inputs: list[tuple[F32, F32]]) -> _Layer:
        """Encode the weights that read `inputs` (dense, compressed); the layer with all that is encoded."""
        nonlocal done, left
        names = layer.names[key]
        moments = Moments(layer.linears[names[0]].in_features)
        for dense, compressed in inputs:
            moments.add(dense, compressed)
        first = weights[names[0]].geometry
        assert first is not None
        geo = geometry(moments, first.transform, first.block)
        for name in names:
            weight, linear = weights[name], layer.linears[name]
            now = _Weight(name, weight.values, target_coefficients(weight.values, geo), geo)
            # the bits are kept as planned, but for what earlier weights took too much or too little: the step
            # follows the moments that the compressed model has
            share = left / sum(planned[n] for n in planned if n not in spent)
            wanted = 8 * (planned[name] * share - now.overhead) / now.coefficients.size
            step = now.step_for(wanted)
            matrix = encode(weight.values, geo, step)
            while len(spent) + 1 == len(weights) and matrix.nbytes > left:  # nothing comes after the last one
                step *= 2.0 ** (8 * (matrix.nbytes - left) / now.coefficients.size + 2e-3)
                matrix = encode(weight.values, geo, step)
            left -= matrix.nbytes
            spent[name] = matrix.bits_per_weight
            decoded = matrix.decode()
            tensors[name + ".weight"] = matrix
            bias = np.asarray(linear.bias, np.float32)
            tensors[name + ".bias"] = corrected_bias(weight.values, decoded, bias, moments)
            lossy_linears[name] = RBELinear(decoded, tensors[name + ".bias"], linear.activation)
            report("encoding", done := done + 1, len(weights))
        return layer.with_linears(lossy_linears)

    lossy_linears: dict[str, RBELinear] = {}
    for layer in layers:
        behind = stage(layer, "qkv", [(p.dense, p.compressed) for p in parts])
        heads = [(layer.heads(p.dense, p.lengths), behind.heads(p.compressed, p.lengths)) for p in parts]
        behind = stage(layer, "output", heads)
        for p, (dense, compressed) in zip(parts, heads, strict=True):
            p.dense, p.compressed = layer.attended(dense, p.dense), behind.attended(compressed, p.compressed)
        behind = stage(layer, "up", [(p.dense, p.compressed) for p in parts])
        inner = [(layer.inner(p.dense), behind.inner(p.compressed)) for p in parts]
        behind = stage(layer, "down", inner)
        for p, (dense, compressed) in zip(parts, inner, strict=True):
            p.dense, p.compressed = layer.finished(dense, p.dense), behind.finished(compressed, p.compressed)
    return Calibrated(tensors, spent, {name: w.sensitivity for name, w in weights.items()})

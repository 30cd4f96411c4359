"""Calibrated compression of a BERT encoder, layer after layer.

The texts run through two models side by side: the dense one, and one whose earlier layers are compressed already.
Each weight is quantised with the moments of both inputs (`rbe_gpu.feedback`), so that later layers compensate for
the errors of earlier ones.

Bits are allocated by sensitivity (`allocation`): the loss of the sentence vectors (1 - cosine) when a weight alone is
quantised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from ..blocks import RBEBlocks
from ..feedback import (
    Geometry,
    Moments,
    affine_fit,
    corrected_bias,
    geometry,
    quantize_matrix,
    quantize_table,
    row_scales,
)
from ..layers import RBEAttention, RBELayerNorm, RBELinear
from ..threads import blas
from ..transforms import DEFAULT_BLOCK
from ..workspace import Workspace
from .allocation import (
    EMPTY_STREAM,
    MARGIN,
    PROBE_BITS,
    ROW_POWER,
    TOLERANCE,
    CalibrationResult,
    Weight,
    are_few,
    silent,
    steps_for,
    warn_of_few,
)
from .bert import BertEncoder
from .bert_tensors import block_of
from .calibrate_decoder import DecoderCalibration, calibrate_decoder
from .decoder import Decoder
from .encoders import token_positions
from .int8_choice import int8_weights
from .journal import NoJournal
from .pooling import cu_seqlens_of

F32 = NDArray[np.float32]
Progress = Callable[[str, int, int], None]

WORDS = "embeddings.word_embeddings.weight"
POSITIONS = "embeddings.position_embeddings.weight"
#: With calibration and entropy coding a transform gains less than it costs to make heavy-tailed weights Gaussian
#: (MiniLM, 2.2 bits: cosine 0.957 without, 0.954 with).
TRANSFORM = "none"
#: Of more texts than this, evenly spaced ones run through a model of the hidden size _HIDDEN (1,000 take a minute or
#: two, and 70 MB); how often a row of the tables is read is counted in all of them.
MOST_TEXTS, _HIDDEN = 2048, 384
_TOKENS = 4096  # tokens computed together
_PROBE_TEXTS = 64  # texts that sensitivities are measured on
_PLAN_TEXTS = 192  # texts for the moments of the allocation; quantisation uses all
_FEW_BITS = 0.75  # below this many bits per weight, row scales of tables cost more than they gain


@dataclass
class _Batch:
    """Packed hidden states of some texts: in the dense model, and after the layers compressed so far."""

    ids: NDArray[np.int64]
    lengths: NDArray[np.int64]
    dense: F32 = field(default_factory=lambda: np.empty((0, 0), np.float32))
    compressed: F32 = field(default_factory=lambda: np.empty((0, 0), np.float32))


def batches(model: BertEncoder, texts: Sequence[str]) -> list[_Batch]:
    """Texts with the default prompt as packed ids, sorted by length."""
    sequences = sorted(model.token_ids(texts, model.resolve_prompt()), key=len)
    parts: list[_Batch] = []
    start = 0
    while start < len(sequences):
        stop, tokens = start, 0
        while stop < len(sequences) and (stop == start or tokens + len(sequences[stop]) <= _TOKENS):
            tokens += len(sequences[stop])
            stop += 1
        batch = sequences[start:stop]
        parts.append(
            _Batch(np.concatenate(batch).astype(np.int64), np.array([len(s) for s in batch], np.int64))
        )
        start = stop
    return parts


class _Layer:
    """One encoder layer in stages: each ends at the input of the next weight."""

    def __init__(self, model: BertEncoder, index: int, ws: Workspace) -> None:
        attention, attention_norm, ffn, ffn_norm = model.layers[index]
        self.norms = {"attention": attention_norm, "ffn": ffn_norm}
        self._heads, self._mask = attention.num_heads, model.attention_mask()
        self._ws = ws
        at = f"encoder.layer.{index}."
        self.norm_names = {"attention": f"{at}attention.output.LayerNorm", "ffn": f"{at}output.LayerNorm"}
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
        """The same layer with some of its linears replaced by those of `other`."""
        layer = copy(self)
        layer.linears = {name: other.get(name, linear) for name, linear in self.linears.items()}
        return layer

    def _linear(self, stage: str) -> RBELinear:
        return self.linears[self.names[stage][0]]

    def heads(self, x: F32, lengths: NDArray[np.int64]) -> F32:
        """The input of the output projection."""
        q, k, v = (self.linears[name] for name in self.names["qkv"])
        attention = RBEAttention(q, k, v, self._linear("output"), self._heads)
        return np.array(attention.mix(x, lengths, self._mask, workspace=self._ws))

    def attended(self, heads: F32, x: F32) -> F32:
        y = self._linear("output")(heads, residual=x, workspace=self._ws)
        return np.asarray(self.norms["attention"](y, workspace=self._ws))

    def inner(self, x: F32) -> F32:
        """The input of the down projection."""
        return np.asarray(self._linear("up")(x, workspace=self._ws))

    def finished(self, inner: F32, x: F32) -> F32:
        y = self._linear("down")(inner, residual=x, workspace=self._ws)
        return np.asarray(self.norms["ffn"](y, workspace=self._ws))

    def run(self, x: F32, lengths: NDArray[np.int64]) -> F32:
        y = self.attended(self.heads(x, lengths), x)
        return self.finished(self.inner(y), y)


def _refitted(norm: RBELayerNorm, parts: list[_Batch]) -> tuple[F32, F32]:
    """The gain and bias of a norm that fit its outputs to those of the dense model best (least squares).

    `parts` holds the outputs of both models; those of the compressed model are updated.
    """
    a, b = affine_fit([p.dense for p in parts], [p.compressed for p in parts])
    for p in parts:
        p.compressed = p.compressed * a.astype(np.float32) + b.astype(np.float32)
    weight = a * np.asarray(norm.weight, np.float64)
    bias = a * np.asarray(norm.bias, np.float64) + b
    return weight.astype(np.float32), bias.astype(np.float32)


def _linear_weight(linear: RBELinear) -> F32:
    return np.asarray(linear.weight, np.float32)


def _pooled(model: BertEncoder, states: Sequence[F32], parts: Sequence[_Batch]) -> F32:
    """The vectors of all texts, not normalized."""
    pooled = [
        model.pool(x, cu_seqlens=cu_seqlens_of(p.lengths), normalize=False)
        for x, p in zip(states, parts, strict=True)
    ]
    return np.concatenate(pooled)


def _loss(model: BertEncoder, states: Sequence[F32], parts: Sequence[_Batch], dense: F32) -> float:
    """Mean of 1 - cosine between the pooled states and the dense model's."""
    v = _pooled(model, states, parts)
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    return float(1.0 - (v * dense).sum(axis=1).mean())


# --- how sensitive the vectors are --------------------------------------------------------------------


def _tables(model: BertEncoder) -> dict[str, F32]:
    return {
        WORDS: np.asarray(model.word_embeddings.weight, np.float32),
        POSITIONS: np.asarray(model.position_embeddings.weight, np.float32),
    }


def _embed(model: BertEncoder, tables: dict[str, F32], ids: NDArray[np.int64], lengths: Any) -> F32:
    """Hidden states before the first layer, with these embedding tables."""
    x = tables[WORDS][ids] + tables[POSITIONS][token_positions(ids, cu_seqlens_of(lengths), model.config)]
    if model.token_type_embeddings is not None:
        x += np.asarray(model.token_type_embeddings.weight)[0]
    return np.asarray(model.embedding_norm(np.ascontiguousarray(x, np.float32)))


def _dense_pass(
    model: BertEncoder, parts: list[_Batch], layers: list[_Layer], transform: str, block: int | None
) -> dict[str, Geometry]:
    """The geometry of every linear layer's input in the dense model. One layer's moments are in memory at a time."""
    geometries: dict[str, Geometry] = {}
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
            geo = geometry(moments.pop(stage), transform, block_of(names[0], model.config, transform, block))
            geometries |= dict.fromkeys(names, geo)
    return geometries


def _measure(
    model: BertEncoder,
    weights: dict[str, Weight],
    parts: list[_Batch],
    report: Progress,
    journal: NoJournal,
) -> None:
    """Set each weight's sensitivity: quantise it alone, run the remaining model, divide by the squared step.

    The step of a linear weight counts in output error (its geometry's level), so that weights compare.
    """
    tables = _tables(model)
    states = [[_embed(model, tables, p.ids, p.lengths) for p in parts]]
    ws = Workspace()
    layers = [_Layer(model, i, ws) for i in range(len(model.layers))]
    for layer in layers:
        states.append([layer.run(x, p.lengths) for x, p in zip(states[-1], parts, strict=True)])
    dense = _pooled(model, states[-1], parts)
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

        def table(name: str = name, values: F32 = values, weight: Weight = weight) -> float:
            step = weight.step_for(PROBE_BITS)
            assert weight.scales is not None
            probe = quantize_table(values, step, weight.scales).decode()
            x = [_embed(model, {**tables, name: probe}, p.ids, p.lengths) for p in parts]
            return finish(x, 0) / step**2

        weight.sensitivity = journal.value(f"sensitivity of {name}", table)
        report("sensitivity", done := done + 1, len(weights))
    for index, layer in enumerate(layers):
        for name, linear in layer.linears.items():
            weight = weights[name]

            def matrix(
                name: str = name,
                linear: RBELinear = linear,
                weight: Weight = weight,
                layer: _Layer = layer,
                index: int = index,
            ) -> float:
                assert weight.geometry is not None
                step = weight.step_for(PROBE_BITS)
                decoded = quantize_matrix(weight.values, weight.geometry, step).decode()
                probed = layer.with_linears({name: RBELinear(decoded, linear.bias, linear.activation)})
                x = [probed.run(a, p.lengths) for a, p in zip(states[index], parts, strict=True)]
                return finish(x, index + 1) / step**2

            weight.sensitivity = journal.value(f"sensitivity of {name}", matrix)
            report("sensitivity", done := done + 1, len(weights))


# --- the pass that encodes ----------------------------------------------------------------------------


class Calibration:
    """Statistics and sensitivities of a model on texts, measured once, for any budget. Made by `calibrate`.

    Attributes
    ----------
    model : the dense model; unchanged
    texts : how many different ones were used
    few : whether they have fewer than FEW_TOKENS tokens, or than FEW_TOKENS / 8 different ones
    sensitivity : name -> loss of the sentence vectors (1 - cosine) per squared step, as measured
    """

    def __init__(
        self, model: BertEncoder, texts: Sequence[str], weights: dict[str, Weight], layers: list[_Layer]
    ) -> None:
        self.model = model
        self.texts = len(texts)
        self._probe = list(texts[:_PROBE_TEXTS])
        self._parts = batches(model, texts)
        self.few = are_few(np.concatenate([part.ids for part in self._parts]))
        self._weights = weights
        self._layers = layers

    @property
    def sensitivity(self) -> dict[str, float]:
        return {name: w.sensitivity for name, w in self._weights.items()}

    def values(self, name: str) -> F32 | None:
        """The dense weight of that name in a checkpoint; None where it is not one that is compressed."""
        weight = self._weights.get(name) or self._weights.get(name.removesuffix(".weight"))
        return None if weight is None else weight.values

    def loss(self, tensors: Mapping[str, Any], texts: Sequence[str]) -> float:
        """Mean of 1 - cosine between the vectors of the dense model and of the one with these tensors."""
        dense = self.model.embed(texts, normalize=True)
        vectors = self.model.with_tensors(tensors).embed(texts, normalize=True)
        return float(1.0 - (vectors * dense).sum(axis=1).mean())

    def int8_activations(self, tensors: Mapping[str, Any]) -> list[str]:
        """The linear weights whose inputs may be rounded to int8 (`int8_choice`), of the model with these tensors."""
        return int8_weights(self.model.with_tensors(tensors), self._probe)

    def compress(
        self, budget: float, *, progress: Progress | None = None, journal: NoJournal | None = None
    ) -> CalibrationResult:
        """Compress the weights into `budget` bytes, everything counted, layer after layer.

        progress : called with (stage, done, total)
        journal : keeps what is finished; see `rbe_gpu.models.journal`

        Raises
        ------
        ValueError
            The budget is smaller than the scales of the weights.
        """
        report: Progress = progress or silent
        budget *= MARGIN
        weights = self._weights
        if 8 * budget / sum(w.size for w in weights.values()) < _FEW_BITS:
            weights = {
                name: w if w.scales is None else replace(w, scales=np.ones_like(w.scales))
                for name, w in weights.items()
            }
        journal = journal or NoJournal()

        def plan() -> list[dict[str, float]]:
            steps = steps_for(list(weights.values()), budget)
            return [steps, {name: w.nbytes(steps[name]) for name, w in weights.items()}]

        steps, planned = journal.value("steps and bytes", plan)
        return _compress_all(
            self.model, self._parts, self._layers, weights, steps, planned, budget, report, journal
        )


#: what `calibrate` returns
AnyCalibration = Calibration | DecoderCalibration


def most_texts(model: BertEncoder) -> int:
    """Of more texts than this, evenly spaced ones run through the model: fewer where its states are wide, which are
    in memory twice. 1,024 for a hidden size of 768.
    """
    return max(1, MOST_TEXTS * _HIDDEN // max(_HIDDEN, model.hidden_size))


@overload
def calibrate(
    model: BertEncoder,
    texts: Sequence[str],
    *,
    tables: bool = ...,
    transform: str = ...,
    block: int | None = ...,
    progress: Progress | None = ...,
    journal: NoJournal | None = ...,
) -> Calibration: ...


@overload
def calibrate(
    model: Decoder,
    texts: Sequence[str],
    *,
    tables: bool = ...,
    transform: str = ...,
    block: int | None = ...,
    progress: Progress | None = ...,
    journal: NoJournal | None = ...,
) -> DecoderCalibration: ...


@blas
def calibrate(
    model: BertEncoder | Decoder,
    texts: Sequence[str],
    *,
    tables: bool = True,
    transform: str = TRANSFORM,
    block: int | None = None,
    progress: Progress | None = None,
    journal: NoJournal | None = None,
) -> AnyCalibration:
    """Run text through a dense model, and measure the sensitivity of its results to each weight: of an encoder's
    vectors, by their cosine, or of a decoder's predictions, by their divergence (`calibrate_decoder`).

    Parameters
    ----------
    model : a dense model with a tokenizer (`rbe_gpu.load(folder)`)
    texts : what to calibrate on; some hundreds suffice, a repeated one counts once. At most `most_texts` of them,
        evenly spaced, run through the model; tokens are counted in all. Leave out the texts that quality is
        evaluated on. Fewer than FEW_TOKENS tokens: there is a warning, and what they cannot tell is left as it is
        without calibration (`rbe_gpu.feedback`).
    tables : compress the embedding tables too, in the same budget
    transform : an orthonormal transform
    block : its block size; None as in `rbe_gpu.compress_model`
    progress : called with (stage, done, total)
    journal : keeps what is finished; see `rbe_gpu.models.journal`

    Returns
    -------
    Calibration or DecoderCalibration
        for `compress_model(..., calibrate=...)`, or its own `compress`

    Raises
    ------
    TypeError
        The model is none of `rbe_gpu.load`, or texts is one string.
    ValueError
        No texts, a model without a tokenizer, or one whose weights are compressed already.
    """
    if not isinstance(model, BertEncoder | Decoder):
        raise TypeError(f"model is a {type(model).__name__}; pass the model of rbe_gpu.load(folder)")
    if isinstance(texts, str):
        raise TypeError("texts is one string; pass a list of texts")
    if not texts:
        raise ValueError("no texts to calibrate on")
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer, so no text can run through it")
    texts = list(dict.fromkeys(texts))
    if isinstance(model, Decoder):
        return calibrate_decoder(model, texts, tables, transform, block, progress, journal)
    sequences = model.token_ids(texts, model.resolve_prompt())
    ids = np.concatenate(sequences)
    ends = cu_seqlens_of(np.array([len(s) for s in sequences]))
    positions = token_positions(ids.astype(np.int64), ends, model.config)
    read: dict[str, NDArray[Any]] = {WORDS: ids, POSITIONS: positions}
    warn_of_few(len(texts), ids)
    texts = texts[:: -(-len(texts) // most_texts(model))]
    report: Progress = progress or silent
    ws = Workspace()  # of all layers: those of all-mpnet-base-v2 with one each took 100 MB a layer
    layers = [_Layer(model, i, ws) for i in range(len(model.layers))]
    for layer in layers:
        for name, linear in layer.linears.items():
            if isinstance(linear.weight, RBEBlocks):
                raise ValueError(f"{name} is compressed already; calibrate the dense model it was made from")
    report("moments", 0, 1)
    every = max(1, len(texts) // _PLAN_TEXTS)
    geometries = _dense_pass(model, batches(model, texts[::every]), layers, transform, block)
    report("moments", 1, 1)
    weights: dict[str, Weight] = {}
    if tables:
        for name, values in _tables(model).items():
            counts = np.bincount(read[name], minlength=len(values))
            scales = row_scales(values, ROW_POWER, counts)
            weights[name] = Weight.of_table(name, values, transform, block or DEFAULT_BLOCK, scales)
    for layer in layers:
        for name, linear in layer.linears.items():
            values, geo = _linear_weight(linear), geometries[name]
            weights[name] = Weight.of_matrix(name, values, geo)
    _measure(model, weights, batches(model, texts[:_PROBE_TEXTS]), report, journal or NoJournal())
    return Calibration(model, texts, weights, layers)


def _compress_all(
    model: BertEncoder,
    parts: list[_Batch],
    layers: list[_Layer],
    weights: dict[str, Weight],
    steps: dict[str, float],
    planned: dict[str, float],
    left: float,
    report: Progress,
    journal: NoJournal,
) -> CalibrationResult:
    """Compress the tables, then layer after layer on the outputs of the layers compressed already.

    planned : bytes of each weight; left : bytes for all of them
    """
    tensors: dict[str, Any] = {}
    spent: dict[str, float] = {}
    tables = _tables(model)
    lossy = dict(tables)

    def least_of_others(name: str) -> float:
        """A lower bound of the bytes of the weights after this one."""
        return sum(w.overhead + EMPTY_STREAM for n, w in weights.items() if n not in spent and n != name)

    done = 0
    for name in (n for n in tables if n in weights):
        weight = weights[name]
        assert weight.scales is not None
        scales = weight.scales
        limit = min(TOLERANCE * planned[name], left - least_of_others(name))

        def table(weight: Weight = weight, scales: F32 = scales, limit: float = limit) -> dict[str, Any]:
            def quantized(step: float) -> Any:
                return quantize_table(weight.values, step, scales)

            return {weight.name: weight.fitted(quantized, steps[weight.name], limit)}

        tensors.update(journal.tensors(name, table))
        lossy[name] = tensors[name].decode()
        left -= tensors[name].nbytes
        spent[name] = tensors[name].bits_per_weight
        report("encoding", done := done + 1, len(weights))
    for part in parts:
        part.dense = _embed(model, tables, part.ids, part.lengths)
        part.compressed = _embed(model, lossy, part.ids, part.lengths)

    def stage(layer: _Layer, key: str, inputs: Iterable[tuple[F32, F32]]) -> _Layer:
        """Compress the weights that read `inputs` (dense, compressed). Returns the layer with compressed weights."""
        nonlocal done, left
        names = layer.names[key]
        moments = Moments(layer.linears[names[0]].in_features)
        finished = all(journal.has(name) for name in names)
        for dense, compressed in inputs:  # a generator, which computes the layer's outputs too
            if not finished:
                moments.add(dense, compressed)
        first = weights[names[0]].geometry
        assert first is not None
        geo = first if finished else geometry(moments, first.transform, first.block)

        def encoded(name: str, share: float, limit: float, last: bool) -> dict[str, Any]:
            weight, linear = weights[name], layer.linears[name]
            now = Weight.of_matrix(name, weight.values, geo)
            # the planned bits, corrected for the excess or saving of earlier weights; the step is chosen anew, from
            # the moments of the compressed model
            bits = 8 * (planned[name] * share - now.overhead) / now.size
            step = now.step_for(bits)
            matrix = now.fitted(lambda step: quantize_matrix(weight.values, geo, step), step, limit)
            if last and matrix.nbytes > limit:
                raise ValueError(
                    f"the weights take {matrix.nbytes - limit:.0f} bytes more than the target leaves, however few "
                    "bits they get; use a lower ratio"
                )
            bias = corrected_bias(
                weight.values, matrix.decode(), np.asarray(linear.bias, np.float32), moments
            )
            return {name + ".weight": matrix, name + ".bias": bias}

        for name in names:
            share = left / sum(planned[n] for n in planned if n not in spent)
            # an excess of the last weight cannot be compensated
            last = len(spent) + 1 == len(weights)
            limit = left if last else min(TOLERANCE * planned[name] * share, left - least_of_others(name))
            tensors.update(journal.tensors(name, partial(encoded, name, share, limit, last)))
            matrix = tensors[name + ".weight"]
            left -= matrix.nbytes
            spent[name] = matrix.bits_per_weight
            lossy_linears[name] = RBELinear(
                matrix.decode(), tensors[name + ".bias"], layer.linears[name].activation
            )
            report("encoding", done := done + 1, len(weights))
        return layer.with_linears(lossy_linears)

    def refit(norm: RBELayerNorm, name: str) -> None:
        tensors[name + ".weight"], tensors[name + ".bias"] = _refitted(norm, parts)

    if tensors:  # the tables
        refit(model.embedding_norm, "embeddings.LayerNorm")
    lossy_linears: dict[str, RBELinear] = {}
    for layer in layers:
        lossy_linears.clear()  # decoded weights of one layer at a time
        compressed_layer = stage(layer, "qkv", [(p.dense, p.compressed) for p in parts])

        # inputs of stages a batch at a time: all of them would take as much memory as the states, or several times it
        def heads(
            layer: _Layer = layer, compressed_layer: _Layer = compressed_layer
        ) -> Iterator[tuple[F32, F32]]:
            """The inputs of the output projection."""
            for p in parts:
                dense = layer.heads(p.dense, p.lengths)
                yield dense, compressed_layer.heads(p.compressed, p.lengths)
                p.dense = layer.attended(dense, p.dense)

        compressed_layer = stage(layer, "output", heads())
        for p in parts:
            mixed = compressed_layer.heads(p.compressed, p.lengths)
            p.compressed = compressed_layer.attended(mixed, p.compressed)
        refit(layer.norms["attention"], layer.norm_names["attention"])
        compressed_layer = stage(layer, "up", [(p.dense, p.compressed) for p in parts])

        def inner(
            layer: _Layer = layer, compressed_layer: _Layer = compressed_layer
        ) -> Iterator[tuple[F32, F32]]:
            """The inputs of the down projection."""
            for p in parts:
                dense = layer.inner(p.dense)
                yield dense, compressed_layer.inner(p.compressed)
                p.dense = layer.finished(dense, p.dense)

        compressed_layer = stage(layer, "down", inner())
        for p in parts:
            p.compressed = compressed_layer.finished(compressed_layer.inner(p.compressed), p.compressed)
        refit(layer.norms["ffn"], layer.norm_names["ffn"])
    return CalibrationResult(tensors, spent)

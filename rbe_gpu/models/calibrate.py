"""Calibrated compression of a BERT encoder, layer after layer.

The texts run through two models side by side: the dense one, and one whose earlier layers are compressed already.
Each weight is quantised with the moments of both inputs (`rbe_gpu.feedback`), so that later layers compensate for
the errors of earlier ones.

Bits are allocated by sensitivity (`allocation`): the loss of the sentence vectors (1 - cosine) when a weight alone is
quantised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
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
from ..layers import RBELayerNorm, RBELinear
from ..threads import blas
from ..transforms import DEFAULT_BLOCK
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
from .decoder_embedder import DecoderEmbedder
from .encoder_stages import (
    POSITIONS,
    WORDS,
    Batch,
    Stages,
    batches,
    embedded,
    linear_weight,
    table_of,
    tables_of,
)
from .encoders import token_positions
from .int8_choice import int8_weights
from .journal import NoJournal
from .parts_folder import PartsFolder
from .pooling import cu_seqlens_of
from .scratch import Scratch
from .sensitivity import Measurements, MeasurementsOnWorkers, Probe, stages_of

F32 = NDArray[np.float32]
Progress = Callable[[str, int, int], None]

#: With calibration and entropy coding a transform gains less than it costs to make heavy-tailed weights Gaussian
#: (MiniLM, 2.2 bits: cosine 0.957 without, 0.954 with).
TRANSFORM = "none"
#: Of more texts than this, evenly spaced ones run through a model of the hidden size _HIDDEN (1,000 take a minute or
#: two, and 70 MB); how often a row of the tables is read is counted in all of them.
MOST_TEXTS, _HIDDEN = 2048, 384
_PROBE_TEXTS = 64  # texts that sensitivities are measured on
_PLAN_TEXTS = 192  # texts for the moments of the allocation; quantisation uses all
_FEW_BITS = 0.75  # below this many bits per weight, row scales of tables cost more than they gain


def _refitted(norm: RBELayerNorm, parts: list[Batch]) -> tuple[F32, F32]:
    """The gain and bias of a norm that fit its outputs to those of the dense model best (least squares).

    `parts` holds the outputs of both models; those of the compressed model are updated.
    """
    a, b = affine_fit([p.dense for p in parts], [p.compressed for p in parts])
    for p in parts:
        p.compressed = p.compressed * a.astype(np.float32) + b.astype(np.float32)
    weight = a * np.asarray(norm.weight, np.float64)
    bias = a * np.asarray(norm.bias, np.float64) + b
    return weight.astype(np.float32), bias.astype(np.float32)


def _geometries(
    model: BertEncoder,
    layers: list[Stages],
    moments: Iterable[dict[str, Moments]],
    transform: str,
    block: int | None,
    scratch: Scratch,
) -> dict[str, Callable[[], Geometry]]:
    """What reads the geometry of every linear layer's input in the dense model. One layer's moments are in memory at
    a time.
    """
    geometries: dict[str, Callable[[], Geometry]] = {}
    for layer, of_stage in zip(layers, moments, strict=True):
        for stage, names in layer.names.items():
            geo = geometry(of_stage.pop(stage), transform, block_of(names[0], model.config, transform, block))
            geometries |= dict.fromkeys(names, scratch.geometry(geo))
    return geometries


def _measure(
    weights: dict[str, Weight],
    texts: Sequence[str],
    measurements: Measurements,
    report: Progress,
    journal: NoJournal,
) -> None:
    """Set the sensitivity of each weight, from the journal where it is kept."""

    def probe_of(weight: Weight) -> Callable[[], Probe]:
        return lambda: Probe(weight.step_for(PROBE_BITS), weight.geometry, weight.scales)

    kept = {name for name in weights if journal.has_value(f"sensitivity of {name}")}
    probes = {name: probe_of(weight) for name, weight in weights.items() if name not in kept}
    done = 0

    def note(name: str, measure: Callable[[], float]) -> None:
        nonlocal done
        weights[name].sensitivity = journal.value(f"sensitivity of {name}", measure)
        report("sensitivity", done := done + 1, len(weights))

    for name in kept:
        note(name, lambda: 0.0)
    if probes:
        for name, measure in measurements.sensitivities(probes, texts):
            note(name, measure)


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
        self, model: BertEncoder, texts: Sequence[str], weights: dict[str, Weight], layers: list[Stages]
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
    parts: PartsFolder | None = ...,
) -> Calibration: ...


@overload
def calibrate(
    model: Decoder | DecoderEmbedder,
    texts: Sequence[str],
    *,
    tables: bool = ...,
    transform: str = ...,
    block: int | None = ...,
    progress: Progress | None = ...,
    journal: NoJournal | None = ...,
    parts: PartsFolder | None = ...,
) -> DecoderCalibration: ...


@blas
def calibrate(
    model: BertEncoder | Decoder | DecoderEmbedder,
    texts: Sequence[str],
    *,
    tables: bool = True,
    transform: str = TRANSFORM,
    block: int | None = None,
    progress: Progress | None = None,
    journal: NoJournal | None = None,
    parts: PartsFolder | None = None,
) -> AnyCalibration:
    """Run text through a dense model, and measure the sensitivity of its results to each weight: of vectors, by their
    cosine, or of a decoder's predictions, by their divergence (`calibrate_decoder`).

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
    journal : keeps what is finished; see `rbe_gpu.models.journal`. The result reads files in its folder, so it is
        of no use once the journal is closed
    parts : of a BERT encoder that workers can load too: they measure (`rbe_gpu.models.sensitivity`)

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
    if not isinstance(model, BertEncoder | Decoder | DecoderEmbedder):
        raise TypeError(f"model is a {type(model).__name__}; pass the model of rbe_gpu.load(folder)")
    if isinstance(texts, str):
        raise TypeError("texts is one string; pass a list of texts")
    if not texts:
        raise ValueError("no texts to calibrate on")
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer, so no text can run through it")
    texts = list(dict.fromkeys(texts))
    if isinstance(model, Decoder | DecoderEmbedder):
        if parts is not None:
            raise ValueError("a decoder is calibrated in one process; leave client= (--scheduler) out")
        return calibrate_decoder(model, texts, tables, transform, block, progress, journal)
    sequences = model.token_ids(texts, model.resolve_prompt())
    ids = np.concatenate(sequences)
    ends = cu_seqlens_of(np.array([len(s) for s in sequences]))
    positions = token_positions(ids.astype(np.int64), ends, model.config)
    read: dict[str, NDArray[Any]] = {WORDS: ids, POSITIONS: positions}
    warn_of_few(len(texts), ids)
    texts = texts[:: -(-len(texts) // most_texts(model))]
    report: Progress = progress or silent
    layers = stages_of(model)
    for layer in layers:
        for name, linear in layer.linears.items():
            if isinstance(linear.weight, RBEBlocks):
                raise ValueError(f"{name} is compressed already; calibrate the dense model it was made from")
    report("moments", 0, 1)
    every = max(1, len(texts) // _PLAN_TEXTS)
    measurements = Measurements(model) if parts is None else MeasurementsOnWorkers(model, parts)
    scratch = Scratch((journal or NoJournal()).scratch)
    geometries = _geometries(model, layers, measurements.moments(texts[::every]), transform, block, scratch)
    report("moments", 1, 1)
    weights: dict[str, Weight] = {}
    if tables:
        for name, values in tables_of(model).items():
            counts = np.bincount(read[name], minlength=len(values))
            scales = row_scales(values, ROW_POWER, counts)
            read_table = partial(table_of, model, name)
            weights[name] = Weight.of_table(name, read_table, transform, block or DEFAULT_BLOCK, scales)
    for layer in layers:
        for name, linear in layer.linears.items():
            weights[name] = Weight.of_matrix(name, partial(linear_weight, linear), geometries[name])
    _measure(weights, texts[:_PROBE_TEXTS], measurements, report, journal or NoJournal())
    return Calibration(model, texts, weights, layers)


def _compress_all(
    model: BertEncoder,
    parts: list[Batch],
    layers: list[Stages],
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
    tables = tables_of(model)
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
        part.dense = embedded(model, tables, part.ids, part.lengths)
        part.compressed = embedded(model, lossy, part.ids, part.lengths)

    def stage(layer: Stages, key: str, inputs: Iterable[tuple[F32, F32]]) -> Stages:
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
            now = Weight.of_matrix(name, weight.read, lambda: geo)
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
            layer: Stages = layer, compressed_layer: Stages = compressed_layer
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
            layer: Stages = layer, compressed_layer: Stages = compressed_layer
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

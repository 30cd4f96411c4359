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
from ..feedback import affine_fit, row_scales
from ..layers import RBELayerNorm, RBELinear
from ..threads import blas
from ..transforms import DEFAULT_BLOCK
from .allocation import ROW_POWER, Weight, are_few, silent, warn_of_few
from .bert import BertEncoder
from .bert_tensors import block_of
from .calibrate_decoder import DecoderCalibration, calibrate_decoder
from .decoder import Decoder
from .decoder_embedder import DecoderEmbedder
from .encoder_probes import stages_of
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
from .sensitivity import Measurements, MeasurementsOnWorkers, measure
from .weight_encoding import EncodingPass, MeasuredWeights, loss_of_vectors

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


def _refitted(name: str, norm: RBELayerNorm, parts: list[Batch]) -> dict[str, F32]:
    """The weight and bias of the norm `name` that fit its outputs to those of the dense model best (least squares).

    `parts` holds the outputs of both models; those of the compressed model are updated.
    """
    a, b = affine_fit([p.dense for p in parts], [p.compressed for p in parts])
    for p in parts:
        p.compressed = p.compressed * a.astype(np.float32) + b.astype(np.float32)
    weight = a * np.asarray(norm.weight, np.float64)
    bias = a * np.asarray(norm.bias, np.float64) + b
    return {f"{name}.weight": weight.astype(np.float32), f"{name}.bias": bias.astype(np.float32)}


class Calibration(MeasuredWeights):
    """Statistics and sensitivities of a model on texts, measured once, for any budget. Made by `calibrate`.

    Attributes
    ----------
    model : the dense model; unchanged
    texts : how many different ones were used
    few : whether they have fewer than FEW_TOKENS tokens, or than FEW_TOKENS / 8 different ones
    sensitivity : name of a weight -> loss of the sentence vectors (1 - cosine) per squared step, as measured
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

    def loss(self, tensors: Mapping[str, Any], texts: Sequence[str]) -> float:
        """Mean of 1 - cosine between the vectors of the dense model and of the one with these tensors."""
        return loss_of_vectors(self.model, tensors, texts)

    def int8_activations(self, tensors: Mapping[str, Any]) -> list[str]:
        """The linear weights whose inputs may be rounded to int8 (`int8_choice`), of the model with these tensors."""
        return int8_weights(self.model.with_tensors(tensors), self._probe)

    def _weights_for(self, budget: float) -> dict[str, Weight]:
        weights = self._weights
        if 8 * budget / sum(w.size for w in weights.values()) >= _FEW_BITS:
            return weights
        return {
            name: w if w.scales is None else replace(w, scales=np.ones_like(w.scales))
            for name, w in weights.items()
        }

    def _encode(self, encoding: EncodingPass) -> None:
        """The tables, then layer after layer on the outputs of the layers compressed already."""
        tables = tables_of(self.model)
        lossy = {
            name: encoding.table(name) if name in encoding.weights else table
            for name, table in tables.items()
        }
        for part in self._parts:
            part.dense = embedded(self.model, tables, part.ids, part.lengths)
            part.compressed = embedded(self.model, lossy, part.ids, part.lengths)
        if encoding.tensors:  # the tables
            encoding.tensors |= _refitted("embeddings.LayerNorm", self.model.embedding_norm, self._parts)
        for layer in self._layers:
            _encode_layer(layer, self._parts, encoding)


def _encode_layer(layer: Stages, parts: list[Batch], encoding: EncodingPass) -> None:
    """Compress the weights of a layer, stage after stage; `parts` then holds its outputs in both models."""
    replaced: dict[str, RBELinear] = {}
    lossy = layer

    def stage(key: str, inputs: Iterable[tuple[F32, F32]]) -> None:
        nonlocal lossy
        replaced.update(encoding.matrices({name: layer.linears[name] for name in layer.names[key]}, inputs))
        lossy = layer.with_linears(replaced)

    # inputs of stages a batch at a time: all of them would take as much memory as the states, or several times it
    def heads() -> Iterator[tuple[F32, F32]]:
        """The inputs of the output projection."""
        for p in parts:
            dense = layer.heads(p.dense, p.lengths)
            yield dense, lossy.heads(p.compressed, p.lengths)
            p.dense = layer.attended(dense, p.dense)

    def inner() -> Iterator[tuple[F32, F32]]:
        """The inputs of the down projection."""
        for p in parts:
            dense = layer.inner(p.dense)
            yield dense, lossy.inner(p.compressed)
            p.dense = layer.finished(dense, p.dense)

    stage("qkv", ((p.dense, p.compressed) for p in parts))
    stage("output", heads())
    for p in parts:
        p.compressed = lossy.attended(lossy.heads(p.compressed, p.lengths), p.compressed)
    encoding.tensors |= _refitted(layer.norm_names["attention"], layer.norms["attention"], parts)
    stage("up", ((p.dense, p.compressed) for p in parts))
    stage("down", inner())
    for p in parts:
        p.compressed = lossy.finished(lossy.inner(p.compressed), p.compressed)
    encoding.tensors |= _refitted(layer.norm_names["ffn"], layer.norms["ffn"], parts)


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
    parts : of a model that workers can load too: they measure (`rbe_gpu.models.sensitivity`)

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
    measurements = Measurements(model) if parts is None else MeasurementsOnWorkers(model, parts)
    journal, report = journal or NoJournal(), progress or silent
    if isinstance(model, Decoder | DecoderEmbedder):
        return calibrate_decoder(model, texts, measurements, tables, transform, block, report, journal)
    sequences = model.token_ids(texts, model.resolve_prompt())
    ids = np.concatenate(sequences)
    ends = cu_seqlens_of(np.array([len(s) for s in sequences]))
    positions = token_positions(ids.astype(np.int64), ends, model.config)
    read: dict[str, NDArray[Any]] = {WORDS: ids, POSITIONS: positions}
    warn_of_few(len(texts), ids)
    texts = texts[:: -(-len(texts) // most_texts(model))]
    layers = stages_of(model)
    for layer in layers:
        for name, linear in layer.linears.items():
            if isinstance(linear.weight, RBEBlocks):
                raise ValueError(f"{name} is compressed already; calibrate the dense model it was made from")
    report("moments", 0, 1)
    every = max(1, len(texts) // _PLAN_TEXTS)
    block_by_name = partial(block_of, config=model.config, transform=transform, block=block)
    geometries = measurements.geometries(texts[::every], transform, block_by_name, Scratch(journal.scratch))
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
    measure(weights, texts[:_PROBE_TEXTS], measurements, report, journal)
    return Calibration(model, texts, weights, layers)

"""Calibrated compression of a decoder, and of an encoder that is built as one, layer after layer, as `calibrate`
does it for BERT.

The texts run through two models side by side: the dense one, and one whose earlier layers are compressed already.
Each weight is quantised with the moments of both inputs (`rbe_gpu.feedback`). Bits are allocated by sensitivity
(`allocation`): the divergence of the predictions from the dense model's when a weight alone is quantised, or of a
`DecoderEmbedder` the loss of the vectors (1 - cosine). A table of words that also makes the logits is one weight,
measured in both places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..blocks import RBEBlocks
from ..evaluate_decoders import evaluate_decoders, log_softmax, mean_divergence
from ..feedback import (
    Geometry,
    Moments,
    geometry,
    quantize_matrix,
    quantize_table,
    row_scales,
)
from ..layers import RBELinear
from ..transforms import DEFAULT_BLOCK
from .allocation import PROBE_BITS, ROW_POWER, Weight, are_few, silent, warn_of_few
from .decoder import Decoder
from .decoder_embedder import DecoderEmbedder
from .decoder_stages import PackedTexts, Stages, embedded, normalised, stages_of, table_of, tables_of
from .decoder_tensors import EMBEDDINGS, HEAD
from .int8_choice import int8_parts, int8_weights, int8_windows, predicted
from .journal import NoJournal
from .scratch import Scratch
from .weight_encoding import EncodingPass, MeasuredWeights, loss_of_vectors

F32 = NDArray[np.float32]
Ids = NDArray[np.int64]
Progress = Callable[[str, int, int], None]

#: tokens of a window, which are predicted from each other alone
WINDOW = 256
#: Windows of more tokens than this are left out, evenly: second moments of 1,536 inputs need no more
MOST_TOKENS = 16384
_PROBE_WINDOWS, _PROBE_TOKENS = 3, 128
_PROBE_TEXTS = 64  # of a model that makes vectors


def windows_of(ids: Sequence[int] | Ids, window: int = WINDOW, most: int = MOST_TOKENS) -> list[Ids]:
    """Tokens in windows, evenly spaced ones of more than `most` tokens."""
    flat = np.asarray(ids, np.int64)
    parts = [flat[i : i + window] for i in range(0, flat.size, window)]
    parts = [part for part in parts if part.size > 1]
    return parts[:: max(1, -(-len(parts) * window // most))]


def _window(model: Decoder) -> int:
    """Tokens of a window: no more than the model has positions with the same rotations."""
    return min(WINDOW, model.settings.first_context or WINDOW, model.settings.max_positions)


def _predictions(model: Decoder, head: Any, states: Sequence[F32]) -> list[F32]:
    """ln of the probabilities of every token, for each group of windows."""
    logs = []
    for x in states:
        logs.append(log_softmax(model.capped(normalised(model, x) @ head.T), np.float32))
    return logs


#: called with the states behind the last layer and the matrix of the logits
Loss = Callable[[list[F32], F32], float]


def _loss_of_predictions(model: Decoder, states: list[F32]) -> Loss:
    """Divergence from the predictions of these states."""
    dense = _predictions(model, np.asarray(model.head, np.float32), states)
    return lambda x, head: mean_divergence(dense, _predictions(model, head, x))


def _loss_of_vectors(model: DecoderEmbedder, texts: PackedTexts, states: list[F32]) -> Loss:
    """Mean of 1 - cosine between vectors and those of these states."""

    def vectors(states: list[F32]) -> F32:
        return np.concatenate(
            [
                model.vectors_to_compare(normalised(model.decoder, x), np.diff(ends))
                for x, ends in zip(states, texts.ends, strict=True)
            ]
        )

    dense = vectors(states)
    return lambda x, head: float(1.0 - (vectors(x) * dense).sum(axis=1).mean())


class DecoderCalibration(MeasuredWeights):
    """Statistics and sensitivities of a decoder on texts, measured once, for any budget. Made by `calibrate`.

    Attributes
    ----------
    model : the dense model; unchanged
    decoder : it, or that of a `DecoderEmbedder`
    few : whether the texts are few (`allocation.are_few`)
    sensitivity : name -> divergence of the predictions, or loss of the vectors (1 - cosine), per squared step, as
        measured
    """

    def __init__(
        self,
        model: Decoder | DecoderEmbedder,
        texts: Sequence[str],
        windows: Sequence[Ids],
        weights: dict[str, Weight],
        few: bool,
        scratch: Scratch,
    ) -> None:
        self.model = model
        self.decoder = _decoder_of(model)
        self.few = few
        self._probe = list(texts[:_PROBE_TEXTS])
        self._windows = windows
        self._weights = weights
        self._scratch = scratch
        self._predicted: list[Callable[[], F32]] | None = None

    def loss(self, tensors: Mapping[str, Any], texts: Sequence[str]) -> float:
        """Mean divergence of the predictions of the model with these tensors from the dense model's, or mean of 1 -
        cosine between the vectors of both.
        """
        if isinstance(self.model, DecoderEmbedder):
            return loss_of_vectors(self.model, tensors, texts)
        lossy = self.model.with_tensors(tensors)
        return evaluate_decoders(lossy, self.model, texts, window=_window(self.model)).compressed.kl

    def int8_activations(self, tensors: Mapping[str, Any]) -> list[str]:
        """The linear weights whose inputs may be rounded to int8, of the model with these tensors.

        Of a decoder part by part (`int8_choice.int8_parts`), of a model of vectors weight by weight.
        """
        if isinstance(self.model, DecoderEmbedder):
            return int8_weights(self.model.with_tensors(tensors), self._probe)
        lossy = self.model.with_tensors(tensors)
        windows = int8_windows(self._windows)
        # 128 tokens of a vocabulary of 262,144 are 134 MB; they are the same for every ratio
        if self._predicted is None:
            self._predicted = [self._scratch.array(logs) for logs in predicted(self.model, windows)]
        dense = self._predicted
        return int8_parts(lossy, windows, lambda: (read() for read in dense))

    def _encode(self, encoding: EncodingPass) -> None:
        """The tables, then layer after layer on the outputs of the layers compressed already, then the head."""
        model, texts = self.decoder, PackedTexts(self._windows)
        tables = tables_of(model)
        lossy = {
            name: encoding.table(name) if name in encoding.weights else table
            for name, table in tables.items()
        }
        texts.dense = embedded(model, tables, texts)
        texts.compressed = embedded(model, lossy, texts)
        for layer in stages_of(model):
            _encode_layer(layer, texts, encoding)
        if HEAD in encoding.weights:
            pairs = (
                (normalised(model, a), normalised(model, b))
                for a, b in zip(texts.dense, texts.compressed, strict=True)
            )
            encoding.matrices({HEAD: None}, pairs)


def _encode_layer(layer: Stages, texts: PackedTexts, encoding: EncodingPass) -> None:
    """Compress the weights of a layer, stage after stage; `texts` then holds its outputs in both models."""
    replaced: dict[str, RBELinear] = {}
    lossy = layer

    def stage(parts: Sequence[str], inputs: Iterable[tuple[F32, F32]]) -> None:
        nonlocal lossy
        linears = {f"{layer.names[part]}.weight": layer.linear(part) for part in parts}
        made = encoding.matrices(linears, inputs)
        replaced.update({part: made[f"{layer.names[part]}.weight"] for part in parts})
        lossy = layer.with_linears(replaced)

    both = range(len(texts.ids))
    stage(layer.stages["qkv"], (
        (layer.attention_input(texts.dense[i]), layer.attention_input(texts.compressed[i])) for i in both
    ))  # fmt: skip
    heads = [
        (
            layer.heads(layer.attention_input(texts.dense[i]), texts.ends[i]),
            lossy.heads(layer.attention_input(texts.compressed[i]), texts.ends[i]),
        )
        for i in both
    ]
    stage(layer.stages["output"], heads)
    for i, (a, b) in enumerate(heads):
        texts.dense[i] = layer.attended(a, texts.dense[i])
        texts.compressed[i] = lossy.attended(b, texts.compressed[i])
    stage(layer.stages["gate_up"], (
        (layer.ffn_input(texts.dense[i]), layer.ffn_input(texts.compressed[i])) for i in both
    ))  # fmt: skip

    def inner() -> Iterator[tuple[F32, F32]]:
        """Inputs of the down projection, a group at a time: all of them would take most of the memory."""
        for i in both:
            dense = layer.inner(layer.ffn_input(texts.dense[i]))
            yield dense, lossy.inner(layer.ffn_input(texts.compressed[i]))
            texts.dense[i] = layer.finished(dense, texts.dense[i])

    stage(layer.stages["down"], inner())
    for i in both:
        x = texts.compressed[i]
        texts.compressed[i] = lossy.finished(lossy.inner(layer.ffn_input(x)), x)


def _decoder_of(model: Decoder | DecoderEmbedder) -> Decoder:
    return model.decoder if isinstance(model, DecoderEmbedder) else model


def calibrate_decoder(
    whole: Decoder | DecoderEmbedder,
    texts: Sequence[str],
    tables: bool,
    transform: str,
    block: int | None,
    progress: Progress | None,
    journal: NoJournal | None,
) -> DecoderCalibration:
    """`calibrate` of a decoder, whose texts are joined by an empty line, or of a `DecoderEmbedder`."""
    model = _decoder_of(whole)
    for name, tensor in model.tensors().items():
        if isinstance(tensor, RBEBlocks):
            raise ValueError(f"{name} is compressed already; calibrate the dense model it was made from")
    report: Progress = progress or silent
    if isinstance(whole, DecoderEmbedder):
        most = model.settings.first_context  # the stages rotate all tokens alike
        windows = [ids[:most].astype(np.int64) for ids in whole.token_ids(texts, whole.resolve_prompt())]
        ids = np.concatenate(windows)
        windows = windows[:: max(1, -(-ids.size // MOST_TOKENS))]
        probe = windows[:: -(-len(windows) // _PROBE_TEXTS)]
    else:
        ids = np.asarray(model.token_ids("\n\n".join(texts)), np.int64)
        windows = windows_of(ids, _window(model))
        if not windows:
            raise ValueError("the texts have fewer than two tokens; there is nothing to predict")
        probe = [window[:_PROBE_TOKENS] for window in windows[:: -(-len(windows) // _PROBE_WINDOWS)]]
    warn_of_few(len(texts), ids)
    scratch = Scratch((journal or NoJournal()).scratch)
    layers = stages_of(model)
    size = block or DEFAULT_BLOCK
    report("moments", 0, 1)
    every = max(1, len(windows) // 16)
    if isinstance(whole, DecoderEmbedder):  # its texts are shorter than windows: as many tokens
        every = max(1, min(every, sum(map(len, windows)) // (16 * WINDOW)))
    geometries = _dense_pass(model, PackedTexts(windows[::every]), layers, transform, size, scratch)
    report("moments", 1, 1)
    weights: dict[str, Weight] = {}
    if tables:
        for name, values in tables_of(model).items():
            # of positions no row counts more: windows are shorter than texts may be
            counts = np.bincount(ids, minlength=len(values)) if name == EMBEDDINGS else None
            scales = row_scales(values, ROW_POWER, counts)
            weights[name] = Weight.of_table(name, partial(table_of, model, name), transform, size, scales)
    if not model.settings.tied:
        weights[HEAD] = Weight.of_matrix(HEAD, partial(table_of, model, HEAD), geometries[HEAD])
    for layer in layers:
        for part, name in layer.names.items():
            read = partial(layer.values, part)
            weights[f"{name}.weight"] = Weight.of_matrix(f"{name}.weight", read, geometries[name])
    _measure(whole, weights, PackedTexts(probe), layers, report, journal or NoJournal())
    return DecoderCalibration(whole, texts, windows, weights, are_few(ids), scratch)


def _dense_pass(
    model: Decoder, texts: PackedTexts, layers: list[Stages], transform: str, block: int, scratch: Scratch
) -> dict[str, Callable[[], Geometry]]:
    """What reads the geometry of every linear layer's input in the dense model, by its name without `.weight`."""
    states = embedded(model, tables_of(model), texts)
    geometries: dict[str, Callable[[], Geometry]] = {}
    for layer in layers:
        moments = {
            stage: Moments(layer.linear(parts[-1]).in_features) for stage, parts in layer.stages.items()
        }
        for i, (x, ends) in enumerate(zip(states, texts.ends, strict=True)):
            h = layer.attention_input(x)
            heads = layer.heads(h, ends)
            y = layer.attended(heads, x)
            g = layer.ffn_input(y)
            inner = layer.inner(g)
            for stage, a in (("qkv", h), ("output", heads), ("gate_up", g), ("down", inner)):
                moments[stage].add(a, a)
            states[i] = layer.finished(inner, y)
        for stage, parts in layer.stages.items():
            geo = scratch.geometry(geometry(moments.pop(stage), transform, block))
            geometries |= {layer.names[part]: geo for part in parts}
    if not model.settings.tied:
        last = Moments(model.settings.hidden_size)
        for x in states:
            h = normalised(model, x)
            last.add(h, h)
        geometries[HEAD] = scratch.geometry(geometry(last, transform, block))
    return geometries


def _measure(
    whole: Decoder | DecoderEmbedder,
    weights: dict[str, Weight],
    texts: PackedTexts,
    layers: list[Stages],
    report: Progress,
    journal: NoJournal,
) -> None:
    """Set the sensitivity of each weight, from the journal where it is kept."""
    probes = _Probes(whole, texts, layers)
    measures: dict[str, Callable[[], float]] = {
        name: partial(probes.table, weights[name]) for name in probes.tables if name in weights
    }
    if HEAD in weights:
        measures[HEAD] = partial(probes.head, weights[HEAD])
    for index, layer in enumerate(layers):
        for part, name in layer.names.items():
            name = f"{name}.weight"
            measures[name] = partial(probes.linear, weights[name], index, part)
    for done, (name, measure) in enumerate(measures.items(), 1):
        weights[name].sensitivity = journal.value(f"sensitivity of {name}", measure)
        report("sensitivity", done, len(weights))


class _Probes:
    """The model on a few texts, of which one weight at a time is quantised.

    Methods run the remaining model, and return the loss of its results per squared step.
    """

    def __init__(self, whole: Decoder | DecoderEmbedder, texts: PackedTexts, layers: list[Stages]) -> None:
        self._model = _decoder_of(whole)
        self._texts, self._layers = texts, layers
        self.tables = tables_of(self._model)
        self._head = np.asarray(self._model.head, np.float32)
        self._states = [embedded(self._model, self.tables, texts)]  # before each layer, and behind the last
        for layer in layers:
            self._states.append(self._run(layer, self._states[-1]))
        self._loss: Loss = (
            _loss_of_vectors(whole, texts, self._states[-1])
            if isinstance(whole, DecoderEmbedder)
            else _loss_of_predictions(whole, self._states[-1])
        )

    def table(self, weight: Weight) -> float:
        """Of an embedding table; a tied one makes the logits too."""
        assert weight.scales is not None
        step = weight.step_for(PROBE_BITS)
        probe = quantize_table(self.tables[weight.name], step, weight.scales).decode()
        x = embedded(self._model, {**self.tables, weight.name: probe}, self._texts)
        makes_logits = weight.name == EMBEDDINGS and self._model.settings.tied
        return self._finish(x, 0, probe if makes_logits else self._head) / step**2

    def head(self, weight: Weight) -> float:
        """Of the matrix of the logits."""
        step, probe = _quantized(weight)
        return self._finish(self._states[-1], len(self._layers), probe) / step**2

    def linear(self, weight: Weight, index: int, part: str) -> float:
        """Of a linear layer: the part of the layer `index`."""
        step, probe = _quantized(weight)
        linear = self._layers[index].linear(part)
        lossy = self._layers[index].with_linears({part: RBELinear(probe, linear.bias, linear.activation)})
        return self._finish(self._run(lossy, self._states[index]), index + 1, self._head) / step**2

    def _run(self, layer: Stages, states: list[F32]) -> list[F32]:
        return [layer.run(x, ends) for x, ends in zip(states, self._texts.ends, strict=True)]

    def _finish(self, states: list[F32], first: int, head: F32) -> float:
        """The loss, from the states before the layer `first` on."""
        for layer in self._layers[first:]:
            states = self._run(layer, states)
        return max(self._loss(states, head), 1e-9)


def _quantized(weight: Weight) -> tuple[float, F32]:
    """The step at which sensitivity is measured, and what the weight decodes to then."""
    assert weight.geometry is not None
    step = weight.step_for(PROBE_BITS)
    return step, quantize_matrix(weight.values, weight.geometry, step).decode()

"""What a calibration measures of a dense decoder, or of an encoder that is built as one: sums over the inputs of its
weights, and the loss of its predictions or vectors when one weight is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..evaluate_decoders import log_softmax, mean_divergence
from ..feedback import Sums, input_sums
from ..layers import RBELinear
from .decoder import Decoder
from .decoder_embedder import DecoderEmbedder
from .decoder_stages import (
    PackedTexts,
    Stages,
    embedded,
    embedded_group,
    normalised,
    stages_of,
    table_of,
    tables_of,
)
from .decoder_tensors import EMBEDDINGS, HEAD

F32 = NDArray[np.float32]

_LOGITS = "logits"  # the stage behind the last layer, whose input the matrix of the logits reads

#: called with the states behind the last layer and the matrix of the logits
Loss = Callable[[list[F32], F32], float]


def decoder_of(model: Decoder | DecoderEmbedder) -> Decoder:
    return model.decoder if isinstance(model, DecoderEmbedder) else model


def _packed(windows: Sequence[Sequence[int]]) -> PackedTexts:
    return PackedTexts([np.asarray(window, np.int64) for window in windows])


class DecoderSums:
    """`sensitivity.InputSums` of windows of token ids; a batch is a group of windows."""

    def __init__(self, model: Decoder, windows: Sequence[Sequence[int]]) -> None:
        self._model = model
        self._texts = _packed(windows)
        self._layers = stages_of(model)
        self.count = len(self._texts.ids)
        self.readers = [
            {
                stage: [f"{layer.names[part]}.weight" for part in parts]
                for stage, parts in layer.stages.items()
            }
            for layer in self._layers
        ]
        if not model.settings.tied:
            self.readers.append({_LOGITS: [HEAD]})

    @cached_property
    def _tables(self) -> dict[str, F32]:
        return tables_of(self._model)

    def of_batch(self, index: int) -> Iterator[dict[str, Sums]]:
        ends = self._texts.ends[index]
        states = [embedded_group(self._model, self._tables, self._texts.ids[index], ends)]
        for layer in self._layers:
            yield _layer_sums(layer, states, ends)
        if not self._model.settings.tied:
            yield {_LOGITS: input_sums(normalised(self._model, states[0]))}


def _layer_sums(layer: Stages, states: list[F32], ends: NDArray[np.int64]) -> dict[str, Sums]:
    """The sums of each stage's input for one batch. `states` holds the input of the layer, then its output."""
    [x] = states
    h = layer.attention_input(x)
    heads = layer.heads(h, ends)
    y = layer.attended(heads, x)
    g = layer.ffn_input(y)
    inner = layer.inner(g)
    states[0] = layer.finished(inner, y)
    inputs = {"qkv": h, "output": heads, "gate_up": g, "down": inner}
    return {stage: input_sums(values) for stage, values in inputs.items()}


class DecoderProbes:
    """`sensitivity.Probes` of windows of token ids: the divergence of the predictions from the dense model's, or of a
    `DecoderEmbedder` the loss of the vectors (1 - cosine).
    """

    def __init__(self, whole: Decoder | DecoderEmbedder, windows: Sequence[Sequence[int]]) -> None:
        self._model = model = decoder_of(whole)
        self._texts = _packed(windows)
        self._layers = stages_of(model)
        self._linears = {
            f"{name}.weight": (index, part)
            for index, layer in enumerate(self._layers)
            for part, name in layer.names.items()
        }
        self._tables = tables_of(model)
        self._head = np.asarray(model.head, np.float32)
        # before each layer, and behind the last
        self._states = [embedded(model, self._tables, self._texts)]
        for layer in self._layers:
            self._states.append(self._run(layer, self._states[-1]))
        self._loss: Loss = (
            _loss_of_vectors(whole, self._texts, self._states[-1])
            if isinstance(whole, DecoderEmbedder)
            else _loss_of_predictions(whole, self._states[-1])
        )

    def values(self, name: str) -> F32:
        if name in self._linears:
            index, part = self._linears[name]
            return self._layers[index].values(part)
        return self._tables[name] if name in self._tables else table_of(self._model, name)

    def loss(self, name: str, values: F32) -> float:
        """A tied table of words makes the logits too."""
        if name in self._tables:
            x = embedded(self._model, {**self._tables, name: values}, self._texts)
            makes_logits = name == EMBEDDINGS and self._model.settings.tied
            return self._finish(x, 0, values if makes_logits else self._head)
        if name == HEAD:
            return self._finish(self._states[-1], len(self._layers), values)
        index, part = self._linears[name]
        linear = self._layers[index].linear(part)
        lossy = self._layers[index].with_linears({part: RBELinear(values, linear.bias, linear.activation)})
        return self._finish(self._run(lossy, self._states[index]), index + 1, self._head)

    def _run(self, layer: Stages, states: list[F32]) -> list[F32]:
        return [layer.run(x, ends) for x, ends in zip(states, self._texts.ends, strict=True)]

    def _finish(self, states: list[F32], first: int, head: F32) -> float:
        """The loss, from the states before the layer `first` on."""
        for layer in self._layers[first:]:
            states = self._run(layer, states)
        return self._loss(states, head)


def _predictions(model: Decoder, head: F32, states: Sequence[F32]) -> list[F32]:
    """ln of the probabilities of every token, for each group of windows."""
    return [log_softmax(model.capped(normalised(model, x) @ head.T), np.float32) for x in states]


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

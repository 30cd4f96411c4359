"""What a calibration measures of a dense BERT encoder: sums over the inputs of its weights, and the loss of its
vectors when one weight is replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..feedback import Sums, input_sums
from ..layers import RBELinear
from ..workspace import Workspace
from .bert import BertEncoder
from .encoder_stages import Stages, batches, embedded, linear_weight, loss, tables_of, vectors

F32 = NDArray[np.float32]


def stages_of(model: BertEncoder) -> list[Stages]:
    ws = Workspace()  # of all layers: those of all-mpnet-base-v2 with one each took 100 MB a layer
    return [Stages(model, i, ws) for i in range(len(model.layers))]


class EncoderSums:
    """`sensitivity.InputSums` of texts."""

    def __init__(self, model: BertEncoder, texts: Sequence[str]) -> None:
        self._model = model
        self._batches = batches(model, texts)
        self._layers = stages_of(model)
        self.count = len(self._batches)
        self.readers = [layer.names for layer in self._layers]

    @cached_property
    def _tables(self) -> dict[str, F32]:
        return tables_of(self._model)

    def of_batch(self, index: int) -> Iterator[dict[str, Sums]]:
        batch = self._batches[index]
        states = [embedded(self._model, self._tables, batch.ids, batch.lengths)]
        for layer in self._layers:
            yield _layer_sums(layer, states, batch.lengths)


def _layer_sums(layer: Stages, states: list[F32], lengths: NDArray[np.int64]) -> dict[str, Sums]:
    """The sums of each stage's input for one batch. `states` holds the input of the layer, then its output."""
    [x] = states
    heads = layer.heads(x, lengths)
    y = layer.attended(heads, x)
    inner = layer.inner(y)
    states[0] = layer.finished(inner, y)
    inputs = {"qkv": x, "output": heads, "up": y, "down": inner}
    return {stage: input_sums(values) for stage, values in inputs.items()}


class EncoderProbes:
    """`sensitivity.Probes` of texts: the loss of their vectors (1 - cosine)."""

    def __init__(self, model: BertEncoder, texts: Sequence[str]) -> None:
        self._model = model
        self._parts = parts = batches(model, texts)
        self._tables = tables_of(model)
        self._layers = stages_of(model)
        states = [[embedded(model, self._tables, p.ids, p.lengths) for p in parts]]
        for layer in self._layers:
            states.append([layer.run(x, p.lengths) for x, p in zip(states[-1], parts, strict=True)])
        self._states = states
        self._dense = vectors(model, states[-1], parts)

    def values(self, name: str) -> F32:
        if name in self._tables:
            return self._tables[name]
        return linear_weight(self._layers[self._layer_of(name)].linears[name])

    def loss(self, name: str, values: F32) -> float:
        if name in self._tables:
            tables = {**self._tables, name: values}
            return self._finish([embedded(self._model, tables, p.ids, p.lengths) for p in self._parts], 0)
        index = self._layer_of(name)
        layer = self._layers[index]
        linear = layer.linears[name]
        probed = layer.with_linears({name: RBELinear(values, linear.bias, linear.activation)})
        x = [probed.run(a, p.lengths) for a, p in zip(self._states[index], self._parts, strict=True)]
        return self._finish(x, index + 1)

    def _layer_of(self, name: str) -> int:
        return next(i for i, layer in enumerate(self._layers) if name in layer.linears)

    def _finish(self, x: list[F32], first: int) -> float:
        for layer in self._layers[first:]:
            x = [layer.run(a, p.lengths) for a, p in zip(x, self._parts, strict=True)]
        return loss(self._model, x, self._parts, self._dense)

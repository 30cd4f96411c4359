"""The pass that encodes the weights of a calibrated model, one after the other, within a budget of bytes.

It is the same for every model; how states run from weight to weight is in `calibrate` and `calibrate_decoder`. Where
earlier weights take more or fewer bytes than planned, later ones get fewer or more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dispatch import module_of
from ..feedback import Moments, corrected_bias, geometry, quantize_matrix, quantize_table
from ..layers import RBELinear
from .allocation import EMPTY_STREAM, MARGIN, TOLERANCE, CalibrationResult, Weight, silent, steps_for
from .bert import BertEncoder
from .decoder_embedder import DecoderEmbedder
from .journal import NoJournal

F32 = NDArray[np.float32]
Progress = Callable[[str, int, int], None]


class MeasuredWeights(ABC):
    """The weights of a dense model and their sensitivities, measured once, for any budget.

    A subclass runs the model: `_encode` gives every weight to the pass, with its inputs.

    Attributes
    ----------
    few : whether the texts are few (`allocation.are_few`)
    sensitivity : name of a weight -> loss per squared step, as measured
    """

    few: bool
    _weights: dict[str, Weight]

    @property
    def sensitivity(self) -> dict[str, float]:
        return {name: w.sensitivity for name, w in self._weights.items()}

    def values(self, name: str) -> F32 | None:
        """The dense weight of that name; None where it is not one that is compressed."""
        weight = self._weights.get(name)
        return None if weight is None else weight.values

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
        budget *= MARGIN
        encoding = EncodingPass(self._weights_for(budget), budget, progress or silent, journal or NoJournal())
        self._encode(encoding)
        return CalibrationResult(encoding.tensors, encoding.bits)

    def _weights_for(self, budget: float) -> dict[str, Weight]:
        """The weights as they are encoded within so many bytes."""
        return self._weights

    @abstractmethod
    def _encode(self, encoding: EncodingPass) -> None:
        """Give every weight, with its inputs, to the pass."""


class EncodingPass:
    """Compresses weights within a budget, which is allocated first.

    Attributes
    ----------
    weights : all that are to be compressed
    tensors : name -> RBEMatrix or RBEVectors of the weights compressed so far, float32 of what is corrected with them
    bits : their bits per weight, by name
    """

    def __init__(
        self, weights: dict[str, Weight], budget: float, report: Progress, journal: NoJournal
    ) -> None:
        def plan() -> list[dict[str, float]]:
            steps = steps_for(list(weights.values()), budget)
            return [steps, {name: w.nbytes(steps[name]) for name, w in weights.items()}]

        self.weights = weights
        self.tensors: dict[str, Any] = {}
        self.bits: dict[str, float] = {}
        self._steps: dict[str, float]
        self._planned: dict[str, float]  # bytes
        self._steps, self._planned = journal.value("steps and bytes", plan)
        self._left = budget
        self._report = report
        self._journal = journal

    def table(self, name: str) -> F32:
        """Compress an embedding table. Returns what it decodes to."""
        weight = self.weights[name]
        limit = self._limit(name, 1.0)

        def encoded() -> dict[str, Any]:
            def quantized(step: float) -> Any:
                assert weight.scales is not None
                return quantize_table(weight.values, step, weight.scales)

            return {name: weight.fitted(quantized, self._steps[name], limit)}

        self.tensors.update(self._journal.tensors(name, encoded))
        self._spend(name)
        return np.asarray(self.tensors[name].decode())

    def matrices(
        self, linears: Mapping[str, RBELinear | None], inputs: Iterable[tuple[F32, F32]]
    ) -> dict[str, RBELinear]:
        """Compress matrices that read the same input, and correct the biases of their layers.

        Parameters
        ----------
        linears : name of a weight -> its layer in the dense model; None for a matrix without bias and activation
        inputs : batches of the input, (tokens, in_features) float32 in the dense and in the compressed model; read to
            the end in any case: a generator computes the layer's outputs too

        Returns
        -------
        name of a weight -> the layer with what it decodes to
        """
        names = list(linears)
        first = self.weights[names[0]]
        assert first.geometry is not None
        moments = Moments(first.values.shape[1])
        finished = all(self._journal.has(name) for name in names)
        for dense, compressed in inputs:
            if not finished:
                moments.add(dense, compressed)
        geo = first.geometry
        if not finished:
            geo = geometry(moments, geo.transform, geo.block)

        def encoded(name: str, linear: RBELinear | None, share: float, limit: float) -> dict[str, Any]:
            weight = self.weights[name]
            now = Weight.of_matrix(name, weight.read, lambda: geo)
            # the planned bits, corrected for the excess or saving of earlier weights; the step is chosen anew, from
            # the moments of the compressed model
            step = now.step_for(8 * (self._planned[name] * share - now.overhead) / now.size)
            matrix = now.fitted(lambda step: quantize_matrix(weight.values, geo, step), step, limit)
            if not self._others(name) and matrix.nbytes > limit:
                raise ValueError(
                    f"the weights take {matrix.nbytes - limit:.0f} bytes more than the target leaves, however few "
                    "bits they get; use a lower ratio"
                )
            made: dict[str, Any] = {name: matrix}
            if linear is not None and linear.bias is not None:
                bias = np.asarray(linear.bias, np.float32)
                made[_bias(name)] = corrected_bias(weight.values, matrix.decode(), bias, moments)
            return made

        replaced = {}
        for name, linear in linears.items():
            share = self._left / sum(nbytes for n, nbytes in self._planned.items() if n not in self.bits)
            limit = self._limit(name, share)
            self.tensors.update(self._journal.tensors(name, partial(encoded, name, linear, share, limit)))
            self._spend(name)
            matrix, bias = self.tensors[name], self.tensors.get(_bias(name))
            activation = None if linear is None else linear.activation
            replaced[name] = RBELinear(module_of(matrix).asarray(matrix.decode()), bias, activation)
        return replaced

    def _others(self, name: str) -> list[Weight]:
        """The weights that are still to be compressed after this one."""
        return [weight for n, weight in self.weights.items() if n not in self.bits and n != name]

    def _limit(self, name: str, share: float) -> float:
        """Bytes that a weight may take: somewhat more than planned, with what the others need left over.

        The last one may take all that is left: its excess cannot be compensated.
        """
        others = self._others(name)
        if not others:
            return self._left
        least = sum(weight.overhead + EMPTY_STREAM for weight in others)
        return min(TOLERANCE * self._planned[name] * share, self._left - least)

    def _spend(self, name: str) -> None:
        self._left -= self.tensors[name].nbytes
        self.bits[name] = self.tensors[name].bits_per_weight
        self._report("encoding", len(self.bits), len(self.weights))


def loss_of_vectors(
    model: BertEncoder | DecoderEmbedder, tensors: Mapping[str, Any], texts: Sequence[str]
) -> float:
    """Mean of 1 - cosine between the vectors of a dense model and of the one with these tensors."""
    dense: F32 = model.embed(texts, normalize=True)
    vectors: F32 = model.with_tensors(tensors).embed(texts, normalize=True)
    return float(1.0 - (vectors * dense).sum(axis=1).mean())


def _bias(name: str) -> str:
    return name.removesuffix("weight") + "bias"

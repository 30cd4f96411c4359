"""Calibrated compression of a decoder, and of an encoder that is built as one, layer after layer, as `calibrate`
does it for BERT.

The texts run through two models side by side: the dense one, and one whose earlier layers are compressed already.
Each weight is quantised with the moments of both inputs (`rbe_gpu.feedback`). Bits are allocated by sensitivity
(`allocation`): the divergence of the predictions from the dense model's when a weight alone is quantised, or of a
`DecoderEmbedder` the loss of the vectors (1 - cosine). A table of words that also makes the logits is one weight,
measured in both places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..blocks import RBEBlocks
from ..dispatch import module_of
from ..evaluate_decoders import evaluate_decoders, log_softmax, mean_divergence
from ..feedback import (
    Geometry,
    Moments,
    corrected_bias,
    geometry,
    quantize_matrix,
    quantize_table,
    row_scales,
)
from ..layers import RBELinear
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
from .decoder import Decoder, DecoderLayer
from .decoder_embedder import DecoderEmbedder
from .decoder_tensors import EMBEDDINGS, HEAD, POSITIONS, linear_parts
from .decoders import DecoderConfig
from .int8_choice import int8_parts, int8_weights, int8_windows, predicted
from .journal import NoJournal
from .pooling import cu_seqlens_of
from .scratch import Scratch

F32 = NDArray[np.float32]
Ids = NDArray[np.int64]
Progress = Callable[[str, int, int], None]

#: tokens of a window, which are predicted from each other alone
WINDOW = 256
#: Windows of more tokens than this are left out, evenly: second moments of 1,536 inputs need no more
MOST_TOKENS = 16384
_PROBE_WINDOWS, _PROBE_TOKENS = 3, 128
_PROBE_TEXTS = 64  # of a model that makes vectors
#: linear layers that read the same input
_STAGES = {
    "qkv": ("query", "key", "value"),
    "output": ("output",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}


class _Stages:
    """A layer in stages: each ends at the input of the next weights."""

    def __init__(self, layer: DecoderLayer, index: int, settings: DecoderConfig, ws: Workspace) -> None:
        self._layer = layer
        self._sandwich, self._post_norm = settings.sandwich, settings.post_norm
        self._ws = ws
        self.names = {part: f"model.layers.{index}.{name}" for part, name in linear_parts(settings).items()}
        self.stages = {
            stage: tuple(part for part in parts if part in self.names) for stage, parts in _STAGES.items()
        }

    def linear(self, part: str) -> RBELinear:
        owner = self._layer.ffn if part in ("gate", "up", "down") else self._layer.attention
        linear: RBELinear = getattr(owner, part)
        return linear

    def values(self, part: str) -> F32:
        """The weight of a linear layer."""
        return np.asarray(self.linear(part).weight, np.float32)

    def with_linears(self, linears: Mapping[str, RBELinear]) -> _Stages:
        """The same layer with some of its linears replaced, by part."""
        stages = copy(self)
        attention, ffn = copy(self._layer.attention), copy(self._layer.ffn)
        for part, linear in linears.items():
            setattr(ffn if part in ("gate", "up", "down") else attention, part, linear)
        stages._layer = self._layer._replace(attention=attention, ffn=ffn)
        return stages

    def attention_input(self, x: F32) -> F32:
        norm = None if self._post_norm else self._layer.norms[0]
        return x if norm is None else np.asarray(norm(x))

    def heads(self, h: F32, ends: Ids) -> F32:
        """The input of the output projection."""
        return np.array(self._layer.attention.mix(h, cu_seqlens=ends, workspace=self._ws))

    def attended(self, heads: F32, x: F32) -> F32:
        y = self.linear("output")(heads, workspace=self._ws)
        if self._post_norm:
            return np.asarray(self._layer.norms[0](x + y))
        return np.asarray(x + (self._layer.norms[1](y) if self._sandwich else y))

    def ffn_input(self, x: F32) -> F32:
        if self._post_norm:
            return x
        return np.asarray(self._layer.norms[2 if self._sandwich else 1](x))

    def inner(self, h: F32) -> F32:
        """The input of the down projection."""
        up = np.asarray(self.linear("up")(h, workspace=self._ws))
        return up * self.linear("gate")(h, workspace=self._ws) if "gate" in self.names else up

    def finished(self, inner: F32, x: F32) -> F32:
        y = self.linear("down")(inner, workspace=self._ws)
        if self._post_norm:
            return np.asarray(self._layer.norms[1](x + y))
        return np.asarray(x + (self._layer.norms[3](y) if self._sandwich else y))

    def run(self, x: F32, ends: Ids) -> F32:
        y = self.attended(self.heads(self.attention_input(x), ends), x)
        return self.finished(self.inner(self.ffn_input(y)), y)


def _stages_of(model: Decoder) -> list[_Stages]:
    ws = Workspace()  # of all layers
    return [_Stages(layer, i, model.settings, ws) for i, layer in enumerate(model.layers)]


class _Texts:
    """Windows of tokens, packed in groups, and their hidden states in both models."""

    def __init__(self, windows: Sequence[Ids], group: int = 8) -> None:
        self.parts = [windows[i : i + group] for i in range(0, len(windows), group)]
        self.ids = [np.concatenate(part) for part in self.parts]
        self.ends = [cu_seqlens_of(np.array([len(w) for w in part])) for part in self.parts]
        self.dense: list[F32] = []
        self.compressed: list[F32] = []


def windows_of(ids: Sequence[int] | Ids, window: int = WINDOW, most: int = MOST_TOKENS) -> list[Ids]:
    """Tokens in windows, evenly spaced ones of more than `most` tokens."""
    flat = np.asarray(ids, np.int64)
    parts = [flat[i : i + window] for i in range(0, flat.size, window)]
    parts = [part for part in parts if part.size > 1]
    return parts[:: max(1, -(-len(parts) * window // most))]


def _window(model: Decoder) -> int:
    """Tokens of a window: no more than the model has positions with the same rotations."""
    return min(WINDOW, model.settings.first_context or WINDOW, model.settings.max_positions)


def _table(model: Decoder, name: str) -> F32:
    """The table of EMBEDDINGS, POSITIONS or HEAD."""
    if name == HEAD:
        return np.asarray(model.head, np.float32)
    table = model.word_embeddings if name == EMBEDDINGS else model.position_embeddings
    assert table is not None
    return np.asarray(table.weight, np.float32)


def _tables(model: Decoder) -> dict[str, F32]:
    """The tables of words and of learned positions, by name."""
    names = (EMBEDDINGS,) if model.position_embeddings is None else (EMBEDDINGS, POSITIONS)
    return {name: _table(model, name) for name in names}


def _embedded(model: Decoder, tables: Mapping[str, F32], texts: _Texts) -> list[F32]:
    """The hidden states before the first layer, for each group of windows."""
    states = []
    for ids, ends in zip(texts.ids, texts.ends, strict=True):
        x = tables[EMBEDDINGS][ids] * np.float32(model.settings.embedding_scale)
        if POSITIONS in tables:
            x += tables[POSITIONS][np.arange(ids.size) - np.repeat(ends[:-1], np.diff(ends))]
        if model.token_types is not None:
            x += np.asarray(model.token_types.weight)[0]
        x = np.asarray(x, np.float32)
        states.append(x if model.embedding_norm is None else np.asarray(model.embedding_norm(x)))
    return states


def _normalised(model: Decoder, x: F32) -> F32:
    """The last hidden states of those behind the last layer."""
    return x if model.final_norm is None else np.asarray(model.final_norm(x), np.float32)


def _predictions(model: Decoder, head: Any, states: Sequence[F32]) -> list[F32]:
    """ln of the probabilities of every token, for each group of windows."""
    logs = []
    for x in states:
        logs.append(log_softmax(model.capped(_normalised(model, x) @ head.T), np.float32))
    return logs


#: called with the states behind the last layer and the matrix of the logits
Loss = Callable[[list[F32], F32], float]


def _loss_of_predictions(model: Decoder, texts: _Texts, states: list[F32]) -> Loss:
    """Divergence from the predictions of these states."""
    dense = _predictions(model, np.asarray(model.head, np.float32), states)
    return lambda x, head: mean_divergence(dense, _predictions(model, head, x))


def _loss_of_vectors(model: DecoderEmbedder, texts: _Texts, states: list[F32]) -> Loss:
    """Mean of 1 - cosine between vectors and those of these states."""

    def vectors(states: list[F32]) -> F32:
        return np.concatenate(
            [
                model.vectors_to_compare(_normalised(model.decoder, x), np.diff(ends))
                for x, ends in zip(states, texts.ends, strict=True)
            ]
        )

    dense = vectors(states)
    return lambda x, head: float(1.0 - (vectors(x) * dense).sum(axis=1).mean())


class DecoderCalibration:
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

    @property
    def sensitivity(self) -> dict[str, float]:
        return {name: w.sensitivity for name, w in self._weights.items()}

    def values(self, name: str) -> F32 | None:
        """The dense weight of that name; None where it is not one that is compressed."""
        weight = self._weights.get(name)
        return None if weight is None else weight.values

    def loss(self, tensors: Mapping[str, Any], texts: Sequence[str]) -> float:
        """Mean divergence of the predictions of the model with these tensors from the dense model's, or mean of 1 -
        cosine between the vectors of both.
        """
        if isinstance(self.model, DecoderEmbedder):
            dense = self.model.embed(texts, normalize=True)
            vectors = self.model.with_tensors(tensors).embed(texts, normalize=True)
            return float(1.0 - (vectors * dense).sum(axis=1).mean())
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

    def compress(
        self, budget: float, *, progress: Progress | None = None, journal: NoJournal | None = None
    ) -> CalibrationResult:
        """Compress the weights into `budget` bytes, everything counted, layer after layer.

        Raises
        ------
        ValueError
            The budget is smaller than the scales of the weights.
        """
        journal = journal or NoJournal()
        budget *= MARGIN
        weights = self._weights

        def plan() -> list[dict[str, float]]:
            steps = steps_for(list(weights.values()), budget)
            return [steps, {name: w.nbytes(steps[name]) for name, w in weights.items()}]

        steps, planned = journal.value("steps and bytes", plan)
        return _Encoding(self.decoder, self._windows, weights, planned, budget, progress, journal).run(steps)


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
    layers = _stages_of(model)
    size = block or DEFAULT_BLOCK
    report("moments", 0, 1)
    every = max(1, len(windows) // 16)
    if isinstance(whole, DecoderEmbedder):  # its texts are shorter than windows: as many tokens
        every = max(1, min(every, sum(map(len, windows)) // (16 * WINDOW)))
    geometries = _dense_pass(model, _Texts(windows[::every]), layers, transform, size, scratch)
    report("moments", 1, 1)
    weights: dict[str, Weight] = {}
    if tables:
        for name, values in _tables(model).items():
            # of positions no row counts more: windows are shorter than texts may be
            counts = np.bincount(ids, minlength=len(values)) if name == EMBEDDINGS else None
            scales = row_scales(values, ROW_POWER, counts)
            weights[name] = Weight.of_table(name, partial(_table, model, name), transform, size, scales)
    if not model.settings.tied:
        weights[HEAD] = Weight.of_matrix(HEAD, partial(_table, model, HEAD), geometries[HEAD])
    for layer in layers:
        for part, name in layer.names.items():
            read = partial(layer.values, part)
            weights[f"{name}.weight"] = Weight.of_matrix(f"{name}.weight", read, geometries[name])
    _measure(whole, weights, _Texts(probe), layers, report, journal or NoJournal())
    return DecoderCalibration(whole, texts, windows, weights, are_few(ids), scratch)


def _dense_pass(
    model: Decoder, texts: _Texts, layers: list[_Stages], transform: str, block: int, scratch: Scratch
) -> dict[str, Callable[[], Geometry]]:
    """What reads the geometry of every linear layer's input in the dense model, by its name without `.weight`."""
    states = _embedded(model, _tables(model), texts)
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
            h = _normalised(model, x)
            last.add(h, h)
        geometries[HEAD] = scratch.geometry(geometry(last, transform, block))
    return geometries


def _measure(
    whole: Decoder | DecoderEmbedder,
    weights: dict[str, Weight],
    texts: _Texts,
    layers: list[_Stages],
    report: Progress,
    journal: NoJournal,
) -> None:
    """Set each weight's sensitivity: quantise it alone, run the remaining model, divide by the squared step."""
    model = _decoder_of(whole)
    tables = _tables(model)
    head = np.asarray(model.head, np.float32)
    states = [_embedded(model, tables, texts)]
    for layer in layers:
        states.append([layer.run(x, ends) for x, ends in zip(states[-1], texts.ends, strict=True)])
    loss = (
        _loss_of_vectors(whole, texts, states[-1])
        if isinstance(whole, DecoderEmbedder)
        else _loss_of_predictions(whole, texts, states[-1])
    )

    def finish(x: list[F32], first: int, head: F32 = head) -> float:
        for layer in layers[first:]:
            x = [layer.run(a, ends) for a, ends in zip(x, texts.ends, strict=True)]
        return max(loss(x, head), 1e-9)

    done = 0
    for name in (name for name in tables if name in weights):
        rows = weights[name]

        def of_table(name: str = name, rows: Weight = rows) -> float:
            assert rows.scales is not None
            step = rows.step_for(PROBE_BITS)
            probe = quantize_table(tables[name], step, rows.scales).decode()
            x = _embedded(model, {**tables, name: probe}, texts)
            makes_logits = name == EMBEDDINGS and model.settings.tied
            return finish(x, 0, probe if makes_logits else head) / step**2

        rows.sensitivity = journal.value(f"sensitivity of {name}", of_table)
        report("sensitivity", done := done + 1, len(weights))
    if HEAD in weights:
        last = weights[HEAD]

        def of_head() -> float:
            assert last.geometry is not None
            step = last.step_for(PROBE_BITS)
            probe = quantize_matrix(last.values, last.geometry, step).decode()
            return finish(states[-1], len(layers), probe) / step**2

        last.sensitivity = journal.value(f"sensitivity of {HEAD}", of_head)
        report("sensitivity", done := done + 1, len(weights))
    for index, layer in enumerate(layers):
        for part, name in layer.names.items():
            weight, linear = weights[f"{name}.weight"], layer.linear(part)

            def matrix(
                weight: Weight = weight, linear: RBELinear = linear, layer: _Stages = layer, part: str = part,
                index: int = index,
            ) -> float:  # fmt: skip
                assert weight.geometry is not None
                step = weight.step_for(PROBE_BITS)
                probe = quantize_matrix(weight.values, weight.geometry, step).decode()
                lossy = layer.with_linears({part: RBELinear(probe, linear.bias, linear.activation)})
                x = [lossy.run(a, ends) for a, ends in zip(states[index], texts.ends, strict=True)]
                return finish(x, index + 1) / step**2

            weight.sensitivity = journal.value(f"sensitivity of {name}", matrix)
            report("sensitivity", done := done + 1, len(weights))


class _Encoding:
    """The pass that encodes: the table, then layer after layer on the outputs of the layers compressed already."""

    def __init__(
        self,
        model: Decoder,
        windows: Sequence[Ids],
        weights: dict[str, Weight],
        planned: dict[str, float],
        left: float,
        progress: Progress | None,
        journal: NoJournal,
    ) -> None:
        self.model = model
        self.texts = _Texts(windows)
        self.weights = weights
        self.planned = planned
        self.left = left
        self.report: Progress = progress or silent
        self.journal = journal
        self.tensors: dict[str, Any] = {}
        self.bits: dict[str, float] = {}

    def run(self, steps: Mapping[str, float]) -> CalibrationResult:
        model, texts = self.model, self.texts
        tables = _tables(model)
        lossy = {
            name: self._table(name, steps[name]) if name in self.weights else table
            for name, table in tables.items()
        }
        texts.dense = _embedded(model, tables, texts)
        texts.compressed = _embedded(model, lossy, texts)
        for layer in _stages_of(model):
            self._layer(layer)
        if HEAD in self.weights:
            pairs = (
                (_normalised(model, a), _normalised(model, b))
                for a, b in zip(texts.dense, texts.compressed, strict=True)
            )
            self._matrices({HEAD: None}, pairs)
        return CalibrationResult(self.tensors, self.bits)

    def _limit(self, name: str, share: float) -> float:
        """Bytes that a weight may take: somewhat more than planned, and what the others need is left."""
        others = [w for n, w in self.weights.items() if n not in self.bits and n != name]
        if not others:
            return self.left
        least = sum(w.overhead + EMPTY_STREAM for w in others)
        return min(TOLERANCE * self.planned[name] * share, self.left - least)

    def _spend(self, name: str, weight: Any) -> None:
        self.left -= weight.nbytes
        self.bits[name] = weight.bits_per_weight
        self.report("encoding", len(self.bits), len(self.weights))

    def _table(self, name: str, step: float) -> F32:
        weight = self.weights[name]
        limit = self._limit(name, 1.0)

        def encoded() -> dict[str, Any]:
            def quantized(step: float) -> Any:
                assert weight.scales is not None
                return quantize_table(weight.values, step, weight.scales)

            return {name: weight.fitted(quantized, step, limit)}

        self.tensors.update(self.journal.tensors(name, encoded))
        self._spend(name, self.tensors[name])
        return np.asarray(self.tensors[name].decode())

    def _layer(self, layer: _Stages) -> None:
        texts, lossy = self.texts, layer
        compressed: dict[str, RBELinear] = {}

        def stage(parts: Sequence[str], inputs: Iterator[tuple[F32, F32]]) -> None:
            nonlocal lossy
            linears = {f"{layer.names[part]}.weight": layer.linear(part) for part in parts}
            made = self._matrices(linears, inputs)
            for part in parts:
                compressed[part] = made[f"{layer.names[part]}.weight"]
            lossy = layer.with_linears(compressed)

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
        stage(layer.stages["output"], iter(heads))
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

    def _matrices(
        self, linears: Mapping[str, RBELinear | None], inputs: Iterator[tuple[F32, F32]]
    ) -> dict[str, RBELinear]:
        """Compress the weights that read `inputs` (dense, compressed); the linear layers with what they decode to."""
        first = self.weights[next(iter(linears))].geometry
        assert first is not None
        moments = Moments(self.weights[next(iter(linears))].values.shape[1])
        finished = all(self.journal.has(name) for name in linears)
        for dense, compressed in inputs:  # a generator, which computes the layer's outputs too
            if not finished:
                moments.add(dense, compressed)
        geo = first if finished else geometry(moments, first.transform, first.block)

        def encoded(name: str, linear: RBELinear | None, share: float, limit: float) -> dict[str, Any]:
            weight = self.weights[name]
            now = Weight.of_matrix(name, weight.read, lambda: geo)
            # the planned bits, corrected for the excess or saving of earlier weights
            bits = 8 * (self.planned[name] * share - now.overhead) / now.size
            matrix = now.fitted(
                lambda step: quantize_matrix(weight.values, geo, step), now.step_for(bits), limit
            )
            if len(self.bits) + 1 == len(self.weights) and matrix.nbytes > limit:
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
            share = self.left / sum(nbytes for n, nbytes in self.planned.items() if n not in self.bits)
            limit = self._limit(name, share)
            self.tensors.update(self.journal.tensors(name, partial(encoded, name, linear, share, limit)))
            matrix = self.tensors[name]
            self._spend(name, matrix)
            bias = self.tensors.get(_bias(name))
            activation = None if linear is None else linear.activation
            replaced[name] = RBELinear(module_of(matrix).asarray(matrix.decode()), bias, activation)
        return replaced


def _bias(name: str) -> str:
    return name.removesuffix("weight") + "bias"

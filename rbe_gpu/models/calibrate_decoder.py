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
from ..evaluate_decoders import evaluate_decoders
from ..feedback import row_scales
from ..layers import RBELinear
from ..transforms import DEFAULT_BLOCK
from .allocation import ROW_POWER, Weight, are_few, warn_of_few
from .decoder import Decoder
from .decoder_embedder import DecoderEmbedder
from .decoder_probes import decoder_of
from .decoder_stages import PackedTexts, Stages, embedded, normalised, stages_of, table_of, tables_of
from .decoder_tensors import EMBEDDINGS, HEAD
from .int8_choice import int8_parts, int8_weights, int8_windows, predicted
from .journal import NoJournal
from .scratch import Scratch
from .sensitivity import Measurements, measure
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
        self.decoder = decoder_of(model)
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


def calibrate_decoder(
    whole: Decoder | DecoderEmbedder,
    texts: Sequence[str],
    measurements: Measurements,
    tables: bool,
    transform: str,
    block: int | None,
    report: Progress,
    journal: NoJournal,
) -> DecoderCalibration:
    """`calibrate` of a decoder, whose texts are joined by an empty line, or of a `DecoderEmbedder`."""
    model = decoder_of(whole)
    for name, tensor in model.tensors().items():
        if isinstance(tensor, RBEBlocks):
            raise ValueError(f"{name} is compressed already; calibrate the dense model it was made from")
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
    scratch = Scratch(journal.scratch)
    size = block or DEFAULT_BLOCK
    report("moments", 0, 1)
    every = max(1, len(windows) // 16)
    if isinstance(whole, DecoderEmbedder):  # its texts are shorter than windows: as many tokens
        every = max(1, min(every, sum(map(len, windows)) // (16 * WINDOW)))
    geometries = measurements.geometries(_lists(windows[::every]), transform, lambda _: size, scratch)
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
    for layer in stages_of(model):
        for part, name in layer.names.items():
            read = partial(layer.values, part)
            name = f"{name}.weight"
            weights[name] = Weight.of_matrix(name, read, geometries[name])
    measure(weights, _lists(probe), measurements, report, journal)
    return DecoderCalibration(whole, texts, windows, weights, are_few(ids), scratch)


def _lists(windows: Sequence[Ids]) -> list[list[int]]:
    return [window.tolist() for window in windows]

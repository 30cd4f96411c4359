"""Which linear layers take int8 activations: those that lose little by it, measured one by one, or of a decoder that
generates text part by part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..evaluate_decoders import log_softmax, mean_divergence
from .architectures import architecture
from .bert import BertEncoder
from .decoder import Decoder
from .decoder_embedder import DecoderEmbedder
from .decoder_tensors import linear_parts

Ids = NDArray[Any]
F32 = NDArray[np.float32]

#: A layer keeps float activations if int8 ones alone cost more of the sentence vectors' mean cosine.
MOST = 0.0005
_TEXTS = 64
_WINDOWS, _TOKENS = 8, 128
#: SmolLM2 at 4.25 bits: int8 inputs of all parts but "down" make a divergence of 0.071 0.076, of all parts 0.089
INT8_SHARE = 0.03


def int8_weights(model: BertEncoder | DecoderEmbedder, texts: Sequence[str], most: float = MOST) -> list[str]:
    """Names of the linear weights that take int8 activations and lose at most `most` of the mean cosine by it.

    Parameters
    ----------
    model : with a tokenizer, on the CPU
    texts : of which the first 64 are embedded, once for each weight
    """
    texts = list(texts[:_TEXTS])
    plain = model.with_int8_activations(()).embed(texts)
    names = []
    for name in architecture(model.config).linear_weights(model.config):
        try:
            rounded = model.with_int8_activations([name])
        except ValueError:  # the int8 matmul does not support its codes
            continue
        if 1 - _mean_cosine(plain, rounded.embed(texts)) <= most:
            names.append(name)
    return names


def _mean_cosine(a: Any, b: Any) -> float:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.mean((a * b).sum(axis=1) / np.maximum(norms, 1e-30)))


def int8_windows(windows: Sequence[Ids]) -> list[Ids]:
    """Of windows of tokens those that `int8_parts` measures on, 8 at most."""
    return [w[:_TOKENS] for w in windows[:: max(1, -(-len(windows) // _WINDOWS))]]


def predicted(model: Decoder, windows: Sequence[Ids]) -> Iterator[F32]:
    """ln of the probabilities of every token, (tokens, vocab_size), of each window."""
    for window in windows:
        yield log_softmax(model.logits(window[None])[0], np.float32)


def int8_parts(lossy: Decoder, windows: Sequence[Ids], dense: Callable[[], Iterable[F32]]) -> list[str]:
    """Names of the linear weights of a decoder that take int8 activations.

    Measured part by part ("query", "down", ...), in all layers at once: a part takes int8 inputs if they make the
    divergence of the predictions from the dense model's larger by at most INT8_SHARE of itself.

    Parameters
    ----------
    lossy : the compressed model, on the CPU
    windows : token ids
    dense : called several times, what the dense model has `predicted` of them
    """

    def divergence(model: Decoder) -> float:
        return mean_divergence(dense(), predicted(model, windows))

    most = (1 + INT8_SHARE) * divergence(lossy)
    names: list[str] = []
    for name in linear_parts(lossy.settings).values():
        part = [f"model.layers.{i}.{name}.weight" for i in range(len(lossy.layers))]
        try:
            rounded = lossy.with_int8_activations(part)
        except ValueError:  # the int8 matmul does not support their codes
            continue
        if divergence(rounded) <= most:
            names += part
    return names

"""Which linear layers of an encoder take int8 activations: those that lose little by it, measured one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .architectures import architecture
from .bert import BertEncoder
from .decoder_embedder import DecoderEmbedder

#: A layer keeps float activations if int8 ones alone cost more of the sentence vectors' mean cosine.
MOST = 0.0005
_TEXTS = 64


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

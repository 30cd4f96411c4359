"""evaluate_decoders: how closely a compressed decoder predicts what its dense one does.

    perplexity = exp(-mean_i ln p(token_i | tokens before it))
    kl         = mean_i sum_t P(t) ln (P(t) / Q(t))             P dense, Q compressed, at token i
    top_1      = fraction of tokens at which both have the same most probable next token

Texts are joined to windows of `window` tokens, as is usual; the first token of a window is not predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import exp
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

WINDOW = 256  # tokens
F64 = NDArray[np.float64]
Progress = Callable[[str, int, int], None]


class Predicts(Protocol):
    """The methods of a model that `evaluate_decoders` calls; `rbe_gpu.load` returns one for a decoder."""

    def token_ids(self, text: str) -> list[int]:
        """The ids of a text."""

    def logits(self, ids: Any) -> Any:
        """(batch, seq, vocab_size) float32."""


@dataclass(frozen=True)
class Prediction:
    """Metrics of one model.

    Attributes
    ----------
    tokens : predicted tokens
    perplexity : of the texts
    kl : mean Kullback-Leibler divergence of its predictions from the dense model's, in nats
    kl_p99 : the 99th percentile over tokens
    top_1 : agreement of the most probable token with the dense model's
    """

    tokens: int
    perplexity: float
    kl: float
    kl_p99: float
    top_1: float


@dataclass(frozen=True)
class DecoderEvaluation:
    """The dense model and the compressed one on the same texts."""

    dense: Prediction
    compressed: Prediction


def evaluate_decoders(
    compressed: Predicts,
    dense: Predicts,
    texts: Sequence[str],
    *,
    window: int = WINDOW,
    progress: Progress | None = None,
) -> DecoderEvaluation:
    """Predict the tokens of texts with both models.

    Parameters
    ----------
    compressed, dense : decoders, as `rbe_gpu.load` returns them
    texts : joined by an empty line
    window : tokens that are predicted together, from no others

    Raises
    ------
    ValueError
        The texts have fewer than two tokens, or the models take different tokens for them.
    """
    joined = "\n\n".join(texts)
    ids = np.asarray(dense.token_ids(joined), np.int64)
    if not np.array_equal(ids, compressed.token_ids(joined)):
        raise ValueError(
            "the two models tokenize the texts differently; compare with the dense model that was compressed"
        )
    if ids.size < 2:
        raise ValueError("the texts have fewer than two tokens; there is nothing to predict")
    if window < 2:
        raise ValueError(f"window={window} is too short; use 2 or more")
    losses: tuple[list[F64], list[F64]] = ([], [])
    divergences: list[F64] = []
    same: list[NDArray[np.bool_]] = []
    for start in range(0, ids.size, window):
        part = ids[start : start + window]
        if part.size < 2:
            break
        p, q = (log_softmax(model.logits(part[None])[0, :-1]) for model in (dense, compressed))
        rows = np.arange(part.size - 1)
        for log, kept in ((p, losses[0]), (q, losses[1])):
            kept.append(-log[rows, part[1:]])
        divergences.append((np.exp(p) * (p - q)).sum(axis=1))
        same.append(p.argmax(axis=1) == q.argmax(axis=1))
        if progress is not None:
            progress("windows", min(start + window, ids.size), ids.size)
    kl = np.concatenate(divergences)
    own, others = (exp(float(np.concatenate(part).mean())) for part in losses)
    return DecoderEvaluation(
        dense=Prediction(kl.size, own, 0.0, 0.0, 1.0),
        compressed=Prediction(
            kl.size,
            others,
            float(kl.mean()),
            float(np.percentile(kl, 99)),
            float(np.concatenate(same).mean()),
        ),
    )


def log_softmax(logits: Any, dtype: Any = np.float64) -> NDArray[Any]:
    """ln softmax of each row of (rows, columns) logits, an array of either device, as a NumPy array of `dtype`."""
    from .dispatch import to_host

    scores: NDArray[Any] = to_host(logits).astype(dtype)
    scores -= scores.max(axis=1, keepdims=True)
    scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return scores


def mean_divergence(dense: Iterable[NDArray[Any]], compressed: Iterable[NDArray[Any]]) -> float:
    """Mean Kullback-Leibler divergence over tokens, in nats.

    dense, compressed : ln of the probabilities of every token, (rows, columns) each
    """
    total, tokens = 0.0, 0
    for p, q in zip(dense, compressed, strict=True):
        total += float((np.exp(p) * (p - q)).sum())
        tokens += len(p)
    return total / tokens

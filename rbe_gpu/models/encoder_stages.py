"""A dense BERT encoder run in stages on packed batches of texts: each stage ends at the input of the next weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..layers import RBEAttention, RBELinear
from ..workspace import Workspace
from .bert import BertEncoder
from .encoders import token_positions
from .pooling import cu_seqlens_of

F32 = NDArray[np.float32]

WORDS = "embeddings.word_embeddings.weight"
POSITIONS = "embeddings.position_embeddings.weight"
_TOKENS = 4096  # tokens computed together


@dataclass
class Batch:
    """Packed hidden states of some texts: in the dense model, and after the layers compressed so far."""

    ids: NDArray[np.int64]
    lengths: NDArray[np.int64]
    dense: F32 = field(default_factory=lambda: np.empty((0, 0), np.float32))
    compressed: F32 = field(default_factory=lambda: np.empty((0, 0), np.float32))


def batches(model: BertEncoder, texts: Sequence[str]) -> list[Batch]:
    """Texts with the default prompt as packed ids, sorted by length."""
    sequences = sorted(model.token_ids(texts, model.resolve_prompt()), key=len)
    parts: list[Batch] = []
    start = 0
    while start < len(sequences):
        stop, tokens = start, 0
        while stop < len(sequences) and (stop == start or tokens + len(sequences[stop]) <= _TOKENS):
            tokens += len(sequences[stop])
            stop += 1
        batch = sequences[start:stop]
        parts.append(
            Batch(np.concatenate(batch).astype(np.int64), np.array([len(s) for s in batch], np.int64))
        )
        start = stop
    return parts


class Stages:
    """One encoder layer in stages: each ends at the input of the next weight."""

    def __init__(self, model: BertEncoder, index: int, ws: Workspace) -> None:
        attention, attention_norm, ffn, ffn_norm = model.layers[index]
        self.norms = {"attention": attention_norm, "ffn": ffn_norm}
        self._heads, self._mask = attention.num_heads, model.attention_mask()
        self._ws = ws
        at = f"encoder.layer.{index}."
        self.norm_names = {"attention": f"{at}attention.output.LayerNorm", "ffn": f"{at}output.LayerNorm"}
        self.names = {
            "qkv": [f"{at}attention.self.{n}.weight" for n in ("query", "key", "value")],
            "output": [f"{at}attention.output.dense.weight"],
            "up": [f"{at}intermediate.dense.weight"],
            "down": [f"{at}output.dense.weight"],
        }
        linears = (attention.query, attention.key, attention.value, attention.output, ffn.up, ffn.down)
        names = [n for stage in self.names.values() for n in stage]
        self.linears: dict[str, RBELinear] = dict(zip(names, linears, strict=True))

    def with_linears(self, other: Mapping[str, RBELinear]) -> Stages:
        """The same layer with some of its linears replaced by those of `other`."""
        layer = copy(self)
        layer.linears = {name: other.get(name, linear) for name, linear in self.linears.items()}
        return layer

    def _linear(self, stage: str) -> RBELinear:
        return self.linears[self.names[stage][0]]

    def heads(self, x: F32, lengths: NDArray[np.int64]) -> F32:
        """The input of the output projection."""
        q, k, v = (self.linears[name] for name in self.names["qkv"])
        attention = RBEAttention(q, k, v, self._linear("output"), self._heads)
        return np.array(attention.mix(x, lengths, self._mask, workspace=self._ws))

    def attended(self, heads: F32, x: F32) -> F32:
        y = self._linear("output")(heads, residual=x, workspace=self._ws)
        return np.asarray(self.norms["attention"](y, workspace=self._ws))

    def inner(self, x: F32) -> F32:
        """The input of the down projection."""
        return np.asarray(self._linear("up")(x, workspace=self._ws))

    def finished(self, inner: F32, x: F32) -> F32:
        y = self._linear("down")(inner, residual=x, workspace=self._ws)
        return np.asarray(self.norms["ffn"](y, workspace=self._ws))

    def run(self, x: F32, lengths: NDArray[np.int64]) -> F32:
        y = self.attended(self.heads(x, lengths), x)
        return self.finished(self.inner(y), y)


def linear_weight(linear: RBELinear) -> F32:
    return np.asarray(linear.weight, np.float32)


def vectors(model: BertEncoder, states: Sequence[F32], parts: Sequence[Batch]) -> F32:
    """The vectors of all texts of which a token is pooled, of length 1."""
    return np.concatenate(
        [model.vectors_to_compare(x, p.lengths) for x, p in zip(states, parts, strict=True)]
    )


def loss(model: BertEncoder, states: Sequence[F32], parts: Sequence[Batch], dense: F32) -> float:
    """Mean of 1 - cosine between the vectors of these states and those of the dense model."""
    return float(1.0 - (vectors(model, states, parts) * dense).sum(axis=1).mean())


def table_of(model: BertEncoder, name: str) -> F32:
    """The table WORDS or POSITIONS."""
    table = model.word_embeddings if name == WORDS else model.position_embeddings
    return np.asarray(table.weight, np.float32)


def tables_of(model: BertEncoder) -> dict[str, F32]:
    return {name: table_of(model, name) for name in (WORDS, POSITIONS)}


def embedded(model: BertEncoder, tables: dict[str, F32], ids: NDArray[np.int64], lengths: Any) -> F32:
    """Hidden states before the first layer, with these embedding tables."""
    x = tables[WORDS][ids] + tables[POSITIONS][token_positions(ids, cu_seqlens_of(lengths), model.config)]
    if model.token_type_embeddings is not None:
        x += np.asarray(model.token_type_embeddings.weight)[0]
    return np.asarray(model.embedding_norm(np.ascontiguousarray(x, np.float32)))

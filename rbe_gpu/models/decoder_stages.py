"""A dense decoder run in stages on windows of tokens: each stage ends at the input of the next weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy

import numpy as np
from numpy.typing import NDArray

from ..layers import RBELinear
from ..workspace import Workspace
from .decoder import Decoder, DecoderLayer
from .decoder_tensors import EMBEDDINGS, HEAD, POSITIONS, linear_parts
from .decoders import DecoderConfig
from .pooling import cu_seqlens_of

F32 = NDArray[np.float32]
Ids = NDArray[np.int64]

#: linear layers that read the same input
_STAGES = {
    "qkv": ("query", "key", "value"),
    "output": ("output",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}


class Stages:
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

    def with_linears(self, linears: Mapping[str, RBELinear]) -> Stages:
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


def stages_of(model: Decoder) -> list[Stages]:
    ws = Workspace()  # of all layers
    return [Stages(layer, i, model.settings, ws) for i, layer in enumerate(model.layers)]


class PackedTexts:
    """Texts, or windows of their tokens, packed in groups, and their hidden states in both models.

    Attributes
    ----------
    ids, ends : of each group, packed token ids (tokens,) and where its texts begin and end, (texts + 1,)
    dense, compressed : of each group, (tokens, hidden_size): of the dense model, and of the layers compressed so far
    """

    def __init__(self, windows: Sequence[Ids], group: int = 8) -> None:
        parts = [windows[i : i + group] for i in range(0, len(windows), group)]
        self.ids = [np.concatenate(part) for part in parts]
        self.ends = [cu_seqlens_of(np.array([len(w) for w in part])) for part in parts]
        self.dense: list[F32] = []
        self.compressed: list[F32] = []


def table_of(model: Decoder, name: str) -> F32:
    """The table of EMBEDDINGS, POSITIONS or HEAD."""
    if name == HEAD:
        return np.asarray(model.head, np.float32)
    table = model.word_embeddings if name == EMBEDDINGS else model.position_embeddings
    assert table is not None
    return np.asarray(table.weight, np.float32)


def tables_of(model: Decoder) -> dict[str, F32]:
    """The tables of words and of learned positions, by name."""
    names = (EMBEDDINGS,) if model.position_embeddings is None else (EMBEDDINGS, POSITIONS)
    return {name: table_of(model, name) for name in names}


def embedded(model: Decoder, tables: Mapping[str, F32], texts: PackedTexts) -> list[F32]:
    """The hidden states before the first layer, for each group of windows."""
    return [embedded_group(model, tables, ids, ends) for ids, ends in zip(texts.ids, texts.ends, strict=True)]


def embedded_group(model: Decoder, tables: Mapping[str, F32], ids: Ids, ends: Ids) -> F32:
    """The hidden states of one group before the first layer."""
    x = tables[EMBEDDINGS][ids] * np.float32(model.settings.embedding_scale)
    if POSITIONS in tables:
        x += tables[POSITIONS][np.arange(ids.size) - np.repeat(ends[:-1], np.diff(ends))]
    if model.token_types is not None:
        x += np.asarray(model.token_types.weight)[0]
    x = np.asarray(x, np.float32)
    return x if model.embedding_norm is None else np.asarray(model.embedding_norm(x))


def normalised(model: Decoder, x: F32) -> F32:
    """The last hidden states of those behind the last layer."""
    return x if model.final_norm is None else np.asarray(model.final_norm(x), np.float32)

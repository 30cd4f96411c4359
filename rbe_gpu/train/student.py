"""The forward pass of a `BertEncoder` in PyTorch, for gradients: teacher and student, each with its weights.

    x_0     = LayerNorm(word[id] + position[i] + type[0])
    a       = LayerNorm(attention(x_l) + x_l)
    x_(l+1) = LayerNorm(down(activation(up(a))) + a)

Weights are a mapping with the names of `models.bert_tensors.tensor_shapes`, so that any of them may be computed from
others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..dispatch import to_host
from ..models.bert import BertEncoder
from ..models.bert_config import ACTIVATIONS
from ..models.bert_tensors import TYPES
from ..models.encoders import first_position


def attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None = None, softcap: float | None = None
) -> Tensor:
    """Attention of short texts. PyTorch's fused form is slow in bfloat16 on a CPU, so that it is written out there: a
    training step of MiniLM takes 0.51 s instead of 0.61 s. It has no soft cap either.

    Parameters
    ----------
    q, k, v : (batch, heads, seq, head_dim)
    seen : bool (True keeps) or float (added), broadcast to (batch, heads, seq, seq)
    scale : of the scores; None: head_dim^-0.5
    softcap : c: c tanh(score / c) in the place of each score
    """
    if softcap is None and not (q.is_cpu and torch.is_autocast_enabled("cpu")):
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    scores = torch.matmul(q * (q.shape[-1] ** -0.5 if scale is None else scale), k.transpose(-1, -2)).float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -float("inf")) if seen.dtype == torch.bool else scores + seen
    return torch.matmul(torch.softmax(scores, -1).to(v.dtype), v)


def activation(name: str) -> Any:
    """The function of an activation: "gelu", "gelu_tanh", "relu" or "silu"."""
    if name == "gelu_tanh":
        return lambda x: functional.gelu(x, approximate="tanh")
    return {"gelu": functional.gelu, "relu": functional.relu, "silu": functional.silu}[name]


@dataclass(frozen=True)
class Student:
    """What a forward pass needs beside the weights.

    Attributes
    ----------
    layers, heads, hidden, eps, activation : as in config.json
    first_position : of a text's tokens, which are taken for text, not padding
    bias : (heads, positions, positions), added to the scores of attention, or None
    """

    layers: int
    heads: int
    hidden: int
    eps: float
    activation: str
    first_position: int = 0
    bias: Tensor | None = None

    @classmethod
    def of(cls, model: BertEncoder) -> Student:
        mask = model.attention_mask()
        return cls(
            model.config["num_hidden_layers"],
            model.config["num_attention_heads"],
            model.hidden_size,
            float(model.config["layer_norm_eps"]),
            ACTIVATIONS[model.config.get("hidden_act", "gelu")],
            first_position(model.config),
            None if mask is None else torch.from_numpy(np.array(to_host(mask))),
        )

    def states(self, weights: Mapping[str, Tensor], words: Tensor, text: Tensor) -> list[Tensor]:
        """Hidden states after the embeddings and after each layer, (batch, seq, hidden) each.

        Parameters
        ----------
        words : (batch, seq, hidden) rows of the word embeddings
        text : (batch, seq) bool, false in the padding
        """
        batch, seq, hidden = words.shape
        function = activation(self.activation)

        def norm(x: Tensor, name: str) -> Tensor:
            gain, bias = weights[f"{name}.LayerNorm.weight"], weights[f"{name}.LayerNorm.bias"]
            return functional.layer_norm(x, (hidden,), gain, bias, self.eps)

        def linear(x: Tensor, name: str) -> Tensor:
            return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

        def by_head(x: Tensor) -> Tensor:
            return x.view(batch, seq, self.heads, -1).transpose(1, 2)

        first = self.first_position
        x = words + weights["embeddings.position_embeddings.weight"][first : first + seq]
        if TYPES in weights:
            x = x + weights[TYPES][0]
        x = norm(x, "embeddings")
        states = [x]
        seen = text[:, None, None, :]
        if self.bias is not None:
            bias = self.bias[:, :seq, :seq].to(words)
            seen = torch.where(seen, bias, -float("inf"))
        for i in range(self.layers):
            at = f"encoder.layer.{i}."
            q, k, v = (by_head(linear(x, f"{at}attention.self.{n}")) for n in ("query", "key", "value"))
            heads = attention(q, k, v, seen)
            mixed = heads.transpose(1, 2).reshape(batch, seq, hidden)
            x = norm(linear(mixed, f"{at}attention.output.dense") + x, f"{at}attention.output")
            inner = function(linear(x, f"{at}intermediate.dense"))
            x = norm(linear(inner, f"{at}output.dense") + x, f"{at}output")
            states.append(x)
        return states

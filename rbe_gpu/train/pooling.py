"""Vectors of texts from hidden states in PyTorch, for gradients, as `models.text_embedder` makes them: pooled, passed
through the model's Dense modules, cut to `truncate_dim` columns, divided by their L2 norms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..models.dense_modules import PREFIX
from ..models.text_embedder import TextEmbedder


@dataclass(frozen=True)
class Pooling:
    """How a model pools.

    Attributes
    ----------
    modes : concatenated in this order
    skipped : tokens at the start of each text, those of the prompt, that are not pooled
    columns : of the vectors; what is beyond them is cut off
    activations : of the Dense modules, None or "tanh"
    """

    modes: tuple[str, ...]
    skipped: int
    columns: int
    activations: tuple[str | None, ...] = ()

    @classmethod
    def of(cls, model: TextEmbedder) -> Pooling:
        return cls(
            tuple(model.pooling),
            model.tokens_not_pooled(model.resolve_prompt()),
            model.embedding_size,
            tuple(module.activation for module in model.dense),
        )

    def vectors(self, states: Tensor, text: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """The vectors of texts of norm 1, (batch, columns).

        Parameters
        ----------
        states : (batch, seq, hidden)
        text : (batch, seq) bool, false in the padding
        weights : of the Dense modules (`dense_modules.tensor_names`), among others
        """
        pooled = text.clone()
        pooled[:, : self.skipped] = False
        keep = pooled[..., None].to(states.dtype)
        count = keep.sum(1).clamp(min=1.0)
        position = torch.arange(1, states.shape[1] + 1, device=states.device, dtype=states.dtype)[
            None, :, None
        ]
        rows = torch.arange(len(states), device=states.device)
        parts = []
        for mode in self.modes:
            if mode == "max":
                parts.append(states.masked_fill(keep == 0, -float("inf")).amax(1))
            elif mode == "cls":
                parts.append(states[:, self.skipped])
            elif mode == "lasttoken":
                parts.append(states[rows, text.sum(1) - 1])
            else:
                weight = keep * position if mode == "weightedmean" else keep
                divisor = count.sqrt() if mode == "mean_sqrt_len_tokens" else weight.sum(1).clamp(min=1.0)
                parts.append((states * weight).sum(1) / divisor)
        vectors = torch.cat(parts, dim=-1)
        for i, activation in enumerate(self.activations):
            vectors = functional.linear(
                vectors, weights[f"{PREFIX}{i}.weight"], weights.get(f"{PREFIX}{i}.bias")
            )
            vectors = vectors if activation is None else torch.tanh(vectors)
        return functional.normalize(vectors[:, : self.columns], dim=-1)

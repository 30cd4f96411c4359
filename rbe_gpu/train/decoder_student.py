"""The forward pass of a `Decoder` in PyTorch, for gradients, with the settings of `DecoderConfig`.

    x_0     = embedding[id] * embedding_scale (+ position[i])
    a       = x_l + attention(norm(x_l))
    x_(l+1) = a + down(activation(gate(h)) * up(h)),  h = norm(a)

One module for all that `models.decoder` loads, as there: norms before, behind or around the parts, rotations or
learned positions, windows, soft caps, biases. Weights are a mapping with the names of
`models.decoder_tensors.tensor_shapes`, so that any of them may be computed from others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..layers import RBERotary
from ..layers.ffn import GATED
from ..models.decoder import Decoder
from ..models.decoder_tensors import (
    EMBEDDING_NORM,
    FINAL_NORM,
    LINEAR_PARTS,
    POSITIONS,
    TYPES,
    has_norm,
    norm_names,
)
from ..models.decoders import DecoderConfig
from .student import activation, attention


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., seq, head_dim) with its first features rotated: feature j and feature j + half by one angle.

    cos, sin : (..., seq, half)
    """
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


@dataclass(frozen=True)
class DecoderStudent:
    """What a forward pass needs beside the weights.

    Attributes
    ----------
    config : the settings
    rotary : the model's tables of angles, by type of layer
    """

    config: DecoderConfig
    rotary: Mapping[str, RBERotary]

    @classmethod
    def of(cls, model: Decoder) -> DecoderStudent:
        return cls(model.settings, model.rotary)

    def states(self, weights: Mapping[str, Tensor], words: Tensor, text: Tensor) -> list[Tensor]:
        """Hidden states after the embeddings and after each layer, the last normalised, (batch, seq, hidden) each.

        Parameters
        ----------
        words : (batch, seq, hidden) rows of the word embeddings
        text : (batch, seq) bool, false in the padding, which is behind the text
        """
        c = self.config
        seq = words.shape[1]
        x = words * c.embedding_scale if c.embedding_scale != 1.0 else words
        if c.learned_positions:
            x = x + weights[POSITIONS][:seq]
        if c.token_types:
            x = x + weights[TYPES][0]
        if c.embedding_norm:
            x = self._norm(weights, x, EMBEDDING_NORM)
        states = [x]
        seen = {window: self._seen(window, text) for window in set(c.windows)}
        angles = {kind: self._angles(rotary, text) for kind, rotary in self.rotary.items()}
        first, second, *others = norm_names(c)
        for i in range(c.num_layers):
            at = f"model.layers.{i}."

            def norm(y: Tensor, name: str, at: str = at) -> Tensor:
                return self._norm(weights, y, at + name)

            mask, turn = seen[c.windows[i]], angles.get(c.layer_type(i))
            if c.post_norm:
                x = norm(x + self._attention(weights, x, at, mask, turn), first)
                x = norm(x + self._ffn(weights, x, at), second)
            else:
                h = norm(x, first) if has_norm(c, i, first) else x
                y = self._attention(weights, h, at, mask, turn)
                if c.sandwich:
                    x = x + norm(y, second)
                    x = x + norm(self._ffn(weights, norm(x, others[0]), at), others[1])
                else:
                    x = x + y
                    x = x + self._ffn(weights, norm(x, second), at)
            states.append(x)
        if not c.post_norm:
            states[-1] = self._norm(weights, x, FINAL_NORM)
        return states

    def _norm(self, weights: Mapping[str, Tensor], x: Tensor, name: str) -> Tensor:
        c, gain = self.config, weights[f"{name}.weight"]
        if c.norm == "layer":
            return functional.layer_norm(x, gain.shape, gain, weights.get(f"{name}.bias"), c.eps)
        x = x.float()
        return (
            x * torch.rsqrt(x.square().mean(-1, keepdim=True) + c.eps) * (gain + 1.0 if c.sandwich else gain)
        )

    def _linear(self, weights: Mapping[str, Tensor], x: Tensor, at: str, part: str) -> Tensor:
        name = at + LINEAR_PARTS[part]
        return functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def _attention(
        self,
        weights: Mapping[str, Tensor],
        x: Tensor,
        at: str,
        seen: Tensor,
        angles: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        c = self.config
        batch, seq, _ = x.shape
        q, k, v = (
            self._linear(weights, x, at, part).view(batch, seq, -1, c.head_dim)
            for part in ("query", "key", "value")
        )
        if c.head_norms:
            q, k = (self._norm(weights, y, f"{at}self_attn.{n}") for y, n in ((q, "q_norm"), (k, "k_norm")))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        if angles is not None:
            q, k = _rotated(q, *angles), _rotated(k, *angles)
        groups = c.num_heads // c.num_kv_heads
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        heads = attention(q, k.to(q.dtype), v.to(q.dtype), seen, c.scale, c.attention_softcap)
        return self._linear(weights, heads.transpose(1, 2).reshape(batch, seq, -1), at, "output")

    def _ffn(self, weights: Mapping[str, Tensor], x: Tensor, at: str) -> Tensor:
        c = self.config
        inner = self._linear(weights, x, at, "up")
        if c.gated:
            inner = activation(GATED[c.activation])(self._linear(weights, x, at, "gate")) * inner
        else:
            inner = activation(c.activation)(inner)
        return self._linear(weights, inner, at, "down")

    def _seen(self, window: int | None, text: Tensor) -> Tensor:
        """Which keys a query sees, bool (1 or batch, 1, seq, seq). A query sees itself, also in the padding: without
        any key its result would be NaN, and so would gradients.
        """
        index = torch.arange(text.shape[1], device=text.device)
        before = index[:, None] - index  # tokens from the key to the query
        if self.config.causal:  # padding is behind the text: no token sees it
            seen = before >= 0 if window is None else (before >= 0) & (before < window)
            return seen[None, None]
        keys = text[:, None, None, :]
        seen = keys if window is None else keys & (before.abs() < window)
        return seen | (before == 0)

    def _angles(self, rotary: RBERotary, text: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (1 or batch, 1, seq, rotary_dim/2)."""
        seq, context = text.shape[1], self.config.first_context
        if context is not None and seq <= context:
            context = None
        tables = rotary.tables(seq + (context or 0))
        cos, sin = (torch.from_numpy(np.asarray(table)).to(text.device) for table in tables)
        positions = torch.arange(seq, device=text.device)[None]
        if context is not None:  # texts beyond the first context have rotations of their own
            positions = positions + context * (text.sum(1, keepdim=True) > context)
        return cos[positions][:, None], sin[positions][:, None]

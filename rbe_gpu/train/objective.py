"""How far the student is from the teacher on a batch. Of models that make vectors

    loss = 3 mean_i (1 - <u_i, v_i>) + mean_l |x_l - y_l|^2 / |y_l|^2 + 5 mean_ij (<u_i, u_j> - <v_i, v_j>)^2

u, v are the unit vectors of the texts, x_l, y_l the hidden states after layer l of student and teacher; padding is
left out. The states give every layer a gradient of its own; similarities within the batch are what a search compares
(Park et al. 2019, "Relational knowledge distillation"; Wang et al. 2020, "MiniLM"). Of models that predict tokens

    loss = kl + mean_l mean_i |x_li - y_li|^2 / |y_li|^2

over tokens i, with the divergence of `prediction`. Every token counts alike there: the states of a few, the first
ones above all, are thousands of times as large as those of others (Sun et al. 2024, "Massive activations in large
language models").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Loss(NamedTuple):
    """The loss to minimise, and the mean cosine and the mean relative error of the states that it consists of."""

    total: Tensor
    cosine: Tensor
    states: Tensor


def loss(
    vectors: Tensor, states: Sequence[Tensor], teacher: Tensor, teacher_states: Sequence[Tensor], text: Tensor
) -> Loss:
    """
    Parameters
    ----------
    vectors, teacher : (batch, size) unit vectors
    states, teacher_states : (batch, seq, hidden) each
    text : (batch, seq) bool, false in the padding
    """
    keep = text[..., None]
    errors = [
        ((x - y) * keep).square().sum() / (y * keep).square().sum()
        for x, y in zip(states, teacher_states, strict=True)
    ]
    relative = sum(errors[1:], errors[0]) / len(errors)
    cosine = (vectors * teacher).sum(1).mean()
    similar = (vectors @ vectors.T - teacher @ teacher.T).square().mean()
    return Loss(3 * (1 - cosine) + relative + 5 * similar, cosine.detach(), relative.detach())


#: A token's squared norm counts as at least this part of the layer's mean: a row of zeros has no relative error
_SMALLEST_NORM = 1e-3


def relative_error(states: Sequence[Tensor], teacher_states: Sequence[Tensor], text: Tensor) -> Tensor:
    """Mean over layers and tokens of |x - y|^2 / |y|^2.

    Parameters
    ----------
    states, teacher_states : (batch, seq, hidden) each
    text : (batch, seq) bool, false in the padding
    """
    errors = []
    for x, y in zip(states, teacher_states, strict=True):
        norms = y.float().square().sum(-1)
        smallest = _SMALLEST_NORM * norms[text].mean()
        errors.append(((x - y).float().square().sum(-1) / norms.clamp(min=smallest))[text].mean())
    return sum(errors[1:], errors[0]) / len(errors)

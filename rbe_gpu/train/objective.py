"""How far the student is from the teacher on a batch.

    loss = 3 mean_i (1 - <u_i, v_i>) + mean_l |x_l - y_l|^2 / |y_l|^2 + 5 mean_ij (<u_i, u_j> - <v_i, v_j>)^2

u, v are the unit vectors of the texts, x_l, y_l the hidden states after layer l of student and teacher; padding is
left out. The states give every layer a gradient of its own; similarities within the batch are what a search compares
(Park et al. 2019, "Relational knowledge distillation"; Wang et al. 2020, "MiniLM").
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

"""The divergence of a student's predictions from the teacher's, without the logits of all tokens in memory.

    kl = mean_i sum_t P_i(t) ln (P_i(t) / Q_i(t)),    P_i = softmax(cap(y_i V^T)),  Q_i = softmax(cap(x_i W^T))

x, y are the last states of student and teacher, W, V their output matrices, cap(z) = c tanh(z / c) where the model
has a soft cap. With s = cap(z) the gradient is d kl / d z_i = (Q_i - P_i) (1 - (s_i / c)^2) / tokens. It is known as
soon as the logits are, so that both are computed in one pass over chunks of tokens, and no logits are stored for the
backward pass (as Liger-Kernel's fused linear cross entropy does: Hsu et al. 2024).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Logits of a chunk, 64 MB in float32, of which there are five arrays at most: 341 tokens of a vocabulary of 49,152,
#: 64 of one of 262,144
_LOGITS = 1 << 24


class Sums(NamedTuple):
    """Over tokens: divergence in nats, and at how many both have the same most probable token; ()."""

    kl: Tensor
    same: Tensor


def _logits(states: Tensor, head: Tensor, softcap: float | None) -> Tensor:
    logits = states @ head.T
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def divergence(
    states: Tensor,
    head: Tensor,
    teacher: Tensor,
    teacher_head: Tensor,
    softcap: float | None,
    gradients: tuple[Tensor, Tensor] | None = None,
) -> Sums:
    """
    Parameters
    ----------
    states, teacher : (tokens, hidden) float32
    head, teacher_head : (vocab_size, hidden) float32
    gradients : like states and head: where the gradients of the sum of the divergence are written and added
    """
    kl, same = (torch.zeros((), device=states.device) for _ in range(2))
    rows = max(1, _LOGITS // len(head))
    for start in range(0, len(states), rows):
        part = slice(start, start + rows)
        s, t = _logits(states[part], head, softcap), _logits(teacher[part], teacher_head, softcap)
        same += (s.argmax(1) == t.argmax(1)).sum()
        capped = None if softcap is None or gradients is None else s.div(softcap).square_()
        s -= torch.logsumexp(s, 1, keepdim=True)
        t -= torch.logsumexp(t, 1, keepdim=True)
        p = t.exp()
        kl += p.mul(t.sub_(s)).sum()
        if gradients is not None:
            error = s.exp_().sub_(p)
            if capped is not None:
                error.mul_(capped.neg_().add_(1))
            torch.mm(error, head, out=gradients[0][part])
            gradients[1].addmm_(error.T, states[part])
    return Sums(kl, same)


class _Divergence(torch.autograd.Function):  # type: ignore[misc]
    """Mean divergence, and the fraction of tokens with the same most probable token."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        gradients = torch.empty_like(states), torch.zeros_like(head)
        sums = divergence(states, head, teacher, teacher_head, softcap, gradients)
        ctx.save_for_backward(*gradients)
        ctx.tokens = len(states)
        same = sums.same / len(states)
        ctx.mark_non_differentiable(same)
        return sums.kl / len(states), same

    @staticmethod
    def backward(ctx: Any, of_kl: Tensor, of_same: Tensor) -> tuple[Tensor | None, ...]:
        states, head = ctx.saved_tensors
        factor = of_kl / ctx.tokens
        return states * factor, head * factor, None, None, None


def divergence_loss(
    states: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Mean divergence in nats, with gradients for states and head, and the top-1 agreement; both ().

    Parameters and memory are those of `divergence`, and two arrays like head: its gradient, times a factor.
    """
    kl, same = _Divergence.apply(states, head, teacher, teacher_head, softcap)
    return kl, same

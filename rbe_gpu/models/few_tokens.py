"""A few tokens through an encoder in a single call, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from ..blocks import Array
from ..dispatch import CPU
from ..threads import get_num_threads
from ..workspace import Workspace

if TYPE_CHECKING:
    from .bert import BertEncoder


def few_tokens(
    model: BertEncoder, embed: Callable[[Array, Array], None], cu_seqlens: NDArray[np.int64], ws: Workspace
) -> Array | None:
    """The last hidden states of packed texts.

    Parameters
    ----------
    embed : writes the normalised embeddings of the tokens (tokens, hidden_size) to its first argument; the second is
        scratch memory of the same shape
    cu_seqlens : (texts + 1,)

    Returns
    -------
    (tokens, hidden_size) float32 in scratch memory, or None where the texts have to go op by op: on a GPU, with
    states of a half type, of many tokens, with weights that are decoded, and if a state is not finite.
    """
    if model.device != "cpu" or model.dtype != np.float32:
        return None
    tokens = int(cu_seqlens[-1])
    module = CPU.module("encoder_step")
    if not module.takes(tokens, model.hidden_size):
        return None
    step = _step_of(model, module, module.rounded_tokens(tokens), ws)
    if not step.supported:
        return None
    x = step.x[:tokens]
    embed(x, step.y[:tokens])
    mask = model.attention_mask()
    if mask is not None:
        mask = np.broadcast_to(mask, (cu_seqlens.size - 1, *mask.shape))
    return cast(Array, x) if step.run(cu_seqlens, mask, ws) else None


def _step_of(model: BertEncoder, module: Any, tokens: int, ws: Workspace) -> Any:
    """The `EncoderStep` of a model for so many tokens, made once for a number of threads and the costs that
    algorithms are chosen by."""
    threads = get_num_threads()

    def make(buffer: Callable[[int], Any]) -> Any:
        layers = []
        for attention, attention_norm, ffn, ffn_norm in model.layers:
            part = attention.projections(tokens, model.dtype)
            layers.append(
                module.StepLayer(
                    *map(
                        module.StepLinear.of,
                        (part.query, part.key, part.value, part.output, ffn.up, ffn.down),
                    ),
                    norms=[attention_norm.weight, attention_norm.bias, ffn_norm.weight, ffn_norm.bias],
                )
            )
        first = model.layers[0][0]
        return module.EncoderStep(
            layers, float(model.config["layer_norm_eps"]), first.num_heads, first.head_dim,
            1 / sqrt(first.head_dim), tokens, threads, buffer,
        )  # fmt: skip

    return ws.arguments.get(ws, "encoder.step", (tokens, threads, CPU.module("matmul_costs").costs()), make)

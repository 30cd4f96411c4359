"""One token of one text through a decoder in a single call, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from .. import ops
from ..blocks import Array
from ..dispatch import CPU
from ..layers import RBERMSNorm
from ..threads import get_num_threads
from ..workspace import Workspace
from .decoder_tensors import LINEAR_PARTS

if TYPE_CHECKING:
    from ..layers import KVCache
    from .decoder import Decoder


def one_token(model: Decoder, ids: NDArray[np.int64], cache: KVCache) -> Array | None:
    """The last hidden states of a text's next token, normalised; the cache has the token afterwards.

    Parameters
    ----------
    ids : (1,), the token
    cache : of this model

    Returns
    -------
    (1, hidden_size) float32 in scratch memory, or None where the token has to go op by op: on a GPU, with states of a
    half type, with weights that are decoded, with LayerNorms that have no bias, of an encoder, and if a state is not
    finite.

    Raises
    ------
    ValueError
        The cache has no room.
    """
    c = model.settings
    if model.device != "cpu" or model.dtype != np.float32 or cache.batch != 1:
        return None
    if c.norm != "rms" and not c.norm_bias:
        return None
    if not c.causal or c.post_norm or c.embedding_norm or c.token_types:
        return None
    cache.check_room(np.ones(1, np.int64))
    position = int(cache.lengths[0])
    if position >= model.settings.max_positions:
        return None
    workspace = model.workspace
    step = _step_of(model, workspace)
    if not step.supported:
        return None
    model._embed(ids, step.x, workspace)
    if model.position_embeddings is not None:
        row = workspace.get("decoder.y", step.x.shape, step.x.dtype)
        ops.add(step.x, model._rows(model.position_embeddings, cache.lengths[:1], row, workspace), out=step.x)
    first = int(c.first_context or 0) if cache.long[0] else 0  # row of position 0
    tables = []
    for rotary in model.rotary.values():
        cos, sin = rotary.tables(first + position + 1)
        tables.append((cos[first:], sin[first:]) if first else (cos, sin))
    if not step.run(position, cache.memory, tables):
        return None
    cache.lengths += 1
    return cast(Array, step.x)


def _step_of(model: Decoder, workspace: Workspace) -> Any:
    """The `DecoderStep` of a model, made once for a number of threads and the costs that algorithms are chosen by."""
    threads = get_num_threads()
    module = CPU.module("decoder_step")

    def make(buffer: Callable[[int], Any]) -> Any:
        c, kinds = model.settings, list(model.rotary)

        def gain(norm: RBERMSNorm | None) -> Any:
            return None if norm is None else norm.weight

        def biases(norms: Iterable[Any]) -> list[Any]:
            return [] if c.norm == "rms" else [norm.bias for norm in norms]

        layers = []
        for i, layer in enumerate(model.layers):
            window = c.windows[i]
            layers.append(
                module.StepLayer(
                    norms=[norm.weight for norm in layer.norms],
                    biases=biases(layer.norms),
                    **{
                        part: module.StepLinear.of(layer.linear(part)) if c.gated or part != "gate" else None
                        for part in LINEAR_PARTS
                    },
                    query_norm=gain(layer.attention.query_norm),
                    key_norm=gain(layer.attention.key_norm),
                    window=-1 if window is None else window - 1,
                    rotary=kinds.index(c.layer_type(i)) if kinds else 0,
                )
            )
        return module.DecoderStep(
            layers, [model.final_norm.weight, *biases([model.final_norm])], c.eps, c.num_heads, c.num_kv_heads,
            c.head_dim, model.rotary[kinds[0]].rotary_dim if kinds else 0, c.scale, c.attention_softcap or 0.0,
            threads, buffer,
        )  # fmt: skip

    return workspace.arguments.get(
        workspace, "decoder.step", (threads, CPU.module("matmul_costs").costs()), make
    )

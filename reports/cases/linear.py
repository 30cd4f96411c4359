"""y = x W^T + b: the model's own shapes, and 768 wide ones tiled from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

import rbe_gpu as rbe

from ..inputs import Inputs
from ..peers import F32, torch_or_none
from . import DENSE, DENSE_NEW, NUMPY, TORCH, Case, Rival

#: provider -> how the weight is compressed
CODES: dict[str, dict[str, Any]] = {
    "rbe_gpu dense-int8": {"codes": "dense-int8"},
    "rbe_gpu dense-int4": {"codes": "dense-int4"},
    "rbe_gpu sparse-int8, 25% kept": {"codes": "sparse-int8", "kept": 0.25},
    "rbe_gpu sparse-int8, 5% kept": {"codes": "sparse-int8", "kept": 0.05},
}


def cases(inputs: Inputs, quick: bool = False) -> Iterator[Case]:
    bias = np.concatenate([inputs.bias(0, "attention.self.query"), inputs.bias(0, "attention.self.key")])
    up, up_bias = inputs.weight(0, "intermediate.dense"), inputs.bias(0, "intermediate.dense")
    square = inputs.square()
    if quick:
        yield _case("768x768, 64 tokens", inputs.wide_rows(64), square, bias)
        return
    for tokens in (64, 512):
        yield _case(f"768x768, {tokens} tokens", inputs.wide_rows(tokens), square, bias)
    # the inputs of a layer's FFN are close to those of the next layer: both are the output of a norm
    yield _case("1536x384, 512 tokens", inputs.rows("1.x", 512), up, up_bias)
    yield _case("3072x768, 512 tokens", inputs.wide_rows(512), inputs.tall(), np.tile(up_bias, 2))


def _case(name: str, x: F32, weight: F32, bias: F32) -> Case:
    out_features, in_features = weight.shape
    expected = x @ weight.T + bias
    numpy_out: F32 = np.empty_like(expected)
    rbe_out = np.empty_like(expected)
    workspace = rbe.Workspace()

    def in_numpy() -> F32:
        np.matmul(x, weight.T, out=numpy_out)
        np.add(numpy_out, bias, out=numpy_out)
        return numpy_out

    rivals = {NUMPY: Rival(in_numpy)}
    torch = torch_or_none()
    if torch is not None:
        tx, tw, tb = (torch.from_numpy(a) for a in (x, weight, bias))
        rivals[TORCH] = Rival(lambda: torch.nn.functional.linear(tx, tw, tb), expected)
    rivals[DENSE] = Rival(lambda: rbe.linear(x, weight, bias, out=rbe_out, workspace=workspace), expected)
    rivals[DENSE_NEW] = Rival(lambda: rbe.linear(x, weight, bias), expected)
    for provider, options in CODES.items():
        m = rbe.compress(weight, **options)
        report = m.error_report(weight)
        rivals[provider] = Rival(
            lambda m=m: rbe.linear(x, m, bias, out=rbe_out, workspace=workspace),  # type: ignore[misc]
            x @ m.decode().T + bias,
            {"weight_error": (report.relative_error, ""), "bits_per_weight": (m.bits_per_weight, "bit")},
        )
    return Case("linear", name, f"({len(x)}, {in_features}) x ({out_features}, {in_features})", rivals)

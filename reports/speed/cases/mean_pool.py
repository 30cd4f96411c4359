"""y[b] = mean over the tokens of text b: MiniLM's last hidden states of 32 texts, padded."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

import rbe_gpu as rbe

from ...harness.baselines import F32, torch_or_none
from ...harness.inputs import Inputs
from . import DENSE, NUMPY, TORCH, Case, Provider


def cases(inputs: Inputs, quick: bool = False) -> Iterator[Case]:
    lengths = inputs.batch[1]
    states = np.ascontiguousarray(inputs.activations["5.x"])
    batch, seq, cols = states.shape
    out, numpy_out = np.empty((batch, cols), np.float32), np.empty((batch, cols), np.float32)

    def in_numpy() -> F32:
        for row, tokens, length in zip(numpy_out, states, lengths, strict=True):
            tokens[:length].mean(axis=0, out=row)
        return numpy_out

    providers = {NUMPY: Provider([in_numpy])}
    expected = in_numpy().copy()
    torch = torch_or_none()
    if torch is not None:
        t = torch.from_numpy(states)
        mask = torch.from_numpy((np.arange(seq) < lengths[:, None]).astype(np.float32))[:, :, None]
        providers[TORCH] = Provider(
            [lambda: (t * mask).sum(1) / mask.sum(1)], expected
        )  # as sentence-transformers
    providers[DENSE] = Provider([lambda: rbe.mean_pool(states, lengths, out=out)], expected)
    yield Case("mean_pool", f"{batch} texts of up to {seq} tokens", str(states.shape), providers)

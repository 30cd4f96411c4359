"""Rotary position embedding of MiniLM's queries, taken as heads of 64 features: the two ways to pair them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

import rbe_gpu as rbe

from ...harness.baselines import F32, torch_or_none
from ...harness.inputs import Inputs
from . import DENSE, DENSE_NEW, NUMPY, TORCH, Case, Provider

TOKENS = (64, 2048)
HEAD_DIM, THETA = 64, 10000.0


def cases(inputs: Inputs, quick: bool = False) -> Iterator[Case]:
    for tokens in TOKENS[:1] if quick else TOKENS:
        x = inputs.rows("2.q", tokens).reshape(tokens, -1, HEAD_DIM)
        for interleaved in (False, True):
            yield _case(x, interleaved)


def _case(x: F32, interleaved: bool) -> Case:
    tokens, heads, _ = x.shape
    angles = np.outer(np.arange(tokens), THETA ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    c, s = cos[:, None], sin[:, None]
    half = HEAD_DIM // 2
    a, b = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(half), slice(half, None))
    numpy_out, product, out = np.empty_like(x), np.empty_like(x[..., a]), np.empty_like(x)

    def in_numpy() -> F32:
        for first, second, accumulate in ((a, b, np.subtract), (b, a, np.add)):
            result = numpy_out[..., first]
            np.multiply(x[..., first], c, out=result)
            accumulate(result, np.multiply(x[..., second], s, out=product), out=result)
        return numpy_out

    providers = {NUMPY: Provider([in_numpy])}
    expected = in_numpy().copy()
    torch = torch_or_none()
    if torch is not None:
        repeat = "repeat_interleave" if interleaved else "repeat"
        t = torch.from_numpy(x)
        tc, ts = (
            getattr(torch.from_numpy(table), repeat)(*((2, 1) if interleaved else (1, 2)))[:, None]
            for table in (cos, sin)
        )

        def in_torch() -> Any:  # as Hugging Face's transformers: x cos + rotate_half(x) sin
            rotated = torch.stack if interleaved else torch.cat
            return t * tc + rotated((-t[..., b], t[..., a]), -1).reshape(t.shape) * ts

        providers[TORCH] = Provider([in_torch], expected)
    providers[DENSE] = Provider([lambda: rbe.rope(x, cos, sin, None, interleaved, out)], expected)
    providers[DENSE_NEW] = Provider([lambda: rbe.rope(x, cos, sin, None, interleaved)], expected)
    name = f"{tokens} tokens, {heads} x {HEAD_DIM}{', interleaved' * interleaved}"
    return Case("rope", name, str(x.shape), providers)

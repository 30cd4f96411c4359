"""softmax(q k^T / sqrt(head_dim)) v: a padded batch, sequences of 512 to 8192 tokens, and their memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import rbe_gpu as rbe

from ...harness.baselines import attention as numpy_attention
from ...harness.baselines import torch_or_none
from ...harness.inputs import Inputs
from ...harness.memory import extra_bytes
from ...harness.rows import Row, Session
from . import DENSE, NUMPY, TORCH, Case, Provider

LAYER = 2
LONG = 8192
#: tokens -> values of a token: of the longest sequences few heads are enough, or NumPy takes minutes
SEQUENCES = {512: 384, 1024: 384, 2048: 384, 8192: 64}
HEAD_DIMS = (32, 64)


def cases(inputs: Inputs, quick: bool = False) -> Iterator[Case]:
    lengths = inputs.batch[1]
    q, k, v = (np.ascontiguousarray(inputs.activations[f"{LAYER}.{n}"]) for n in "qkv")
    if quick:
        q, k, v, lengths = q[:4], k[:4], v[:4], lengths[:4]
    yield _case(f"{len(q)} texts, padded to {q.shape[1]} tokens", q, k, v, lengths, False)
    if not quick:
        for tokens, width in SEQUENCES.items():
            for head_dim in HEAD_DIMS:
                rows = (inputs.rows(f"{LAYER}.{n}", tokens)[:, :width] for n in "qkv")
                q, k, v = (np.ascontiguousarray(a).reshape(1, tokens, -1, head_dim) for a in rows)
                for causal in (False, True):
                    name = f"{tokens} tokens, {width // head_dim} x {head_dim}{', causal' * causal}"
                    yield _case(name, q, k, v, None, causal)


def _case(name: str, q: Any, k: Any, v: Any, lengths: Any, causal: bool) -> Case:
    out = np.empty_like(q)
    workspace = rbe.Workspace()
    expected = numpy_attention(q, k, v, lengths, causal)
    real = np.ones(q.shape[:2], bool) if lengths is None else np.arange(q.shape[1]) < lengths[:, None]

    def ours() -> Any:
        return rbe.attention(q, k, v, causal=causal, lengths=lengths, out=out, workspace=workspace)

    providers = {NUMPY: Provider([lambda: numpy_attention(q, k, v, lengths, causal)])}
    torch = torch_or_none()
    if torch is not None:
        tq, tk, tv = (torch.from_numpy(a).transpose(1, 2) for a in (q, k, v))
        mask = None if lengths is None else torch.from_numpy(real)[:, None, None, :]

        def in_torch() -> Any:
            with torch.inference_mode():
                o = torch.nn.functional.scaled_dot_product_attention(tq, tk, tv, mask, is_causal=causal)
            return o.transpose(1, 2)

        providers[TORCH] = Provider([in_torch], expected)
    providers[DENSE] = Provider([ours], expected)
    return Case("attention", name, str(q.shape), providers)


# --- memory -------------------------------------------------------------------------------------------------


def long_attention(folder: str, provider: str, attended: int, threads: int) -> None:
    """In a process of its own: hold q, k, v and out of the long sequence, attend among the first `attended`."""
    q, k, v = (np.load(Path(folder) / f"{n}.npy") for n in "qkv")
    out = np.zeros_like(q)
    n = attended
    if provider == NUMPY:
        out[:, :n] = numpy_attention(q[:, :n], k[:, :n], v[:, :n])
    elif provider == TORCH:
        torch = torch_or_none()
        torch.set_num_threads(threads)
        tq, tk, tv = (torch.from_numpy(a[:, :n]).transpose(1, 2) for a in (q, k, v))
        with torch.inference_mode():
            o = torch.nn.functional.scaled_dot_product_attention(tq, tk, tv)
        out[:, :n] = o.transpose(1, 2).numpy()
    else:
        rbe.attention(q[:, :n], k[:, :n], v[:, :n], out=out[:, :n])


def memory(inputs: Inputs, session: Session, scratch: Path, quick: bool = False) -> Iterator[Row]:
    """Peak memory of attention over 8192 tokens (1024 when quick), beyond its inputs and its result.

    Two processes hold the same arrays; one attends among 64 tokens, the other among all. The difference of
    their peaks is what attention itself needs.
    """
    tokens = 1024 if quick else LONG
    for n in "qkv":
        np.save(scratch / f"{n}.npy", inputs.sequence(f"{LAYER}.{n}", tokens))
    heads, head_dim = inputs.activations[f"{LAYER}.q"].shape[2:]
    providers = [DENSE, NUMPY] + ([TORCH] if torch_or_none() is not None else [])
    for provider in providers:
        common = {"folder": str(scratch), "provider": provider, "threads": session.threads}
        extra = extra_bytes(
            f"{__name__}:long_attention", {**common, "attended": tokens}, {**common, "attended": 64}
        )
        yield session.row(
            "attention", f"{tokens} tokens", provider, "peak_memory", "B", float(extra),
            shape=str((1, tokens, heads, head_dim)),
        )  # fmt: skip

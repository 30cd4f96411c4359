"""attention in float16: FLOP per second beside every backend of PyTorch's scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

import rbe_gpu as rbe
from rbe_gpu import reference, registry

from ..bench import speeds
from ..inputs import Inputs
from .device import OURS, TORCH, Device, attempt, sampled
from .stage import Result

#: as FlashAttention-2 was measured: hidden size 2048, 16k tokens in a batch (Dao 2023, section 4.1)
HIDDEN, TOKENS = 2048, 16384
SEQUENCES = (1024, 2048, 4096, 8192, 16384)
QUICK_HIDDEN, QUICK_TOKENS, QUICK_SEQUENCES = 128, 256, (64, 128)
HEAD_DIMS = (64, 128)
DTYPE = "float16"
SAMPLE = 24  # queries that are compared with the float64 reference, of two heads
TORCH_TOLERANCE = 2e-3
BACKENDS = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}


@dataclass(frozen=True)
class Case:
    batch: int
    seq: int
    heads: int
    head_dim: int
    causal: bool

    @property
    def name(self) -> str:
        return f"{self.seq} tokens, head_dim {self.head_dim}, {'causal' if self.causal else 'full'}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.seq, self.heads, self.head_dim

    @property
    def flops(self) -> float:
        """Two products of 2 seq^2 head_dim each, of which a causal mask leaves half, as FlashAttention counts."""
        return 4.0 * self.batch * self.heads * self.seq**2 * self.head_dim / (2 if self.causal else 1)


def cases(quick: bool = False) -> Iterator[Case]:
    hidden, tokens = (QUICK_HIDDEN, QUICK_TOKENS) if quick else (HIDDEN, TOKENS)
    for head_dim in HEAD_DIMS:
        for causal in (False, True):
            for seq in QUICK_SEQUENCES if quick else SEQUENCES:
                yield Case(tokens // seq, seq, hidden // head_dim, head_dim, causal)


def measure(device: Device, inputs: Inputs, result: Result) -> None:
    real = [inputs.rows(f"2.{n}", 2048).reshape(-1).astype(registry.DTYPES[DTYPE]) for n in "qkv"]
    for case in cases(device.quick):
        q, k, v = (np.resize(a, case.shape) for a in real)
        attempt(device, result, f"attention, {case.name}", partial(one, device, case, q, k, v, result))


def one(
    device: Device, case: Case, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], result: Result
) -> None:
    """A backend that PyTorch does not have for the case is told."""
    q_there, k_there, v_there = (device.array(a) for a in (q, k, v))
    out = device.array(np.zeros_like(q))
    workspace = rbe.Workspace()
    ours = partial(rbe.attention, q_there, k_there, v_there, case.causal, out=out, workspace=workspace)
    rivals: dict[str, list[Callable[[], Any]]] = {OURS: [ours]}
    places = [
        (b, i, h) for b, h in ((0, 0), (case.batch - 1, case.heads - 1)) for i in sampled(case.seq, SAMPLE)
    ]
    expected = np.stack([_query(case, q, k, v, *place) for place in places])
    tol = registry.OPS["attention"].tolerances[DTYPE]
    what = f"attention, {case.name}"
    errors = {OURS: device.check(f"{what}: {OURS}", rivals[OURS][0](), expected, tol.rel, tol.floor, places)}
    if device.torch is not None:
        tensors = [device.tensor(np.ascontiguousarray(a.transpose(0, 2, 1, 3))) for a in (q, k, v)]
        swapped = [(b, h, i) for b, i, h in places]
        for name in BACKENDS:
            provider = f"{TORCH} {name}"
            call = _sdpa(device.torch, name, tensors, case.causal)
            try:
                found = call()
            except RuntimeError as error:
                result.say(f"{what}: no {provider}: {str(error).strip().splitlines()[0]}")
                continue
            errors[provider] = device.check(
                f"{what}: {provider}", found, expected, TORCH_TOLERANCE, sample=swapped
            )
            rivals[provider] = [call]
    times = device.times(rivals)

    def row(provider: str, metric: str, unit: str, values: Any) -> None:
        device.row("attention", case.name, provider, metric, unit, values, str(case.shape), DTYPE)

    for provider, seen in times.items():
        row(provider, "relative_error", "", errors[provider])
        row(provider, "time", "s", seen)
        row(provider, "rate", "FLOP/s", [case.flops / t for t in seen])
        if provider != OURS:
            row(OURS, f"speed_vs_{provider}", "x", speeds(times, provider)[OURS])
    others = {p: float(np.median(t)) for p, t in times.items() if p != OURS}
    if others:
        best = min(others, key=lambda p: others[p])
        row(OURS, f"speed_vs_{TORCH}", "x", speeds(times, best)[OURS])


def _query(
    case: Case, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], batch: int, query: int, head: int
) -> NDArray[np.float64]:
    """What one query of one head must give, in float64."""
    stop = query + 1 if case.causal else case.seq
    one = (slice(batch, batch + 1), slice(query, query + 1), slice(head, head + 1))
    keys = (slice(batch, batch + 1), slice(0, stop), slice(head, head + 1))
    found: NDArray[np.float64] = reference.attention(q[one], k[keys], v[keys])[0, 0, 0]
    return found


def _sdpa(torch: Any, backend: str, tensors: list[Any], causal: bool) -> Callable[[], Any]:
    """scaled_dot_product_attention by one backend alone, on (batch, heads, seq, head_dim)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = getattr(SDPBackend, BACKENDS[backend])
    function = torch.nn.functional.scaled_dot_product_attention

    def call() -> Any:
        with sdpa_kernel(chosen):
            return function(*tensors, is_causal=causal)

    return call

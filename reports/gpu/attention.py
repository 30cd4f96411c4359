"""attention in float16: FLOP per second beside every backend of PyTorch's scaled_dot_product_attention.

On a Hopper GPU, the kernels by wgmma beside those by mma.sync, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

import rbe_gpu as rbe
from rbe_gpu import reference, registry
from rbe_gpu.gpu import attention as launcher
from rbe_gpu.gpu import attention_wgmma

from ..harness.inputs import Inputs
from ..harness.measure import OURS, TORCH, Case, Provider
from ..harness.timing import speedups
from .device import Device, capability, is_baseline, run_cases, sampled
from .stage import Result

#: the sizes of FlashAttention-2's benchmark: hidden size 2048, 16k tokens in a batch (Dao 2023, section 4.1)
HIDDEN, TOKENS = 2048, 16384
SEQUENCES = (8192, 1024, 16384, 4096, 2048)
BESIDE = (8192, 1024)  # of them, where both kernels of a Hopper GPU are timed
QUICK_HIDDEN, QUICK_TOKENS, QUICK_SEQUENCES = 128, 256, (128,)
HEAD_DIMS = (128, 64)
DTYPE = "float16"
SAMPLE = 24  # queries that are compared with the float64 reference, of two heads
TORCH_TOLERANCE = 2e-3
#: providers of the comparison of both kernels, by what is preferred
BY_KERNEL = {kernel: f"{OURS} {kernel}" for kernel in attention_wgmma.KERNELS}
#: the source that each of these kernels is of
SOURCES = {"mma": "attention", "wgmma": "attention_wgmma"}
BACKENDS = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}


@dataclass(frozen=True)
class Attention:
    """One size of an attention."""

    batch: int
    seq: int
    num_heads: int
    head_dim: int
    causal: bool

    @property
    def name(self) -> str:
        return f"{self.seq} tokens, head_dim {self.head_dim}, {'causal' if self.causal else 'full'}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.seq, self.num_heads, self.head_dim

    @property
    def flops(self) -> float:
        """Two matmuls of 2 seq^2 head_dim each, of which a causal mask leaves half, as FlashAttention counts."""
        return 4.0 * self.batch * self.num_heads * self.seq**2 * self.head_dim / (2 if self.causal else 1)


def cases(quick: bool = False, sequences: tuple[int, ...] = SEQUENCES) -> Iterator[Attention]:
    """In the order of their worth: 8192 tokens and a head_dim of 128 are what a target names."""
    hidden, tokens = (QUICK_HIDDEN, QUICK_TOKENS) if quick else (HIDDEN, TOKENS)
    for seq in QUICK_SEQUENCES if quick else sequences:
        for head_dim in HEAD_DIMS:
            for causal in (False, True):
                yield Attention(tokens // seq, seq, hidden // head_dim, head_dim, causal)


def measure(device: Device, inputs: Inputs, result: Result) -> None:
    real = _real(inputs)
    sizes = cases(device.quick)
    run_cases(device, result, [(f"attention, {s.name}", partial(one, device, s, real)) for s in sizes])


def measure_kernels(device: Device, inputs: Inputs, result: Result) -> None:
    """Both kernels of a Hopper GPU, in a process of their own: an error of wgmma loses nothing of `measure`."""
    if capability() != attention_wgmma.CAPABILITY:
        result.say("not a GPU of compute capability 9.0: it has one kernel of attention")
        return
    real = _real(inputs)
    sizes = cases(device.quick, BESIDE)
    run_cases(
        device, result, [(f"attention, {s.name}, wgmma", partial(both, device, s, real)) for s in sizes]
    )


def _real(inputs: Inputs) -> list[NDArray[Any]]:
    """Values of q, k and v."""
    return [inputs.rows(f"2.{n}", 2048).reshape(-1).astype(registry.DTYPES[DTYPE]) for n in "qkv"]


def one(device: Device, size: Attention, real: list[NDArray[Any]]) -> None:
    """One size beside every backend that PyTorch has for it; a backend that it does not have is reported."""
    _compare(device, size, real, size.name)


def both(device: Device, size: Attention, real: list[NDArray[Any]]) -> None:
    """One size by both kernels of a Hopper GPU, in the same rounds: whether wgmma is right, and how much faster.

    Raises
    ------
    RuntimeError
        Another kernel than the one that is asked for would run.
    """
    times = _compare(device, size, real, f"{size.name}, mma beside wgmma", kernels=True)
    mma, wgmma = (float(np.median(times[BY_KERNEL[kernel]])) for kernel in ("mma", "wgmma"))
    device.say(
        f"{size.name}: wgmma {size.flops / wgmma / 1e12:.3g} TFLOP/s, mma {size.flops / mma / 1e12:.3g}"
    )


def _compare(
    device: Device, size: Attention, real: list[NDArray[Any]], name: str, kernels: bool = False
) -> dict[str, list[float]]:
    """Check and time one size, by both kernels (`kernels`) or beside PyTorch's backends, and write the rows.

    Returns
    -------
    provider -> seconds per call
    """
    q, k, v = (np.resize(a, size.shape) for a in real)
    heads = (0, 0), (size.batch - 1, size.num_heads - 1)
    sample = [(b, i, h) for b, h in heads for i in sampled(size.seq, SAMPLE)]
    expected = np.stack([_query(size, q, k, v, *index) for index in sample])
    tol = registry.OPS["attention"].tolerances[DTYPE]
    q_gpu, k_gpu, v_gpu = (device.array(a) for a in (q, k, v))

    def attend() -> Callable[[], Any]:
        """Attention to an array of its own, NaN until a kernel writes it."""
        out, workspace = device.array(np.full_like(q, np.nan)), rbe.Workspace()
        return partial(rbe.attention, q_gpu, k_gpu, v_gpu, size.causal, out=out, workspace=workspace)

    if kernels:
        _require_both(size, q_gpu, k_gpu, v_gpu)
        providers = {
            provider: Provider([partial(_preferring, kernel, attend())], expected, tol.rel, tol.floor)
            for kernel, provider in BY_KERNEL.items()
        }
    else:
        providers = {OURS: Provider([attend()], expected, tol.rel, tol.floor)}
    if device.torch is not None and not kernels:

        def torch() -> dict[str, Provider]:
            tensors = [device.tensor(np.ascontiguousarray(a.transpose(0, 2, 1, 3))) for a in (q, k, v)]
            sdpa = {name: _sdpa(device.torch, name, tensors, size.causal) for name in BACKENDS}
            return {
                f"{TORCH} {name}": Provider([call], expected, TORCH_TOLERANCE) for name, call in sdpa.items()
            }

        providers |= device.baselines(f"attention, {size.name}", torch)
    baselines = (BY_KERNEL["mma"],) if kernels else tuple(p for p in providers if p != OURS)
    case = Case("attention", name, str(size.shape), providers, DTYPE, sample, baselines)
    times = device.measure(case)
    device.rows(
        case, "rate", "FLOP/s", {p: [size.flops / t for t in seconds] for p, seconds in times.items()}
    )
    measured = [p for p in times if is_baseline(p)]
    if measured:
        best = min(measured, key=lambda p: float(np.median(times[p])))
        device.row(case, OURS, f"speed_vs_{TORCH}", "x", speedups(times, best)[OURS])
    if kernels:
        device.row(
            case,
            BY_KERNEL["wgmma"],
            "speed_vs_mma",
            "x",
            speedups(times, BY_KERNEL["mma"])[BY_KERNEL["wgmma"]],
        )
    return times


def _require_both(size: Attention, q: Any, k: Any, v: Any) -> None:
    """Raise a RuntimeError where a kernel that is preferred would not run."""
    scale = size.head_dim**-0.5
    for kernel, source in SOURCES.items():
        with attention_wgmma.preferring(kernel):
            (launch,) = launcher.launches(q, k, v, size.causal, scale, None, None, (-1, -1), q)
        if launch.op != source:
            raise RuntimeError(f"{size.name}: {kernel} is asked for, and {launch.entry} of {launch.op} runs")


def _preferring(kernel: str, call: Callable[[], Any]) -> Any:
    """A call of attention by one of its kernels."""
    with attention_wgmma.preferring(kernel):
        return call()


def _query(
    size: Attention, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], batch: int, query: int, head: int
) -> NDArray[np.float64]:
    """The expected output of one query of one head, in float64."""
    stop = query + 1 if size.causal else size.seq
    one = (slice(batch, batch + 1), slice(query, query + 1), slice(head, head + 1))
    keys = (slice(batch, batch + 1), slice(0, stop), slice(head, head + 1))
    expected: NDArray[np.float64] = reference.attention(q[one], k[keys], v[keys])[0, 0, 0]
    return expected


def _sdpa(torch: Any, backend: str, tensors: list[Any], causal: bool) -> Callable[[], Any]:
    """scaled_dot_product_attention by one backend alone; the result is (batch, seq, heads, head_dim), as ours.

    tensors : q, k, v (batch, heads, seq, head_dim)
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = getattr(SDPBackend, BACKENDS[backend])
    function = torch.nn.functional.scaled_dot_product_attention

    def call() -> Any:
        with sdpa_kernel(chosen):
            return function(*tensors, is_causal=causal).transpose(1, 2)

    return call

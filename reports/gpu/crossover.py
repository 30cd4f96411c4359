"""linear from few tokens to many: products in the domain of the transform beside decoded panels and cuBLAS.

The number of tokens at which decoding W becomes the faster of the two is what a planner for GPUs would need to know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from math import exp, log
from statistics import median
from typing import Any

import numpy as np

import rbe_gpu as rbe
from rbe_gpu import reference, registry

from ..bench import speeds
from ..inputs import Inputs
from .device import OURS, TORCH, Device, attempt, sampled
from .stage import Result
from .weights import QUICK_SHAPE, SAMPLE, TORCH_TOLERANCE, Linear, Weights

SHAPE = (4096, 4096)
TOKENS = (1, 4, 16, 64, 256, 1024)
QUICK_TOKENS = (1, 16, 40)
KEPT = (0.05, 0.12, 0.25, 0.5)
WAYS = ("transform", "decode")
PROVIDERS = {way: f"{OURS} {way}" for way in WAYS}


def series() -> Iterator[tuple[str, str]]:
    """Codes and dtypes: every one is measured at every number of tokens."""
    for codes in ("dense-int4", *(f"sparse-int4, {kept:.0%} kept" for kept in KEPT)):
        yield codes, "float16"
    yield "sparse-int4, 12% kept", "float32"


def cases(codes: str, dtype: str, quick: bool = False) -> Iterator[Linear]:
    for tokens in QUICK_TOKENS if quick else TOKENS:
        yield Linear(QUICK_SHAPE if quick else SHAPE, tokens, codes, dtype)


def crossing(ratios: Mapping[int, float]) -> float | None:
    """Tokens at which a ratio falls through 1, between neighbours as a power of the tokens; None where it does not.

    Parameters
    ----------
    ratios : time of "decode" / time of "transform" by tokens
    """
    ordered = sorted(ratios.items())
    for (t0, r0), (t1, r1) in pairwise(ordered):
        if r0 > 1 >= r1:
            return exp(log(t0) + (log(t1) - log(t0)) * log(r0) / (log(r0) - log(r1)))
    return None


def measure(device: Device, inputs: Inputs, result: Result) -> None:
    """Both ways at every number of tokens, and where they cross."""
    weights = Weights(inputs)
    for codes, dtype in series():
        ratios: dict[int, float] = {}
        shape = ""
        for case in cases(codes, dtype, device.quick):
            shape = "x".join(map(str, case.shape))
            what = f"crossover, {case.name}, {case.dtype}"
            attempt(device, result, what, partial(one, device, case, weights, ratios))
        found = crossing(ratios)
        name = f"{shape}, {codes}"
        if found is not None:
            device.row("linear", name, PROVIDERS["transform"], "crossover", "tokens", found, shape, dtype)
            result.say(f"crossover, {name}, {dtype}: decoding is the faster from {found:.0f} tokens on")
        elif ratios:
            # falling nowhere through 1, the ratio is above it at the last number of tokens, or at none
            faster = "transform" if ratios[max(ratios)] > 1 else "decode"
            result.say(f"crossover, {name}, {dtype}: none; {faster} is the faster at {max(ratios)} tokens")


def one(device: Device, case: Linear, weights: Weights, ratios: dict[int, float]) -> None:
    """One number of tokens; its ratio is added to `ratios`."""
    m = weights.compressed(case.shape, case.codes)
    dtype = registry.DTYPES[case.dtype]
    whole = weights.decoded(case.shape, case.codes, "float32")
    dense = weights.decoded(case.shape, case.codes, case.dtype)
    x = weights.tokens(case.tokens, case.shape[1], case.dtype)
    workspace = rbe.Workspace()
    x_there, out = device.array(x), device.array(np.zeros((case.tokens, case.shape[0]), dtype))
    packed = [rbe.to(m, "cuda") for _ in range(device.copies(m.resident_nbytes))]
    rivals: dict[str, list[Callable[[], Any]]] = {
        PROVIDERS[way]: [
            partial(rbe.linear, x_there, w, out=out, workspace=workspace, method=way) for w in packed
        ]
        for way in WAYS
    }
    sample = sampled(case.tokens, SAMPLE)
    tol = registry.OPS["linear"].tolerances[case.dtype]
    allowed = dict.fromkeys(rivals, (tol.rel, tol.floor))
    right = dict.fromkeys(rivals, reference.linear(x[sample], whole))
    if device.torch is not None:
        linear, tx = device.torch.nn.functional.linear, device.tensor(x)
        rivals[TORCH] = [
            partial(linear, tx, device.tensor(dense)) for _ in range(device.copies(dense.nbytes))
        ]
        allowed[TORCH], right[TORCH] = (TORCH_TOLERANCE, 0.0), reference.linear(x[sample], dense)
    shape = f"({case.tokens}, {case.shape[1]}) x {case.shape}"
    for provider, calls in rivals.items():
        what = f"crossover, {case.name}, {case.dtype}: {provider}"
        error = device.check(what, calls[-1](), right[provider], *allowed[provider], sample)
        device.row("linear", case.name, provider, "relative_error", "", error, shape, case.dtype)
    times = device.times(rivals)
    for provider, seen in times.items():
        device.row("linear", case.name, provider, "time", "s", seen, shape, case.dtype)
        if TORCH in times and provider != TORCH:
            against = speeds(times, TORCH)[provider]
            device.row("linear", case.name, provider, f"speed_vs_{TORCH}", "x", against, shape, case.dtype)
    decode, transform = PROVIDERS["decode"], PROVIDERS["transform"]
    paired = speeds(times, decode)[transform]
    device.row("linear", case.name, transform, "speed_vs_decode", "x", paired, shape, case.dtype)
    ratios[case.tokens] = median(paired)

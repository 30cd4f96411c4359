"""linear from few tokens to many: multiplying in the transform domain beside decoded panels and cuBLAS.

The number of tokens from which decoding W is faster is what the GPU's table of matmul algorithms needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import pairwise
from math import exp, log
from statistics import median

from ..harness.inputs import Inputs
from ..harness.measure import OURS
from ..harness.row_names import DENSITIES
from ..harness.timing import speedups
from .device import Device, run_cases
from .stage import Result
from .weights import QUICK_SHAPE, Linear, LinearSetup, Weights

SHAPE = (4096, 4096)
TOKENS = (1, 4, 16, 64, 256, 1024)
QUICK_TOKENS = (1, 40)
PROVIDERS = {method: f"{OURS} {method}" for method in ("transform", "decode")}


def series(quick: bool = False) -> Iterator[tuple[str, str]]:
    """Codes and dtypes: every one is measured at every number of tokens. quick : two of them"""
    if quick:
        yield from (("dense-int4", "float16"), ("sparse-int4, density 12%", "float32"))
        return
    for codes in ("dense-int4", *(f"sparse-int4, density {density:.0%}" for density in DENSITIES)):
        yield codes, "float16"
    yield "sparse-int4, density 12%", "float32"


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
    """Both methods at every number of tokens, and where they cross."""
    weights = Weights(inputs)
    for codes, dtype in series(device.quick):
        ratios: dict[int, float] = {}
        sizes = list(cases(codes, dtype, device.quick))
        shape = "x".join(map(str, sizes[0].shape))
        run_cases(
            device,
            result,
            [
                (f"crossover, {case.name}, {case.dtype}", partial(one, device, case, weights, ratios))
                for case in sizes
            ],
        )
        tokens = crossing(ratios)
        name = f"{shape}, {codes}"
        if tokens is not None:
            device.write("linear", name, PROVIDERS["transform"], "crossover", "tokens", tokens, shape, dtype)
            result.say(f"crossover, {name}, {dtype}: decoding is the faster from {tokens:.0f} tokens on")
        elif ratios:
            # falling nowhere through 1, the ratio is above it at the last number of tokens, or at none
            faster = "transform" if ratios[max(ratios)] > 1 else "decode"
            result.say(f"crossover, {name}, {dtype}: none; {faster} is the faster at {max(ratios)} tokens")


def one(device: Device, size: Linear, weights: Weights, ratios: dict[int, float]) -> None:
    """One number of tokens; its ratio is added to `ratios`."""
    setup = LinearSetup(device, size, weights)
    providers = {provider: setup.ours(method=method) for method, provider in PROVIDERS.items()}
    case = setup.case({**providers, **setup.torch()})
    times = device.measure(case)
    decode, transform = PROVIDERS["decode"], PROVIDERS["transform"]
    paired = speedups(times, decode)[transform]
    device.row(case, transform, "speed_vs_decode", "x", paired)
    ratios[size.tokens] = median(paired)

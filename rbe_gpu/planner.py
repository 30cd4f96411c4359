"""Which way a product with a compressed weight takes on the CPU, and what each would cost.

    transform   activations to coefficients, times the stored codes, and back: no dense weight
    decode      decode panels of rows, and multiply with them
    cache       multiply with panels that a `PanelCache` keeps (what it does not hold is decoded)

The cost of a way is a sum of few terms, each a count times nanoseconds of one thread (`Costs`):

    transform   calls + values x vectors x transform + (entries x (entry + vectors x entry_vector)  or
                weights x (unpack + vectors x dense)); of sparse rows with few zeros, spread for unpack
    decode      calls of every panel + weights x (unpack + block x synthesis) + product
    cache       calls of every panel + product, and `decode` for the part that is not held
    product     weights x the larger of vectors x dense / threads and stream

with vectors = tokens / 16, rounded up; a few tokens have terms of their own. The numbers below were measured on
one machine (AMD EPYC, AVX-512); `tune` measures them where it runs and keeps them in the user's cache folder
(`rbe-gpu tune`).
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

import platformdirs

from .blocks import RBEBlocks
from .cache import PanelCache
from .codecs import SparseCodes

METHODS = ("transform", "decode", "cache")
FEW = 4  # tokens that are multiplied one by one
FEW_ZEROS = 0.65  # share of the coefficients above which sparse rows are multiplied as dense ones


@dataclass(frozen=True)
class Costs:
    """Nanoseconds of one thread.

    Attributes
    ----------
    call : a kernel call
    dense : a weight times 16 tokens
    stream : a dense weight from memory, by all threads together
    unpack : a low-bit code to float32
    few : a low-bit code unpacked and multiplied with one token
    transform : a value of 16 tokens through a block transform
    entry, entry_vector : a sparse entry to position and value; that times 16 tokens
    entry_few : a sparse entry unpacked and multiplied with one token
    spread : the same for a bitmap, per weight
    synthesis : a weight through both block transforms, per value of the block size
    scatter : a weight of a sparse row laid out densely
    """

    call: float = 9_000.0
    dense: float = 0.3
    stream: float = 0.14
    unpack: float = 0.2
    few: float = 0.08
    transform: float = 4.0
    entry: float = 0.6
    entry_vector: float = 0.5
    entry_few: float = 1.3
    spread: float = 0.12
    synthesis: float = 0.04
    scatter: float = 0.5


@dataclass(frozen=True)
class Plan:
    """The way a product takes, and the seconds that each way is estimated at."""

    method: str
    seconds: dict[str, float]


def costs_file() -> Path:
    """Where `tune` keeps the numbers of this machine: RBE_GPU_COSTS, or costs.json in the user's cache folder."""
    named = os.environ.get("RBE_GPU_COSTS")
    if named:
        return Path(named)
    return platformdirs.user_cache_path("rbe_gpu", appauthor=False) / "costs.json"


@cache
def costs() -> Costs:
    """This machine's numbers, or the built-in ones where `tune` has not run (or ran on another processor)."""
    try:
        stored = json.loads(costs_file().read_text())
        if stored.pop("machine") != machine():
            return Costs()
        known = {f.name for f in fields(Costs)}
        if set(stored) != known or not all(isinstance(v, int | float) and v > 0 for v in stored.values()):
            return Costs()
        return Costs(**stored)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Costs()


def machine() -> str:
    """What the numbers depend on: the processor, and the instructions that kernels are compiled for."""
    import llvmlite.binding as llvm

    return f"{platform.machine()} {llvm.get_host_cpu_name()}"


def seconds(weight: RBEBlocks, tokens: int, threads: int, held: float | None = None) -> dict[str, float]:
    """The estimate of every way that is open.

    Parameters
    ----------
    tokens : rows of the activations
    threads : that kernels use
    held : the share of the decoded weight that a cache keeps; None without a cache
    """
    from .cpu_fallback.decode import panel_rows

    c = costs()
    codes = weight.codes
    sparse = isinstance(codes, SparseCodes)
    vectors = -(-tokens // 16)
    weights = weight.rows_pad * weight.cols_pad
    panels = -(-weight.rows // panel_rows(weight))
    transformed = weight.transform != "none"
    few = tokens <= FEW
    # the vectors that a transform is worth: 16 tokens, or one by one
    turns = tokens / 16 if few else vectors
    turned = (weight.cols_pad + weight.rows_pad) * turns * c.transform * (1.0 if transformed else 0.25)
    if not isinstance(codes, SparseCodes):
        product = weights * (c.few * tokens if few else c.unpack + vectors * c.dense)
    elif tokens == 1:
        product = weights * c.spread if codes.index_kind == "bitmap" else codes.entries * c.entry_few
    elif codes.index_kind != "delta" and codes.entries > FEW_ZEROS * weights:
        product = weights * (c.spread + vectors * c.dense)
    else:
        product = codes.entries * (c.entry + vectors * c.entry_vector)
    dense = weights * max(c.dense * (tokens / 4 if few else vectors) / threads, c.stream)
    decoded = weights * (c.scatter if sparse else c.unpack)
    decoded += weights * weight.block * c.synthesis if transformed else 0.0
    calls = 0 if few else 1  # before the panels'
    found = {
        "transform": (1 + calls) * c.call + (turned + product) / threads,
        "decode": (calls + 4 * panels) * c.call + (turned / 4 + decoded) / threads + dense,
    }
    if held is not None:
        found["cache"] = (calls + panels) * c.call + (turned / 4 + (1 - held) * decoded) / threads + dense
    return {name: 1e-9 * value for name, value in found.items()}


def need_method(method: str | None, cache: PanelCache | None) -> None:
    """A `ValueError` unless `method` is a way, or None, and has the cache that it needs."""
    if method not in (None, *METHODS):
        raise ValueError(f"unknown method {method!r}; use one of {METHODS}, or None")
    if method == "cache" and cache is None:
        raise ValueError("method='cache' needs a cache: pass cache=PanelCache(bytes)")


def plan(
    weight: RBEBlocks, tokens: int, threads: int, cache: PanelCache | None = None, method: str | None = None
) -> Plan:
    """The cheapest way for so many tokens; `method` decides instead where it is given."""
    need_method(method, cache)
    held = None
    if cache is not None:
        held = min(1.0, cache.budget / weight.dense_nbytes)
    estimate = seconds(weight, tokens, threads, held)
    return Plan(method or min(estimate, key=lambda name: estimate[name]), estimate)


def tune(report: Callable[[str, float], None] | None = None) -> Costs:
    """Measure `Costs` here, some 20 seconds, keep them, and use them from now on.

    report : called with the name and the value of every number
    """
    from .tuning import measure

    found = measure(report)
    file = costs_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps({"machine": machine(), **asdict(found)}, indent=2) + "\n")
    part.replace(file)
    costs.cache_clear()
    return found

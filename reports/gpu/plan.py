"""The stages of a run in order of their worth, and how its time is shared among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from .stage import FAILED, PASSED, STOPPED, Options, Result


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes
    ----------
    share : seconds that it should have, also in a short run
    most : seconds that it can use
    first : it is part of a run of `FIRST_RUN` seconds
    """

    name: str
    what: str
    share: float
    most: float
    run: Callable[[Options, Result], None]
    first: bool = True


def _stage(module: str) -> Callable[[Options, Result], None]:
    """A stage that runs its module's `run(options, result)`."""
    return lambda options, result: import_module(f"rbe_gpu.reports.gpu.{module}").run(options, result)


QUICK_TEXTS = 4  # that activations are taken from


def _measured(module: str, function: str = "measure") -> Callable[[Options, Result], None]:
    """A stage of rows, over real weights and activations: a function of its module of (device, inputs, result)."""

    def run(options: Options, result: Result) -> None:
        from ..harness import token_ids
        from ..harness.inputs import Inputs
        from . import device

        gpu = device.open_device(options)
        gpu.say = result.say
        if gpu.torch is None:
            result.say("PyTorch with CUDA is not here: nothing is compared with it")
        folder = token_ids.model_folder(options.model)
        inputs = Inputs(folder, QUICK_TEXTS) if options.quick else Inputs(folder)
        getattr(import_module(f"rbe_gpu.reports.gpu.{module}"), function)(gpu, inputs, result)
        if result.facts.get("failed"):
            result.end(FAILED)
        else:
            result.end(STOPPED if result.facts.get("not_reached") else PASSED)

    return run


STAGES = {
    s.name: s
    for s in (
        Stage("launch", "every op compiled and launched once", 20, 90, _stage("launch")),
        Stage("conformance", "the table of every op's cases on CuPy arrays", 130, 420, _stage("conformance")),
        Stage("attention", "FLOP/s beside PyTorch's backends", 65, 180, _measured("attention")),
        Stage(
            "wgmma",
            "both kernels of attention on a Hopper GPU",
            30,
            60,
            _measured("attention", "measure_kernels"),
        ),
        Stage("linear", "4-bit weights beside cuBLAS", 115, 240, _measured("weights", "measure_linear")),
        Stage("bandwidth", "row and elementwise ops beside a copy", 75, 180, _measured("bandwidth")),
        Stage("decode", "bytes written beside a copy", 50, 120, _measured("weights", "measure_decode")),
        Stage("encoder", "MiniLM beside PyTorch, and as a graph", 60, 150, _measured("encoder")),
        Stage("minilm", "an encoder against the CPU and Candle", 50, 180, _stage("minilm"), first=False),
        Stage(
            "sanitizer",
            "memcheck and racecheck over every kernel",
            100,
            420,
            _stage("sanitizer"),
            first=False,
        ),
        Stage(
            "crossover",
            "multiplying in the transform domain beside decoded panels",
            90,
            240,
            _measured("crossover"),
            first=False,
        ),
        Stage(
            "latency",
            "the first call, with and without compiled kernels",
            60,
            150,
            _stage("latency"),
            first=False,
        ),
    )
}
#: seconds of a first run, within a time limit of ten minutes
FIRST_RUN = sum(stage.share for stage in STAGES.values() if stage.first)
LEAST = 5.0  # seconds: with less left, no stage is started


def budget(names: Sequence[str], left: float) -> float:
    """Seconds for the first of these stages, which have `left` seconds together.

    Each stage should have its share. Where there is less than the shares of the first run, all of that are cut alike;
    further stages have a share where one is left, in their order. What is above all shares goes to the stages in
    their order, to each as much as it can use; a stage that ends early so leaves its time to those behind it.

    Parameters
    ----------
    names : of `STAGES`, in the order in which they run
    """
    stage, *later = (STAGES[name] for name in names)
    # stages that a first run leaves out have their share too where they alone are asked for
    main = [s for s in later if s.first] if any(s.first for s in (stage, *later)) else later
    if not stage.first and main is not later:
        main = []
    together = stage.share + sum(s.share for s in main)
    if left <= together:
        return min(stage.most, left * stage.share / together)
    reserved = sum(s.share for s in main)
    for s in later:
        if s not in main and stage.share + reserved + s.share <= left:
            reserved += s.share
    return min(stage.most, left - reserved)

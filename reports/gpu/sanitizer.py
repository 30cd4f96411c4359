"""compute-sanitizer over a pass of every kernel: memory accesses (memcheck), races in shared memory (racecheck)."""

from __future__ import annotations

import os
import re
import shutil
import time
from importlib import metadata
from pathlib import Path

from ..harness.process import child_environment
from .checkout import root
from .stage import CANNOT_RUN, FAILED, PASSED, STOPPED, Options, Result, finish, module_command, start

TOOLS = ("memcheck", "racecheck")
REHEARSED = ("silu",)  # ops of a rehearsal
REHEARSAL = "tests/host/no_sanitizer.sh"  # in a rehearsal it stands for compute-sanitizer
PACKAGE = "nvidia-cuda-sanitizer-api"
ERRORS = 9  # exit status of compute-sanitizer when it finds errors
_SUMMARY = {
    "memcheck": re.compile(r"ERROR SUMMARY: (\d+) error"),
    "racecheck": re.compile(r"RACECHECK SUMMARY: (\d+) hazard"),
}
_LAST_LINE = re.compile(r"^every_kernel: (\d+) kernels$", re.MULTILINE)


def program() -> str | None:
    """The path of compute-sanitizer: on PATH, in a CUDA toolkit, or of the package; None where there is none."""
    toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for path in (shutil.which("compute-sanitizer"), *(f"{t}/bin/compute-sanitizer" for t in toolkits if t)):
        if path and os.access(path, os.X_OK):
            return path
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return None
    # that of the package's bin/ is a script that starts the other one
    places = [str(f.locate()) for f in files if f.name == "compute-sanitizer"]
    return next((p for p in places if os.access(p, os.X_OK)), None)


def command(tool: str, path: str, log: Path, options: Options) -> list[str]:
    """One pass under a tool. CuPy's own failed calls are no errors of a kernel; those of a launch raise."""
    arguments = [
        *("--tool", tool, "--error-exitcode", str(ERRORS), "--launch-timeout", "120"),
        *("--print-limit", "50", "--log-file", str(log)),
    ]
    if tool == "memcheck":
        arguments += ["--report-api-errors", "no", "--padding", "64"]
    ops = REHEARSED if options.rehearse else ()
    return [path, *arguments, *module_command(options, "tests.every_kernel", *ops)]


def findings(tool: str, log: str) -> int | None:
    """The number of errors or hazards, or None where the tool ended before its summary."""
    summary = _SUMMARY[tool].search(log)
    return None if summary is None else int(summary[1])


def kernels(output: str) -> int | None:
    """Kernels that the pass launched, or None where it did not reach its end."""
    last = _LAST_LINE.search(output)
    return None if last is None else int(last[1])


def run(options: Options, result: Result) -> None:
    """Each tool in turn, with half of the time each."""
    folder = root()
    path = str(folder / REHEARSAL) if options.rehearse else program()
    if path is None:
        result.say(
            f"compute-sanitizer is not here; it comes with the CUDA toolkit, or: pip install {PACKAGE}"
        )
        result.end(CANNOT_RUN)
        return
    if options.rehearse:
        result.say("a rehearsal: the kernels are run, and nothing is checked")
    statuses = []
    for i, tool in enumerate(TOOLS):
        began = time.perf_counter()
        log, output = options.out / f"{tool}.log", options.out / f"{tool}-output.log"
        log.unlink(missing_ok=True)
        process = start(command(tool, path, log.resolve(), options), output, folder, child_environment())
        share = (options.seconds - result.seconds) / (len(TOOLS) - i)
        status = finish(process, share)
        errors = findings(tool, log.read_text(errors="replace")) if log.is_file() else None
        count = kernels(output.read_text(errors="replace"))
        result.fact(tool, {"exit": status, "findings": errors, "kernels": count})
        seconds = time.perf_counter() - began
        if status is None:
            result.say(
                f"{tool}: stopped after {seconds:.0f} s; what it printed is in {output.name} and {log.name}"
            )
            statuses.append(FAILED if errors else STOPPED)
        elif status == 0 and errors == 0 and count:
            result.say(f"{tool}: nothing found in {count} kernels, {seconds:.0f} s")
            statuses.append(PASSED)
        else:
            outcome = "no summary" if errors is None else f"{errors} found"
            result.say(
                f"{tool}: {outcome}, exit status {status}, {count or 'not all'} kernels; see {log.name}"
            )
            statuses.append(FAILED)
    result.end(next(s for s in (FAILED, STOPPED, PASSED) if s in statuses))

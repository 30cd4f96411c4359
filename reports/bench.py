"""The measuring harness: paired alternating runs, tidy rows, peak memory of a process.

Rivals are timed in one process and in turn: A B C, C B A, A B C, ... Whatever slows the machine for a while
then slows all of them, and a ratio is the median of the ratios within each round, not a ratio of two medians
taken at different times. A row is one measurement; a results file is a CSV of rows; plots and pages read
nothing else.
"""

from __future__ import annotations

import csv
import datetime
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

#: a call shorter than this is repeated within its turn, and is preceded by one untimed call that brings its
#: data back into the cache and lets the previous rival's threads go to sleep
SHORT = 20e-3
TURN = 2e-3  # the least time measured per turn: 10,000 times the resolution of the clock
PACKAGES = ("numpy", "numba", "llvmlite", "ml_dtypes", "tokenizers", "safetensors", "torch", "onnxruntime")


# --- rows -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One measurement. `p20`, `p50`, `p80` are percentiles over `runs`; equal where runs is 1."""

    op: str
    case: str
    backend: str
    provider: str
    shape: str
    dtype: str
    threads: int
    metric: str
    unit: str
    p20: float
    p50: float
    p80: float
    runs: int
    device: str
    versions: str
    commit: str
    timestamp: str


COLUMNS = tuple(f.name for f in fields(Row))


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Append rows to a CSV file; a new file gets the header line."""
    new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file. `ValueError` when its columns are not those of `Row`."""
    with path.open(newline="", encoding="utf-8") as f:
        reader = csv.DictReader(f)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} is not a results file: its columns are {reader.fieldnames}")
        kinds: dict[str, Callable[[str], Any]] = dict.fromkeys(COLUMNS, str)
        kinds |= {"threads": int, "runs": int, "p20": float, "p50": float, "p80": float}
        return [Row(*(kinds[name](record[name]) for name in COLUMNS)) for record in reader]


class Results:
    """Rows by what they say. `one` never makes up a row: what was not measured is None."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = tuple(rows)
        self._at = {(r.op, r.case, r.provider, r.metric): r for r in self.rows}

    def one(self, op: str, case: str, provider: str, metric: str) -> Row | None:
        """The row, the last one where it was measured twice, or None."""
        return self._at.get((op, case, provider, metric))

    def value(self, op: str, case: str, provider: str, metric: str) -> float | None:
        """The median of the row, or None."""
        row = self.one(op, case, provider, metric)
        return None if row is None else row.p50

    def cases(self, op: str) -> list[str]:
        """The cases of an op, in the order they were measured."""
        return list(dict.fromkeys(r.case for r in self.rows if r.op == op))

    def providers(self, op: str, case: str, metric: str) -> list[str]:
        """Who has this metric in a case, in the order they were measured."""
        return list(
            dict.fromkeys(r.provider for r in self.rows if (r.op, r.case, r.metric) == (op, case, metric))
        )


# --- the machine ----------------------------------------------------------------------------------------


def cpu_model() -> str:
    """The name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    if sys.platform == "darwin":
        done = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        if done.stdout.strip():
            return done.stdout.strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """How many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def device() -> str:
    """Processor, architecture, cores and system, in one line."""
    return f"{cpu_model()} ({platform.machine()}, {usable_cores()} cores, {platform.system()})"


def versions() -> str:
    """Python and the packages that do the work, `name version` separated by commas."""
    import rbe_gpu

    found = [f"python {platform.python_version()}", f"rbe-gpu {rbe_gpu.__version__}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def commit() -> str:
    """The commit of the checkout this file lies in, `+` when it has changes; "" outside a checkout."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *args]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        # an installed copy may lie in an environment inside some other project's checkout
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


@dataclass(frozen=True)
class Session:
    """What all rows of one run share, and how a row is made."""

    threads: int
    device: str
    versions: str
    commit: str
    timestamp: str

    @classmethod
    def here(cls, threads: int) -> Session:
        now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        return cls(threads, device(), versions(), commit(), now)

    def row(
        self,
        op: str,
        case: str,
        provider: str,
        metric: str,
        unit: str,
        values: float | Iterable[float],
        *,
        shape: str = "",
        dtype: str = "float32",
        backend: str = "cpu",
    ) -> Row:
        """One row from one value or from the values of several runs."""
        seen = np.atleast_1d(np.asarray(values if isinstance(values, float | int) else list(values), float))
        if not seen.size:
            raise ValueError(
                f"{op}/{case}/{provider}: no {metric} was measured; a row needs at least one value"
            )
        p20, p50, p80 = (float(v) for v in np.percentile(seen, (20, 50, 80)))
        return Row(
            op, case, backend, provider, shape, dtype, self.threads, metric, unit, p20, p50, p80, len(seen),
            self.device, self.versions, self.commit, self.timestamp,
        )  # fmt: skip


# --- time -----------------------------------------------------------------------------------------------


def paired_times(
    rivals: Mapping[str, Callable[[], Any]],
    *,
    seconds: float,
    least: int = 5,
    most: int = 100,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds per call of every rival, one value per round, rivals in turn and in alternating order.

    Each rival is called `warm_up` times first (compilation, caches, thread pools), and once more to see how long
    a call takes; neither counts. Rounds go on until `seconds` have passed and at least `least` were made, and
    stop at `most`.

    Parameters
    ----------
    rivals : name -> function without arguments
    seconds : time to spend on all rivals together, warm-up not counted
    clock : monotonic, in seconds
    on_round : called after every round

    Returns
    -------
    name -> seconds per call; entry i of every list comes from round i
    """
    loops: dict[str, int] = {}
    short: dict[str, bool] = {}
    for name, run in rivals.items():
        for _ in range(warm_up):
            run()
        start = clock()
        run()
        once = max(clock() - start, 1e-9)
        short[name] = once < SHORT
        loops[name] = max(1, int(np.ceil(TURN / once)))
    names = list(rivals)
    times: dict[str, list[float]] = {name: [] for name in names}
    began = clock()
    rounds = 0
    while rounds < least or (rounds < most and clock() - began < seconds):
        for name in names if rounds % 2 == 0 else reversed(names):
            run = rivals[name]
            if short[name]:
                run()
            start = clock()
            for _ in range(loops[name]):
                run()
            times[name].append((clock() - start) / loops[name])
        rounds += 1
        on_round()
    return times


def speeds(times: Mapping[str, list[float]], against: str) -> dict[str, list[float]]:
    """How many times as fast as `against` each rival was, round by round: time(against) / time(rival)."""
    base = times[against]
    return {name: [b / t for b, t in zip(base, own, strict=True)] for name, own in times.items()}


# --- memory ---------------------------------------------------------------------------------------------


def own_peak_bytes() -> int:
    """The largest resident size this process has had so far, in bytes."""
    try:
        # of this program alone: ru_maxrss of a child also remembers the size of the process that forked it
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def child_environment(**variables: str) -> dict[str, str]:
    """The environment for a process that must import the same rbe_gpu as this one, with further variables."""
    import rbe_gpu

    here = str(Path(rbe_gpu.__file__).parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    path = here if not inherited else os.pathsep.join((here, inherited))
    quiet = {"OPENBLAS_THREAD_TIMEOUT": "4"}  # NumPy's idle threads must not spin into the next rival's turn
    return {**quiet, **os.environ, "PYTHONPATH": path, **variables}


def peak_bytes(target: str, **arguments: Any) -> int:
    """Peak resident bytes of a fresh Python process that calls `target`, "package.module:function".

    `arguments` travel as JSON. `RuntimeError` with the process's last line when it fails.
    """
    command = [sys.executable, "-m", "rbe_gpu.reports.bench", target, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment())
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"measuring the memory of {target} failed: {last}")
    return int(done.stdout.strip().splitlines()[-1])


def extra_bytes(target: str, work: Mapping[str, Any], baseline: Mapping[str, Any]) -> int:
    """Peak bytes of `target(**work)` beyond those of `target(**baseline)`, each in a fresh process."""
    return max(0, peak_bytes(target, **work) - peak_bytes(target, **baseline))


def _child() -> None:
    target, arguments = sys.argv[1:]
    module, function = target.split(":")
    getattr(importlib.import_module(module), function)(**json.loads(arguments))
    print(own_peak_bytes())


if __name__ == "__main__":
    _child()

"""A stage's options, its result on disk, and the processes that it starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rbe_gpu import output

from ..harness.text import FAILED, PASSED

__all__ = [
    "CANNOT_RUN",
    "FAILED",
    "PASSED",
    "STOPPED",
    "Options",
    "Result",
    "finish",
    "module_command",
    "read",
    "start",
]

STOPPED, CANNOT_RUN = "stopped", "cannot run"


@dataclass(frozen=True)
class Options:
    """What all stages share.

    Attributes
    ----------
    out : folder of the stages' results and logs
    rows : folder of the CSV file of rows
    model : folder of a BERT-shaped model, or None for the installed package's
    quick : small and few cases: shows that everything works, not figures to quote
    commit : recorded in the rows, "" for the checkout's own
    jobs : processes at once where a stage can have several
    seconds : time budget of the stage
    rehearse : without a GPU, on the tests' stand-in for CuPy
    """

    out: Path
    rows: Path
    model: Path | None = None
    quick: bool = False
    commit: str = ""
    jobs: int = 4
    seconds: float = 600.0
    rehearse: bool = False


@dataclass
class Result:
    """The result of a stage, written after every change, so that a stopped stage leaves what it has.

    Attributes
    ----------
    status : PASSED, FAILED, STOPPED (before its end) or CANNOT_RUN (something that it needs is not there)
    lines : messages for the reader
    facts : figures by name
    """

    stage: str
    path: Path
    status: str = STOPPED
    seconds: float = 0.0
    lines: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    _began: float = field(default_factory=time.perf_counter)

    def say(self, line: str) -> None:
        self.lines.append(line)
        print(f"{self.stage}: {line}", flush=True)
        self.write()

    def fact(self, name: str, value: Any) -> None:
        self.facts[name] = value
        self.write()

    def end(self, status: str) -> None:
        self.status = status
        self.write()

    def write(self) -> None:
        self.seconds = time.perf_counter() - self._began
        held = {name: getattr(self, name) for name in ("stage", "status", "seconds", "lines", "facts")}
        output.write_text(self.path, json.dumps(held, indent=1))


def read(path: Path) -> dict[str, Any] | None:
    """What a stage wrote, or None where it wrote nothing."""
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


#: runs a module as `python -m` does, with a stand-in for CuPy; only a checkout has it
REHEARSAL = "tests.host.rehearsal"


def module_command(options: Options, module: str, *arguments: str) -> list[str]:
    """`python -m module arguments`; in a rehearsal without a GPU."""
    prefix = (REHEARSAL,) if options.rehearse else ()
    return [sys.executable, "-m", *prefix, module, *arguments]


def start(
    command: Sequence[str],
    log: Path,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """A process in a group of its own, its output in a file."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}
    with log.open("wb") as out:
        return subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, cwd=folder, env=env, start_new_session=True
        )


def finish(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Wait for the exit status; None when it ran longer than `seconds` and was killed with its children."""
    try:
        return process.wait(max(seconds, 0.0))
    except subprocess.TimeoutExpired:
        kill(process)
        return None
    except BaseException:  # an interrupt: no stage outlives the run
        kill(process)
        raise


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process of `start` and all that it has started, which have groups of their own."""
    groups = [process.pid, *_descendants(process.pid)] if process.poll() is None else [process.pid]
    for pid in groups:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(os.getpgid(pid) if pid != process.pid else pid, signal.SIGKILL)
    process.wait()


def _descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(entry.read_text().rpartition(")")[2].split()[1])  # behind the name: state, parent
            children.setdefault(parent, []).append(int(entry.parent.name))
    below, todo = [], [pid]
    while todo:
        more = children.get(todo.pop(), [])
        below += more
        todo += more
    return below

"""The conformance table on CuPy arrays, and the tests that need a GPU: pytest with `--backend cuda`.

Each op has a process of its own: a kernel that breaks the GPU's context then breaks the cases of its own op, and no
others.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rbe_gpu import registry
from rbe_gpu.gpu import _source
from rbe_gpu.models.locate import model_folder

from ..harness.memory import child_environment
from .checkout import root
from .stage import FAILED, PASSED, STOPPED, Options, Result, finish, start

#: the slowest first, so that none of them is left alone at the end
ORDER = ("linear", "attention", "decode", "embedding")
ARRAYS = "arrays"  # tests/test_on_gpu.py
_OUTCOME = re.compile(r"^\S*test_\w+\.py::(\S+) (PASSED|FAILED|ERROR)\b", re.MULTILINE)


def outcomes(log: str) -> tuple[Counter[str], list[str]]:
    """Of pytest's verbose output: how many tests passed, failed and broke, and the names of those that did not pass.

    A test that breaks while it is torn down too is counted for each.
    """
    found = _OUTCOME.findall(log)
    return Counter(word.lower() for _, word in found), [name for name, word in found if word != "PASSED"]


def command(name: str, backend: str) -> list[str]:
    """pytest over the table's cases of an op, or over the tests of arrays."""
    files = ["tests/test_on_gpu.py"] if name == ARRAYS else ["tests/test_conformance.py", "--op", name]
    options = ["-v", "--tb=short", "-p", "no:cacheprovider", "--backend", backend]
    return [sys.executable, "-m", "pytest", *files, *options]


@dataclass
class _Part:
    """A process of pytest."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    began: float

    def end(self, result: Result) -> tuple[str, Counter[str]]:
        """Its end, stopped now where it has not come to it: PASSED, FAILED or STOPPED; and its outcomes."""
        status = finish(self.process, 0.0)
        said = self.log.read_text(encoding="utf-8", errors="replace")
        counts, bad = outcomes(said)
        ended = status == 0 or (status == 1 and bool(bad))
        seconds = time.perf_counter() - self.began
        result.fact(self.name, {"passed": counts["passed"], "not_passed": len(bad), "complete": ended})
        line = f"{self.name}: {counts['passed']} passed, {len(bad)} did not, {seconds:.0f} s"
        if status is None:
            result.say(f"{line}, stopped before its end")
        elif not ended:
            last = (said.strip().splitlines() or ["it printed nothing"])[-1]
            result.say(f"{line}, pytest ended with {status}: {last}")
        else:
            result.say(line)
        for name in bad[:10]:
            result.say(f"{self.name}: {name}")
        if bad or (status is not None and not ended):
            return FAILED, counts
        return (PASSED if ended else STOPPED), counts


def run(options: Options, result: Result, backend: str = "cuda") -> None:
    """Every op's cases and the tests of arrays, `options.jobs` processes at a time."""
    folder = root()
    environment = child_environment(RBE_TEST_MODEL=str(model_folder(options.model).resolve()))
    ops = [op for op in registry.OPS if _source.has(op)]
    waiting = [*(op for op in ORDER if op in ops), ARRAYS, *(op for op in ops if op not in ORDER)]
    running: list[_Part] = []
    stop = time.perf_counter() + options.seconds - result.seconds
    total: Counter[str] = Counter()
    ends: set[str] = set()
    while waiting or running:
        late = time.perf_counter() > stop
        for part in [p for p in running if late or p.process.poll() is not None]:
            running.remove(part)
            end, counts = part.end(result)
            ends.add(end)
            total += counts
        for name in waiting if late else ():
            result.say(f"{name}: no time was left")
            ends.add(STOPPED)
        if late:
            waiting.clear()
        while waiting and len(running) < options.jobs:
            name = waiting.pop(0)
            log = options.out / f"conformance-{name}.log"
            process = start(command(name, backend), log, folder, environment)
            running.append(_Part(name, process, log, time.perf_counter()))
        time.sleep(0.05)
    result.fact("passed", total["passed"])
    result.fact("not_passed", total["failed"] + total["error"])
    result.end(next(e for e in (FAILED, STOPPED, PASSED) if e in ends))

"""The conformance table on CuPy arrays: pytest with `--backend cuda`, each op in a process of its own.

A kernel that breaks the GPU's context then breaks the cases of its own op, and no others.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from rbe_gpu import spec
from rbe_gpu.gpu import _load

from ..bench import child_environment
from ..inputs import model_folder
from .checkout import root
from .stage import FAILED, PASSED, STOPPED, Options, Result, finish, start

#: the slowest first, so that none of them is left alone at the end
ORDER = ("linear", "attention", "decode", "embedding")
_OUTCOME = re.compile(r"^\S*test_conformance\.py::(\S+) (PASSED|FAILED|ERROR)\b", re.MULTILINE)


def outcomes(log: str) -> tuple[Counter[str], list[str]]:
    """Of pytest's verbose output: how many tests passed, failed and broke, and the names of those that did not pass.

    A test that breaks while it is torn down too is counted for each.
    """
    found = _OUTCOME.findall(log)
    return Counter(word.lower() for _, word in found), [name for name, word in found if word != "PASSED"]


def command(op: str, backend: str) -> list[str]:
    return [
        *(sys.executable, "-m", "pytest", "tests/test_conformance.py", "-v", "--tb=short"),
        *("-p", "no:cacheprovider", "--backend", backend, "--op", op),
    ]


def run(options: Options, result: Result, backend: str = "cuda") -> None:
    """Every op's cases, `options.jobs` ops at a time."""
    folder = root()
    model = model_folder(options.model)
    environment = child_environment(RBE_TEST_MODEL=str(model.resolve()))
    ops = sorted(
        (op for op in spec.OPS if _load.has(op)),
        key=lambda op: ORDER.index(op) if op in ORDER else len(ORDER),
    )
    waiting, running = list(ops), dict[str, tuple[subprocess.Popen[bytes], Path, float]]()
    end = time.perf_counter() + options.seconds
    total: Counter[str] = Counter()
    complete = True
    while waiting or running:
        while waiting and len(running) < options.jobs:
            op = waiting.pop(0)
            log = options.out / f"conformance-{op}.log"
            running[op] = (start(command(op, backend), log, folder, environment), log, time.perf_counter())
        time.sleep(0.05)
        for op, (process, log, began) in list(running.items()):
            late = time.perf_counter() > end
            if process.poll() is None and not late:
                continue
            status = finish(process, 0.0)
            del running[op]
            counts, bad = outcomes(log.read_text(encoding="utf-8", errors="replace"))
            total += counts
            seconds = time.perf_counter() - began
            ended = status == 0 or (status == 1 and bad)
            complete &= bool(ended)
            how = (
                ""
                if ended
                else ", stopped before its end"
                if status is None
                else f", pytest ended with {status}"
            )
            result.fact(op, {"passed": counts["passed"], "not_passed": len(bad), "complete": bool(ended)})
            result.say(f"{op}: {counts['passed']} passed, {len(bad)} did not, {seconds:.0f} s{how}")
            for name in bad[:10]:
                result.say(f"{op}: {name}")
        if time.perf_counter() > end:
            for op in waiting:
                result.say(f"{op}: no time was left")
                complete = False
            waiting.clear()
    result.fact("passed", total["passed"])
    bad_count = total["failed"] + total["error"]
    result.fact("not_passed", bad_count)
    result.end(FAILED if bad_count else PASSED if complete and total["passed"] else STOPPED)

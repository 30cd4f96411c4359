"""The conformance table on CuPy arrays, and the tests that need a GPU: pytest with `--backend cuda`.

Each op has a process of its own: a kernel that breaks the GPU's context then breaks the cases of its own op, and no
others.
"""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from rbe_gpu import registry
from rbe_gpu.gpu import _source, attention_wgmma

from ..harness import token_ids
from ..harness.process import child_environment
from .checkout import root
from .device import capability
from .stage import FAILED, PASSED, STOPPED, Options, Result, finish, start

#: the slowest first, so that none of them is left alone at the end
ORDER = ("linear", "attention", "decode", "embedding")
ARRAYS = "arrays"  # tests/test_on_gpu.py
WGMMA = "attention, wgmma"  # the cases of attention that the kernels of a Hopper GPU take, by these
#: those cases: pytest's -k. Each test must launch such a kernel
TAKEN = (
    "(head_dim_64 or head_dim_96 or head_dim_128 or attention-one_query_a_head or _grouped-) and not float32 "
    "and not test_refused and not test_valid_args"
)
#: what a rehearsal runs of them: pytest's -k
REHEARSED = {"rope": "test_value", ARRAYS: "clamped or (test_decode and grid and int2)"}
#: plugins of the machine's Python are left out: some of them cost seconds of every process
ENVIRONMENT = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
_OUTCOME = re.compile(r"^\S*test_\w+\.py::(\S+) (PASSED|FAILED|ERROR)\b", re.MULTILINE)


def outcomes(log: str) -> tuple[Counter[str], list[str]]:
    """Of pytest's verbose output: how many tests passed, failed and broke, and the names of those that did not pass.

    A test that breaks while it is torn down too is counted for each.
    """
    results = _OUTCOME.findall(log)
    return Counter(word.lower() for _, word in results), [name for name, word in results if word != "PASSED"]


def command(name: str, rehearse: bool = False) -> list[str]:
    """pytest over the table's cases of an op, or over the tests of arrays; in a rehearsal over some of them."""
    op = "attention" if name == WGMMA else name
    files = ["tests/test_on_gpu.py"] if name == ARRAYS else ["tests/test_conformance.py", "--op", op]
    options = ["-v", "--tb=short", "-p", "no:cacheprovider", "--backend", "stand-in" if rehearse else "cuda"]
    some = ["-k", REHEARSED[name]] if rehearse else []
    if name == WGMMA:
        some = ["-k", TAKEN, "--launches", "attention_wgmma"]
    return [sys.executable, "-m", "pytest", *files, *options, *some]


def judge(
    name: str, status: int | None, log: Path, seconds: float, result: Result
) -> tuple[str, Counter[str]]:
    """Whether a process of pytest passed, failed or was stopped (status None), and its outcomes."""
    output = log.read_text(encoding="utf-8", errors="replace")
    counts, bad = outcomes(output)
    ended = status == 0 or (status == 1 and bool(bad))
    result.fact(name, {"passed": counts["passed"], "not_passed": len(bad), "complete": ended})
    line = f"{name}: {counts['passed']} passed, {len(bad)} did not, {seconds:.0f} s"
    if status is None:
        line += ", stopped before its end"
    elif not ended:
        line += f", pytest ended with {status}: {(output.strip().splitlines() or ['it printed nothing'])[-1]}"
    result.say(line)
    for test in bad[:10]:
        result.say(f"{name}: {test}")
    if bad or (status is not None and not ended):
        return FAILED, counts
    return (PASSED if ended else STOPPED), counts


def run(options: Options, result: Result) -> None:
    """Every op's cases and the tests of arrays, `options.jobs` processes at a time."""
    folder = root()
    model = token_ids.model_folder(options.model).resolve()
    environment = child_environment(RBE_TEST_MODEL=str(model), **ENVIRONMENT)
    ops = [op for op in registry.OPS if _source.has(op)]
    names = [*(op for op in ORDER if op in ops), ARRAYS, *(op for op in ops if op not in ORDER)]
    if capability() == attention_wgmma.CAPABILITY:
        names.insert(names.index("attention") + 1, WGMMA)
    if options.rehearse:
        names = list(REHEARSED)
    stop = time.perf_counter() + options.seconds - result.seconds

    def part(name: str) -> tuple[int | None, Path, float] | None:
        """Exit status, log and seconds of one process; None where no time was left to start it."""
        log, began = options.out / f"conformance-{name.replace(', ', '-')}.log", time.perf_counter()
        if began > stop:
            return None
        preferred = "wgmma" if name == WGMMA else ""
        variables = {**environment, attention_wgmma.VARIABLE: preferred}
        started = start(command(name, options.rehearse), log, folder, variables)
        status = finish(started, stop - began)
        return status, log, time.perf_counter() - began

    total: Counter[str] = Counter()
    ends: set[str] = set()
    with ThreadPoolExecutor(options.jobs) as pool:
        parts = {pool.submit(part, name): name for name in names}
        for future in as_completed(parts):
            name, ended = parts[future], future.result()
            if ended is None:
                result.say(f"{name}: no time was left")
                ends.add(STOPPED)
                continue
            end, counts = judge(name, *ended, result)
            ends.add(end)
            total += counts
    result.fact("passed", total["passed"])
    result.fact("not_passed", total["failed"] + total["error"])
    result.end(next(e for e in (FAILED, STOPPED, PASSED) if e in ends))

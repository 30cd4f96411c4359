"""The noise of the machine beside every case, and one process for each library."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from rbe_gpu.reports.harness import baselines, libraries, measure, noise
from rbe_gpu.reports.harness.libraries import Library, LibraryFailed, RemoteClock, Server, remote
from rbe_gpu.reports.harness.measure import (
    NUMPY,
    ONNX,
    OURS,
    TORCH,
    Provider,
    WrongResult,
    builds,
    library_of,
)
from rbe_gpu.reports.harness.noise import Conditions, Watch
from rbe_gpu.reports.harness.rows import Row, Session
from rbe_gpu.reports.harness.timing import paired_times
from rbe_gpu.reports.speed.processes import Processes, installed

from . import real

SESSION = Session(
    2, "a processor (2 cores)", "python 3.11, numpy 2.0", "0123456789ab", "2030-01-02T03:04:05Z"
)


# --- noise --------------------------------------------------------------------------------------------------


def watch(spins: Any = (), others: Any = (), patience: float = 100.0, seconds: float = 1.0) -> Watch:
    """A watch of a machine of 2 cores, whose spins take so long and on which others work so many seconds a case."""
    spin, elsewhere = chain(spins, repeat(1.0)), chain(others, repeat(0.0))
    clock, total = [0.0], [0.0]

    def now() -> float:
        clock[0] += seconds / 2
        return clock[0]

    calls = iter(range(10**9))

    def busy() -> float:
        if next(calls) % 2:  # at the end of a case
            total[0] += next(elsewhere) + 0.5  # and half a second of our own
        return total[0]

    owned = iter(range(10**9))
    return Watch(
        lambda: (1,), patience, lambda: next(spin), now, busy, lambda _: 0.5 * ((next(owned) + 1) // 2), 2
    )


def case(*values: float) -> Callable[[], list[Row]]:
    """A case whose time is another each time it is measured."""
    left = iter(values)
    return lambda: [SESSION.row("gelu", "a", "me", "time", "s", next(left))]


def test_a_quiet_case_is_measured_once() -> None:
    (row,) = watch([1.0, 1.01]).measure(case(1.0))
    assert row.noise == pytest.approx(0.01)
    assert row.others == 0.0
    assert not row.disturbed


def test_a_disturbed_case_is_repeated_and_the_quietest_try_counts() -> None:
    """Others take 40%, 25% and 30% of two cores for half a second each."""
    work = case(1.0, 2.0, 3.0, 4.0)
    (row,) = watch(others=[0.4, 0.25, 0.3]).measure(work)
    assert row.p50 == 2.0
    assert row.others == pytest.approx(0.25)
    assert row.disturbed
    assert work()[0].p50 == 4.0  # three tries
    (row,) = watch(others=[0.4, 0.0]).measure(case(1.0, 2.0))
    assert (row.p50, row.disturbed) == (2.0, False)


def test_a_slow_spin_disturbs_as_well() -> None:
    (row,) = watch(spins=[1.0, 1.3, 1.0, 1.0]).measure(case(1.0, 2.0))
    assert (row.p50, row.noise) == (2.0, 0.0)


def test_repetitions_end_with_the_patience() -> None:
    w = watch(others=repeat(1.0), patience=0.6)
    assert [w.measure(case(1.0, 2.0, 3.0))[0].p50 for _ in range(2)] == [1.0, 1.0]
    assert w.patience == pytest.approx(0.1)  # one repetition of half a second


def test_what_is_too_short_says_nothing_of_others() -> None:
    (row,) = watch(others=repeat(1.0), seconds=0.01).measure(case(1.0))
    assert row.others is None
    assert Conditions(0.2, None).worst == 0.2


def test_another_process_that_works_is_seen() -> None:
    """A real one, that keeps a core busy; our own work is not taken for another's."""
    here = Watch(lambda: (os.getpid(),), 0.0)

    def busy(seconds: float) -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    _, own, _ = here.conditions(lambda: busy(0.5))
    loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        used = psutil.Process(loop.pid)
        while sum(used.cpu_times()[:2]) < 0.1:
            time.sleep(0.02)
        before, began = sum(used.cpu_times()[:2]), time.perf_counter()
        _, other, seconds = here.conditions(lambda: time.sleep(1.0))
        took = (sum(used.cpu_times()[:2]) - before) / (time.perf_counter() - began)
    finally:
        loop.kill()
        loop.wait()
    assert own.others is not None
    assert other.others is not None
    # of the cores it may run on; on a busy machine others work too
    assert other.others >= 0.8 * took / here.cores
    assert here.fastest > 0
    assert seconds >= 1.0


def test_processor_time_of_ended_processes_counts_nothing() -> None:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    assert noise._own([done.pid]) == 0.0
    assert noise._own([os.getpid()]) > 0.0


# --- one library in its process -------------------------------------------------------------------------------


class Sums(Server):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.providers = {
            "NumPy": Provider([lambda: scale, lambda: time.sleep(0.02)]),
            "NumPy too": Provider([lambda: 1]),
        }
        self.done: list[int] = []

    def add(self, *values: float) -> float:
        return sum(values)

    def fail(self, kind: str) -> None:
        raise {"ours": WrongResult("off by 2"), "value": ValueError("no")}[kind]

    def spin(self, seconds: float) -> None:
        """From now on a provider that leaves a thread behind, which works for so many seconds of processor time."""

        def work() -> None:
            end = time.thread_time() + seconds
            while time.thread_time() < end:
                pass

        self.providers = {"spins": Provider([lambda: threading.Thread(target=work, daemon=True).start()])}

    def end(self) -> None:
        os._exit(3)

    def environment(self) -> tuple[bool, bool, bool]:
        return builds(NUMPY), builds(TORCH), baselines.torch_or_none() is None


def sums(scale: float) -> Sums:
    return Sums(scale)


@pytest.fixture
def library() -> Iterator[Library]:
    made = Library(NUMPY, f"{__name__}:sums", scale=2.0)
    yield made.wait()
    made.close()


def test_requests_and_errors(library: Library) -> None:
    assert library.request("add", 1, 2.5) == 3.5
    with pytest.raises(WrongResult, match="off by 2"):
        library.request("fail", "ours")
    with pytest.raises(ValueError, match="no"):
        library.request("fail", "value")
    assert library.request("environment") == (True, False, True)
    assert library.request("add", 1) == 1
    with pytest.raises(LibraryFailed, match="measures NumPy ended with status 3"):
        library.request("end")


def test_a_process_that_cannot_be_set_up_says_why() -> None:
    with pytest.raises(TypeError, match="scale"):
        Library(NUMPY, f"{__name__}:sums").wait()


def test_threads_that_spin_end_before_the_next_turn(library: Library) -> None:
    """A call leaves a thread behind that works for 0.1 s: it is not timed, and its answer comes afterwards."""
    library.request("spin", 0.1)
    calls = remote({NUMPY: library}, {"spins": 1})
    began = time.perf_counter()
    measured = RemoteClock().seconds(calls["spins"], 1, 0)
    assert time.perf_counter() - began >= 0.1
    assert measured < 0.1
    before = psutil.Process(library.pid).cpu_times().user
    time.sleep(0.2)
    assert psutil.Process(library.pid).cpu_times().user - before <= 0.02


def test_a_process_ends_when_the_parent_is_killed() -> None:
    code = (
        "import os, signal\n"
        "from rbe_gpu.reports.harness.libraries import Library\n"
        "if __name__ == '__main__':\n"
        f"    made = Library('NumPy', '{__name__}:sums', scale=1.0).wait()\n"
        "    print(made.pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == -signal.SIGKILL
    pid, deadline = int(done.stdout), time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the process is still there"
        time.sleep(0.05)


def test_closing_during_a_request_is_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    """As an interrupt does."""
    made = Library(NUMPY, f"{__name__}:sums", scale=2.0).wait()
    made.send("seconds", "NumPy", 10, 0)  # takes 0.1 s
    made.close()
    assert not psutil.pid_exists(made.pid)
    assert capfd.readouterr().err == ""


def test_calls_are_timed_in_the_process(library: Library) -> None:
    calls = remote({NUMPY: library}, {"NumPy": 2, "NumPy too": 1})
    assert [len(c) for c in calls.values()] == [2, 1]
    times = paired_times(calls, seconds=0.0, least=4, clock=RemoteClock())
    assert [len(t) for t in times.values()] == [4, 4]
    assert max(times["NumPy"]) >= 0.02  # its two calls in turn: one sleeps 20 ms, the other does not
    assert min(times["NumPy"]) < 0.02
    assert min(times["NumPy too"]) < 0.01


def test_providers_belong_to_libraries() -> None:
    assert [library_of(n) for n in ("rbe_gpu dense, no out=", "PyTorch", "ONNX Runtime", "NumPy copy of")] == [
        OURS, TORCH, ONNX, NUMPY,
    ]  # fmt: skip
    assert builds(TORCH)
    assert measure._only is None


# --- all of them ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with Processes(real.MODEL_DIR, 1, True) as running:
        yield running


def test_every_library_that_is_installed_has_a_process(processes: Processes) -> None:
    assert list(processes.libraries) == installed()
    assert {NUMPY, OURS} <= set(processes.libraries)
    assert len(set(processes.pids)) == len(installed())


def test_cases_are_put_together_from_the_processes(processes: Processes) -> None:
    cases = list(processes.cases("softmax"))
    assert [c.name for c in cases] == ["64 x 64"]
    expected = {NUMPY, "rbe_gpu dense", "rbe_gpu dense, no out="} | ({TORCH} & set(installed()))
    assert set(cases[0].providers) == expected
    assert list(processes.cases("softmax")) == []  # there are no more


def test_a_case_is_checked_and_timed(processes: Processes) -> None:
    made = next(processes.cases("gelu"))
    rows = processes.measure(made, SESSION, 0.0, 3)
    by = {(r.provider, r.metric): r for r in rows}
    assert by["rbe_gpu dense", "relative_error"].p50 < 1e-5
    assert by["rbe_gpu dense", f"speed_vs_{NUMPY}"].runs == 3
    assert by[NUMPY, "time"].p50 > 0
    assert by["rbe_gpu dense", "time"].p50 > 0
    out, new = (by[name, "allocated_bytes"].p50 for name in ("rbe_gpu dense", "rbe_gpu dense, no out="))
    assert out < 10_000
    assert new == pytest.approx(64 * 1536 * 4, rel=0.05)
    assert by["rbe_gpu dense", "moved_bytes"].p50 == 2 * 64 * 1536 * 4
    assert (NUMPY, "moved_bytes") not in by


def test_encoders_in_their_processes(processes: Processes) -> None:
    dense = processes.load_encoder("rbe_gpu dense", real.MODEL_DIR)
    texts = list(real.texts()[:3])
    vectors = dense.embed(texts)
    assert vectors.shape == (3, 384)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    others = processes.baseline_encoders()
    assert NUMPY in others
    assert np.allclose(others[NUMPY].embed(texts), vectors, atol=1e-4)
    calls = {"rbe_gpu dense": dense.calls(texts), NUMPY: others[NUMPY].calls(texts)}
    times = paired_times(calls, seconds=0.0, least=1, clock=RemoteClock())
    assert all(t[0] > 0 for t in times.values())
    assert dense.held_bytes() == pytest.approx(real.WEIGHTS.stat().st_size, rel=0.05)
    assert others[NUMPY].held_bytes() is None
    processes.forget_encoders()
    with pytest.raises(KeyError):
        dense.embed(texts)


def test_processes_end_with_the_block() -> None:
    with Processes(real.MODEL_DIR, 1, True, [NUMPY]) as running:
        (pid,) = running.pids
        assert psutil.pid_exists(pid)
    assert not psutil.pid_exists(pid)
    assert libraries.PATIENCE < 10

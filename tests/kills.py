"""Kill `compress` and `report` at random moments (SIGKILL), and check what is left: `python -m tests.kills`.

`compress` in three ways in turn: plain, calibrated, and calibrated with `--resume` after a kill. After each kill the
output is the file of an earlier complete run to the byte, or is not there, and beside it are at most partial files
and the journal. After the last one, a run that resumes gives the bytes of a run without interruption, and leaves
nothing else.

`report` in two ways in turn (`--report`): the page of one of two sets of rows into one folder, and rows that are
added to a file. After each kill every page, picture and file of rows is whole.

The processes that are killed are forked from this one, after it has done the same work once: nothing is imported or
compiled in them, so that a kill takes as long as the work does.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from . import real
from .bounded import REPOSITORY

RATIO = 6.0


def texts() -> list[str]:
    return list(real.texts()[:12])


@dataclass
class Report:
    """kills : of running processes. left : how often each kind of file was left behind by a kill."""

    kills: int = 0
    ended: int = 0  # before the signal came
    left: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, running: bool) -> None:
        """One more run, which was still running when the signal came, or had ended."""
        self.kills += running
        self.ended += not running

    def __str__(self) -> str:
        left = ", ".join(f"{kind} {n}" for kind, n in sorted(self.left.items())) or "nothing"
        times = ", ".join(f"{how} {s:.1f} s" for how, s in self.seconds.items())
        return f"{self.kills} kills ({self.ended} runs had ended before); left behind: {left}; whole runs: {times}"


def _started(work: Callable[..., None], *arguments: Path | str) -> BaseProcess:
    """A process that begins with the work at once."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    return process


def _seconds(process: BaseProcess) -> float:
    """Wait for its end; seconds."""
    start = time.perf_counter()
    process.join()
    assert process.exitcode == 0
    return time.perf_counter() - start


def _killed(process: BaseProcess, seconds: float) -> bool:
    """Kill a process after a while. Returns whether it was still running."""
    process.join(seconds)
    running = process.exitcode is None
    process.kill()
    process.join()
    return running


# --- compress -----------------------------------------------------------------------------------------


def _compress(source: Path, out: Path, how: str) -> None:
    from rbe_gpu.models.compress import compress_model

    if how == "plain":
        compress_model(source, out, codes="dense-int6")
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "calibrating on 12 different")
        compress_model(source, out, ratio=RATIO, calibrate=texts(), resume=how == "resumed")


def campaign(source: Path, folder: Path, runs: int, seed: int = 0) -> Report:
    """Kill until `runs` running processes were killed. `folder` is empty, and holds `plain` and `calibrated` after.

    Raises
    ------
    AssertionError
        An output is neither whole nor absent, or something is left behind that should not be.
    """
    rng = random.Random(seed)
    report = Report()
    right = {}
    for how in ("plain", "calibrated"):
        _compress(source, folder / how, how)
        report.seconds[how] = _seconds(_started(_compress, source, folder / how, how))
        right[how] = (folder / how).read_bytes()
    assert sorted(os.listdir(folder)) == ["calibrated", "plain"]
    while report.kills < runs:
        how = ("plain", "calibrated", "resumed")[(report.kills + report.ended) % 3]
        out = folder / ("plain" if how == "plain" else "calibrated")
        if rng.random() < 0.5:
            out.unlink(missing_ok=True)
        process = _started(_compress, source, out, how)
        # half of them near the end, where the file is written
        share = rng.random() if rng.random() < 0.5 else rng.uniform(0.85, 1.02)
        report.add(_killed(process, share * report.seconds[out.name]))
        for name in os.listdir(folder):
            if name in right:
                assert (folder / name).read_bytes() == right[name], (how, name)
            elif name == ".calibrated.journal":
                report.left["journal"] += 1
            else:
                assert name.startswith((".plain.", ".calibrated.")), name
                assert name.endswith(".partial"), name
                report.left["partial file"] += 1
    (folder / "calibrated").unlink(missing_ok=True)
    report.seconds["resumed"] = _seconds(_started(_compress, source, folder / "calibrated", "resumed"))
    report.seconds["plain"] = _seconds(_started(_compress, source, folder / "plain", "plain"))
    assert sorted(os.listdir(folder)) == ["calibrated", "plain"]
    for name, raw in right.items():
        assert (folder / name).read_bytes() == raw, name
    return report


# --- report -------------------------------------------------------------------------------------------

_ROWS_AT_ONCE, _TIMES = 5, 60
ROWS = REPOSITORY / "reports" / "results" / "amd-epyc-2-cores.csv"


def _report(rows: Path, out: Path) -> None:
    """The pages of rows into a folder, or some of them into a file, several times."""
    from rbe_gpu.reports import __main__ as pages
    from rbe_gpu.reports.harness.rows import append_rows, read_rows

    if out.suffix:
        for _ in range(_TIMES):
            append_rows(out, read_rows(rows)[:_ROWS_AT_ONCE])
    else:
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            assert pages.main([str(rows), "--out", str(out)]) == 0


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def report_campaign(folder: Path, runs: int, seed: int = 0) -> Report:
    """Kill `report` until `runs` running processes were killed. `folder` is empty.

    Raises
    ------
    AssertionError
        A file is neither that of a whole run nor absent, or something is left behind that should not be.
    """
    from rbe_gpu.reports.harness.rows import append_rows, read_rows

    rng, report = random.Random(seed), Report()
    sets, right = [], []
    for name, ops in (("few", {"softmax"}), ("more", {"softmax", "attention"})):
        sets.append(folder / f"{name}.csv")
        append_rows(sets[-1], (row for row in read_rows(ROWS) if row.op in ops))
        _report(sets[-1], folder / name)
        report.seconds[name] = _seconds(_started(_report, sets[-1], folder / name))
        right.append(_files(folder / name))
    assert right[0] != right[1]
    added = folder / "added.csv"
    report.seconds[added.name] = _seconds(_started(_report, sets[0], added))
    page = folder / "page"
    for turn in itertools.count():
        if report.kills >= runs:
            break
        out = added if turn % 3 == 2 else page
        rows = rng.choice(sets)
        seconds = report.seconds[added.name if out == added else rows.stem]
        report.add(_killed(_started(_report, rows, out), rng.random() * seconds))
        if out == added:
            assert len(read_rows(added)) % _ROWS_AT_ONCE == 0
        for name, raw in _files(folder / "page").items() if page.exists() else ():
            if name.endswith(".partial"):
                report.left["partial file"] += 1
            else:
                assert any(raw == whole.get(name) for whole in right), name
    _seconds(_started(_report, sets[1], page))
    append_rows(added, ())  # sweeps
    assert _files(page) == right[1]
    assert not list(folder.rglob("*.partial"))
    return report


def in_a_process(*arguments: str) -> None:
    """`main` in a process with no threads but the package's own, from which others can be forked."""
    subprocess.run([sys.executable, "-m", "tests.kills", *arguments], cwd=REPOSITORY, check=True)


def main(arguments: Sequence[str] | None = None) -> None:
    from .test_compress_model import make_model

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", action="store_true", help="kill `report` instead of `compress`")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        if chosen.report:
            print(report_campaign(Path(scratch), chosen.runs, chosen.seed))
            return
        source = make_model(Path(scratch) / "model")
        folder = Path(scratch) / "out"
        folder.mkdir()
        print(campaign(source, folder, chosen.runs, chosen.seed))


if __name__ == "__main__":
    main()

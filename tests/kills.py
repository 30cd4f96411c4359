"""Kill `compress` at random moments (SIGKILL), and check what is left: `python -m tests.kills --runs 100`.

Three ways in turn: plain, calibrated, and calibrated with `--resume` after a kill. After each kill the output is the
file of an earlier complete run to the byte, or is not there, and beside it are at most partial files and the
journal. After the last one, a run that resumes gives the bytes of a run without interruption, and leaves nothing
else.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import real
from .bounded import REPOSITORY

RATIO = 6.0
_COMMAND = """
import sys
from pathlib import Path
from rbe_gpu.models.compress import compress_model
from tests.kills import RATIO, texts
source, out, how = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
print("ready", flush=True)
if how == "plain":
    compress_model(source, out, codes="dense-int6")
else:
    compress_model(source, out, ratio=RATIO, calibrate=texts(), resume=how == "resumed")
"""


def texts() -> list[str]:
    return list(real.texts()[:12])


@dataclass
class Report:
    """kills : of running processes. left : how often each kind of file was left behind by a kill."""

    kills: int = 0
    ended: int = 0  # before the signal came
    left: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        left = ", ".join(f"{kind} {n}" for kind, n in sorted(self.left.items())) or "nothing"
        times = ", ".join(f"{how} {s:.1f} s" for how, s in self.seconds.items())
        return f"{self.kills} kills ({self.ended} runs had ended before); left behind: {left}; whole runs: {times}"


def _started(source: Path, out: Path, how: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", _COMMAND, str(source), str(out), how]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def _whole(source: Path, out: Path, how: str) -> float:
    """Run to the end; seconds."""
    process = _started(source, out, how)
    start = time.perf_counter()
    assert process.wait() == 0, how
    return time.perf_counter() - start


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
        report.seconds[how] = _whole(source, folder / how, how)
        right[how] = (folder / how).read_bytes()
    assert sorted(os.listdir(folder)) == ["calibrated", "plain"]
    while report.kills < runs:
        how = ("plain", "calibrated", "resumed")[(report.kills + report.ended) % 3]
        out = folder / ("plain" if how == "plain" else "calibrated")
        if rng.random() < 0.5:
            out.unlink(missing_ok=True)
        process = _started(source, out, how)
        # half of them near the end, where the file is written
        share = rng.random() if rng.random() < 0.5 else rng.uniform(0.85, 1.02)
        time.sleep(share * report.seconds[out.name])
        running = process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        report.kills += running
        report.ended += not running
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
    report.seconds["resumed"] = _whole(source, folder / "calibrated", "resumed")
    report.seconds["plain"] = _whole(source, folder / "plain", "plain")
    assert sorted(os.listdir(folder)) == ["calibrated", "plain"]
    for name, raw in right.items():
        assert (folder / name).read_bytes() == raw, name
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    from .test_compress_model import make_model

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        source = make_model(Path(scratch) / "model")
        folder = Path(scratch) / "out"
        folder.mkdir()
        print(campaign(source, folder, chosen.runs, chosen.seed))


if __name__ == "__main__":
    main()

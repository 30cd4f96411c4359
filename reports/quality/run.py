"""Measure quality per byte in this process, and write its page."""

from __future__ import annotations

import time
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console

from ..harness.baselines import torch_or_none
from ..harness.process import say
from ..harness.rows import Session
from . import measure as measuring
from . import page
from .quantizers import missing

QUICK_TEXTS = 64  # of a quick run; as many documents, a quarter of them with a query


def measure(out: Path, folder: Path, threads: int, quick: bool, resume: bool, console: Console) -> None:
    """Measure quality per byte and write its page, in this process."""
    torch = torch_or_none()
    if torch is not None:
        torch.set_num_threads(threads)
    for name, command in () if quick else missing().items():
        say(console, f"{name} is not installed and is not measured: {command}")
    out.mkdir(parents=True, exist_ok=True)
    path = out / measuring.FILE
    started, steps = time.perf_counter(), count(1)

    def elapsed() -> tuple[int, int]:
        return divmod(int(time.perf_counter() - started), 60)

    def say_step(what: str) -> None:
        minutes, seconds = elapsed()
        say(console, f"{minutes:3d}:{seconds:02d}  {next(steps):3d}  {what}")

    few: dict[str, Any] = {}
    if quick:
        few = {
            "texts": measuring.Texts.here(QUICK_TEXTS), "bits": (3.25,), "ratios": (8,), "ablation": (("dct", 64),),
            "tools": (),
        }  # fmt: skip
    rows = measuring.measure(folder, path, Session.here(threads), resume=resume, say=say_step, **few)
    written = page.write(rows, out)
    minutes, seconds = elapsed()
    print(f"{written} written in {minutes} min {seconds} s; its rows are in {path}.")

"""How long the first call takes: `rbe-gpu warmup` in fresh processes, with nothing kept, then with kernels kept."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rbe_gpu.models.locate import model_folder

from ..bench import child_environment
from .device import OURS, Device
from .stage import FAILED, PASSED, STOPPED, Options, Result, finish, start

CASES = ("nothing kept", "kernels kept")


def command(model: Path) -> list[str]:
    return [sys.executable, "-m", "rbe_gpu.cli", "warmup", str(model), "--json"]


def rows(device: Device, case: str, found: dict[str, Any]) -> None:
    """Rows of one warmup: seconds of each op's compilation, and of the first two batches."""
    shape, dtype = f"{found['tokens']} tokens", "float32"
    for op, seconds in found["compiled"][0]["seconds"].items():
        device.row(op, case, OURS, "compile_time", "s", seconds, "", "all")
    total = sum(found["compiled"][0]["seconds"].values())
    device.row("model", case, OURS, "compile_time", "s", total, shape, "all")
    for name in ("first_batch", "second_batch", "move"):
        device.row("model", case, OURS, f"{name}_time", "s", found[f"{name}_seconds"], shape, dtype)


def measure(device: Device, options: Options, result: Result) -> None:
    model = model_folder(options.model)
    with tempfile.TemporaryDirectory() as cache:
        for case in CASES:
            log = options.out / f"latency-{case.replace(' ', '-')}.json"
            began = time.perf_counter()
            process = start(
                command(model.resolve()), log, environment=child_environment(CUPY_CACHE_DIR=cache)
            )
            status = finish(process, options.seconds - result.seconds)
            said = log.read_text(encoding="utf-8", errors="replace")
            if status != 0:
                last = (said.strip().splitlines() or ["it printed nothing"])[-1]
                result.say(f"{case}: " + (last if status is not None else "no time was left"))
                result.end(STOPPED if status is None else FAILED)
                return
            found = json.JSONDecoder().raw_decode(said, said.index("{\n"))[0]
            rows(device, case, found)
            compiled = sum(found["compiled"][0]["seconds"].values())
            result.say(
                f"{case}: {time.perf_counter() - began:.1f} s in all, kernels {compiled:.2f} s, first batch "
                f"{found['first_batch_seconds']:.3f} s, second {found['second_batch_seconds']:.4f} s"
            )
            result.fact(case, found)
    result.end(PASSED)

"""Latency of the first call, in fresh processes, kernel cache empty, then full.

python -m rbe_gpu.reports.gpu.latency MODEL     what `rbe-gpu warmup MODEL --json` prints, without the command line

"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rbe_gpu import warmup as warm_up
from rbe_gpu.models.load import load_encoder

from ..harness import token_ids
from ..harness.measure import OURS
from ..harness.process import child_environment
from .device import Device, open_device
from .stage import FAILED, PASSED, STOPPED, Options, Result, finish, module_command, start

CASES = ("empty kernel cache", "filled kernel cache")


def command(options: Options, model: Path) -> list[str]:
    return module_command(options, "rbe_gpu.reports.gpu.latency", str(model))


def write_rows(device: Device, case: str, warmup: dict[str, Any]) -> None:
    """Rows of one warmup: seconds to compile each op, and of the first two batches."""
    shape, dtype = f"{warmup['tokens']} tokens", "float32"
    for op, seconds in warmup["compiled"][0]["seconds"].items():
        device.write(op, case, OURS, "compile_time", "s", seconds, "", "all")
    total = sum(warmup["compiled"][0]["seconds"].values())
    device.write("model", case, OURS, "compile_time", "s", total, shape, "all")
    for name in ("first_batch", "second_batch", "move"):
        device.write("model", case, OURS, f"{name}_time", "s", warmup[f"{name}_seconds"], shape, dtype)


def run(options: Options, result: Result) -> None:
    measure(open_device(options), options, result)


def measure(device: Device, options: Options, result: Result) -> None:
    model = token_ids.model_folder(options.model)
    with tempfile.TemporaryDirectory() as cache:
        for case in CASES:
            log = options.out / f"latency-{case.replace(' ', '-')}.log"
            began = time.perf_counter()
            process = start(
                command(options, model.resolve()), log, environment=child_environment(CUPY_CACHE_DIR=cache)
            )
            status = finish(process, options.seconds - result.seconds)
            output = log.read_text(encoding="utf-8", errors="replace")
            if status != 0:
                last = (output.strip().splitlines() or ["it printed nothing"])[-1]
                result.say(f"{case}: " + (last if status is not None else "no time was left"))
                result.end(STOPPED if status is None else FAILED)
                return
            warmup = json.JSONDecoder().raw_decode(output, output.index("{\n"))[0]
            write_rows(device, case, warmup)
            compiled = sum(warmup["compiled"][0]["seconds"].values())
            result.say(
                f"{case}: {time.perf_counter() - began:.1f} s in all, kernels {compiled:.2f} s, first batch "
                f"{warmup['first_batch_seconds']:.3f} s, second {warmup['second_batch_seconds']:.4f} s"
            )
            result.fact(case, warmup)
    result.end(PASSED)


def main() -> None:
    model = load_encoder(Path(sys.argv[1]))
    print(json.dumps(warm_up.warm(model, warm_up.gpu_named(None)), indent=2))


if __name__ == "__main__":
    main()

"""Peak memory of a function, measured in a fresh process."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .process import child_environment


def own_peak_bytes() -> int:
    """The largest resident size of this process so far."""
    try:
        # of this program alone: ru_maxrss of a child also remembers the size of the process that forked it
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_bytes(target: str, **arguments: Any) -> int:
    """Peak resident bytes of a fresh Python process that calls `target`, "package.module:function".

    `arguments` are passed as JSON.

    Raises
    ------
    RuntimeError
        The process failed; the message ends with its last line.
    """
    command = [sys.executable, "-m", "rbe_gpu.reports.harness.memory", target, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment())
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"measuring the memory of {target} failed: {last}")
    return int(done.stdout.strip().splitlines()[-1])


def extra_bytes(target: str, work: Mapping[str, Any], baseline: Mapping[str, Any]) -> int:
    """Peak bytes of `target(**work)` beyond those of `target(**baseline)`, each in a fresh process."""
    return max(0, peak_bytes(target, **work) - peak_bytes(target, **baseline))


if __name__ == "__main__":
    module, function = sys.argv[1].split(":")
    getattr(importlib.import_module(module), function)(**json.loads(sys.argv[2]))
    print(own_peak_bytes())

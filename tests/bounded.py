"""Time and memory of reading a file, measured in a process of its own.

`python -m tests.bounded load_file FILE ...` prints one JSON line per file; `models.gguf_file:read_gguf` names a
function of a module. Each file is read in a forked child, so that one's peak does not hide the next one's.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).parent.parent


class Reading(NamedTuple):
    """message: of the error, or None where the file was read. seconds: of processor time. nbytes: growth of the peak
    resident memory."""

    message: str | None
    seconds: float
    nbytes: int


def readings(function: str, files: Sequence[Path], timeout: float = 120) -> list[Reading]:
    """What `rbe_gpu.<function>(file)` does for each file; a crash or a hang is an error."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.bounded", function, *map(str, files)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=True,
    )
    found = [Reading(**json.loads(line)) for line in run.stdout.splitlines()]
    assert len(found) == len(files), run.stderr
    return found


def limit(file: Path) -> int:
    """Bytes that a reader may take before it refuses a file."""
    return 4 * file.stat().st_size + (64 << 20)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _read(function: Any, file: str) -> dict[str, Any]:
    before, start = _peak(), time.process_time()
    message = None
    try:
        function(file)
    except (ValueError, OSError, MemoryError) as error:
        message = f"{type(error).__name__}: {error}"
    return {"message": message, "seconds": time.process_time() - start, "nbytes": _peak() - before}


def main() -> None:
    module, _, name = sys.argv[1].rpartition(":")
    function = getattr(import_module(f"rbe_gpu.{module}".rstrip(".")), name)
    for file in sys.argv[2:]:
        child = os.fork()
        if not child:
            print(json.dumps(_read(function, file)), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status == 0, f"{file}: the child ended with status {status}"


if __name__ == "__main__":
    main()

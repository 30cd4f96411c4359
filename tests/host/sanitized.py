"""Runs cases of the ops under AddressSanitizer, in a process of its own: libasan must come first in it.

`run("softmax")` starts it. As a program, with the ops as arguments, it runs every case of `tests/cases` through the
launchers, each in one of its dtypes in turn; with `--source FILE OP` the source in FILE stands for that of OP.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from . import build

ROOT = Path(__file__).parent.parent.parent


class Shapes:
    """A `tests.cases.Data` of arbitrary values: only addresses matter here."""

    def layer(self, index: int, name: str) -> np.ndarray:
        wide = {"intermediate.dense.weight": (1536, 384), "output.dense.weight": (384, 1536)}
        shape = wide.get(name, (384, 384)) if name.endswith("dense.weight") or "self" in name else (384,)
        if name == "intermediate.dense.bias":
            shape = (1536,)
        return self._fill(shape)

    def weight(self, name: str) -> np.ndarray:
        return self._fill((3000, 384))

    def activations(self, rows: int, layer_index: int = 3) -> np.ndarray:
        return self._fill((rows, 384))

    def qkv(self, count: int = 8, layer_index: int = 2) -> tuple[np.ndarray, ...]:
        return (*(self._fill((count, 70, 12, 32)) for _ in range(3)), np.full(count, 70))

    @staticmethod
    def _fill(shape: tuple[int, ...]) -> np.ndarray:
        return np.resize(np.sin(np.arange(997, dtype=np.float32)), shape)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """This module as a program, with libasan preloaded."""
    env = {
        **os.environ,
        "LD_PRELOAD": build.sanitizer_runtime(),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "PYTHONPATH": str(ROOT),
        "OPENBLAS_NUM_THREADS": "1",
        "NUMBA_NUM_THREADS": "1",
        "PYTHONMALLOC": "malloc",
    }
    command = [sys.executable, "-m", "tests.host.sanitized", *arguments]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)


def _call(function: Any, args: dict[str, Any]) -> None:
    function(
        **{k: v.copy() if isinstance(v, np.ndarray) and v.flags.c_contiguous else v for k, v in args.items()}
    )


def main() -> None:
    from unittest import mock

    from rbe_gpu import dispatch, ops, registry
    from rbe_gpu.gpu import _execute, _launch

    from ..cases import CASES
    from . import executor

    names = sys.argv[1:]
    replaced = None
    if names[0] == "--source":
        replaced = executor.Library(build.build(Path(names[1]).read_text(), sanitize=True))
        names = names[2:]

    def execute(launches: tuple[_launch.Launch, ...]) -> None:
        for launch in launches:
            if replaced is None:
                executor.HostExecutor(sanitize=True)((launch,))
            else:
                replaced.launch(launch)

    launchers = dispatch.Backend("host", "rbe_gpu.gpu")
    data = Shapes()
    for name in names:
        cases = CASES[name].cases
        for i, case in enumerate(cases):
            # compressed with the CPU's kernels
            args = case.make(data, registry.DTYPES[case.dtypes[i % len(case.dtypes)]])
            with (
                np.errstate(all="ignore"),
                mock.patch.object(dispatch, "CPU", launchers),
                _execute.executor(execute),
            ):
                _call(getattr(ops, name), args)
        print(name, len(cases))


if __name__ == "__main__":
    main()

"""Processes that measure: they import the same package, and all their libraries use the same number of threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import rbe_gpu

from .rows import usable_cores

if TYPE_CHECKING:
    from rich.console import Console

PATIENCE = 20.0  # seconds that the measuring process has to clean up after an interrupt
#: environment variables from which each library reads its number of threads when it is loaded
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMBA_NUM_THREADS",
)


def child_environment(**variables: str) -> dict[str, str]:
    """The environment of a process that imports the same rbe_gpu as this one, with further variables."""
    here = str(Path(rbe_gpu.__file__).parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    path = here if not inherited else os.pathsep.join((here, inherited))
    # idle threads of NumPy's OpenBLAS must not spin into the turn of the next provider
    return {"OPENBLAS_THREAD_TIMEOUT": "4", **os.environ, "PYTHONPATH": path, **variables}


def start(module: str, arguments: Sequence[str], threads: int) -> int:
    """Run a module as a command, in a process whose libraries all use so many threads. Returns its exit status.

    Raises
    ------
    ChildProcessError
        The process was killed.
    """
    environment = child_environment(**dict.fromkeys(THREAD_VARIABLES, str(threads)))
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(command, env=environment) as child:
        try:
            status = child.wait()
        except BaseException:  # an interrupt: the child removes its scratch folder
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(timeout=PATIENCE)
            child.kill()
            raise
    if status < 0:
        raise ChildProcessError(f"the measuring process was ended by {signal.Signals(-status).name}")
    return status


def threads_to_use() -> int:
    """`RBE_THREADS`, or one for each core."""
    text = os.environ.get("RBE_THREADS") or str(usable_cores())
    if not text.isdecimal() or not 1 <= int(text[:9]) <= 4096:
        raise ValueError(f"RBE_THREADS={text!r} is not a number of threads; set it to 1 or more, or unset it")
    return int(text)


def say(console: Console, what: str) -> None:
    """Print a line of plain text on the terminal of a measuring process."""
    console.print(what, markup=False, highlight=False, soft_wrap=True)

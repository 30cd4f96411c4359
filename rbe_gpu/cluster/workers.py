"""Checks of the workers before any work: the same package, the same files, the same kind of processor."""

from __future__ import annotations

import os
import pkgutil
import socket
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import __version__, dispatch
from .connect import ClusterError


def check_workers(client: Any, files: Sequence[Path] = (), folders: Sequence[Path] = ()) -> None:
    """Check that each worker has this version of the package and sees the same files.

    Workers with another processor, or other versions of NumPy or Numba, than the others or this process get one
    warning: the last bits of their results may differ.

    Parameters
    ----------
    client : a `distributed.Client`
    files : what workers read, compared by size
    folders : where they write

    Raises
    ------
    ClusterError
        A worker is not so; the message names it.
    """
    # names of the standard library, which a worker without this package, or of another Python, can look up
    for where, here in _answers(client, pkgutil.resolve_name, "rbe_gpu:__version__"):
        if isinstance(here, BaseException):
            raise ClusterError(f"worker {where} has no rbe_gpu ({_line(here)}); install {__version__} there")
        check_version(where, here, __version__)
    asked = [(str(path), path.stat().st_size) for path in files]
    kinds = {"this process": platform()}
    for where, here in _answers(client, state, asked, [str(path) for path in folders]):
        if isinstance(here, BaseException):
            raise ClusterError(f"worker {where} cannot be used: {_line(here)}")
        if here["problem"]:
            raise ClusterError(f"worker {where} on {here['host']}: {here['problem']}")
        kinds[f"worker {where}"] = here["platform"]
    others = [where for where, kind in kinds.items() if kind != kinds["this process"]]
    if others:
        warnings.warn(
            f"{others[0]} has another processor, or another version of NumPy or Numba, than this process: the last "
            "bits of its results may differ",
            RuntimeWarning,
            stacklevel=2,
        )


def check_version(where: str, here: str, expected: str) -> None:
    """A ClusterError if the worker at `where` has another version of the package than the process of a run."""
    if here != expected:
        raise ClusterError(
            f"worker {where} has rbe_gpu {here}, the process of this run {expected}; install the same version"
        )


def _answers(client: Any, function: Any, *args: Any) -> list[tuple[str, Any]]:
    """(worker, result or exception) of a call on every worker."""
    answers: dict[str, Any] = client.run(function, *args, on_error="return")
    return sorted(answers.items())


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def platform() -> dict[str, Any]:
    """What the last bits of results depend on, besides the number of threads of BLAS."""
    isa = dispatch.CPU.module("isa").active()
    return {
        "processor": [isa.cpu, *sorted(isa.features)],
        **{name: version(name) for name in ("numpy", "numba")},
    }


def state(files: Sequence[tuple[str, int]], folders: Sequence[str]) -> dict[str, Any]:
    """Of the worker that calls this: its host and platform, and what is wrong with files and folders, or ""."""
    problem = ""
    for path, size in files:
        try:
            here = os.stat(path).st_size
        except OSError as error:
            problem = f"{path}: {error.strerror}; workers read the same shared paths"
            break
        if here != size:
            problem = f"{path} has {here} bytes there and {size} here; workers read the same shared paths"
            break
    for folder in folders:
        if not os.access(folder, os.W_OK | os.X_OK):
            problem = (
                problem or f"{folder} is no folder that can be written; workers write to the same shared path"
            )
    return {"host": socket.gethostname(), "problem": problem, "platform": platform()}

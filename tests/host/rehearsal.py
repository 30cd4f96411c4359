"""Run a module as `python -m` does, without a GPU: with the stand-in for CuPy and the host build of the kernels.

    python -m tests.host.rehearsal rbe_gpu.reports.gpu.check --stage linear ...

`reports.gpu.device.open_device` gives a device whose rows say that they are a rehearsal's, and PyTorch on the CPU
stands for PyTorch on the GPU. Where CuPy is installed, it is imported, and must have every name of the stand-in's.
"""

from __future__ import annotations

import runpy
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from rbe_gpu.reports.gpu import device
from rbe_gpu.reports.gpu.stage import Options
from rbe_gpu.reports.harness.rows import Session, usable_cores
from rbe_gpu.reports.harness.timing import WallClock

from rbe_gpu import set_num_threads

from . import capture

NAME = "Rehearsal without a GPU (kernels built by the C++ compiler, PyTorch on the CPU)"
BACKEND = "rehearsal"  # not "cuda": no target counts such a row
FILE = "rehearsal.csv"


def open_device(options: Options) -> device.Device:
    """Stands for `device.open_device`."""
    import cupy

    torch: Any
    try:
        import torch
    except ImportError:
        torch = None
    here = Session.here(usable_cores())
    return device.Device(
        cupy,
        torch,
        WallClock(lambda: None),
        lambda to, source: np.copyto(to, source),
        replace(here, device=NAME, commit=options.commit or here.commit, backend=BACKEND),
        options.rows / FILE,
        cache_bytes=1 << 16,
        quick=True,
        seconds=0.0,
        torch_device="cpu",
        end=time.perf_counter() + device.ENDS * options.seconds,
    )


def lacking(stand_in: Any, real: Any, path: str = "cupy") -> Iterator[str]:
    """Names that the stand-in has and CuPy has not."""
    for name, value in vars(stand_in).items():
        if name.startswith("__"):
            continue
        if not hasattr(real, name):
            yield f"{path}.{name}"
        elif isinstance(value, SimpleNamespace):
            yield from lacking(value, getattr(real, name), f"{path}.{name}")


def installed_cupy() -> ModuleType | None:
    """CuPy, or None where it is not installed."""
    try:
        import cupy
    except ModuleNotFoundError as error:
        if error.name != "cupy":
            raise
        return None
    return cupy


def main() -> None:
    module, *arguments = sys.argv[1:]
    cupy = installed_cupy()
    version = "not installed" if cupy is None else f"{cupy.__version__}, imported"
    print(f"rehearsal: CuPy is {version}; a stand-in takes its place", flush=True)
    with capture.installed() as (stand_in, _):
        missing = [] if cupy is None else list(lacking(stand_in, cupy))
        if missing:
            sys.exit(f"rehearsal: CuPy {version} has no {', '.join(missing)}")
        device.open_device = open_device
        set_num_threads(1)  # nothing here is measured, and other processes share the cores
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

"""The GPU that stages measure on: memory for CuPy and PyTorch, the clock, and rows as they are measured."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..harness.measure import Case, check_case, measure
from ..harness.rows import Session, append_rows, usable_cores, versions
from ..harness.timing import MAX_QUEUED, Calls, Clock, EventClock, paired_times
from .stage import Options, Result

COPY = "copy"
CACHES = 4  # times the second-level cache: the total of rotating buffers
MAX_COPIES = 64


@dataclass
class Device:
    """One GPU.

    Attributes
    ----------
    torch : PyTorch with CUDA, or None
    torch_device : where its tensors go
    copy : (to, from) -> copies one array over another on the GPU
    path : the rows' file
    cache_bytes : size of the second-level cache
    seconds : for one case, all providers together
    """

    cupy: Any
    torch: Any
    clock: Clock
    copy: Callable[[Any, Any], None]
    session: Session
    path: Path
    cache_bytes: int
    quick: bool = False
    seconds: float = 1.5
    torch_device: str = "cuda"

    def array(self, host: NDArray[Any]) -> Any:
        """On the GPU, in memory of its own."""
        return self.cupy.asarray(host)

    def tensor(self, host: NDArray[Any]) -> Any:
        """A PyTorch tensor on the GPU, in memory of its own."""
        return self.torch.from_numpy(np.array(host)).to(self.torch_device)

    def copies(self, nbytes: int) -> int:
        """How many sets of `nbytes` make `CACHES` times the cache: no set is in the cache when its turn comes."""
        if self.quick:
            return 2
        return min(MAX_COPIES, max(2, ceil(CACHES * self.cache_bytes / nbytes)))

    def times(self, calls: Mapping[str, Calls], clock: Clock | None = None) -> dict[str, list[float]]:
        """Seconds per call of every provider, by the GPU's clock or another one."""
        return paired_times(
            calls, clock=clock or self.clock, seconds=self.seconds, least=3 if self.quick else 7, most=60, warm_up=2,
            short=0.0, max_calls=MAX_QUEUED,
        )  # fmt: skip

    def measure(self, case: Case, clock: Clock | None = None) -> dict[str, list[float]]:
        """Check every provider, time them and write the rows. Returns the times by provider."""
        rows, times = measure(case, self.session, lambda calls: self.times(calls, clock))
        append_rows(self.path, rows)
        return times

    def check(self, case: Case) -> None:
        """Check every provider, and write the rows of their errors."""
        append_rows(self.path, check_case(case, self.session))

    def row(self, case: Case, provider: str, metric: str, unit: str, values: Any) -> None:
        """Write a further row of a case."""
        append_rows(self.path, [case.row(self.session, provider, metric, unit, values)])

    def rows(self, case: Case, metric: str, unit: str, by_provider: Mapping[str, Any]) -> None:
        """Write a further metric of several providers."""
        for provider, values in by_provider.items():
            self.row(case, provider, metric, unit, values)

    def write(
        self, op: str, case: str, provider: str, metric: str, unit: str, values: Any, shape: str, dtype: str
    ) -> None:
        """Write a row that is of no `Case`."""
        append_rows(
            self.path, [self.session.row(op, case, provider, metric, unit, values, shape=shape, dtype=dtype)]
        )


def attempt(device: Device, result: Result, name: str, measure: Callable[[], Any]) -> None:
    """Measure one case. Its error is reported and counted, and later cases go on, unless the GPU itself is broken."""
    try:
        measure()
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        result.fact("failed", [*result.facts.get("failed", []), name])
        result.say(f"{name}: FAILED: {type(error).__name__}: {first}")
        device.clock.synchronize()  # raises where a kernel has broken the context
    else:
        result.say(f"{name}: measured")


def sampled(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, evenly spread, including the first and the last."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most))})


def file_name(gpu: str) -> str:
    """The rows' file of a GPU: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3.csv"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".csv"


def _described(properties: Mapping[str, Any]) -> str:
    name = properties["name"]
    name = name.decode() if isinstance(name, bytes) else name
    return (
        f"{name} (sm_{properties['major']}{properties['minor']}, {properties['multiProcessorCount']} "
        f"multiprocessors, {properties['totalGlobalMem'] / 2**30:.0f} GiB)"
    )


def _versions(cupy: Any, torch: Any) -> str:
    """The libraries of `rows.versions`, and those of the GPU."""
    from rbe_gpu import machine

    gpus, _ = machine.gpus()
    runtime = int(cupy.cuda.runtime.runtimeGetVersion())
    every = [versions(), f"cupy {cupy.__version__}"]
    if gpus:
        every += [f"driver {gpus[0]['driver']}", f"CUDA of the driver {gpus[0]['cuda']}"]
    every.append(f"CUDA {runtime // 1000}.{runtime % 1000 // 10}")
    every.append(f"NVRTC {'.'.join(map(str, cupy.cuda.nvrtc.getVersion()))}")
    if torch is not None:
        every += [f"CUDA of torch {torch.version.cuda}", f"cuDNN {torch.backends.cudnn.version()}"]
    return ", ".join(every)


def open_device(options: Options) -> Device:
    """CuPy's current GPU.

    Raises
    ------
    ImportError, RuntimeError
        No CuPy, or no GPU.
    """
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
    try:
        import torch
    except ImportError:
        torch = None
    if torch is not None and not torch.cuda.is_available():
        torch = None
    here = Session.here(usable_cores())
    session = replace(
        here,
        device=_described(properties),
        versions=_versions(cupy, torch),
        commit=options.commit or here.commit,
        backend="cuda",
    )
    name = properties["name"]
    path = options.rows / file_name(name.decode() if isinstance(name, bytes) else name)

    def copy(to: Any, source: Any) -> None:
        to.data.copy_from_device_async(source.data, source.nbytes)

    return Device(
        cupy,
        torch,
        EventClock(cupy),
        copy,
        session,
        path,
        int(properties["l2CacheSize"]),
        options.quick,
        0.2 if options.quick else 1.5,
    )

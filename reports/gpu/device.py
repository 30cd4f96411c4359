"""The GPU that stages measure on: memory for CuPy and PyTorch, the clock, and rows as they are measured."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import bench
from ..bench import Row, Session, append_rows
from .stage import Options, Result
from .timing import Calls, Clock, EventClock, paired

OURS, TORCH, COPY = "rbe_gpu", "PyTorch", "copy"
CACHES = 4  # times the second-level cache: what rotating buffers add up to
MOST_COPIES = 64


class WrongResult(RuntimeError):
    """A rival's result is further from the right one than allowed; it is not timed."""


@dataclass
class Device:
    """One GPU.

    Attributes
    ----------
    torch : PyTorch with CUDA, or None
    torch_device : where its tensors go
    copy : (to, from) -> copies one array over another on the GPU
    cache_bytes : size of the second-level cache
    seconds : for one case, all rivals together
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
        """A tensor of PyTorch's on the GPU, in memory of its own."""
        return self.torch.from_numpy(np.array(host)).to(self.torch_device)

    def copies(self, nbytes: int) -> int:
        """How many sets of `nbytes` are `CACHES` times the cache: no set is in the cache when its turn comes."""
        if self.quick:
            return 2
        return min(MOST_COPIES, max(2, ceil(CACHES * self.cache_bytes / nbytes)))

    def times(self, rivals: Mapping[str, Calls], clock: Clock | None = None) -> dict[str, list[float]]:
        """Seconds per call of every rival, by the GPU's clock or another one."""
        return paired(clock or self.clock, rivals, self.seconds, least=3 if self.quick else 7)

    def row(
        self,
        op: str,
        case: str,
        provider: str,
        metric: str,
        unit: str,
        values: float | Iterable[float],
        shape: str,
        dtype: str,
    ) -> Row:
        """A row, written at once."""
        made = self.session.row(
            op, case, provider, metric, unit, values, shape=shape, dtype=dtype, backend="cuda"
        )
        append_rows(self.path, [made])
        return made

    def check(
        self,
        what: str,
        found: Any,
        expected: NDArray[np.float64],
        allowed: float,
        floor: float = 0.0,
        sample: Iterable[Any] | None = None,
    ) -> float:
        """Relative Frobenius error of an array or tensor, or of what `sample` indexes in it.

        Raises
        ------
        WrongResult
            It is more than `allowed`.
        """
        from rbe_gpu.registry import relative_error

        host = fetch(found) if sample is None else np.stack([fetch(found[i]) for i in sample])
        error = relative_error(host, np.asarray(expected, np.float64), floor)
        if not error <= allowed:
            raise WrongResult(
                f"{what} is off by {error:.3g} (allowed {allowed:g}); a wrong result is not timed"
            )
        return error


def attempt(device: Device, result: Result, name: str, measure: Callable[[], Any]) -> None:
    """One case. Its error is told and counted, and the next case goes on, unless the GPU itself is broken."""
    try:
        measure()
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        result.fact("failed", [*result.facts.get("failed", []), name])
        result.say(f"{name}: FAILED: {type(error).__name__}: {first}")
        device.clock.synchronize()  # raises where a kernel has broken the context
    else:
        result.say(f"{name}: measured")


def fetch(found: Any) -> NDArray[Any]:
    """An array of CuPy or a tensor of PyTorch as a NumPy array."""
    return np.asarray(found.get() if hasattr(found, "get") else found.detach().cpu().numpy())


def sampled(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, spread evenly, the first and the last among them."""
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
    """The libraries of `bench.versions`, and those of the GPU."""
    from rbe_gpu import machine

    gpus, _ = machine.gpus()
    runtime = int(cupy.cuda.runtime.runtimeGetVersion())
    found = [bench.versions(), f"cupy {cupy.__version__}"]
    if gpus:
        found += [f"driver {gpus[0]['driver']}", f"CUDA of the driver {gpus[0]['cuda']}"]
    found.append(f"CUDA {runtime // 1000}.{runtime % 1000 // 10}")
    found.append(f"NVRTC {'.'.join(map(str, cupy.cuda.nvrtc.getVersion()))}")
    if torch is not None:
        found += [f"CUDA of torch {torch.version.cuda}", f"cuDNN {torch.backends.cudnn.version()}"]
    return ", ".join(found)


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
    here = Session.here(bench.usable_cores())
    session = Session(
        here.threads,
        _described(properties),
        _versions(cupy, torch),
        options.commit or here.commit,
        here.timestamp,
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

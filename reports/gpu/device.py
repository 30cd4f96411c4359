"""The GPU that stages measure on: memory for CuPy and PyTorch, the clock, and rows as they are measured."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf, isfinite
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rbe_gpu.gpu import _load

from ..harness.measure import OURS, Case, Provider, check_case, time_rows
from ..harness.rows import Session, append_rows, usable_cores, versions
from ..harness.timing import MAX_QUEUED, Calls, Clock, EventClock, paired_times
from .stage import Options, Result

COPY = "copy"
CACHES = 4  # times the second-level cache: the total of rotating buffers
MAX_COPIES = 64
#: seconds for a case; less where a stage has little time, to reach all of its cases
SECONDS, LEAST_SECONDS = 1.5, 0.15
TIMED = 0.4  # of a case's time; the rest makes its arrays and checks the results
ENDS = 0.93  # of a stage's time: the process must start, and end, in the rest


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
    end : no case is begun after this time (`time.perf_counter`)
    say : takes messages for the reader
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
    end: float = inf
    say: Callable[[str], None] = print

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
            calls, clock=clock or self.clock, seconds=self.seconds, least=2 if self.quick else 7, most=60,
            warm_up=1 if self.quick else 2,
            short=0.0, max_calls=MAX_QUEUED,
        )  # fmt: skip

    def baselines(self, what: str, make: Callable[[], Mapping[str, Provider]]) -> dict[str, Provider]:
        """Providers of another library; none, and a message, where making them raises."""
        try:
            return dict(make())
        except Exception as error:  # theirs must not fail our case
            self.say(f"{what}: no baselines: {described(error)}")
            self.clock.synchronize()  # raises where a kernel has broken the context
            return {}

    def checked(self, case: Case) -> Case:
        """Check every provider and write the rows of their errors.

        Returns
        -------
        The case without the baselines whose result is wrong or that raise: a message names them.

        Raises
        ------
        WrongResult
            Our own result is wrong.
        """
        rows, providers = [], {}
        for name, provider in case.providers.items():
            try:
                if provider.expected is None:  # not compared, but it must run
                    provider.calls[-1]()
                rows += check_case(replace(case, providers={name: provider}), self.session)
            except Exception as error:
                if not is_baseline(name):
                    raise
                self.say(f"{_title(case)}: {name} is left out: {described(error)}")
                self.clock.synchronize()
                continue
            providers[name] = provider
        append_rows(self.path, rows)
        return replace(case, providers=providers)

    def compare(self, calls: Mapping[str, Calls], clock: Clock | None = None) -> dict[str, list[float]]:
        """`times`; if that raises, the times without the baselines."""
        try:
            return self.times(calls, clock)
        except Exception as error:
            ours = {name: c for name, c in calls.items() if not is_baseline(name)}
            if len(ours) in (0, len(calls)):
                raise
            self.say(f"{', '.join(calls.keys() - ours.keys())} is left out: {described(error)}")
            self.clock.synchronize()
            return self.times(ours, clock)

    def measure(self, case: Case, clock: Clock | None = None) -> dict[str, list[float]]:
        """Check every provider, time them and write the rows.

        Returns
        -------
        provider -> seconds per call, without the baselines that are wrong or raise

        Raises
        ------
        WrongResult
            Our own result is wrong.
        """
        case = self.checked(case)
        times = self.compare({name: p.calls for name, p in case.providers.items()}, clock)
        append_rows(self.path, time_rows(case, self.session, times))
        return times

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


def capability() -> tuple[int, int]:
    """Compute capability of CuPy's current GPU, (9, 0) for instance."""
    import cupy

    return _load.capability(cupy.cuda.runtime.getDevice())


def is_baseline(provider: str) -> bool:
    """Whether a provider is another library's: neither this package nor a plain copy."""
    return provider != COPY and not provider.startswith(OURS)


def described(error: BaseException) -> str:
    """The type and first line of an error."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _title(case: Case) -> str:
    return f"{case.op}, {case.name}, {case.dtype}"


def run_cases(device: Device, result: Result, cases: Sequence[tuple[str, Callable[[], Any]]]) -> None:
    """Measure cases in their order while the stage has time, each for its share of what is left.

    cases : name and measurement, the most important first
    """
    device.say = result.say
    for i, (name, measure) in enumerate(cases):
        left = device.end - time.perf_counter()
        if left <= 0:
            names = [n for n, _ in cases[i:]]
            result.fact("not_reached", [*result.facts.get("not_reached", []), *names])
            result.say(f"no time was left for {len(names)} of {len(cases)} cases: {names[0]}, ...")
            return
        if isfinite(left) and not device.quick:
            device.seconds = min(SECONDS, max(LEAST_SECONDS, TIMED * left / (len(cases) - i)))
        attempt(device, result, name, measure)


def attempt(device: Device, result: Result, name: str, measure: Callable[[], Any]) -> None:
    """Measure one case. Its error is reported and counted, and later cases go on, unless the GPU itself is broken."""
    try:
        measure()
    except Exception as error:
        result.fact("failed", [*result.facts.get("failed", []), name])
        result.say(f"{name}: FAILED: {described(error)}")
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

    try:
        gpus, _ = machine.gpus()
    except ImportError:  # nvidia-ml-py: the driver's version is then not recorded
        gpus = []
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
        0.2 if options.quick else SECONDS,
        end=time.perf_counter() + ENDS * options.seconds,
    )

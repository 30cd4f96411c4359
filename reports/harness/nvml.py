"""What an NVIDIA GPU does now, from NVML: utilisation, memory, power and clocks, and the energy that it has taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple


class Sample(NamedTuple):
    """One reading; None of what NVML does not tell of this GPU, or not to this user.

    busy : % of the time since NVML's last reading in which a kernel ran
    memory : bytes in use, by all processes
    power : W, of the whole board
    sm_clock, memory_clock : MHz
    """

    busy: float | None
    memory: float | None
    power: float | None
    sm_clock: float | None
    memory_clock: float | None


class Gpu:
    """One GPU of an initialised NVML."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self.name = str(nvml.nvmlDeviceGetName(handle))

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The answer, or None where the GPU does not have it or the user may not read it; other errors are raised."""
        try:
            return function(self._handle, *arguments)
        except self._nvml.NVMLError as error:
            if error.value in (self._nvml.NVML_ERROR_NOT_SUPPORTED, self._nvml.NVML_ERROR_NO_PERMISSION):
                return None
            raise

    def sample(self) -> Sample:
        """What it does now."""
        nvml = self._nvml
        rates, memory = self._ask(nvml.nvmlDeviceGetUtilizationRates), self._ask(nvml.nvmlDeviceGetMemoryInfo)
        power = self._ask(nvml.nvmlDeviceGetPowerUsage)  # mW
        clocks = (
            self._ask(nvml.nvmlDeviceGetClockInfo, c) for c in (nvml.NVML_CLOCK_SM, nvml.NVML_CLOCK_MEM)
        )
        return Sample(
            None if rates is None else float(rates.gpu),
            None if memory is None else float(memory.used),
            None if power is None else power / 1e3,
            *(None if clock is None else float(clock) for clock in clocks),
        )

    def energy(self) -> float | None:
        """Joules taken since the driver was loaded; None on GPUs older than Volta, or where it may not be read."""
        millijoules = self._ask(self._nvml.nvmlDeviceGetTotalEnergyConsumption)
        return None if millijoules is None else millijoules / 1e3


@contextmanager
def watched(bus: str, nvml: Any = None) -> Iterator[Gpu]:
    """The GPU with this PCI bus id, as CUDA gives it: NVML numbers GPUs in another order.

    nvml : the module pynvml, or an object with its functions
    """
    if nvml is None:
        nvml = import_module("pynvml")
    nvml.nvmlInit()
    try:
        yield Gpu(nvml, nvml.nvmlDeviceGetHandleByPciBusId(bus))
    finally:
        nvml.nvmlShutdown()

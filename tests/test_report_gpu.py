"""A GPU over time in the report, with a stand-in for NVML that answers as its documentation says."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rbe_gpu.reports.harness import nvml, plots
from rbe_gpu.reports.harness.libraries import LibraryFailed
from rbe_gpu.reports.harness.row_names import DENSE
from rbe_gpu.reports.harness.rows import Results, Row, Session
from rbe_gpu.reports.speed import machine_plots, page, run, short, utilisation
from rbe_gpu.reports.speed.processes import RemoteEncoder

from .html_page import checked

SESSION = Session(
    2, "a processor (2 cores)", "python 3.11, numpy 2.0", "0123456789ab", "2030-01-02T03:04:05Z"
)
BUS = "00000000:65:00.0"


class NVMLError(Exception):
    """As pynvml raises it: `value` is NVML's return code."""

    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.value = value


class FakeNvml:
    """One GPU. Units as NVML documents them: %, bytes, milliwatts, MHz, and millijoules since the driver was loaded.

    missing : functions that answer NVML_ERROR_NOT_SUPPORTED
    refused : functions that answer NVML_ERROR_NO_PERMISSION
    """

    NVMLError = NVMLError
    NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_NO_PERMISSION, NVML_ERROR_GPU_IS_LOST = 3, 4, 15
    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    def __init__(self, missing: tuple[str, ...] = (), refused: tuple[str, ...] = ()) -> None:
        self.missing, self.refused, self.open, self.reads, self.lost = missing, refused, 0, 0, False

    def _answer(self, name: str, handle: str, value: Any) -> Any:
        assert self.open == 1
        assert handle == "handle"
        if self.lost:
            raise NVMLError(self.NVML_ERROR_GPU_IS_LOST)
        if name in self.missing:
            raise NVMLError(self.NVML_ERROR_NOT_SUPPORTED)
        if name in self.refused:
            raise NVMLError(self.NVML_ERROR_NO_PERMISSION)
        return value

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByPciBusId(self, bus: str) -> str:
        assert bus == BUS
        return "handle"

    def nvmlDeviceGetName(self, handle: str) -> str:
        return str(self._answer("name", handle, "NVIDIA H200"))

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        self.reads += 1
        return self._answer("utilisation", handle, SimpleNamespace(gpu=90 + self.reads, memory=40))

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return self._answer("memory", handle, SimpleNamespace(total=150 << 30, free=149 << 30, used=1 << 30))

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return int(self._answer("power", handle, 350_000 + self.reads))

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return int(self._answer("clock", handle, {1: 1980, 2: 3201}[kind]))

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        return int(self._answer("energy", handle, 5_000_000 + 140_000 * self.reads))


class FakeLibrary:
    """A process that is done after three waits."""

    pid = os.getpid()

    def __init__(self) -> None:
        self.waits = self.unanswered = 0

    def send(self, *message: Any) -> None:
        assert message == ("embed_for", f"{DENSE}, GPU", ["a"] * 100, 1.0)
        self.unanswered += 1

    def ready(self, seconds: float) -> bool:
        assert seconds == utilisation.STEP
        self.waits += 1
        return self.waits > 3

    def request(self, method: str, *arguments: Any) -> None:
        assert method == "embed"

    def receive(self) -> int:
        self.unanswered -= 1
        return 7


def measured(fake: FakeNvml) -> list[Row]:
    library: Any = FakeLibrary()
    encoder = RemoteEncoder(library, f"{DENSE}, GPU")
    return [*utilisation.measure_gpu(encoder, BUS, ["a"] * 100, 1.0, SESSION, fake)]


def test_every_sample_of_a_gpu_is_rows_in_plain_units() -> None:
    fake = FakeNvml()
    rows = measured(fake)
    assert fake.open == 0
    assert {(r.backend, r.device) for r in rows} == {("cuda", "NVIDIA H200")}
    assert [r.metric for r in rows] == [*[*utilisation.GPU_METRICS] * 3, utilisation.JOULES]
    assert [(r.p50, r.unit) for r in rows[:5]] == [
        (91, "%"), (1 << 30, "B"), (350.001, "W"), (1980, "MHz"), (3201, "MHz"),
    ]  # fmt: skip
    assert rows[-1].p50 == pytest.approx(3 * 140 / 700 * 1000)  # 140 J a reading, 7 batches of 100 texts
    assert rows[-1].shape == "7 batches of 100 texts, energy counter"


def test_what_a_gpu_does_not_tell_has_no_row() -> None:
    rows = measured(FakeNvml(missing=("utilisation", "clock", "energy")))
    assert {r.metric for r in rows} == {"gpu_memory", "gpu_power", utilisation.JOULES}
    assert rows[-1].shape.endswith("mean power x time")
    assert rows[-1].p50 > 0
    assert {r.metric for r in measured(FakeNvml(missing=("power", "energy")))} == {
        "gpu_busy", "gpu_memory", "gpu_sm_clock", "gpu_memory_clock",
    }  # fmt: skip
    assert measured(FakeNvml(missing=("utilisation", "memory", "power", "clock", "energy"))) == []


def test_what_a_user_may_not_read_has_no_row() -> None:
    rows = measured(FakeNvml(refused=("energy", "utilisation")))
    assert {r.metric for r in rows} == {*utilisation.GPU_METRICS, utilisation.JOULES} - {"gpu_busy"}
    assert rows[-1].shape.endswith("mean power x time")


def test_other_errors_of_nvml_are_raised_and_it_is_closed() -> None:
    fake = FakeNvml()
    with nvml.watched(BUS, fake) as gpu:
        fake.lost = True
        with pytest.raises(NVMLError):
            gpu.sample()
    assert fake.open == 0
    fake.lost = False
    with pytest.raises(ZeroDivisionError), nvml.watched(BUS, fake):
        1 / 0  # noqa: B018
    assert fake.open == 0


def test_the_functions_are_those_of_pynvml() -> None:
    import pynvml

    for name in dir(FakeNvml):
        if name.startswith(("nvml", "NVML")):
            assert hasattr(pynvml, name), name
        if name.startswith("NVML_"):
            assert getattr(pynvml, name) == getattr(FakeNvml, name), name
    assert pynvml.NVMLError(3).value == 3


# --- the page -----------------------------------------------------------------------------------------------


def test_the_page_shows_the_gpu_over_time(tmp_path: Path) -> None:
    rows = measured(FakeNvml())
    (plot,) = plots.draw([machine_plots.gpu], Results(rows))
    assert len(plot.values) == 3 * 5
    assert len(plot.figure.axes) == 5
    assert {v.words.partition(" at ")[0] for v in plot.values} == {
        "busy", "memory", "power", "SM clock", "memory clock",
    }  # fmt: skip
    assert any(v.words.endswith(": 1.074 GB") for v in plot.values)
    page.write(rows, tmp_path)
    source = (tmp_path / "index.html").read_text(encoding="utf-8")
    checked(source, (plots.INK, plots.GRID, plots.PAPER))
    assert "600 J per 1,000 sentences, of the whole board (energy counter)" in source
    assert "NVIDIA H200" in source


def test_without_a_gpu_nothing_is_shown() -> None:
    cpu = SESSION.row("utilisation", "0.20 s", "core 0", "busy", "%", 90.0, shape="2 batches")
    assert plots.draw([machine_plots.gpu], Results([cpu])) == []
    source = page.render([cpu], [])
    assert "joules" not in source
    assert "1,000 sentences" not in source


def test_the_machine_of_cpu_figures_is_the_processor(tmp_path: Path) -> None:
    """The GPU is named in its plot and nowhere else."""
    cpu = SESSION.row("gelu", "64 x 64", DENSE, "time", "s", [1e-5, 1e-5, 1e-5])
    rows = [*measured(FakeNvml()), cpu]
    page.write(rows, tmp_path)
    source = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert source.count("NVIDIA H200") == 1
    assert source.count("NVIDIA H200: what NVML tells") == 1
    assert source.count("a processor (2 cores)") == 3  # head, summary, machine
    assert short._machine(Results(rows)).startswith("a processor (2 cores)")


# --- a GPU that cannot be measured -----------------------------------------------------------------------


class FailingProcesses:
    """Loads an encoder on a GPU, or raises."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.library = error, FakeLibrary()

    def load_on_gpu(self, provider: str, file: Path) -> tuple[RemoteEncoder, str]:
        if self.error is not None:
            raise self.error
        library: Any = self.library
        return RemoteEncoder(library, provider), BUS


def tried(processes: Any) -> list[Row]:
    return utilisation.try_gpu(processes, Path("model"), ["a"] * 100, 1.0, SESSION)


@pytest.mark.parametrize(
    "error", [LibraryFailed("CUDARuntimeError:  no\n device"), ImportError("libcublas.so.12")]
)
def test_a_gpu_that_fails_does_not_end_the_report(error: Exception, tmp_path: Path) -> None:
    rows = tried(FailingProcesses(error))
    assert [(r.metric, r.shape, r.device) for r in rows] == [
        (utilisation.GPU_NOT_MEASURED, " ".join(str(error).split()), SESSION.device)
    ]
    page.write(rows, tmp_path)
    source = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert f"<strong>The GPU: not measured.</strong> {' '.join(str(error).split())}" in source


def test_nvml_that_fails_leaves_the_process_ready_for_the_next_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake, processes = FakeNvml(), FailingProcesses()
    monkeypatch.setattr(nvml, "import_module", lambda name: fake)
    assert len(tried(processes)) == 3 * 5 + 1

    def lost(seconds: float) -> bool:
        fake.lost = True
        return False

    monkeypatch.setattr(processes.library, "ready", lost)
    (row,) = tried(processes)
    assert (row.metric, row.shape) == (utilisation.GPU_NOT_MEASURED, "15")
    assert processes.library.unanswered == 0
    assert fake.open == 0


GPU = {"supported": True, "cuda": "12.8"}
WORKS = {"works": True, "devices": 1, "errors": {}}
ABSENT = {"works": False, "devices": 0, "errors": {"import": "CuPy is not installed"}}
BROKEN = {"works": False, "devices": 0, "errors": {"import": "CuPy does not import (libnvrtc)"}}
HIDDEN = {"works": True, "devices": 0, "errors": {"devices": "cudaErrorNoDevice: no CUDA-capable device"}}


@pytest.mark.parametrize(
    ("gpus", "cupy", "runs", "reason"),
    [
        ([], ABSENT, False, None),
        ([], HIDDEN, False, None),
        ([], WORKS, False, "NVML does not answer"),
        ([GPU | {"supported": False}], WORKS, False, None),
        ([GPU], WORKS, True, None),
        ([GPU], ABSENT, False, "CuPy is not installed: pip install 'rbe-gpu[cuda12]'"),
        ([GPU], BROKEN, False, "CuPy does not import (libnvrtc): pip install 'rbe-gpu[cuda12]'"),
        ([GPU], HIDDEN, False, "cudaErrorNoDevice: no CUDA-capable device): see rbe-gpu info"),
        ([GPU], HIDDEN | {"errors": {}}, False, "CuPy reaches no GPU (it counts none)"),
    ],
)
def test_a_gpu_is_measured_where_cuda_and_nvml_reach_it(
    gpus: list[Any], cupy: dict[str, Any], runs: bool, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run.machine, "gpus", lambda: (gpus, "" if gpus else "NVML does not answer"))
    monkeypatch.setattr(run.machine, "cupy_state", lambda: cupy)
    measured_here, why = run.gpu_state()
    assert measured_here is runs
    assert (why is None) if reason is None else (why is not None and reason in why)

"""CPU, GPUs and installed versions, and what is missing: the contents of `rbe-gpu info`."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import __version__, registry
from .gpu import _load, _source

FEATURES = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512vnni", "avx512bf16", "avx512fp16"),
    *("amx-int8", "amx-bf16"),
    *("neon", "dotprod", "fullfp16", "bf16", "i8mm", "sve", "sve2"),
)
LIBRARIES = ("numpy", "numba", "llvmlite", "ml_dtypes", "safetensors", "tokenizers", "cupy", "torch")


def cpu_name() -> str:
    """The name of the CPU. `platform.processor()` is empty or only the architecture on Linux and macOS."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    brand = ""
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        brand = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return brand or platform.processor() or platform.machine()


def cores_and_memory() -> tuple[int | None, int | None]:
    """Physical cores and bytes of memory, by psutil of the extra `report`; None where it is not installed."""
    try:
        import psutil
    except ImportError:
        return None, None
    return psutil.cpu_count(logical=False), int(psutil.virtual_memory().total)


def versions() -> dict[str, str | None]:
    """Versions of `LIBRARIES`; None for those that are not installed."""
    from importlib.metadata import PackageNotFoundError, packages_distributions, version

    installed: dict[str, str | None] = {}
    distributions = packages_distributions()
    for name in LIBRARIES:
        try:
            installed[name] = version(distributions[name][0])
        except (KeyError, PackageNotFoundError):
            installed[name] = None
    return installed


# --- GPUs ---------------------------------------------------------------------------------------------


def gpus() -> tuple[list[dict[str, Any]], str]:
    """NVIDIA GPUs from NVML, and the reason if there are none.

    NVML numbers all GPUs of the machine; CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER change only CUDA's numbering.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [], f"no NVIDIA driver answers ({error})"
    try:
        driver, cuda = pynvml.nvmlSystemGetDriverVersion(), pynvml.nvmlSystemGetCudaDriverVersion_v2()
        devices = []
        for i in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(i)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            devices.append(
                {
                    "name": pynvml.nvmlDeviceGetName(handle),
                    "memory_bytes": int(memory.total),
                    "free_bytes": int(memory.free),
                    "compute_capability": f"{major}.{minor}",
                    "architecture": f"sm_{major}{minor}",
                    "supported": (major, minor) >= _load.OLDEST,
                    "driver": driver,
                    "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
                }
            )
        return devices, "" if devices else "the NVIDIA driver reports no GPU"
    except pynvml.NVMLError as error:
        return [], f"the NVIDIA driver does not answer ({error})"
    finally:
        pynvml.nvmlShutdown()


def cupy_state() -> dict[str, Any]:
    """What CuPy can do here.

    Returns
    -------
    `works` : it imports; `devices` : number of usable GPUs; `cuda` and `nvrtc` : versions, or None;
    `architectures` : what its NVRTC compiles for; `errors` : CuPy's messages by what failed
    """
    state: dict[str, Any] = {
        "works": False, "devices": 0, "cuda": None, "nvrtc": None, "architectures": [], "errors": {}
    }  # fmt: skip
    errors: dict[str, str] = state["errors"]
    try:
        import cupy
    except ModuleNotFoundError as error:
        missing = error.name == "cupy"
        errors["import"] = "CuPy is not installed" if missing else f"CuPy does not import ({error})"
        return state
    except Exception as error:  # a broken installation may raise any exception
        errors["import"] = f"CuPy does not import ({_line(error)})"
        return state
    state["works"] = True
    try:
        version = int(cupy.cuda.runtime.runtimeGetVersion())
        state["cuda"] = f"{version // 1000}.{version % 1000 // 10}"
        state["devices"] = int(cupy.cuda.runtime.getDeviceCount())
    except Exception as error:
        errors["devices"] = _line(error)
    try:
        state["nvrtc"] = ".".join(map(str, cupy.cuda.nvrtc.getVersion()))
        state["architectures"] = [int(a) for a in cupy.cuda.nvrtc.getSupportedArchs()]
    except Exception as error:
        errors["nvrtc"] = _line(error)
    return state


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def extra(cuda: str) -> str:
    """The extra of this package that matches a driver's CUDA version."""
    return "cuda13" if int(cuda.partition(".")[0]) >= 13 else "cuda12"


def kernels() -> dict[str, bool]:
    """Every op, and whether it has CUDA kernels in this version."""
    return {op: _source.has(op) for op in registry.OPS}


def _missing_for_gpu(devices: list[dict[str, Any]], no_gpu: str, cupy: dict[str, Any]) -> list[str]:
    """What prevents ops from running on a GPU, and the fix."""
    if not devices:
        return [
            f"{no_gpu}: everything runs on the CPU; for a GPU: an NVIDIA GPU of compute capability "
            f"{_load.OLDEST[0]}.{_load.OLDEST[1]} or newer, its driver, and pip install 'rbe-gpu[cuda13]'"
        ]
    lines = []
    errors, matching = cupy["errors"], extra(devices[0]["cuda"])
    if not cupy["works"]:
        lines.append(f"{errors['import']}, so CuPy arrays cannot be used: pip install 'rbe-gpu[{matching}]'")
    elif "devices" in errors:
        lines.append(
            f"CuPy (CUDA {cupy['cuda']}) reaches no GPU ({errors['devices']}); the driver has CUDA "
            f"{devices[0]['cuda']}: pip install 'rbe-gpu[{matching}]', or a newer driver"
        )
    if "nvrtc" in errors:
        lines.append(
            f"CuPy finds no NVRTC, which compiles the kernels ({errors['nvrtc']}): "
            f"pip install 'rbe-gpu[{matching}]'"
        )
    for i, gpu in enumerate(devices):
        if not gpu["supported"]:
            lines.append(
                f"GPU {i} ({gpu['name']}) has compute capability {gpu['compute_capability']}; the kernels need "
                f"{_load.OLDEST[0]}.{_load.OLDEST[1]} or newer: use the CPU"
            )
    return lines


def collect() -> dict[str, Any]:
    """The machine, the versions, the GPUs and kernels, and what is missing."""
    import llvmlite.binding
    import numba

    features = llvmlite.binding.get_host_cpu_features()
    devices, no_gpu = gpus()
    cupy = cupy_state()
    installed = versions()
    has_kernels = kernels()
    cores, memory = cores_and_memory()
    missing = _missing_for_gpu(devices, no_gpu, cupy)
    without = [op for op, present in has_kernels.items() if not present]
    if without:
        missing.append(
            f"no CUDA kernels in this version for {', '.join(without)}: those take NumPy arrays only"
        )
    if cores is None:
        missing.append(
            "psutil, which tells cores and memory, is not installed: pip install 'rbe-gpu[report]'"
        )
    if installed["torch"] is None:
        missing.append(
            "PyTorch is not installed; reports then have fewer baselines: pip install 'rbe-gpu[baselines]'"
        )
    return {
        "rbe_gpu": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {
            "name": cpu_name(),
            "cores": cores,
            "threads": os.cpu_count(),
            "memory_bytes": memory,
            "simd": [name for name in FEATURES if features.get(name)],
            "llvm_name": llvmlite.binding.get_host_cpu_name(),
        },
        "numba_threads": numba.config.NUMBA_NUM_THREADS,
        "versions": installed,
        "gpus": devices,
        "cupy": cupy,
        "kernels": {
            "ops": [op for op, present in has_kernels.items() if present],
            "without": without,
            "oldest": f"sm_{_load.OLDEST[0]}{_load.OLDEST[1]}",
        },
        "missing": missing,
    }

"""What this machine has for rbe_gpu, and what is missing for what: the facts that `rbe-gpu info` prints."""

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
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def physical_cores() -> int | None:
    """Cores of the machine, hardware threads of one core counted once; None where the system does not say."""
    if sys.platform == "darwin":
        done = subprocess.run(["sysctl", "-n", "hw.physicalcpu"], capture_output=True, text=True)
        return int(done.stdout) if done.stdout.strip().isdigit() else None
    siblings = set()
    for topology in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology"):
        try:
            siblings.add((topology / "thread_siblings_list").read_text().strip())
        except OSError:
            return None
    return len(siblings) or None


def memory_bytes() -> int | None:
    """Bytes of physical memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def versions() -> dict[str, str | None]:
    """The libraries that do the work; None for what is not installed."""
    from importlib.metadata import PackageNotFoundError, packages_distributions, version

    found: dict[str, str | None] = {}
    distributions = packages_distributions()
    for name in LIBRARIES:
        try:
            found[name] = version(distributions[name][0])
        except (KeyError, PackageNotFoundError):
            found[name] = None
    return found


# --- GPUs ---------------------------------------------------------------------------------------------


def gpus() -> tuple[list[dict[str, Any]], str]:
    """NVIDIA GPUs by NVML, and why there are none.

    NVML numbers all GPUs of the machine; CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER change the numbers of CUDA.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [], f"no NVIDIA driver answers ({error})"
    try:
        driver, cuda = pynvml.nvmlSystemGetDriverVersion(), pynvml.nvmlSystemGetCudaDriverVersion_v2()
        found = []
        for i in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(i)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            found.append(
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
        return found, "" if found else "the NVIDIA driver reports no GPU"
    except pynvml.NVMLError as error:
        return [], f"the NVIDIA driver does not answer ({error})"
    finally:
        pynvml.nvmlShutdown()


def cupy_state() -> dict[str, Any]:
    """What CuPy can do here.

    Returns
    -------
    `works` : it imports; `devices` : GPUs that it reaches; `cuda` and `nvrtc` : versions, or None;
    `architectures` : what its NVRTC compiles for; `errors` : in the words of CuPy, by what they stop
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
    except Exception as error:  # a broken installation may raise anything
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
    """The extra of this package that suits a driver's CUDA version."""
    return "cuda13" if int(cuda.partition(".")[0]) >= 13 else "cuda12"


def kernels() -> dict[str, bool]:
    """Every op, and whether it has CUDA kernels in this version."""
    return {op: _source.has(op) for op in registry.OPS}


def _missing_for_gpu(found: list[dict[str, Any]], no_gpu: str, cupy: dict[str, Any]) -> list[str]:
    """What keeps ops from running on a GPU, and what mends it."""
    if not found:
        return [
            f"{no_gpu}: everything runs on the CPU; for a GPU: an NVIDIA GPU of compute capability "
            f"{_load.OLDEST[0]}.{_load.OLDEST[1]} or newer, its driver, and pip install 'rbe-gpu[cuda13]'"
        ]
    lines = []
    errors, suited = cupy["errors"], extra(found[0]["cuda"])
    if not cupy["works"]:
        lines.append(f"{errors['import']}, so CuPy arrays cannot be used: pip install 'rbe-gpu[{suited}]'")
    elif "devices" in errors:
        lines.append(
            f"CuPy (CUDA {cupy['cuda']}) reaches no GPU ({errors['devices']}); the driver has CUDA "
            f"{found[0]['cuda']}: pip install 'rbe-gpu[{suited}]', or a newer driver"
        )
    if "nvrtc" in errors:
        lines.append(
            f"CuPy finds no NVRTC, which compiles the kernels ({errors['nvrtc']}): "
            f"pip install 'rbe-gpu[{suited}]'"
        )
    for i, gpu in enumerate(found):
        if not gpu["supported"]:
            lines.append(
                f"GPU {i} ({gpu['name']}) has compute capability {gpu['compute_capability']}; the kernels need "
                f"{_load.OLDEST[0]}.{_load.OLDEST[1]} or newer: use the CPU"
            )
    return lines


def collect() -> dict[str, Any]:
    """The machine, the versions, the GPUs and kernels, and what is missing for what."""
    import llvmlite.binding
    import numba

    features = llvmlite.binding.get_host_cpu_features()
    found, no_gpu = gpus()
    cupy = cupy_state()
    installed = versions()
    having = kernels()
    missing = _missing_for_gpu(found, no_gpu, cupy)
    without = [op for op, there in having.items() if not there]
    if without:
        missing.append(
            f"no CUDA kernels in this version for {', '.join(without)}: those take NumPy arrays only"
        )
    if installed["torch"] is None:
        missing.append(
            "PyTorch is not installed; reports then compare with fewer peers: pip install 'rbe-gpu[peers]'"
        )
    return {
        "rbe_gpu": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {
            "name": cpu_name(),
            "cores": physical_cores(),
            "threads": os.cpu_count(),
            "memory_bytes": memory_bytes(),
            "simd": [name for name in FEATURES if features.get(name)],
            "llvm_name": llvmlite.binding.get_host_cpu_name(),
        },
        "numba_threads": numba.config.NUMBA_NUM_THREADS,
        "versions": installed,
        "gpus": found,
        "cupy": cupy,
        "kernels": {
            "ops": [op for op, there in having.items() if there],
            "without": without,
            "oldest": f"sm_{_load.OLDEST[0]}{_load.OLDEST[1]}",
        },
        "missing": missing,
    }

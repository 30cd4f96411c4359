"""Kernels: compiles each for its configuration when it is first launched, and runs launches.

CuPy is imported here and nowhere else in the package, when the first launch asks for it.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .. import output
from ._launch import Kernel, Launch
from ._source import kernel_source

#: CuPy appends -arch and what stands in APPENDED.
OPTIONS = ("-std=c++17",)
APPENDED = ("-ftz=true", "--device-as-default-execution-space")
#: Sources that need instructions of one architecture alone, by the name of that.
ONLY = {"attention_wgmma": "90a"}
OLDEST = (7, 5)  # compute capability: ldmatrix, and what NVRTC 13 still compiles for
_DEFAULT_SHARED = 48 << 10  # static and dynamic; a kernel must ask for more
#: Bytes of a block from which a multiprocessor is asked for all the shared memory it has, and the least L1 cache: two
#: blocks fit otherwise only if the driver chooses so, and such kernels read what they read twice from shared memory.
_CARVEOUT_FROM = 16 << 10


@dataclass(slots=True)
class _Loaded:
    """A kernel on a device.

    shared : bytes of dynamic shared memory that the largest launch so far has had; -1 before the first
    """

    function: Any
    shared: int = -1


#: by device, entry and constants: what is looked up at every launch
_kernels: dict[tuple[int, str, tuple[int, ...]], _Loaded] = {}


def capability(device: int) -> tuple[int, int]:
    """Compute capability of a GPU, (9, 0) for instance."""
    import cupy

    text = cupy.cuda.Device(device).compute_capability  # "75", "90", "120"
    return int(text[:-1]), int(text[-1])


def cache_folder() -> Path:
    """CuPy's folder of compiled binaries."""
    return Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")


@cache
def _module(kernel: Kernel, device: int) -> Any:
    """The module of one kernel for the current device, which is `device`."""
    import cupy

    major, minor = capability(device)
    if (major, minor) < OLDEST:
        raise RuntimeError(
            f"GPU {device} has compute capability {major}.{minor}; rbe_gpu needs "
            f"{OLDEST[0]}.{OLDEST[1]} or newer. Move the arrays to the CPU (cupy.asnumpy(...))"
        )
    if kernel.op in ONLY:
        return _loaded(kernel, ONLY[kernel.op])
    return cupy.RawModule(code=kernel_source(kernel), options=OPTIONS)


def _loaded(kernel: Kernel, architecture: str) -> Any:
    """The module of a kernel for sm_<architecture>, compiled unless its file is there: CuPy itself compiles for the
    GPU's own architecture only, without the instructions that no later one has.

    A temporary file takes the place of that in CuPy's folder where `CUPY_CACHE_IN_MEMORY` is 1, or where the folder
    cannot be written.
    """
    path = _binary_path(kernel, architecture)
    if path.is_file():
        return _from_file(path)
    binary = _compile(kernel, architecture) + b"\0"  # getCUBIN leaves out the last byte, which is 0
    if os.environ.get("CUPY_CACHE_IN_MEMORY") != "1":
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with output.replacing(path) as file:
                file.write(binary)
            return _from_file(path)
        except OSError as error:
            warnings.warn(
                f"{kernel.entry} is compiled again by the next process: {error}", RuntimeWarning, stacklevel=2
            )
    with TemporaryDirectory(prefix="rbe_gpu-") as folder:
        path = Path(folder) / path.name
        path.write_bytes(binary)
        return _from_file(path)


def _from_file(path: Path) -> Any:
    """A module of a binary; the file is not needed any more.

    Raises
    ------
    RuntimeError
        CUDA does not load it.
    """
    import cupy

    module = cupy.RawModule(path=str(path))
    try:
        module.compile()  # loads it
    except RuntimeError as error:
        raise RuntimeError(f"{path} does not load: {error}; delete the file") from error
    return module


def _binary_path(kernel: Kernel, architecture: str) -> Path:
    """Where the binary of a kernel for sm_<architecture> is kept."""
    from cupy.cuda import nvrtc

    key = "\0".join((kernel_source(kernel), architecture, *OPTIONS, *APPENDED, str(nvrtc.getVersion())))
    return cache_folder() / f"rbe_gpu-{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin"


def _compile(kernel: Kernel, architecture: str) -> bytes:
    """The binary of a kernel for sm_<architecture>. A warning says where ptxas serializes its warpgroup matmuls.

    Raises
    ------
    RuntimeError
        NVRTC refuses the source; with its messages.
    """
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(kernel_source(kernel), f"{kernel.op}.cu", (), ())
    try:
        nvrtc.compileProgram(program, (*OPTIONS, *APPENDED, f"-arch=sm_{architecture}"))
        log = nvrtc.getProgramLog(program)
        if "serialized" in log:
            warnings.warn(
                f"{kernel.entry} of {kernel.op}.cu is slow on sm_{architecture}:\n{log}",
                RuntimeWarning,
                stacklevel=2,
            )
        return bytes(nvrtc.getCUBIN(program))
    except nvrtc.NVRTCError:
        log = nvrtc.getProgramLog(program)
        raise RuntimeError(
            f"{kernel.entry} of {kernel.op}.cu does not compile for sm_{architecture}:\n{log}"
        ) from None
    finally:
        nvrtc.destroyProgram(program)


def compile_kernel(kernel: Kernel, device: int) -> None:
    """Compile a kernel for a GPU and load it; CuPy keeps the binary on disk.

    Raises
    ------
    RuntimeError
        The GPU is too old.
    """
    import cupy

    with cupy.cuda.Device(device):
        _module(kernel, device).compile()


def compile_only(kernel: Kernel, architecture: int) -> int:
    """Compile a kernel for GPUs of sm_<architecture> as `run` does, and keep nothing. Needs CuPy, but no GPU.

    Returns
    -------
    Bytes of the binary.

    Raises
    ------
    RuntimeError
        NVRTC is not there, does not know the architecture, or refuses the source; with its messages.
    """
    from cupy.cuda import nvrtc

    known = sorted(int(a) for a in nvrtc.getSupportedArchs())
    oldest = 10 * OLDEST[0] + OLDEST[1]
    if architecture not in known or architecture < oldest:
        version = ".".join(map(str, nvrtc.getVersion()))
        names = ", ".join(str(a) for a in known if a >= oldest)
        raise RuntimeError(
            f"architecture {architecture} is not one that NVRTC {version} compiles for: use {names}"
        )
    return len(_compile(kernel, ONLY.get(kernel.op, str(architecture))))


def _allow_shared(loaded: _Loaded, launch: Launch, device: int) -> None:
    """Let a kernel have more dynamic shared memory than in the launches before."""
    import cupy

    function = loaded.function
    together = launch.shared + function.shared_size_bytes
    if together >= _CARVEOUT_FROM:
        function.preferred_shared_memory_carveout = 100
    if together > _DEFAULT_SHARED:
        most = int(cupy.cuda.Device(device).attributes["MaxSharedMemoryPerBlockOptin"])
        if together > most:
            raise RuntimeError(
                f"{launch.entry} needs {together} bytes of shared memory, GPU {device} has {most} for a block"
            )
        function.max_dynamic_shared_size_bytes = launch.shared
    loaded.shared = launch.shared


def _launch(launch: Launch, device: int) -> None:
    key = (device, launch.entry, launch.params.constants)
    loaded = _kernels.get(key)
    if loaded is None:
        loaded = _kernels[key] = _Loaded(_module(launch.kernel, device).get_function(launch.entry))
    if launch.shared > loaded.shared:
        _allow_shared(loaded, launch, device)
    loaded.function(launch.grid, launch.block, launch.params.arguments, shared_mem=launch.shared)


def run(launches: tuple[Launch, ...]) -> None:
    """Launch in order on the current stream of the device that holds the arrays."""
    import cupy

    for launch in launches:
        first = next((a for a in launch.params.values if isinstance(a, cupy.ndarray)), None)
        if first is None:
            raise TypeError(f"{launch.entry} got no cupy.ndarray; NumPy arrays run on the CPU backend")
        device = first.data.device_id
        if device == cupy.cuda.runtime.getDevice():
            _launch(launch, device)
        else:
            with cupy.cuda.Device(device):
                _launch(launch, device)

"""Compile the CUDA sources with NVRTC, which needs no GPU, and read what each kernel uses.

python -m tests.host.nvrtc softmax 90     registers, shared bytes and spills of softmax.cu on sm_90
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import re
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from rbe_gpu.gpu import _load, _source

from . import build

#: Architectures that differ in machine code. sm_89 does not: it runs what is compiled for sm_86, byte for byte
#: (`test_nvrtc.py` compares them).
ARCHITECTURES = (75, 80, 86, 90, 100, 120)
SAME_CODE = {89: 86}
PACKAGE = "nvidia-cuda-nvrtc"
#: What CuPy passes and appends, ptxas's report, and the lines of instructions, which change none of them.
OPTIONS = (*_load.OPTIONS, "-ftz=true", "--ptxas-options=-v", "-lineinfo")
#: Architectures whose machine code the cache keeps, up to 1 MB each. 90a: 90 with wgmma.
DISASSEMBLED = (80, 90, "90a")
Architecture = int | str


@dataclass(frozen=True)
class Usage:
    """What ptxas reports of one kernel."""

    registers: int
    shared: int
    stack: int
    spills: int

    def __str__(self) -> str:
        return f"{self.registers} registers, {self.shared} B shared, {self.stack} B stack, {self.spills} B spilled"


@dataclass(frozen=True)
class Compiled:
    """The log of a compilation, and what it made.

    Attributes
    ----------
    kernels : usage of each kernel
    digest : SHA-256 of the machine code of all of them
    """

    log: str
    kernels: dict[str, Usage]
    digest: str

    @property
    def warnings(self) -> list[str]:
        return [line for line in self.log.splitlines() if "warning" in line]

    @property
    def serialized(self) -> list[str]:
        """Messages that wgmma instructions wait for each other: registers in use are touched."""
        return [line for line in self.log.splitlines() if "instructions are serialized" in line]


class NvrtcError(RuntimeError):
    """NVRTC is not installed, or a source does not compile."""


@lru_cache
def _library() -> ctypes.CDLL:
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise NvrtcError(f"{PACKAGE} is not installed; pip install '{PACKAGE}>=13'") from None
    for file in files:
        if re.fullmatch(r"(lib)?nvrtc(\.so\.\d+|64_.*\.dll)", file.name) and ".alt." not in file.name:
            return ctypes.CDLL(str(file.locate()))
    raise NvrtcError(f"{PACKAGE} {metadata.version(PACKAGE)} holds no NVRTC library")


def _compile(text: str, architecture: Architecture) -> tuple[bytes | None, str]:
    """The machine code, None where the source does not compile, and the log."""
    lib = _library()
    program = ctypes.c_void_p()
    if lib.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"source.cu", 0, None, None):
        raise NvrtcError("NVRTC made no program")
    options = [o.encode() for o in (*OPTIONS, f"-arch=sm_{architecture}")]
    failed = lib.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    lib.nvrtcGetProgramLog(program, log)
    cubin = None
    if not failed:
        lib.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        lib.nvrtcGetCUBIN(program, code)
        cubin = code.raw
    lib.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin, log.value.decode()


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def _usage(log: str) -> dict[str, Usage]:
    kernels = {}
    for part in log.split("Compiling entry function ")[1:]:
        name = part.split("'")[1]
        kernels[name] = Usage(
            registers=_number(r"Used (\d+) registers", part),
            shared=_number(r"(\d+) bytes smem", part),
            stack=_number(r"(\d+) bytes stack frame", part),
            spills=_number(r"(\d+) bytes spill stores", part),
        )
    return kernels


def _digest(cubin: bytes) -> str:
    """SHA-256 of the ELF sections `.text.*`, with their names."""
    (sections,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, of_names = struct.unpack_from("<3H", cubin, 0x3A)
    headers = [struct.unpack_from("<2I4Q", cubin, sections + i * size) for i in range(count)]
    names = headers[of_names][4]
    digest = hashlib.sha256()
    for header in headers:
        at, offset, length = names + header[0], *header[4:6]
        name = cubin[at : cubin.index(b"\0", at)]
        if name.startswith(b".text."):
            digest.update(name + cubin[offset : offset + length])
    return digest.hexdigest()


def _kept(text: str, architecture: Architecture) -> tuple[Path, Path]:
    """The files of the cache: log and usage, and the machine code."""
    key = "\0".join((text, str(architecture), metadata.version(PACKAGE), *OPTIONS, "3"))
    name = f"nvrtc-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
    return build.cache() / f"{name}.json", build.cache() / f"{name}.cubin.z"


def _compile_and_keep(text: str, architecture: Architecture) -> tuple[Compiled, bytes]:
    cubin, log = _compile(text, architecture)
    if cubin is None:
        raise NvrtcError(f"sm_{architecture}:\n{log}")
    result = Compiled(log, _usage(log), _digest(cubin))
    usage, code = _kept(text, architecture)
    if architecture in DISASSEMBLED:
        build.write(code, zlib.compress(cubin))
    build.write(usage, json.dumps(asdict(result)).encode())
    return result, cubin


def compile_source(text: str, architecture: Architecture) -> Compiled:
    """Compile an inlined source. What compiled once, with this NVRTC, is taken from the cache.

    Raises
    ------
    NvrtcError
        With the compiler's messages.
    """
    _library()  # also where the result is known
    usage, _ = _kept(text, architecture)
    if usage.is_file():
        known = json.loads(usage.read_text())
        return Compiled(**known | {"kernels": {name: Usage(**u) for name, u in known["kernels"].items()}})
    return _compile_and_keep(text, architecture)[0]


def machine_code(text: str, architecture: Architecture) -> bytes:
    """The cubin of an inlined source, with line numbers; from the cache as `compile_source`, with its errors."""
    _library()
    _, code = _kept(text, architecture)
    if code.is_file():
        return zlib.decompress(code.read_bytes())
    return _compile_and_keep(text, architecture)[1]


def compile_all(jobs: list[tuple[str, int]]) -> None:
    """Fill the cache with sources on architectures, two at a time. Errors are left to `compile_source`."""

    def attempt(job: tuple[str, int]) -> None:
        with suppress(NvrtcError):
            compile_source(*job)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(attempt, jobs))


def main() -> None:
    op, *chosen = sys.argv[1:]
    for architecture in map(int, chosen or ARCHITECTURES):
        compiled = compile_source(_source.source(op), architecture)
        print(f"sm_{architecture}", *compiled.warnings, sep="\n")
        for name, usage in sorted(compiled.kernels.items()):
            print(f"  {name}: {usage}")


if __name__ == "__main__":
    main()

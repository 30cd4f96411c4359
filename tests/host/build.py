"""Compile a CUDA source with the C++ compiler into a shared library, kept by a hash of all that goes into it."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import platformdirs

from rbe_gpu.gpu import _source

HERE = Path(__file__).parent
COMPILER = os.environ.get("CXX", "g++")
# -fno-strict-aliasing: 16-byte accesses to arrays of other types, as on a GPU. -fvisibility=hidden: every
# library has fibers of its own.
FLAGS = (
    *("-std=c++17", "-O1", "-g1", "-fPIC", "-shared", "-DRBE_HOST"),
    *("-fno-strict-aliasing", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-fmax-errors=5", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function"),
)
# -O0: attention compiles in 4 s of processor time instead of 19, and its cases take 8 instead of 5. linear alone
# takes longer, 42 s in all instead of 33.
SANITIZE = ("-O0", "-fsanitize=address", "-fsanitize-sections=rbe_shared", "-fno-omit-frame-pointer")

#: What stands for a GPU: included by the sources under RBE_HOST.
SHIM = ("fibers.hpp", "device.hpp", "wgmma.hpp")
_MARK = "RBE_KERNEL_OF_HOST"
_TAIL = """
}}  // namespace
static const rbe_host::Entry entries[] = {{{entries}}};
#define EXPORTED extern "C" __attribute__((visibility("default")))
EXPORTED int rbe_count() {{ return sizeof entries / sizeof entries[0]; }}
EXPORTED const char* rbe_name(int i) {{ return entries[i].name; }}
EXPORTED int rbe_bounds(int i) {{ return entries[i].bounds; }}
EXPORTED const char* rbe_parameters(int i) {{ return entries[i].parameters; }}
EXPORTED const char* rbe_launch(int i, void* const* args, const unsigned* grid, const unsigned* block,
                                size_t shared, int reverse) {{
  return rbe_host::launch(entries[i].body, args, grid, block, shared, reverse != 0);
}}
"""


class CompileError(RuntimeError):
    """The compiler's messages."""


def _run(command: list[str], text: str) -> str:
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise CompileError(f"no C++ compiler {command[0]!r}; install one, or name it in CXX") from None
    if done.returncode:
        raise CompileError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


@lru_cache
def compiler_version() -> str:
    return _run([COMPILER, "--version"], "")


def cache() -> Path:
    """The folder of what was compiled."""
    folder = platformdirs.user_cache_path("rbe_gpu", appauthor=False) / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write(path: Path, data: bytes) -> None:
    """Write a file of the cache at once: another process sees all of it or nothing."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as unfinished:
        unfinished.write(data)
    os.replace(unfinished.name, path)


def _entries(text: str, flags: list[str]) -> list[tuple[str, str]]:
    """Name and launch bounds of each kernel: of what is `extern "C" __global__` after the macros' expansion."""
    marks = (f"-D__global__={_MARK}", f"-D__launch_bounds__(...)={_MARK}(__VA_ARGS__)")
    expanded = _run([COMPILER, *flags, *marks, "-E", "-P", "-x", "c++", "-"], text)
    pattern = rf'extern\s+"C"\s+{_MARK}\s+void\s+(?:{_MARK}\(\s*(\d+)[^)]*\)\s*)?(\w+)\s*\('
    return [(name, bounds or "1024") for bounds, name in re.findall(pattern, expanded)]


@lru_cache
def _precompiled_shim(flags: tuple[str, ...]) -> Path:
    """A folder with `device.hpp` compiled for flags, as GCC looks for it: 0.4 of the 1.1 s that a small kernel takes.

    Other compilers pass over the folder.
    """
    key = hashlib.sha256("\0".join((_shim(), compiler_version(), str(HERE), *flags)).encode()).hexdigest()
    folder = cache() / f"shim-{key[:32]}"
    if not (folder / "device.hpp.gch").is_file():
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            unfinished = Path(scratch) / "device.hpp.gch"
            header = str(HERE / "device.hpp")
            _run([COMPILER, *flags, "-x", "c++-header", header, "-o", str(unfinished)], "")
            write(folder / unfinished.name, unfinished.read_bytes())
    return folder


def _shim() -> str:
    return "".join((HERE / name).read_text(encoding="utf-8") for name in SHIM)


def build(
    code: str, *, sanitize: bool = False, optimised: bool = True, defines: tuple[str, ...] = ()
) -> Path:
    """The library of an inlined source (`_source.source`), compiled unless it is in the cache.

    `sanitize` adds AddressSanitizer: then libasan must be preloaded where the library is loaded.
    `optimised=False` is for a library that runs once or twice: linear compiles in 2 s instead of 5.
    """
    of_all = (*FLAGS, *(SANITIZE if sanitize else ()), *(() if optimised else ("-O0",)))
    flags = [*of_all, *(f"-D{d}" for d in defines), f"-I{HERE}"]
    key = hashlib.sha256("\0".join((code, _shim(), _TAIL, compiler_version(), *flags)).encode()).hexdigest()
    library = cache() / f"{key[:32]}.so"
    if library.is_file():
        return library
    # all names of a source are local to its library: no two libraries share a template's shared memory
    code = code.replace('#include "device.hpp"', "")
    text = f'#include "device.hpp"\nnamespace {{\n{code}'
    entries = _entries(code, flags)
    if not entries:
        raise CompileError('the source has no extern "C" __global__ kernel')
    tail = _TAIL.format(entries=", ".join(f"RBE_ENTRY({name}, {bounds})" for name, bounds in entries))
    if not defines:
        flags.insert(0, f"-I{_precompiled_shim(of_all)}")
    with tempfile.TemporaryDirectory() as folder:
        unfinished = Path(folder) / "kernels.so"
        _run([COMPILER, *flags, "-x", "c++", "-", "-o", str(unfinished)], text + tail)
        write(library, unfinished.read_bytes())
    return library


@lru_cache
def library(op: str, sanitize: bool = False) -> Path:
    """The library of `cuda_src/<op>.cu`."""
    return build(_source.source(op), sanitize=sanitize)


@lru_cache
def sanitizer_runtime() -> str:
    """Path of libasan, to be preloaded."""
    return _run([COMPILER, "-print-file-name=libasan.so"], "").strip()

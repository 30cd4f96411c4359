"""Numbers of the CPU's cost model for matmul: built-in, or measured on this machine by `rbe-gpu tune`.

The built-in numbers were measured on one machine (AMD EPYC, AVX-512). `rbe_gpu.tuning` measures those of the machine
that it runs on, and stores them in the user's cache folder.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import stat
from dataclasses import asdict, dataclass, fields
from functools import cache
from math import inf
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from rbe_gpu import output

_LARGEST_FILE = 1 << 16  # bytes
FEW_TOKENS = 4  # multiplied one by one
# of int8 activations: 0.43 to 1.11 of the time of tiles at 8, 0.62 to 1.60 at 12 (4, 5, 8 bits)
INT8_FEW_TOKENS = 8
DENSE_ROWS_DENSITY = 0.65  # above this density, sparse rows are expanded and multiplied as dense rows


@dataclass(frozen=True)
class MatmulCosts:
    """Nanoseconds of one thread.

    Attributes
    ----------
    call : a kernel call
    dense : a weight times 16 tokens
    stream : a dense weight read from memory, by all threads together
    unpack : a low-bit code to float32
    few : a low-bit code unpacked and multiplied with one token
    transform : a value of 16 tokens through a block transform
    entry, entry_vector : a sparse entry to position and value; that times 16 tokens
    entry_few : a sparse entry unpacked and multiplied with one token
    spread : the same for a bitmap, per weight
    synthesis : a weight through both block transforms, per value of the block size
    scatter : a weight of a sparse row written to a dense row
    """

    call: float = 9_000.0
    dense: float = 0.3
    stream: float = 0.14
    unpack: float = 0.2
    few: float = 0.08
    transform: float = 4.0
    entry: float = 0.6
    entry_vector: float = 0.5
    entry_few: float = 1.3
    spread: float = 0.12
    synthesis: float = 0.04
    scatter: float = 0.5


def costs_file() -> Path:
    """The file of measured numbers: RBE_GPU_COSTS, or costs.json in the user's cache folder."""
    path = os.environ.get("RBE_GPU_COSTS")
    return Path(path) if path else user_cache_path("rbe_gpu", appauthor=False) / "costs.json"


@cache
def costs() -> MatmulCosts:
    """This machine's numbers; the built-in ones if it was not tuned, or with another processor or version."""
    try:
        stored = read_costs_file(costs_file())
    except (OSError, ValueError):
        return MatmulCosts()
    if stored is None or stored.pop("machine") != machine():
        return MatmulCosts()
    return MatmulCosts(**stored)


def read_costs_file(file: Path) -> dict[str, Any] | None:
    """The numbers of a file, and their machine; None if there is no file, or an empty one.

    Raises
    ------
    OSError
        It cannot be read, or is not a regular file.
    ValueError
        It is not one that this version of `rbe-gpu tune` writes.
    """
    what = f"{file} is not a file of this version's `rbe-gpu tune`"
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    if str(file) == os.devnull:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(file))
    if status.st_size > _LARGEST_FILE:
        raise ValueError(what)
    text = file.read_bytes()
    if not text:
        return None
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(what) from None
    names = {f.name for f in fields(MatmulCosts)}
    if not isinstance(stored, dict) or set(stored) != {"machine", *names}:
        raise ValueError(what)
    if not all(type(stored[name]) in (int, float) and 0 < stored[name] < inf for name in names):
        raise ValueError(f"{what}: its numbers are not all positive")
    return stored


def store(measured: MatmulCosts) -> None:
    """Write the numbers of this machine to `costs_file`, and use them from now on."""
    file = costs_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(file, json.dumps({"machine": machine(), **asdict(measured)}, indent=2) + "\n")
    costs.cache_clear()


def machine() -> str:
    """What the numbers depend on: the processor, and the instruction set that kernels are compiled for."""
    import llvmlite.binding as llvm

    return f"{platform.machine()} {llvm.get_host_cpu_name()}"

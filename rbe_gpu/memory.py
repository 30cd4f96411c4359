"""Memory of the machine: how much there is, and how much of it this process may still take.

On Linux from /proc and the control groups (version 1 and 2), which limit containers and services; elsewhere from
psutil, which knows no such limits.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

_ROOT = Path("/")
_NO_LIMIT = 1 << 60  # version 1 writes "no limit" as a number near 2^63


def total_bytes(root: Path = _ROOT) -> int:
    """Bytes of memory that this process can use at most: of the machine, or of its tightest control group."""
    if not sys.platform.startswith("linux"):
        return int(_psutil().total)
    return min([_meminfo(root)["MemTotal"], *(limit for limit, _ in _groups(root))])


def available_bytes(root: Path = _ROOT) -> int:
    """Bytes that can be taken without swapping, and without exceeding a control group or `ulimit -v`."""
    if not sys.platform.startswith("linux"):
        return int(_psutil().available)
    rooms = [_meminfo(root)["MemAvailable"], *(limit - used for limit, used in _groups(root))]
    return max(0, min([*rooms, *_address_space(root)]))


def _psutil() -> Any:
    import psutil

    return psutil.virtual_memory()


def _meminfo(root: Path) -> dict[str, int]:
    values = {}
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        values[name] = int(rest.split()[0]) << 10
    values.setdefault("MemAvailable", values["MemFree"])  # before Linux 3.14
    return values


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) of every control group of this process that limits memory."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                mount, limit, used, cache = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
            elif "memory" in controllers.split(","):
                mount, limit, used, cache = (
                    "sys/fs/cgroup/memory",
                    "memory.limit_in_bytes",
                    "memory.usage_in_bytes",
                    "total_inactive_file",
                )
            else:
                continue
            # a container may see its own group as the root of the mount; folders that do not exist are passed over
            names = [name for name in path.split("/") if name not in ("", "..")]
            for depth in range(len(names) + 1):
                folder = (root / mount).joinpath(*names[:depth])
                yield from _group(folder / limit, folder / used, folder / "memory.stat", cache)


def _group(limit: Path, used: Path, stat: Path, cache: str) -> Iterator[tuple[int, int]]:
    with suppress(OSError, ValueError):  # "max", or a group that has no such file
        most = int(limit.read_text())
        if most < _NO_LIMIT:
            taken = int(used.read_text())
            for line in stat.read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == cache:  # pages of files, dropped when memory runs short
                    taken -= int(value)
            yield most, max(taken, 0)


def _address_space(root: Path) -> Iterator[int]:
    """What `ulimit -v` leaves."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        pages = int((root / "proc/self/statm").read_text().split()[0])
        yield soft - pages * resource.getpagesize()

"""Memory of the machine: /proc and control groups, from folders made for the purpose."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rbe_gpu import memory

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

GIB = 1 << 30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with 8 GiB, 6 of them available, and no control groups."""
    write(tmp_path / "proc/meminfo", "MemTotal: 8388608 kB\nMemFree: 1048576 kB\nMemAvailable: 6291456 kB")
    write(tmp_path / "proc/self/statm", "1000 500 100 1 0 200 0")
    return tmp_path


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def group(folder: Path, limit: object, used: int = 0, cache: int = 0, version: int = 2) -> None:
    names = (
        ("memory.max", "memory.current")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    write(folder / names[0], limit)
    write(folder / names[1], used)
    write(folder / "memory.stat", f"file 5\n{'' if version == 2 else 'total_'}inactive_file {cache}")


def test_without_groups(root: Path) -> None:
    assert memory.total_bytes(root) == 8 * GIB
    assert memory.available_bytes(root) == 6 * GIB


def test_a_kernel_without_memavailable(root: Path) -> None:
    write(root / "proc/meminfo", "MemTotal: 8388608 kB\nMemFree: 1048576 kB")
    assert memory.available_bytes(root) == GIB


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_group_counts(root: Path, version: int) -> None:
    mount = root / ("sys/fs/cgroup" if version == 2 else "sys/fs/cgroup/memory")
    write(
        root / "proc/self/cgroup", "5:devices:/x\n" + ("0::/a/b/c" if version == 2 else "4:cpu,memory:/a/b/c")
    )
    group(mount / "a/b/c", "max" if version == 2 else 2**63 - 4096, version=version)
    group(mount / "a/b", 4 * GIB, 3 * GIB, GIB, version=version)  # 2 GiB left: 1 GiB of what is used is cache
    group(mount / "a", 3 * GIB, 2 * GIB, version=version)
    assert memory.total_bytes(root) == 3 * GIB
    assert memory.available_bytes(root) == 1 * GIB


@pytest.mark.parametrize("path", ["/", "/of/the/host", "/../outside"])
def test_a_container_sees_its_group_at_the_mount(root: Path, path: str) -> None:
    write(root / "proc/self/cgroup", f"0::{path}")
    group(root / "sys/fs/cgroup", 2 * GIB, GIB)
    assert memory.total_bytes(root) == 2 * GIB
    assert memory.available_bytes(root) == GIB


def test_a_group_over_its_limit(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/")
    group(root / "sys/fs/cgroup", GIB, 2 * GIB)
    assert memory.available_bytes(root) == 0


def test_the_address_space(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (GIB, resource.RLIM_INFINITY))
    assert memory.available_bytes(root) == GIB - 1000 * resource.getpagesize()


def test_this_machine() -> None:
    assert 0 < memory.available_bytes() <= memory.total_bytes()

"""Kernels run where the disk cache cannot be written, read or trusted, and the user is told so in one line.

Every case is a process of its own that compiles one small kernel. As root, which no permission binds, it runs as user
65534 with the right to read every file.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rbe_gpu.cpu_fallback import isa

ROOT = Path(__file__).parents[1]
PACKAGE = ("rbe_gpu", "cpu_fallback")
_CALL = """
import numpy as np, rbe_gpu as rbe
from rbe_gpu.cpu_fallback import add
print(rbe.add(np.ones(3, np.float32), np.ones(3, np.float32))[0], sum(add._in_parts.stats.cache_hits.values()))
"""
_READ_ALL = "-all,+dac_read_search"
AS_NOBODY = (
    *("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"),
    *("--inh-caps", _READ_ALL, "--ambient-caps", _READ_ALL, "--bounding-set", _READ_ALL),
)
USER = 65534 if os.getuid() == 0 else os.getuid()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package that nobody can write."""
    root = tmp_path / "installed"
    for name in PACKAGE:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "precompiled"))
    for path in [root, *root.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    return root


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    """The folder for temporary files."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


def run(package: Path, temporary: Path, most: int | None = None, **env: Any) -> tuple[list[str], list[str]]:
    """Words of standard output, and lines of standard error. `most`: bytes of the largest file."""
    prefix = AS_NOBODY if os.getuid() == 0 else ()
    limit = None if most is None else partial(resource.setrlimit, resource.RLIMIT_FSIZE, (most, most))
    variables = {
        "PATH": os.environ["PATH"],
        "HOME": "/nonexistent",
        "TMPDIR": temporary,
        "PYTHONPATH": package,
    }
    done = subprocess.run(
        [*prefix, sys.executable, "-c", _CALL],
        env={name: str(value) for name, value in (variables | env).items()},
        cwd=temporary,
        preexec_fn=limit,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split(), done.stderr.splitlines()


def test_nothing_of_the_users_can_be_written(package: Path, temporary: Path) -> None:
    """The kernels are kept in a temporary folder that is the user's alone, and found there by the next process."""
    folder = temporary / f"rbe_gpu-kernels-{USER}"
    for hits in ("0", "1"):
        words, (line,) = run(package, temporary)
        assert words == ["2.0", hits]
        assert str(folder) in line
        assert "NUMBA_CACHE_DIR" in line
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("link", [False, True], ids=["folder", "link"])
def test_temporary_folder_of_somebody_else(package: Path, temporary: Path, link: bool) -> None:
    """Others could put code there: it is neither read nor written."""
    other = temporary / "other"
    other.mkdir()
    other.chmod(0o777)
    folder = temporary / f"rbe_gpu-kernels-{USER}"
    if link:
        folder.symlink_to(other)
    else:
        other.rename(folder)
    words, (line,) = run(package, temporary)
    assert words == ["2.0", "0"]
    assert "kept nowhere" in line
    assert not list(folder.iterdir())


def test_cache_folder_cannot_be_written(package: Path, temporary: Path, tmp_path: Path) -> None:
    """Of NUMBA_CACHE_DIR and no other: kernels are kept elsewhere."""
    refused = tmp_path / "refused"
    refused.mkdir(0o555)
    words, (line,) = run(package, temporary, NUMBA_CACHE_DIR=refused)
    assert words == ["2.0", "0"]
    assert f"rbe_gpu-kernels-{USER}" in line


def test_disk_is_full(package: Path, temporary: Path) -> None:
    """No file can be longer than 1000 bytes."""
    words, (line,) = run(package, temporary, most=1000, NUMBA_CACHE_DIR=temporary / "cache")
    assert words == ["2.0", "0"]
    assert "cannot be kept" in line
    words, lines = run(package, temporary, NUMBA_CACHE_DIR=temporary / "cache")
    assert (words, lines) == (["2.0", "0"], [])


def test_damaged_and_unreadable_files(package: Path, temporary: Path) -> None:
    """Cut-off files are written anew; what cannot be read at all is left alone."""
    folder = temporary / "cache"
    for damaged in ("*.nbc", "*.nbi"):
        assert run(package, temporary, NUMBA_CACHE_DIR=folder)[1] == []
        files = list(folder.rglob(damaged))
        assert files
        for file in files:
            file.write_bytes(file.read_bytes()[:-9])
        words, (line,) = run(package, temporary, NUMBA_CACHE_DIR=folder)
        assert words == ["2.0", "0"]
        assert "damaged" in line
        assert run(package, temporary, NUMBA_CACHE_DIR=folder) == (["2.0", "1"], [])
    for index in folder.rglob("*.nbi"):
        index.unlink()
        index.mkdir()
    words, (line,) = run(package, temporary, NUMBA_CACHE_DIR=folder)
    assert words == ["2.0", "0"]
    assert "cannot be read" in line


# --- kernels that a wheel brings ------------------------------------------------------------------------

_MERGE = """
import sys
from pathlib import Path
from rbe_gpu.cpu_fallback._numba_internals import merge_precompiled
print(merge_precompiled(Path(sys.argv[1])))
"""
#: What the host's kernels are compiled for, but for scheduling.
SAME = isa.precompiled_targets()[:1]


def isa_name(target: tuple[str, str, str]) -> str:
    (name,) = (
        known.name
        for known in isa.ISAS.values()
        if known.cpu == target[1] and known.llvm_features == target[2]
    )
    return name


@pytest.fixture
def wheel(package: Path, temporary: Path) -> Path:
    """The package with kernels that were compiled for one of `isa.ISAS`."""
    if not SAME:
        assert isa.host().architecture not in ("x86_64", "aarch64")
        pytest.skip("kernels for this processor are in no wheel")
    for path in [package, *package.rglob("*")]:
        path.chmod(path.stat().st_mode | 0o200)
    built = temporary / "built"
    assert run(package, temporary, NUMBA_CACHE_DIR=built, RBE_ISA=isa_name(SAME[0])) == (["2.0", "0"], [])
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(package)}
    command = [sys.executable, "-c", _MERGE, str(built)]
    merged = subprocess.run(command, env=env, cwd=temporary, capture_output=True, text=True, check=True)
    assert int(merged.stdout) >= 3
    return package


def test_a_wheel_brings_kernels(wheel: Path, temporary: Path) -> None:
    """They are taken where the cache has none; the kernels of an edited source, or of other instructions, are not."""
    folder = temporary / "cache"
    assert run(wheel, temporary, NUMBA_CACHE_DIR=folder) == (["2.0", "1"], [])
    assert not list(folder.rglob("*.nb?"))
    assert run(wheel, temporary, NUMBA_CACHE_DIR=folder, RBE_ISA="sse2") == (["2.0", "0"], [])
    assert list(folder.rglob("*add*.nbc"))
    (temporary / f"rbe_gpu-kernels-{USER}").mkdir(0o755)  # of somebody else
    words, (line,) = run(wheel, temporary)
    assert words == ["2.0", "1"]
    assert "kept nowhere" in line
    source = wheel / "cpu_fallback" / "add.py"
    source.write_text(source.read_text() + "# edited\n")
    assert run(wheel, temporary, NUMBA_CACHE_DIR=temporary / "edited") == (["2.0", "0"], [])


def test_damaged_kernels_of_a_wheel(wheel: Path, temporary: Path) -> None:
    """They are compiled, and kept in the cache."""
    for file in (wheel / "cpu_fallback" / "precompiled").glob("*add*.nbc"):
        file.write_bytes(file.read_bytes()[:-9])
    folder = temporary / "cache"
    words, (line,) = run(wheel, temporary, NUMBA_CACHE_DIR=folder)
    assert words == ["2.0", "0"]
    assert "precompiled cannot be read" in line
    assert "install rbe-gpu anew" in line
    assert run(wheel, temporary, NUMBA_CACHE_DIR=folder) == (["2.0", "1"], [])

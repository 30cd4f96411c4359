"""The build backend: setuptools, with source archives of the same bytes wherever and whenever they are built, and
wheels for one platform where `build_kernels.py` has compiled kernels.

setuptools takes SOURCE_DATE_EPOCH for wheels alone; its source archives hold the times, the owner and the umask of
the checkout. Here both need no setting: without SOURCE_DATE_EPOCH everything is of 1980, where zip files begin. The
bytes still depend on the versions of setuptools and zlib.
"""

from __future__ import annotations

import gzip
import io
import os
import shutil
import sys
import sysconfig
import tarfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from setuptools import build_meta as setuptools
from setuptools.build_meta import (  # noqa: F401  the hooks of PEP 517 and 660
    build_editable,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

EPOCH = int(os.environ.setdefault("SOURCE_DATE_EPOCH", "315619200"))  # 1980-01-02: in every time zone
PRECOMPILED = Path(__file__).parent / "cpu_fallback" / "precompiled"


def build_wheel(directory: str, settings: Any = None, metadata: str | None = None) -> str:
    """A wheel for all platforms, or with compiled kernels for this version of Python and this platform."""
    # setuptools packs what an earlier build has left there
    shutil.rmtree(Path(__file__).parent / "build" / "lib", ignore_errors=True)
    if PRECOMPILED.is_dir():
        tags = ["--python-tag=cp{}{}".format(*sys.version_info), f"--plat-name={platform_tag()}"]
        settings = {**(settings or {}), "--build-option": tags}
    return str(setuptools.build_wheel(directory, settings, metadata))


def platform_tag() -> str:
    """The platforms that kernels run on: those of Numba's wheel, which calls the C library for them."""
    try:
        wheel = distribution("numba").read_text("WHEEL") or ""
    except PackageNotFoundError:  # in an isolated build
        wheel = ""
    tags = [line.rpartition("-")[2] for line in wheel.splitlines() if line.startswith("Tag:")]
    return tags[0] if tags and tags[0] != "any" else sysconfig.get_platform()


def build_sdist(directory: str, settings: Any = None) -> str:
    """A source archive, its members sorted, of one time and nobody's."""
    name = str(setuptools.build_sdist(directory, settings))
    path = Path(directory) / name
    path.write_bytes(normalized(path.read_bytes()))
    return name


def normalized(archive: bytes) -> bytes:
    """A .tar.gz without what the machine that wrote it put in."""
    made = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(archive)) as old,
        tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in sorted(old.getmembers(), key=lambda member: member.name):
            clean = tarfile.TarInfo(member.name)
            clean.type, clean.size, clean.mtime = member.type, member.size, EPOCH
            clean.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            new.addfile(clean, old.extractfile(member) if member.isfile() else None)
    return gzip.compress(made.getvalue(), mtime=EPOCH)

"""The archives that `python -m build` writes, and the lock of what CI installs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import packaging.tags
import packaging.utils
import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .bounded import REPOSITORY

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILES = ("pyproject.toml", "MANIFEST.in", "build_backend.py", "build_kernels.py", "README.md", "LICENSE")
FOLDERS = ("rbe_gpu", "cpu_fallback", "cuda_src", "reports", "tests")


def _checkout(folder: Path, mode: int, seconds: int) -> Path:
    """The sources with other permissions and times."""
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "precompiled")
        shutil.copytree(REPOSITORY / name, folder / name, ignore=ignored)
    for name in FILES:
        shutil.copy(REPOSITORY / name, folder)
    for path in folder.rglob("*"):
        path.chmod(mode | 0o100 if path.is_dir() else mode)
        os.utime(path, (seconds, seconds))
    return folder


def _built(checkout: Path, out: Path, zone: str, *options: str) -> dict[str, bytes]:
    env = {**os.environ, "TZ": zone}
    env.pop("SOURCE_DATE_EPOCH", None)
    command = [sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", str(out), str(checkout)]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_archives_are_reproducible(tmp_path: Path) -> None:
    """The same bytes from checkouts with other times, permissions, places and time zones; and no measured rows."""
    first = _built(_checkout(tmp_path / "a", 0o644, 1_700_000_000), tmp_path / "out", "UTC")
    second = _built(
        _checkout(tmp_path / "another place", 0o600, 1_800_000_001), tmp_path / "more", "Asia/Seoul"
    )
    assert sorted(name.rpartition(".")[2] for name in first) == ["gz", "whl"]
    assert first.keys() == second.keys()
    for name, raw in first.items():
        assert raw == second[name], name
    sources, wheel = sorted(tmp_path.glob("out/*"), key=lambda path: path.suffix)
    with tarfile.open(sources) as archive:
        members = archive.getmembers()
    names = [member.name.partition("/")[2] for member in members]
    assert {"build_backend.py", "cuda_src/rms_norm.cu", "reports/templates/speed.html"} < set(names)
    assert {(member.uid, member.gid, member.uname, member.gname) for member in members} == {(0, 0, "", "")}
    with zipfile.ZipFile(wheel) as made:
        names += made.namelist()
    assert not [name for name in names if name.endswith(".csv") or name.startswith("tests/")]
    assert "build_kernels.py" in names


def test_wheel_with_compiled_kernels(tmp_path: Path) -> None:
    """Kernels make a wheel one for this Python and this platform; the source archive has none of them."""
    checkout = _checkout(tmp_path / "checkout", 0o644, 1_700_000_000)
    kernels = checkout / "cpu_fallback" / "precompiled"
    kernels.mkdir()
    (kernels / "add.py311.nbi").write_bytes(b"index")
    made = _built(checkout, tmp_path / "out", "UTC", "--wheel", "--sdist")
    (wheel,) = tmp_path.glob("out/*.whl")
    _, _, tags = packaging.utils.parse_wheel_filename(wheel.name)[1:]
    assert set(tags) <= set(packaging.tags.sys_tags())
    assert {tag.abi for tag in tags} == {"none"}
    assert "any" not in {tag.platform for tag in tags}
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("rbe_gpu/cpu_fallback/precompiled/add.py311.nbi") == b"index"
    (sources,) = tmp_path.glob("out/*.tar.gz")
    with tarfile.open(sources) as archive:
        assert not [name for name in archive.getnames() if "precompiled" in name]
    assert len(made) == 2
    shutil.rmtree(kernels)
    again = _built(checkout, tmp_path / "again", "UTC", "--wheel")
    (name,) = again
    assert name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(tmp_path / "again" / name) as archive:
        assert not [member for member in archive.namelist() if "precompiled" in member]


def _pinned(lock: str) -> dict[str, str]:
    """The versions that a file of .ci/lock/ has for this interpreter."""
    text = (REPOSITORY / ".ci" / "lock" / lock).read_text("utf-8")
    pinned = re.findall(r"^([\w.-]+)==(\S+)(?: ; (.*?))? \\$", text, re.MULTILINE)
    assert len(pinned) > 50
    assert text.count("\n    --hash=sha256:") >= len(pinned)
    return {name: version for name, version, marker in pinned if not marker or Marker(marker).evaluate()}


DOCS = pytest.mark.skipif(sys.version_info < (3, 11), reason="locked from Python 3.11 on, as .ci/run says")


@pytest.mark.parametrize("extra", ["test", pytest.param("docs", marks=DOCS)])
def test_the_lock_has_what_is_asked_for(extra: str) -> None:
    """Else `make lock` was forgotten, and CI does not test what pyproject.toml says."""
    here = _pinned(f"{extra}.txt")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    asked = [
        Requirement(text) for text in (*project["dependencies"], *project["optional-dependencies"][extra])
    ]
    for requirement in asked:
        if requirement.marker is None or requirement.marker.evaluate():
            version = here[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), requirement


@DOCS
def test_the_locks_agree() -> None:
    """Installing what the documentation needs changes nothing that the tests ran with."""
    tests, docs = _pinned("test.txt"), _pinned("docs.txt")
    assert {name: docs[name] for name in tests.keys() & docs.keys()} == {
        name: tests[name] for name in tests.keys() & docs.keys()
    }

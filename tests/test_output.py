"""Files that are written: where a path leads, complete or not at all, and what killed processes leave."""

from __future__ import annotations

import errno
import os
import pty
import random
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rbe_gpu import output
from rbe_gpu.cli._files import save_npy
from rbe_gpu.container import load_file, save_file

from .bounded import REPOSITORY

VALUES = np.arange(1000, dtype=np.float32)


def save_tensors(path: Path) -> None:
    save_file(path, {"a": VALUES})


#: everything that writes, and a look at what it wrote
WRITERS: dict[str, tuple[Callable[[Path], object], Callable[[Path], bool]]] = {
    "save_file": (save_tensors, lambda path: np.array_equal(load_file(path)[0]["a"], VALUES)),
    "save_npy": (lambda path: save_npy(path, VALUES), lambda path: np.array_equal(np.load(path), VALUES)),
    "write_text": (
        lambda path: output.write_text(path, "täxt"),
        lambda path: path.read_text("utf-8") == "täxt",
    ),
}
writers = pytest.mark.parametrize("name", WRITERS)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# --- where a path leads -------------------------------------------------------------------------------------


@writers
def test_symbolic_links_are_followed_and_stay(name: str, tmp_path: Path) -> None:
    write, right = WRITERS[name]
    (tmp_path / "real").mkdir()
    target = tmp_path / "real" / "target"
    target.write_text("old")
    (tmp_path / "absolute").symlink_to(target)
    (tmp_path / "relative").symlink_to("real/target")
    (tmp_path / "chain").symlink_to("relative")
    (tmp_path / "folder").symlink_to("real")
    (tmp_path / "real" / "up").symlink_to("../chain")
    for link in ("absolute", "relative", "chain", "folder/target", "folder/up", "folder/../chain"):
        target.write_text("old")
        write(tmp_path / link)
        assert right(target), link
        assert not target.is_symlink()
        assert (tmp_path / "absolute").is_symlink()
        assert (tmp_path / "chain").is_symlink()
    assert names(tmp_path) == ["absolute", "chain", "folder", "real", "relative"]
    assert names(tmp_path / "real") == ["target", "up"]


@writers
def test_a_link_to_nothing_makes_its_target(name: str, tmp_path: Path) -> None:
    write, right = WRITERS[name]
    (tmp_path / "link").symlink_to("target")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert right(tmp_path / "target")
    (tmp_path / "lost").symlink_to("no/such/folder")
    with pytest.raises(FileNotFoundError, match=r"no/such does not exist; make it first"):
        write(tmp_path / "lost")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links") as error:
        write(tmp_path / "loop")
    assert error.value.errno == errno.ELOOP


@writers
def test_a_pipe_is_written_and_stays_a_pipe(name: str, tmp_path: Path) -> None:
    write, right = WRITERS[name]
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for path in (tmp_path / "pipe", tmp_path / "link"):
        copied = tmp_path / "copied"
        reader = threading.Thread(
            target=lambda copied=copied: copied.write_bytes((tmp_path / "pipe").read_bytes())
        )
        reader.start()
        write(path)
        reader.join()
        assert right(copied)
        copied.unlink()
        assert stat.S_ISFIFO((tmp_path / "pipe").lstat().st_mode)
    assert names(tmp_path) == ["link", "pipe"]


@writers
def test_what_is_no_file_is_refused(name: str, tmp_path: Path) -> None:
    write, _ = WRITERS[name]
    (tmp_path / "folder").mkdir()
    (tmp_path / "to folder").symlink_to("folder")
    with pytest.raises(IsADirectoryError, match="folder is a folder; name a file"):
        write(tmp_path / "folder")
    with pytest.raises(
        IsADirectoryError, match=r"to folder leads to .*/folder, which is a folder; name a file"
    ):
        write(tmp_path / "to folder")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        with pytest.raises(OSError, match="socket is a socket; name a file"):
            write(tmp_path / "socket")
        assert stat.S_ISSOCK((tmp_path / "socket").lstat().st_mode)
    with pytest.raises(FileNotFoundError, match="no does not exist; make it first"):
        write(tmp_path / "no" / "file")
    assert names(tmp_path) == ["folder", "socket", "to folder"]


@writers
@pytest.mark.parametrize("kind", [stat.S_IFCHR, stat.S_IFBLK])
def test_a_device_is_refused(name: str, kind: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never tried on a real one: the file is made to look like a device."""
    path = tmp_path / "device"
    path.write_text("old")
    (tmp_path / "link").symlink_to("device")
    real = os.stat

    def looks(file: object, **options: object) -> os.stat_result:
        found = real(file, **options)  # type: ignore[arg-type]
        return os.stat_result((kind | 0o666, *found[1:])) if str(file) == str(path) else found

    monkeypatch.setattr(os, "stat", looks)
    for shown in (path, tmp_path / "link"):
        with pytest.raises(OSError, match="is a device; name a file"):
            WRITERS[name][0](shown)
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["device", "link"]


def test_no_permission_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for write, _ in WRITERS.values():
        with pytest.raises(PermissionError, match=f"no permission to write in {tmp_path}"):
            write(tmp_path / "a")


@writers
def test_another_hard_link_keeps_the_old_content(name: str, tmp_path: Path) -> None:
    write, right = WRITERS[name]
    (tmp_path / "a").write_text("old")
    os.link(tmp_path / "a", tmp_path / "b")
    write(tmp_path / "a")
    assert right(tmp_path / "a")
    assert (tmp_path / "b").read_text() == "old"


@writers
def test_permissions(name: str, tmp_path: Path) -> None:
    write, _ = WRITERS[name]
    before = os.umask(0o027)
    try:
        write(tmp_path / "new")
        assert (tmp_path / "new").stat().st_mode & 0o7777 == 0o640
        for mode in (0o600, 0o444, 0o777):
            (tmp_path / "new").chmod(mode)
            write(tmp_path / "new")
            assert (tmp_path / "new").stat().st_mode & 0o7777 == mode
    finally:
        os.umask(before)


@pytest.mark.parametrize("file", ["x" * 255, "\U0001f600" * 63 + "abc", "a.b c\n'\"d", ".hidden", "-"])
def test_names(file: str, tmp_path: Path) -> None:
    for write, right in WRITERS.values():
        write(tmp_path / file)
        assert right(tmp_path / file)
    assert names(tmp_path) == [file]


# --- descriptors --------------------------------------------------------------------------------------------

TO_STDOUT = """
import sys
from tests.test_output import *
print("before", flush=True)
WRITERS[sys.argv[1]][0](Path(sys.argv[2]))
"""


def run(script: str, *arguments: object, **options: object) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, **{"stderr": subprocess.PIPE, **options})  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("path", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
@writers
def test_standard_output(name: str, path: str, tmp_path: Path) -> None:
    """A pipe, and a file that the shell has opened: written where it is, after what is there."""
    (tmp_path / "link").symlink_to(path)
    with open(tmp_path / "file", "wb") as file:
        assert run(TO_STDOUT, name, tmp_path / "link", stdout=file).returncode == 0
    for raw in (run(TO_STDOUT, name, path, stdout=subprocess.PIPE).stdout, (tmp_path / "file").read_bytes()):
        start, _, content = raw.partition(b"\n")
        assert start == b"before"
        (tmp_path / "content").write_bytes(content)
        assert WRITERS[name][1](tmp_path / "content")


def test_a_terminal_is_refused() -> None:
    ours, terminal = pty.openpty()
    try:
        with pytest.raises(OSError, match=rf"/dev/fd/{terminal} is a terminal; redirect it, or name a file"):
            save_tensors(Path(f"/dev/fd/{terminal}"))
    finally:
        os.close(ours)
        os.close(terminal)


def test_a_closed_descriptor() -> None:
    with pytest.raises(OSError, match="Bad file descriptor: '/dev/fd/9999'"):
        save_tensors(Path("/dev/fd/9999"))


# --- failures -----------------------------------------------------------------------------------------------

FULL = """
import resource
from tests.test_output import *
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    WRITERS[sys.argv[1]][0](Path(sys.argv[2]))
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("name", ["save_file", "save_npy"])
def test_a_full_disk(name: str, tmp_path: Path) -> None:
    """A limit of the file size stands for it: the same failure of write()."""
    (tmp_path / "a").write_text("old")
    done = run(FULL, name, tmp_path / "a", stdout=subprocess.PIPE)
    assert done.stdout.decode() == f"[Errno {errno.EFBIG}] File too large: '{tmp_path / 'a'}'\n"
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def fail_while_writing(path: Path, error: type[BaseException]) -> None:
    with output.replacing(path) as file:
        file.write(b"new")
        raise error


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error):
            fail_while_writing(tmp_path / "a", error)
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


# --- killed processes, and several at once --------------------------------------------------------------------


def test_remains_are_removed_unless_a_process_holds_them(tmp_path: Path) -> None:
    remains, held, other = (
        tmp_path / f".{n}.{i:016x}.partial" for i, n in enumerate(["gone", "held", "linked"])
    )
    for path in (remains, held):
        path.write_bytes(bytes(1000))
    other.symlink_to("gone")
    (tmp_path / ".notes.partial").touch()  # not one of ours
    with open(held) as file:
        assert output.lock(file.fileno())
        save_tensors(tmp_path / "a")
        assert names(tmp_path) == sorted([held.name, other.name, ".notes.partial", "a"])
    save_tensors(tmp_path / "a")
    assert names(tmp_path) == sorted([other.name, ".notes.partial", "a"])


def test_a_partial_file_that_is_swept_before_it_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, calls = output.lock, []

    def late(descriptor: int, wait: bool = True) -> bool:
        calls.append(wait)
        if len(calls) == 1:
            output.sweep(tmp_path)
            assert not names(tmp_path)
        return lock(descriptor, wait)

    monkeypatch.setattr(output, "lock", late)
    save_tensors(tmp_path / "a")
    assert names(tmp_path) == ["a"]
    assert calls == [True, False, True]


WRITING = """
import itertools
from tests.test_output import *
big = np.full(1 << 20, int(sys.argv[2]), np.float32)
print("ready", flush=True)
for i in itertools.count():
    save_file(Path(sys.argv[1]), {"a": big})
    print(i, flush=True)
"""


def start_writing(path: Path, value: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", WRITING, str(path), str(value)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def whole(path: Path) -> float:
    """The value that all of the file has."""
    values = load_file(path)[0]["a"]
    assert len(values) == 1 << 20  # type: ignore[arg-type]
    (value,) = np.unique(values)  # type: ignore[arg-type]
    return float(value)


def test_kills_and_two_writers(tmp_path: Path) -> None:
    """After each of 6 kills, while another process writes the same file: it is whole, and remains are swept."""
    path = tmp_path / "a"
    rng = random.Random(0)
    other = start_writing(path, 1)
    assert other.stdout is not None
    other.stdout.readline()
    left = 0
    try:
        for _ in range(6):
            victim = start_writing(path, 2)
            time.sleep(rng.uniform(0.02, 0.3))
            victim.send_signal(signal.SIGKILL)
            victim.wait()
            left += len(names(tmp_path)) - 1
            assert whole(path) in (1, 2)
    finally:
        other.kill()
        other.wait()
    assert left
    output.sweep(tmp_path)
    assert names(tmp_path) == ["a"]
    assert whole(path) in (1, 2)

"""Files that the package writes: complete or not at all, and only where a file belongs.

`with replacing(path) as file:` writes to a file beside `path`, which takes its name when the block ends. Symbolic
links are followed: what they lead to is replaced, and they stay. Named pipes and descriptors (/dev/stdout) are
written as they are, because nothing else can be meant; devices, sockets and folders are refused.

A process that is killed leaves `.NAME.<16 digits>.partial` behind. Its writer holds a lock on it (flock) as long as
it lives, so the next write into the folder tells the remains from files that others are writing, and removes them.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be removed: the same effect without a lock
    fcntl = None  # type: ignore[assignment]

_MAX_LINKS = 40  # as many as Linux follows
_DESCRIPTOR = re.compile(r"/(?:dev|proc/self|proc/thread-self)/fd/([0-9]{1,9})")
_STANDARD = {"/dev/stdout": 1, "/dev/stderr": 2}
_PARTIAL = re.compile(r"\..+\.[0-9a-f]{16}\.partial")
_LONGEST_NAME = 255  # bytes of a name in most file systems
_TRIES = 50  # to remove a folder, a tenth of a second apart


class Destination(NamedTuple):
    """What is written: `path`, behind all links; `descriptor` of this process if that is what it names.

    through : written as it is, a pipe for instance; otherwise a file is replaced or made
    """

    path: Path
    descriptor: int | None = None
    through: bool = False


def destination(path: str | os.PathLike[str]) -> Destination:
    """Where a path leads, if it can be written; nothing is opened or made.

    Raises
    ------
    OSError
        A folder, a device, a socket, links without end, or a folder that does not exist or allows no writing. The
        message is one line and names the path.
    """
    asked = at = Path(path)
    for _ in range(_MAX_LINKS):
        match = _DESCRIPTOR.fullmatch(str(at))
        number = int(match[1]) if match else _STANDARD.get(str(at))
        if number is not None:
            return Destination(at, _writable(number, asked), True)
        try:
            at = at.parent / os.readlink(at)
        except OSError:  # not a link
            break
    else:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(asked))
    shown = str(asked) if at == asked else f"{asked} leads to {at}, which"
    try:
        mode = os.stat(at).st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{shown} is a folder; name a file")
    if stat.S_ISFIFO(mode) or str(at) == os.devnull:
        if not os.access(at, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(asked))
        return Destination(at, through=True)
    if not stat.S_ISREG(mode):
        kind = "socket" if stat.S_ISSOCK(mode) else "device"
        raise OSError(f"{shown} is a {kind}; name a file")
    if not at.parent.is_dir():
        raise FileNotFoundError(f"the folder {at.parent} does not exist; make it first")
    if not os.access(at.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"no permission to write in {at.parent}")
    return Destination(at)


def _writable(number: int, asked: Path) -> int:
    try:
        mode = os.fstat(number).st_mode
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(asked)) from None
    if os.isatty(number):
        raise OSError(f"{asked} is a terminal; redirect it, or name a file")
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{asked} is a folder; name a file")
    return number


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file to write, whose content is at `path` when the block ends.

    After an exception nothing is left behind, and a file at `path` is unchanged. A new file has the permissions that
    the umask leaves; a replaced one keeps its own, and its owner where the system allows that. Other hard links of
    a replaced file keep the old content.

    Raises
    ------
    OSError
        As `destination`; or the disk is full, with `path` as its filename.
    """
    place = destination(path)
    with naming(path):
        if place.descriptor is not None:
            if place.descriptor == 1:
                sys.stdout.flush()
            with os.fdopen(os.dup(place.descriptor), "wb") as file:
                yield file
        elif place.through:
            with open(place.path, "wb") as file:
                yield file
        else:
            with _replacing(place.path) as file:
                yield file


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Give an OSError that names no file, as that of a full disk, this path."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from None
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 file; see `replacing`."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def write_npy(file: BinaryIO, array: Any) -> None:
    """Write a NumPy array to a binary file in the format of .npy."""
    import numpy as np
    from numpy.lib import format as npy

    array = np.ascontiguousarray(array)
    # not np.save: on a full disk that raises "4096 requested and 2016 written"
    npy.write_array_header_1_0(file, npy.header_data_from_array_1_0(array))
    file.write(memoryview(array).cast("B") if array.size else b"")


@contextmanager
def _replacing(target: Path) -> Iterator[BinaryIO]:
    sweep(target.parent)
    partial, file = _open_partial(target)
    try:
        with file:
            yield file
            file.flush()
            _keep_permissions(target, file.fileno())
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows renames no open file
            os.replace(partial, target)  # before the lock goes, or another process could sweep it
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _open_partial(target: Path) -> tuple[Path, BinaryIO]:
    """A new locked file beside the target."""
    ending = f".{secrets.token_hex(8)}.partial"
    name = os.fsencode(f".{target.name}")[: _LONGEST_NAME - len(ending)]
    while True:
        partial = target.with_name(name.decode(errors="ignore") + ending)
        file = open(partial, "xb")  # noqa: SIM115  the caller closes it
        # between the two calls another process may have taken it for remains
        if not lock(file.fileno()) or os.fstat(file.fileno()).st_nlink:
            return partial, file
        file.close()
        ending = f".{secrets.token_hex(8)}.partial"


def lock(descriptor: int, wait: bool = True) -> bool:
    """Lock a file until it is closed. Returns False where the system or the file system has no locks.

    Raises
    ------
    BlockingIOError
        Another process has it, and `wait` is not set.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _keep_permissions(target: Path, descriptor: int) -> None:
    """The permissions and the owner of the file that is to be replaced, if there is one."""
    try:
        old = os.stat(target)
    except FileNotFoundError:
        return
    if hasattr(os, "fchown") and (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
        with suppress(PermissionError):
            os.fchown(descriptor, old.st_uid, old.st_gid)
    if hasattr(os, "fchmod"):
        os.fchmod(descriptor, stat.S_IMODE(old.st_mode) & 0o777)


def sweep(folder: Path) -> None:
    """Remove the remains of killed processes from a folder: partial files that no process holds."""
    with suppress(OSError), os.scandir(folder) as entries:
        partial = [entry for entry in entries if _PARTIAL.fullmatch(entry.name)]
        for entry in partial:
            if entry.is_file(follow_symlinks=False):
                _remove_remains(entry.path)


def _remove_remains(path: str) -> None:
    with suppress(OSError):
        if fcntl is None:
            os.unlink(path)
            return
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            if lock(descriptor, wait=False):
                os.unlink(path)
        finally:
            os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Remove a folder, as far as possible, that tasks of another process may be writing to.

    What they write meanwhile is removed too; into a folder that is gone they write nothing.
    """
    for _ in range(_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            break
        time.sleep(0.1)

"""The folder `.NAME.parts` beside an output file: what workers and the process that compresses hand each other.

Each run has a folder of its own in it. Tasks of a stopped run may go on where they cannot be ended; what they write
is not what another run reads.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from .. import output
from ..cluster import check_workers
from .source import Source

#: path, bytes and mtime_ns of each file: those of another checkpoint differ
Files = tuple[tuple[str, int, int], ...]


def files_of(source: Source) -> Files:
    status = {str(Path(file.path).absolute()): os.stat(file.path) for file in source.files.values()}
    return tuple((path, s.st_size, s.st_mtime_ns) for path, s in sorted(status.items()))


class PartsFolder:
    """A context manager, which makes, locks and removes the folder.

    Attributes
    ----------
    path : of this run's folder in it, absolute
    source, files : absolute path of the checkpoint, and its files
    client : a `distributed.Client`

    Raises
    ------
    OSError
        On entering: the folder of `out` cannot be written, by this process or a worker; `out` is a pipe; a worker is
        unusable (`rbe_gpu.cluster.check_workers`).
    BlockingIOError
        On entering: another process is writing the same file.
    """

    def __init__(self, client: Any, source: Source, out: Path) -> None:
        place = output.destination(out)
        if place.through:
            raise OSError(f"{out} is no file; workers need a folder to write to, so name a file")
        self.client = client
        self._all = place.path.absolute().with_name(f".{place.path.name}.parts")
        self.path = self._all / secrets.token_hex(8)
        self.source, self.files = str(source.path.absolute()), files_of(source)
        self._lock: BinaryIO | None = None

    def __enter__(self) -> PartsFolder:
        self._all.mkdir(exist_ok=True)
        self._lock = open(self._all / "lock", "ab")
        try:
            output.lock(self._lock.fileno(), wait=False)
        except BlockingIOError:
            self._lock.close()
            raise BlockingIOError(f"another process is writing {self._all}; wait until it ends") from None
        try:
            for entry in self._all.iterdir():  # of a run that was killed
                if entry.name != "lock":
                    output.remove_folder(entry)
            self.path.mkdir()
            check_workers(self.client, [Path(path) for path, *_ in self.files], [self.path])
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.close()
        output.remove_folder(self._all)

"""The folder that vectors of files are written to: shards, a manifest, and a log of the shards that are finished.

    manifest.json           what the vectors depend on, and whether all are there
    shards.jsonl            one line for each finished shard, in the order in which they ended
    00000-0000000.npy       (rows, columns) float32: the first shard of the first file

A run that is stopped is continued from the log. A shard has its name only when it is complete.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from .. import output

MANIFEST, LOG = "manifest.json", "shards.jsonl"
FORMAT_VERSION = 1
_TRIES = 50  # to empty the folder, a tenth of a second apart
_SHARD = re.compile(r"[0-9]{5,}-[0-9]{7,}\.(npy|parquet)")


class OutputFolder:
    """The output of one run; a context manager, which locks the folder.

    After an exception before the first shard is finished, what was made is removed again.

    Attributes
    ----------
    path : of the folder, absolute
    finished : shards of the log by name

    Parameters
    ----------
    path : a folder; it is made, or was made by a run before
    settings : what the vectors depend on, JSON values by a name for messages
    resume : continue a run with the same settings; without one, start it
    force : remove the vectors of another run

    Raises
    ------
    FileExistsError
        On entering: the folder holds vectors, and neither `resume` nor `force` is set; or it holds other files.
    ValueError
        On entering: it holds vectors with other settings, or its manifest is damaged.
    BlockingIOError
        On entering: another process writes them.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], resume: bool, force: bool) -> None:
        self.path = path.absolute()
        self.finished: dict[str, dict[str, Any]] = {}
        self._settings = dict(settings)
        self._resume, self._force = resume, force
        self._log: BinaryIO | None = None
        self._made = self._ours = False

    def __enter__(self) -> OutputFolder:
        self._check_place()
        self._made = not self.path.exists()
        self.path.mkdir(exist_ok=True)
        try:
            self._log = open(self.path / LOG, "a+b")
            try:
                output.lock(self._log.fileno(), wait=False)
            except BlockingIOError:
                raise BlockingIOError(f"another process is writing {self.path}; wait until it ends") from None
            self._start()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def _check_place(self) -> None:
        """Refuse a folder that is no output, before anything is written."""
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"the folder {self.path.parent} does not exist; make it first")
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise FileExistsError(f"{self.path} is a file; name a folder")
        if not (self.path / MANIFEST).exists():
            others = [name for name in os.listdir(self.path) if name != LOG and not name.startswith(".")]
            if others:
                raise FileExistsError(
                    f"{self.path} is a folder of other files ({min(others)}); name another one"
                )
        elif not (self._resume or self._force):
            raise FileExistsError(
                f"{self.path} holds vectors; continue with resume, or replace them with force"
            )

    def _start(self) -> None:
        kept = None if self._force and not self._resume else self._manifest()
        if kept is not None and kept["settings"] != self._settings:
            names = sorted({*kept["settings"], *self._settings})
            other = ", ".join(n for n in names if kept["settings"].get(n) != self._settings.get(n))
            raise ValueError(f"{self.path} is of a run with another {other}; name another folder")
        self._ours = True
        output.sweep(self.path)
        if kept is not None:
            self._read_log()
        else:
            assert self._log is not None
            self._log.truncate(0)
        for name in self._shards():  # of a run that was killed between a shard and its line in the log
            if Path(name).stem not in self.finished:
                (self.path / name).unlink()
        if kept is None:
            self._write_manifest({"complete": False})

    def _manifest(self) -> dict[str, Any] | None:
        path = self.path / MANIFEST
        if not path.exists():
            return None
        try:
            value = json.loads(path.read_text("utf-8"))
            if value["format_version"] != FORMAT_VERSION or not isinstance(value["settings"], dict):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is no manifest that this version wrote; name another folder") from None
        return dict(value)

    def _write_manifest(self, result: Mapping[str, Any]) -> None:
        value = {"format_version": FORMAT_VERSION, "settings": self._settings, **result}
        output.write_text(self.path / MANIFEST, json.dumps(value, indent=1) + "\n")

    def _read_log(self) -> None:
        """The finished shards whose files are there with their sizes; a last line that was cut off is dropped."""
        assert self._log is not None
        self._log.seek(0)
        length = 0
        for line in self._log:
            try:
                record = json.loads(line)
                file = self.path / record["file"]
            except (ValueError, KeyError, TypeError):
                break
            if not line.endswith(b"\n"):
                break
            length += len(line)
            with suppress(FileNotFoundError):
                if file.stat().st_size == record["bytes"]:
                    self.finished[file.stem] = record
        self._log.truncate(length)

    def _shards(self) -> list[str]:
        return [entry.name for entry in os.scandir(self.path) if _SHARD.fullmatch(entry.name)]

    def add(self, record: dict[str, Any]) -> None:
        """Note a shard as finished: JSON values, among them `file` and `bytes`."""
        assert self._log is not None
        self._log.write(json.dumps(record).encode() + b"\n")
        self._log.flush()
        os.fsync(self._log.fileno())
        self.finished[Path(record["file"]).stem] = record

    def complete(self, result: Mapping[str, Any]) -> None:
        """Note that all shards are finished, with JSON values that describe the result."""
        self._write_manifest({"complete": True, **result})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._log is not None:
            self._log.close()
        if kind is None or self.finished or not (self._ours or self._made):
            return
        with suppress(OSError):
            (self.path / MANIFEST).unlink(
                missing_ok=True
            )  # tasks that have not ended write nothing without it
            for _ in range(_TRIES):
                output.sweep(self.path)
                for name in (*self._shards(), LOG):
                    (self.path / name).unlink(missing_ok=True)
                if not any(name.endswith(".partial") for name in os.listdir(self.path)):
                    break
                time.sleep(0.1)  # a worker is writing at this moment
            if self._made:
                self.path.rmdir()

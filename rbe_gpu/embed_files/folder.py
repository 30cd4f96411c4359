"""The folder that vectors of files are written to: shards, a manifest, and a log of the shards that are finished.

    manifest.json           what the vectors depend on, and whether all are there
    shards.jsonl            one line for each finished shard, in the order in which they ended
    00000-0000000.npy       (rows, columns) float32: the first shard of the first file
    .run-0123456789abcdef   a folder of the run that is going on, which workers write shards to

A run that is stopped is continued from the log. Tasks of a stopped run may go on where they cannot be ended; what
they write never gets here, because only the process that started a run moves shards out of that run's folder.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from .. import output

MANIFEST, LOG = "manifest.json", "shards.jsonl"
FORMAT_VERSION = 1
_SHARD = re.compile(r"[0-9]{5,}-[0-9]{7,}\.(npy|parquet)")
_RUN = re.compile(r"\.run-[0-9a-f]{16}")
#: what a line of the log holds
_FIELDS = {
    "file": str, "texts": str, "first": int, "rows": int, "bytes": int, "columns": int, "sha256": str,
    "texts_sha256": str,
}  # fmt: skip


class OutputFolder:
    """The output of one run; a context manager, which locks the folder.

    After an exception before the first shard is finished, what was made is removed again.

    Attributes
    ----------
    path : of the folder, absolute
    run : the folder in it that workers write shards of this run to
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
        self.run = self.path / f".run-{secrets.token_hex(8)}"
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
        before = None if self._force and not self._resume else self._manifest()
        if before is not None and before["settings"] != self._settings:
            names = sorted({*before["settings"], *self._settings})
            other = ", ".join(n for n in names if before["settings"].get(n) != self._settings.get(n))
            raise ValueError(f"{self.path} is of a run with another {other}; name another folder")
        if before is not None:
            self._read_log()
        self._ours = True
        if before is None:
            assert self._log is not None
            self._log.truncate(0)
        output.sweep(self.path)
        self._remove_runs()
        for name in self._shards():  # of a run that was killed between a shard and its line in the log
            if Path(name).stem not in self.finished:
                (self.path / name).unlink()
        self.run.mkdir()
        if before is None:
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
        for number, line in enumerate(self._log, 1):
            if not line.endswith(b"\n"):
                break
            record = _record(line)
            if record is None:
                raise ValueError(
                    f"{self.path / LOG}: line {number} is not one that this version wrote; name another folder, or "
                    "replace this one with force"
                )
            length += len(line)
            file = self.path / record["file"]
            with suppress(FileNotFoundError):
                if file.stat().st_size == record["bytes"]:
                    self.finished[file.stem] = record
        self._log.truncate(length)

    def _shards(self) -> list[str]:
        return [entry.name for entry in os.scandir(self.path) if _SHARD.fullmatch(entry.name)]

    def _remove_runs(self) -> None:
        for name in filter(_RUN.fullmatch, os.listdir(self.path)):
            output.remove_folder(self.path / name)

    def add(self, record: dict[str, Any]) -> None:
        """Move a shard out of `run`, and note it as finished: a line of the log as a dict."""
        assert self._log is not None
        os.replace(self.run / record["file"], self.path / record["file"])
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
        if self._ours:
            output.remove_folder(self.run)
        if kind is None or self.finished or not (self._ours or self._made):
            return
        with suppress(OSError):
            for name in (MANIFEST, *self._shards(), LOG):
                (self.path / name).unlink(missing_ok=True)
            if self._made:
                self.path.rmdir()


def _record(line: bytes) -> dict[str, Any] | None:
    """A line of the log; None for another one."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not all(isinstance(record.get(k), t) for k, t in _FIELDS.items()):
        return None
    return record if _SHARD.fullmatch(record["file"]) else None

"""What a long compression has finished, kept in a folder beside the output until the output is there.

A run that is killed or interrupted leaves the folder `.NAME.journal`; `compress_model(..., resume=True)` takes the
results in it instead of computing them again. They are those of the same model, texts, options and versions, or are
refused, and they are stored without loss: the file has the bytes of a run without interruption.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO
from urllib.parse import quote

import numpy as np

from .. import output
from ..container import load_file, save_file

_IDENTITY = "identity.json"
_VALUES = "values.json"
_LOCK = "lock"


class NoJournal:
    """Computes everything and keeps nothing.

    Attributes
    ----------
    scratch : a folder for files that the run needs while it lasts (`Scratch`); None: there is none
    """

    scratch: Path | None = None

    def tensors(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Tensors by name: those that are kept under `name`, or what `make` returns."""
        return make()

    def value(self, name: str, make: Callable[[], Any]) -> Any:
        """Floats, or dicts and lists of them: those kept under `name`, or what `make` returns. Types are kept too."""
        return make()

    def has(self, name: str) -> bool:
        """Whether the tensors `name` are kept."""
        return False

    def has_value(self, name: str) -> bool:
        """Whether the value `name` is kept."""
        return False


class Journal(NoJournal):
    """The results of one run in a folder; a context manager, which locks the folder.

    Leaving it removes the folder, except by an interrupt (KeyboardInterrupt): that run can be resumed.

    Parameters
    ----------
    out : the output file; the folder is beside it
    identity : what the results depend on, by a name for messages: JSON values
    resume : take the results that are there; otherwise they are removed first

    Raises
    ------
    BlockingIOError
        On entering: another process has it.
    ValueError
        On entering: it holds results of another identity.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any], resume: bool) -> None:
        self.folder = out.with_name(f".{os.fsencode(out.name)[:200].decode(errors='ignore')}.journal")
        self._identity = dict(identity)
        self._resume = resume
        self._values: dict[str, Any] = {}
        self._lock: BinaryIO | None = None

    def __enter__(self) -> Journal:
        self._lock = self._locked()
        self.scratch = self.folder
        try:
            for unfinished in self.folder.glob("scratch-*"):  # of a run that was killed
                shutil.rmtree(unfinished)
            if not self._resume:
                self._clear()
            kept = self._read(_IDENTITY)
            if kept is None:
                output.write_text(self.folder / _IDENTITY, json.dumps(self._identity, indent=1))
            elif kept != self._identity:
                names = sorted({*kept, *self._identity})
                other = ", ".join(n for n in names if kept.get(n) != self._identity.get(n))
                raise ValueError(
                    f"{self.folder} is of a run with another {other}; without resume it is replaced"
                )
            self._values = self._read(_VALUES) or {}
        except BaseException:
            self._lock.close()
            raise
        return self

    def _locked(self) -> BinaryIO:
        while True:
            self.folder.mkdir(exist_ok=True)
            try:
                file = open(self.folder / _LOCK, "ab")  # noqa: SIM115  closed in __exit__
            except FileNotFoundError:  # another process has just removed the folder
                continue
            try:
                locked = output.lock(file.fileno(), wait=False)
            except BlockingIOError:
                file.close()
                raise BlockingIOError(
                    f"another process is writing {self.folder}; wait until it ends"
                ) from None
            if not locked or os.fstat(file.fileno()).st_nlink:
                return file
            file.close()  # of a folder that has just been removed

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._lock is not None
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        with self._lock:
            if not (interrupted and (self._values or any(self.folder.glob("*.safetensors")))):
                with suppress(OSError):  # Windows removes no file that is mapped or open
                    self._clear()
                    (self.folder / _LOCK).unlink()
                    self.folder.rmdir()

    def tensors(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self._path(name)
        if path.is_file():
            return load_file(path)[0]
        made = make()
        save_file(path, made)
        return made

    def value(self, name: str, make: Callable[[], Any]) -> Any:
        if name in self._values:
            return _scalars(self._values[name])
        made = make()
        self._values[name] = _plain(made)
        output.write_text(self.folder / _VALUES, json.dumps(self._values))
        return made

    def has(self, name: str) -> bool:
        return self._path(name).is_file()

    def has_value(self, name: str) -> bool:
        return name in self._values

    def _path(self, name: str) -> Path:
        return self.folder / f"{quote(name, safe='')}.rbe.safetensors"

    def _read(self, file: str) -> dict[str, Any] | None:
        path = self.folder / file
        if not path.is_file():
            return None
        try:
            value = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); remove the folder") from None
        if not isinstance(value, dict):
            raise ValueError(f"{path} is not a JSON object; remove the folder")
        return value

    def _clear(self) -> None:
        for entry in os.scandir(self.folder):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry)
            elif entry.name != _LOCK:
                os.unlink(entry)


def _plain(value: Any) -> Any:
    """A JSON value; scalars of NumPy become objects, because arithmetic with them differs from that of floats."""
    if isinstance(value, np.floating):
        return {"dtype": value.dtype.name, "value": float(value)}
    if isinstance(value, dict):
        return {"items": {name: _plain(v) for name, v in value.items()}}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def _scalars(value: Any) -> Any:
    """The inverse of `_plain`."""
    if isinstance(value, list):
        return [_scalars(v) for v in value]
    if not isinstance(value, dict):
        return value
    if "items" in value:
        return {name: _scalars(v) for name, v in value["items"].items()}
    return np.dtype(value["dtype"]).type(value["value"])


def digest(parts: Iterable[bytes | str | memoryview]) -> str:
    """A digest of all parts, which tells where each ends."""
    whole = hashlib.sha256()
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        whole.update(f"{len(raw)}:".encode())
        whole.update(raw)
    return whole.hexdigest()

"""Errors of a command: one line on standard error and an exit code."""

from __future__ import annotations

import os
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import typer

from .. import output
from . import _signals, _streams

#: The environment variable that shows the traceback of an error of rbe-gpu itself.
TRACEBACK = "RBE_TRACEBACK"
MANIFEST = "manifest.json"  # of a folder of shards (`rbe_gpu.embed_files.folder`)
_LONGEST = 1000  # characters of a message; names and values from the command line may be of any length


def printable(text: str) -> str:
    """Text on one line, with what a terminal would act on escaped, and the middle of a very long one left out."""
    line = " ".join(text.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    return line


def one_line(error: BaseException) -> str:
    """The message of an error on one line."""
    if isinstance(error, OSError) and error.strerror:
        name = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return printable(f"{name}{error.strerror}")
    if isinstance(error, MemoryError) and not str(error):
        return "not enough memory"
    return printable(str(error)) or type(error).__name__


class Failure(Exception):
    """What a command ends with: a message and an exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def fail(message: str) -> NoReturn:
    """End the command with a message and exit code 1."""
    raise Failure(message)


@contextmanager
def about(path: object) -> Iterator[None]:
    """Name the file or folder in the message of an error that what it holds causes."""
    try:
        yield
    except OSError:
        raise  # it names its file, or is about the output
    except (ValueError, MemoryError, RecursionError) as error:
        _raise_about(path, error)
    except Exception as error:
        if type(error) is not Exception:  # what tokenizers raises, by itself
            raise
        _raise_about(path, error)


def _raise_about(path: object, error: Exception) -> NoReturn:
    message = one_line(error)
    if isinstance(error, RecursionError):
        message = "its JSON is nested too deeply"
    name = printable(str(path))
    named = re.search(rf"(?<![\w/.-]){re.escape(name)}(?![\w.-])", message)
    fail(message if named else f"{name}: {message}")


def usage(message: str, *options: str) -> NoReturn:
    """End the command with a message on its options and exit code 2."""
    raise typer.BadParameter(message, param_hint=" and ".join(options) or None)


def _is_usage(error: Any) -> bool:
    """Whether a command line was refused: by click's UsageError, of which newer versions of typer have a copy."""
    return hasattr(error, "format_message") and error.exit_code == 2


def _usage_line(error: Any) -> str:
    command = "rbe-gpu" if error.ctx is None else error.ctx.command_path
    message = error.format_message().rstrip(".")
    if type(error) is typer.BadParameter:
        hint = error.param_hint or (error.param and error.param.opts[-1])
        message = f"{hint}: {error.message.rstrip('.')}" if hint else error.message
    return f"{printable(message)}; see {command} --help"


def exit_code(command: Callable[[], Any]) -> int:
    """Run a command and report its errors, one line each. Returns the exit code of the process."""
    global _output
    _output = None
    try:
        with _warnings_on_one_line():
            code = command()
            _streams.flush_output()
        if code == _signals.INTERRUPTED or _signals.interrupted():
            return _interrupted()
        return code if isinstance(code, int) else 0
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) or _signals.interrupted():
            return _interrupted()
        return _reported(error)


def _reported(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, _streams.OutputError):
        _streams.drop_output()
        if not error.quiet:
            _say(str(error))
        return 1
    if _is_usage(error):
        _say(_usage_line(error))
        return 2
    if isinstance(error, BrokenPipeError) and error.filename == "/dev/stdout":
        return 1  # as of what is printed
    if isinstance(error, Failure | OSError | ValueError | MemoryError):
        # of the operating system, not a message of ours
        unnamed = isinstance(error, OSError) and error.errno is not None and error.filename is None
        _say(f"{printable(str(_output))}: {one_line(error)}" if unnamed and _output else one_line(error))
        return error.code if isinstance(error, Failure) else 1
    if isinstance(error, ImportError) and "pip install" in str(error):  # of an extra
        _say(one_line(error))
        return 1
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    else:
        kind = type(error).__name__
        _say(f"internal error, {kind}: {one_line(error)}; to report it, run again with {TRACEBACK}=1")
    return 1


def _say(line: str) -> None:
    _streams.say(f"rbe-gpu: {line}")


@contextmanager
def _warnings_on_one_line() -> Iterator[None]:
    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        _say(f"warning: {printable(str(message))}")

    previous = warnings.showwarning
    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = previous


# --- interrupts ---------------------------------------------------------------------------------------

_output: Path | None = None
_before: object = None
_checkpoint_before: object = None  # of training
_folder = False
_replaced: object = None  # the manifest of a folder that is replaced


def writes(out: Path) -> None:
    """Remember the file that the command writes, for the message after an interrupt. Not pipes and the like."""
    global _output, _before, _checkpoint_before, _folder
    if not output.destination(out).through:
        _output, _before, _folder = out, _identity(out), False
        _checkpoint_before = _identity(_checkpoint_of(out))


def _checkpoint_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.checkpoint")


def writes_folder(out: Path, replace: bool) -> None:
    """Remember the folder of shards that the command writes. replace : another run left what is there"""
    global _output, _folder, _replaced
    _output, _folder = out, True
    _replaced = _identity(out / MANIFEST) if replace else None


def _identity(path: Path) -> object:
    """What tells a file from one that replaced it, or None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def _interrupted() -> int:
    if _signals.quiet():
        return _signals.INTERRUPTED
    if _output is None:
        _say("interrupted")
    elif (
        _output.with_name(f".{_output.name}.journal").is_dir()
        or (not _folder and _identity(_checkpoint_of(_output)) not in (None, _checkpoint_before))
        or (_folder and _identity(_output / MANIFEST) not in (None, _replaced))
    ):
        _say("interrupted; the finished part is kept: continue with --resume")
    elif _folder or _identity(_output) == _before:
        _say("interrupted; nothing was written")
    else:
        _say(f"interrupted; {printable(str(_output))} is complete")
    return _signals.INTERRUPTED

"""Interrupts: SIGINT, SIGTERM and SIGHUP end a command with exit code 130, and nothing half-written stays behind.

A signal ends the process at once, wherever nothing is to be cleaned up: an exception at any place of any module is
caught by some of them, printed by others, and lost in destructors and callbacks. Only while a file is being written,
`with cleaning_up():`, it is an exception.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False  # without typing, which takes longer to import than the rest
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any, NoReturn

INTERRUPTED = 130  # exit code
#: those of this system; SIGHUP is not on Windows
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_PATIENCE = 3  # the signal that ends a process which the first one has not ended

_handled = False  # in a test that calls a command, signals are the test's
_quiet = False
_count, _last = 0, 0  # signals that have raised or would have, and the number of the last one


def _handle(handler: Any) -> None:
    """Handle the signals, except those that the parent process has set to be ignored (`nohup`, `cmd &`)."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None) -> None:
    try:
        if not _quiet:
            os.write(2, b"rbe-gpu: interrupted\n")
    finally:
        os._exit(INTERRUPTED)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt. A second signal would end the clean-up and is ignored."""
    global _count, _last
    _count, _last = _count + 1, number
    if _count >= _PATIENCE:
        os._exit(INTERRUPTED)
    if _count == 1:
        raise KeyboardInterrupt


def _unraisable(problem: Any) -> None:
    """An exception that a destructor or a callback of C code has lost: an interrupt comes again soon after."""
    global _count
    if problem.exc_type is KeyboardInterrupt and _count:
        from threading import Timer

        _count = 0
        again = Timer(0.01, os.kill, (os.getpid(), _last))  # here it would be lost once more
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(problem)


def start(quiet: bool = False) -> None:
    """Handle signals from now on. `quiet`: another process says that the command was interrupted."""
    global _handled, _quiet
    _handled, _quiet = True, quiet
    _handle(_leave)
    sys.unraisablehook = _unraisable


class cleaning_up:
    """A context in which a signal raises KeyboardInterrupt."""

    def __enter__(self) -> None:
        if _handled:
            _handle(_interrupt)

    def __exit__(self, *error: object) -> None:
        if _handled and not _count:
            _handle(_leave)


def interrupted() -> bool:
    """Whether a signal has raised KeyboardInterrupt."""
    return _count > 0


def quiet() -> bool:
    """Whether another process says that the command was interrupted."""
    return _quiet


def end(code: int) -> NoReturn:
    """End the process, whose command has ended. Further signals are ignored."""
    _handle(signal.SIG_IGN)
    if code == INTERRUPTED:
        # not sys.exit: Python ends by SIGINT where a KeyboardInterrupt has passed through an `eval` before
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)

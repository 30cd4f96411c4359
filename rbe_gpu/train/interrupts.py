"""Defer signals while a training step changes the state."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextmanager
def held() -> Iterator[None]:
    """Signals that have a handler in Python arrive when the block has ended; only the main thread gets any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        arrived.append(number)

    old: dict[int, Any] = {number: signal.getsignal(number) for number in _SIGNALS}
    old = {number: handler for number, handler in old.items() if callable(handler)}
    for number in old:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    for number in arrived[:1]:
        old[number](number, None)

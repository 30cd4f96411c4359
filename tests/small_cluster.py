"""Workers on this machine for tests: processes with one thread, of which a test may kill some."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rbe_gpu.cluster import LOCAL, connected
from rbe_gpu.threads import get_num_threads, set_num_threads


@contextmanager
def workers(count: int) -> Iterator[Any]:
    """A client of `count` workers; they and this process have one thread."""
    before = get_num_threads()
    set_num_threads(1)
    try:
        with connected(LOCAL, count) as client:
            client.wait_for_workers(count, timeout=60)
            yield client
    finally:
        set_num_threads(before)

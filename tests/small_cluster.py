"""Workers on this machine for tests: processes with one thread, of which a test may kill some."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import distributed

from rbe_gpu.cluster import LOCAL, connected
from rbe_gpu.threads import VARIABLE, get_num_threads, set_num_threads


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


@contextmanager
def worker_of_threads(count: int) -> Iterator[Any]:
    """A client of one worker process that runs `count` tasks at once, as `dask worker` does without --nthreads."""
    options: dict[str, Any] = {"processes": True, "dashboard_address": "127.0.0.1:0", "env": {VARIABLE: "1"}}
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=count, **options) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


def executing(dask_scheduler: Any) -> dict[str, list[str]]:
    """The tasks of each worker by its address, for `Client.run_on_scheduler`."""
    return {address: [str(t) for t in w.processing] for address, w in dask_scheduler.workers.items()}

"""Run functions on the workers of Dask distributed: of this machine, or of a scheduler elsewhere (docs/scale.md)."""

from __future__ import annotations

from .connect import LOCAL, ClusterError, check_address, connected
from .tasks import TaskPool, run_tasks, scratch_folder
from .workers import check_workers

__all__ = [
    "LOCAL",
    "ClusterError",
    "TaskPool",
    "check_address",
    "check_workers",
    "connected",
    "run_tasks",
    "scratch_folder",
]

"""A client of a Dask scheduler: of one that runs already, or of workers that are started on this machine."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import takewhile
from typing import Any

from ..threads import VARIABLE, get_num_threads

#: the address that starts workers on this machine
LOCAL = "local"
_ADDRESS = re.compile(r"(tcp|tls|ucx|ws|wss)://[^\s/]+:[0-9]{1,5}")
#: seconds in which a scheduler has to answer, and its first worker has to be there
TIMEOUT = 20.0
_THREADS = 4  # of a local worker, where the machine has as many
_BLAS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class ClusterError(OSError):
    """A scheduler or its workers cannot be used, or were lost."""


def check_address(address: str) -> None:
    """A ValueError for what is no address of a scheduler and not `LOCAL`."""
    if address != LOCAL and not _ADDRESS.fullmatch(address):
        raise ValueError(
            f"{address!r} is no scheduler; pass {LOCAL}, or an address such as tcp://10.0.0.1:8786"
        )


def distributed() -> Any:
    """The module `distributed`.

    Raises
    ------
    ImportError
        It is not installed; the message says what to install.
    """
    try:
        import distributed
    except ImportError:
        raise ImportError(
            "more than one process needs Dask distributed: pip install 'rbe-gpu[cluster]'"
        ) from None
    return distributed


@contextmanager
def connected(address: str, workers: int | None = None, device: str = "cpu") -> Iterator[Any]:
    """A `distributed.Client`, closed at the end, with the workers that it started.

    Parameters
    ----------
    address : of a scheduler ("tcp://HOST:PORT"), whose workers were started by others; or "local": processes on this
        machine
    workers : how many local ones; None: one for each four threads, or each GPU
    device : "cuda": each local worker has one GPU, as those of dask-cuda do: CUDA_VISIBLE_DEVICES names all, and
        another one first

    Raises
    ------
    ImportError
        Dask distributed is not installed.
    ValueError
        `address` is none; `workers` with a scheduler that has its own.
    ClusterError
        The scheduler does not answer, has no workers, or there is no GPU.
    """
    check_address(address)
    if workers is not None and address != LOCAL:
        raise ValueError(f"the scheduler {address} has its own workers; workers= goes with {LOCAL!r}")
    module = distributed()
    with ExitStack() as stack:
        stack.enter_context(_silent())
        if address == LOCAL:
            count = len(visible_devices()) if device == "cuda" and workers is None else workers
            scheduler: Any = stack.enter_context(_local(count or default_workers(), device))
        else:
            scheduler = address
        try:
            client = module.Client(scheduler, timeout=TIMEOUT, set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ClusterError(f"no scheduler answers at {address}: {reason}") from None
        stack.callback(client.close)
        try:
            client.wait_for_workers(1, timeout=TIMEOUT)
        except TimeoutError:
            raise ClusterError(
                f"the scheduler {address} has no workers; start some: dask worker {address} --nthreads 1"
            ) from None
        yield client


@contextmanager
def _silent() -> Iterator[None]:
    """Without the messages that distributed prints of lost workers: errors reach the caller as exceptions."""
    logger = logging.getLogger("distributed")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


# --- workers of this machine --------------------------------------------------------------------------


def default_workers() -> int:
    """Local workers without GPUs: one for each `_THREADS` threads of this process."""
    return max(1, get_num_threads() // _THREADS)


def worker_environments(count: int, device: str) -> list[dict[str, str]]:
    """The environment variables of local workers, which share the threads of this process evenly.

    Raises
    ------
    ClusterError
        device="cuda", and this machine has no GPU.
    """
    threads = str(max(1, get_num_threads() // count))
    environments = [dict.fromkeys((VARIABLE, *_BLAS), threads) for _ in range(count)]
    if device == "cuda":
        devices = visible_devices()
        if not devices:
            raise ClusterError(
                "no NVIDIA GPU is visible here; use the CPU, or a scheduler of workers with GPUs"
            )
        for i, environment in enumerate(environments):
            first = i % len(devices)
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices[first:] + devices[:first])
    return environments


def visible_devices(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The GPUs that CUDA shows a process: numbers or UUIDs, as CUDA_VISIBLE_DEVICES has them."""
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:  # CUDA ignores what follows a negative number
        names = (name.strip() for name in listed.split(","))
        return list(takewhile(lambda name: name and not name.startswith("-"), names))
    import pynvml

    try:
        pynvml.nvmlInit()
        try:
            return [str(i) for i in range(pynvml.nvmlDeviceGetCount())]
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return []


@contextmanager
def _local(count: int, device: str) -> Iterator[Any]:
    """A scheduler and `count` workers, each a process that runs one task at a time."""
    module = distributed()
    import dask
    from distributed.system import MEMORY_LIMIT

    environments = worker_environments(count, device)
    with ExitStack() as stack:
        stack.enter_context(_environment_kept())
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="rbe-gpu-", ignore_cleanup_errors=True)
        )
        # BLAS reads these when it is loaded, which is before a worker sets `env`
        blas = {name: environments[0][name] for name in _BLAS}
        settings = {"distributed.nanny.pre-spawn-environ": blas, "temporary-directory": folder}
        stack.enter_context(dask.config.set(settings))
        options = {
            "nthreads": 1,
            "memory_limit": MEMORY_LIMIT // count,
            "local_directory": folder,
            "dashboard": False,
            "silence_logs": logging.CRITICAL + 1,
        }
        cluster = module.SpecCluster(
            workers={
                i: {"cls": module.Nanny, "options": {**options, "env": environment}}
                for i, environment in enumerate(environments)
            },
            scheduler={
                "cls": module.Scheduler,
                # of a free port: without one, that of another scheduler would be asked for
                "options": {
                    "host": "127.0.0.1",
                    "port": 0,
                    "dashboard": False,
                    "dashboard_address": "127.0.0.1:0",
                },
            },
            silence_logs=logging.CRITICAL + 1,
        )
        stack.callback(cluster.close)
        yield cluster


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Undo what starting workers changes in the environment variables of this process."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)

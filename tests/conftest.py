"""Which backends a run tests: `pytest --backend cpu,host`, or `--backend cpu` and so on.

- `cpu`: Numba on NumPy arrays
- `host`, `host-reverse`: the CUDA sources and their launchers on NumPy arrays, built by the C++ compiler
  (`tests/host`), with warps and lanes in ascending or descending order. They take part in the ops that have a
  source in `cuda_src`.

A backend that a run asks for and cannot have is an error, never a skip.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from rbe_gpu import dispatch, ops
from rbe_gpu.gpu import _launch

from .host import build
from .host.executor import HostExecutor

CUDA_SRC = Path(__file__).parent.parent / "cuda_src"


@dataclass(frozen=True)
class TestBackend:
    """How the conformance tests reach one backend.

    Attributes
    ----------
    op : the function of an op by its name
    put : a value of a case (array, compressed weight, number) for that backend
    get : its arrays as NumPy arrays
    array_type : what results must be
    ops : the ops that it has, or None for all
    """

    __test__ = False

    name: str
    op: Callable[[str], Callable[..., Any]]
    put: Callable[[Any], Any]
    get: Callable[[Any], np.ndarray]
    array_type: type
    ops: frozenset[str] | None = None


def _cpu() -> TestBackend:
    return TestBackend("cpu", lambda name: getattr(ops, name), lambda a: a, np.asarray, np.ndarray)


def _host(name: str, reverse: bool) -> TestBackend:
    """The functions of `ops`, with the launchers of `rbe_gpu.gpu` in the place of the CPU kernels."""
    build.compiler_version()
    launchers = dispatch.Backend(name, "rbe_gpu.gpu")
    executor = HostExecutor(reverse)

    def op(op_name: str) -> Callable[..., Any]:
        function = getattr(ops, op_name)

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with mock.patch.object(dispatch, "CPU", launchers), _launch.executor(executor):
                return function(*args, **kwargs)

        return call

    sources = frozenset(path.stem for path in CUDA_SRC.glob("*.cu"))
    return TestBackend(name, op, lambda a: a, np.asarray, np.ndarray, sources)


#: Makers of the backends. Each raises where its backend cannot be had.
BACKENDS: dict[str, Callable[[], TestBackend]] = {
    "cpu": _cpu,
    "host": lambda: _host("host", reverse=False),
    "host-reverse": lambda: _host("host-reverse", reverse=True),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        default=",".join(BACKENDS),
        help=f"backends to test, comma-separated (default: {','.join(BACKENDS)})",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make the backends asked for, or end the run."""
    made = {}
    for name in config.getoption("--backend").split(","):
        if name not in BACKENDS:
            raise pytest.UsageError(f"--backend {name} is unknown; use {', '.join(BACKENDS)}")
        try:
            made[name] = BACKENDS[name]()
        except Exception as error:
            raise pytest.UsageError(f"--backend {name} cannot be had here: {error}") from error
    config.stash[_MADE] = made


_MADE = pytest.StashKey[dict[str, TestBackend]]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        made = metafunc.config.stash[_MADE]
        metafunc.parametrize("backend", made.values(), ids=made.keys(), scope="session")


def _exists(item: pytest.Item) -> bool:
    """Whether the item's backend has its op."""
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    backend, op = params.get("backend"), params.get("op")
    return backend is None or op is None or backend.ops is None or op.name in backend.ops


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    missing = [item for item in items if not _exists(item)]
    if missing:
        items[:] = [item for item in items if _exists(item)]
        config.hook.pytest_deselected(items=missing)

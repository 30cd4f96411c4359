"""Which backends a run tests: `pytest --backend cpu` (default), or several, comma-separated.

A backend that a run asks for and cannot have is an error, never a skip.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from rbe_gpu import ops


@dataclass(frozen=True)
class TestBackend:
    """How the conformance tests reach one backend.

    Attributes
    ----------
    op : the function of an op by its name
    put : a value of a case (array, compressed weight, number) for that backend
    get : its arrays as NumPy arrays
    array_type : what results must be
    """

    __test__ = False

    name: str
    op: Callable[[str], Callable[..., Any]]
    put: Callable[[Any], Any]
    get: Callable[[Any], np.ndarray]
    array_type: type


def _cpu() -> TestBackend:
    return TestBackend("cpu", lambda name: getattr(ops, name), lambda a: a, np.asarray, np.ndarray)


#: Makers of the backends. Each raises where its backend cannot be had.
BACKENDS: dict[str, Callable[[], TestBackend]] = {"cpu": _cpu}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        default="cpu",
        help=f"backends to test, comma-separated (default: cpu; known: {', '.join(BACKENDS)})",
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

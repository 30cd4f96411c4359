"""Test backends, selected by `pytest --backend cpu,host`.

- `cpu`: Numba on NumPy arrays
- `host`, `host-reverse`: the CUDA sources and their launchers on NumPy arrays, built by the C++ compiler
  (`tests/host`), with warps and lanes in ascending or descending order. They run the ops that have a source in
  `cuda_src`; `host-reverse` leaves out tests marked `one_order`.
- `cuda`: CuPy arrays on a GPU
- `stand-in`: the code path of CuPy arrays, with a stand-in for CuPy (`tests/host/stand_in.py`) and the host build: as
  much of `cuda` as runs without a GPU

The first three run by default. A requested backend that is not available is an error, never a skip.

`make test` distributes the files over two processes (pytest-xdist): Numba compiles on one core, which takes most of
the time of a first run. All tests of a file run in one process and share its fixtures.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, wraps
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

# One thread for NumPy's BLAS in the tests and their subprocesses; `test_threads` sets its own. On a busy machine
# OpenBLAS's threads spin: a calibration takes 20 s of CPU time instead of 6.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# PyTorch's OpenMP threads sleep while they wait. By default they spin for some milliseconds at the end of each loop,
# and where two processes of pytest share two cores, on the core of the thread that they wait for: a small matmul with
# three elementwise ops takes 40 ms of CPU time instead of 0.2.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu import dispatch, ops, registry
from rbe_gpu.blocks import RBEBlocks
from rbe_gpu.gpu import _execute
from rbe_gpu.gpu._launch import Launch

from .cases import Args
from .host import build, stand_in
from .host.executor import CAPABILITY, HostExecutor

# the built-in costs of matmul, not those that `rbe-gpu tune` measured on this machine
os.environ["RBE_GPU_COSTS"] = os.devnull

CUDA_SRC = Path(__file__).parent.parent / "cuda_src"


@dataclass(frozen=True)
class TestBackend:
    """How the conformance tests reach one backend.

    Attributes
    ----------
    op : the function of an op by its name
    put_all : moves the arguments of a call (arrays, compressed weights, numbers) to the backend
    get : converts its arrays to NumPy arrays
    array_type : type of the results
    ops : the ops that it runs, or None for all
    on_gpu : whether it takes CuPy arrays
    """

    __test__ = False

    name: str
    op: Callable[[str], Callable[..., Any]]
    put_all: Callable[[Args], Args]
    get: Callable[[Any], np.ndarray]
    array_type: type
    ops: frozenset[str] | None = None
    on_gpu: bool = False

    def put(self, value: Any) -> Any:
        """Move one value to the backend."""
        return self.put_all({"value": value})["value"]


def _cpu() -> TestBackend:
    return TestBackend("cpu", lambda name: getattr(ops, name), lambda args: args, np.asarray, np.ndarray)


def _sources() -> frozenset[str]:
    return frozenset(path.stem for path in CUDA_SRC.glob("*.cu"))


def _host(name: str, reverse: bool) -> TestBackend:
    """The functions of `ops`, with the launchers of `rbe_gpu.gpu` instead of the CPU kernels."""
    build.compiler_version()
    launchers = dispatch.Backend(name, "rbe_gpu.gpu")
    executor = HostExecutor(reverse)

    def op(op_name: str) -> Callable[..., Any]:
        function = getattr(ops, op_name)

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with mock.patch.object(dispatch, "CPU", launchers), _execute.executor(executor, CAPABILITY):
                return function(*args, **kwargs)

        return call

    return TestBackend(name, op, lambda args: args, np.asarray, np.ndarray, _sources())


# --- CuPy arrays --------------------------------------------------------------------------------------


def place(cupy: Any, args: Args) -> Args:
    """Copy arguments to the GPU: arrays keep their strides and shared memory, weights stay compressed.

    Arrays are copied as bytes, without kernels of CuPy's, and keep their address modulo 16.
    """
    moved: Args = {}
    spans: list[tuple[int, int, list[str]]] = []  # address ranges, with the arrays in them
    for name, value in args.items():
        if isinstance(value, RBEBlocks):
            moved[name] = rbe.to(value, "cuda")
        elif not isinstance(value, np.ndarray):
            moved[name] = value
        elif not value.size:
            moved[name] = cupy.empty(value.shape, value.dtype)
        else:
            spans.append((*np.lib.array_utils.byte_bounds(value), [name]))
    merged: list[tuple[int, int, list[str]]] = []
    for low, high, names in sorted(spans):
        if merged and low < merged[-1][1]:
            first, end, others = merged.pop()
            merged.append((first, max(end, high), others + names))
        else:
            merged.append((low, high, names))
    for low, high, names in merged:
        start = low - low % 16
        held = np.zeros(high - start, np.uint8)
        held[low - start :] = np.frombuffer(ctypes.string_at(low, high - low), np.uint8)
        memory = cupy.asarray(held)
        for name in names:
            a = args[name]
            at = a.__array_interface__["data"][0] - start
            one = memory[at : at + a.itemsize].view(a.dtype)
            moved[name] = cupy.lib.stride_tricks.as_strided(one, a.shape, a.strides)
    return {name: moved[name] for name in args}


def _cuda() -> TestBackend:
    import cupy

    cupy.cuda.runtime.getDeviceCount()  # raises where there is no GPU
    return TestBackend(
        "cuda",
        lambda name: getattr(ops, name),
        partial(place, cupy),
        cupy.asnumpy,
        cupy.ndarray,
        _sources(),
        on_gpu=True,
    )


def _stand_in() -> TestBackend:
    build.compiler_version()

    def op(op_name: str) -> Callable[..., Any]:
        function = getattr(ops, op_name)

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with stand_in.installed():
                return function(*args, **kwargs)

        return call

    def put_all(args: Args) -> Args:
        with stand_in.installed() as cupy:
            return place(cupy, args)

    return TestBackend(
        "stand-in", op, put_all, stand_in.ndarray.get, stand_in.ndarray, _sources(), on_gpu=True
    )


#: Factories of the backends. Each raises if its backend is not available.
BACKENDS: dict[str, Callable[[], TestBackend]] = {
    "cpu": _cpu,
    "host": lambda: _host("host", reverse=False),
    "host-reverse": lambda: _host("host-reverse", reverse=True),
    "cuda": _cuda,
    "stand-in": _stand_in,
}
DEFAULT = ("cpu", "host", "host-reverse")

#: The slowest test files, slowest first: with several processes they start before the others.
LONG = (
    *("nvrtc", "conformance", "host_build", "bert", "reports", "calibrate_model", "threads"),
    *("launch_attention", "attention", "quality", "layers", "assembly", "graph", "reader"),
    *("gpu_check", "gpu_first_run", "cupy_arrays", "calibration_memory", "kernel_constants", "distill"),
    *("eval", "mutants", "simd", "linear_transform", "bert_gpu"),
    # they disassemble what nvrtc has compiled by then
    *("machine_code_rows", "machine_code_attention", "machine_code_linear", "machine_code_integers"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        default=",".join(DEFAULT),
        help=f"backends to test, comma-separated, of {', '.join(BACKENDS)} (default: {','.join(DEFAULT)})",
    )

    parser.addoption(
        "--launches",
        metavar="SOURCE",
        help="every test must launch kernels of it, attention_wgmma for instance",
    )
    parser.addoption(
        "--op", help="ops to test, comma-separated (default: all); excludes tests that are not of an op"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Create the requested backends, or end the run."""
    config.addinivalue_line("markers", "gpu: for backends that take CuPy arrays, cuda and stand-in")
    config.addinivalue_line("markers", "device: for a GPU itself, the backend cuda")
    made = {}
    for name in config.getoption("--backend").split(","):
        if name not in BACKENDS:
            raise pytest.UsageError(f"--backend {name} is unknown; use {', '.join(BACKENDS)}")
        try:
            made[name] = BACKENDS[name]()
        except Exception as error:
            raise pytest.UsageError(f"--backend {name} is not available: {error}") from error
    config.stash[_MADE] = made


_MADE = pytest.StashKey[dict[str, TestBackend]]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        made = metafunc.config.stash[_MADE]
        if "host" in made and metafunc.definition.get_closest_marker("one_order"):
            made = {name: backend for name, backend in made.items() if name != "host-reverse"}
        metafunc.parametrize("backend", made.values(), ids=made.keys(), scope="session")


def _wanted(item: pytest.Item, selected_ops: frozenset[str] | None) -> bool:
    """Whether the item's op is selected, and its backend has the op and can run the error case."""
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    backend, op, invalid = (params.get(name) for name in ("backend", "op", "invalid"))
    if item.get_closest_marker("gpu") and (backend is None or not backend.on_gpu):
        return False
    if item.get_closest_marker("device") and (backend is None or backend.name != "cuda"):
        return False
    if selected_ops is not None and (backend is None or op is None or op.name not in selected_ops):
        return False
    if backend is None or op is None:
        return True
    if invalid is not None and invalid.not_on_gpu and backend.on_gpu:
        return False
    return backend.ops is None or op.name in backend.ops


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """With `--launches SOURCE`, a test of an op that launched no kernel of that source fails."""
    source = item.config.getoption("--launches")
    if source is None:
        return (yield)
    assert isinstance(item, pytest.Function)
    launcher = import_module(f"rbe_gpu.gpu.{item.callspec.params['op'].name}")  # type: ignore[attr-defined]
    launched: set[str] = set()

    def note(*launches: Launch) -> None:
        launched.update(launch.op for launch in launches)
        _execute.run(*launches)

    with mock.patch.object(launcher, "run", note):
        result = yield
    if source not in launched:
        pytest.fail(f"launched {', '.join(sorted(launched)) or 'nothing'}, and not {source}")
    return result


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.getoption("--op")
    names = None if asked is None else frozenset(asked.split(","))
    if names is not None and not names <= set(registry.OPS):
        raise pytest.UsageError(f"--op {asked} is unknown; use {', '.join(registry.OPS)}")
    wanted = [item for item in items if _wanted(item, names)]
    if len(wanted) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if not _wanted(item, names)])
        items[:] = wanted
    if hasattr(config, "workerinput"):  # a process of pytest-xdist
        rank = {f"test_{name}": i for i, name in enumerate(LONG)}
        items.sort(key=lambda item: rank.get(item.path.stem, len(LONG)))

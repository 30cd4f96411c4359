"""Everything that this package uses of Numba's private parts. Tested on Numba 0.68.1 with llvmlite 0.50.0.

A new minor version of Numba may change any of these, so pyproject.toml has an upper bound: raise it, and the line
above, when the tests pass on the new version (`tests/test_threads.py`, `test_parts.py` and `test_simd.py` cover this
file).

    what                                  why
    renamed, unshared                     the disk cache knows one source file per kernel, and numbers its files
    link_loops                            the parallel loops of our kernels go through the gate of `_pool`
    start_threads, renew_locks, ...       the threading layer, and its locks in a forked process
    target_context                        what `isa` selects
    compiler_lock                         one Python thread compiles at a time
    cgutils, populate_array               code generation: what Numba's own intrinsics are written with
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import llvmlite.binding as llvm
import numba
import numba.np.ufunc.parallel as layers
from numba.core import cgutils, registry
from numba.core.compiler_lock import global_compiler_lock as compiler_lock
from numba.np.arrayobj import populate_array

__all__ = ["cgutils", "compiler_lock", "populate_array"]


def target_context() -> Any:
    """The context that Numba compiles for the CPU with."""
    return registry.cpu_target.target_context


# --- the disk cache -------------------------------------------------------------------------------------


@contextmanager
def renamed(function: Callable[..., Any], name: str) -> Iterator[None]:
    """Another `__qualname__` for a while: Numba names a function's files after it, when it is decorated."""
    plain_name = function.__qualname__
    function.__qualname__ = name
    try:
        yield
    finally:
        function.__qualname__ = plain_name


def unshared(dispatcher: Any) -> Any:
    """Let no two compilations of a function write one file of the disk cache; returns the dispatcher.

    Numba numbers the files of a function's compiled forms 1, 2, ... Two processes that fill the cache at once take
    the same number for different forms, and a third that loads one then calls the other.
    """
    file = dispatcher._cache._cache_file
    file._data_name = lambda number: f"{file._index_name}.{uuid.uuid4().hex[:16]}.nbc"
    return dispatcher


# --- the threading layer --------------------------------------------------------------------------------

_SYMBOL = "numba_parallel_for"
_MODULES = {"omp": "omppool", "tbb": "tbbpool", "workqueue": "workqueue"}

#: Numba's number of threads in this process.
NUM_THREADS: int = layers.NUM_THREADS


def threads_started() -> bool:
    """Whether Numba's threads have been started in this process, or in the one it was forked from."""
    return bool(layers._is_initialized)


def start_threads() -> Any:
    """Start Numba's threads; the module of the threading layer, with the addresses `parallel_for` and
    `set_num_threads`."""
    layers._launch_threads()
    return import_module(f"numba.np.ufunc.{_MODULES[numba.threading_layer()]}")


def num_threads() -> int:
    """`numba.get_num_threads()`, without the locks that it takes."""
    return int(layers._get_num_threads())


def renew_locks() -> None:
    """In a forked child: another thread of the parent may have held Numba's locks."""
    layers._backend_init_thread_lock = threading.RLock()
    layers._backend_init_process_lock = None  # made anew where it is needed


_linked: int | None = None  # what the symbol names now


@contextmanager
def _linking(address: int, layer: Any) -> Iterator[None]:
    """The symbol names `address` while code is linked; under Numba's lock, so that no other code is."""
    global _linked
    with compiler_lock:
        before = layer.parallel_for if _linked is None else _linked
        _linked = address
        llvm.add_symbol(_SYMBOL, _linked)
        try:
            yield
        finally:
            _linked = before
            llvm.add_symbol(_SYMBOL, _linked)


def link_loops(dispatcher: Any, address: int, layer: Any) -> Any:
    """Let the `prange` loops of a dispatcher call the function at `address` instead of `layer.parallel_for`.

    Numba's compiled code finds the layer by a symbol, which names `address` only while the dispatcher compiles or
    loads from the cache: other Numba code of the process stays as it is. Returns the dispatcher.
    """
    compile_for: Callable[..., Any] = dispatcher.compile

    def compile_linked(signature: Any) -> Any:
        with _linking(address, layer):
            return compile_for(signature)

    dispatcher.compile = compile_linked
    return dispatcher

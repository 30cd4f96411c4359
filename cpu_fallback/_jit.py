"""How every CPU kernel is compiled: one place for Numba's flags and for its on-disk cache.

Fast-math is limited to the flags in `FASTMATH`. `nnan` and `ninf` are left out on purpose: with them LLVM may
assume that NaN and Inf never occur, and a masked softmax (scores of -inf) or a poisoned activation then gives
finite nonsense instead of what the reference gives.

The cache. Numba keeps compiled kernels on disk and compiles a kernel anew when its *own* source file changes,
but kernels inline code from `simd.py`, and their flags come from this file. Numba names the cache files of a
function after its `__qualname__`, so `cpu_kernel` adds a digest of the shared files to that name while Numba
sets up the cache: an edit of a shared file changes the name and no stale code is found. The superseded files
(`*.nbi`, `*.nbc` in `__pycache__` or `NUMBA_CACHE_DIR`) are never read again and may be deleted at any time.

Numba numbers the files of a function's compiled forms 1, 2, ... Two processes that fill the cache at once take the
same number for different forms, and a third that loads one then calls the other. So each form gets a name that
no process gives twice (`unshared`); of two indices written at once one is lost, which costs a compilation.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numba

from ._pool import gated

FASTMATH = frozenset({"nsz", "arcp", "contract", "afn", "reassoc"})

#: Files whose code ends up inside kernels of other files. A kernel that inlines code from another op's file
#: needs that file listed here.
SHARED_FILES = (
    "_jit.py",
    "isa.py",
    "_parts.py",
    "simd.py",
    "unpack.py",
    "product.py",
    "codes.py",
    "fixed_point.py",
    "operand.py",
    "fast_transform.py",
)


def shared_digest(folder: Path | None = None) -> str:
    """Digest of the shared files' contents, 12 hexadecimal digits.

    Parameters
    ----------
    folder : Path, optional
        Where the files lie; default: the folder of this file.
    """
    folder = Path(__file__).parent if folder is None else folder
    digest = hashlib.sha256()
    for name in SHARED_FILES:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:12]


_DIGEST = shared_digest()


@contextmanager
def named_for_the_cache(function: Callable[..., Any], form: str = "") -> Iterator[None]:
    """Name a function for the disk cache: its own name, the digest of the shared files, and which `form` of it."""
    plain_name = function.__qualname__
    function.__qualname__ = f"{plain_name}{form}.{_DIGEST}"
    try:
        yield
    finally:
        function.__qualname__ = plain_name


def unshared(compiled: Any) -> Any:
    """Let no two compilations of a function write one file of the disk cache; gives the function back."""
    file = compiled._cache._cache_file
    file._data_name = lambda number: f"{file._index_name}.{uuid.uuid4().hex[:16]}.nbc"
    return compiled


def cpu_kernel(
    function: Callable[..., Any] | None = None, *, parallel: bool = False, exact: bool = False
) -> Callable[..., Any]:
    """Compile a function that Python calls: cached on disk, without the interpreter lock.

    Parameters
    ----------
    function : callable
        The kernel, so that both `@cpu_kernel` and `@cpu_kernel(parallel=True)` work.
    parallel : bool
        Make `numba.prange` loops parallel, on the threads that `_pool` allows.
    exact : bool
        No fast-math at all: every rounding as written.

    Notes
    -----
    Division by zero gives Inf or NaN (`error_model="numpy"`), never an exception. A vector of `simd` cannot
    cross into a `prange` body: keep vector code in a `@cpu_inline` function that the body calls.
    """

    def compile_kernel(kernel: Callable[..., Any]) -> Callable[..., Any]:
        with named_for_the_cache(kernel):
            compiled = numba.njit(
                cache=True,
                nogil=True,
                error_model="numpy",
                parallel=parallel,
                fastmath=False if exact else set(FASTMATH),
            )(kernel)
            return gated(unshared(compiled)) if parallel else unshared(compiled)

    return compile_kernel if function is None else compile_kernel(function)


def cpu_inline(function: Callable[..., Any] | None = None, *, exact: bool = False) -> Callable[..., Any]:
    """Compile a function that kernels call; LLVM always inlines it into them.

    Parameters
    ----------
    function : callable
        The function, so that both `@cpu_inline` and `@cpu_inline(exact=True)` work.
    exact : bool
        No fast-math in the function's own arithmetic.
    """

    def compile_inline(inner: Callable[..., Any]) -> Callable[..., Any]:
        return numba.njit(
            nogil=True,
            error_model="numpy",
            fastmath=False if exact else set(FASTMATH),
            forceinline=True,
        )(inner)

    return compile_inline if function is None else compile_inline(function)

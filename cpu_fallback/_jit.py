"""How every CPU kernel is compiled: one place for Numba's flags and for its on-disk cache.

Fast-math is limited to the flags in `FASTMATH`. `nnan` and `ninf` are left out on purpose: with them LLVM may
assume that NaN and Inf never occur, and a masked softmax (scores of -inf) or a poisoned activation then gives
finite nonsense instead of what the reference gives.

The cache. Numba keeps compiled kernels on disk and compiles a kernel anew when its *own* source file changes,
but kernels inline code from other files, and their flags come from this one. So `cpu_kernel` adds a digest of every
file that the kernel's file imports, itself or through others, to the name that Numba gives the files of its cache: an
edit of any of them changes the name and no stale code is found, while the kernels of other ops stay cached. The
superseded files (`*.nbi`, `*.nbc` in `__pycache__` or `NUMBA_CACHE_DIR`) are never read again and may be deleted at
any time. Constants from outside this folder (`rbe_gpu.packing.RUN`, which the file format fixes) are not covered.

Two processes may fill the cache at once: every compiled form has a file of its own (`unshared`); of two indices
written at once one is lost, which costs a compilation.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import numba

from ._numba_internals import renamed, unshared
from ._pool import gated

FASTMATH = frozenset({"nsz", "arcp", "contract", "afn", "reassoc"})

_FOLDER = Path(__file__).parent
_PACKAGE = _FOLDER.name


@cache
def imports(file: Path) -> frozenset[Path]:
    """The files of this folder that a Python file imports at its head, where all imports are (ruff's E402)."""
    source = file.read_text(encoding="utf-8")
    try:  # the head alone is ten times as quick
        tree = ast.parse(re.split(r"^(?:@|def |class )", source, maxsplit=1, flags=re.MULTILINE)[0])
    except SyntaxError:
        tree = ast.parse(source)
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(a.name.rpartition(".")[2] for a in node.names if _PACKAGE in a.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")
            if node.level == 1 or _PACKAGE in module:
                names.update([module[-1], *(a.name for a in node.names)])
    return frozenset(f for f in (_FOLDER / f"{name}.py" for name in names) if f.is_file())


@cache
def sources(file: Path) -> tuple[Path, ...]:
    """A Python file and every file of this folder that it imports, itself or through others; sorted.

    All of this folder for code that is in no file.
    """
    if not file.is_file():
        return tuple(sorted(_FOLDER.glob("*.py")))
    reached, pending = {file}, [file]
    while pending:
        new = imports(pending.pop()) - reached
        reached |= new
        pending += new
    return tuple(sorted(reached))


@cache
def source_digest(file: Path) -> str:
    """Digest of what `sources` lists, 12 hexadecimal digits."""
    digest = hashlib.sha256()
    for source in sources(file):
        digest.update(source.read_bytes() if source.is_file() else b"")
    return digest.hexdigest()[:12]


def named_for_the_cache(function: Callable[..., Any], form: str = "") -> AbstractContextManager[None]:
    """Name a function for the disk cache: its own name, which `form` of it, and the digest of its sources."""
    digest = source_digest(Path(function.__code__.co_filename))
    return renamed(function, f"{function.__qualname__}{form}.{digest}")


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

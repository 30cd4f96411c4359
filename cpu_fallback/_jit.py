"""How every CPU kernel is compiled: one place for Numba's flags.

Fast-math is limited to the flags in `FASTMATH`. `nnan` and `ninf` are left out on purpose: with them LLVM may
assume that NaN and Inf never occur, and a masked softmax (scores of -inf) or a poisoned activation then gives
finite nonsense instead of what the reference gives.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

from ._disk_cache import named_for_the_cache
from ._numba_internals import InlineDispatcher

FASTMATH = frozenset({"nsz", "arcp", "contract", "afn", "reassoc"})


def cpu_kernel(
    function: Callable[..., Any] | None = None, *, exact: bool = False, home: Path | None = None
) -> Callable[..., Any]:
    """Compile a function that Python calls: cached on disk, without the interpreter lock.

    Parameters
    ----------
    function : callable
        The kernel, so that both `@cpu_kernel` and `@cpu_kernel(exact=True)` work.
    exact : bool
        No fast-math at all: every rounding as written.
    home : Path
        The file whose edits make a new kernel; None: the function's own.

    Notes
    -----
    Division by zero gives Inf or NaN (`error_model="numpy"`), never an exception.
    """

    def compile_kernel(kernel: Callable[..., Any]) -> Callable[..., Any]:
        with named_for_the_cache(kernel, home=home):
            return numba.njit(
                cache=True, nogil=True, error_model="numpy", fastmath=False if exact else set(FASTMATH)
            )(kernel)

    return compile_kernel if function is None else compile_kernel(function)


def cpu_inline(
    function: Callable[..., Any] | None = None, *, exact: bool = False, inline: bool = True
) -> Callable[..., Any]:
    """Compile a function that kernels call, and Python cannot: it has no machine code but theirs.

    Parameters
    ----------
    function : callable
        The function, so that both `@cpu_inline` and `@cpu_inline(exact=True)` work.
    exact : bool
        No fast-math in the function's own arithmetic.
    inline : bool
        LLVM always inlines it; otherwise never.
    """

    def compile_inline(inner: Callable[..., Any]) -> Callable[..., Any]:
        return InlineDispatcher(
            inner,
            nogil=True,
            error_model="numpy",
            fastmath=False if exact else set(FASTMATH),
            forceinline=inline,
        )

    return compile_inline if function is None else compile_inline(function)

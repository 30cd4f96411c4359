"""The names of compiled kernels in Numba's on-disk cache.

Numba keeps compiled kernels on disk and compiles a kernel anew when its *own* source file changes, but kernels inline
code from other files, and their flags come from `_jit`. So `named_for_the_cache` adds a digest of every file that the
kernel's file imports, itself or through others, to the name that Numba gives the files of its cache: an edit of any
of them changes the name and no stale code is found, while the kernels of other ops stay cached. The superseded files
(`*.nbi`, `*.nbc` in `__pycache__` or `NUMBA_CACHE_DIR`) are never read again and may be deleted at any time.
Constants from outside this folder (`rbe_gpu.packing.RUN`, which the file format fixes) are not covered.

Where neither NUMBA_CACHE_DIR, nor this folder, nor a cache folder of the user can be written, kernels are kept in a
temporary folder that is the user's alone. A cache that cannot be read or written at all, or that is damaged, costs
compilations; a warning of one line says so, once per process (`_numba_internals._KernelCache`).

A wheel for one platform brings kernels that `build_kernels.py` compiled (`_numba_internals.PRECOMPILED`), under the
same names: they are read where the cache has none, if they are of the installed version of Numba and for an
instruction set that `isa.precompiled_targets` names.

Two processes may fill the cache at once: every compiled form has a file of its own (`kept_as`); of two indices
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

from ._numba_internals import kept_as
from .isa import precompiled_targets

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


def named_for_the_cache(
    function: Callable[..., Any], form: str = "", home: Path | None = None
) -> AbstractContextManager[None]:
    """Name a function for the disk cache: its own name, which `form` of it, and the digest of its sources.

    home : the file that the sources are those of; None: the function's own
    """
    digest = source_digest(home or Path(function.__code__.co_filename))
    return kept_as(function, f"{function.__qualname__}{form}.{digest}", precompiled_targets)

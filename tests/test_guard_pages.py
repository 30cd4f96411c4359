"""No CPU kernel reads or writes past an array: `tests.guard_pages`, in a process that SIGSEGV would end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from . import guard_pages


@pytest.mark.skipif(sys.platform == "win32", reason="mprotect is of POSIX systems")
def test_every_kernel_stays_inside_its_arrays() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.guard_pages"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    calls, _, arrays, _ = done.stdout.split()
    assert int(calls) > 1000
    assert int(arrays) > 3 * int(calls)


@pytest.mark.parametrize("access", ["a[len(a)]", "a.__setitem__(len(a), 1)"])
def test_an_access_behind_an_array_ends_the_process(access: str) -> None:
    """By a pointer, which knows no length, as kernels have."""
    code = (
        "from tests.guard_pages import Pages; import ctypes, numpy as np\n"
        "array = Pages().empty((100,), np.uint8)\n"
        "class A:\n"
        "    p = ctypes.cast(array.ctypes.data, ctypes.POINTER(ctypes.c_ubyte))\n"
        "    __len__ = lambda self: 100\n"
        "    __getitem__ = lambda self, i: self.p[i]\n"
        "    __setitem__ = lambda self, i, v: self.p.__setitem__(i, v)\n"
        f"a = A(); a[99]; print('here', flush=True); {access}; print('survived')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode < 0
    assert done.stdout == "here\n"


def test_a_write_in_front_of_an_array_is_found() -> None:
    pages = guard_pages.Pages()
    array = pages.empty((10,), np.float32)
    pages.check()
    memory, start, size = pages._kept[0]
    np.frombuffer(memory, np.uint8, size)[start - 3] = 0
    with pytest.raises(AssertionError, match=r"\[-3\] were written"):
        pages.check()
    del array

"""Whether this process was forked from one that had imported the package, before or after it used a kernel.

Numba's threads are gone in a forked process. The package notes a fork from its import on, which loads nothing else.
"""

from __future__ import annotations

import os

happened = False


def _in_child() -> None:
    global happened
    happened = True


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_in_child)

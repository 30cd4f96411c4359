"""An environment in which only some of the installed packages can be imported, for processes that tests start.

It stands for a machine that has these packages and no others: a file sitecustomize.py refuses to import the rest from
site-packages, in every Python process below. Packages that lie elsewhere, unpacked from a wheel, are imported.
"""

from __future__ import annotations

import os
import re
from importlib import metadata
from pathlib import Path

_REFUSE = """
import sys
from importlib.machinery import PathFinder

class Refused:
    names = frozenset({names!r})

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if path is not None or name not in cls.names:
            return None
        elsewhere = PathFinder.find_spec(name, [p for p in sys.path if "site-packages" not in p])
        if elsewhere is None:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        return elsewhere

sys.meta_path.insert(0, Refused)
"""


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def with_requirements(roots: tuple[str, ...]) -> set[str]:
    """The installed ones of these distributions, and all that they require."""
    names: set[str] = set()
    waiting = list(roots)
    while waiting:
        name = _normal(waiting.pop())
        if name in names:
            continue
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        names.add(name)
        waiting += [re.split(r"[^\w.-]", r, maxsplit=1)[0] for r in required if "extra ==" not in r]
    return names


def refused(roots: tuple[str, ...]) -> set[str]:
    """Top-level modules that belong to no distribution of `with_requirements`."""
    allowed = with_requirements(roots)
    return {
        module
        for module, names in metadata.packages_distributions().items()
        if not any(_normal(name) in allowed for name in names)
    }


def environment(folder: Path, roots: tuple[str, ...]) -> dict[str, str]:
    """Variables of a process that can import these distributions and their requirements alone.

    folder : receives sitecustomize.py
    """
    (folder / "sitecustomize.py").write_text(_REFUSE.format(names=sorted(refused(roots))), encoding="utf-8")
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path}

"""Packages that a machine lacks, out of the wheels in the folder that was carried there.

Imports nothing but the standard library: it runs before the rest of this package can be imported.
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

FOLDER = "wheels"


def modules(wheel: Path) -> set[str]:
    """The top-level modules and packages in a wheel."""
    with ZipFile(wheel) as held:
        first = {name.split("/")[0] for name in held.namelist()}
    return {name.removesuffix(".py") for name in first if not name.endswith((".dist-info", ".data", ".libs"))}


def importable(module: str) -> bool:
    """Whether a top-level module is to be found."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def provide(folder: Path, site: Path) -> list[str]:
    """Unpack the wheels in `folder` of which a module is not to be found.

    This process and those that it starts can then import them. In the latter they come before what is installed.

    Parameters
    ----------
    site : a folder to unpack to

    Returns
    -------
    The names of the wheels that were needed.
    """
    needed = [w for w in sorted(folder.glob("*.whl")) if not all(importable(m) for m in modules(w))]
    if needed:
        site.mkdir(parents=True, exist_ok=True)
        for wheel in needed:
            with ZipFile(wheel) as held:
                held.extractall(site)
        inherited = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (inherited, str(site.resolve()))))
        sys.path.append(str(site.resolve()))
        importlib.invalidate_caches()
    return [wheel.name.split("-")[0] for wheel in needed]

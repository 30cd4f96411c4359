"""The checkout around this package: the stages that run tests need it."""

from __future__ import annotations

from pathlib import Path


def root() -> Path:
    """The folder that holds `tests`.

    Raises
    ------
    FileNotFoundError
        This package is installed without its tests.
    """
    for folder in Path(__file__).resolve().parents:
        if (folder / "tests" / "test_conformance.py").is_file():
            return folder
    raise FileNotFoundError("the tests are not here; run this in a checkout of rbe-gpu, with PYTHONPATH=.")

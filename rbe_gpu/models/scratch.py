"""What a calibration reads again and memory need not hold, in files: geometries, predictions, decoded weights.

The geometry of a layer's input with n features takes about 2 n^2 bytes. Those of a model together are half as large
as its float32 weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..feedback import Geometry


class Scratch:
    """Arrays of one run in files, in a folder of their own that is removed with this object.

    Parameters
    ----------
    parent : the folder that it is in; None: the system's folder for temporary files (TMPDIR)
    """

    def __init__(self, parent: Path | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="scratch-", dir=parent, ignore_cleanup_errors=True)
        self._count = 0
        self._latest: tuple[Path, Geometry] | None = None

    def _stored(self, *arrays: NDArray[Any]) -> Path:
        """A new file of arrays, one behind the other."""
        self._count += 1
        path = Path(self._folder.name) / f"{self._count}.npy"
        with open(path, "wb") as file:
            for a in arrays:
                np.save(file, a, allow_pickle=False)
        return path

    def array(self, a: NDArray[Any]) -> Callable[[], NDArray[Any]]:
        """Store an array; the function reads it."""
        return partial(self._read, self._stored(a))

    def _read(self, path: Path) -> NDArray[Any]:  # a method, so that who has it keeps the folder
        return np.asarray(np.load(path, allow_pickle=False))

    def mapped(self, a: NDArray[Any]) -> NDArray[Any]:
        """Store an array, and map it: the system reads what is used, and may drop it again.

        The array remains valid without this object: the file is removed when it is no longer mapped.
        """
        # copy-on-write, as `MappedFile`: kernels compile once for loaded and for new arrays
        return np.asarray(np.load(self._stored(a), mmap_mode="c", allow_pickle=False))

    def geometry(self, geo: Geometry) -> Callable[[], Geometry]:
        """Store a geometry; the function reads it. The latest one stays in memory: weights share one."""
        targets = () if geo.target is None else (geo.target,)
        path = self._stored(geo.order, geo.step, *geo.panels, *targets)
        transform, block, panels = geo.transform, geo.block, len(geo.panels)

        def read() -> Geometry:
            if self._latest is None or self._latest[0] != path:
                self._latest = None
                with open(path, "rb") as file:
                    order, step, *others = (
                        np.load(file, allow_pickle=False) for _ in range(2 + panels + len(targets))
                    )
                target = others[panels] if targets else None
                made = Geometry(transform, block, order, tuple(others[:panels]), step, target)
                self._latest = path, made
            return self._latest[1]

        return read

"""Relative error of compressed weights, all of them together."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rbe_gpu.blocks import RBEBlocks
from rbe_gpu.container import load_file

from .baselines import F32, Folder


class WeightError(NamedTuple):
    """||W - W'|| / ||W|| over all weights (Frobenius), their bits each, and the bytes of all."""

    bytes: float
    bits_per_weight: float
    weight_error: float


def weight_error(pairs: Iterable[tuple[RBEBlocks, F32]]) -> WeightError:
    """The error of compressed weights against the dense ones."""
    lost = energy = 0.0
    stored, count = 0, 0
    for packed, dense in pairs:
        norm = float(np.linalg.norm(dense.astype(np.float64)))
        lost += (packed.error_report(dense).relative_error * norm) ** 2
        energy += norm**2
        stored += packed.nbytes
        count += dense.size
    return WeightError(float(stored), 8 * stored / count, float(np.sqrt(lost / energy)))


def file_weight_error(file: Path, folder: Folder) -> WeightError:
    """The error of all compressed tensors of a file."""
    tensors, _ = load_file(file)
    return weight_error((t, folder.tensor(name)) for name, t in tensors.items() if isinstance(t, RBEBlocks))

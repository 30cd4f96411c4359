"""Arrays, weights and workspaces of any size over a few bytes: for plans, which never look into them."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from rbe_gpu.blocks import RBEMatrix, RBEVectors
from rbe_gpu.codecs import DenseCodes, GridCodes, SparseCodes
from rbe_gpu.gpu._launch import Launch
from rbe_gpu.workspace import ConstantCache


def virtual(
    shape: tuple[int, ...], dtype: Any = np.float32, offset: int = 0, strides: tuple[int, ...] | None = None
) -> np.ndarray:
    """An array of any size and strides (in elements) over one element's memory, `offset` elements past 16 bytes."""
    dtype = np.dtype(dtype)
    if strides is None:
        strides = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    memory = np.zeros(64, np.uint8)
    start = -memory.ctypes.data % 16 + offset * dtype.itemsize
    one = memory[start : start + dtype.itemsize].view(dtype)
    return np.lib.stride_tricks.as_strided(one, shape, tuple(s * dtype.itemsize for s in strides))


class VirtualWorkspace:
    """Buffers of any size."""

    def __init__(self) -> None:
        self.owners: dict[str, object] = {}
        self.constants = ConstantCache("cpu")

    def get(self, name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
        return virtual(shape, dtype)

    def zeros(self, name: str, count: int) -> np.ndarray:
        return virtual((count,), np.uint32)


def dense_codes(rows: int, cols: int, bits: int = 4, group: int = 64) -> DenseCodes:
    value, scale = virtual((rows, cols * bits // 8), np.uint8), virtual((rows, cols // group), np.float16)
    return DenseCodes(bits, group, value, scale)


def grid_codes(rows: int, cols: int, bits: int) -> GridCodes:
    value = virtual((rows, cols * bits // 8), np.uint8)
    return GridCodes(bits, 0.0, value, virtual((rows,), np.float16), virtual((cols,), np.float16))


def sparse_codes(rows: int, cols: int, values: str, index: str) -> SparseCodes:
    """Codes of 8 entries a row; of all of them with a full index."""
    index_bytes = {"full": (0,), "bitmap": (rows, cols // 8), "delta": (8 * rows,)}[index]
    entries = rows * cols if index == "full" else 8 * rows
    return SparseCodes(
        values, index, 64, virtual((entries,), np.uint8), virtual((rows,), np.float16),
        virtual(index_bytes or (1,), np.uint8), virtual((rows,), np.uint16), 0.0, virtual((rows + 1,), np.int64),
    )  # fmt: skip


def delta_codes(rows: int) -> SparseCodes:
    entries = virtual((8 * rows,), np.uint8)
    starts = virtual((rows + 1,), np.int64)
    count = virtual((rows,), np.uint16)
    return SparseCodes(
        "int8", "delta", 64, entries, virtual((rows,), np.float16), entries, count, 0.0, starts
    )


def matrix(rows: int, cols: int, sparse: bool = False, **given: Any) -> RBEMatrix:
    codes = delta_codes(rows) if sparse else dense_codes(rows, cols)
    settings = {"block": 64, "transform": "dct", "gain": 1.0, "basis": None, "codes": codes} | given
    return RBEMatrix((rows, cols), **settings)


def vectors(rows: int, cols: int, sparse: bool = False) -> RBEVectors:
    codes = delta_codes(rows) if sparse else dense_codes(rows, cols)
    return RBEVectors((rows, cols), 64, "dct", 1.0, None, codes)


def entries(launches: tuple[Launch, ...]) -> list[str]:
    return [launch.entry for launch in launches]


def sizes(launch: Launch) -> list[int]:
    """The 64-bit parameters."""
    return [int(v) for v in launch.params.values if isinstance(v, np.int64)]

"""Launch: which kernel, over which grid, with which parameters.

An op's `launches(...)` makes them from shapes, strides, dtypes and addresses alone, so that it can be read and tested
without a GPU. `_execute.run` runs them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from ..kernel_struct import Params, address

MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_BLOCK = (1024, 1024, 64)
MAX_THREADS = 1024
WARP = 32

_F32, _F16, _BF16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
#: Kernel names and type codes (TYPE_... of types.cuh) by dtype. `dtype.name` would take longer than the launch.
SUFFIX = {_F32: "f32", _F16: "f16", _BF16: "bf16"}
TYPE = {_F32: 0, _F16: 1, _BF16: 2}


@dataclass(frozen=True, slots=True)
class Kernel:
    """What is compiled as one module: a kernel of a source, for some configuration.

    Attributes
    ----------
    op : name of the source, `cuda_src/<op>.cu`
    entry : name of the kernel in it
    constants : values of the `CONSTANT` fields of its parameters by name, ("Codes.bits", 4)
    """

    op: str
    entry: str
    constants: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch.

    Attributes
    ----------
    op : name of the source, `cuda_src/<op>.cu`
    entry : name of the `extern "C"` kernel in it
    grid, block : x, y, z
    params : the kernel's parameters by name, and the constants that it is compiled for
    shared : bytes of dynamic shared memory
    """

    op: str
    entry: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    params: Params
    shared: int = 0

    def __post_init__(self) -> None:
        (x, y, z), (block_x, block_y, block_z) = self.grid, self.block
        if not (0 < x <= MAX_GRID[0] and 0 < y <= MAX_GRID[1] and 0 < z <= MAX_GRID[2]):
            raise ValueError(f"{self.entry}: grid={self.grid} is outside 1 to {MAX_GRID}")
        if not (0 < block_x <= MAX_BLOCK[0] and 0 < block_y <= MAX_BLOCK[1] and 0 < block_z <= MAX_BLOCK[2]):
            raise ValueError(f"{self.entry}: block={self.block} is outside 1 to {MAX_BLOCK}")
        if block_x * block_y * block_z > MAX_THREADS:
            raise ValueError(f"{self.entry}: block={self.block} has more than {MAX_THREADS} threads")

    @property
    def kernel(self) -> Kernel:
        """What is compiled for this launch."""
        names = self.params.struct.constants
        return Kernel(self.op, self.entry, tuple(zip(names, self.params.constants, strict=True)))


def type_of(vector: Any) -> int:
    """The type code of an array; an arbitrary one for None."""
    return TYPE[_F32] if vector is None else TYPE[vector.dtype]


def aligned(*arrays: Any, to: int = 16) -> bool:
    """Whether every array that is not None starts at a multiple of `to` bytes."""
    return all(a is None or address(a) % to == 0 for a in arrays)


def in_chunks(x: Any, arrays: tuple[Any, ...], vectors: tuple[Any, ...] = ()) -> bool:
    """Whether a kernel may take 16 bytes of `x` at once.

    That is, all arrays start at a multiple of 16 bytes, and the vectors along the columns (gains, biases) are
    float32 or of the dtype of `x`; the kernels that take elements one by one know every mixture.
    """
    return aligned(x, *arrays, *vectors) and all(
        v is None or v.dtype == x.dtype or v.dtype == _F32 for v in vectors
    )


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def grid_1d(blocks: int) -> tuple[int, int, int]:
    """`blocks` blocks, or as many as a grid can have; kernels go on in strides of the grid."""
    return (min(blocks, MAX_GRID[0]), 1, 1)

"""A compressed tensor of a file: its description and arrays to `RBEBlocks` and back.

Both are untrusted input. Every rule of `FORMAT.md` for one tensor is checked here and in each codec's `from_file`,
in Python integers, before an array leaves; the reader and the writer of `container.py` use the same checks.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import frexp
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import transforms
from .blocks import RBEBlocks, RBEMatrix, RBEVectors
from .codecs import CODECS
from .codecs.base import LoadCost
from .json_checks import Fail, json_choice, json_fields, json_integer, json_number, quoted
from .mapped import DTYPE_NAMES

_KINDS: dict[str, tuple[type[RBEBlocks], int]] = {"matrix": (RBEMatrix, 8), "vectors": (RBEVectors, 5)}
_CHUNK = 1 << 22  # elements read in one step


def description(value: RBEBlocks) -> dict[str, Any]:
    """The JSON description of a compressed tensor."""
    return {
        "kind": value.kind,
        "shape": [int(n) for n in value.shape],
        "block": int(value.block),
        "transform": value.transform,
        "gain": float(value.gain),
        "basis": value.basis is not None,
        "codes": value.codes.description(),
    }


def upgrade(stored: Any, version: int, fail: Fail) -> None:
    """Change a tensor's description, any JSON value, from an older version of the format to the present one."""
    codes = stored.get("codes") if type(stored) is dict else None
    if type(codes) is dict and type(codes.get("kind")) is str and codes["kind"] in CODECS:
        stored["codes"] = CODECS[codes["kind"]].upgrade(codes, version, fail)


class StoredTensor:
    """A compressed tensor whose description is checked, as far as it says how much the tensor takes.

    Parameters
    ----------
    stored : the description, any JSON value
    fail : raises the FormatError

    Attributes
    ----------
    decoded_bytes : of the tensor as float32, padding included
    cost : memory to load it
    """

    def __init__(self, stored: Any, fail: Fail) -> None:
        names = ("kind", "shape", "block", "transform", "gain", "basis", "codes")
        kind, shape, block, self._transform, self._gain, self._basis, self._codes = json_fields(
            stored, names, "its description", fail
        )
        kind = json_choice(kind, tuple(_KINDS), "kind", fail)
        self._make, self._functions = _KINDS[kind]
        self._block = json_choice(block, transforms.BLOCK_SIZES, "block", fail)
        self._shape, self._sizes = _sizes(kind, shape, self._block, fail)
        self._fail = fail
        self.decoded_bytes = 4 * self._sizes.rows_pad * self._sizes.cols_pad
        codes_kind = self._codes.get("kind") if type(self._codes) is dict else None
        self._codec = CODECS[json_choice(codes_kind, tuple(CODECS), "the kind of codes", fail)]
        self.cost: LoadCost = self._codec.load_cost(self._codes, self._sizes.rows_pad, self._sizes.cols_pad)

    def blocks(self, arrays: Mapping[str, NDArray[Any]]) -> RBEBlocks:
        """The tensor from its arrays, by part, everything checked."""
        arguments, take = self._outside(arrays)
        rows, cols = self._sizes[:2]
        codes = self._codec.from_file(self._codes, rows, cols, take, self._fail)
        take.check_all_taken()
        return self._make(**arguments, codes=codes)

    def check(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """What `blocks` checks, keeping nothing and in little memory."""
        _, take = self._outside(arrays)
        rows, cols = self._sizes[:2]
        self._codec.check_file(self._codes, rows, cols, take, self._fail)
        take.check_all_taken()

    def _outside(self, arrays: Mapping[str, NDArray[Any]]) -> tuple[dict[str, Any], _Take]:
        """The arguments of the weight in front of its codes, and the function that takes arrays."""
        fail = self._fail
        transform = json_choice(self._transform, transforms.TRANSFORMS, "transform", fail)
        gain = json_number(self._gain, "gain", fail)
        mantissa, exponent = frexp(gain)
        if not (mantissa == 0.5 and -149 <= exponent - 1 <= 127):
            fail(f"gain={gain} is not a power of two that float32 holds")
        if type(self._basis) is not bool:
            fail("basis is not true or false")
        take = _Take(arrays, fail)
        basis = None
        if self._basis:
            shape = (self._sizes.row_blocks, self._sizes.col_blocks, self._functions)
            basis = take("basis", ("F16",), shape, finite=True)
        arguments = {"shape": self._shape, "block": self._block, "transform": transform}
        return {**arguments, "gain": gain, "basis": basis}, take


class _Sizes(NamedTuple):
    rows_pad: int
    cols_pad: int
    row_blocks: int  # basis rows: blocks of a matrix, rows of vectors
    col_blocks: int


def _sizes(kind: str, shape: Any, block: int, fail: Fail) -> tuple[tuple[int, ...], _Sizes]:
    lengths = (2,) if kind == "matrix" else (1, 2)
    if type(shape) is not list or len(shape) not in lengths:
        fail(f"shape is not a list of {' or '.join(map(str, lengths))} sizes")
    shape = tuple(json_integer(n, 1, 2**48, "a size in shape", fail) for n in shape)
    row_block = block if kind == "matrix" else 1
    row_blocks = -(-(shape[0] if len(shape) == 2 else 1) // row_block)
    col_blocks = -(-shape[-1] // block)
    return shape, _Sizes(row_blocks * row_block, col_blocks * block, row_blocks, col_blocks)


class _Take:
    """The `Take` of a codec: an array by its name, its dtype, shape and values checked."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]], fail: Fail) -> None:
        self._arrays = arrays
        self._fail = fail
        self._taken: set[str] = set()

    def __call__(
        self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...] | None, finite: bool = False
    ) -> NDArray[Any]:
        fail = self._fail
        self._taken.add(name)
        if name not in self._arrays:
            fail(f"the array {quoted(name)} is missing")
        a = self._arrays[name]
        if DTYPE_NAMES.get(a.dtype) not in dtypes:
            fail(f"{name} is {DTYPE_NAMES.get(a.dtype, a.dtype)}, expected {' or '.join(dtypes)}")
        expected = (a.size,) if shape is None else shape
        if a.shape != expected:
            fail(f"{name} has shape {list(a.shape)}, expected {list(expected)}")
        if finite and not _all_finite(a):
            fail(f"{name} holds NaN or Inf")
        return a

    def check_all_taken(self) -> None:
        for name in self._arrays:
            if name not in self._taken:
                self._fail(f"the array {quoted(name)} does not belong to these codes")


def _all_finite(a: NDArray[Any]) -> bool:
    flat = a.reshape(-1)
    if a.dtype == np.float16:  # on bit patterns: 5 times faster than isfinite
        bits = flat.view(np.uint16)
        steps = (bits[i : i + _CHUNK] & 0x7C00 for i in range(0, bits.size, _CHUNK))
        return not any(bool((step == 0x7C00).any()) for step in steps)
    return all(bool(np.isfinite(flat[i : i + _CHUNK]).all()) for i in range(0, flat.size, _CHUNK))


def check_dense(a: NDArray[Any], fail: Fail) -> None:
    """The rule of a dense tensor: a BOOL has bytes of 0 and 1."""
    if a.dtype == np.bool_ and a.size and int(a.view(np.uint8).max()) > 1:
        fail("a BOOL array holds bytes other than 0 and 1")

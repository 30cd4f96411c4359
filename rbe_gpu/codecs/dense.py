"""Dense codes: every coefficient as a b-bit code with a scale per group of its row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .. import dispatch
from ..json_checks import Fail, json_choice, json_fields
from . import packing
from .base import F32, GROUPS, Array, Codes, EncodeConfig, Sample, Take

DENSE_BITS = tuple(range(2, packing.MAX_BITS + 1))
_CHUNK = 1 << 21  # coefficients encoded at a time


@dataclass(frozen=True)
class DenseCodes(Codes):
    """Every coefficient as a b-bit code with a scale per group of its row.

    c = scale[row, col // group] * (u - (2**bits - 1) / 2), u the unsigned code: 2**bits levels, symmetric
    around zero.

    Attributes
    ----------
    bits : 2 to 12
    group : 32, 64 or 128 coefficients of a row share a scale
    value : (rows_pad, cols_pad * bits / 8) uint8, packed (see `packing`)
    scale : (rows_pad, ceil(cols_pad / group)) float16
    """

    bits: int
    group: int
    value: Array
    scale: Array
    kind: ClassVar[str] = "dense"
    array_names: ClassVar[tuple[str, ...]] = ("value", "scale")

    @property
    def name(self) -> str:
        return f"dense-int{self.bits}"

    @property
    def arrays(self) -> dict[str, Array]:
        return {"value": self.value, "scale": self.scale}

    def has_size(self, rows: int, cols: int) -> bool:
        shapes = (rows, packing.packed_bytes(cols, self.bits)), (rows, -(-cols // self.group))
        return (self.value.shape, self.scale.shape) == shapes

    def description(self) -> dict[str, Any]:
        return {"kind": "dense", "bits": int(self.bits), "group": int(self.group)}

    @classmethod
    def from_file(cls, stored: Any, rows: int, cols: int, take: Take, fail: Fail) -> DenseCodes:
        _, bits, group = json_fields(stored, ("kind", "bits", "group"), "codes", fail)
        bits = json_choice(bits, DENSE_BITS, "bits", fail)
        group = json_choice(group, GROUPS, "group", fail)
        value = take("value", ("U8",), (rows, packing.packed_bytes(cols, bits)))
        scale = take("scale", ("F16",), (rows, -(-cols // group)), finite=True)
        return cls(bits, group, value, scale)

    @classmethod
    def header_bound(cls, rows: int, cols: int) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
        description = {"kind": "dense", "bits": max(DENSE_BITS), "group": max(GROUPS)}
        packed = packing.packed_bytes(cols, max(DENSE_BITS))
        return description, {"value": (rows, packed), "scale": (rows, cols)}

    @classmethod
    def candidates(cls) -> Iterator[EncodeConfig]:
        for bits in DENSE_BITS:
            for group in GROUPS:
                yield DenseConfig(bits, group)


@dataclass(frozen=True)
class DenseConfig(EncodeConfig):
    """Dense codes of `bits` bits in groups of `group`."""

    @property
    def name(self) -> str:
        return f"dense-int{self.bits}"

    def quantize(self, c: F32) -> DenseCodes:
        return quantize_dense(c, self.bits, self.group)

    def nbytes(self, rows: int, cols: int) -> int:
        return rows * (packing.packed_bytes(cols, self.bits) + 2 * -(-cols // self.group))

    def squared_error(self, sample: Sample) -> float:
        c = sample.coefficients
        scale = np.empty((c.shape[0], -(-c.shape[1] // self.group)), np.uint16)
        error = np.empty(c.shape[0])
        quantize_rows = dispatch.CPU.module("quantize").quantize_rows
        quantize_rows(c, self.bits, self.group, np.float32(0), scale, np.empty((0, 0), np.uint16), error)
        return float(error.sum())


def quantize_dense(c: F32, bits: int, group: int) -> DenseCodes:
    """Every coefficient of c (rows, cols) float32 as a code of `bits` bits."""
    quantize_rows = dispatch.CPU.module("quantize").quantize_rows
    rows, cols = c.shape
    scale = np.empty((rows, -(-cols // group)), np.uint16)
    value = np.empty((rows, packing.packed_bytes(cols, bits)), np.uint8)
    step = max(1, _CHUNK // cols)
    codes = np.empty((min(step, rows), cols), np.uint16)
    error = np.empty(min(step, rows))
    for start in range(0, rows, step):
        part = c[start : start + step]
        n = len(part)
        quantize_rows(part, bits, group, np.float32(0), scale[start : start + n], codes[:n], error[:n])
        value[start : start + n] = packing.pack(codes[:n], bits)
    return DenseCodes(bits, group, value, scale.view(np.float16))

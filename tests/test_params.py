"""The structs that kernels get: their layout in NumPy, in C and in Numba, and how they are filled."""

import ctypes
from typing import Any

import numba
import numpy as np
import pytest
from rbe_gpu.cpu_fallback import params
from rbe_gpu.cpu_fallback._jit import cpu_kernel
from rbe_gpu.cpu_fallback._parts import record_at

from rbe_gpu.gpu._params import HEADERS
from rbe_gpu.kernel_struct import Struct

STRUCTS = {name: s for name, s in vars(params).items() if isinstance(s, Struct)}
CUDA_STRUCTS = {s.name: s for group in HEADERS.values() for s in group}


def _c_struct(struct: np.dtype) -> type[ctypes.Structure]:
    """The struct as the C compiler lays it out."""
    kinds = {np.dtype(np.int64): ctypes.c_int64, np.dtype(np.float32): ctypes.c_float}
    fields = [(name, kinds.get(t) or _c_struct(t)) for name, (t, _) in struct.fields.items()]
    return type("Struct", (ctypes.Structure,), {"_fields_": fields})


def test_all_structs_are_tested() -> None:
    assert set(STRUCTS) == {
        "WEIGHT",
        "INPUT",
        "OUTPUT",
        "TRANSFORM_IN",
        "TILES",
        "MATVEC",
        "ATTENTION",
        "ATTENTION_FEW",
        "PREPARED_MATMUL",
        "ENCODER_LAYER",
        "ENCODER_STEP",
        "DECODER_LAYER",
        "DECODER_STEP",
        "SEQUENCE",
        "INT8_INPUT",
        "INT8_TILES",
        "INT8_MATVEC",
    }


@pytest.mark.parametrize("name", STRUCTS)
def test_layout(name: str) -> None:
    """One layout in NumPy, C and Numba: names, offsets, sizes and alignment."""
    struct = STRUCTS[name].dtype
    c, record = _c_struct(struct), numba.from_dtype(struct)
    assert ctypes.sizeof(c) == struct.itemsize == record.size
    assert ctypes.alignment(c) == struct.alignment == 8
    assert record.aligned
    assert [n for n, _ in record.members] == list(struct.names)
    for field, (kind, offset) in struct.fields.items():
        assert getattr(c, field).offset == offset == record.offset(field)
        assert getattr(c, field).size == kind.itemsize
        assert offset % kind.alignment == 0


_MATVEC = params.MATVEC.dtype


@cpu_kernel
def _read(address):
    p = record_at(address, _MATVEC)
    return p.tokens, p.weight.first_row, p.weight.gain, p.output.out_features


def test_fields_by_name() -> None:
    """What is filled in by name is what a kernel reads by name, in nested structs too; the rest is zero."""
    weight = params.WEIGHT.record(first_row=7, gain=0.5)
    p = params.MATVEC.record(weight=weight.item(), tokens=3)
    params.pack_output(p.view(np.uint8), params.MATVEC.offset("output"), 1, 2, 3, 4, 5, 6, 1 << 40)
    assert _read(p.ctypes.data) == (3, 7, 0.5, 1 << 40)
    assert p["columns"][0] == 0
    assert p["weight"]["dead_zone"][0] == 0
    with pytest.raises(TypeError, match=r"Matvec: unknown fields \['token'\]"):
        params.MATVEC.record(token=3)


def _flat(values: tuple[Any, ...]) -> list[Any]:
    return [leaf for value in values for leaf in (_flat(value) if isinstance(value, tuple) else [value])]


@pytest.mark.parametrize("name", STRUCTS | CUDA_STRUCTS)
def test_records(name: str) -> None:
    """Every value lands in its field, whatever its width and the alignment of nested structs."""
    struct = (STRUCTS | CUDA_STRUCTS)[name]
    count = iter(range(1, 200))
    fields = {
        field: tuple(next(count) for _ in kind.leaves) if isinstance(kind, Struct) else next(count)
        for field, kind in struct.fields.items()
    }
    assert _flat(struct.record(**fields).item()) == list(range(1, len(struct.leaves) + 1))

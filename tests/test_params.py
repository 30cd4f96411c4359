"""The structs that kernels get: their layout in NumPy, in C and in Numba, and how they are filled."""

import ctypes

import numba
import numpy as np
import pytest
from rbe_gpu.cpu_fallback import params
from rbe_gpu.cpu_fallback._jit import cpu_kernel
from rbe_gpu.cpu_fallback._parts import record_at

STRUCTS = {name: s for name, s in vars(params).items() if name.isupper() and isinstance(s, np.dtype)}


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
        "SEQUENCE",
    }


@pytest.mark.parametrize("name", STRUCTS)
def test_layout(name: str) -> None:
    """One layout in NumPy, C and Numba: names, offsets, sizes and alignment."""
    struct = STRUCTS[name]
    c, record = _c_struct(struct), numba.from_dtype(struct)
    assert ctypes.sizeof(c) == struct.itemsize == record.size
    assert ctypes.alignment(c) == struct.alignment == 8
    assert record.aligned
    assert [n for n, _ in record.members] == list(struct.names)
    for field, (kind, offset) in struct.fields.items():
        assert getattr(c, field).offset == offset == record.offset(field)
        assert getattr(c, field).size == kind.itemsize
        assert offset % kind.alignment == 0


_MATVEC = params.MATVEC


@cpu_kernel
def _read(address):
    p = record_at(address, _MATVEC)
    return p.tokens, p.weight.first_row, p.weight.gain, p.output.out_features


def test_fields_by_name() -> None:
    """What is filled in by name is what a kernel reads by name, in nested structs too; the rest is zero."""
    weight = params.make(params.WEIGHT, first_row=7, gain=0.5)
    p = params.make(params.MATVEC, weight=weight.item(), tokens=3)
    p["output"][0] = (1, 2, 3, 4, 5, 6, 1 << 40)
    assert _read(p.ctypes.data) == (3, 7, 0.5, 1 << 40)
    assert p["columns"][0] == 0
    assert p["weight"]["dead_zone"][0] == 0
    with pytest.raises(TypeError, match="no such fields: token"):
        params.make(params.MATVEC, token=3)

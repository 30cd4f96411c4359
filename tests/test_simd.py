"""Elementary functions, half conversion, vectors and blocks of the CPU kernels, and how they are compiled."""

from __future__ import annotations

import ast
import importlib
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import llvmlite.binding as llvm
import ml_dtypes
import numba
import numpy as np
import pytest
from llvmlite import ir
from rbe_gpu.cpu_fallback import _disk_cache, _jit, isa, simd, simd_emit, simd_math
from rbe_gpu.cpu_fallback._atomics import atomic_add
from rbe_gpu.cpu_fallback._jit import cpu_kernel
from rbe_gpu.cpu_fallback.simd import (
    element,
    narrow,
    vadd,
    vblock,
    vdiv,
    vfma,
    vlanes,
    vload,
    vload_keep,
    vload_n,
    vmax,
    vmaxval,
    vmul,
    vnegate_even,
    vselect_less,
    vsplat,
    vstore,
    vstore_n,
    vsub,
    vsum,
    vswap,
    vtranspose,
    vtwice_high,
    vtwice_low,
    widen,
)
from rbe_gpu.cpu_fallback.simd_math import (
    erf_f32,
    exp_f32,
    exp_narrow_f32,
    gelu_f32,
    sigmoid_f32,
    tanh_f32,
    verf,
    vexp,
    vexp_narrow,
    vgelu,
    vsigmoid,
    vtanh,
)

HALVES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


# --- elementary functions -----------------------------------------------------------------------------


@cpu_kernel
def _exp(x, y):
    for i in range(x.size):
        y[i] = exp_f32(x[i])


@cpu_kernel
def _vexp(x, y):
    for i in range(0, x.size, 16):
        vstore(y, i, vexp(vload(x, i)))


@cpu_kernel
def _exp_narrow(x, y):
    for i in range(x.size):
        y[i] = exp_narrow_f32(x[i])


@cpu_kernel
def _vexp_narrow(x, y):
    for i in range(0, x.size, 16):
        vstore(y, i, vexp_narrow(vload(x, i)))


@cpu_kernel
def _tanh(x, y):
    for i in range(x.size):
        y[i] = tanh_f32(x[i])


@cpu_kernel
def _vtanh(x, y):
    for i in range(0, x.size, 16):
        vstore(y, i, vtanh(vload(x, i)))


@cpu_kernel
def _erf(x, y):
    for i in range(x.size):
        y[i] = erf_f32(x[i])


@cpu_kernel
def _verf(x, y):
    for i in range(0, x.size, 16):
        vstore(y, i, verf(vload(x, i)))


@cpu_kernel
def _sigmoid(x, y):
    for i in range(x.size):
        y[i] = sigmoid_f32(x[i])


@cpu_kernel
def _vsigmoid(x, y):
    for i in range(0, x.size, 16):
        vstore(y, i, vsigmoid(vload(x, i)))


@cpu_kernel
def _gelu(x, y):
    for i in range(x.size):
        y[i] = gelu_f32(x[i])


@cpu_kernel
def _vgelu(x, y):
    for i in range(0, x.size, 16):
        vstore(y, i, vgelu(vload(x, i)))


def _erf64(x: np.ndarray) -> np.ndarray:
    return np.fromiter(map(math.erf, x), np.float64, x.size)


def _sigmoid64(x: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1.0) / (1.0 + e)


def _every_exponent(count: int = 1 << 22) -> np.ndarray:
    """`count` float32 values with patterns spread evenly over all 2^32, NaN and Inf among them."""
    i = np.arange(count, dtype=np.uint64)
    step = (1 << 32) // count
    return (i * step + (i * 2654435761 >> 7) % step).astype(np.uint32).view(np.float32)


def _dense(count: int = 1 << 21) -> np.ndarray:
    """Where the functions are neither 0 nor 1 nor infinite."""
    return np.concatenate(
        [np.linspace(-110, 95, count, dtype=np.float32), np.linspace(-5, 5, count, dtype=np.float32)]
    )


SPECIAL = np.array(
    [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-45, -1e-45, 3.4028235e38, -3.4028235e38, 88.72284,
     88.722832, -87.33655, -103.97208, -103.972084, 1.0, -1.0, 0.6, 0.925, 4.0, np.finfo(np.float32).tiny],
    np.float32,
)  # fmt: skip


def _ulps(y: np.ndarray, want: np.ndarray) -> np.ndarray:
    """|y - want| in units of the float32 spacing at `want`; infinite where NaN or Inf is out of place."""
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = want.astype(np.float32)
        finite = np.isfinite(rounded)
        error = np.abs(y.astype(np.float64) - want) / np.where(finite, np.spacing(np.abs(rounded)), 1.0)
    same = (y == rounded) | (np.isnan(y) & np.isnan(rounded))
    return np.where(finite & np.isfinite(y), error, np.where(same, 0.0, np.inf))


@pytest.mark.parametrize(
    ("kernel", "exact"),
    [
        (_exp, np.exp),
        (_vexp, np.exp),
        (_tanh, np.tanh),
        (_vtanh, np.tanh),
        (_erf, _erf64),
        (_verf, _erf64),
        (_sigmoid, _sigmoid64),
        (_vsigmoid, _sigmoid64),
    ],
    ids=lambda f: f.__name__.strip("_"),
)
@pytest.mark.parametrize("values", [_every_exponent, _dense, lambda: np.resize(SPECIAL, 32)])
def test_two_ulp(
    kernel: Any, exact: Callable[[np.ndarray], np.ndarray], values: Callable[[], np.ndarray]
) -> None:
    x = values()
    y = np.empty_like(x)
    kernel(x, y)
    with np.errstate(all="ignore"):
        want = exact(x.astype(np.float64))
    error = _ulps(y, want)
    worst = int(np.argmax(error))
    assert error[worst] <= 2.0, f"{error[worst]:.2f} ulp at {x[worst]!r}: {y[worst]!r}"


@pytest.mark.parametrize("kernel", [_exp_narrow, _vexp_narrow], ids=["scalar", "vector"])
def test_narrow_exp(kernel: Any) -> None:
    """Up to 88 within 3 ulp, exactly 0 below -87, NaN kept."""
    x = np.concatenate([_every_exponent(), _dense(), np.resize(SPECIAL, 32)])
    x[x > 88] = 88
    y = np.empty_like(x)
    kernel(x, y)
    with np.errstate(all="ignore"):
        want = np.where(x < -87, 0.0, np.exp(x.astype(np.float64)))
    assert _ulps(y, want).max() <= 3.0


@pytest.mark.parametrize("kernel", [_gelu, _vgelu], ids=["scalar", "vector"])
def test_gelu(kernel: Any) -> None:
    """Within 1.2e-7 max(1, |y|), exact halves near 0, and the limits at the infinities."""
    x = np.concatenate([_every_exponent(1 << 20), _dense()[::8], np.resize(SPECIAL, 32)])
    y = np.empty_like(x)
    kernel(x, y)
    with np.errstate(all="ignore"):
        wide = x.astype(np.float64)
        want = np.where(wide == -np.inf, 0.0, wide * 0.5 * (1 - _erf64(wide * -(0.5**0.5))))
        assert (np.isnan(y) == np.isnan(x)).all()
        seen = np.isfinite(x)
        assert (y[x == np.inf] == np.inf).all()
        assert (y[x == -np.inf] == 0).all()
        error = np.abs(y[seen] - want[seen]) / np.maximum(1.0, np.abs(want[seen]))
        assert error.max() <= 1.2e-7
        near = (np.abs(x) < 1e-7) & (np.abs(x) > 1e-37)
        np.testing.assert_allclose(y[near], x[near] / 2, rtol=2e-7)


# --- half precision -----------------------------------------------------------------------------------


@cpu_kernel
def _widen(x, y):
    for i in range(x.size):
        y[i] = widen(x[i])


@cpu_kernel
def _narrow(x, y):
    for i in range(x.size):
        y[i] = narrow(y, x[i])


@cpu_kernel
def _vcopy(x, y):
    for i in range(0, x.size, 16):
        vstore(y, i, vload(x, i))


def test_bits() -> None:
    x = np.arange(4, dtype=np.float32)
    assert simd.bits(x) is x
    assert simd.bits(x.astype(np.float16)).dtype == np.uint16
    assert simd.bits(x.astype(ml_dtypes.bfloat16)).dtype == np.int16
    with pytest.raises(TypeError, match="float64"):
        simd.bits(x.astype(np.float64))


def _check_widen(kernel: Any, dtype: Any) -> None:
    h = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    y = np.empty(h.size, np.float32)
    kernel(simd.bits(h), y)
    with np.errstate(invalid="ignore"):  # some machines say so of a signalling NaN
        want = h.astype(np.float32)
    nan = np.isnan(want)
    np.testing.assert_array_equal(y.view(np.uint32)[~nan], want.view(np.uint32)[~nan])
    assert np.isnan(y[nan]).all()


def _check_narrow(kernel: Any, dtype: Any) -> None:
    """Random-like patterns, all halves, all midpoints between halves and their float32 neighbours."""
    with np.errstate(invalid="ignore"):
        halves = np.arange(1 << 16, dtype=np.uint16).view(dtype).astype(np.float32).view(np.uint32)
    half_step = np.uint32(1 << (12 if dtype == np.float16 else 15))
    near = [halves + half_step + np.uint32(d) for d in (-1 & 0xFFFFFFFF, 0, 1)]
    tiny = np.arange(1 << 16, dtype=np.uint32) * np.uint32(17 << 12)  # float16's subnormals and their ties
    x = np.concatenate([_every_exponent().view(np.uint32), halves, *near, tiny]).view(np.float32)
    y = np.empty(x.size, dtype)
    kernel(x, simd.bits(y))
    with np.errstate(over="ignore", invalid="ignore"):
        want = x.astype(dtype)
    nan = np.isnan(x)
    np.testing.assert_array_equal(y.view(np.uint16)[~nan], want.view(np.uint16)[~nan])
    assert np.isnan(y[nan].astype(np.float32)).all()


@pytest.mark.parametrize("kernel", [_widen, _vcopy], ids=["scalar", "vector"])
@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
def test_widen_every_half(kernel: Any, dtype: Any) -> None:
    _check_widen(kernel, dtype)


@pytest.mark.parametrize("kernel", [_narrow, _vcopy], ids=["scalar", "vector"])
@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
def test_narrow_rounds_to_nearest_even(kernel: Any, dtype: Any) -> None:
    _check_narrow(kernel, dtype)


def _check_baseline() -> None:
    for dtype in HALVES.values():
        for kernel in (_widen, _vcopy):
            _check_widen(kernel, dtype)
        for kernel in (_narrow, _vcopy):
            _check_narrow(kernel, dtype)
    x = np.concatenate([_every_exponent(1 << 18), _dense(1 << 16)])
    y = np.empty_like(x)
    for kernel, exact in ((_exp, np.exp), (_vexp, np.exp), (_tanh, np.tanh), (_sigmoid, _sigmoid64)):
        kernel(x, y)
        with np.errstate(all="ignore"):
            assert _ulps(y, exact(x.astype(np.float64))).max() <= 2.0
    for kernel in (_widen, _narrow, _vcopy):
        for code in kernel.inspect_asm().values():
            assert not re.search(r"vcvtph2ps|vcvtps2ph|__extendhfsf2|__truncsfhf2|[yz]mm", code)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 without its extensions")
def test_baseline_x86(tmp_path: Path) -> None:
    """SSE2 alone: no FMA, no half instructions, nothing that the machine at hand would add."""
    target = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    env = (
        os.environ | target | {"NUMBA_CACHE_DIR": str(tmp_path)}
    )  # from a cache there is no text of the code
    check = "from tests import test_simd; test_simd._check_baseline()"
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", check], env=env, cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# --- vectors ------------------------------------------------------------------------------------------


@cpu_kernel
def _arithmetic(a, b, c, out, scalars):
    x, y, z = vload(a, 0), vload(b, 0), vload(c, 0)
    vstore(out, 0, vadd(x, y))
    vstore(out, 16, vsub(x, y))
    vstore(out, 32, vmul(x, y))
    vstore(out, 48, vdiv(x, y))
    vstore(out, 64, vmax(x, y))
    vstore(out, 80, vfma(x, y, z))
    vstore(out, 96, vsplat(element(a, 3)))
    vstore(out, 112, vlanes(x, 3, 7, np.float32(9.0)))
    vstore(out, 128, vselect_less(x, y, z, x))
    scalars[0] = vsum(x)
    scalars[1] = vmaxval(x)


@cpu_kernel
def _partial(x, start, count, y):
    vstore_n(y, start, vload_n(x, start, count), count)


@cpu_kernel
def _load_partial(x, count, y):
    vstore(y, 0, vload_n(x, 0, count))


@cpu_kernel
def _load_keep(x, offset, y):
    vstore(y, 0, vload_keep(x, offset))


@cpu_kernel
def _transpose(x, row, y, target_row):
    vtranspose(x, 0, row, y, 0, target_row)


@cpu_kernel
def _block(add, depth, a, a_row, a_step, b, b_step, c, c_row):
    vblock(3, 2, add, depth, a, 0, a_row, a_step, b, 0, b_step, c, 0, c_row)


@cpu_kernel
def _dot(x, y):
    total = vsplat(np.float32(0.0))
    for i in range(0, x.size, 16):
        total = vfma(vload(x, i), vload(y, i), total)
    return vsum(total)


def test_arithmetic() -> None:
    a, b, c = (np.linspace(lo, hi, 16, dtype=np.float32) for lo, hi in ((-3, 7), (5, 2), (0.1, 0.9)))
    out, scalars = np.empty((9, 16), np.float32), np.empty(2, np.float32)
    _arithmetic(a, b, c, out, scalars)
    lanes = np.full(16, 9, np.float32)
    lanes[3:7] = a[3:7]
    want = [a + b, a - b, a * b, a / b, np.maximum(a, b), None, np.full(16, a[3]), lanes]
    for got, w in zip(out, want, strict=False):
        if w is not None:
            np.testing.assert_array_equal(got, w)
    np.testing.assert_allclose(out[5], a.astype(np.float64) * b + c, rtol=1e-6)
    np.testing.assert_array_equal(out[8], np.where(a < b, c, a))
    np.testing.assert_allclose(scalars, [a.sum(dtype=np.float64), a.max()], rtol=1e-6)


@cpu_kernel
def _rearranged(x, y):
    v = vload(x, 0)
    vstore(y, 0, vswap(v))
    vstore(y, 16, vtwice_low(v))
    vstore(y, 32, vtwice_high(v))
    vstore(y, 48, vnegate_even(v))


def test_rearranged_lanes() -> None:
    x, y = np.arange(16, dtype=np.float32), np.empty((4, 16), np.float32)
    _rearranged(x, y.reshape(-1))
    np.testing.assert_array_equal(y[0], x.reshape(8, 2)[:, ::-1].reshape(-1))
    np.testing.assert_array_equal(y[1:3].reshape(-1), np.repeat(x, 2))
    np.testing.assert_array_equal(y[3], np.where(x % 2, x, -x))
    assert np.signbit(y[3, 0])  # -0


def test_max_gives_the_second_where_either_is_nan() -> None:
    a, b = np.ones(16, np.float32), np.full(16, 2, np.float32)
    a[1], b[2] = np.nan, np.nan
    out = np.empty((9, 16), np.float32)
    _arithmetic(a, b, b, out, np.empty(2, np.float32))
    assert out[4, 1] == 2
    assert np.isnan(out[4, 2])


@pytest.mark.parametrize("dtype", [np.float32, *HALVES.values()])
def test_partial_loads_and_stores(dtype: Any) -> None:
    x = np.arange(1, 41).astype(dtype)
    for count in range(17):
        y = np.zeros_like(x)
        _partial(simd.bits(x), 5, count, simd.bits(y))
        want = np.zeros_like(x)
        want[5 : 5 + count] = x[5 : 5 + count]
        np.testing.assert_array_equal(y, want)
        wide = np.full(16, 7, np.float32)
        _load_partial(simd.bits(x), count, wide)
        np.testing.assert_array_equal(wide, [*range(1, count + 1)] + [0] * (16 - count))


def test_partial_load_reads_nothing_else() -> None:
    """The page after the array belongs to nobody: reading it ends the process."""
    check = (
        "import mmap, ctypes, numpy as np\n"
        "from tests import test_simd\n"
        "size = mmap.PAGESIZE\n"
        "memory = mmap.mmap(-1, 2 * size)\n"
        "start = ctypes.addressof(ctypes.c_char.from_buffer(memory))\n"
        "libc = ctypes.CDLL(None)\n"
        "assert libc.mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(size), 0) == 0\n"
        "for dtype in (np.float32, np.uint16, np.int16):\n"
        "    x = np.frombuffer(memory, dtype, size // np.dtype(dtype).itemsize)\n"
        "    y = np.ones(16, np.float32)\n"
        "    for count in range(16):\n"
        "        test_simd._load_partial(x[x.size - count :], count, y)\n"
        "        assert not y.any()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", check],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_load_of_bools() -> None:
    x = np.arange(20) % 3 == 0
    y = np.empty(16, np.float32)
    _load_keep(x, 3, y)
    np.testing.assert_array_equal(y, x[3:19])


@pytest.mark.parametrize("dtype", [np.float32, *HALVES.values()])
def test_transpose(dtype: Any) -> None:
    x = np.arange(16 * 20).astype(np.float32).reshape(16, 20).astype(dtype)
    y = np.zeros((16, 18), np.float32)
    _transpose(simd.bits(x.reshape(-1)), 20, y.reshape(-1), 18)
    np.testing.assert_array_equal(y[:, :16], x[:, :16].astype(np.float32).T)
    assert not y[:, 16:].any()


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("depth", [0, 1, 2, 37])
def test_block(add: bool, depth: int) -> None:
    """Small integers, so that every order of the sum is exact."""
    a = np.arange(3 * depth, dtype=np.float32).reshape(3, depth) % 7
    b = np.arange(depth * 40, dtype=np.float32).reshape(depth, 40) % 5
    c = np.ones((3, 34), np.float32)
    want = a @ b[:, :32] + add
    flat_a, flat_b = (np.append(x, np.float32(0)) for x in (a, b))
    _block(add, depth, flat_a, depth, 1, flat_b, 40, c.reshape(-1), 34)
    np.testing.assert_array_equal(c[:, :32], want)
    assert (c[:, 32:] == 1).all()
    c[:] = 1
    _block(add, depth, np.append(a.T, np.float32(0)), 1, 3, flat_b, 40, c.reshape(-1), 34)
    np.testing.assert_array_equal(c[:, :32], want)


# --- threads ------------------------------------------------------------------------------------------


@_jit.cpu_kernel
def _claim_all(counter, taken):
    while True:
        turn = atomic_add(counter, 0, 1)
        if turn >= taken.size:
            break
        taken[turn] += 1


def test_atomic_add_gives_every_number_once() -> None:
    counter, taken = np.zeros(1, np.int64), np.zeros(200_000, np.int64)
    _claim_all(np.ones(1, np.int64), np.zeros(1, np.int64))
    threads = [threading.Thread(target=_claim_all, args=(counter, taken)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (taken == 1).all()
    assert counter[0] == taken.size + len(threads)


# --- the code -----------------------------------------------------------------------------------------


def _assembly(kernel: Any, *arrays: Any) -> str:
    """The code of a kernel for these arguments, compiled now: from the disk cache there is no text of it."""
    options = {"nogil": True, "error_model": "numpy", "fastmath": set(_jit.FASTMATH)}
    compiled = numba.njit(**options)(kernel.py_func)
    compiled(*arrays)
    return str(compiled.inspect_asm(compiled.signatures[0]))


def test_packed_fma() -> None:
    x = np.arange(64, dtype=np.float32)
    assert _dot(x, x) == np.dot(x, x)
    code = _assembly(_dot, x, x)
    if platform.machine() in ("x86_64", "AMD64"):
        assert re.search(r"vfmadd\d+ps\s.*%[yz]mm", code)
    elif platform.machine() in ("aarch64", "arm64"):
        assert re.search(r"fmla\s+v\d+\.4s|fmla\.4s", code)
    else:
        pytest.skip(f"no expectation for {platform.machine()}")


def test_scalar_functions_vectorise_in_a_loop() -> None:
    """A plain loop over exp_f32 becomes vector code, with no call of a mathematical library."""
    x = np.zeros(64, np.float32)
    code = _assembly(_exp, x, x)
    assert not re.search(r"\b(expf?|fmaf?|roundf?|rintf?|ldexpf?|scalbnf?)\b(?!_)", code)
    if platform.machine() in ("x86_64", "AMD64"):
        assert re.search(r"vfmadd\d+ps\s.*%[yz]mm", code)


def _compile_for(triple: str, features: str, emit: Callable[..., ir.Value], arity: int) -> str:
    """Assembly of an emitter applied to vectors in memory, for another machine."""
    vector = ir.VectorType(ir.FloatType(), 16)
    module = ir.Module("cross")
    function = ir.Function(
        module, ir.FunctionType(ir.VoidType(), [vector.as_pointer()] * (arity + 1)), "kernel"
    )
    builder = ir.IRBuilder(function.append_basic_block())
    arguments = [builder.load(p, align=4) for p in function.args[1:]]
    builder.store(emit(builder, *arguments), function.args[0], align=4)
    builder.ret_void()
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(triple).create_target_machine(features=features, opt=3)
    compiled = llvm.parse_assembly(str(module))
    compiled.triple = triple
    return machine.emit_assembly(compiled)


def test_neon() -> None:
    """Cross-compiled for 64-bit Arm: fused vector instructions, half instructions, no calls."""
    neon = isa.ISAS["neon"]
    triple, features = neon.triple, neon.llvm_features
    context = SimpleNamespace(
        codegen=lambda: SimpleNamespace(magic_tuple=lambda: (triple, neon.cpu, features))
    )
    code = _compile_for(triple, features, simd_emit.fma, 3)
    assert len(re.findall(r"fmla\s+v\d+\.4s", code)) == 4
    emitters = ("exp", "exp_narrow", "tanh", "erf", "sigmoid", "gelu")
    for emit in (getattr(simd_math, f"emit_{name}") for name in emitters):
        code = _compile_for(triple, features, lambda b, x, emit=emit: emit(context, b, x), 1)
        assert re.search(r"fmla\s+v\d+\.4s", code)
        assert not re.search(r"\bbl\b", code)

    def through_half(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
        return simd_emit.half_to_float(context, builder, simd_emit.float_to_half(context, builder, x))

    code = _compile_for(triple, features, through_half, 1)
    assert "fcvtn" in code
    assert "fcvtl" in code
    assert not re.search(r"\bbl\b", code)


# --- the cache ----------------------------------------------------------------------------------------

_KERNEL = """
import numpy as np
from ._jit import cpu_kernel
from .inner import twice

@cpu_kernel
def kernel(x, y):
    twice(x, y)

x = np.full(16, 3, np.float32)
y = np.empty_like(x)
kernel(x, y)
print(y[0], sum(kernel.stats.cache_hits.values()))
"""
_INNER = """
from ._jit import cpu_inline
from .simd import vadd, vload, vstore

@cpu_inline
def twice(x, y):
    vstore(y, 0, vadd(vload(x, 0), vload(x, 0)))
"""


def test_an_edit_of_an_inlined_file_recompiles_its_users(tmp_path: Path) -> None:
    """A kernel is taken from the disk cache until a file that it inlines changes, at first or second hand.

    Its own file stays the same; edits of files that it does not import leave the cache alone.
    """
    package = tmp_path / "package"
    package.mkdir()
    folder = Path(_disk_cache.__file__).parent
    for source in (folder / "__init__.py", *_disk_cache.sources(folder / "softmax.py")):
        shutil.copy(source, package / source.name)
    (package / "kernel.py").write_text(_KERNEL)
    (package / "inner.py").write_text(_INNER)
    env = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])

    def run() -> list[str]:
        return subprocess.run(
            [sys.executable, "-m", "package.kernel"],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()

    def edit(name: str, old: str, new: str) -> None:
        source = (package / name).read_text()
        assert old in source
        (package / name).write_text(source.replace(old, new))

    assert run() == ["6.0", "0"]
    assert run() == ["6.0", "1"]
    edit("softmax.py", "softmax: ", "Softmax: ")
    assert run() == ["6.0", "1"]
    edit("simd.py", '_binary("vadd", "a + b.", emit.add)', '_binary("vadd", "a + b.", emit.sub)')
    assert run() == ["0.0", "0"]
    assert run() == ["0.0", "1"]
    edit("inner.py", "vload(x, 0)))", "vload(y, 0)))")
    assert run()[1] == "0"


_FILES = sorted(Path(_disk_cache.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("file", _FILES, ids=lambda f: f.name)
def test_imports_are_at_the_head(file: Path) -> None:
    """`imports` reads no further than the first definition: it misses nothing that the whole file imports."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names |= {node.module} if node.module else {alias.name for alias in node.names}
    assert names <= {f.stem for f in _disk_cache.imports(file)}


@pytest.mark.parametrize("file", _FILES, ids=lambda f: f.name)
def test_sources_hold_every_function_that_a_kernel_uses(file: Path) -> None:
    """Whatever a kernel's code names, kernels and intrinsics of other files, comes from a file of its digest."""
    module = vars(importlib.import_module(f"rbe_gpu.cpu_fallback.{file.stem}"))
    homes = {f"rbe_gpu.cpu_fallback.{source.stem}" for source in _disk_cache.sources(file)}
    functions = [getattr(value, "py_func", value) for value in module.values()]
    for function in (f for f in functions if isinstance(f, FunctionType)):
        for name in function.__code__.co_names:
            used = module.get(name)
            used = getattr(used, "py_func", getattr(used, "_defn", used))  # of a kernel, of an intrinsic
            home = str(getattr(used, "__module__", ""))
            assert not home.startswith("rbe_gpu.cpu_fallback.") or home in homes, (function, name)


def test_only_one_file_uses_private_parts_of_numba() -> None:
    private = re.compile(r"numba\.(?:core|np)\b|\._cache\b")
    users = [file.name for file in _FILES if private.search(file.read_text())]
    assert users == ["_numba_internals.py"]


def test_no_two_forms_of_a_kernel_share_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes compile two forms of a kernel at once, and a third takes them from the disk cache.

    The second reads the index before the first has written it, and writes all of its own before the first ends.
    """

    def half(x):
        return x / 2

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    first, second, third = (cpu_kernel(half) for _ in range(3))
    file = first._cache._cache_file
    save = file._save_data

    def overtaken(*data: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(second._cache._cache_file, "_load_index", dict)
            assert second(3.5) == 1.75
        save(*data)

    monkeypatch.setattr(file, "_save_data", overtaken)
    assert first(3) == 1.5
    assert third(3.5) == 1.75
    assert sum(third.stats.cache_hits.values()) == 1
    assert third(3) == 1.5

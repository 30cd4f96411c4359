"""The host build itself: its threads, warps, memories and tensor cores, and that it catches broken kernels."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from rbe_gpu import reference, registry
from rbe_gpu.codecs.packing import pack
from rbe_gpu.gpu import _execute, _source, layer_norm, silu, softmax
from rbe_gpu.gpu._elements import divider
from rbe_gpu.registry import relative_error

from . import real
from .cases import CASES
from .host import build, sanitized
from .host.executor import HostExecutor, KernelError, Library, library
from .host.mutants import replaced

FRAGMENTS = (Path(__file__).parent / "host" / "fragments.cu").read_text(encoding="utf-8")
CUDA_SRC = Path(__file__).parent.parent / "cuda_src"
HALVES = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
ORDERS = pytest.mark.parametrize("reverse", [False, True], ids=["ascending", "descending"])


@lru_cache
def compiled(text: str, *defines: str) -> Library:
    return Library(build.build(_source.expand("test.cu", text), defines=defines))


def launch(
    lib: Library, entry: str, threads: int | tuple[int, int, int], *args: Any, shared: int = 0, **order: bool
) -> None:
    block = (threads, 1, 1) if isinstance(threads, int) else threads
    lib.run(entry, (1, 1, 1), block, *args, shared=shared, **order)


def kernel(body: str, parameters: str = "float* out") -> Library:
    """A source with one kernel `test`."""
    headers = "".join(f'#include "{name}.cuh"\n' for name in ("async_copy", "mma", "reduce", "vector_io"))
    function = f'#line 2 "test.cu"\nextern "C" __global__ void test({parameters}) {{\n{body}\n}}\n'
    return compiled(headers + function)


def scores(rows: int, cols: int) -> np.ndarray:
    values = real.activations(-(-rows * cols // 384)).reshape(-1)
    return values[: rows * cols].reshape(rows, cols).copy()


# --- threads and warps --------------------------------------------------------------------------------


@ORDERS
@pytest.mark.parametrize("count", [32, 256])
@pytest.mark.parametrize("defines", [(), ("RBE_UCONTEXT",)], ids=["switch", "ucontext"])
def test_warp_operations(count: int, reverse: bool, defines: tuple[str, ...]) -> None:
    x = scores(1, count)[0]
    out = np.full((10, count), np.nan, np.float32)
    launch(compiled(FRAGMENTS, *defines), "exchange", count, x, out, np.int32(count), reverse=reverse)
    lane, warp = np.arange(count) % 32, np.arange(count) // 32 * 32
    eighth, start = lane % 8, np.arange(count) // 8 * 8
    source = [
        warp + 5,
        warp + (lane ^ 9),
        warp + np.where(lane < 3, lane, lane - 3),
        warp + np.where(lane > 28, lane, lane + 3),
        start + 5,
        start + (eighth ^ 3),
        start + np.where(eighth < 3, eighth, eighth - 3),
        start + np.where(eighth > 4, eighth, eighth + 3),
    ]
    np.testing.assert_array_equal(out[:8], x[np.array(source)])
    np.testing.assert_array_equal(out[8], (x > 0).reshape(-1, 32).sum(axis=1).repeat(32))
    np.testing.assert_array_equal(out[9], np.where(lane < 16, x[warp + (lane ^ 1)], 0))


@ORDERS
@pytest.mark.parametrize("team", [1, 2, 4, 8, 16, 32, 64, 96, 1024])
def test_team_reductions(team: int, reverse: bool) -> None:
    teams = 128 // team if team <= 32 else 1
    x = scores(teams, team)
    sums, tops = np.full_like(x, np.nan), np.full_like(x, np.nan)
    launch(compiled(FRAGMENTS), "reduce", (team, teams, 1), x, sums, tops, reverse=reverse)
    np.testing.assert_array_equal(tops, np.broadcast_to(x.max(axis=1, keepdims=True), x.shape))
    np.testing.assert_array_equal(sums, sums[:, :1] + np.zeros_like(x))  # one result for all
    np.testing.assert_allclose(sums[:, 0], x.sum(axis=1, dtype=np.float64), rtol=1e-5, atol=1e-5)


@ORDERS
def test_blocks_and_their_threads(reverse: bool) -> None:
    """Every thread of every block runs once, with its own indices, in all three dimensions."""
    body = """
      i64 block = blockIdx.x + gridDim.x * (blockIdx.y + static_cast<i64>(gridDim.y) * blockIdx.z);
      int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
      out[block * blockDim.x * blockDim.y * blockDim.z + thread] += static_cast<float>(block * 1000 + thread);
    """
    out = np.zeros((24, 30), np.float32)
    kernel(body).run("test", (2, 3, 4), (5, 3, 2), out, reverse=reverse)
    np.testing.assert_array_equal(out, 1000 * np.arange(24)[:, None] + np.arange(30))


def test_shared_memory_starts_as_nan() -> None:
    """In every block: what an earlier block left is gone."""
    body = """
      __shared__ float fixed[32];
      DYNAMIC_SHARED(float, dynamic);
      out[2 * (blockIdx.x * 32 + threadIdx.x)] = fixed[threadIdx.x];
      out[2 * (blockIdx.x * 32 + threadIdx.x) + 1] = dynamic[threadIdx.x];
      fixed[threadIdx.x] = dynamic[threadIdx.x] = 1.0f;
    """
    out = np.zeros((3, 32, 2), np.float32)
    kernel(body).run("test", (3, 1, 1), (32, 1, 1), out, shared=128)
    assert np.isnan(out).all()


def test_subnormals_are_zero() -> None:
    """As under the -ftz=true of CuPy; and the caller's arithmetic is as before."""
    out = np.full(1, np.float32(1e-38))
    launch(kernel("out[0] = out[0] * 0.5f;"), "test", 1, out)
    assert out[0] == 0
    assert np.float32(1e-38) * np.float32(0.5) != 0


def test_grid_is_gone_through_in_strides() -> None:
    """One block does the work of many, with the same bits."""
    for rows, cols in ((65, 384), (7, 5), (3, 5000), (3, 40_000)):
        x = scores(rows, cols)
        one, many = np.full_like(x, np.nan), np.full_like(x, np.nan)
        HostExecutor()(softmax.launches(x, 1.0, None, many))
        HostExecutor()((replace(softmax.launches(x, 1.0, None, one)[0], grid=(1, 1, 1)),))
        np.testing.assert_array_equal(one, many)
        assert relative_error(many, reference.softmax(x)) <= 1e-6


@pytest.mark.parametrize("cols", [64, 65, 40_000])
@pytest.mark.parametrize("types", [*product(registry.DTYPES, repeat=3)], ids="-".join)
def test_gains_of_any_type(types: tuple[str, str, str], cols: int) -> None:
    """x, weight and bias each of any of the three types, in rows and in elements."""
    x = scores(3, cols).astype(registry.DTYPES[types[0]])
    weight, bias = (
        np.resize(real.layer(3, f"output.LayerNorm.{name}"), cols).astype(registry.DTYPES[dtype])
        for name, dtype in (("weight", types[1]), ("bias", types[2]))
    )
    out = np.full_like(x, np.nan)
    tol = registry.OPS["layer_norm"].tolerances[types[0]]
    with _execute.executor(HostExecutor()):
        layer_norm.layer_norm(x, weight, bias, 1e-5, None, out, None)
        assert relative_error(out, reference.layer_norm(x, weight, bias)[0], tol.floor) <= tol.rel
        silu.silu(x, bias, out)
        assert relative_error(out, reference.silu(x, bias), tol.floor) <= tol.rel


# --- conversions, sums --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HALVES)
def test_half_conversions(name: str) -> None:
    """Every value of the type, the middles between neighbours and just beside them; NaN stays NaN."""
    dtype = HALVES[name]
    values = np.arange(65536, dtype=np.uint16).view(dtype).astype(np.float32)
    finite = np.sort(values[np.isfinite(values)])
    middles = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(middles, np.float32(side)) for side in (-np.inf, np.inf)]
    x = np.concatenate([values, middles, *beside, np.float32([1e30, -1e30, 65519.9, 65520.0])])
    x = x[: x.size // 2 * 2].copy()
    if name == "bf16":  # its subnormals are those of float32, which are zero on a GPU too
        x = x[~((x != 0) & (np.abs(x) < np.finfo(np.float32).tiny))]
        x = x[: x.size // 2 * 2].copy()
    scalar, packed = np.zeros(x.size, dtype), np.zeros(x.size, dtype)
    back = np.zeros(x.size, np.float32)
    launch(compiled(FRAGMENTS), f"convert_{name}", 64, x, scalar, packed, back, np.int32(x.size))
    with np.errstate(over="ignore", invalid="ignore"):
        want = x.astype(dtype)
    number = ~np.isnan(x)
    np.testing.assert_array_equal(scalar[number].view(np.uint16), want[number].view(np.uint16))
    assert np.isnan(scalar[~number]).all()
    assert (scalar.view(np.uint16) == packed.view(np.uint16))[number].all()
    np.testing.assert_array_equal(back, scalar.astype(np.float32))


def test_long_sum_keeps_what_additions_round_off() -> None:
    x = np.abs(real.weight("embeddings.word_embeddings.weight").reshape(-1)[: 1 << 20]) + np.float32(1)
    out = np.zeros(1, np.float32)
    launch(compiled(FRAGMENTS), "long_sum", 1, x, out, np.int64(x.size))
    want = x.sum(dtype=np.float64)
    assert abs(out[0] - want) <= 2.0**-24 * want
    assert abs(np.cumsum(x)[-1] - want) > 1e-5 * want


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 64, 96, 641, 2**20, 2**31 - 1, 2**31, 10**12 + 39, 2**62])
def test_division_by_a_product(divisor: int) -> None:
    n = {0, 1, divisor - 1, divisor, 2**31, 2**32 + 1, 2**63 - 1, (2**63 - 1) // divisor * divisor}
    n |= {k * divisor + d for k in (1, 2, 12345) for d in (-1, 0, 1)}
    x = np.array(sorted(v for v in n if 0 <= v < 2**63), np.int64)
    out = np.zeros_like(x)
    launch(compiled(FRAGMENTS), "divide", 1, x, out, np.int64(x.size), *divider(divisor).values)
    np.testing.assert_array_equal(out, [int(v) // divisor for v in x])


# --- tensor cores and asynchronous copies -------------------------------------------------------------


def tiles(depth: int, dtype: np.dtype, by_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """a (32, depth), b as the kernel takes it, and the product (32, 8) in float64."""
    a = real.layer(0, "attention.self.query.weight")[:32, :depth].astype(dtype)
    b = real.layer(1, "attention.self.query.weight")[:8, :depth].astype(dtype)
    want = a.astype(np.float64) @ b.astype(np.float64).T
    return np.ascontiguousarray(a), np.ascontiguousarray(b.T if by_rows else b), want


STAGES = 2 * 2 * (32 + 8) * 24


def product_error(lib: Library, entry: str, depth: int, by_rows: int, reverse: bool = False) -> float:
    a, b, want = tiles(depth, HALVES[entry.rpartition("_")[2]], by_rows)
    c = np.full((32, 8), np.nan, np.float32)
    args = (a, b, c, np.int32(depth), np.int32(by_rows))
    launch(lib, entry, 64, *args, shared=STAGES, reverse=reverse)
    return relative_error(c, want)


@ORDERS
@pytest.mark.parametrize("by_rows", [0, 1], ids=["b by columns", "b by rows"])
@pytest.mark.parametrize("depth", [8, 16, 24, 136, 384])
@pytest.mark.parametrize(
    "entry", ["product_f16", "product_bf16", "product_shuffles_f16", "product_shuffles_bf16"]
)
def test_product_of_tiles(entry: str, depth: int, by_rows: int, reverse: bool) -> None:
    """cp.async in two stages, ldmatrix, mma: against the plain product."""
    assert product_error(compiled(FRAGMENTS), entry, depth, by_rows, reverse) <= 1e-6


INTEGERS = """
  int lane = threadIdx.x, d[4] = {c[4 * lane], c[4 * lane + 1], c[4 * lane + 2], c[4 * lane + 3]};
  u32 rows[4] = {a[4 * lane], a[4 * lane + 1], a[4 * lane + 2], a[4 * lane + 3]};
  u32 cols[2] = {b[2 * lane], b[2 * lane + 1]};
  MULTIPLY(d, rows, cols, d);
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = d[i];
"""


@ORDERS
@pytest.mark.parametrize("name", ["mma_16x8x32_s8", "mma_16x8x32_s8_in_quarters"])
def test_product_of_int8_tiles(name: str, reverse: bool) -> None:
    """Whole, and in four as sm_75 computes it, with the extremes of int8 and sums beyond int32."""
    rng = np.random.default_rng(2)
    a, b = rng.integers(-128, 128, (16, 32)), rng.integers(-128, 128, (32, 8))
    a[0], b[:, 0] = -128, -128
    c = rng.integers(-(2**31), 2**31, (16, 8))
    lane, r = np.divmod(np.arange(128), 4)
    row, col = lane // 4 + 8 * (r // 2), 2 * (lane % 4) + r % 2  # of c
    byte = np.arange(4)
    of_a = a[(lane // 4 + 8 * (r % 2))[:, None], (4 * (lane % 4) + 16 * (r // 2))[:, None] + byte]
    lane, r = np.divmod(np.arange(64), 2)
    of_b = b[(4 * (lane % 4) + 16 * r)[:, None] + byte, (lane // 4)[:, None]]
    out = np.zeros(128, np.int32)
    words = [np.ascontiguousarray(v.astype(np.int8)).view(np.uint32).reshape(-1) for v in (of_a, of_b)]
    lib = kernel(INTEGERS.replace("MULTIPLY", name), "const u32* a, const u32* b, const int* c, int* out")
    launch(lib, "test", 32, *words, c[row, col].astype(np.int32), out, reverse=reverse)
    np.testing.assert_array_equal(out, (a @ b + c)[row, col].astype(np.int32))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("cp_async_wait<1>();\n", ""),
        ("cp_async_wait<1>();\n    __syncthreads();", "__syncthreads();\n    cp_async_wait<1>();"),
        ("cp_async_commit();  // an empty group", "// an empty group"),
        ("cp_async_wait<1>();\n    __syncthreads();", "cp_async_wait<1>();"),
        ("lane % 16) * PITCH + 8 * (lane / 16)", "lane / 2) * PITCH + 8 * (lane % 2)"),
        ("ldmatrix_transposed(fragment_b", "ldmatrix(fragment_b"),
    ],
    ids=[
        "no wait",
        "wait behind the barrier",
        "a group short",
        "no barrier",
        "lanes",
        "no transpose",
    ],
)
def test_broken_product_is_wrong(old: str, new: str) -> None:
    """In one of the two orders."""
    lib = compiled(replaced(FRAGMENTS, old, new))
    assert not max(product_error(lib, "product_f16", 152, 1, reverse) for reverse in (False, True)) <= 1e-3


# --- what a GPU leaves undefined is an error ----------------------------------------------------------


ERRORS = {
    "early return": (
        "if (threadIdx.x >= 40) return;\n__syncthreads();",
        r"waits at the barrier of test.cu:\d+, but thread \d+ has returned",
    ),
    "divergent barrier": (
        "if (threadIdx.x < 40) {\n__syncthreads();\n} else {\n__syncthreads();\n}",
        r"waits at the barrier of test.cu:[46], but thread \d+ waits at the barrier of test.cu:[46]",
    ),
    "lanes missing": (
        "if (threadIdx.x % 32 < 20)\nout[0] = __shfl_xor_sync(ALL_LANES, 1.0f, 1);",
        r"waits at the warp operation of test.cu:4, but thread \d+ has returned",
    ),
    "different warp operations": (
        "float v = threadIdx.x % 2 ?\n__shfl_xor_sync(ALL_LANES, 1.0f, 2) :\n__shfl_xor_sync(ALL_LANES, 2.0f, 2);\n"
        "out[threadIdx.x] = v;",
        r"waits at the warp operation of test.cu:\d, but thread \d+ waits at the warp operation",
    ),
    "lane not in its mask": (
        "__syncwarp(0xffffu);",
        r"thread \d+ is not in the mask 0x0000ffff of its warp operation of test.cu:3",
    ),
    "value of a lane outside the mask": (
        "if (threadIdx.x % 32 < 16)\nout[0] = __shfl_xor_sync(0xffffu, 1.0f, 16);",
        r"reads from lane \d+, which is not in the mask",
    ),
    "barrier beside a warp operation": (
        "if (threadIdx.x < 7)\n__syncthreads();\nelse\n__syncwarp();",
        r"waits at the warp operation of test.cu:6, but thread \d waits at the barrier of test.cu:4",
    ),
    "misaligned access": (
        "float v[4];\nload<4>(out + 1, v);\nout[0] = v[0];",
        r"misaligned access of 16 bytes",
    ),
    "copy to the wrong memory": (
        "cp_async_16(out, out);",
        r"cp_async_16 in test.cu:3 needs 16-byte aligned addresses, the first in shared memory",
    ),
    "tile in the wrong memory": (
        "u32 f[4];\nldmatrix(f, out);",
        r"ldmatrix in test.cu:4 needs a 16-byte aligned row in shared memory",
    ),
    "shared memory too small": (
        "DYNAMIC_SHARED(float, s);\ns[threadIdx.x] = 1.0f;",
        r"past the end of the 128 bytes of dynamic shared memory",
    ),
}


@ORDERS
@pytest.mark.parametrize("name", ERRORS)
def test_undefined_behaviour_is_an_error(name: str, reverse: bool) -> None:
    body, message = ERRORS[name]
    lib = kernel(body)
    for _ in range(2):  # the second launch finds everything as the first did
        with pytest.raises(KernelError, match=message):
            launch(lib, "test", 64, np.zeros(64, np.float32), shared=128, reverse=reverse)


def test_block_of_half_a_warp() -> None:
    """A full mask names lanes that are not there."""
    with pytest.raises(KernelError, match="lanes that the block of 16 threads does not have"):
        launch(kernel("__syncwarp();"), "test", 16, np.zeros(1, np.float32))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((np.zeros(4, np.float32), np.int64(4)), "takes 3 arguments, got 2"),
        (
            (np.zeros(4, np.float32), np.int32(4), np.float32(1)),
            "argument 1 is int32, the parameter is int64",
        ),
        ((np.zeros(4, np.float32), 4, np.float32(1)), "argument 1 is int, the parameter is int64"),
        (
            (np.zeros(4, np.float32), np.int64(4), np.float64(1)),
            "argument 2 is float64, the parameter is float32",
        ),
        ((np.int64(0), np.int64(4), np.float32(1)), "argument 0 is int64, the parameter is a pointer"),
    ],
)
def test_arguments_are_checked(args: tuple[Any, ...], message: str) -> None:
    lib = kernel("out[0] = scale;", "float* out, i64 n, float scale")
    with pytest.raises(KernelError, match=message):
        launch(lib, "test", 1, *args)


def test_unknown_kernel() -> None:
    with pytest.raises(KernelError, match=r"there is no kernel other"):
        launch(kernel("out[0] = 1.0f;"), "other", 1, np.zeros(1, np.float32))


def test_launch_bounds() -> None:
    with pytest.raises(KernelError, match="product_f16: 96 threads, launch bounds 64"):
        launch(compiled(FRAGMENTS), "product_f16", 96)


def test_messages_of_the_compiler() -> None:
    with pytest.raises(build.CompileError, match=r"test\.cu:3.*undefined"):
        kernel("undefined();")


# --- broken copies of a real kernel -------------------------------------------------------------------

FIRST_BARRIER = "  __syncthreads();\n#pragma unroll"
LAST_BARRIER = "  __syncthreads();  // `partial` is free again\n"


def softmax_error(code: str, cols: int, reverse: bool) -> float:
    x = scores(3, cols)
    out = np.full_like(x, np.nan)
    (launch,) = softmax.launches(x, 1.0, None, out)
    Library(build.build(code)).launch(launch, reverse)
    return relative_error(out, reference.softmax(x))


def test_removed_barrier_is_caught() -> None:
    """Teams of several warps go wrong in one of the two orders; a single warp needs no barrier."""
    source = _source.source("softmax")
    broken = replaced(source, FIRST_BARRIER, "#pragma unroll")
    assert max(softmax_error(source, 4096, reverse) for reverse in (False, True)) <= 1e-6
    assert not max(softmax_error(broken, 4096, reverse) for reverse in (False, True)) <= 1e-2
    assert max(softmax_error(broken, 384, reverse) for reverse in (False, True)) <= 1e-6


def test_removed_last_barrier_is_caught() -> None:
    """A second reduction of the same kind would write over the first one's shared memory."""
    text = """#include "reduce.cuh"
    extern "C" __global__ void test(const float* x, float* out) {
      float first = team_sum(x[threadIdx.x], blockDim.x);
      out[threadIdx.x] = first + team_sum(2.0f * x[threadIdx.x], blockDim.x);
    }"""
    source = _source.expand("test.cu", text)
    x = np.ones(128, np.float32)
    for code, right in ((source, True), (replaced(source, LAST_BARRIER, ""), False)):
        out = [np.empty(128, np.float32) for _ in range(2)]
        for i in range(2):
            launch(Library(build.build(code)), "test", 128, x, out[i], reverse=bool(i))
        assert all((o == 384).all() for o in out) == right


def test_conditional_barrier_is_caught() -> None:
    source = replaced(_source.source("softmax"), LAST_BARRIER, "  if (warp == 0) __syncthreads();\n")
    with pytest.raises(KernelError, match=r"waits at the barrier of reduce.cuh:\d+, but thread \d+ waits at"):
        softmax_error(source, 4096, reverse=False)


def test_misaligned_rows_are_caught() -> None:
    """A launch that takes rows for aligned which are not."""
    x = scores(1, 385)[0, 1:].reshape(1, 384)
    (launch,) = softmax.launches(x, 1.0, None, np.empty((1, 384), np.float32))
    with pytest.raises(KernelError, match="misaligned access of 16 bytes"):
        library("softmax").launch(replace(launch, entry="softmax_f32_16"))


OFF_BY_ONE = {
    "a column too many": ("if (col < end) store", "if (col <= end) store"),
    "a row too many": ("i64 end = row < p.rows ? cols : 0;", "i64 end = row <= p.rows ? cols : 0;"),
    "the reader": (
        "if (col < end) {\n      load<VEC>(static_cast<const T*>(p.x)",
        "if (col <= end) {\n      load<VEC>(static_cast<const T*>(p.x)",
    ),
}


@pytest.mark.parametrize("name", OFF_BY_ONE)
def test_address_sanitizer_catches_an_index_off_by_one(name: str, tmp_path: Path) -> None:
    broken = tmp_path / "softmax.txt"
    broken.write_text(replaced(_source.source("softmax"), *OFF_BY_ONE[name]))
    done = sanitized.run("--source", str(broken), "softmax")
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr


@pytest.mark.parametrize("op", sorted(op for op in registry.OPS if _source.has(op)))
def test_no_kernel_leaves_its_arrays(op: str) -> None:
    """Every case of every op that has a source, under AddressSanitizer."""
    done = sanitized.run(op)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == [op, str(len(CASES[op].cases))]


def test_executor_is_put_back() -> None:
    before = _execute._executor
    with pytest.raises(ZeroDivisionError), _execute.executor(HostExecutor()):
        raise ZeroDivisionError
    assert _execute._executor is before


# --- pairs of float16 ---------------------------------------------------------------------------------


def test_pairs_of_float16() -> None:
    """Each result is rounded once, as NumPy rounds a float64 result to float16."""
    a, b, c = (scores(3, 64).astype(np.float16) * np.float16(3)).reshape(3, 64)
    out = np.zeros((4, 64), np.float16)
    body = """
    int t = threadIdx.x;
    out[t] = add_f16x2(a[t], b[t]);
    out[32 + t] = mul_f16x2(a[t], b[t]);
    out[64 + t] = fma_f16x2(a[t], b[t], c[t]);
    out[96 + t] = clamp_f16x2(a[t], b[t] & 0x7fff7fffu);"""
    lib = kernel(body, "const u32* a, const u32* b, const u32* c, u32* out")
    launch(lib, "test", 32, *(v.view(np.uint32) for v in (a, b, c, out)))
    x, y, z = (v.astype(np.float64) for v in (a, b, c))
    expected = np.stack([x + y, x * y, x * y + z, np.clip(x, -abs(y), abs(y))]).astype(np.float16)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_two_at_a_time(bits: int) -> None:
    """All codes of a width: scale * (u - middle) of dense codes, rounded once."""
    codes = np.arange(32 * 8).reshape(8, 32) % 2**bits
    packed = pack(codes.astype(np.uint16), bits)
    scale, out = np.float16(0.0123), np.zeros((8, 32), np.float16)
    body = f"""
    static const u16 scale = {int(scale.view(np.uint16))};
    const f16* scales = reinterpret_cast<const f16*>(&scale);
    Codes c = {{CODES_DENSE, {bits}, 32, 0, value, scales, nullptr, nullptr, nullptr, 0, 32}};
    RunLoader loader;
    loader.begin(c, 0, 1, 0, 32);
    load_run(reinterpret_cast<const u32*>(value) + threadIdx.x * {bits}, {bits}, loader.words);
    loader.scale.bits = scale;
    for (int chunk = 0; chunk < 4; ++chunk) out[threadIdx.x * 4 + chunk] = loader.pairs(c, 0, chunk);"""
    text = '#include "linear.cuh"\nextern "C" __global__ void test(const unsigned char* value, uint4* out) {'
    launch(compiled(f"{text}{body}\n}}\n"), "test", 8, packed, out.view(np.uint32))
    expected = (np.float64(scale) * (codes - (2**bits - 1) / 2)).astype(np.float16)
    np.testing.assert_array_equal(out, expected)

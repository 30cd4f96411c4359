"""Gates on the machine code of the hot loops, and the disassembler that they read it with."""

from __future__ import annotations

from functools import lru_cache

import pytest

from rbe_gpu.gpu import _source

from .host import machine_code
from .host.machine_code import Kernel, blocks_per_sm

# --- the disassembler ---------------------------------------------------------------------------------

SMALL = """#include "types.cuh"
extern "C" __global__ void __launch_bounds__(128) small(const float4* x, float4* y, const int* table, int n) {
  float4 sum = {};
  // hot: sum
  for (int i = threadIdx.x; i < n; i += 128) {
    float4 v = x[i];
    // hot: chain
    for (int j = i; j >= 0; j = table[j]) {
      v.x = v.x * 1.5f + v.y;
    }
    sum.x += v.x;
    sum.y += v.y;
    sum.z += v.z;
    sum.w += v.w;
  }
  // hot: store
  y[threadIdx.x] = sum;
}
extern "C" __global__ void indexed(float* y, int n) {
  float v[20];
  for (int i = 0; i < 20; ++i) v[i] = y[i];
  for (int i = 0; i < n; ++i) v[i % 20] += v[(i + 7) % 20];
  for (int i = 0; i < 20; ++i) y[i] = v[i];
}
"""


@lru_cache
def small() -> dict[str, Kernel]:
    return machine_code.kernels_of(_source.expand("small.cu", SMALL), 90)


def test_regions_and_loops() -> None:
    kernel = small()["small"]
    body, chain, store = kernel.loop("sum"), kernel.loop("chain"), kernel.region("store")
    assert (body.depth, chain.depth) == (0, 1)
    assert set(chain.instructions) < set(body.instructions)
    assert [i.bits for i in body.of(r"LDG\.E\.128")] == [128]
    assert not chain.count(r"LDG\.E\.128")
    assert chain.count("LDG") >= 1
    assert [i.bits for i in store.of("STG")] == [128]
    assert kernel.innermost("FFMA").of("FFMA")
    assert set(kernel.innermost("FFMA").instructions) < set(body.instructions)


def test_first_use() -> None:
    """The loaded numbers are used once the chain of table reads is done, and a loop wraps around."""
    kernel = small()["small"]
    body = kernel.loop("sum")
    (load,) = body.of(r"LDG\.E\.128")
    assert len(load.writes) == 4
    distance = body.first_use(load)
    assert distance is not None
    at = body.instructions.index(load)
    assert body.instructions[(at + distance) % len(body)].reads & load.writes
    assert body.between(load, distance + 1, r"FFMA|FADD|BRA|F.*") >= 1


def test_registers_of_wide_operands() -> None:
    (store,) = small()["small"].region("store").of("STG")
    assert not store.writes
    assert len(store.reads) == 6  # an address of 64 bits and four values


def test_local_memory_is_seen() -> None:
    kernels = small()
    assert kernels["indexed"].local > 0
    assert kernels["indexed"].usage.stack >= 80
    assert kernels["small"].local == 0


@pytest.mark.parametrize(
    "text", [SMALL.replace("// hot: sum", "//"), SMALL.replace("hot: store", "hot: sum")]
)
def test_a_name_that_is_missing_or_ambiguous(text: str) -> None:
    kernel = machine_code.kernels_of(_source.expand("small.cu", text), 90)["small"]
    with pytest.raises(KeyError, match="there must be one"):
        kernel.region("sum")


def test_a_region_in_another_kernel() -> None:
    with pytest.raises(
        KeyError, match=r"indexed has no code of the statement marked `// hot: sum` in small\.cu"
    ):
        small()["indexed"].region("sum")
    with pytest.raises(KeyError, match="no loop"):
        small()["small"].loop("store")


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "architecture", "blocks"),
    [
        (255, 128, 0, 90, 2),  # 65536 / (256 x 128)
        (168, 128, 0, 90, 3),
        (169, 128, 0, 90, 2),
        (64, 512, 0, 90, 2),
        (65, 512, 0, 90, 1),
        (32, 1024, 0, 90, 2),
        (32, 1024, 0, 86, 1),  # 48 warps
        (16, 32, 0, 90, 32),
        (128, 128, 56 << 10, 90, 4),  # of 228 KB, and 1 KB a block reserved
        (128, 128, 57 << 10, 90, 3),
        (128, 128, 32 << 10, 75, 2),
        (128, 128, 64 << 10, 75, 1),
    ],
)
def test_blocks_per_sm(registers: int, threads: int, shared: int, architecture: int, blocks: int) -> None:
    assert blocks_per_sm(registers, threads, shared, architecture) == blocks

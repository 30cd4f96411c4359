"""wgmma in the host build: matmuls of operands in every layout of the PTX ISA, and what a GPU leaves undefined.

Layouts are written down here as the ISA's table of canonical layouts has them, in the notation of CuTe: nested shapes
and strides, then a swizzle of the byte's address. The host build computes places by arithmetic of its own.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest

from rbe_gpu.gpu import _source

from .host import build
from .host.executor import KernelError, Library

SOURCE = """
#include "async_copy.cuh"
#include "wgmma.cuh"

// c (64 x 128) = a b, of operands in a tile that begins at a multiple of 1024 bytes; where `words`, a is in registers
extern "C" __global__ void __launch_bounds__(128)
product(const uint4* tile, int chunks, u64 a, u64 b, const u32* words, float* c) {
  DYNAMIC_SHARED(uint4, memory);
  uint4* to = memory + (1024 - shared_address(memory) % 1024) % 1024 / 16;
  for (int i = threadIdx.x; i < chunks; i += 128) cp_async_16(to + i, tile + i);
  cp_async_commit();
  cp_async_wait<0>();
  fence_proxy_async();
  __syncthreads();
  float d[2][16][2];
  u32 fragment[4] = {};
  if (words) {
    for (int r = 0; r < 4; ++r) fragment[r] = words[4 * threadIdx.x + r];
    for (int r = 0; r < 64; ++r) d[r / 32][r / 2 % 16][r % 2] = 0.0f;
    wgmma_fence();
    wgmma_columns<f16>(d, fragment, b + (shared_address(to) >> 4));
  } else {
    wgmma_fence();
    wgmma_rows<f16>(d, a + (shared_address(to) >> 4), b + (shared_address(to) >> 4), false);
  }
  wgmma_commit();
  wgmma_wait<0>();
  int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
  for (int r = 0; r < 2; ++r) {
    for (int n = 0; n < 16; ++n) {
      for (int e = 0; e < 2; ++e) c[(row + 8 * r) * 128 + 8 * n + lane % 4 * 2 + e] = d[r][n][e];
    }
  }
}
"""
T = 8  # halves of 16 bytes
#: By bytes of a row of the pattern: the code in a descriptor.
MODES = {16: 0, 128: 1, 64: 2, 32: 3}
SPACE = 1 << 16  # bytes of an operand
Distances = tuple[int, int]  # leading and stride, in bytes


@lru_cache
def lib() -> Library:
    return Library(build.build(_source.expand("test.cu", SOURCE)))


def descriptor(start: int, distances: Distances, width: int) -> np.uint64:
    leading, stride = distances
    return np.uint64(start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | MODES[width] << 62)


def layout(shape: list[int], stride: list[int], i: np.ndarray) -> np.ndarray:
    """Offset of coordinate i of a nested mode: its first part changes fastest."""
    offset = np.zeros_like(i)
    for size, step in zip(shape, stride, strict=True):
        offset += i % size * step
        i = i // size
    return offset


def places(lines: int, width: int, distances: Distances, by_lines: bool) -> np.ndarray:
    """Byte of each of (lines, 16) elements, by_lines: MN-major."""
    line, k = np.arange(lines)[:, None], np.arange(16)[None]
    leading, stride = (distance // 2 for distance in distances)  # in elements
    x = width // 16
    many = 1 << 20
    if by_lines and x == 1:  # ((T,1,m),(8,k)):((1,T,SBO),(1T,LBO))
        offset = layout([T, 1, many], [1, T, stride], line) + layout([8, many], [T, leading], k)
    elif by_lines:  # ((T,x,m),(8,k)):((1,T,LBO),(xT,SBO))
        offset = layout([T, x, many], [1, T, leading], line) + layout([8, many], [x * T, stride], k)
    elif x == 1:  # ((8,m),(T,2k)):((1T,SBO),(1,LBO))
        offset = layout([8, many], [T, stride], line) + layout([T, many], [1, leading], k)
    else:  # ((8,m),(T,2k)):((xT,SBO),(1,T))
        offset = layout([8, many], [x * T, stride], line) + layout([T, many], [1, T], k)
    address = 2 * offset
    bits = {16: 0, 32: 1, 64: 2, 128: 3}[width]  # Swizzle<bits,4,3>
    return address ^ ((address & ((1 << bits) - 1) << 7) >> 3)


def stored(values: np.ndarray, place: np.ndarray) -> np.ndarray:
    """An operand in `SPACE` bytes, NaN where nothing of it is."""
    space = np.full(SPACE // 2, np.nan, np.float16)
    assert len(set(place.ravel().tolist())) == place.size
    space[place // 2] = values
    return space


def operands() -> tuple[np.ndarray, np.ndarray]:
    """Small integers, so that sums are exact: (64, 16) and (128, 16), both with k last."""
    generator = np.random.default_rng(3)
    a, b = (generator.integers(-8, 9, (lines, 16)).astype(np.float16) for lines in (64, 128))
    return a, b


def distances_of(width: int, by_lines: bool) -> Distances:
    """Larger than the patterns between them."""
    pattern = 8 * width
    if width == 16:
        return (8192, 256) if by_lines else (4096, 256)
    return (4 * pattern, 2 * pattern) if by_lines else (16, 2 * pattern)


@pytest.mark.parametrize("reverse", [False, True], ids=["ascending", "descending"])
@pytest.mark.parametrize("width", MODES)
@pytest.mark.parametrize("of_a", [*MODES, None])
def test_every_layout(width: int, of_a: int | None, reverse: bool) -> None:
    """b K-major beside a in shared memory, MN-major beside a in registers (None)."""
    a, b = operands()
    by_lines = of_a is None
    distances = distances_of(width, by_lines)
    tile, words, first = stored(b, places(128, width, distances, by_lines)), None, np.uint64(0)
    if of_a is None:
        thread, r = np.divmod(np.arange(512), 4)  # register r of a thread: row, and columns c and c + 1
        row = thread // 32 * 16 + thread % 32 // 4 + r % 2 * 8
        column = thread % 4 * 2 + r // 2 * 8
        words = np.stack([a[row, column], a[row, column + 1]], axis=-1).view(np.uint32).ravel()
    else:
        of = distances_of(of_a, False)
        tile = np.concatenate([tile, stored(a, places(64, of_a, of, False))])
        first = descriptor(SPACE, of, of_a)
    c = np.full((64, 128), np.nan, np.float32)
    arguments = tile, np.int32(tile.nbytes // 16), first, descriptor(0, distances, width), words, c
    lib().run("product", (1, 1, 1), (128, 1, 1), *arguments, shared=2 * SPACE + 1024, reverse=reverse)
    np.testing.assert_array_equal(c, a.astype(np.float32) @ b.astype(np.float32).T)


@pytest.mark.parametrize(
    ("b", "message"),
    [
        (1 << 49 | 1 << 62, "has bits beside the start, both distances and the swizzle"),
        (1 << 14 | 1 << 62, "has bits beside the start, both distances and the swizzle"),
        (0x3000 | 1 << 62, "reads address [0-9]+ of shared memory, which has 2048 bytes"),
    ],
)
def test_descriptors_that_are_none(b: int, message: str) -> None:
    words, c = np.zeros(512, np.uint32), np.zeros((64, 128), np.float32)
    arguments = np.zeros(16, np.float16), np.int32(2), np.uint64(0), np.uint64(b), words, c
    with pytest.raises(KernelError, match=message):
        lib().run("product", (1, 1, 1), (128, 1, 1), *arguments, shared=2048)

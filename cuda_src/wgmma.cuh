// Tensor cores of Hopper: matmuls by a warpgroup, 128 threads, of tiles in shared memory (wgmma.mma_async). Only code that
// is compiled for sm_90a has them.
//
// d (64 x N) = a (64 x 16) b (16 x N) [+ d]. Fragments are those of mma.sync (mma.cuh): warp w of the warpgroup has the
// rows 16 w to 16 w + 15, and d[r][n] holds the row 8 r + lane / 4 of them, columns 8 n + 2 (lane % 4) and the next. What
// is issued runs when it likes: d, the registers of a and the tiles must not be touched before wgmma_wait says that their
// group is done, and wgmma_fence stands between other uses of those registers and the next matmul.
//
// A tile is stored in panels of 64 columns. A row of a panel is 128 bytes, and its chunks of 16 bytes stand at their place
// xor row % 8: the 128-byte swizzle, whose pattern repeats every 1024 bytes, where a panel must begin.
#include "types.cuh"

constexpr int PANEL = 64;             // columns of half types
constexpr int PANEL_ROW = 128;        // bytes
constexpr int SWIZZLE_BYTES = 1024;   // 8 rows of a panel
constexpr u64 SWIZZLE_128 = 1ull << 62;

// Places in shared memory are told to wgmma in units of 16 bytes.
__device__ __forceinline__ u64 matrix_descriptor(u32 start, u32 leading, u32 stride) {
  return (start >> 4 & 0x3fff) | static_cast<u64>(leading >> 4) << 16 | static_cast<u64>(stride >> 4) << 32 |
         SWIZZLE_128;
}

// Rows from `start` on, 16 columns of them: an operand whose rows run along the sum (a of q k^T, and k). The next 8 rows
// are SWIZZLE_BYTES further on; the other distance is not read.
__device__ __forceinline__ u64 rows_descriptor(u32 start) { return matrix_descriptor(start, 16, SWIZZLE_BYTES); }

// 16 rows from `start` on, all columns: an operand whose columns run along the results (v), with ROWS rows a panel.
template <int ROWS>
__device__ __forceinline__ u64 columns_descriptor(u32 start) {
  return matrix_descriptor(start, ROWS * PANEL_ROW, SWIZZLE_BYTES);
}

#ifndef RBE_HOST

// What this thread wrote to shared memory by cp.async or stores becomes visible to wgmma, after a barrier to that of others.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes the group of the matmuls issued since the last commit.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most the last GROUPS committed groups are in flight.
template <int GROUPS>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
}

// Keeps the compiler from moving uses of registers across a wait: it does not know that wgmma goes on writing them.
template <int N>
__device__ __forceinline__ void settled(float (&d)[2][N][2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int n = 0; n < N; ++n) asm volatile("" : "+f"(d[r][n][0]), "+f"(d[r][n][1])::"memory");
  }
}
template <int K>
__device__ __forceinline__ void settled(u32 (&a)[K][4]) {
#pragma unroll
  for (int k = 0; k < K; ++k) asm volatile("" : "+r"(a[k][0]), "+r"(a[k][1]), "+r"(a[k][2]), "+r"(a[k][3])::"memory");
}

// wgmma_rows: a and b of shared memory, by rows_descriptor; adds to d where `add`.
// wgmma_columns: d += a b, a in registers (as mma_16x8x16), b by columns_descriptor.
template <class T>
__device__ __forceinline__ void wgmma_rows(float (&d)[2][8][2], u64 a, u64 b, bool add);
template <class T>
__device__ __forceinline__ void wgmma_rows(float (&d)[2][16][2], u64 a, u64 b, bool add);
template <class T>
__device__ __forceinline__ void wgmma_columns(float (&d)[2][8][2], const u32 (&a)[4], u64 b);
template <class T>
__device__ __forceinline__ void wgmma_columns(float (&d)[2][16][2], const u32 (&a)[4], u64 b);

#define SUMS_32                                                                                                        \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, " \
  "%25, %26, %27, %28, %29, %30, %31"
#define SUMS_64                                                                                                      \
  SUMS_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, "   \
          "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SUM_OF(n) "+f"(d[0][n][0]), "+f"(d[0][n][1]), "+f"(d[1][n][0]), "+f"(d[1][n][1])
#define OPERANDS_8 SUM_OF(0), SUM_OF(1), SUM_OF(2), SUM_OF(3), SUM_OF(4), SUM_OF(5), SUM_OF(6), SUM_OF(7)
#define OPERANDS_16                                                                                                \
  OPERANDS_8, SUM_OF(8), SUM_OF(9), SUM_OF(10), SUM_OF(11), SUM_OF(12), SUM_OF(13), SUM_OF(14), SUM_OF(15)

// The numbers behind the sums: %s0 to %s4 are the operands after them.
#define WGMMA(T, type, columns, N, sums, s0, s1, s2, s3, s4)                                                       \
  template <>                                                                                                      \
  __device__ __forceinline__ void wgmma_rows<T>(float (&d)[2][N][2], u64 a, u64 b, bool add) {                     \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " s2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #columns     \
                 "k16.f32." #type "." #type " " sums "}, " s0 ", " s1 ", add, 1, 1, 0, 0;\n}"                      \
                 : OPERANDS_##N                                                                                    \
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                                    \
  }                                                                                                                \
  template <>                                                                                                      \
  __device__ __forceinline__ void wgmma_columns<T>(float (&d)[2][N][2], const u32 (&a)[4], u64 b) {                \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." #type "." #type " " sums "}, {" s0 ", " s1 \
                 ", " s2 ", " s3 "}, " s4 ", 1, 1, 1, 1;"                                                          \
                 : OPERANDS_##N                                                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                            \
  }
WGMMA(f16, f16, 64, 8, SUMS_32, "%32", "%33", "%34", "%35", "%36")
WGMMA(f16, f16, 128, 16, SUMS_64, "%64", "%65", "%66", "%67", "%68")
WGMMA(bf16, bf16, 64, 8, SUMS_32, "%32", "%33", "%34", "%35", "%36")
WGMMA(bf16, bf16, 128, 16, SUMS_64, "%64", "%65", "%66", "%67", "%68")

#endif  // RBE_HOST

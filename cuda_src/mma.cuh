// Tensor cores: ldmatrix, and tile matmuls by one warp (mma.sync).
#include "types.cuh"

// Two int8, the lower byte first. A fragment of 8 x 8 of them is one of 8 x 16 int8, so that tiles, ldmatrix and fragments
// are those of f16, with half as many columns.
struct s8x2 {
  u16 bits;
};

#ifndef RBE_HOST

// N = 1, 2 or 4 matrices of 8 x 8 half values from shared memory. Lane 8m + r gives the address of row r of
// matrix m (16 bytes, aligned); lane l receives elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of matrix m
// in fragment[m]. All lanes give a valid address, those from 8 N on of any row.
template <int N>
__device__ __forceinline__ void ldmatrix(u32 (&fragment)[N], const void* row) {
  static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4 matrices");
  u32 at = shared_address(row);
  if constexpr (N == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(fragment[0]) : "r"(at) : "memory");
  } else if constexpr (N == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(at)
                 : "memory");
  }
}

// The same of the transposed matrices: lane l receives rows 2 (l % 4) and 2 (l % 4) + 1 of column l / 4.
template <int N>
__device__ __forceinline__ void ldmatrix_transposed(u32 (&fragment)[N], const void* row) {
  static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4 matrices");
  u32 at = shared_address(row);
  if constexpr (N == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(fragment[0])
                 : "r"(at)
                 : "memory");
  } else if constexpr (N == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(at)
                 : "memory");
  }
}

// c (16 x 8) += a (16 x 8) b (8 x 8) of f16; the fragments are the first halves of those of mma_16x8x16.
__device__ __forceinline__ void mma_16x8x8_f16(float (&c)[4], u32 a0, u32 a1, u32 b0) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(b0));
}

#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ void mma_16x8x16_f16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_16x8x16_bf16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// d = c + a b of int8, a: (16, 32), b: (32, 8), sums modulo 2^32. d may be c.
__device__ __forceinline__ void mma_16x8x32_s8(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2], const int (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}
#else
// d = c + a b of int8, a: (8, 16), b: (16, 8): the first quarter of the fragments below.
__device__ __forceinline__ void mma_8x8x16_s8(int& d0, int& d1, u32 a, u32 b, int c0, int c1) {
  asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%4, %5};"
               : "=r"(d0), "=r"(d1)
               : "r"(a), "r"(b), "r"(c0), "r"(c1));
}
#endif

#endif  // RBE_HOST

#if defined(RBE_HOST) || __CUDA_ARCH__ < 800
// mma_16x8x32_s8 by four of 8 x 8 x 16.
__device__ __forceinline__ void mma_16x8x32_s8_in_quarters(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2],
                                                           const int (&c)[4]) {
  int half[4];
  mma_8x8x16_s8(half[0], half[1], a[0], b[0], c[0], c[1]);
  mma_8x8x16_s8(half[2], half[3], a[1], b[0], c[2], c[3]);
  mma_8x8x16_s8(d[0], d[1], a[2], b[1], half[0], half[1]);
  mma_8x8x16_s8(d[2], d[3], a[3], b[1], half[2], half[3]);
}
#endif
#if !defined(RBE_HOST) && __CUDA_ARCH__ < 800
__device__ __forceinline__ void mma_16x8x32_s8(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2], const int (&c)[4]) {
  mma_16x8x32_s8_in_quarters(d, a, b, c);
}
#endif

// With g = lane / 4 and t = lane % 4 the fragments of c (16 x 8) += a (16 x 16) b (16 x 8) are
//   a[0] = a(g, 2t..2t+1)   a[1] = a(g+8, 2t..)   a[2] = a(g, 2t+8..)   a[3] = a(g+8, 2t+8..)
//   b[0] = b(2t..2t+1, g)   b[1] = b(2t+8.., g)
//   c[0], c[1] = c(g, 2t..2t+1)   c[2], c[3] = c(g+8, 2t..2t+1)
// so ldmatrix of the four 8 x 8 quarters of row-major a gives a[0], a[1] (rows 8 on), a[2] (columns 8 on), a[3];
// ldmatrix of b stored by columns (n, k) gives b[0], b[1]; ldmatrix_transposed gives them from row-major (k, n).

// The same by shuffles and float arithmetic, where tensor cores lack the type. Slow.
template <class T>
__device__ void mma_by_shuffles(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  int lane = threadIdx.x % WARP;
  int row = lane & ~3, first = 8 * (lane % 4);  // lanes of row g; lane of column 2t
  for (int t = 0; t < 4; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // k = 2t, 2t+1, then 2t+8, 2t+9
      float u0, u1, v0, v1, x0, x1, y0, y1;
      unpack<T>(__shfl_sync(ALL_LANES, a[2 * half], row + t), u0, u1);
      unpack<T>(__shfl_sync(ALL_LANES, a[2 * half + 1], row + t), v0, v1);
      unpack<T>(__shfl_sync(ALL_LANES, b[half], first + t), x0, x1);
      unpack<T>(__shfl_sync(ALL_LANES, b[half], first + 4 + t), y0, y1);
      c[0] = fmaf(u1, x1, fmaf(u0, x0, c[0]));
      c[1] = fmaf(u1, y1, fmaf(u0, y0, c[1]));
      c[2] = fmaf(v1, x1, fmaf(v0, x0, c[2]));
      c[3] = fmaf(v1, y1, fmaf(v0, y0, c[3]));
    }
  }
}

template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]);
template <>
__device__ __forceinline__ void mma_16x8x16<f16>(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if defined(RBE_HOST) || __CUDA_ARCH__ >= 800
  mma_16x8x16_f16(c, a, b);
#else  // 7.5: two steps of k = 8
  mma_16x8x8_f16(c, a[0], a[1], b[0]);
  mma_16x8x8_f16(c, a[2], a[3], b[1]);
#endif
}
template <>
__device__ __forceinline__ void mma_16x8x16<bf16>(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if defined(RBE_HOST) || __CUDA_ARCH__ >= 800
  mma_16x8x16_bf16(c, a, b);
#else
  mma_by_shuffles<bf16>(c, a, b);
#endif
}

// The sums of a tile matmul of T.
template <class T>
struct Sums {
  using type = float;
};
template <>
struct Sums<s8x2> {
  using type = int;
};
template <class T>
constexpr bool IS_S8X2 = false;
template <>
constexpr bool IS_S8X2<s8x2> = true;

template <class T>
__device__ __forceinline__ void mma_16x8x16(int (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  static_assert(IS_S8X2<T>, "integer sums are those of int8");
  mma_16x8x32_s8(c, a, b, c);
}

// Whether mma_16x8x16 of T has tensor cores to run on.
template <class T>
constexpr bool TENSOR_CORES = true;
#if !defined(RBE_HOST) && __CUDA_ARCH__ < 800
template <>
constexpr bool TENSOR_CORES<bf16> = false;
#endif

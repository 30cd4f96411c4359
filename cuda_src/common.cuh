// What every kernel shares: types and conversions, 16-byte accesses, reductions over a row's threads, and the
// wrappers of what only a GPU has (barriers, shuffles, shared memory, cp.async, ldmatrix, mma.sync).
//
// A source includes this file and nothing else, and needs no CUDA header: half types are bit patterns here, and
// their conversions are PTX. Under RBE_HOST the same sources are compiled by a C++ compiler for the tests;
// then "device.hpp" of the host build stands in for the wrappers, with threads as fibers.
//
// Rules for kernels: every thread of a block reaches every barrier; every lane named by a mask reaches the
// shuffle; offsets into arrays are i64; sums are float.

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

struct f16 {
  u16 bits;
};
struct bf16 {
  u16 bits;
};

constexpr int WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;
constexpr int MAX_WARPS = 32;      // of a block
constexpr int VECTOR_BYTES = 16;   // the widest access of one thread
constexpr float MINUS_INF = __builtin_bit_cast(float, 0xff800000u);
constexpr float LOWEST = -3.402823466e+38f;  // the smallest finite float

// The dtype of an array that may differ from x's (gains, biases), as the launchers pass it.
constexpr int TYPE_F32 = 0;
constexpr int TYPE_F16 = 1;
constexpr int TYPE_BF16 = 2;

#ifdef RBE_HOST
#include "device.hpp"
#else

#if __CUDA_ARCH__ < 750
#error "compute capability 7.5 or newer is needed"
#endif

// name: T*, the dynamic shared memory of the launch, 16-byte aligned
#define DYNAMIC_SHARED(T, name)                                       \
  extern __shared__ __align__(16) unsigned char rbe_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(rbe_dynamic_shared)

// On the host: an error unless p is a multiple of `bytes`.
#define CHECK_ALIGNED(p, bytes)

__device__ __forceinline__ u32 shared_address(const void* p) {
  return static_cast<u32>(__cvta_generic_to_shared(p));
}

// --- half types: f16 and bf16 to float and back, rounding to nearest even ---------------------------------

__device__ __forceinline__ float f16_value(u16 bits) {
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
  return v;
}

__device__ __forceinline__ u16 f16_bits(float v) {
  u16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
  return h;
}

__device__ __forceinline__ u16 bf16_bits(float v) {
#if __CUDA_ARCH__ >= 800
  u16 h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(v));
  return h;
#else
  u32 b = __float_as_uint(v);
  return v != v ? 0x7fff : static_cast<u16>((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
#endif
}

// Two f16 in a word, the lower half first.
__device__ __forceinline__ void unpack_f16(u32 word, float& low, float& high) {
  asm("{\n .reg .b16 l, h;\n mov.b32 {l, h}, %2;\n cvt.f32.f16 %0, l;\n cvt.f32.f16 %1, h;\n}"
      : "=f"(low), "=f"(high)
      : "r"(word));
}

__device__ __forceinline__ u32 pack_f16(float low, float high) {
#if __CUDA_ARCH__ >= 800
  u32 word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return f16_bits(low) | static_cast<u32>(f16_bits(high)) << 16;
#endif
}

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
#if __CUDA_ARCH__ >= 800
  u32 word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return bf16_bits(low) | static_cast<u32>(bf16_bits(high)) << 16;
#endif
}

// --- asynchronous copies, global to shared memory ----------------------------------------------------------

// 16 bytes; both addresses are multiples of 16. Where `valid` is false zeros are written and nothing is read.
// The bytes are there for this thread after cp_async_wait, for the others after a barrier behind it.
// Compute capability 7.5 has no such copy and waits at once.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid = true) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(shared) = valid ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
#endif
}

// Closes the group of the copies begun since the last commit.
__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the last GROUPS committed groups of this thread are under way.
template <int GROUPS>
__device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
#endif
}

// --- tensor cores ------------------------------------------------------------------------------------------

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
#endif

#endif  // RBE_HOST

// --- conversions -------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float v) { return v; }

__device__ __forceinline__ float to_float(f16 h) { return f16_value(h.bits); }

__device__ __forceinline__ float to_float(bf16 h) { return __uint_as_float(static_cast<u32>(h.bits) << 16); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float v) {
  return {f16_bits(v)};
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float v) {
  return {bf16_bits(v)};
}

// Two values of T (f16 or bf16) in a word, the lower half first.
template <class T>
__device__ __forceinline__ void unpack(u32 word, float& low, float& high);
template <>
__device__ __forceinline__ void unpack<f16>(u32 word, float& low, float& high) {
  unpack_f16(word, low, high);
}
template <>
__device__ __forceinline__ void unpack<bf16>(u32 word, float& low, float& high) {
  low = __uint_as_float(word << 16);
  high = __uint_as_float(word & 0xffff0000u);
}

template <class T>
__device__ __forceinline__ u32 pack(float low, float high);
template <>
__device__ __forceinline__ u32 pack<f16>(float low, float high) {
  return pack_f16(low, high);
}
template <>
__device__ __forceinline__ u32 pack<bf16>(float low, float high) {
  return pack_bf16(low, high);
}

// --- memory ------------------------------------------------------------------------------------------------

// Elements of T in one 16-byte access: 4 of float, 8 of the half types.
template <class T>
constexpr int VECTOR = VECTOR_BYTES / static_cast<int>(sizeof(T));

template <int BYTES>
struct Words;
template <>
struct Words<4> {
  using type = u32;
};
template <>
struct Words<8> {
  using type = uint2;
};
template <>
struct Words<16> {
  using type = uint4;
};

// v = p[0 .. N-1], in accesses of up to 16 bytes. p is aligned to N elements, or to 16 bytes where that is less.
template <int N, class T>
__device__ __forceinline__ void load(const T* p, float (&v)[N]) {
  if constexpr (N * sizeof(T) < 4 || N % 2 == 1) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = to_float(p[i]);
  } else {
    constexpr int BYTES = N * sizeof(T) < VECTOR_BYTES ? N * sizeof(T) : VECTOR_BYTES;
    constexpr int EACH = BYTES / static_cast<int>(sizeof(T));
    using W = typename Words<BYTES>::type;
    CHECK_ALIGNED(p, BYTES);
#pragma unroll
    for (int k = 0; k < N / EACH; ++k) {
      W word = reinterpret_cast<const W*>(p)[k];
      const u32* part = reinterpret_cast<const u32*>(&word);
      if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < EACH; ++i) v[k * EACH + i] = __uint_as_float(part[i]);
      } else {
#pragma unroll
        for (int i = 0; i < EACH / 2; ++i) unpack<T>(part[i], v[k * EACH + 2 * i], v[k * EACH + 2 * i + 1]);
      }
    }
  }
}

// p[0 .. N-1] = v, as `load`.
template <int N, class T>
__device__ __forceinline__ void store(T* p, const float (&v)[N]) {
  if constexpr (N * sizeof(T) < 4 || N % 2 == 1) {
#pragma unroll
    for (int i = 0; i < N; ++i) p[i] = from_float<T>(v[i]);
  } else {
    constexpr int BYTES = N * sizeof(T) < VECTOR_BYTES ? N * sizeof(T) : VECTOR_BYTES;
    constexpr int EACH = BYTES / static_cast<int>(sizeof(T));
    using W = typename Words<BYTES>::type;
    CHECK_ALIGNED(p, BYTES);
#pragma unroll
    for (int k = 0; k < N / EACH; ++k) {
      W word;
      u32* part = reinterpret_cast<u32*>(&word);
      if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < EACH; ++i) part[i] = __float_as_uint(v[k * EACH + i]);
      } else {
#pragma unroll
        for (int i = 0; i < EACH / 2; ++i) part[i] = pack<T>(v[k * EACH + 2 * i], v[k * EACH + 2 * i + 1]);
      }
      reinterpret_cast<W*>(p)[k] = word;
    }
  }
}

// v = p[at .. at + N-1] of a vector along the columns (a gain, a bias), whose dtype is `type`: for N > 1 float or T,
// for N = 1 any of the three, so that kernels that take elements one by one serve every mixture. The branch is the
// same for all threads.
template <int N, class T>
__device__ __forceinline__ void load_vector(const void* p, int type, i64 at, float (&v)[N]) {
  if constexpr (N == 1) {
    u32 bits = type == TYPE_F32 ? static_cast<const u32*>(p)[at] : static_cast<const u16*>(p)[at];
    float wide = __uint_as_float(type == TYPE_F32 ? bits : bits << 16);
    v[0] = type == TYPE_F16 ? f16_value(static_cast<u16>(bits)) : wide;
  } else if (sizeof(T) == sizeof(float) || type == TYPE_F32) {
    load<N>(static_cast<const float*>(p) + at, v);
  } else {
    load<N>(static_cast<const T*>(p) + at, v);
  }
}

// --- reductions --------------------------------------------------------------------------------------------
// A team is the threads that share a row: a part of a warp (1, 2, 4, ... 32 lanes), or the whole block (a
// multiple of 32 threads). Every thread of the block calls these, with equal `team`; every thread of a team
// gets the same bits. With teams of more than a warp each call has two barriers.

struct Add {
  static constexpr float IDENTITY = 0.0f;
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
struct Max {  // NaN is passed over
  static constexpr float IDENTITY = MINUS_INF;
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Each v[i] reduced over the `width` (a power of two) lanes that the lane belongs to.
template <class Op, int N>
__device__ __forceinline__ void warp_reduce(float (&v)[N], int width, Op op) {
  for (int offset = width >> 1; offset > 0; offset >>= 1) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = op(v[i], __shfl_xor_sync(ALL_LANES, v[i], offset));
  }
}

template <class Op, int N>
__device__ __forceinline__ void team_reduce(float (&v)[N], int team, Op op) {
  if (team <= WARP) {
    warp_reduce(v, team, op);
    return;
  }
  __shared__ float partial[N][MAX_WARPS];
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  warp_reduce(v, WARP, op);
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) partial[i][warp] = v[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = lane < team / WARP ? partial[i][lane] : Op::IDENTITY;
  warp_reduce(v, WARP, op);
  __syncthreads();  // `partial` is free again
}

__device__ __forceinline__ float team_sum(float v, int team) {
  float one[1] = {v};
  team_reduce(one, team, Add());
  return one[0];
}

__device__ __forceinline__ float team_max(float v, int team) {
  float one[1] = {v};
  team_reduce(one, team, Max());
  return one[0];
}

__device__ __forceinline__ float warp_sum(float v) {
  float one[1] = {v};
  warp_reduce(one, WARP, Add());
  return one[0];
}

__device__ __forceinline__ float warp_max(float v) {
  float one[1] = {v};
  warp_reduce(one, WARP, Max());
  return one[0];
}

// A float sum of very many values that keeps what each addition rounds off (Knuth's two-sum).
struct LongSum {
  float high = 0.0f;
  float low = 0.0f;

  __device__ __forceinline__ void add(float v) {
    float sum = high + v;
    float from_v = sum - high;
    low += (high - (sum - from_v)) + (v - from_v);
    high = sum;
  }
  __device__ __forceinline__ void scale(float factor) {
    high *= factor;
    low *= factor;
  }
  // `low` is NaN once `high` is infinite
  __device__ __forceinline__ float value() const { return low == low ? high + low : high; }
};

// --- products of tiles, one warp ---------------------------------------------------------------------------
// With g = lane / 4 and t = lane % 4 the fragments of c (16 x 8) += a (16 x 16) b (16 x 8) are
//   a[0] = a(g, 2t..2t+1)   a[1] = a(g+8, 2t..)   a[2] = a(g, 2t+8..)   a[3] = a(g+8, 2t+8..)
//   b[0] = b(2t..2t+1, g)   b[1] = b(2t+8.., g)
//   c[0], c[1] = c(g, 2t..2t+1)   c[2], c[3] = c(g+8, 2t..2t+1)
// so ldmatrix of the four 8 x 8 quarters of row-major a gives a[0], a[1] (rows 8 on), a[2] (columns 8 on), a[3];
// ldmatrix of b stored by columns (n, k) gives b[0], b[1]; ldmatrix_transposed gives them from row-major (k, n).

// The same product by shuffles and float arithmetic, where tensor cores lack the type. Slow.
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

// Whether mma_16x8x16 of T has tensor cores to run on.
template <class T>
constexpr bool TENSOR_CORES = true;
#if !defined(RBE_HOST) && __CUDA_ARCH__ < 800
template <>
constexpr bool TENSOR_CORES<bf16> = false;
#endif

// --- rows --------------------------------------------------------------------------------------------------
// A team reads a row in chunks of VEC columns: chunk k of a thread starts at column (k * team + lane) * VEC. VEC is
// VECTOR<T> where all arrays and rows are 16-byte aligned (then cols is a multiple of it), else 1.

// VEC columns of s = x + residual from `at` on; residual may be null.
template <int VEC, class T>
__device__ __forceinline__ void load_sum(const T* x, const T* residual, i64 at, float (&s)[VEC]) {
  load<VEC>(x + at, s);
  if (residual) {
    float r[VEC];
    load<VEC>(residual + at, r);
#pragma unroll
    for (int i = 0; i < VEC; ++i) s[i] += r[i];
  }
}

// Columns of a step through a long row.
__device__ __forceinline__ int columns_left(i64 first, i64 cols, int step) {
  return static_cast<int>(cols - first < step ? cols - first : step);
}

// The thread's chunks of the row that starts at `start` and has `end` columns; 0 beyond them.
template <int VEC, int CHUNKS, class T>
__device__ __forceinline__ void load_row(const T* x, const T* residual, i64 start, int end,
                                         float (&s)[CHUNKS][VEC]) {
#pragma unroll
  for (int k = 0; k < CHUNKS; ++k) {
    int col = (k * blockDim.x + threadIdx.x) * VEC;
    if (col < end) {
      load_sum<VEC>(x, residual, start + col, s[k]);
    } else {
#pragma unroll
      for (int i = 0; i < VEC; ++i) s[k][i] = 0.0f;
    }
  }
}

// --- elements ----------------------------------------------------------------------------------------------
// Arrays taken as one run of elements, in chunks of VEC: VECTOR<T> where all arrays are 16-byte aligned and rows,
// where they matter, are a multiple of it; else 1. Chunks in strides of the grid.

// The divisor d as a product: n / d = high(n * factor) >> shift for n < 2^63; factor 0 stands for d = 1.
// Source: Granlund and Montgomery 1994, "Division by invariant integers using multiplication".
struct Divider {
  u64 factor;
  int shift;
  __device__ __forceinline__ i64 quotient(i64 n) const {
    return factor ? static_cast<i64>(__umul64hi(static_cast<u64>(n), factor) >> shift) : n;
  }
};

__device__ __forceinline__ i64 first_chunk() {
  return static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ __forceinline__ i64 chunk_stride() { return static_cast<i64>(gridDim.x) * blockDim.x; }

// out[i] = f(x[i] + bias[i % cols]) for i < count; bias may be null, then count need be no multiple of VEC.
// by_cols divides by the chunks of a row.
template <class T, int VEC, class F>
__device__ __forceinline__ void map_elements(const T* x, const void* bias, int bias_type, T* out, i64 count, i64 cols,
                                             Divider by_cols, F f) {
  for (i64 chunk = first_chunk(); chunk * VEC < count; chunk += chunk_stride()) {
    i64 at = chunk * VEC;
    if (at + VEC > count) {  // the last elements of an array without rows
      for (; at < count; ++at) out[at] = from_float<T>(f(to_float(x[at])));
      return;
    }
    float v[VEC];
    load<VEC>(x + at, v);
    if (bias) {
      float b[VEC];
      load_vector<VEC, T>(bias, bias_type, at - by_cols.quotient(chunk) * cols, b);
#pragma unroll
      for (int i = 0; i < VEC; ++i) v[i] += b[i];
    }
#pragma unroll
    for (int i = 0; i < VEC; ++i) v[i] = f(v[i]);
    store<VEC>(out + at, v);
  }
}

// t / (1 + exp(-t)), 0 where t is below -88.7 or -Inf; NaN stays.
__device__ __forceinline__ float silu_of(float t) {
  t = t < LOWEST ? LOWEST : t;
  return t / (1.0f + expf(-t));
}

// --- compressed weights ------------------------------------------------------------------------------------
// What decode, embedding and linear share: stored codes to coefficients (FORMAT.md, sections 3 and 4), and the
// transforms of a block (section 5). A tile is B x B floats in shared memory, 16-byte chunks of a row exchanged
// by row: neither the reading of rows in 16 bytes nor that of columns meets a bank twice.

constexpr int RUN = 32;  // codes that are packed together
constexpr float NOT_A_NUMBER = __builtin_bit_cast(float, 0x7fffffffu);
constexpr int CODES_DENSE = 0, CODES_GRID = 1, CODES_SPARSE = 2;
constexpr int INDEX_FULL = 0, INDEX_BITMAP = 1, INDEX_DELTA = 2;
constexpr int NO_TRANSFORM = 0, DCT = 1, HADAMARD = 2, DWT_HAAR = 3, DWT_DB2 = 4, DWT_BIOR = 5;

// The coefficients of a weight, and where they are stored.
struct Codes {
  int kind;
  int bits;                    // of a code; sparse: 32 and 16 are float and f16
  int group;                   // dense: columns, sparse: entries that share a scale
  int index_kind;              // sparse
  const unsigned char* value;
  const f16* scale;            // dense: (rows, ceil(cols / group)); grid: (rows); sparse: (ceil(entries / group))
  const f16* col_scale;        // grid
  const unsigned char* index;  // sparse
  const i64* row_start;        // sparse
  float offset;                // grid: shrink; sparse: dead zone
  i64 cols;                    // padded: whole blocks
};
#define CODES_PARAMETERS                                                                       \
  int kind, int bits, int group, int index_kind, const unsigned char *value, const f16 *scale, \
      const f16 *col_scale, const unsigned char *index, const i64 *row_start, float offset, i64 cols_pad
#define CODES_ARGUMENTS \
  { kind, bits, group, index_kind, value, scale, col_scale, index, row_start, offset, cols_pad }

// Byte i of a word as a float: the mantissa of 2^23 + byte.
__device__ __forceinline__ float byte_value(u32 word, int i) {
  return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440u | i)) - 8388608.0f;
}

// The bits of codes 4 quad ... 4 quad + 3 in the plane of WIDTH bits, a code to a byte.
template <int WIDTH>
__device__ __forceinline__ u32 plane_quad(const u32* plane, int quad) {
  constexpr u32 MASK = 0x01010101u * ((1u << WIDTH) - 1u);
  return plane[quad % WIDTH] >> (quad / WIDTH * WIDTH) & MASK;
}

// Codes 4 quad ... 4 quad + 3 of a run of `bits`-bit codes, as floats. The run may be memory or registers.
__device__ __forceinline__ void unpack_quad(const u32* run, int bits, int quad, float (&u)[4]) {
  u32 high = 0, low = 0;
  if (bits & 8) {
    high = plane_quad<8>(run, quad);
    run += 8;
  }
  if (bits & 4) {
    low = plane_quad<4>(run, quad);
    run += 4;
  }
  if (bits & 2) {
    low = low << 2 | plane_quad<2>(run, quad);
    run += 2;
  }
  if (bits & 1) low = low << 1 | plane_quad<1>(run, quad);
  if (bits > 8) {
    float weight = static_cast<float>(1 << (bits - 8));
#pragma unroll
    for (int i = 0; i < 4; ++i) u[i] = fmaf(byte_value(high, i), weight, byte_value(low, i));
  } else {
    u32 word = high | low;
#pragma unroll
    for (int i = 0; i < 4; ++i) u[i] = byte_value(word, i);
  }
}

// q - sign(q) * shrink
__device__ __forceinline__ float shrunk(float q, float shrink) {
  return q > 0.0f ? q - shrink : q < 0.0f ? q + shrink : 0.0f;
}

// Four coefficients of a row from column `col`, a multiple of 4, on; dense and grid codes.
__device__ __forceinline__ void load_quad(const Codes& c, i64 row, i64 col, float (&v)[4]) {
  const u32* words = reinterpret_cast<const u32*>(c.value);
  i64 run = row * (c.cols / RUN) + col / RUN;
  unpack_quad(words + run * c.bits, c.bits, static_cast<int>(col % RUN) / 4, v);
  if (c.kind == CODES_DENSE) {
    float middle = 0.5f * static_cast<float>((1 << c.bits) - 1);
    float scale = to_float(c.scale[row * ((c.cols + c.group - 1) / c.group) + col / c.group]);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = scale * (v[i] - middle);
  } else {
    float middle = static_cast<float>(1 << (c.bits - 1));
    float scale = to_float(c.scale[row]), step[4];
    load<4>(c.col_scale + col, step);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = scale * step[i] * shrunk(v[i] - middle, c.offset);
  }
}

// The value of entry e of sparse codes. Groups are of 32, 64 or 128 entries, found without a division of 64 bits.
__device__ __forceinline__ float entry_value(const Codes& c, i64 e) {
  if (c.bits == 32) return reinterpret_cast<const float*>(c.value)[e];
  if (c.bits == 16) return to_float(reinterpret_cast<const f16*>(c.value)[e]);
  const unsigned char* plane = c.value + e / RUN * (4 * c.bits);
  int k = static_cast<int>(e % RUN);
  int u = 0;
#pragma unroll
  for (int width = 8; width > 0; width >>= 1) {
    if (c.bits & width) {
      u = u << width | (plane[k % (4 * width)] >> (k / (4 * width) * width) & ((1 << width) - 1));
      plane += 4 * width;
    }
  }
  int half = 1 << (c.bits - 1);
  int m = u >= half ? u - half : half - 1 - u;
  float v = fmaf(to_float(c.scale[(e >> 5) >> (c.group >> 6)]), static_cast<float>(m) + 0.5f, c.offset);
  return u >= half ? v : -v;
}

// Each lane's sum of v over itself and the lanes before it.
__device__ __forceinline__ int warp_prefix(int v) {
  int lane = threadIdx.x % WARP;
#pragma unroll
  for (int step = 1; step < WARP; step <<= 1) {
    int before = __shfl_up_sync(ALL_LANES, v, step);
    if (lane >= step) v += before;
  }
  return v;
}

// Where the entries of block column J of a row begin: x, counted from the row's first, and in which column of the
// block the first of them stands: y. `starts` of a row has one more element behind the last block.

// Writes the `starts` of a stored row; one warp, whole. cols / block + 1 elements.
__device__ __forceinline__ void find_starts(const Codes& c, i64 row, int block, uint2* starts) {
  int lane = threadIdx.x % WARP;
  int blocks = static_cast<int>(c.cols / block);
  if (c.index_kind == INDEX_FULL) {
    for (int j = lane; j <= blocks; j += WARP) starts[j] = make_uint2(static_cast<u32>(j * block), 0);
    return;
  }
  int carry = 0;
  if (c.index_kind == INDEX_BITMAP) {
    const u32* words = reinterpret_cast<const u32*>(c.index) + row * (c.cols / 32);
    int count = static_cast<int>(c.cols / 32), each = block / 32;
    for (int first = 0; first < count; first += WARP) {
      int at = first + lane;
      int kept = at < count ? __popc(words[at]) : 0;
      int sum = warp_prefix(kept);
      if (at < count && at % each == 0) starts[at / each] = make_uint2(static_cast<u32>(carry + sum - kept), 0);
      carry += __shfl_sync(ALL_LANES, sum, WARP - 1);
    }
    if (lane == 0) starts[blocks] = make_uint2(static_cast<u32>(carry), 0);
    return;
  }
  i64 begin = c.row_start[row];
  int count = static_cast<int>(c.row_start[row + 1] - begin);
  int column = -1, done = 0;  // of the last entry; blocks whose start is known
  for (int first = 0; first < count; first += WARP) {
    int e = first + lane;
    int sum = column + warp_prefix(e < count ? c.index[begin + e] + 1 : 0);
    int own = sum / block;
    int before = __shfl_up_sync(ALL_LANES, own, 1);
    int from = lane == 0 ? done : before + 1;
    if (e < count) {
      for (int j = from; j <= own; ++j) starts[j] = make_uint2(static_cast<u32>(e), static_cast<u32>(sum % block));
    }
    column = __shfl_sync(ALL_LANES, sum, WARP - 1);
    done = column < 0 ? 0 : column / block + 1;
  }
  for (int j = done + lane; j <= blocks; j += WARP) starts[j] = make_uint2(static_cast<u32>(count), 0);
}

// v = p[at .. at + N-1] of an array whose dtype is one of TYPE_...; the branch is the same for all threads.
template <int N>
__device__ __forceinline__ void load_any(const void* p, int type, i64 at, float (&v)[N]) {
  if (type == TYPE_F32) {
    load<N>(static_cast<const float*>(p) + at, v);
  } else if (type == TYPE_F16) {
    load<N>(static_cast<const f16*>(p) + at, v);
  } else {
    load<N>(static_cast<const bf16*>(p) + at, v);
  }
}

// p[at .. at + N-1] = v of such an array.
template <int N>
__device__ __forceinline__ void store_any(void* p, int type, i64 at, const float (&v)[N]) {
  if (type == TYPE_F32) {
    store<N>(static_cast<float*>(p) + at, v);
  } else if (type == TYPE_F16) {
    store<N>(static_cast<f16*>(p) + at, v);
  } else {
    store<N>(static_cast<bf16*>(p) + at, v);
  }
}

// Rows of a weight: `first` on, or by their numbers, int64 or int32. A number that is not of 0 ... stored - 1 gives -1.
struct RowNumbers {
  const void* ids;
  int wide;
  i64 first, stored;

  __device__ __forceinline__ i64 operator()(i64 i) const {
    if (!ids) return first + i;
    i64 row = wide ? static_cast<const i64*>(ids)[i] : static_cast<const int*>(ids)[i];
    return row >= 0 && row < stored ? row : -1;
  }
};

// --- tiles

// Element of a row-major tile of rows of `block` floats, chunks exchanged.
__device__ __forceinline__ int tile_at(int block, int row, int col) {
  return row * block + (col & ~31) + ((((col >> 2) ^ row) & 7) << 2) + (col & 3);
}
template <int B>
__device__ __forceinline__ int tile_at(int row, int col) {
  return tile_at(B, row, col);
}

// The sparse coefficients of block column J of a row into row `r` of the tile; one warp, whole.
template <int B>
__device__ __forceinline__ void load_sparse_row(const Codes& c, const uint2* starts, i64 row, i64 block_col, int r,
                                                float* tile) {
  int lane = threadIdx.x % WARP;
  if (c.index_kind != INDEX_DELTA) {
    i64 at = row * c.cols + block_col * B;  // of the first coefficient, were all kept
    i64 e = at;
    if (c.index_kind == INDEX_BITMAP) e = c.row_start[row] + starts[block_col].x;
#pragma unroll
    for (int k = 0; k < B; k += WARP) {
      u32 word = c.index_kind == INDEX_FULL ? ALL_LANES : reinterpret_cast<const u32*>(c.index)[(at + k) / 32];
      bool kept = word >> lane & 1u;
      float v = kept ? entry_value(c, e + __popc(word & ((1u << lane) - 1u))) : 0.0f;
      tile[tile_at<B>(r, k + lane)] = v;
      e += __popc(word);
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < B; k += WARP) tile[tile_at<B>(r, k + lane)] = 0.0f;
  __syncwarp();
  uint2 start = starts[block_col];
  i64 begin = c.row_start[row];
  int column = static_cast<int>(start.y), end = static_cast<int>(starts[block_col + 1].x);
  for (int first = static_cast<int>(start.x); first < end; first += WARP) {
    int e = first + lane;
    int step = e < end && e != static_cast<int>(start.x) ? c.index[begin + e] + 1 : 0;
    int at = column + warp_prefix(step);
    if (e < end) tile[tile_at<B>(r, at)] = entry_value(c, begin + e);
    column = __shfl_sync(ALL_LANES, at, WARP - 1);
  }
}

// TILES tiles side by side: coefficients of `rows` stored rows (those that row_of gives) from block column J on.
// Zeros below them and beyond the last block column, NaN where row_of gives -1. Whole warps. `starts` of local row r:
// starts + r * (blocks + 1).
template <int B, int TILES, class RowOf>
__device__ __forceinline__ void load_tiles(const Codes& c, const uint2* starts, int rows, i64 block_col, float* tiles,
                                           RowOf row_of) {
  i64 blocks = c.cols / B;
  if (c.kind == CODES_SPARSE) {
    int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    for (int i = threadIdx.x / WARP; i < B * TILES; i += warps) {
      int r = i / TILES, tile = i % TILES;
      i64 row = r < rows && block_col + tile < blocks ? row_of(r) : 0;
      if (r < rows && block_col + tile < blocks && row >= 0) {
        load_sparse_row<B>(c, starts + r * (blocks + 1), row, block_col + tile, r, tiles + tile * B * B);
      } else {
#pragma unroll
        for (int k = 0; k < B; k += WARP) tiles[tile * B * B + tile_at<B>(r, k + lane)] = row < 0 ? NOT_A_NUMBER : 0.0f;
      }
    }
    return;
  }
  constexpr int QUADS = B * TILES / 4;
#pragma unroll 4
  for (int i = threadIdx.x; i < B * QUADS; i += blockDim.x) {
    int r = i / QUADS, col = i % QUADS * 4;
    float v[4] = {};
    if (r < rows && block_col * B + col < c.cols) {
      i64 row = row_of(r);
      if (row >= 0) {
        load_quad(c, row, block_col * B + col, v);
      } else {
        v[0] = v[1] = v[2] = v[3] = NOT_A_NUMBER;
      }
    }
    store<4>(tiles + col / B * (B * B) + tile_at<B>(r, col % B), v);
  }
}

// --- transforms: a thread has a line of a tile in registers

__device__ constexpr double cosine(int numerator, int denominator) {  // cos(pi numerator / denominator), 0 to pi / 2
  double x = 3.14159265358979323846 * numerator / denominator, term = 1.0, sum = 1.0;
  for (int n = 2; n < 32; n += 2) {
    term *= -x * x / (n * (n - 1));
    sum += term;
  }
  return sum;
}

constexpr float ROOT_2 = 1.41421356237309505f;

template <int N>
__device__ __forceinline__ void dct_2(float (&v)[N]);

// u, w = the pairs (v[n], v[M-1-n]) turned by -(2n+1) pi / (4M); every other w negated.
template <int M, int n = 0>
__device__ __forceinline__ void turn(const float (&v)[M], float (&u)[M / 2], float (&w)[M / 2]) {
  constexpr float C = static_cast<float>(cosine(2 * n + 1, 4 * M));
  constexpr float S = static_cast<float>(cosine(2 * M - 2 * n - 1, 4 * M));
  u[n] = fmaf(C, v[n], S * v[M - 1 - n]);
  float t = fmaf(C, v[M - 1 - n], -S * v[n]);
  w[n] = n % 2 ? -t : t;
  if constexpr (n + 1 < M / 2) turn<M, n + 1>(v, u, w);
}

// sqrt(N) times the orthonormal DCT-IV, y[k] = sum_n v[n] sqrt(2) cos((2n+1)(2k+1) pi / (4N)).
template <int N>
__device__ __forceinline__ void dct_4(float (&v)[N]) {
  if constexpr (N > 1) {
    constexpr int H = N / 2;
    float u[H], w[H];
    turn<N>(v, u, w);
    dct_2(u);
    dct_2(w);
    v[0] = ROOT_2 * u[0];
    v[N - 1] = -ROOT_2 * w[0];
#pragma unroll
    for (int m = 1; m < H; ++m) {
      v[2 * m] = u[m] + w[H - m];
      v[2 * m - 1] = u[m] - w[H - m];
    }
  }
}

// sqrt(N) times the orthonormal DCT-II: S^T v.
template <int N>
__device__ __forceinline__ void dct_2(float (&v)[N]) {
  if constexpr (N > 1) {
    constexpr int H = N / 2;
    float s[H], d[H];
#pragma unroll
    for (int n = 0; n < H; ++n) {
      s[n] = v[n] + v[N - 1 - n];
      d[n] = v[n] - v[N - 1 - n];
    }
    dct_2(s);
    dct_4(d);
#pragma unroll
    for (int k = 0; k < H; ++k) {
      v[2 * k] = s[k];
      v[2 * k + 1] = d[k];
    }
  }
}

// sqrt(N) times the orthonormal DCT-III: S v.
template <int N>
__device__ __forceinline__ void dct_3(float (&v)[N]) {
  if constexpr (N > 1) {
    constexpr int H = N / 2;
    float s[H], d[H];
#pragma unroll
    for (int k = 0; k < H; ++k) {
      s[k] = v[2 * k];
      d[k] = v[2 * k + 1];
    }
    dct_3(s);
    dct_4(d);
#pragma unroll
    for (int n = 0; n < H; ++n) {
      v[n] = s[n] + d[n];
      v[N - 1 - n] = s[n] - d[n];
    }
  }
}

// sqrt(N) times the Hadamard transform, its own transpose.
template <int N>
__device__ __forceinline__ void hadamard(float (&v)[N]) {
#pragma unroll
  for (int step = 1; step < N; step *= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if ((i & step) == 0) {
        float a = v[i], b = v[i + step];
        v[i] = a + b;
        v[i + step] = a - b;
      }
    }
  }
}

// Low-pass and high-pass filter of a wavelet.
struct Taps {
  float h[4], g[4];
};

__device__ __forceinline__ Taps taps_of(int transform) {
  constexpr float A = 0.70710678118654752f;                                                      // 1 / sqrt 2
  constexpr float D0 = 0.48296291314453415f, D1 = 0.83651630373780791f, D2 = 0.22414386804201339f,  // Daubechies
                  D3 = -0.12940952255126037f;
  constexpr float E = 0.17677669529663689f;  // sqrt 2 / 8
  if (transform == DWT_HAAR) return {{A, A, 0.0f, 0.0f}, {A, -A, 0.0f, 0.0f}};
  if (transform == DWT_DB2) return {{D0, D1, D2, D3}, {D3, -D2, D1, -D0}};
  return {{E, 3 * E, 3 * E, E}, {-2 * E, -6 * E, 6 * E, 2 * E}};
}

// Two values of a synthesis step from a pair of coefficients and the pair before it.
__device__ __forceinline__ void join(const Taps& t, float a, float d, float a0, float d0, float& even, float& odd) {
  even = fmaf(t.h[0], a, fmaf(t.g[0], d, fmaf(t.h[2], a0, t.g[2] * d0)));
  odd = fmaf(t.h[1], a, fmaf(t.g[1], d, fmaf(t.h[3], a0, t.g[3] * d0)));
}

// S v: steps of length 8, 16, ... N, in place.
template <int N, int L = 8>
__device__ __forceinline__ void dwt_synthesis(const Taps& t, float (&v)[N]) {
  float x[L];
#pragma unroll
  for (int k = 0; k < L / 2; ++k) {
    int k0 = (k + L / 2 - 1) % (L / 2);
    join(t, v[k], v[L / 2 + k], v[k0], v[L / 2 + k0], x[2 * k], x[2 * k + 1]);
  }
#pragma unroll
  for (int i = 0; i < L; ++i) v[i] = x[i];
  if constexpr (L < N) dwt_synthesis<N, 2 * L>(t, v);
}

__device__ __forceinline__ float dot4(const float (&f)[4], float a, float b, float c, float d) {
  return fmaf(f[0], a, fmaf(f[1], b, fmaf(f[2], c, f[3] * d)));
}

// S^T v: steps of length N, N / 2, ... 8, in place.
template <int N, int L = N>
__device__ __forceinline__ void dwt_transposed(const Taps& t, float (&v)[N]) {
  float x[L];
#pragma unroll
  for (int i = 0; i < L; ++i) x[i] = v[i];
#pragma unroll
  for (int k = 0; k < L / 2; ++k) {
    int i = 2 * k, j = (2 * k + 2) % L;
    v[k] = dot4(t.h, x[i], x[i + 1], x[j], x[j + 1]);
    v[L / 2 + k] = dot4(t.g, x[i], x[i + 1], x[j], x[j + 1]);
  }
  if constexpr (L > 8) dwt_transposed<N, L / 2>(t, v);
}

// A row of a tile, or a column.
template <int B>
struct Line {
  float* tile;
  int index;
  bool column;

  __device__ __forceinline__ float& at(int i) const {
    return tile[column ? tile_at<B>(i, index) : tile_at<B>(index, i)];
  }
  // The line from its element `first`, a multiple of 32, on: there chunks are exchanged alike.
  __device__ __forceinline__ Line from(int first) const { return {tile + (column ? first * B : first), index, column}; }
  // v[i] = element FIRST + STEP i
  template <int FIRST, int STEP, int N>
  __device__ __forceinline__ void load_part(float (&v)[N]) const {
    if (FIRST % 4 == 0 && STEP == 1 && !column) {
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        float four[4];
        load<4>(&at(FIRST + i), four);
#pragma unroll
        for (int k = 0; k < 4; ++k) v[i + k] = four[k];
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] = at(FIRST + STEP * i);
    }
  }
  template <int FIRST, int STEP, int N>
  __device__ __forceinline__ void store_part(const float (&v)[N]) const {
    if (FIRST % 4 == 0 && STEP == 1 && !column) {
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        float four[4] = {v[i], v[i + 1], v[i + 2], v[i + 3]};
        store<4>(&at(FIRST + i), four);
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) at(FIRST + STEP * i) = v[i];
    }
  }
};

// Threads that work on a line of B values: 64 values a thread.
template <int B>
constexpr int LINE_THREADS = B > 64 ? B / 64 : 1;

// What a line is to be multiplied by after a transform: some come out sqrt(B) times too large.
__device__ __forceinline__ float transform_factor(int transform, int block) {
  return transform == DCT || transform == HADAMARD ? rsqrtf(static_cast<float>(block)) : 1.0f;
}

// The Hadamard transform of a line of 2 H values by two threads; all threads of the block.
template <int H>
__device__ __forceinline__ void hadamard_halves(Line<2 * H> line, bool active, int part) {
  float v[H];
  float sign = part ? -1.0f : 1.0f;
  if (active) {
#pragma unroll
    for (int n = 0; n < H; ++n) v[n] = fmaf(sign, line.at(H + n), line.at(n));
    hadamard(v);
  }
  __syncthreads();
  if (active) {
#pragma unroll
    for (int n = 0; n < H; ++n) line.from(part * H).at(n) = v[n];
  }
  __syncthreads();
}

// The line becomes S line (up to transform_factor). Every thread of the block calls it; `part`, the same for a warp,
// tells the LINE_THREADS threads of a line apart; threads without a line are not `active`.
template <int B>
__device__ __forceinline__ void synthesise(int transform, Line<B> line, bool active, int part) {
  if constexpr (B <= 64) {
    if (active) {
      float v[B];
      line.template load_part<0, 1>(v);
      if (transform == DCT) {
        dct_3(v);
      } else if (transform == HADAMARD) {
        hadamard(v);
      } else {
        dwt_synthesis(taps_of(transform), v);
      }
      line.template store_part<0, 1>(v);
    }
    __syncthreads();
  } else {
    constexpr int H = B / 2;
    float v[H];
    if (transform == DCT) {  // part 0 has the even coefficients, part 1 the odd ones
      __syncthreads();  // or the compiler reads the line ahead of the branch, into twice the registers
      if (active && part == 0) {
        line.template load_part<0, 2>(v);
        dct_3(v);
      } else if (active) {
        line.template load_part<1, 2>(v);
        dct_4(v);
      }
      __syncthreads();
      if (active && part == 1) line.template store_part<H, 1>(v);
      __syncthreads();
      if (active && part == 0) {
#pragma unroll
        for (int n = 0; n < H / 2; ++n) {
          float a = line.at(H + n), b = line.at(B - 1 - n);
          line.at(n) = v[n] + a;
          line.at(B - 1 - n) = v[n] - a;
          line.at(H - 1 - n) = v[H - 1 - n] + b;
          line.at(H + n) = v[H - 1 - n] - b;
        }
      }
      __syncthreads();
      return;
    }
    if (transform == HADAMARD) return hadamard_halves<H>(line, active, part);
    __syncthreads();  // as above
    Taps taps = taps_of(transform);
    if (active && part == 0) {
      line.template load_part<0, 1>(v);
      dwt_synthesis(taps, v);
      line.template store_part<0, 1>(v);
    }
    __syncthreads();
    int first = part * (H / 2), before = (first + H - 1) % H;
    float a0 = 0.0f, d0 = 0.0f;
    if (active) {
      a0 = line.at(before);
      d0 = line.at(H + before);
#pragma unroll
      for (int k = 0; k < H / 2; ++k) {
        float a = line.from(first).at(k), d = line.from(first).at(H + k);
        join(taps, a, d, a0, d0, v[2 * k], v[2 * k + 1]);
        a0 = a;
        d0 = d;
      }
    }
    __syncthreads();
    if (active) {
#pragma unroll
      for (int i = 0; i < H; ++i) line.from(2 * first).at(i) = v[i];
    }
    __syncthreads();
  }
}

// The line becomes S^T line (up to transform_factor), as `synthesise`.
template <int B>
__device__ __forceinline__ void transpose_synthesis(int transform, Line<B> line, bool active, int part) {
  if constexpr (B <= 64) {
    if (active) {
      float v[B];
      line.template load_part<0, 1>(v);
      if (transform == DCT) {
        dct_2(v);
      } else if (transform == HADAMARD) {
        hadamard(v);
      } else {
        dwt_transposed(taps_of(transform), v);
      }
      line.template store_part<0, 1>(v);
    }
    __syncthreads();
  } else {
    constexpr int H = B / 2;
    float v[H];
    if (transform == DCT) {  // part 0 makes the even coefficients, part 1 the odd ones
      __syncthreads();  // or the compiler reads the line ahead of the branch, into twice the registers
      if (active) {
        float sign = part ? -1.0f : 1.0f;
#pragma unroll
        for (int n = 0; n < H; ++n) v[n] = fmaf(sign, line.at(B - 1 - n), line.at(n));
        if (part == 0) {
          dct_2(v);
        } else {
          dct_4(v);
        }
      }
      __syncthreads();
      if (active) {
#pragma unroll
        for (int k = 0; k < H; ++k) line.at(2 * k + part) = v[k];
      }
      __syncthreads();
      return;
    }
    if (transform == HADAMARD) return hadamard_halves<H>(line, active, part);
    __syncthreads();  // as above
    Taps taps = taps_of(transform);
    int first = part * H;  // of the values; their coefficients are first / 2 ... of each half
    if (active) {
      Line<B> own = line.from(first), other = line.from(H - first);
      float x0 = own.at(0), x1 = own.at(1);
#pragma unroll
      for (int k = 0; k < H / 2; ++k) {
        bool last = k == H / 2 - 1;
        float x2 = last ? other.at(0) : own.at(2 * k + 2), x3 = last ? other.at(1) : own.at(2 * k + 3);
        v[k] = dot4(taps.h, x0, x1, x2, x3);
        v[H / 2 + k] = dot4(taps.g, x0, x1, x2, x3);
        x0 = x2;
        x1 = x3;
      }
    }
    __syncthreads();
    if (active) {
#pragma unroll
      for (int k = 0; k < H / 2; ++k) {
        line.from(first / 2).at(k) = v[k];
        line.from(first / 2).at(H + k) = v[H / 2 + k];
      }
    }
    __syncthreads();
    if (active && part == 0) {
      line.template load_part<0, 1>(v);
      dwt_transposed(taps, v);
      line.template store_part<0, 1>(v);
    }
    __syncthreads();
  }
}

// --- basis

// The coordinate of a block's row or column, and the functions of it that the basis is made of.
struct Axis {
  float t, square, cos_1, cos_2;

  __device__ __forceinline__ Axis() {}
  __device__ __forceinline__ Axis(int i, int block) {
    t = fmaf(2.0f / static_cast<float>(block - 1), static_cast<float>(i), -1.0f);
    square = t * t;
    cos_1 = cospif(t);
    cos_2 = fmaf(2.0f * cos_1, cos_1, -1.0f);
  }
};

// sum_k p_k Phi_k at (x, y): the 8 functions of a matrix.
__device__ __forceinline__ float basis_value(const float (&p)[8], const Axis& x, const Axis& y) {
  float d2 = x.square + y.square;  // never 0: a block has no middle
  float sum = fmaf(p[1], d2 * rsqrtf(d2), fmaf(p[2], d2, p[0]));
  sum = fmaf(p[3], x.cos_1, fmaf(p[4], y.cos_1, sum));
  sum = fmaf(p[5], x.cos_2, fmaf(p[6], y.cos_2, sum));
  return fmaf(p[7] * x.cos_1, y.cos_1, sum);
}

// The 5 functions of vectors.
__device__ __forceinline__ float basis_value(const f16* p, const Axis& x) {
  float sum = fmaf(to_float(p[1]), fabsf(x.t), to_float(p[0]));
  return fmaf(to_float(p[2]), x.square, fmaf(to_float(p[3]), x.cos_1, fmaf(to_float(p[4]), x.cos_2, sum)));
}

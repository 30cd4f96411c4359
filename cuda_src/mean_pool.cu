// y[b,c] = sum_t x[t,c] / n[b] over the n[b] tokens t of sequence b; zeros where n[b] = 0.
//
// Arrays     x: (batch, seq, cols) T with lengths (batch) i64 or null, or packed (tokens, cols) T with cu_seqlens
//            (batch + 1) i64; out: (batch, cols) of out_type. Lengths are clamped to 0 ... seq.
// Ownership  A block has 32 chunks of columns (chunks of 16 bytes, or single columns: _single) of one sequence; its
//            warp w sums the tokens w, w + 8, ... of it
// Launch     block (32, 8); grid (pairs of a sequence and 32 chunks), in strides of the grid
// Shared     8 sums of each column: 4 KB, 8 KB of the half types
// Bytes      reads the tokens of every sequence once, writes out once
// Accuracy   float: 8 sums of every eighth token, added in the order of the warps. That order depends on nothing but
//            the length, so a sequence has the same bits in every batch, padded or packed. Columns whose sum overflows
//            are summed once more, in double.
#include "vector_io.cuh"
#include "mean_pool_params.h"

constexpr int WARPS = 8;

// The mean of `count` values, `stride` elements apart, in double.
template <class T>
__device__ __forceinline__ float wide_mean(const T* x, i64 count, i64 stride) {
  double sum = 0.0;
#pragma unroll 1
  for (i64 t = 0; t < count; ++t) sum += to_double(to_float(x[t * stride]));
  return static_cast<float>(sum / static_cast<double>(count));
}

template <class T, int VEC>
__device__ __forceinline__ void mean_pool(const MeanPoolParams& p) {
  const T* x = static_cast<const T*>(p.x);
  i64 seq = p.seq, cols = p.cols;
  __shared__ float sums[WARPS][VEC][WARP];
  int lane = threadIdx.x, warp = threadIdx.y;
  i64 groups = (cols + WARP * VEC - 1) / (WARP * VEC);
  for (i64 unit = blockIdx.x; unit < p.batch * groups; unit += gridDim.x) {
    i64 b = unit / groups;
    i64 col = (unit % groups * WARP + lane) * VEC;
    i64 first = b * seq, count = seq;
    if (p.cu_seqlens) {
      first = p.cu_seqlens[b];
      count = p.cu_seqlens[b + 1] - first;
    } else if (p.lengths) {
      count = p.lengths[b] < seq ? p.lengths[b] : seq;
    }
    float sum[VEC];
#pragma unroll
    for (int i = 0; i < VEC; ++i) sum[i] = 0.0f;
    if (col < cols) {
#pragma unroll 4
      for (i64 t = warp; t < count; t += WARPS) {
        float v[VEC];
        load<VEC>(x + (first + t) * cols + col, v);
#pragma unroll
        for (int i = 0; i < VEC; ++i) sum[i] += v[i];
      }
    }
#pragma unroll
    for (int i = 0; i < VEC; ++i) sums[warp][i][lane] = sum[i];
    __syncthreads();
    if (warp == 0 && col < cols) {
      u32 overflowed = 0;  // bits of columns
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        for (int w = 1; w < WARPS; ++w) sum[i] += sums[w][i][lane];
        sum[i] = count > 0 ? sum[i] / static_cast<float>(count) : 0.0f;
        if (sum[i] - sum[i] != 0.0f) overflowed |= 1u << i;
      }
      store_any<VEC>(p.out, p.out_type, b * cols + col, sum);
#pragma unroll 1
      for (int i = 0; overflowed >> i; ++i) {
        if (!(overflowed >> i & 1)) continue;
        float mean[1] = {wide_mean(x + first * cols + col + i, count, cols)};
        store_any<1>(p.out, p.out_type, b * cols + col + i, mean);
      }
    }
    __syncthreads();  // `sums` is free again
  }
}

// 4 blocks an SM: 64 registers a thread. Without the bound the compiler takes 48, and spills 8 bytes on sm_100
#define ENTRY(name, T, VEC) \
  KERNEL(name, 256, 4)(MeanPoolParams_PARAMETERS) { \
    const MeanPoolParams p = MeanPoolParams_VALUES; \
    mean_pool<T, VEC>(p); \
  }
#define ENTRIES(type, T) \
  ENTRY(mean_pool_##type, T, VECTOR<T>) \
  ENTRY(mean_pool_##type##_single, T, 1)

ENTRIES(f32, float)
ENTRIES(f16, f16)
ENTRIES(bf16, bf16)

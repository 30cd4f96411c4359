// y[r,c] = exp(s[r,c] - max s[r]) / sum_c exp(s[r,c] - max s[r]), s = scale * x + mask; a row of -inf gives zeros.
//
// Arrays     x, out: (rows, cols) T, row-major; out may be x. mask: (rows, cols) of any strides (in elements),
//            float (added) or bytes (0 hides), see MASK_...
// Ownership  A team of blockDim.x threads holds a row in registers, each thread up to 32 scores of it; a block
//            has blockDim.y teams. Rows over 32768 columns: the whole block, once for the maximum and the sum
//            (each thread its own, brought together at the end), once more to write.
// Launch     block (team, teams): teams of 1 to 32 lanes fill 128 threads, larger teams are the block;
//            grid (blocks), rows in strides of the grid
// Shared     128 bytes a reduction, of teams larger than a warp only
// Bytes      reads x and the mask once and writes out once: 2 sizeof(T) per element. Long rows are read twice.
// Accuracy   float scores and sums; of long rows the sum is compensated. expf to 2 ulp.
//
// Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax" (the long rows).
#include "reduce.cuh"
#include "vector_io.cuh"
#include "softmax_params.h"

// How `mask` is read; as rbe_gpu/gpu/softmax.py passes it.
constexpr int MASK_NONE = 0;
constexpr int MASK_ADDED = 1;       // float, any strides
constexpr int MASK_KEEP = 2;        // bytes, any strides
constexpr int MASK_ADDED_ROWS = 3;  // float, rows contiguous and aligned to 16 bytes
constexpr int MASK_KEEP_ROWS = 4;   // bytes, rows contiguous and aligned to 8 bytes

// s += mask, or s = -inf where hidden, for VEC columns from (row, col) on
template <int VEC>
__device__ __forceinline__ void apply_mask(const SoftmaxParams& p, i64 row, i64 col, float (&s)[VEC]) {
  if (p.mask_kind == MASK_NONE) return;
  i64 at = row * p.mask_row_stride + col * p.mask_col_stride;
  if (VEC > 1 && p.mask_kind == MASK_ADDED_ROWS) {
    float m[VEC];
    load<VEC>(static_cast<const float*>(p.mask) + at, m);
#pragma unroll
    for (int i = 0; i < VEC; ++i) s[i] += m[i];
  } else if (VEC > 1 && p.mask_kind == MASK_KEEP_ROWS) {
    u32 bytes[VEC / 4 + 1];
#pragma unroll
    for (int i = 0; i < VEC / 4; ++i) {
      bytes[i] = *reinterpret_cast<const u32*>(static_cast<const unsigned char*>(p.mask) + at + 4 * i);
    }
#pragma unroll
    for (int i = 0; i < VEC; ++i) s[i] = bytes[i / 4] >> (8 * (i % 4)) & 0xffu ? s[i] : MINUS_INF;
  } else if (p.mask_kind == MASK_ADDED || p.mask_kind == MASK_ADDED_ROWS) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) s[i] += static_cast<const float*>(p.mask)[at + i * p.mask_col_stride];
  } else {
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      s[i] = static_cast<const unsigned char*>(p.mask)[at + i * p.mask_col_stride] ? s[i] : MINUS_INF;
    }
  }
}

// The thread's scores of the row from column `first` on, -inf beyond its end.
template <class T, int VEC, int CHUNKS>
__device__ __forceinline__ void load_scores(const SoftmaxParams& p, i64 row, i64 first, i64 end,
                                            float (&s)[VEC * CHUNKS]) {
#pragma unroll
  for (int k = 0; k < CHUNKS; ++k) {
    i64 col = first + static_cast<i64>(k * blockDim.x + threadIdx.x) * VEC;
    float chunk[VEC];
    if (col < end) {
      load<VEC>(static_cast<const T*>(p.x) + row * p.cols + col, chunk);
#pragma unroll
      for (int i = 0; i < VEC; ++i) chunk[i] *= p.scale;
      apply_mask<VEC>(p, row, col, chunk);
    } else {
#pragma unroll
      for (int i = 0; i < VEC; ++i) chunk[i] = MINUS_INF;
    }
#pragma unroll
    for (int i = 0; i < VEC; ++i) s[k * VEC + i] = chunk[i];
  }
}

template <int VEC, int CHUNKS, class T>
__device__ __forceinline__ void store_row(T* row, i64 first, i64 end, const float (&y)[VEC * CHUNKS]) {
#pragma unroll
  for (int k = 0; k < CHUNKS; ++k) {
    i64 col = first + static_cast<i64>(k * blockDim.x + threadIdx.x) * VEC;
    float chunk[VEC];
#pragma unroll
    for (int i = 0; i < VEC; ++i) chunk[i] = y[k * VEC + i];
    if (col < end) store<VEC>(row + col, chunk);
  }
}

template <class T, int VEC, int CHUNKS>
__device__ __forceinline__ void softmax_rows(const SoftmaxParams& p) {
  i64 cols = p.cols;
  constexpr int ITEMS = VEC * CHUNKS;
  int team = blockDim.x;
  for (i64 first = static_cast<i64>(blockIdx.x) * blockDim.y; first < p.rows;
       first += static_cast<i64>(gridDim.x) * blockDim.y) {
    i64 row = first + threadIdx.y;
    i64 end = row < p.rows ? cols : 0;  // a team without a row takes part in the reductions only
    float s[ITEMS];
    load_scores<T, VEC, CHUNKS>(p, row, 0, end, s);
    float top = s[0];
#pragma unroll
    for (int i = 1; i < ITEMS; ++i) top = fmaxf(top, s[i]);
    top = team_max(top, team);
    float base = top == MINUS_INF ? 0.0f : top;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      s[i] = expf(s[i] - base);
      sum += s[i];
    }
    sum = team_sum(sum, team);
    float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) s[i] *= inverse;
    store_row<VEC, CHUNKS>(static_cast<T*>(p.out) + row * cols, 0, end, s);
  }
}

template <class T, int VEC, int CHUNKS>
__device__ __forceinline__ void softmax_long(const SoftmaxParams& p) {
  i64 cols = p.cols;
  constexpr int ITEMS = VEC * CHUNKS;
  i64 step = static_cast<i64>(blockDim.x) * ITEMS;
  for (i64 row = blockIdx.x; row < p.rows; row += gridDim.x) {
    float base = 0.0f;  // of the exponentials in `sum`; 0 until a score is above -inf
    bool seen = false;
    LongSum sum;
    float s[ITEMS];
    for (i64 first = 0; first < cols; first += step) {
      load_scores<T, VEC, CHUNKS>(p, row, first, cols, s);
      float top = s[0];
#pragma unroll
      for (int i = 1; i < ITEMS; ++i) top = fmaxf(top, s[i]);
      if (top > base || (!seen && top != MINUS_INF)) {
        if (seen) sum.scale(expf(base - top));
        base = top;
        seen = true;
      }
      float part = 0.0f;
#pragma unroll
      for (int i = 0; i < ITEMS; ++i) part += expf(s[i] - base);
      sum.add(part);
    }
    float top = team_max(seen ? base : MINUS_INF, blockDim.x);
    float row_base = top == MINUS_INF ? 0.0f : top;
    float total = team_sum(seen ? sum.value() * expf(base - row_base) : sum.value(), blockDim.x);
    float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    for (i64 first = 0; first < cols; first += step) {
      load_scores<T, VEC, CHUNKS>(p, row, first, cols, s);
#pragma unroll
      for (int i = 0; i < ITEMS; ++i) s[i] = expf(s[i] - row_base) * inverse;
      store_row<VEC, CHUNKS>(static_cast<T*>(p.out) + row * cols, first, cols, s);
    }
  }
}

// softmax_<type>_<items>: rows in registers, up to `items` scores a thread; _single: element by element, for
// rows that are not aligned to 16 bytes; _long: rows of any length. Bounds of one block: without the 1 ptxas spills
// a few registers to fit another block.
#define ENTRY(name, body, threads, T, VEC, CHUNKS) \
  KERNEL(name, threads, 1)(SoftmaxParams_PARAMETERS) { \
    const SoftmaxParams p = SoftmaxParams_VALUES; \
    body<T, VEC, CHUNKS>(p); \
  }
#define ENTRIES(type, T) \
  ENTRY(softmax_##type##_8, softmax_rows, 1024, T, VECTOR<T>, 8 / VECTOR<T>) \
  ENTRY(softmax_##type##_16, softmax_rows, 1024, T, VECTOR<T>, 16 / VECTOR<T>) \
  ENTRY(softmax_##type##_32, softmax_rows, 1024, T, VECTOR<T>, 32 / VECTOR<T>) \
  ENTRY(softmax_##type##_single_8, softmax_rows, 1024, T, 1, 8) \
  ENTRY(softmax_##type##_long, softmax_long, 512, T, VECTOR<T>, 16 / VECTOR<T>) \
  ENTRY(softmax_##type##_single_long, softmax_long, 512, T, 1, 8)

ENTRIES(f32, float)
ENTRIES(f16, f16)
ENTRIES(bf16, bf16)

// Rows that a team of threads reads in chunks (the norms).
//
// A team reads a row in chunks of VEC columns: chunk k of a thread starts at column (k * team + lane) * VEC. VEC is
// VECTOR<T> where all arrays and rows are 16-byte aligned (then cols is a multiple of it), else 1.
#include "vector_io.cuh"

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

// --- rows whose sums leave the range of float: the norms take them once more, in double and column by column ---

// Whether a float sum of squares with this mean (and eps) is as exact as float allows: below, squares were lost to the
// range, above, or where it is NaN, something overflowed. The same for all threads of a team.
__device__ __forceinline__ bool in_range(float mean_square) {
  return 0x1p-100f <= mean_square && mean_square <= 0x1p127f;
}

// s = x + residual at `at`; residual may be null.
template <class T>
__device__ __forceinline__ double wide_value(const T* x, const T* residual, i64 at) {
  double s = to_double(to_float(x[at]));
  return residual ? s + to_double(to_float(residual[at])) : s;
}

// The entry points of a norm, named as softmax.cu explains: op_rows with rows in registers, op_long with rows of any
// length. Bounds of one block: without the 1 ptxas spills a few registers to fit another block.
#define NORM_ENTRY(name, Params, body, threads, T, VEC, CHUNKS)                                   \
  extern "C" __global__ void __launch_bounds__(threads, 1) name(Params##_PARAMETERS) {            \
    const Params p = Params##_VALUES;                                                             \
    body<T, VEC, CHUNKS>(p);                                                                      \
  }
#define NORM_ENTRIES(op, Params, type, T)                                                         \
  NORM_ENTRY(op##_##type##_8, Params, op##_rows, 1024, T, VECTOR<T>, 8 / VECTOR<T>)               \
  NORM_ENTRY(op##_##type##_16, Params, op##_rows, 1024, T, VECTOR<T>, 16 / VECTOR<T>)             \
  NORM_ENTRY(op##_##type##_32, Params, op##_rows, 512, T, VECTOR<T>, 32 / VECTOR<T>)              \
  NORM_ENTRY(op##_##type##_single_8, Params, op##_rows, 512, T, 1, 8)                             \
  NORM_ENTRY(op##_##type##_long, Params, op##_long, 512, T, VECTOR<T>, 16 / VECTOR<T>)            \
  NORM_ENTRY(op##_##type##_single_long, Params, op##_long, 512, T, 1, 4)
#define NORM_KERNELS(op, Params)                                                                  \
  NORM_ENTRIES(op, Params, f32, float)                                                            \
  NORM_ENTRIES(op, Params, f16, f16)                                                              \
  NORM_ENTRIES(op, Params, bf16, bf16)

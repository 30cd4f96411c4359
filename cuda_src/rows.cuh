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

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

// The thread's chunks of a row in registers: the sums x + residual.
template <class T, int VEC_, int CHUNKS_>
struct Sums {
  static constexpr int VEC = VEC_, CHUNKS = CHUNKS_;
  float s[CHUNKS][VEC];

  __device__ __forceinline__ Sums(const T* x, const T* residual, i64 start, int end) {
    load_row<VEC>(x, residual, start, end, s);
  }
  // Chunk k; 0 beyond `end` columns.
  __device__ __forceinline__ void chunk(int k, const T*, i64, int, float (&v)[VEC]) const {
#pragma unroll
    for (int i = 0; i < VEC; ++i) v[i] = s[k][i];
  }
};

// x as it is stored, in half the registers; of the residual each use reads what the L1 cache has by then.
template <class T, int VEC_, int CHUNKS_>
struct Halves {
  static constexpr int VEC = VEC_, CHUNKS = CHUNKS_;
  uint4 words[CHUNKS];
  static_assert(VEC * sizeof(T) == sizeof(uint4), "chunks of 16 bytes of a half type");

  __device__ __forceinline__ Halves(const T* x, const T*, i64 start, int end) {
#pragma unroll
    for (int k = 0; k < CHUNKS; ++k) {
      int col = (k * blockDim.x + threadIdx.x) * VEC;
      words[k] = col < end ? *reinterpret_cast<const uint4*>(x + start + col) : make_uint4(0, 0, 0, 0);
    }
  }
  __device__ __forceinline__ void chunk(int k, const T* residual, i64 start, int end, float (&v)[VEC]) const {
    const u32 parts[4] = {words[k].x, words[k].y, words[k].z, words[k].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) unpack<T>(parts[i], v[2 * i], v[2 * i + 1]);
    int col = (k * blockDim.x + threadIdx.x) * VEC;
    if (residual && col < end) {
      float r[VEC];
      load<VEC>(residual + start + col, r);
#pragma unroll
      for (int i = 0; i < VEC; ++i) v[i] += r[i];
    }
  }
};

// --- rows whose sums leave the range of float: the norms compute them again, in double and column by column ---

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

// y[r,c] = x[r,c] / max(||x[r]||_2, eps).
//
// Arrays     x, out: (rows, cols) T, row-major; out may be x
// Ownership  A team of blockDim.x threads holds a row in registers, each thread up to 32 values of it; a block
//            has blockDim.y teams. Rows too long for 512 threads: the whole block goes through the row twice.
// Launch     block (team, teams): teams of 1 to 32 lanes fill 128 threads, larger teams are the block;
//            grid (blocks), rows in strides of the grid
// Shared     128 bytes, of teams larger than a warp only
// Bytes      reads x once, writes out once: 2 sizeof(T) per element. Long rows are read twice.
// Accuracy   the sum is float, of 32 values a thread and then a tree; of long rows it is compensated. A row whose squares
//            leave the range of float is read and summed once more, in double. Subnormal results are 0.
#include "reduce.cuh"
#include "rows.cuh"
#include "l2_normalize_params.h"

template <int VEC, int CHUNKS>
__device__ __forceinline__ float squares(const float (&x)[CHUNKS][VEC]) {
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < CHUNKS; ++k) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) sum += x[k][i] * x[k][i];
  }
  return sum;
}

// max(sqrt(sum), eps); NaN stays.
__device__ __forceinline__ float divisor_of(float sum, float eps) {
  float norm = sqrtf(sum);
  return norm < eps ? eps : norm;
}

template <class T, int VEC, int CHUNKS>
__device__ __forceinline__ void write(T* out, i64 start, int end, float divisor, const float (&x)[CHUNKS][VEC]) {
#pragma unroll
  for (int k = 0; k < CHUNKS; ++k) {
    int col = (k * blockDim.x + threadIdx.x) * VEC;
    if (col < end) {
      float y[VEC];
#pragma unroll
      for (int i = 0; i < VEC; ++i) y[i] = x[k][i] / divisor;
      store<VEC>(out + start + col, y);
    }
  }
}

// Whether a row with this sum of squares is for `wide_row`. A mean square below the range is surely a norm below eps
// where that is not tiny: a row of zeros need not be read twice.
__device__ __forceinline__ bool out_of_range(float sum, float eps, float cols) {
  float mean_square = sum / cols;
  return !in_range(mean_square) && !(mean_square < 0x1p-100f && eps > 0x1p-49f * sqrtf(cols));
}

// The row that starts at `start`, `end` columns of it, in double. All threads that take part in a team's reduction.
template <class T>
__device__ __forceinline__ void wide_row(const L2NormalizeParams& p, i64 start, i64 end) {
  const T* x = static_cast<const T*>(p.x);
  double squares = 0.0;
#pragma unroll 1
  for (i64 col = threadIdx.x; col < end; col += blockDim.x) {
    double value = to_double(to_float(x[start + col]));
    squares += value * value;
  }
  double norm = sqrt(team_sum(squares, blockDim.x)), eps = to_double(p.eps);
  double divisor = norm < eps ? eps : norm;  // NaN stays
#pragma unroll 1
  for (i64 col = threadIdx.x; col < end; col += blockDim.x) {
    double value = to_double(to_float(x[start + col]));
    static_cast<T*>(p.out)[start + col] = from_float<T>(static_cast<float>(value / divisor));
  }
}

template <class T, int VEC, int CHUNKS>
__device__ __forceinline__ void l2_normalize_rows(const L2NormalizeParams& p) {
  const T* x = static_cast<const T*>(p.x);
  T* out = static_cast<T*>(p.out);
  i64 rows = p.rows, cols = p.cols;
  for (i64 first = static_cast<i64>(blockIdx.x) * blockDim.y; first < rows;
       first += static_cast<i64>(gridDim.x) * blockDim.y) {
    i64 row = first + threadIdx.y;
    i64 start = row * cols;
    int end = row < rows ? static_cast<int>(cols) : 0;  // a team without a row takes part in the reduction only
    float s[CHUNKS][VEC];
    load_row<VEC>(x, static_cast<const T*>(nullptr), start, end, s);
    float sum = team_sum(squares(s), blockDim.x);
    bool wide = end && out_of_range(sum, p.eps, static_cast<float>(cols));
    if (!wide) write(out, start, end, divisor_of(sum, p.eps), s);
    if (__any_sync(ALL_LANES, wide)) wide_row<T>(p, start, wide ? cols : 0);
  }
}

template <class T, int VEC, int CHUNKS>
__device__ __forceinline__ void l2_normalize_long(const L2NormalizeParams& p) {
  const T* x = static_cast<const T*>(p.x);
  T* out = static_cast<T*>(p.out);
  i64 rows = p.rows, cols = p.cols;
  int team = blockDim.x, step = team * VEC * CHUNKS;
  for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
    i64 start = row * cols;
    float s[CHUNKS][VEC];
    LongSum total;
    for (i64 first = 0; first < cols; first += step) {
      load_row<VEC>(x, static_cast<const T*>(nullptr), start + first, columns_left(first, cols, step), s);
      total.add(squares(s));
    }
    float sum = team_sum(total.value(), team);
    if (out_of_range(sum, p.eps, static_cast<float>(cols))) {
      wide_row<T>(p, start, cols);
      continue;
    }
    float divisor = divisor_of(sum, p.eps);
    for (i64 first = 0; first < cols; first += step) {
      int end = columns_left(first, cols, step);
      load_row<VEC>(x, static_cast<const T*>(nullptr), start + first, end, s);
      write(out, start + first, end, divisor, s);
    }
  }
}

// The names are explained in softmax.cu.
#define ENTRY(name, body, threads, T, VEC, CHUNKS) \
  KERNEL(name, threads, 1)(L2NormalizeParams_PARAMETERS) { \
    const L2NormalizeParams p = L2NormalizeParams_VALUES; \
    body<T, VEC, CHUNKS>(p); \
  }
#define ENTRIES(type, T) \
  ENTRY(l2_normalize_##type##_8, l2_normalize_rows, 1024, T, VECTOR<T>, 8 / VECTOR<T>) \
  ENTRY(l2_normalize_##type##_16, l2_normalize_rows, 1024, T, VECTOR<T>, 16 / VECTOR<T>) \
  ENTRY(l2_normalize_##type##_32, l2_normalize_rows, 512, T, VECTOR<T>, 32 / VECTOR<T>) \
  ENTRY(l2_normalize_##type##_single_8, l2_normalize_rows, 512, T, 1, 8) \
  ENTRY(l2_normalize_##type##_long, l2_normalize_long, 512, T, VECTOR<T>, 16 / VECTOR<T>) \
  ENTRY(l2_normalize_##type##_single_long, l2_normalize_long, 512, T, 1, 4)

ENTRIES(f32, float)
ENTRIES(f16, f16)
ENTRIES(bf16, bf16)

// y[r,c] = s[r,c] / sqrt(mean_c(s[r]^2) + p.eps) * weight[c], s = x + residual; residual_out = s.
//
// Arrays     x, residual, out, residual_out: (rows, cols) T, row-major; residual and residual_out may be null; out
//            and residual_out may be x or residual: a thread reads an element for the last time before it writes it.
//            weight: (cols) of weight_type
// Ownership  A team of blockDim.x threads holds a row in registers, each thread up to 32 values of it; a block
//            has blockDim.y teams. 32 halves are held as they are stored (a residual is then read again from the L1
//            cache). Two blocks of 512 threads fit a multiprocessor: 64 registers a thread. Rows too long for 512 threads:
//            the whole block goes through the row twice.
// Launch     block (team, teams): teams of 1 to 32 lanes fill 128 threads, larger teams are the block;
//            grid (blocks), rows in strides of the grid
// Shared     128 bytes, of teams larger than a warp only
// Bytes      reads x, residual and weight once, writes out and residual_out once: 2 to 4 sizeof(T) per element.
//            Long rows are read twice.
// Accuracy   the sum is float, of 32 values a thread and then a tree; of long rows it is compensated. A row whose squares
//            leave the range of float is read and summed once more, in double. Subnormal results are 0.
//
// Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
#include "reduce.cuh"
#include "rows.cuh"
#include "norm_params.h"

template <class T, int VEC>
__device__ __forceinline__ void write(const NormParams& p, i64 start, i64 col, float factor, const float (&s)[VEC]) {
  float gain[VEC], y[VEC];
  load_vector<VEC, T>(p.weight, p.weight_type, col, gain);
#pragma unroll
  for (int i = 0; i < VEC; ++i) y[i] = s[i] * factor * gain[i];
  if (p.residual_out) store<VEC>(static_cast<T*>(p.residual_out) + start + col, s);
  store<VEC>(static_cast<T*>(p.out) + start + col, y);
}

template <int VEC, int CHUNKS>
__device__ __forceinline__ float add_squares(float sum, const float (&s)[CHUNKS][VEC]) {
#pragma unroll
  for (int k = 0; k < CHUNKS; ++k) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) sum += s[k][i] * s[k][i];
  }
  return sum;
}

// The row that starts at `start`, `end` columns of it, in double. All threads that take part in a team's reduction.
template <class T>
__device__ __forceinline__ void wide_row(const NormParams& p, i64 start, i64 end) {
  const T* x = static_cast<const T*>(p.x);
  const T* residual = static_cast<const T*>(p.residual);
  double squares = 0.0;
#pragma unroll 1
  for (i64 col = threadIdx.x; col < end; col += blockDim.x) {
    double s = wide_value(x, residual, start + col);
    squares += s * s;
  }
  double factor = 1.0 / sqrt(team_sum(squares, blockDim.x) / static_cast<double>(p.cols) + to_double(p.eps));
#pragma unroll 1
  for (i64 col = threadIdx.x; col < end; col += blockDim.x) {
    double s = wide_value(x, residual, start + col);
    float gain[1];
    load_vector<1, T>(p.weight, p.weight_type, col, gain);
    if (p.residual_out) static_cast<T*>(p.residual_out)[start + col] = from_float<T>(static_cast<float>(s));
    static_cast<T*>(p.out)[start + col] = from_float<T>(static_cast<float>(s * factor * to_double(gain[0])));
  }
}

// Held: Sums or Halves, what a thread has of its row.
template <class T, class Held>
__device__ __forceinline__ void rms_norm_rows(const NormParams& p) {
  constexpr int VEC = Held::VEC, CHUNKS = Held::CHUNKS;
  const T* x = static_cast<const T*>(p.x);
  const T* residual = static_cast<const T*>(p.residual);
  i64 rows = p.rows, cols = p.cols;
  int team = blockDim.x;
  for (i64 first = static_cast<i64>(blockIdx.x) * blockDim.y; first < rows;
       first += static_cast<i64>(gridDim.x) * blockDim.y) {
    i64 row = first + threadIdx.y;
    i64 start = row * cols;
    int end = row < rows ? static_cast<int>(cols) : 0;  // a team without a row takes part in the reduction only
    const Held held(x, residual, start, end);
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < CHUNKS; ++k) {
      float s[1][VEC];
      held.chunk(k, residual, start, end, s[0]);
      sum = add_squares(sum, s);
    }
    float mean_square = team_sum(sum, team) / static_cast<float>(cols) + p.eps;
    bool wide = end && !in_range(mean_square);
    float factor = 1.0f / sqrtf(mean_square);
#pragma unroll
    for (int k = 0; k < CHUNKS; ++k) {
      int col = (k * team + threadIdx.x) * VEC;
      if (col < end && !wide) {
        float s[VEC];
        held.chunk(k, residual, start, end, s);
        write<T>(p, start, col, factor, s);
      }
    }
    if (__any_sync(ALL_LANES, wide)) wide_row<T>(p, start, wide ? cols : 0);
  }
}

template <class T, int VEC, int CHUNKS>
__device__ __forceinline__ void rms_norm_long(const NormParams& p) {
  const T* x = static_cast<const T*>(p.x);
  const T* residual = static_cast<const T*>(p.residual);
  i64 rows = p.rows, cols = p.cols;
  int team = blockDim.x, step = team * VEC * CHUNKS;
  for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
    i64 start = row * cols;
    float s[CHUNKS][VEC];
    LongSum total;
    for (i64 first = 0; first < cols; first += step) {
      load_row<VEC>(x, residual, start + first, columns_left(first, cols, step), s);
      total.add(add_squares(0.0f, s));
    }
    float mean_square = team_sum(total.value(), team) / static_cast<float>(cols) + p.eps;
    if (!in_range(mean_square)) {
      wide_row<T>(p, start, cols);
      continue;
    }
    float factor = 1.0f / sqrtf(mean_square);
    for (i64 first = 0; first < cols; first += step) {
      int end = columns_left(first, cols, step);
      load_row<VEC>(x, residual, start + first, end, s);
#pragma unroll
      for (int k = 0; k < CHUNKS; ++k) {
        int col = (k * team + threadIdx.x) * VEC;
        if (col < end) write<T>(p, start, first + col, factor, s[k]);
      }
    }
  }
}

// The names are explained in softmax.cu; Halves as in layer_norm.cu.
#define ENTRY(name, threads, blocks, ...) \
  KERNEL(name, threads, blocks)(NormParams_PARAMETERS) { \
    const NormParams p = NormParams_VALUES; \
    __VA_ARGS__(p); \
  }
#define ENTRIES(type, T, Held) \
  ENTRY(rms_norm_##type##_8, 1024, 1, rms_norm_rows<T, Sums<T, VECTOR<T>, 8 / VECTOR<T>>>) \
  ENTRY(rms_norm_##type##_16, 1024, 1, rms_norm_rows<T, Sums<T, VECTOR<T>, 16 / VECTOR<T>>>) \
  ENTRY(rms_norm_##type##_32, 512, 2, rms_norm_rows<T, Held<T, VECTOR<T>, 32 / VECTOR<T>>>) \
  ENTRY(rms_norm_##type##_single_8, 512, 1, rms_norm_rows<T, Sums<T, 1, 8>>) \
  ENTRY(rms_norm_##type##_long, 512, 1, rms_norm_long<T, VECTOR<T>, 16 / VECTOR<T>>) \
  ENTRY(rms_norm_##type##_single_long, 512, 1, rms_norm_long<T, 1, 4>)

ENTRIES(f32, float, Sums)
ENTRIES(f16, f16, Halves)
ENTRIES(bf16, bf16, Halves)

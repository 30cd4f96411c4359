// y[r,c] = (s[r,c] - mean s[r]) / sqrt(var s[r] + eps) * weight[c] + bias[c], s = x + residual; residual_out = s.
//
// Arrays     x, residual, out, residual_out: (rows, cols) T, row-major; residual and residual_out may be null; out
//            and residual_out may be x or residual: a thread reads an element for the last time before it writes it.
//            weight, bias: (cols) of weight_type and bias_type; bias may be null
// Ownership  A team of blockDim.x threads holds a row in registers, each thread up to 32 values of it; a block
//            has blockDim.y teams. 32 halves are held as they are stored (a residual is then read again from the L1
//            cache). Two blocks of 512 threads fit a multiprocessor: 64 registers a thread (float
//            before sm_90: one, 80). Rows too long for 512 threads:
//            the whole block goes through the row twice.
// Launch     block (team, teams): teams of 1 to 32 lanes fill 128 threads, larger teams are the block;
//            grid (blocks), rows in strides of the grid
// Shared     128 bytes a sum, three of them, of teams larger than a warp only
// Bytes      reads x, residual, weight and bias once, writes out and residual_out once: 2 to 4 sizeof(T) per element.
//            Long rows are read twice.
// Accuracy   Moments are sums of d = s - pivot and of d^2, with the pivot near the mean: the row's rounded mean, or
//            of long rows the mean of their first step (8192 columns, or 2048 one by one). With a pivot so near, var = mean(d^2) -
//            mean(d)^2 loses no digits, and s - mean = d - mean(d) is exact to the last place of the spread, where a
//            mean of 1e4 itself has a last place of 1e-3. Long rows are summed with compensation. A row whose squares
//            leave the range of float, or whose spread the pivot's own rounding hides, is read and summed once more, in
//            double. Subnormal results are 0.
//
// Sources: Ba, Kiros and Hinton 2016, "Layer normalization"; the shifted moments, Chan, Golub and LeVeque 1983.
#include "reduce.cuh"
#include "rows.cuh"
#include "norm_params.h"

// Of a row: s - mean = (s - pivot) - offset, and 1 / sqrt(var + eps); wide: the row is for `wide_row`.
struct Moments {
  float pivot, offset, inverse;
  bool wide;
};

// mean(d^2) / var above this is little but the error of the pivot. Of the mean of a long row's first step it is up to
// 1 + the number of steps.
constexpr float MOST_OFF = 16.0f, MOST_OFF_LONG = 512.0f;

// d: sums over the row of d and of d^2
__device__ __forceinline__ Moments moments(float pivot, const float (&d)[2], float cols, float eps, float most) {
  float offset = d[0] / cols, square = d[1] / cols;
  float variance = square - offset * offset;
  variance = (variance < 0.0f ? 0.0f : variance) + eps;  // below 0: a constant row, after rounding; NaN stays
  return {pivot, offset, 1.0f / sqrtf(variance), !in_range(variance) || square > most * variance};
}

// The row that starts at `start`, `end` columns of it, in double. All threads that take part in a team's reduction.
template <class T>
__device__ __forceinline__ void wide_row(const NormParams& p, i64 start, i64 end) {
  const T* x = static_cast<const T*>(p.x);
  const T* residual = static_cast<const T*>(p.residual);
  double cols = static_cast<double>(p.cols), sum = 0.0, squares = 0.0;
#pragma unroll 1
  for (i64 col = threadIdx.x; col < end; col += blockDim.x) sum += wide_value(x, residual, start + col);
  double mean = team_sum(sum, blockDim.x) / cols;  // of equal values it is that value: their sum is exact
#pragma unroll 1
  for (i64 col = threadIdx.x; col < end; col += blockDim.x) {
    double d = wide_value(x, residual, start + col) - mean;
    squares += d * d;
  }
  double inverse = 1.0 / sqrt(team_sum(squares, blockDim.x) / cols + to_double(p.eps));
#pragma unroll 1
  for (i64 col = threadIdx.x; col < end; col += blockDim.x) {
    double s = wide_value(x, residual, start + col);
    float gain[1];
    load_vector<1, T>(p.weight, p.weight_type, col, gain);
    double y = (s - mean) * inverse * to_double(gain[0]);
    if (p.bias) {
      float shift[1];
      load_vector<1, T>(p.bias, p.bias_type, col, shift);
      y += to_double(shift[0]);
    }
    if (p.residual_out) static_cast<T*>(p.residual_out)[start + col] = from_float<T>(static_cast<float>(s));
    static_cast<T*>(p.out)[start + col] = from_float<T>(static_cast<float>(y));
  }
}

template <class T, int VEC>
__device__ __forceinline__ void write(const NormParams& p, i64 start, i64 col, const Moments& m,
                                      const float (&s)[VEC]) {
  float gain[VEC], y[VEC];
  load_vector<VEC, T>(p.weight, p.weight_type, col, gain);
#pragma unroll
  for (int i = 0; i < VEC; ++i) y[i] = (s[i] - m.pivot - m.offset) * m.inverse * gain[i];
  if (p.bias) {
    float shift[VEC];
    load_vector<VEC, T>(p.bias, p.bias_type, col, shift);
#pragma unroll
    for (int i = 0; i < VEC; ++i) y[i] += shift[i];
  }
  if (p.residual_out) store<VEC>(static_cast<T*>(p.residual_out) + start + col, s);
  store<VEC>(static_cast<T*>(p.out) + start + col, y);
}

template <int VEC, int CHUNKS>
__device__ __forceinline__ float add_to(float sum, const float (&s)[CHUNKS][VEC]) {
#pragma unroll
  for (int k = 0; k < CHUNKS; ++k) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) sum += s[k][i];
  }
  return sum;
}

// d += sums of s - pivot and of its square.
template <int VEC>
__device__ __forceinline__ void add_deviations(const float (&s)[VEC], float pivot, float (&d)[2]) {
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    float apart = s[i] - pivot;
    d[0] += apart;
    d[1] += apart * apart;
  }
}

// d = those sums over the thread's chunks.
template <int VEC, int CHUNKS>
__device__ __forceinline__ void deviations(const float (&s)[CHUNKS][VEC], float pivot, int end, float (&d)[2]) {
  d[0] = d[1] = 0.0f;
#pragma unroll
  for (int k = 0; k < CHUNKS; ++k) {
    if (static_cast<int>(k * blockDim.x + threadIdx.x) * VEC < end) add_deviations(s[k], pivot, d);
  }
}

// Held: Sums or Halves, what a thread has of its row.
template <class T, class Held>
__device__ __forceinline__ void layer_norm_rows(const NormParams& p) {
  constexpr int VEC = Held::VEC, CHUNKS = Held::CHUNKS;
  const T* x = static_cast<const T*>(p.x);
  const T* residual = static_cast<const T*>(p.residual);
  i64 rows = p.rows, cols = p.cols;
  int team = blockDim.x;
  float count = static_cast<float>(cols);
  for (i64 first = static_cast<i64>(blockIdx.x) * blockDim.y; first < rows;
       first += static_cast<i64>(gridDim.x) * blockDim.y) {
    i64 row = first + threadIdx.y;
    i64 start = row * cols;
    int end = row < rows ? static_cast<int>(cols) : 0;  // a team without a row takes part in the reductions only
    const Held held(x, residual, start, end);
    float sum = 0.0f, d[2] = {};
#pragma unroll
    for (int k = 0; k < CHUNKS; ++k) {
      float s[1][VEC];
      held.chunk(k, residual, start, end, s[0]);
      sum = add_to(sum, s);
    }
    float pivot = team_sum(sum, team) / count;
#pragma unroll
    for (int k = 0; k < CHUNKS; ++k) {
      int col = (k * team + threadIdx.x) * VEC;
      float s[VEC];
      if (col < end) {
        held.chunk(k, residual, start, end, s);
        add_deviations(s, pivot, d);
      }
    }
    team_reduce(d, team, Add());
    Moments m = moments(pivot, d, count, p.eps, MOST_OFF);
    m.wide = m.wide && end;
#pragma unroll
    for (int k = 0; k < CHUNKS; ++k) {
      int col = (k * team + threadIdx.x) * VEC;
      if (col < end && !m.wide) {
        float s[VEC];
        held.chunk(k, residual, start, end, s);
        write<T>(p, start, col, m, s);
      }
    }
    if (__any_sync(ALL_LANES, m.wide)) wide_row<T>(p, start, m.wide ? cols : 0);
  }
}

template <class T, int VEC, int CHUNKS>
__device__ __forceinline__ void layer_norm_long(const NormParams& p) {
  const T* x = static_cast<const T*>(p.x);
  const T* residual = static_cast<const T*>(p.residual);
  i64 rows = p.rows, cols = p.cols;
  int team = blockDim.x, step = team * VEC * CHUNKS;
  for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
    i64 start = row * cols;
    float s[CHUNKS][VEC], d[2];
    int end = columns_left(0, cols, step);
    load_row<VEC>(x, residual, start, end, s);
    float pivot = team_sum(add_to(0.0f, s), team) / static_cast<float>(end);
    LongSum total, squares;
    for (i64 first = 0; first < cols; first += step) {
      end = columns_left(first, cols, step);
      load_row<VEC>(x, residual, start + first, end, s);
      deviations(s, pivot, end, d);
      total.add(d[0]);
      squares.add(d[1]);
    }
    d[0] = total.value();
    d[1] = squares.value();
    team_reduce(d, team, Add());
    Moments m = moments(pivot, d, static_cast<float>(cols), p.eps, MOST_OFF_LONG);
    if (m.wide) {
      wide_row<T>(p, start, cols);
      continue;
    }
    for (i64 first = 0; first < cols; first += step) {
      end = columns_left(first, cols, step);
      load_row<VEC>(x, residual, start + first, end, s);
#pragma unroll
      for (int k = 0; k < CHUNKS; ++k) {
        int col = (k * team + threadIdx.x) * VEC;
        if (col < end) write<T>(p, start, first + col, m, s[k]);
      }
    }
  }
}

// Blocks of rows of float that a multiprocessor is to hold: before sm_90 32 floats do not fit 64 registers without spills.
#if defined(RBE_HOST) || __CUDA_ARCH__ >= 900
constexpr int FLOAT_BLOCKS = 2;
#else
constexpr int FLOAT_BLOCKS = 1;
#endif

// The names are explained in softmax.cu. Two blocks of rows that take 512 threads fit a multiprocessor: one loads
// while the other stores.
#define ENTRY(name, threads, blocks, ...) \
  KERNEL(name, threads, blocks)(NormParams_PARAMETERS) { \
    const NormParams p = NormParams_VALUES; \
    __VA_ARGS__(p); \
  }
#define ENTRIES(type, T, Held, blocks) \
  ENTRY(layer_norm_##type##_8, 1024, 1, layer_norm_rows<T, Sums<T, VECTOR<T>, 8 / VECTOR<T>>>) \
  ENTRY(layer_norm_##type##_16, 1024, 1, layer_norm_rows<T, Sums<T, VECTOR<T>, 16 / VECTOR<T>>>) \
  ENTRY(layer_norm_##type##_32, 512, blocks, layer_norm_rows<T, Held<T, VECTOR<T>, 32 / VECTOR<T>>>) \
  ENTRY(layer_norm_##type##_single_8, 512, 1, layer_norm_rows<T, Sums<T, 1, 8>>) \
  ENTRY(layer_norm_##type##_long, 512, 1, layer_norm_long<T, VECTOR<T>, 16 / VECTOR<T>>) \
  ENTRY(layer_norm_##type##_single_long, 512, 1, layer_norm_long<T, 1, 4>)

ENTRIES(f32, float, Sums, FLOAT_BLOCKS)
ENTRIES(f16, f16, Halves, 2)
ENTRIES(bf16, bf16, Halves, 2)

// y[t,n] = activation(sum_k x[t,k] W[n,k] + bias[n]) + residual[t,n] with int8 activations: dense and grid codes of 2 to 8
// bits, without a basis.
//
// With a column's scale s_k (dense codes: 1), q the codes as integers, x^ = S^T x (linear_inputs; without a transform x):
//     a_t = max_k |x^[t,k] s_k|,  z[t,k] = round(127 x^[t,k] s_k / a_t),  ties to even
//     grid:   y^[t,n] = a_t / 127 * row_scale[n] * sum_k q[n,k] z[t,k]
//     dense:  y^[t,n] = a_t / 127 * sum_g scale[n,g] * sum_{k in g} (q[n,k] + 1/2) z[t,k]
// then y_I = gain * S y^_I, bias, activation, residual. The definition, bit for bit of z: reference.int8_activations.
//
//   linear_integers_inputs   z and a_t / 127; a token with a value that is not finite has z = 0 and scale NaN
//   linear_integers_few      up to 64 tokens, 16 at a time, k split over blocks; the last block of a tile finishes it
//   linear_integers_tiles    grid codes: a tile of 128 x 128 results a block; S, bias, activation, residual at the end
//   linear_integers_groups   the same of dense codes, 64 tokens x 128 outputs: twice as many sums, of a group and of all
//
// Arrays     x: (tokens, cols); z: (tokens, K) int8; scale: (tokens) float; parts: (splits, tokens, ld), int32 of grid
//            codes, float of dense ones. Codes: codes.cuh.
// Ownership  inputs: a block a token. Others: 256 threads, tiles as in linear.cuh, k in steps of 128, two stages; codes
//            through registers to int8 in shared memory, two runs of 32 a thread
// Launch     grid (tiles, of few tokens rows * splits of k * groups of tokens); inputs go on in strides of the grid
// Shared     64 KB; few: 36 KB
// Bytes      codes and scales once per tile of tokens (tiles: 128, groups: 64, few: 16); z 1 byte a value, once per tile of
//            128 outputs; inputs: x twice, z once; few: parts 8 bytes a sum, written and read
// Accuracy   sums of grid codes are exact, of dense codes those of a group (of 128 columns and 8 bits: of 64). The launchers
//            take K up to 32,896 = 2^31 / (2 * 255 * 128), the limit of all backends (matmul.int8_support; these sums of
//            products up to 128 * 127 are exact to 132,104), and only grid codes with shrink = 0. x^ s_k and scales are
//            rounded to float.
#include "finish.cuh"
#include "linear_integers_params.h"

// --- activations

struct MaxBits {
  static constexpr u32 IDENTITY = 0;
  __device__ __forceinline__ u32 operator()(u32 a, u32 b) const { return a > b ? a : b; }
};

// x^ times the column scales, of 4 columns; zeros beyond the last.
__device__ __forceinline__ void scaled_activations(const Int8InputsParams& p, i64 token, i64 col, float (&v)[4]) {
  load_activations(p.x, token, col, v);
  if (!p.col_scale) return;
  float step[4];
  load<4>(p.col_scale + col, step);
#pragma unroll
  for (int n = 0; n < 4; ++n) v[n] *= step[n];
}

KERNEL(linear_integers_inputs, 256)(Int8InputsParams_PARAMETERS) {
  const Int8InputsParams p = Int8InputsParams_VALUES;
  for (i64 token = blockIdx.x; token < p.x.tokens; token += gridDim.x) {
    u32 top[1] = {0};  // of the values' bits without the sign: an Inf is greater than all numbers, a NaN than that
    for (i64 col = 4 * threadIdx.x; col < p.padded; col += 4 * blockDim.x) {
      float v[4];
      scaled_activations(p, token, col, v);
#pragma unroll
      for (int n = 0; n < 4; ++n) top[0] = max(top[0], __float_as_uint(v[n]) & 0x7fffffffu);
    }
    team_reduce(top, blockDim.x, MaxBits());
    bool finite = top[0] < 0x7f800000u;
    float absmax = fmaxf(__uint_as_float(top[0]), 1e-30f), inverse = 127.0f / absmax;
    for (i64 col = 4 * threadIdx.x; col < p.padded; col += 4 * blockDim.x) {
      float v[4];
      scaled_activations(p, token, col, v);
      u32 word = 0;
#pragma unroll
      for (int n = 0; n < 4; ++n) word |= (static_cast<u32>(__float2int_rn(v[n] * inverse)) & 0xffu) << 8 * n;
      *reinterpret_cast<u32*>(p.out + token * p.padded + col) = finite ? word : 0;
    }
    if (threadIdx.x == 0) p.scale[token] = finite ? absmax / 127.0f : NOT_A_NUMBER;
  }
}

// --- codes

// Runs of codes to int8: thread 2 r + h has runs 2 h and 2 h + 1 of row r, columns 64 h ... of the tile. k counts pairs of
// columns. The words stay as they were loaded until the tile before has been multiplied.
struct Int8Loader {
  static constexpr bool GROUPED = false;
  const u32* runs;  // of the thread, at k = 0
  u32 words[2][RUN_WORDS];
  bool valid;  // the row; of others the codes are 0

  __device__ __forceinline__ void begin(const Codes& c, i64 first, i64 rows, i64, i64) {
    i64 row = first + threadIdx.x / 2;
    valid = row < rows;
    runs = row_runs(c, valid ? row : 0) + threadIdx.x % 2 * 2 * c.bits;
#pragma unroll
    for (int run = 0; run < 2; ++run) {
#pragma unroll
      for (int i = 0; i < RUN_WORDS; ++i) words[run][i] = 0;
    }
  }
  // Nothing is read beyond the last column: any codes stand there, for z is 0.
  __device__ __forceinline__ void load(const Codes& c, i64, i64, i64 k) {
    i64 col = 2 * k + threadIdx.x % 2 * (2 * RUN);
#pragma unroll
    for (int run = 0; run < 2; ++run) {
      if (valid && col + run * RUN < c.cols) load_run(runs + (2 * k / RUN + run) * c.bits, c.bits, words[run]);
    }
  }
  // 4 codes u as int8: q = u - 2^(bits - 1), of dense codes of up to 7 bits 2 q + 1. No byte carries into the next.
  __device__ __forceinline__ u32 integers(const Codes& c, const u32 (&run)[RUN_WORDS], int quad) const {
    u32 u, none, half = 1u << (c.bits - 1);
    quad_bytes(run, c.bits, quad, u, none);
    bool odd = c.kind == CODES_DENSE && c.bits < 8;
    return (odd ? 2 * u + 0x01010101u * (129 - 2 * half) : u + 0x01010101u * (128 - half)) ^ 0x80808080u;
  }
  __device__ __forceinline__ void store(const Codes& c, i64, s8x2* tile) const {
    int row = threadIdx.x / 2, half = threadIdx.x % 2;
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk) {  // of 16 codes
      const u32(&run)[RUN_WORDS] = words[chunk / 2];
      int quad = chunk % 2 * 4;
      *reinterpret_cast<uint4*>(tile + half_at(row, half * 4 + chunk)) =
          make_uint4(integers(c, run, quad), integers(c, run, quad + 1), integers(c, run, quad + 2),
                     integers(c, run, quad + 3));
    }
  }
  template <int MT, int NT>
  __device__ __forceinline__ void scale_sums(const Codes&, i64, i64, int (&)[MT][NT][4]) const {}
};

// The sums of a group of columns: they begin at the bits of a float whose last digit is worth 1 or 1/2, so that they are
// floats without a conversion (of 8 bits 128 * 128 * 127 and of fewer 128 * 127 * 127 lie within 2^22). Of codes of 8 bits
// 2 q + 1 is no int8: the other half of the sum of z comes from a matmul with ones.
template <int MT, int NT>
struct GroupLoader : Int8Loader {
  static constexpr bool GROUPED = true;
  static constexpr float UNITS = 12582912.0f, HALVES = 6291456.0f;  // 1.5 * 2^23 and 2^22
  int sums[MT][NT][4], ones[MT][4];
  float scale[NT][2];
  f16* shared_scales;  // (2, BK / 16, BN), behind the stages: those of the tile that is multiplied, and of the next
  const f16* scales;   // of the thread's row
  f16 run_scales[2];   // of the thread's runs; the second where groups are runs
  int turn;            // of the next tile

  static __device__ __forceinline__ bool wide(const Codes& c) { return c.bits == 8; }
  // Steps of 32 columns whose sums are one integer: those of a group; of 8 bits half of one of 128, which would spill.
  static __device__ __forceinline__ int steps(const Codes& c) { return wide(c) && c.group == 128 ? 2 : c.group / RUN; }
  static __device__ __forceinline__ void multiply(int (&sum)[4], bool first, float zero, const u32 (&a)[4],
                                                  const u32 (&b)[2]) {
    if (first) {
      int start = static_cast<int>(__float_as_uint(zero)), four[4] = {start, start, start, start};
      mma_16x8x32_s8(sum, a, b, four);
    } else {
      mma_16x8x32_s8(sum, a, b, sum);
    }
  }
  __device__ __forceinline__ void begin(const Codes& c, i64 first, i64 rows, i64 begin, i64 end) {
    Int8Loader::begin(c, first, rows, begin, end);
    scales = c.scale + (valid ? first + threadIdx.x / 2 : 0) * ((c.cols + c.group - 1) / c.group);
    run_scales[0].bits = run_scales[1].bits = 0;
    turn = 0;
  }
  __device__ __forceinline__ void load(const Codes& c, i64 first, i64 rows, i64 k) {
    Int8Loader::load(c, first, rows, k);
    i64 col = 2 * k + threadIdx.x % 2 * (2 * RUN);
    if (valid && col < c.cols) run_scales[0] = scales[col / c.group];
    if (c.group == RUN && valid && col + RUN < c.cols) run_scales[1] = scales[col / RUN + 1];
  }
  __device__ __forceinline__ void store(const Codes& c, i64 k, s8x2* tile) {
    Int8Loader::store(c, k, tile);
    f16* to = shared_scales + turn * (BK / 16 * BN) + threadIdx.x % 2 * (2 * BN) + threadIdx.x / 2;
    to[0] = run_scales[0];
    if (c.group == RUN) to[BN] = run_scales[1];
    turn ^= 1;
  }
  // After the last step of sums, the scales of the rows whose sums a thread has; n0: the first row of the warp.
  __device__ __forceinline__ void read_scales(const Codes& c, int n0, int step) {
    if ((step + 1) % steps(c)) return;
    int first = step + 1 - steps(c);
    const f16* from = shared_scales + (turn ^ 1) * (BK / 16 * BN) + first * BN + n0 + 2 * (threadIdx.x % 4);
#pragma unroll
    for (int n = 0; n < NT; ++n) ::load<2>(from + 8 * n, scale[n]);
  }
  __device__ __forceinline__ void multiply(const Codes& c, int step, int m, int n, const u32 (&a)[4],
                                           const u32 (&b)[2]) {
    bool first = step % steps(c) == 0;
    multiply(sums[m][n], first, wide(c) ? UNITS : HALVES, a, b);
    if (wide(c) && n == 0) {
      u32 one[2] = {0x01010101u, 0x01010101u};
      multiply(ones[m], first, HALVES, a, one);
    }
  }
  // After the last step of sums: to the total of the tile (m, n).
  __device__ __forceinline__ void add_group(const Codes& c, int step, int m, int n, float (&total)[4]) const {
    if ((step + 1) % steps(c)) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float sum = __uint_as_float(sums[m][n][i]) - (wide(c) ? UNITS : HALVES);
      if (wide(c)) sum += __uint_as_float(ones[m][i / 2 * 2]) - HALVES;
      total[i] = fmaf(scale[n][i % 2], sum, total[i]);
    }
  }
  __device__ __forceinline__ void scale_sums(const Codes&, i64, i64, float (&)[MT][NT][4]) const {}
};

// --- few tokens

// 16 tokens x 128 rows a block; splits of `each` columns, finished by the last block of a tile.
template <class LOADER, class SUM>
__device__ __forceinline__ void int8_few(const Int8FewParams& p) {
  DYNAMIC_SHARED(s8x2, stages);
  constexpr bool INTEGERS = !LOADER::GROUPED;
  SplitPlace place(p.rows, BN, p.splits);
  i64 first_token = place.group * 16, begin = place.split * p.each, end = min(begin + p.each, p.codes.cols);
  int tokens = static_cast<int>(min(p.tokens - first_token, i64{16})), block = p.finish.block;
  const f16* row_scale = INTEGERS ? p.codes.scale : nullptr;
  float* tile = reinterpret_cast<float*>(stages);
  {
    Tiles<s8x2, LOADER, 16, 1> matmul;
    matmul.multiply(stages, static_cast<const s8x2*>(p.x), p.tokens, p.codes.cols / 2, first_token, nullptr, 0, p.codes,
                    p.rows, place.first_row, begin / 2, end / 2, p.codes.cols / 2);
    __syncthreads();  // the stages are free
    matmul.visit([&](int token, int row, SUM a, SUM b) {
      i64 out = place.first_row + row;
      if (token >= tokens) return;
      if (p.splits == 1) {
        float two[2] = {static_cast<float>(a), static_cast<float>(b)};
#pragma unroll
        for (int i = 0; i < 2; ++i) two[i] *= INTEGERS ? to_float(row_scale[min(out + i, p.rows - 1)]) : 1.0f;
        store<2>(tile + line_at(block, BN, token, row), two);
      } else if (out < p.rows) {  // ld is even: there is room for one more
        uint2 two = make_uint2(__builtin_bit_cast(u32, a), __builtin_bit_cast(u32, b));
        *reinterpret_cast<uint2*>(p.parts + (place.split * p.tokens + first_token + token) * p.ld + out) = two;
      }
    });
  }
  if (p.splits > 1) {
    i64 tiles = (p.rows + BN - 1) / BN;
    if (!is_last_block(p.finish.counters + place.group * tiles + place.first_row / BN, p.splits)) return;
    add_parts<INTEGERS>(p.parts, p.splits, p.tokens, p.ld, first_token, tokens, place.first_row, BN, block, row_scale,
                        p.rows - 1, tile);
  }
  float factor = finish_factor(p.finish);
  finish_tile<256>(p.finish, tile, first_token, tokens, place.first_row, BN, [&](i64 token, i64, auto& v) {
    float scale = p.scale[token];
#pragma unroll
    for (float& value : v) value = value * factor * scale;
  });
}

KERNEL(linear_integers_few, 256, FEW_RESIDENT)(Int8FewParams_PARAMETERS) {
  const Int8FewParams p = Int8FewParams_VALUES;
  if (p.codes.kind == CODES_GRID) {
    int8_few<Int8Loader, int>(p);
  } else {
    int8_few<GroupLoader<1, 2>, float>(p);
  }
}

// --- many tokens

template <class LOADER, int BM>
__device__ __forceinline__ void int8_tile(const Int8MmaParams& p) {
  DYNAMIC_SHARED(unsigned char, memory);
  const Epilogue& epilogue = p.epilogue;
  const Codes& codes = p.codes;
  i64 tiles_m = (epilogue.tokens + BM - 1) / BM, pairs = codes.cols / 2;
  i64 first_m = blockIdx.x % tiles_m * BM, first_n = blockIdx.x / tiles_m * BN;
  float* tile = reinterpret_cast<float*>(memory);
  {
    Tiles<s8x2, LOADER, BM, 2> matmul;
    matmul.multiply(reinterpret_cast<s8x2*>(memory), static_cast<const s8x2*>(p.x), epilogue.tokens, pairs, first_m,
                    nullptr, 0, codes, p.rows, first_n, 0, pairs, pairs);
    __syncthreads();  // the stages are free
    matmul.visit([&](int row, int col, auto a, auto b) {
      float two[2] = {static_cast<float>(a), static_cast<float>(b)};
      if constexpr (!LOADER::GROUPED) {
#pragma unroll
        for (int i = 0; i < 2; ++i) two[i] *= to_float(codes.scale[min(first_n + col + i, p.rows - 1)]);
      }
      store<2>(tile + sum_at(p.block, row, col), two);
    });
  }
  __syncthreads();
  transform_sums<BM>(p.block, p.transform, tile);
  float gain = p.gain * transform_factor(p.transform, p.block);
  auto adjust = [&](i64 token, i64, auto& v) {
    float factor = gain * p.scale[token];
#pragma unroll
    for (float& value : v) value *= factor;
  };
  store_tile<BM>(tile, p.block, first_m, first_n, min(p.rows, epilogue.cols), epilogue, adjust);
}

KERNEL(linear_integers_tiles, 256, RESIDENT)(Int8MmaParams_PARAMETERS) {
  const Int8MmaParams p = Int8MmaParams_VALUES;
  int8_tile<Int8Loader, 128>(p);
}
KERNEL(linear_integers_groups, 256, RESIDENT)(Int8MmaParams_PARAMETERS) {
  const Int8MmaParams p = Int8MmaParams_VALUES;
  int8_tile<GroupLoader<2, 4>, 64>(p);
}

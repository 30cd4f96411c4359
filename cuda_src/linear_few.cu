// y[t,n] = activation(sum_k x[t,k] W[n,k] + bias[n]) + residual[t,n] of few tokens, W of dense or grid codes, in one launch.
//
// With x^_J = S^T x_J:  y_I = gain * (S sum_J C_IJ x^_J + sum_J sum_k p_IJk (Phi_k x_J))       (vectors: without S)
//
//   linear_few_dot_T   dot products in float, T tokens: a warp DOT_ROWS<T> rows at a time, a lane a run of 32 codes of each,
//                      all loaded before the first is unpacked. The basis' Phi_k x_J come from linear_features
//   linear_few_mma     tensor cores, 16 tokens, f16 x^ and C; without a basis
//
// A block makes the x^ of its own columns, adds its products to parts (where k is split), and the last block of a tile of
// results finishes it (finish.cuh): no launch before, none after.
//
// Arrays     x: (tokens, in), out and residual: (tokens, out), row-major; bias: (out). parts: (splits, tokens, ld) float;
//            counters: a tile of results each, 0 between launches. Codes and basis: codes.cuh, basis.cuh.
// Ownership  dot: 128 threads, 64 rows (blocks of 128 rows under S: 128), k in spans of 1024. mma: 256 threads, 16 tokens x
//            128 rows, k in steps of 64, two stages of codes
// Launch     grid: tiles * splits of k * groups of tokens
// Shared     dot: 4.5 KB a token of T. mma: 32 KB of codes, 2 KB a step of x^ (x as it lies: 4 KB)
// Bytes      codes and scales once per T (mma: 16) tokens; x, from the second-level cache, once for every block of rows;
//            parts 8 bytes a sum and split there
// Operations x^ is made again for every block of rows: tokens x columns x blocks of rows x some 20 instructions
// Accuracy   float sums. mma: x^ and C each rounded once to 11 bits (of grid codes C without the rows' scales), x^ scaled by a
//            power of two per token and split.
#include "finish.cuh"
#include "linear_few_params.h"

constexpr int SPAN = WARP * RUN;   // columns that a warp of linear_few_dot takes at once
constexpr int DOT_THREADS = 128, DOT_WARPS = DOT_THREADS / WARP;
template <int T>
constexpr int DOT_ROWS = T > 1 ? 2 : 4;  // rows of a warp: as many sums as registers

// --- dot products

// x^ of T tokens and a span of columns in shared memory, in the order in which lanes read it: (T, 8 quads, 32 runs, 4).
// Both barriers of the block are in it: nobody reads the span before, and all of the next is there after.
template <int T>
__device__ __forceinline__ void load_span(const DotParams& p, float* span, i64 first_token, i64 first_col) {
  constexpr int QUADS = T * SPAN / 4 / DOT_THREADS;  // of a thread
  int block = p.in_block, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  bool transformed = p.in_transform != NO_TRANSFORM;
  float v[QUADS][4];
  // A warp has 4 quads of 8 runs: whole sectors of x, and no bank twice.
  auto token_of = [&](int n) { return n / 2; };
  auto run_of = [&](int) { return warp * 8 + lane % 8; };
  auto quad_of = [&](int n) { return n % 2 * 4 + lane / 8; };
  auto place = [&](int n) {
    int col = run_of(n) * RUN + quad_of(n) * 4;
    return tile_at(block, token_of(n) * (SPAN / block) + col / block, col % block);
  };
#pragma unroll
  for (int n = 0; n < QUADS; ++n) {
    load_activations(p.x, first_token + token_of(n), first_col + run_of(n) * RUN + quad_of(n) * 4, v[n]);
  }
  __syncthreads();  // the span before is done with
  if (transformed) {
#pragma unroll
    for (int n = 0; n < QUADS; ++n) store<4>(span + place(n), v[n]);
    __syncthreads();
    transform_lines<true, DOT_THREADS>(block, p.in_transform, span, T * (SPAN / block));
#pragma unroll
    for (int n = 0; n < QUADS; ++n) load<4>(span + place(n), v[n]);
    __syncthreads();
  }
  float factor = transform_factor(p.in_transform, block);
#pragma unroll
  for (int n = 0; n < QUADS; ++n) {
    i64 col = first_col + run_of(n) * RUN + quad_of(n) * 4;
    float step[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    if (p.codes.kind == CODES_GRID && col < p.codes.cols) load<4>(p.codes.col_scale + col, step);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[n][i] *= factor * step[i];
    store<4>(span + token_of(n) * SPAN + quad_of(n) * (4 * WARP) + run_of(n) * 4, v[n]);
  }
  __syncthreads();
}

// The runs of a lane in the rows of its warp, as they are stored, and their scales.
template <int ROWS>
struct DotRuns {
  u32 words[ROWS][RUN_WORDS];
  f16 scale[ROWS];

  __device__ __forceinline__ void load(const Codes& c, i64 row, i64 rows, i64 scales, int run) {
    bool grid = c.kind == CODES_GRID;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      i64 source = min(row + r, rows - 1);
      load_run(row_runs(c, source) + static_cast<i64>(run) * c.bits, c.bits, words[r]);
      scale[r] = c.scale[source * scales + (grid ? 0 : run / (c.group / RUN))];
    }
  }
};

// The sums of T tokens and the rows of a block over the columns of its split, to lines of `sums`.
template <int T>
__device__ __forceinline__ void dot_sums(const DotParams& p, const SplitPlace& place, int rows_each, float* span_x,
                                         float* sums) {
  constexpr int ROWS = DOT_ROWS<T>;
  const Codes& c = p.codes;
  bool grid = c.kind == CODES_GRID;
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, block = p.finish.block;
  int runs = static_cast<int>(c.cols / RUN), spans = (runs + WARP - 1) / WARP;
  i64 scales = grid ? 1 : (c.cols + c.group - 1) / c.group;
  float middle = grid ? static_cast<float>(1 << (c.bits - 1)) : 0.5f * static_cast<float>((1 << c.bits) - 1);
  // sum (u - middle) x as sum u x - middle sum x, but not of wide codes, whose digits it would cost
  bool apart = !grid && c.bits <= 8;
  bool ahead = c.bits <= 8;  // two loads of wider codes are too many registers
  float factor = finish_factor(p.finish);
  int first = place.split * p.each, last = min(spans, first + p.each), passes = rows_each / (DOT_WARPS * ROWS);
  auto row_of = [&](int pass) { return place.first_row + (pass * DOT_WARPS + warp) * ROWS; };
  DotRuns<ROWS> next;
  prefetch_codes(c, place.first_row, rows_each, p.rows, static_cast<i64>(first) * SPAN,
                 min(static_cast<i64>(last) * SPAN, c.cols));
  for (int i = threadIdx.x; i < T * rows_each; i += DOT_THREADS) sums[i] = 0.0f;
  for (int span = first; span < last; ++span) {
    int run = min(span * WARP + lane, runs - 1);  // x^ is 0 beyond the last
    load_span<T>(p, span_x, place.group * T, static_cast<i64>(span) * SPAN);
    if (ahead) next.load(c, row_of(0), p.rows, scales, run);
    // hot: dot
    for (int pass = 0; pass < passes; ++pass) {
      DotRuns<ROWS> now = next;
      if (!ahead) now.load(c, row_of(pass), p.rows, scales, run);
      if (ahead && pass + 1 < passes) next.load(c, row_of(pass + 1), p.rows, scales, run);
      float part[ROWS * T] = {}, sum[T] = {};
#pragma unroll
      for (int quad = 0; quad < RUN / 4; ++quad) {
        float u[ROWS][4];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          unpack_quad(now.words[r], c.bits, quad, u[r]);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (!apart) u[r][i] -= middle;
            if (grid) u[r][i] = shrunk(u[r][i], c.offset);
          }
        }
#pragma unroll
        for (int t = 0; t < T; ++t) {
          float v[4];
          load<4>(span_x + t * SPAN + quad * (4 * WARP) + lane * 4, v);
          if (apart) sum[t] += (v[0] + v[1]) + (v[2] + v[3]);
#pragma unroll
          for (int r = 0; r < ROWS; ++r) {
#pragma unroll
            for (int i = 0; i < 4; ++i) part[r * T + t] = fmaf(u[r][i], v[i], part[r * T + t]);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
#pragma unroll
        for (int t = 0; t < T; ++t) {
          float v = part[r * T + t];
          if (apart) v = fmaf(-middle, sum[t], v);
          part[r * T + t] = to_float(now.scale[r]) * v;
        }
      }
      warp_reduce(part, WARP, Add());
      if (lane == 0) {
        int row = static_cast<int>(row_of(pass) - place.first_row);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
#pragma unroll
          for (int t = 0; t < T; ++t) {
            float& sum = sums[line_at(block, rows_each, t, row + r)];
            sum = fmaf(factor, part[r * T + t], sum);
          }
        }
      }
    }
  }
  __syncthreads();
}

template <int T>
__device__ __forceinline__ void few_dot(const DotParams& p) {
  __shared__ float4 span[T * SPAN / 4];
  __shared__ float4 storage[T * 128 / 4];
  float* sums = reinterpret_cast<float*>(storage);
  int block = p.finish.block, rows_each = max(block, 64);
  SplitPlace place(p.rows, rows_each, p.splits);
  i64 first_token = place.group * T;
  int tokens = static_cast<int>(min(p.x.tokens - first_token, static_cast<i64>(T)));
  dot_sums<T>(p, place, rows_each, reinterpret_cast<float*>(span), sums);
  if (p.splits > 1) {
    for (int i = threadIdx.x; i < tokens * rows_each; i += DOT_THREADS) {
      i64 token = first_token + i / rows_each, row = place.first_row + i % rows_each;
      if (row < p.rows) {
        p.parts[(place.split * p.x.tokens + token) * p.ld + row] =
            sums[line_at(block, rows_each, i / rows_each, i % rows_each)];
      }
    }
    i64 tiles = (p.rows + rows_each - 1) / rows_each;
    if (!is_last_block(p.finish.counters + place.group * tiles + place.first_row / rows_each, p.splits)) return;
    add_parts<false>(p.parts, p.splits, p.x.tokens, p.ld, first_token, tokens, place.first_row, rows_each, block, nullptr, 0,
                     sums);
  }
  finish_tile<DOT_THREADS>(p.finish, sums, first_token, tokens, place.first_row, rows_each, [&](i64 token, i64 row, auto& v) {
    if (!p.with_basis) return;
    constexpr int N = sizeof v / sizeof v[0];
#pragma unroll 1
    for (int n = 0; n < N; ++n) {
      float sum = basis_product(p.basis, p.features, token, row + n, p.blocks, p.basis_block, p.matrix);
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] = i == n ? fmaf(p.finish.gain, sum, v[i]) : v[i];
    }
  });
}

#define DOT(T, ...) \
  KERNEL(linear_few_dot_##T, __VA_ARGS__)(DotParams_PARAMETERS) { \
    const DotParams p = DotParams_VALUES; \
    few_dot<T>(p); \
  }
// The bounds are those with which the compiler keeps all values in registers, for every architecture.
DOT(1, 128, ONE_RESIDENT)
DOT(4, 128, 2)
DOT(8, 128, 2)

// --- tensor cores

constexpr int FEW = 16;          // tokens of a block
constexpr int CHUNK = 512;       // columns of a split at most: x^ as floats takes the 32 KB of the codes, which come later
constexpr int MMA_FEW_THREADS = 256;

// x^ of 16 tokens and the columns begin ... end - 1, a chunk at most, as f16, a tile (16, 64) a step, zeros behind `end`; each
// token divided by a power of two, which `scales` gets, ahead of the transform, whose sums may be infinite else.
__device__ __forceinline__ void make_inputs(const FewMmaParams& p, i64 first_token, i64 begin, i64 end, float* tile, f16* out,
                                            float* scales) {
  constexpr int QUADS = FEW * CHUNK / 4 / MMA_FEW_THREADS, APART = MMA_FEW_THREADS / FEW;
  int block = p.in_block, token = threadIdx.x / APART, cols = static_cast<int>(end - begin);
  // The lines of a block one after another: those of the columns there are, which may be one block, are the first.
  auto place = [&](int col) { return tile_at(block, col / block * FEW + token, col % block); };
  auto is_there = [&](int n) { return n * (APART * 4) < cols; };  // of all threads alike
  float v[QUADS][4] = {}, top[1] = {0.0f};
#pragma unroll
  for (int n = 0; n < QUADS; ++n) {
    if (!is_there(n)) break;
    load_activations(p.x, first_token + token, begin + (n * APART + threadIdx.x % APART) * 4, v[n]);
  }
#pragma unroll
  for (int n = 0; n < QUADS; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) top[0] = fmaxf(top[0], fabsf(v[n][i]));
  }
  warp_reduce(top, APART, Max());
  float scale = token_scale(top[0]), inverse = 1.0f / scale;
  if (threadIdx.x % APART == 0) scales[token] = scale;
#pragma unroll
  for (int n = 0; n < QUADS; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[n][i] *= inverse;
    if (is_there(n)) store<4>(tile + place((n * APART + threadIdx.x % APART) * 4), v[n]);
  }
  __syncthreads();
  transform_lines<true, MMA_FEW_THREADS>(block, p.in_transform, tile, FEW * (cols / block));
  float factor = transform_factor(p.in_transform, block);
#pragma unroll 1  // places that stay in registers during the transform would be too many
  for (int col = threadIdx.x % APART * 4; col < (cols + BK - 1) / BK * BK; col += APART * 4) {
    float four[4];
    load<4>(tile + place(col), four);
#pragma unroll
    for (int i = 0; i < 4; ++i) four[i] = col < cols ? four[i] * factor : 0.0f;
    store<4>(out + col / BK * (FEW * BK) + half_at(token, col % BK / 8) + col % 8, four);
  }
  __syncthreads();
}

KERNEL(linear_few_mma, 256, FEW_RESIDENT)(FewMmaParams_PARAMETERS) {
  const FewMmaParams p = FewMmaParams_VALUES;
  DYNAMIC_SHARED(f16, stages);
  __shared__ float scales[FEW];
  const Codes& codes = p.codes;
  SplitPlace place(p.rows, BN, p.splits);
  i64 first_token = place.group * FEW, begin = place.split * p.each, end = min(begin + p.each, codes.cols);
  int tokens = static_cast<int>(min(p.x.tokens - first_token, static_cast<i64>(FEW))), block = p.finish.block;
  float* tile = reinterpret_cast<float*>(stages);
  float factor = finish_factor(p.finish);
  auto store_sums = [&](const auto& matmul) {
    __syncthreads();  // the stages are free
    matmul.visit([&](int token, int row, float a, float b) {
      if (token >= tokens) return;
      float two[2] = {factor * a, factor * b};
      if (!p.direct) {  // not scale * factor, which may be subnormal
        two[0] *= scales[token];
        two[1] *= scales[token];
      }
      if (p.splits == 1) {
        store<2>(tile + line_at(block, BN, token, row), two);
      } else if (place.first_row + row < p.rows) {  // ld is even: there is room for one more
        store<2>(p.parts + (place.split * p.x.tokens + first_token + token) * p.ld + place.first_row + row, two);
      }
    });
  };
  if (p.direct) {
    Tiles<f16, RunLoader, FEW, 1> matmul;
    matmul.multiply(stages, static_cast<const f16*>(p.x.data), p.x.tokens, p.x.cols, first_token, nullptr, 0, codes, p.rows,
                    place.first_row, begin, end, codes.cols);
    store_sums(matmul);
  } else {
    using Matmul = Tiles<f16, RunLoader, FEW, 1, true>;
    f16* inputs = stages + 2 * Matmul::STAGE;
    prefetch_codes(codes, place.first_row, BN, p.rows, begin, end);
    make_inputs(p, first_token, begin, end, tile, inputs, scales);
    Matmul matmul;
    matmul.multiply(stages, inputs, p.x.tokens, 0, first_token, nullptr, 0, codes, p.rows, place.first_row, begin, end,
                    codes.cols);
    store_sums(matmul);
  }
  if (p.splits > 1) {
    i64 tiles = (p.rows + BN - 1) / BN;
    if (!is_last_block(p.finish.counters + place.group * tiles + place.first_row / BN, p.splits)) return;
    add_parts<false>(p.parts, p.splits, p.x.tokens, p.ld, first_token, tokens, place.first_row, BN, block, nullptr, 0, tile);
  }
  finish_tile<MMA_FEW_THREADS>(p.finish, tile, first_token, tokens, place.first_row, BN, [](i64, i64, auto&) {});
}

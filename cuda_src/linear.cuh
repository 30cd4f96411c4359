// What the four sources of linear share: the epilogue, lines of activations under a transform, and tile matmuls on tensor
// cores.
#include "activations.cuh"
#include "async_copy.cuh"
#include "basis.cuh"
#include "codes.cuh"
#include "division.cuh"
#include "mma.cuh"
#include "transforms.cuh"
#include "epilogue_params.h"
#include "split_k_params.h"

constexpr int RELU = 1, GELU = 2, GELU_TANH = 3, SILU = 4;

// --- epilogue

template <int N, class F>
__device__ __forceinline__ void map_values(float (&v)[N], F f) {
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = f(v[i]);
}

// out[token, col ...] of the sums v: N = 8 where rows are wide, else 1
template <int N>
__device__ __forceinline__ void store_results(const Epilogue& p, i64 token, i64 col, float (&v)[N]) {
  if (p.bias) {
    float b[N];
    load_any<N>(p.bias, p.bias_type, col, b);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] += b[i];
  }
  if (p.activation == RELU) map_values(v, Relu());
  if (p.activation == GELU) map_values(v, GeluErf());
  if (p.activation == GELU_TANH) map_values(v, GeluTanh());
  if (p.activation == SILU) map_values(v, Silu());
  if (p.residual) {
    float r[N];
    load_any<N>(p.residual, p.residual_type, token * p.cols + col, r);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] += r[i];
  }
  store_any<N>(p.out, p.type, token * p.cols + col, v);
}

// The power of two that brings a token of this largest absolute value to 1 ... 4; 1 for 0, NaN and Inf.
__device__ __forceinline__ float token_scale(float absmax) {
  int exponent = static_cast<int>(__float_as_uint(absmax) >> 23 & 0xffu);
  if (exponent == 0 || exponent == 255) return 1.0f;
  return __uint_as_float(static_cast<u32>(exponent < 253 ? exponent : 253) << 23);
}

// --- lines of activations

// Lines of B values in shared memory, transformed by 128 threads at once: 64 of B = 128, else 128.
constexpr int TILE_FLOATS = 64 * 128;
__device__ __forceinline__ int tile_lines(int block) { return block == 128 ? 64 : 128; }

// 4 values of x, as float; zeros beyond it.
__device__ __forceinline__ void load_activations(const Activations& x, i64 token, i64 col, float (&v)[4]) {
#pragma unroll
  for (int n = 0; n < 4; ++n) v[n] = 0.0f;
  if (token >= x.tokens) return;
  if (x.wide) {
    if (col < x.cols) load_any<4>(x.data, x.type, token * x.cols + col, v);
  } else {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      float one[1] = {};
      if (col + n < x.cols) load_any<1>(x.data, x.type, token * x.cols + col + n, one);
      v[n] = one[0];
    }
  }
}

// `lines` of them, by a block of THREADS threads: as many at most as these are for, of B = 32 any number.
template <int B, bool TRANSPOSED, int THREADS>
__device__ __forceinline__ void transform_lines(int transform, float* tile, int lines) {
  constexpr int LINES = THREADS / LINE_THREADS<B>;
  auto transform_from = [&](int first) {
    Line<B> line{tile, first + static_cast<int>(threadIdx.x) % LINES, false};
    if constexpr (TRANSPOSED) {
      transpose_synthesis<B>(transform, line, line.index < lines, threadIdx.x / LINES);
    } else {
      synthesise<B>(transform, line, line.index < lines, threadIdx.x / LINES);
    }
  };
  transform_from(0);
  if constexpr (B == 32) {
#pragma unroll 1
    for (int first = LINES; first < lines; first += LINES) transform_from(first);
  }
}
template <bool TRANSPOSED, int THREADS = 128>
__device__ __forceinline__ void transform_lines(int block, int transform, float* tile, int lines) {
  if (transform == NO_TRANSFORM) return;
  if (block == 32) {
    transform_lines<32, TRANSPOSED, THREADS>(transform, tile, lines);
  } else if (block == 64) {
    transform_lines<64, TRANSPOSED, THREADS>(transform, tile, lines);
  } else {
    transform_lines<128, TRANSPOSED, THREADS>(transform, tile, lines);
  }
}

// sum_J sum_k p_IJk (Phi_k x_J) at one row, from the features.
__device__ __forceinline__ float basis_product(const f16* basis, const float* features, i64 token, i64 row, i64 blocks,
                                               int block, int matrix) {
  float sum = 0.0f;
  if (!matrix) {
    const float* f = features + token * blocks * 5;
    for (i64 i = 0; i < blocks * 5; ++i) sum = fmaf(to_float(basis[row * blocks * 5 + i]), f[i], sum);
    return sum;
  }
  int y = static_cast<int>(row % block);
  Axis axis(y, block);
  const f16* params = basis + row / block * blocks * 8;
  const float* f = features + token * blocks * (4 + block);
  for (i64 j = 0; j < blocks; ++j, params += 8, f += 4 + block) {
    float p[8];
    load<8>(params, p);
    float one = fmaf(p[2], axis.square, fmaf(p[4], axis.cos_1, fmaf(p[6], axis.cos_2, p[0])));
    sum = fmaf(one, f[0], sum);
    sum = fmaf(p[2], f[1], sum);
    sum = fmaf(fmaf(p[7], axis.cos_1, p[3]), f[2], sum);
    sum = fmaf(p[5], f[3], sum);
    sum = fmaf(p[1], f[4 + y], sum);
  }
  return sum;
}

// --- k split over blocks

// Where the work of a block of the split-k kernels stands: rows, split of k, group of tokens.
struct SplitPlace {
  i64 first_row;
  int split;
  i64 group;

  __device__ __forceinline__ SplitPlace(i64 rows, int rows_each, int splits) {
    i64 row_blocks = (rows + rows_each - 1) / rows_each;
    i64 rest = blockIdx.x / row_blocks;
    first_row = blockIdx.x % row_blocks * rows_each;
    split = static_cast<int>(rest % splits);
    group = rest / splits;
  }
};

// --- tile matmuls: tensor cores

constexpr int BN = 128, BK = 64;  // outputs and values of k of a tile
constexpr int CHUNKS = BK / 8;    // of 16 bytes in a row of a tile of halves
// Blocks of 64 KB and 256 threads that a multiprocessor is to hold at once: 7.5 has shared memory for one, and so have
// 8.6, 8.9 and 12.0 with 100 KB.
#if defined(RBE_HOST) || __CUDA_ARCH__ == 800 || (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200)
constexpr int RESIDENT = 2;
#else
constexpr int RESIDENT = 1;
#endif

// The same of kernels of few tokens, and of those for one. Where PTX has instructions on pairs of floats (10.0, 12.0) they take more
// registers: with 128 a thread grid codes of 5 bits, and biorthogonal wavelets of 128, spilled 4 to 88 bytes.
#if defined(RBE_HOST) || __CUDA_ARCH__ < 1000
constexpr int FEW_RESIDENT = RESIDENT, ONE_RESIDENT = 4;
#else
constexpr int FEW_RESIDENT = 1, ONE_RESIDENT = 3;
#endif

// Element offset of a chunk of a row; rows are 128 bytes, chunks exchanged by row.
__device__ __forceinline__ int half_at(int row, int chunk) { return row * BK + ((chunk ^ row) & 7) * 8; }

constexpr int MMA_THREADS = 256;

// Rows first ... first + ROWS - 1 of a (rows, ld) array of halves, tile after tile of BK columns; zeros beyond `rows` and
// `depth`. A thread copies the same chunk of rows MMA_THREADS / CHUNKS apart, which chunks are exchanged alike in.
template <int ROWS, class T>
struct TileCopy {
  static constexpr int APART = MMA_THREADS / CHUNKS, EACH = (ROWS + APART - 1) / APART;
  const T* from;  // of the thread, at k = 0
  i64 stride;
  int valid;  // rows of the thread that there are
  int col, to;

  __device__ __forceinline__ TileCopy(const T* source, i64 first, i64 rows, i64 ld) {
    int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    i64 left = rows - first - row;
    int most = row < ROWS ? (ROWS - row + APART - 1) / APART : 0;
    valid = static_cast<int>(min(max((left + APART - 1) / APART, i64{0}), static_cast<i64>(most)));
    col = chunk * 8;
    from = valid ? source + (first + row) * ld + col : source;
    to = half_at(row, chunk);
    stride = APART * ld;
  }
  __device__ __forceinline__ void copy(T* tile, i64 k, i64 depth) const {
    int rows = k + col < depth ? valid : 0;
    const T* source = from + (rows ? k : 0);
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      if (ROWS >= APART || threadIdx.x < ROWS * CHUNKS) {
        cp_async_16(tile + to + i * APART * BK, source, i < rows);
        if (i + 1 < rows) source += stride;
      }
    }
  }
};

// How a tile of W comes to shared memory: `load` begins while the tile before is multiplied, `store` ends it after.
struct NoLoader {  // dense W: cp.async
  static constexpr bool GROUPED = false;
  __device__ __forceinline__ void begin(const Codes&, i64, i64, i64, i64) {}
  __device__ __forceinline__ void load(const Codes&, i64, i64, i64) {}
  __device__ __forceinline__ void store(const Codes&, i64, f16*) const {}
};

// A factor as two f16.
__device__ __forceinline__ u32 pair_of(float v) { return pack_f16(v, v); }

// 1024 + u of the codes u in bytes 2 half and 2 half + 1 of a word, as two f16: 0x6400 | u.
__device__ __forceinline__ u32 biased_pair(u32 bytes, int half) {
  return __byte_perm(bytes, 0x64646464u, half ? 0x4342u : 0x4140u);
}

// Grid codes on tensor cores: row scale * column scale * integer may be subnormal or infinite in f16 where none of the
// three is. So a tile has integer / 2^(bits - 1) times column scale * 2^s, both exact, rounded once; s brings the greatest
// column scale to 2^14 ... 2^15, or by 2^15 at most; the float sums are multiplied by the row's scale * 2^(bits - 1 - s).
// s of the columns begin ... end - 1, by a warp.
__device__ __forceinline__ int column_shift(const Codes& c, i64 begin, i64 end) {
  u32 top = 0;
  for (i64 col = begin + 2 * (threadIdx.x % WARP); col < end; col += 2 * WARP) {
    u32 pair = *reinterpret_cast<const u32*>(c.col_scale + col);
    top = max(top, max(pair & 0x7fffu, pair >> 16 & 0x7fffu));
  }
  f16 scale;
  scale.bits = static_cast<u16>(top);
  int exponent = static_cast<int>(__float_as_uint(warp_max(to_float(scale))) >> 23) - 127;
  return min(max(14 - exponent, -14), 15);
}

// Runs of dense and grid codes: thread 2 r + h has run h of row r. The words stay as they were loaded, untouched, until
// the tile before has been multiplied: else every step would wait for memory.
struct RunLoader {
  static constexpr bool GROUPED = false;
  const u32* runs;    // of the thread, at k = 0
  const f16* scales;  // of its row; of grid codes there is one
  u32 words[RUN_WORDS];
  f16 scale;   // of grid codes 2^s
  bool valid;  // the row; of others the codes are 0

  __device__ __forceinline__ void begin(const Codes& c, i64 first, i64 rows, i64 begin, i64 end) {
    i64 row = first + threadIdx.x / 2;
    valid = row < rows;
    if (!valid) row = 0;
#pragma unroll
    for (int i = 0; i < RUN_WORDS; ++i) words[i] = 0;
    runs = row_runs(c, row) + threadIdx.x % 2 * c.bits;
    scales = c.scale + (c.kind == CODES_GRID ? row : row * ((c.cols + c.group - 1) / c.group));
    scale.bits = 0;
    if (c.kind == CODES_GRID) scale.bits = static_cast<u16>((15 + column_shift(c, begin, end)) << 10);
  }
  // Nothing is read beyond the last column: any finite coefficients stand there, for x^ is 0.
  __device__ __forceinline__ void load(const Codes& c, i64, i64, i64 k) {
    i64 col = k + threadIdx.x % 2 * RUN;
    if (!valid || col >= c.cols) return;
    load_run(runs + k / RUN * c.bits, c.bits, words);
    if (c.kind == CODES_DENSE) scale = scales[col / c.group];
  }
  // Columns 8 chunk ... of the run: of up to 8 bits, two at a time.
  __device__ __forceinline__ uint4 pairs(const Codes& c, i64 col, int chunk) const {
    u32 pair[4];
    u32 bytes[2], none;
    quad_bytes(words, c.bits, 2 * chunk, bytes[0], none);
    quad_bytes(words, c.bits, 2 * chunk + 1, bytes[1], none);
    u32 factor = scale.bits * 0x10001u;
    if (c.kind == CODES_DENSE) {  // scale * (u - (2^bits - 1) / 2), rounded once
      u32 lower = pair_of(1024.0f + static_cast<float>((1 << c.bits) / 2 - 1));
      u32 rest = mul_f16x2(factor, 0xb800b800u);  // -1/2 of it
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        u32 u = add_f16x2(biased_pair(bytes[i / 2], i % 2), lower ^ 0x80008000u);
        pair[i] = fma_f16x2(u, factor, rest);
      }
    } else {
      u32 unit = static_cast<u32>(16 - c.bits) << 10, shrink = pair_of(-c.offset);  // unit: 2^(1 - bits)
      u32 units = unit * 0x10001u, lower = pair_of(1.0f + static_cast<float>(2048 >> c.bits));
      uint4 step = *reinterpret_cast<const uint4*>(c.col_scale + col + chunk * 8);
      u32 steps[4] = {step.x, step.y, step.z, step.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // of an integer the clamped value is its sign
        u32 q = fma_f16x2(biased_pair(bytes[i / 2], i % 2), units, lower ^ 0x80008000u);
        u32 scaled = mul_f16x2(steps[i], factor);
        pair[i] = fma_f16x2(q, scaled, mul_f16x2(clamp_f16x2(q, units), mul_f16x2(scaled, shrink)));
      }
    }
    return make_uint4(pair[0], pair[1], pair[2], pair[3]);
  }
  __device__ __forceinline__ void store(const Codes& c, i64 k, f16* tile) const {
    int row = threadIdx.x / 2, half = threadIdx.x % 2;
    i64 col = min(k + half * RUN, c.cols - RUN);  // that has a scale
#pragma unroll
    for (int chunk = 0; chunk < RUN / 8; ++chunk) {
      f16* to = tile + half_at(row, half * (RUN / 8) + chunk);
      if (c.bits <= 8) {
        *reinterpret_cast<uint4*>(to) = pairs(c, col, chunk);
      } else {
        float v[8];
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          float four[4];
          unpack_quad(words, c.bits, 2 * chunk + q, four);
          scale_quad(c, to_float(scale), col + chunk * 8 + q * 4, four);
#pragma unroll
          for (int i = 0; i < 4; ++i) v[4 * q + i] = four[i];
        }
        ::store<8>(to, v);
      }
    }
  }
  // Sums of a warp (tokens, rows from `first` on) times what the tiles lack of the scales.
  template <int MT, int NT>
  __device__ __forceinline__ void scale_sums(const Codes& c, i64 rows, i64 first, float (&sums)[MT][NT][4]) const {
    if (c.kind != CODES_GRID) return;
    float inverse = static_cast<float>(1 << (c.bits - 1)) / to_float(scale);
    i64 row = first + 2 * (threadIdx.x % 4);
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float factor = inverse * to_float(c.scale[min(row + n * 8 + i, rows - 1)]);
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          sums[m][n][i] *= factor;
          sums[m][n][i + 2] *= factor;
        }
      }
    }
  }
};

template <class L>
constexpr bool IS_NO_LOADER = false;
template <>
constexpr bool IS_NO_LOADER<NoLoader> = true;
// The sums of a tile: those of the groups of a GROUPED loader are integers, and floats when they are added up.
template <bool GROUPED, class SUM>
struct Grouped {
  using type = SUM;
};
template <class SUM>
struct Grouped<true, SUM> {
  using type = float;
};
template <class T>
constexpr bool IS_BF16 = false;
template <>
constexpr bool IS_BF16<bf16> = true;

// sums = rows first_m ... of x^ (tokens, ldx) times rows first_n ... of W, over k from `begin` to `end`. 8 warps, WM of
// them along the tokens. A loader that is GROUPED takes the sums of each group of columns, integers, and adds them up
// itself, as floats. X_READY: x^ lies in shared memory already, a tile (BM, BK) for each step.
template <class T, class LOADER, int BM, int WM, bool X_READY = false>
struct Tiles {
  static constexpr bool CODED = !IS_NO_LOADER<LOADER>;
  static constexpr int WN = 8 / WM;
  static constexpr int MT = BM / WM / 16, NT = BN / WN / 8;  // tiles of 16 and of 8 of a warp
  // bf16 without tensor cores for it is so much code that one copy must do; sums of groups leave no registers for
  // fragments of more than two steps
  static constexpr int UNROLL = IS_BF16<T> ? 1 : LOADER::GROUPED ? 2 : BK / 16;
  static constexpr int A = X_READY ? 0 : BM * BK, W = BN * BK, STAGE = A + W;

  typename Grouped<LOADER::GROUPED, typename Sums<T>::type>::type sums[MT][NT][4];

  __device__ __forceinline__ void multiply(T* stages, const T* x, i64 tokens, i64 ldx, i64 first_m, const T* w, i64 ldw,
                                           const Codes& codes, i64 rows, i64 first_n, i64 begin, i64 end, i64 depth) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int m0 = warp / WN * (MT * 16), n0 = warp % WN * (NT * 8);
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m][n][i] = 0;
      }
    }
    // half_at of what a lane gives ldmatrix in the first step: rows 16 apart exchange chunks alike, and of a chunk
    // 2 step + half the step turns the upper bits
    int row = lane % 8, half_a = lane / 16, half_w = lane / 8 % 2;
    int at_a = half_at(m0 + lane % 16, half_a), at_w = A + half_at(n0 + lane / 16 * 8 + row, half_w);
    LOADER loader;
    loader.begin(codes, first_n, rows, begin, end);
    if constexpr (LOADER::GROUPED) loader.shared_scales = reinterpret_cast<f16*>(stages + 2 * STAGE);
    TileCopy<X_READY ? 0 : BM, T> copy_x(x, first_m, tokens, ldx);
    TileCopy<CODED ? 0 : BN, T> copy_w(w, first_n, rows, ldw);
    int turn = 0;
    for (i64 k = begin - BK; k < end; k += BK, turn ^= 1) {  // the first round only fetches
      cp_async_wait<0>();
      __syncthreads();  // this stage is complete, and the other is free
      T* now = stages + (turn ^ 1) * STAGE;
      const T* now_x = X_READY ? x + (k - begin) * BM : now;
      T* next = stages + turn * STAGE;
      bool more = k + BK < end;
      if (more) {
        if constexpr (!X_READY) copy_x.copy(next, k + BK, depth);
        if constexpr (CODED) {
          loader.load(codes, first_n, rows, k + BK);
        } else {
          copy_w.copy(next + A, k + BK, depth);
        }
      }
      cp_async_commit();
      if (k >= begin) {
        // hot: matmul
        auto multiply_step = [&](int step) {
          u32 a[MT][4], b[NT / 2][4];
#pragma unroll
          for (int m = 0; m < MT; ++m) ldmatrix(a[m], now_x + (at_a ^ step * 16) + m * (16 * BK));
#pragma unroll
          for (int n = 0; n < NT / 2; ++n) {  // k 0-7 and 8-15 of 8 outputs, then of the next 8
            ldmatrix(b[n], now + (at_w ^ step * 16) + n * (16 * BK));
          }
          if constexpr (LOADER::GROUPED) loader.read_scales(codes, n0, step);
#pragma unroll
          for (int m = 0; m < MT; ++m) {
#pragma unroll
            for (int n = 0; n < NT; ++n) {
              u32 pair[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
              if constexpr (LOADER::GROUPED) {
                loader.multiply(codes, step, m, n, a[m], pair);
                loader.add_group(codes, step, m, n, sums[m][n]);
              } else {
                mma_16x8x16<T>(sums[m][n], a[m], pair);
              }
            }
          }
        };
        if (LOADER::GROUPED && codes.bits == 8 && codes.group == RUN) {  // with their scales, the same
#pragma unroll 1
          for (int step = 0; step < BK / 16; ++step) multiply_step(step);
        } else if (CODED && codes.bits > 8) {  // their words leave no registers for fragments of more steps
#pragma unroll 2
          for (int step = 0; step < BK / 16; ++step) multiply_step(step);
        } else {
#pragma unroll (UNROLL)
          for (int step = 0; step < BK / 16; ++step) multiply_step(step);
        }
      }
      if constexpr (CODED) {
        // hot: unpack
        if (more) loader.store(codes, k + BK, next + A);
      }
    }
    if constexpr (CODED) loader.scale_sums(codes, rows, first_n + n0, sums);
  }

  // f(row, column, two sums) of the tile, for all of a thread's
  template <class F>
  __device__ __forceinline__ void visit(F f) const {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int m0 = warp / WN * (MT * 16) + lane / 4, n0 = warp % WN * (NT * 8) + 2 * (lane % 4);
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        f(m0 + m * 16, n0 + n * 8, sums[m][n][0], sums[m][n][1]);
        f(m0 + m * 16 + 8, n0 + n * 8, sums[m][n][2], sums[m][n][3]);
      }
    }
  }
};

// Sums of a tile of ROWS tokens in shared memory, (BN / block, 128, block) floats, to the columns first_n ... end - 1 of
// out, by 8 values or one by one; adjust(token, col, v) makes of them what the epilogue takes.
__device__ __forceinline__ int sum_at(int block, int row, int col) {
  return col / block * (128 * block) + tile_at(block, row, col % block);
}
template <int ROWS = 128, class F>
__device__ __forceinline__ void store_tile(const float* tile, int block, i64 first_m, i64 first_n, i64 end,
                                           const Epilogue& epilogue, F adjust) {
  auto write = [&](auto& v, int row, int col) {
    constexpr int N = sizeof v / sizeof v[0];
    if (first_m + row >= epilogue.tokens || first_n + col >= end) return;
#pragma unroll
    for (int n = 0; n < N; ++n) v[n] = tile[sum_at(block, row, col + n)];
    adjust(first_m + row, first_n + col, v);
    store_results(epilogue, first_m + row, first_n + col, v);
  };
  if (epilogue.wide) {
    for (int i = threadIdx.x; i < ROWS * (BN / 8); i += blockDim.x) {
      float v[8];
      write(v, i / (BN / 8), i % (BN / 8) * 8);
    }
  } else {
    for (int i = threadIdx.x; i < ROWS * BN; i += blockDim.x) {
      float v[1];
      write(v, i / BN, i % BN);
    }
  }
}

// S of B rows, of sums as `store_tile` takes them (up to transform_factor); 256 threads.
template <int B, int ROWS>
__device__ __forceinline__ void transform_sums(int transform, float* tile) {
  constexpr int LINES = ROWS * BN / B, EACH = 256 / LINE_THREADS<B>;
#pragma unroll 1
  for (int first = 0; first < LINES; first += EACH) {
    int line = first + threadIdx.x % EACH;
    synthesise<B>(transform, {tile + line / ROWS * (128 * B), line % ROWS, false}, line < LINES, threadIdx.x / EACH);
  }
}
template <int ROWS = 128>
__device__ __forceinline__ void transform_sums(int block, int transform, float* tile) {
  if (transform == NO_TRANSFORM) return;
  if (block == 32) {
    transform_sums<32, ROWS>(transform, tile);
  } else if (block == 64) {
    transform_sums<64, ROWS>(transform, tile);
  } else {
    transform_sums<128, ROWS>(transform, tile);
  }
}

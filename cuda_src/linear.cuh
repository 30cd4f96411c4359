// What the two sources of linear share: the epilogue, lines of activations under a transform, codes by whole runs, and
// tile matmuls on tensor cores.
#include "activations.cuh"
#include "async_copy.cuh"
#include "basis.cuh"
#include "codes.cuh"
#include "mma.cuh"
#include "transforms.cuh"
#include "epilogue_params.h"

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

template <int B, bool TRANSPOSED>
__device__ __forceinline__ void transform_lines(int transform, float* tile) {
  constexpr int LINES = 128 / LINE_THREADS<B>;
  Line<B> line{tile, static_cast<int>(threadIdx.x) % LINES, false};
  int part = threadIdx.x / LINES;
  if constexpr (TRANSPOSED) {
    transpose_synthesis<B>(transform, line, true, part);
  } else {
    synthesise<B>(transform, line, true, part);
  }
}
template <bool TRANSPOSED>
__device__ __forceinline__ void transform_lines(int block, int transform, float* tile) {
  if (transform == NO_TRANSFORM) return;
  if (block == 32) {
    transform_lines<32, TRANSPOSED>(transform, tile);
  } else if (block == 64) {
    transform_lines<64, TRANSPOSED>(transform, tile);
  } else {
    transform_lines<128, TRANSPOSED>(transform, tile);
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

// --- codes by whole runs

// Words of a plane of N words, of codes of `bits` bits: so aligned are they.
template <int N>
__device__ __forceinline__ void load_plane(const u32* p, int bits, u32 (&w)[N]) {
  if (N >= 4 && bits % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      uint4 four = reinterpret_cast<const uint4*>(p)[i];
      w[4 * i] = four.x;
      w[4 * i + 1] = four.y;
      w[4 * i + 2] = four.z;
      w[4 * i + 3] = four.w;
    }
  } else if (N >= 2 && bits % 2 == 0) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      uint2 two = reinterpret_cast<const uint2*>(p)[i];
      w[2 * i] = two.x;
      w[2 * i + 1] = two.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) w[i] = p[i];
  }
}

// The codes of a run, four to a word: of codes of more than 8 bits the topmost 8 (digit 1) or the others (digit 0).
__device__ __forceinline__ void load_digits(const u32* run, int bits, int digit, u32 (&words)[RUN / 4]) {
  if (digit || bits == 8) {
    load_plane(run, bits, words);
    return;
  }
  if (bits & 8) run += 8;
#pragma unroll
  for (int i = 0; i < RUN / 4; ++i) words[i] = 0;
  if (bits & 4) {
    u32 plane[4];
    load_plane(run, bits, plane);
#pragma unroll
    for (int i = 0; i < RUN / 4; ++i) words[i] = plane_quad<4>(plane, i);
    run += 4;
  }
  if (bits & 2) {
    u32 plane[2];
    load_plane(run, bits, plane);
#pragma unroll
    for (int i = 0; i < RUN / 4; ++i) words[i] = words[i] << 2 | plane_quad<2>(plane, i);
    run += 2;
  }
  if (bits & 1) {
    u32 plane[1];
    load_plane(run, bits, plane);
#pragma unroll
    for (int i = 0; i < RUN / 4; ++i) words[i] = words[i] << 1 | plane_quad<1>(plane, i);
  }
}

// --- tile matmuls: tensor cores

constexpr int BN = 128, BK = 64;  // outputs and values of k of a tile
constexpr int CHUNKS = BK / 8;    // of 16 bytes in a row of a tile of halves
// Blocks of 64 KB and 256 threads that a multiprocessor is to hold at once; 7.5 has shared memory for one.
constexpr int RESIDENT = TENSOR_CORES<bf16> ? 2 : 1;

// Element offset of a chunk of a row; rows are 128 bytes, chunks exchanged by row.
__device__ __forceinline__ int half_at(int row, int chunk) { return row * BK + ((chunk ^ row) & 7) * 8; }

// Rows first ... first + ROWS - 1 and columns k ... k + BK - 1 of a (rows, ld) array of halves, zeros beyond `rows` and
// `depth`.
template <int ROWS, class T>
__device__ __forceinline__ void copy_tile(T* tile, const T* source, i64 first, i64 rows, i64 k, i64 depth, i64 ld) {
  for (int i = threadIdx.x; i < ROWS * CHUNKS; i += blockDim.x) {
    int row = i / CHUNKS, chunk = i % CHUNKS;
    bool valid = first + row < rows && k + chunk * 8 < depth;
    cp_async_16(tile + half_at(row, chunk), valid ? source + (first + row) * ld + k + chunk * 8 : source, valid);
  }
}

// How a tile of W comes to shared memory: `load` begins while the tile before is multiplied, `store` ends it after.
struct NoLoader {  // dense W: cp.async
  __device__ __forceinline__ void begin(const Codes&, i64, i64, i64) {}
  __device__ __forceinline__ void load(const Codes&, i64, i64, i64) {}
  __device__ __forceinline__ void store(const Codes&, i64, f16*) const {}
};

// Runs of dense and grid codes: thread 2 r + h has run h of row r.
struct RunLoader {
  u32 low[RUN / 4], high[RUN / 4];
  float scale;
  bool valid;

  __device__ __forceinline__ void begin(const Codes&, i64, i64, i64) {}
  __device__ __forceinline__ void load(const Codes& c, i64 first, i64 rows, i64 k) {
    i64 runs = c.cols / RUN, row = first + threadIdx.x / 2, run = k / RUN + threadIdx.x % 2;
    valid = row < rows && run < runs;
    if (!valid) return;
    const u32* words = reinterpret_cast<const u32*>(c.value) + (row * runs + run) * c.bits;
    load_digits(words, c.bits, 0, low);
    if (c.bits > 8) load_digits(words, c.bits, 1, high);
    i64 groups = c.kind == CODES_GRID ? 1 : (c.cols + c.group - 1) / c.group;
    scale = to_float(c.kind == CODES_GRID ? c.scale[row] : c.scale[row * groups + run * RUN / c.group]);
  }
  __device__ __forceinline__ void store(const Codes& c, i64 k, f16* tile) const {
    int row = threadIdx.x / 2, half = threadIdx.x % 2;
    i64 run = k / RUN + half;
    float middle = c.kind == CODES_GRID ? static_cast<float>(1 << (c.bits - 1))
                                        : 0.5f * static_cast<float>((1 << c.bits) - 1);
    float weight = static_cast<float>(1 << (c.bits > 8 ? c.bits - 8 : 0));
#pragma unroll
    for (int chunk = 0; chunk < RUN / 8; ++chunk) {
      float v[8] = {};
      if (valid) {
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = byte_value(low[2 * chunk + i / 4], i % 4);
        if (c.bits > 8) {
#pragma unroll
          for (int i = 0; i < 8; ++i) v[i] = fmaf(weight, byte_value(high[2 * chunk + i / 4], i % 4), v[i]);
        }
        if (c.kind == CODES_GRID) {
          float step[8];
          ::load<8>(c.col_scale + run * RUN + chunk * 8, step);
#pragma unroll
          for (int i = 0; i < 8; ++i) v[i] = scale * step[i] * shrunk(v[i] - middle, c.offset);
        } else {
#pragma unroll
          for (int i = 0; i < 8; ++i) v[i] = scale * (v[i] - middle);
        }
      }
      ::store<8>(tile + half_at(row, half * (RUN / 8) + chunk), v);
    }
  }
};

template <class L>
constexpr bool IS_NO_LOADER = false;
template <>
constexpr bool IS_NO_LOADER<NoLoader> = true;
template <class T>
constexpr bool IS_BF16 = false;
template <>
constexpr bool IS_BF16<bf16> = true;

// sums = rows first_m ... of x^ (tokens, ldx) times rows first_n ... of W, over k from `begin` to `end`. 8 warps, WM of
// them along the tokens.
template <class T, class LOADER, int BM, int WM>
struct Tiles {
  static constexpr bool CODED = !IS_NO_LOADER<LOADER>;
  static constexpr int WN = 8 / WM;
  static constexpr int MT = BM / WM / 16, NT = BN / WN / 8;  // tiles of 16 and of 8 of a warp
  // bf16 without tensor cores for it is so much code that one copy must do
  static constexpr int UNROLL = IS_BF16<T> ? 1 : BK / 16;
  static constexpr int A = BM * BK, W = BN * BK, STAGE = A + W;

  float sums[MT][NT][4];

  __device__ __forceinline__ void multiply(T* stages, const T* x, i64 tokens, i64 ldx, i64 first_m, const T* w, i64 ldw,
                                           const Codes& codes, i64 rows, i64 first_n, i64 begin, i64 end, i64 depth) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int m0 = warp / WN * (MT * 16), n0 = warp % WN * (NT * 8);
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m][n][i] = 0.0f;
      }
    }
    LOADER loader;
    loader.begin(codes, first_n, rows, begin);
    int turn = 0;
    for (i64 k = begin - BK; k < end; k += BK, turn ^= 1) {  // the first round only fetches
      cp_async_wait<0>();
      __syncthreads();  // this stage is complete, and the other is free
      T* now = stages + (turn ^ 1) * STAGE;
      T* next = stages + turn * STAGE;
      bool more = k + BK < end;
      if (more) {
        copy_tile<BM>(next, x, first_m, tokens, k + BK, depth, ldx);
        if constexpr (CODED) {
          loader.load(codes, first_n, rows, k + BK);
        } else {
          copy_tile<BN>(next + A, w, first_n, rows, k + BK, depth, ldw);
        }
      }
      cp_async_commit();
      if (k >= begin) {
#pragma unroll (UNROLL)
        for (int step = 0; step < BK / 16; ++step) {
          u32 a[MT][4], b[NT / 2][4];
#pragma unroll
          for (int m = 0; m < MT; ++m) {
            ldmatrix(a[m], now + half_at(m0 + m * 16 + lane % 16, 2 * step + lane / 16));
          }
#pragma unroll
          for (int n = 0; n < NT / 2; ++n) {  // k 0-7 and 8-15 of 8 outputs, then of the next 8
            ldmatrix(b[n], now + A + half_at(n0 + n * 16 + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
          }
#pragma unroll
          for (int m = 0; m < MT; ++m) {
#pragma unroll
            for (int n = 0; n < NT; ++n) {
              u32 pair[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
              mma_16x8x16<T>(sums[m][n], a[m], pair);
            }
          }
        }
      }
      if constexpr (CODED) {
        if (more) loader.store(codes, k + BK, next + A);
      }
    }
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

// Sums of a tile in shared memory, (BN / block, 128, block) floats, to the columns first_n ... end - 1 of out, by 8
// values or one by one; adjust(token, col, v) makes of them what the epilogue takes.
__device__ __forceinline__ int sum_at(int block, int row, int col) {
  return col / block * (128 * block) + tile_at(block, row, col % block);
}
template <class F>
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
    for (int i = threadIdx.x; i < 128 * (BN / 8); i += blockDim.x) {
      float v[8];
      write(v, i / (BN / 8), i % (BN / 8) * 8);
    }
  } else {
    for (int i = threadIdx.x; i < 128 * BN; i += blockDim.x) {
      float v[1];
      write(v, i / BN, i % BN);
    }
  }
}

// S of B rows, of sums as `store_tile` takes them (up to transform_factor); 256 threads.
template <int B>
__device__ __forceinline__ void transform_sums(int transform, float* tile) {
  constexpr int LINES = 128 * BN / B, EACH = 256 / LINE_THREADS<B>;
#pragma unroll 1
  for (int first = 0; first < LINES; first += EACH) {
    int line = first + threadIdx.x % EACH;
    synthesise<B>(transform, {tile + line / 128 * (128 * B), line % 128, false}, true, threadIdx.x / EACH);
  }
}
__device__ __forceinline__ void transform_sums(int block, int transform, float* tile) {
  if (transform == NO_TRANSFORM) return;
  if (block == 32) {
    transform_sums<32>(transform, tile);
  } else if (block == 64) {
    transform_sums<64>(transform, tile);
  } else {
    transform_sums<128>(transform, tile);
  }
}

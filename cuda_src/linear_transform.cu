// y[t,n] = activation(sum_k x[t,k] W[n,k] + bias[n]) + residual[t,n], W compressed and never decoded, many tokens.
//
// With W_IJ = gain * (S C_IJ S^T + sum_k p_IJk Phi_k) and the basis as outer products of functions of one coordinate,
// Phi_k(r, c) = sum_ab q_kab psi_a(r) phi_b(c):
//     x^_J = S^T x_J                           linear_transform_inputs, or linear_inputs of linear.cu for f16 x^
//     f_J = phi x_J                            linear_transform_features, where there is a basis
//     g_I = sum_J sum_k p_IJk q_k f_J          linear_transform_basis: 16 sums for a block of rows
//     y_I = gain * (S sum_J C_IJ x^_J + psi g_I)
// exactly (vectors: without S and psi; columns: x^ is x). The matmul with C, and its epilogue:
//   linear_transform_codes    dense and grid codes, f16 x^: unpacked to f16 tiles in shared memory, tensor cores
//   linear_transform_entries  the same of sparse codes: a tile is laid out from bitmaps and entries
//   linear_transform_dense    dense and grid codes, float x^: unpacked to float tiles, FMA
//   linear_transform_sparse   sparse codes, float x^: entries as (value, 16-bit offset) in shared memory, FMA for stored
//                             entries alone
// linear_transform_bitmap makes bitmaps of delta positions; linear_transform_epilogue ends it where k was split.
//
// Arrays     x: (tokens, in), out and residual: (tokens, out), row-major; bias: (out). x^: f16 (tokens, K), or float
//            (groups of 128 tokens, K, 128). phi, psi: float (B, 16), the last functions 0. f: float (groups, K / B, 16,
//            128); g: float (tokens, row blocks, 16). parts: float (splits, tokens, ld). Codes, basis: codes.cuh, basis.cuh.
// Ownership  Matmuls: 256 threads, a tile of 128 tokens x 128 outputs. codes, entries: 8 warps of 64 x 32, k in steps of
//            64, two stages; a warp lays out 16 rows of entries, a lane two columns. dense: a thread 8 x 8, k in steps of
//            32. sparse: a warp 16 rows, a lane 4 tokens, 64 sums in registers, k in steps of 32.
//            inputs: a thread has a line of B values of a token. features, basis: a thread a token. bitmap: a warp a row.
// Launch     Matmuls: grid (tiles of tokens * tiles of outputs * splits of k); the others in strides of the grid.
// Shared     Matmuls and epilogue: 64 KB. inputs, features: 32 KB.
// Bytes      x^ and the codes once for every 128 x 128 tile, each code byte by one warp; parts, if k was split, 8 bytes a
//            result and split; bitmaps of delta positions 1 bit a weight, written and read; f and g 64 bytes a token and
//            block, f read once for 4 blocks of rows.
// Accuracy   float sums. f16 operands: x^ and C each rounded to 11 bits, as linear.cu, x^ scaled by a power of two per token.
//            A NaN or an Inf of x gives its token results that are not finite: S^T spreads it over the block, 0 times it
//            is NaN, and linear_transform_sparse, which skips zeros, adds 0 * max |x| at the end.
//
// Sources: Xia et al. 2023, "Flash-LLM", and Fan et al. 2025, "SpInfer": sparse in memory, dense on tensor cores, positions
// as bitmaps; Gale et al. 2020, "Sparse GPU kernels for deep learning" (Sputnik): rows of entries by FMA.
#include "linear.cuh"
#include "linear_transform_params.h"

constexpr int GROUP = 128;     // tokens of a tile
constexpr int FUNCTIONS = 16;  // of a coordinate, that the basis is made of
constexpr int STEP = 32;       // values of k of a step in float
constexpr int BASIS_ROWS = 4;  // blocks of rows of a thread of linear_transform_basis

// --- activation prologue

// `lines` tokens from `first` on of the block column that begins at column `start`; zeros beyond x.
__device__ __forceinline__ void load_lines(const Activations& x, i64 first, int lines, i64 start, int block,
                                           float* tile) {
  int quads = block / 4;
  for (int i = threadIdx.x; i < lines * quads; i += blockDim.x) {
    int line = i / quads, k = i % quads * 4;
    float v[4];
    load_activations(x, first + line, start + k, v);
    store<4>(tile + tile_at(block, line, k), v);
  }
}

// x^, float (groups, padded, 128); zeros beyond x.
KERNEL(linear_transform_inputs, 128, 2)(TransformInputsParams_PARAMETERS) {
  const TransformInputsParams p = TransformInputsParams_VALUES;
  __shared__ float4 storage[TILE_FLOATS / 4];
  float* tile = reinterpret_cast<float*>(storage);
  int block = p.block, lines = tile_lines(block);
  i64 blocks = p.padded / block, count = (p.x.tokens + GROUP - 1) / GROUP * (GROUP / lines) * blocks;
  float factor = transform_factor(p.transform, block);
  for (i64 w = blockIdx.x; w < count; w += gridDim.x) {
    i64 first = w / blocks * lines, start = w % blocks * block;
    load_lines(p.x, first, lines, start, block, tile);
    __syncthreads();
    transform_lines<true>(block, p.transform, tile, lines);
    float* to = p.out + (first / GROUP * p.padded + start) * GROUP + first % GROUP;
    for (int i = threadIdx.x; i < lines * block; i += blockDim.x) {  // a warp writes 128 bytes
      int line = i % lines, k = i / lines;
      to[k * GROUP + line] = factor * tile[tile_at(block, line, k)];
    }
    __syncthreads();  // the tile is free again
  }
}

// f = phi x_J, float (groups, blocks, 16, 128).
KERNEL(linear_transform_features, 128)(TransformFeaturesParams_PARAMETERS) {
  const TransformFeaturesParams p = TransformFeaturesParams_VALUES;
  __shared__ float4 storage[TILE_FLOATS / 4];
  float* tile = reinterpret_cast<float*>(storage);
  int block = p.block, lines = tile_lines(block), line = threadIdx.x % lines, parts = blockDim.x / lines;
  i64 blocks = p.blocks, count = (p.x.tokens + GROUP - 1) / GROUP * (GROUP / lines) * blocks;
  for (i64 w = blockIdx.x; w < count; w += gridDim.x) {
    i64 first = w / blocks * lines, j = w % blocks;
    load_lines(p.x, first, lines, j * block, block, tile);
    __syncthreads();
    for (int f = threadIdx.x / lines * 8; f < FUNCTIONS; f += 8 * parts) {
      float sum[8] = {};
      for (int c = 0; c < block; ++c) {
        float phi[8], v = tile[tile_at(block, line, c)];
        load<8>(p.functions + c * FUNCTIONS + f, phi);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[i] = fmaf(phi[i], v, sum[i]);
      }
      float* to = p.out + ((first / GROUP * blocks + j) * FUNCTIONS + f) * GROUP + first % GROUP + line;
#pragma unroll
      for (int i = 0; i < 8; ++i) to[i * GROUP] = sum[i];
    }
    __syncthreads();  // the tile is free again
  }
}

// g_I of BASIS_ROWS blocks of rows a thread. The functions of a coordinate t are 1, t^2, cos(pi t), cos(2 pi t), then
// those of d.
KERNEL(linear_transform_basis, 128)(BasisParams_PARAMETERS) {
  const BasisParams p = BasisParams_VALUES;
  i64 row_blocks = p.row_blocks, blocks = p.blocks, tokens = p.tokens;
  i64 pieces = (row_blocks + BASIS_ROWS - 1) / BASIS_ROWS, count = (tokens + GROUP - 1) / GROUP * pieces;
  for (i64 w = blockIdx.x; w < count; w += gridDim.x) {
    i64 group = w / pieces, top = w % pieces * BASIS_ROWS, token = group * GROUP + threadIdx.x;
    float g[BASIS_ROWS][FUNCTIONS] = {};
    for (i64 j = 0; j < blocks; ++j) {
      const float* from = p.features + (group * blocks + j) * (FUNCTIONS * GROUP) + threadIdx.x;
      float f[FUNCTIONS];
#pragma unroll
      for (int i = 0; i < FUNCTIONS; ++i) f[i] = from[i * GROUP];
#pragma unroll
      for (int r = 0; r < BASIS_ROWS; ++r) {
        float q[8];
        load<8>(p.basis + (min(top + r, row_blocks - 1) * blocks + j) * 8, q);
        g[r][0] = fmaf(q[0], f[0], fmaf(q[2], f[1], fmaf(q[3], f[2], fmaf(q[5], f[3], g[r][0]))));
        g[r][1] = fmaf(q[2], f[0], g[r][1]);
        g[r][2] = fmaf(q[4], f[0], fmaf(q[7], f[2], g[r][2]));
        g[r][3] = fmaf(q[6], f[0], g[r][3]);
#pragma unroll
        for (int i = 4; i < FUNCTIONS; ++i) g[r][i] = fmaf(q[1], f[i], g[r][i]);
      }
    }
#pragma unroll
    for (int r = 0; r < BASIS_ROWS; ++r) {
      if (token < tokens && top + r < row_blocks) store(p.sums + (token * row_blocks + top + r) * FUNCTIONS, g[r]);
    }
  }
}

// --- positions

// Bitmaps (rows, cols / 32) of delta positions.
KERNEL(linear_transform_bitmap, 256)(BitmapParams_PARAMETERS) {
  const BitmapParams p = BitmapParams_VALUES;
  int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
  for (i64 row = static_cast<i64>(blockIdx.x) * warps + threadIdx.x / WARP; row < p.rows;
       row += static_cast<i64>(gridDim.x) * warps) {
    u32* own = p.words + row * (p.cols / 32);
    for (i64 i = lane; i < p.cols / 32; i += WARP) own[i] = 0;
    __syncwarp();
    i64 begin = p.row_start[row], end = p.row_start[row + 1], before = -1;
    for (i64 first = begin; first < end; first += WARP) {
      i64 e = first + lane;
      int step = warp_prefix(e < end ? p.index[e] + 1 : 0);
      i64 column = before + step;
      if (e < end) atomicAdd(own + column / 32, 1u << (column % 32));  // each bit once
      before += __shfl_sync(ALL_LANES, step, WARP - 1);
    }
  }
}

// Which of the columns k ... k + 31 of a row are stored, as bits.
__device__ __forceinline__ u32 stored_columns(const Codes& c, i64 row, i64 rows, i64 k) {
  if (row >= rows || k >= c.cols) return 0;
  return c.index_kind == INDEX_FULL ? ALL_LANES : reinterpret_cast<const u32*>(c.index)[(row * c.cols + k) / 32];
}
// The first entry of a row at column k or after it.
__device__ __forceinline__ i64 first_entry(const Codes& c, i64 row, i64 rows, i64 k) {
  if (row >= rows) return 0;
  if (c.index_kind == INDEX_FULL) return row * c.cols + k;
  i64 e = c.row_start[row];
  for (i64 col = 0; col < k; col += 32) e += __popc(stored_columns(c, row, rows, col));
  return e;
}
__device__ __forceinline__ int bits_below(u32 word, int bit) { return __popc(word & ((1u << bit) - 1u)); }

// Sparse codes as a tile of halves: a warp has 16 rows, lane l % 16 knows where row l stands and which of the columns
// 32 (l / 16) on are stored; then, row by row, a lane has two columns.
struct EntryLoader {
  static constexpr bool GROUPED = false;
  i64 next;  // first entry of the step after
  u32 word;

  __device__ __forceinline__ i64 row(i64 first) const { return first + threadIdx.x / WARP * 16 + threadIdx.x % 16; }
  __device__ __forceinline__ void begin(const Codes& c, i64 first, i64 rows, i64 k, i64) {
    next = first_entry(c, row(first), rows, k);
  }
  __device__ __forceinline__ void load(const Codes& c, i64 first, i64 rows, i64 k) {
    word = stored_columns(c, row(first), rows, k + threadIdx.x % WARP / 16 * 32);
    int count = __popc(word);
    next += count + __shfl_xor_sync(ALL_LANES, count, 16);
  }
  template <class S>
  __device__ __forceinline__ void scale_sums(const Codes&, i64, i64, S&) const {}  // the tiles have all of the scales
  __device__ __forceinline__ void store(const Codes& c, i64, f16* tile) const {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, bit = 2 * (lane % 16);
#pragma unroll 2
    for (int i = 0; i < 16; ++i) {
      u32 low = __shfl_sync(ALL_LANES, word, i), high = __shfl_sync(ALL_LANES, word, i + 16);
      u32 own = lane < 16 ? low : high;
      i64 e = __shfl_sync(ALL_LANES, next, i) - __popc(high) - (lane < 16 ? __popc(low) : 0) + bits_below(own, bit);
      u32 pair = own >> bit & 3u;
      float v[2] = {};
      if (pair & 1u) v[0] = entry_value(c, e);
      if (pair & 2u) v[1] = entry_value(c, e + (pair & 1u));
      ::store<2>(tile + half_at(warp * 16 + i, lane / 4) + lane % 4 * 2, v);
    }
  }
};

// --- epilogue

template <int N>
__device__ __forceinline__ void add_basis(const TransformEpilogue& p, i64 token, i64 col, float (&v)[N]) {
  if (!p.functions) {
#pragma unroll 1
    for (int n = 0; n < N; ++n) {
      float sum = p.gain * basis_product(p.basis, p.sums, token, col + n, p.blocks, p.block, 0);
#pragma unroll
      for (int m = 0; m < N; ++m) v[m] += m == n ? sum : 0.0f;
    }
    return;
  }
  float g[FUNCTIONS];
  load(p.sums + (token * p.row_blocks + col / p.block) * FUNCTIONS, g);
#pragma unroll 1
  for (int n = 0; n < N; ++n) {
    float psi[FUNCTIONS], sum = 0.0f;
    load(p.functions + (col % p.block + n) * FUNCTIONS, psi);
#pragma unroll
    for (int f = 0; f < FUNCTIONS; ++f) sum = fmaf(psi[f], g[f], sum);
#pragma unroll
    for (int m = 0; m < N; ++m) v[m] += m == n ? p.gain * sum : 0.0f;
  }
}

// The results of a tile of sums in shared memory, rows first_n on of W.
__device__ __forceinline__ void transform_store(const TransformEpilogue& p, float* tile, i64 first_m, i64 first_n) {
  transform_sums(p.block, p.transform, tile);
  float factor = p.gain * transform_factor(p.transform, p.block);
  auto adjust = [&](i64 token, i64 col, auto& v) {
    constexpr int N = sizeof v / sizeof v[0];
    float absmax = p.absmax ? p.absmax[token] : 0.0f, all = p.scaled ? factor * token_scale(absmax) : factor;
#pragma unroll
    for (int n = 0; n < N; ++n) v[n] = fmaf(all, v[n], 0.0f * absmax);
    if (p.with_basis) add_basis(p, token, col, v);
  };
  store_tile(tile, p.block, first_m, first_n, p.epilogue.cols, p.epilogue, adjust);
}

// The tile of a block of threads: 128 tokens, 128 rows of W, k from begin to end.
struct Place {
  i64 first_m, first_n, begin, end;
  int split;

  __device__ __forceinline__ Place(i64 tokens, i64 rows, i64 depth, i64 k_each) {
    i64 tiles_m = (tokens + GROUP - 1) / GROUP, tiles_n = (rows + BN - 1) / BN, w = blockIdx.x;
    first_m = w % tiles_m * GROUP;
    first_n = w / tiles_m % tiles_n * BN;
    split = static_cast<int>(w / tiles_m / tiles_n);
    begin = split * k_each;
    end = min(begin + k_each, depth);
  }
};

// The sums of a tile: to the results, or, where k was split, to parts.
__device__ __forceinline__ void end_tile(const TransformMatmulParams& p, float* tile, const Place& place) {
  if (!p.parts) {
    transform_store(p.epilogue, tile, place.first_m, place.first_n);
    return;
  }
  i64 tokens = p.epilogue.epilogue.tokens;
  for (int i = threadIdx.x; i < GROUP * (BN / 4); i += blockDim.x) {
    int row = i / (BN / 4), col = i % (BN / 4) * 4;
    float v[4];
    load<4>(tile + sum_at(p.epilogue.block, row, col), v);
    i64 token = place.first_m + row, at = place.first_n + col;  // ld and rows are multiples of 4, or rows end in ld
    if (token < tokens && at < p.ld) store<4>(p.parts + (place.split * tokens + token) * p.ld + at, v);
  }
}

KERNEL(linear_transform_epilogue, 256, 2)(TransformSumParams_PARAMETERS) {
  const TransformSumParams p = TransformSumParams_VALUES;
  DYNAMIC_SHARED(float, tile);
  i64 tokens = p.epilogue.epilogue.tokens;
  Place place(tokens, p.ld, 0, 0);
  for (int i = threadIdx.x; i < GROUP * (BN / 4); i += blockDim.x) {
    int row = i / (BN / 4), col = i % (BN / 4) * 4;
    float sum[4] = {};
    i64 token = place.first_m + row, at = place.first_n + col;
    if (token < tokens && at < p.ld) {
      for (int s = 0; s < p.splits; ++s) {
        float v[4];
        load<4>(p.parts + (s * tokens + token) * p.ld + at, v);
#pragma unroll
        for (int n = 0; n < 4; ++n) sum[n] += v[n];
      }
    }
    store<4>(tile + sum_at(p.epilogue.block, row, col), sum);
  }
  __syncthreads();
  transform_store(p.epilogue, tile, place.first_m, place.first_n);
}

// --- matmul in f16

template <class LOADER>
__device__ __forceinline__ void matmul_f16(const TransformMatmulParams& p) {
  DYNAMIC_SHARED(unsigned char, memory);
  float* tile = reinterpret_cast<float*>(memory);
  i64 tokens = p.epilogue.epilogue.tokens;
  Place place(tokens, p.rows, p.codes.cols, p.k_each);
  {
    Tiles<f16, LOADER, GROUP, 2> matmul;
    matmul.multiply(reinterpret_cast<f16*>(memory), static_cast<const f16*>(p.x), tokens, p.codes.cols, place.first_m,
                     nullptr, 0, p.codes, p.rows, place.first_n, place.begin, place.end, p.codes.cols);
    __syncthreads();  // the stages are free
    matmul.visit([&](int row, int col, float a, float b) {
      float two[2] = {a, b};
      store<2>(tile + sum_at(p.epilogue.block, row, col), two);
    });
  }
  __syncthreads();
  end_tile(p, tile, place);
}

// --- matmul in float

// x^ of the columns k ... k + 31 of a group of tokens: 16 KB as they lie.
__device__ __forceinline__ void copy_inputs(float* tile, const float* x, i64 first_m, i64 k, i64 cols) {
  const float* from = x + first_m * cols + k * GROUP;
#pragma unroll
  for (int i = 0; i < STEP * GROUP / 4 / 256; ++i) {
    int at = (i * 256 + threadIdx.x) * 4;
    cp_async_16(tile + at, from + at);
  }
}

// 16 coefficients of a row on their way to the tile (STEP, BN): of thread (half, r) columns k + 16 half ... of row r.
struct QuadLoader {
  float v[4][4];

  __device__ __forceinline__ void load(const Codes& c, i64 first, i64 rows, i64 k) {
    i64 row = first + threadIdx.x % BN;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      if (row < rows) {
        load_quad(c, row, k + threadIdx.x / BN * 16 + q * 4, v[q]);
      } else {
        v[q][0] = v[q][1] = v[q][2] = v[q][3] = 0.0f;
      }
    }
  }
  __device__ __forceinline__ void store(float* tile) const {
#pragma unroll
    for (int i = 0; i < 16; ++i) tile[(threadIdx.x / BN * 16 + i) * BN + threadIdx.x % BN] = v[i / 4][i % 4];
  }
};

__device__ __forceinline__ void matmul_dense(const TransformMatmulParams& p) {
  const float* x = static_cast<const float*>(p.x);
  const Codes& codes = p.codes;
  i64 rows = p.rows;
  DYNAMIC_SHARED(float, memory);
  constexpr int A = STEP * GROUP, STAGE = A + STEP * BN;
  Place place(p.epilogue.epilogue.tokens, rows, codes.cols, p.k_each);
  int m0 = threadIdx.x / 16 * 4, n0 = threadIdx.x % 16 * 4;  // and 64 on
  float sums[8][8] = {};
  {
    QuadLoader w;
    int turn = 0;
    for (i64 k = place.begin - STEP; k < place.end; k += STEP, turn ^= 1) {  // the first round only fetches
      cp_async_wait<0>();
      __syncthreads();  // this stage is complete, and the other is free
      const float* now = memory + (turn ^ 1) * STAGE;
      float* next = memory + turn * STAGE;
      bool more = k + STEP < place.end;
      if (more) {
        copy_inputs(next, x, place.first_m, k + STEP, codes.cols);
        w.load(codes, place.first_n, rows, k + STEP);
      }
      cp_async_commit();
#pragma unroll 4
      for (int i = k < place.begin ? STEP : 0; i < STEP; ++i) {
        float a[2][4], b[2][4];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          load<4>(now + i * GROUP + h * 64 + m0, a[h]);
          load<4>(now + A + i * BN + h * 64 + n0, b[h]);
        }
#pragma unroll
        for (int m = 0; m < 8; ++m) {
#pragma unroll
          for (int n = 0; n < 8; ++n) sums[m][n] = fmaf(a[m / 4][m % 4], b[n / 4][n % 4], sums[m][n]);
        }
      }
      if (more) w.store(next + A);
    }
  }
  __syncthreads();  // the stages are free
#pragma unroll
  for (int m = 0; m < 8; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float four[4] = {sums[m][4 * h], sums[m][4 * h + 1], sums[m][4 * h + 2], sums[m][4 * h + 3]};
      store<4>(memory + sum_at(p.epilogue.block, m / 4 * 64 + m0 + m % 4, h * 64 + n0), four);
    }
  }
  __syncthreads();
  end_tile(p, memory, place);
}

// A warp multiplies its 16 rows: entries (value, offset of the column in the tile of x^) two by two.
__device__ __forceinline__ void matmul_sparse(const TransformMatmulParams& p) {
  const float* x = static_cast<const float*>(p.x);
  const Codes& codes = p.codes;
  i64 rows = p.rows;
  DYNAMIC_SHARED(float, memory);
  constexpr int A = STEP * GROUP, ROWS = 16;
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  Place place(p.epilogue.epilogue.tokens, rows, codes.cols, p.k_each);
  uint2* list = reinterpret_cast<uint2*>(memory + 2 * A) + warp * (ROWS * STEP);
  i64 row = place.first_n + warp * ROWS + lane % ROWS;  // that the lane knows the place in
  i64 entry = first_entry(codes, row, rows, place.begin);
  float sums[ROWS][4] = {};
  copy_inputs(memory, x, place.first_m, place.begin, codes.cols);
  cp_async_commit();
  int turn = 0;
  for (i64 k = place.begin; k < place.end; k += STEP, turn ^= 1) {
    u32 word = stored_columns(codes, row, rows, k);
    __syncwarp();  // the list is free
#pragma unroll 4
    for (int r = 0; r < ROWS; ++r) {
      u32 own = __shfl_sync(ALL_LANES, word, r);
      i64 e = __shfl_sync(ALL_LANES, entry, r);
      int count = __popc(own), before = bits_below(own, lane);
      if (own >> lane & 1u) {
        float v = entry_value(codes, e + before);
        list[r * STEP + before] = make_uint2(__float_as_uint(v), static_cast<u32>(lane * GROUP));
      }
      if (lane == 0 && count % 2) list[r * STEP + count] = make_uint2(0, 0);
    }
    entry += __popc(word);
    cp_async_wait<0>();
    __syncthreads();  // this stage of x^ is complete, and the other is free
    const float* now = memory + turn * A + lane * 4;
    if (k + STEP < place.end) copy_inputs(memory + (turn ^ 1) * A, x, place.first_m, k + STEP, codes.cols);
    cp_async_commit();
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      int count = __popc(__shfl_sync(ALL_LANES, word, r));
      const uint4* two = reinterpret_cast<const uint4*>(list + r * STEP);
#pragma unroll 1
      for (int i = 0; i < count; i += 2, ++two) {
        uint4 pair = *two;
        float a[4], b[4], u = __uint_as_float(pair.x), v = __uint_as_float(pair.z);
        load<4>(now + pair.y, a);
        load<4>(now + pair.w, b);
#pragma unroll
        for (int t = 0; t < 4; ++t) sums[r][t] = fmaf(v, b[t], fmaf(u, a[t], sums[r][t]));
      }
    }
  }
  __syncthreads();  // stages and lists are free
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
#pragma unroll
    for (int t = 0; t < 4; ++t) memory[sum_at(p.epilogue.block, lane * 4 + t, warp * ROWS + r)] = sums[r][t];
  }
  __syncthreads();
  end_tile(p, memory, place);
}

#define MATMUL(name, call, ...) \
  KERNEL(linear_transform_##name, __VA_ARGS__)(TransformMatmulParams_PARAMETERS) { \
    const TransformMatmulParams p = TransformMatmulParams_VALUES; \
    call(p); \
  }
MATMUL(codes, matmul_f16<RunLoader>, 256)
MATMUL(entries, matmul_f16<EntryLoader>, 256, RESIDENT)
MATMUL(dense, matmul_dense, 256)
MATMUL(sparse, matmul_sparse, 256, RESIDENT)

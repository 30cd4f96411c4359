// y[t,n] = activation(sum_k x[t,k] W[n,k] + bias[n]) + residual[t,n], W dense or compressed.
//
// With W_IJ = gain * (S C_IJ S^T + sum_k p_k Phi_k) y needs no dense W:
//     x^_J = S^T x_J;   y_I = gain * (S sum_J C_IJ x^_J + sum_J sum_k p_IJk (Phi_k x_J))       (vectors: without S)
// exactly (columns: x^ is x), so the inner loops multiply by the stored codes.
//
// Few tokens, limited by the bytes of W, each of which is read once for up to 8 tokens (dense and grid codes:
// linear_few.cu):
//   linear_absmax    max |x[t,:]| of every token; a NaN or an Inf in it must reach the results of the token even where
//                    no coefficient is stored, and scales f16 operands
//   linear_inputs    x^ from x, in the order in which the next kernel reads it
//   linear_features  Phi_k x_J, where there is a basis: 1, x^2, cos(pi x), cos(2 pi x) and the B rows of d
//   linear_sparse_T  partial sums of C x^, T tokens, sparse codes: a warp a row, a lane an entry
//   linear_weight_T  the same of a dense W: a warp four rows
//   linear_epilogue  sums the parts, transforms by S, adds the basis, then bias, activation, residual
// Many tokens, limited by arithmetic:
//   linear_mma_codes f16 x^ (linear_inputs) times a tile of C, whose codes are loaded while the tile before is multiplied
//                    and then unpacked to f16 in shared memory; S, bias, activation, residual at the end
//   linear_mma_codes_64, linear_mma_parts   the same in tiles of 64 tokens; and with k split over blocks, whose sums
//                    linear_epilogue adds
//   linear_mma_f16, linear_mma_bf16   the same of a dense W, or of a panel that decode.cu wrote (sparse codes, a
//                    basis, or dwt-bior3.1, whose x^ would lose digits): W read and written once more, 2 bytes a weight
//   linear_ffma      float x or W: FMA; a compressed W comes as panels, 4 bytes a weight twice
//
// Arrays     x: (tokens, in), out and residual: (tokens, out), row-major; bias: (out). x^: see LAYOUT_...;
//            parts: (splits, tokens, ld) float. Codes and basis: codes.cuh, basis.cuh.
// Ownership  mma: 256 threads, a tile of 128 tokens (64) x 128 outputs, k in steps of 64, two stages: cp.async for
//            x^ and dense W, codes through registers. ffma: 128 threads, 64 x 64, k in steps of 16, 8 x 4 a thread.
// Launch     grid (tiles, of few tokens rows * splits of k * groups of tokens); absmax, inputs, features and epilogue
//            go on in strides of the grid
// Shared     mma: 64 KB (mma_parts: 48 KB); inputs and epilogue: 128 B a value of B; ffma 8 KB
// Bytes      Few tokens: codes, scales once per 8 tokens; x^ 4 bytes, parts 8 bytes a token and split,
//            mostly in L2. Many: x^ and W once per 128 x 128 tile.
// Accuracy   float sums. f16 operands: x^ and C each rounded once to 11 bits (of grid codes C without the
//            rows' scales), x^ scaled by a power of two per token.
#include "linear.cuh"
#include "linear_params.h"

constexpr int LAYOUT_COLUMNS = 0;  // float, (token groups, K, T)
constexpr int LAYOUT_F16 = 1;      // f16, (tokens, K), times 2^-e
template <int T>
constexpr int DOT_ROWS = T > 1 ? 2 : 4;  // rows of a warp: as many sums as registers

// --- activation prologue

// Largest absolute value of each token; NaN where there is one. A warp a token.
KERNEL(linear_absmax, 256)(AbsmaxParams_PARAMETERS) {
  const AbsmaxParams p = AbsmaxParams_VALUES;
  int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
  for (i64 token = static_cast<i64>(blockIdx.x) * warps + threadIdx.x / WARP; token < p.x.tokens;
       token += static_cast<i64>(gridDim.x) * warps) {
    float top = 0.0f, wrong = 0.0f;
    for (i64 col = lane; col < p.x.cols; col += WARP) {
      float v[1];
      load_any<1>(p.x.data, p.x.type, token * p.x.cols + col, v);
      top = fmaxf(top, fabsf(v[0]));
      wrong += v[0] == v[0] ? 0.0f : v[0];
    }
    top = warp_max(top) + warp_sum(wrong);
    if (lane == 0) p.absmax[token] = top;
  }
}

// x^_J = S^T x_J of some (token, J) at a time.
KERNEL(linear_inputs, 128, 2)(InputsParams_PARAMETERS) {
  const InputsParams p = InputsParams_VALUES;
  __shared__ float4 storage[TILE_FLOATS / 4];
  float* tile = reinterpret_cast<float*>(storage);
  int block = p.block, lines = p.lines, quads = block / 4, group = p.group;
  i64 per_token = p.padded / block;
  i64 count = (p.x.tokens + group - 1) / group * group * per_token;
  float factor = transform_factor(p.transform, block);
  for (i64 first = static_cast<i64>(blockIdx.x) * lines; first < count; first += static_cast<i64>(gridDim.x) * lines) {
    for (int i = threadIdx.x; i < lines * quads; i += blockDim.x) {
      int line = i / quads, k = i % quads * 4;
      i64 token = quotient(first + line, p.by_token), col = (first + line - token * per_token) * block + k;
      float v[4];
      load_activations(p.x, token, col, v);
      store<4>(tile + tile_at(block, line, k), v);
    }
    __syncthreads();
    transform_lines<true>(block, p.transform, tile, lines);
    for (int i = threadIdx.x; i < lines * quads; i += blockDim.x) {
      int line = i / quads, k = i % quads * 4;
      i64 token = quotient(first + line, p.by_token), col = (first + line - token * per_token) * block + k;
      if (first + line >= count) continue;
      float v[4];
      load<4>(tile + tile_at(block, line, k), v);
#pragma unroll
      for (int n = 0; n < 4; ++n) v[n] *= factor;
      if (p.layout == LAYOUT_F16) {
        float scale = 1.0f / token_scale(p.absmax[token]);
#pragma unroll
        for (int n = 0; n < 4; ++n) v[n] *= scale;
        store<4>(static_cast<f16*>(p.out) + token * p.padded + col, v);
      } else {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          static_cast<float*>(p.out)[(token / group * p.padded + col + n) * group + token % group] = v[n];
        }
      }
    }
    __syncthreads();  // the tile is free again
  }
}

// The functions of the basis times x, of (token, J): matrix: sums with 1, x^2, cos(pi x), cos(2 pi x), then
// sum_c d(y, c) x[c] for the `block` rows y; vectors: sums with 1, |x|, x^2, cos(pi x), cos(2 pi x). A warp each.
KERNEL(linear_features, 128)(FeaturesParams_PARAMETERS) {
  const FeaturesParams p = FeaturesParams_VALUES;
  __shared__ float values[4][128];
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int block = p.block, matrix = p.matrix;
  int each = matrix ? 4 + block : 5;
  i64 count = p.x.tokens * p.blocks, stride = 4 * static_cast<i64>(gridDim.x);
  for (i64 first = 4 * static_cast<i64>(blockIdx.x); first < count; first += stride) {
    i64 w = first + warp;
    float sum[5] = {};
    if (w < count) {
      i64 token = w / p.blocks, col = w % p.blocks * block;
      for (int c = lane; c < block; c += WARP) {
        float v[1] = {};
        if (col + c < p.x.cols) load_any<1>(p.x.data, p.x.type, token * p.x.cols + col + c, v);
        values[warp][c] = v[0];
        Axis axis(c, block);
        sum[0] += v[0];
        sum[1] = fmaf(axis.square, v[0], sum[1]);
        sum[2] = fmaf(axis.cos_1, v[0], sum[2]);
        sum[3] = fmaf(axis.cos_2, v[0], sum[3]);
        sum[4] = fmaf(fabsf(axis.t), v[0], sum[4]);
      }
    }
    warp_reduce(sum, WARP, Add());
    if (w < count) {
      float* to = p.out + w * each;
      if (!matrix && lane == 0) {
        to[0] = sum[0];
        to[1] = sum[4];
        to[2] = sum[1];
        to[3] = sum[2];
        to[4] = sum[3];
      } else if (matrix) {
        if (lane == 0) {
#pragma unroll
          for (int i = 0; i < 4; ++i) to[i] = sum[i];
        }
      }
    }
    __syncwarp();
    if (matrix && w < count) {
      float step = 2.0f / static_cast<float>(block - 1);
      for (int y = lane; y < block; y += WARP) {
        float t = fmaf(step, static_cast<float>(y), -1.0f);
        float total = 0.0f;
        for (int c = 0; c < block; ++c) {
          float u = fmaf(step, static_cast<float>(c), -1.0f);
          float d2 = fmaf(t, t, u * u);
          total = fmaf(d2 * rsqrtf(d2), values[warp][c], total);
        }
        p.out[w * each + 4 + y] = total;
      }
    }
    __syncwarp();  // the values are free again
  }
}

// --- few tokens

// parts[split, token, row] of DOT_ROWS<T> rows, summed over the warp.
template <int T, class P>
__device__ __forceinline__ void store_parts(const P& p, const SplitPlace& place, i64 row, float (&total)[DOT_ROWS<T> * T]) {
  warp_reduce(total, WARP, Add());
  if (threadIdx.x % WARP == 0) {
#pragma unroll
    for (int r = 0; r < DOT_ROWS<T>; ++r) {
#pragma unroll
      for (int t = 0; t < T; ++t) {
        i64 token = place.group * T + t;
        if (row + r < p.rows && token < p.tokens) {
          p.parts[(place.split * p.tokens + token) * p.ld + row + r] = total[r * T + t];
        }
      }
    }
  }
}

template <int T>
__device__ __forceinline__ void sparse_rows(const SplitKParams& p) {
  const Codes& c = p.codes;
  i64 rows = p.rows;
  int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
  SplitPlace place(rows, warps, 1);
  i64 row = place.first_row + threadIdx.x / WARP;
  float total[T] = {};
  if (row < rows) {
    const float* own = static_cast<const float*>(p.x) + place.group * c.cols * T;
    i64 begin = c.row_start[row], end = c.row_start[row + 1];
    if (c.index_kind == INDEX_DELTA) {
      i64 before = -1;
      for (i64 first = begin; first < end; first += WARP) {
        i64 e = first + lane;
        int step = warp_prefix(e < end ? c.index[e] + 1 : 0);
        if (e < end) {
          float w = entry_value(c, e), v[T];
          load<T>(own + (before + step) * T, v);
#pragma unroll
          for (int t = 0; t < T; ++t) total[t] = fmaf(w, v[t], total[t]);
        }
        before += __shfl_sync(ALL_LANES, step, WARP - 1);
      }
    } else {
      i64 e = begin;
      for (i64 col = 0; col < c.cols; col += WARP) {
        u32 word = ALL_LANES;
        if (c.index_kind == INDEX_BITMAP) word = reinterpret_cast<const u32*>(c.index)[(row * c.cols + col) / 32];
        if (word >> lane & 1u) {
          float w = entry_value(c, e + __popc(word & ((1u << lane) - 1u))), v[T];
          load<T>(own + (col + lane) * T, v);
#pragma unroll
          for (int t = 0; t < T; ++t) total[t] = fmaf(w, v[t], total[t]);
        }
        e += __popc(word);
      }
    }
  }
  warp_reduce(total, WARP, Add());
  if (lane == 0 && row < rows) {
#pragma unroll
    for (int t = 0; t < T; ++t) {
      i64 token = place.group * T + t;
      if (token < p.tokens) p.parts[token * p.ld + row] = total[t];
    }
  }
}

// VEC columns a lane; x^ has `padded` columns, W `cols`.
template <int T, int VEC>
__device__ __forceinline__ void weight_rows(const DenseSplitKParams& p) {
  int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
  SplitPlace place(p.rows, warps * DOT_ROWS<T>, p.splits);
  i64 row = place.first_row + threadIdx.x / WARP * DOT_ROWS<T>;
  const float* own = p.x + place.group * p.padded * T;
  float total[DOT_ROWS<T> * T] = {};
  i64 last = min(p.cols, (place.split + 1) * p.each);
  for (i64 col = place.split * p.each + lane * VEC; col < last; col += WARP * VEC) {
    float u[DOT_ROWS<T>][VEC];
#pragma unroll
    for (int r = 0; r < DOT_ROWS<T>; ++r) {
      load_any<VEC>(p.w, p.w_type, min(row + r, p.rows - 1) * p.cols + col, u[r]);
    }
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      float v[T];
      load<T>(own + (col + i) * T, v);
#pragma unroll
      for (int r = 0; r < DOT_ROWS<T>; ++r) {
#pragma unroll
        for (int t = 0; t < T; ++t) total[r * T + t] = fmaf(u[r][i], v[t], total[r * T + t]);
      }
    }
  }
  store_parts<T>(p, place, row, total);
}

#define SPLIT_K(T) \
  KERNEL(linear_sparse_##T, 256, 4)(SplitKParams_PARAMETERS) { \
    const SplitKParams p = SplitKParams_VALUES; \
    sparse_rows<T>(p); \
  } \
  KERNEL(linear_weight_##T, 256, 2)(DenseSplitKParams_PARAMETERS) { \
    const DenseSplitKParams p = DenseSplitKParams_VALUES; \
    if (p.wide) { \
      weight_rows<T, 4>(p); \
    } else { \
      weight_rows<T, 1>(p); \
    } \
  }
// The bounds are those with which the compiler keeps all values in registers, for every architecture.
SPLIT_K(1)
SPLIT_K(4)
SPLIT_K(8)

// The results from `splits` parts.
KERNEL(linear_epilogue, 128, 2)(SplitKEpilogueParams_PARAMETERS) {
  const SplitKEpilogueParams p = SplitKEpilogueParams_VALUES;
  __shared__ float4 storage[TILE_FLOATS / 4];
  float* tile = reinterpret_cast<float*>(storage);
  int block = p.block, lines = p.lines;
  i64 tokens = p.epilogue.tokens, cols = p.epilogue.cols;
  i64 per_token = (cols + block - 1) / block;
  i64 count = tokens * per_token;
  float inverse = transform_factor(p.transform, block), factor = p.gain * inverse;
  inverse = 1.0f / inverse;
  for (i64 first = static_cast<i64>(blockIdx.x) * lines; first < count; first += static_cast<i64>(gridDim.x) * lines) {
    for (int i = threadIdx.x; i < lines * block; i += blockDim.x) {
      int line = i / block, k = i % block;
      i64 token = quotient(first + line, p.by_token), col = (first + line - token * per_token) * block + k;
      float sum = 0.0f;
      if (token < tokens && col < p.stored) {
        const float* part = p.parts + token * p.ld + col;
        i64 apart = tokens * p.ld;
#pragma unroll 4
        for (int s = 0; s < p.splits; ++s) sum += part[s * apart];
      }
      tile[tile_at(block, line, k)] = sum;
    }
    __syncthreads();
    transform_lines<false>(block, p.transform, tile, lines);
    if (p.with_basis) {
      for (int i = threadIdx.x; i < lines * block; i += blockDim.x) {
        int line = i / block, k = i % block;
        i64 token = quotient(first + line, p.by_token), col = (first + line - token * per_token) * block + k;
        if (token < tokens && col < cols) {
          float sum = basis_product(p.basis, p.features, token, col, p.blocks, p.basis_block, p.matrix);
          tile[tile_at(block, line, k)] += inverse * sum;
        }
      }
      __syncthreads();
    }
    auto write = [&](auto& v, int line, int k) {
      constexpr int N = sizeof v / sizeof v[0];
      i64 token = quotient(first + line, p.by_token), col = (first + line - token * per_token) * block + k;
      if (token >= tokens || col >= cols) return;
#pragma unroll
      for (int n = 0; n < N; ++n) v[n] = factor * tile[tile_at(block, line, k + n)];
      if (p.absmax) {  // of a token that was scaled, or with a NaN or an Inf that may have met no coefficient
        float absmax = p.absmax[token];
        float scale = p.scaled ? token_scale(absmax) : 1.0f;
#pragma unroll
        for (int n = 0; n < N; ++n) v[n] = fmaf(v[n], scale, 0.0f * absmax);
      }
      store_results(p.epilogue, token, col, v);
    };
    if (p.epilogue.wide) {
      for (int i = threadIdx.x * 8; i < lines * block; i += blockDim.x * 8) {
        float v[8];
        write(v, i / block, i % block);
      }
    } else {
      for (int i = threadIdx.x; i < lines * block; i += blockDim.x) {
        float v[1];
        write(v, i / block, i % block);
      }
    }
    __syncthreads();  // the tile is free again
  }
}

// --- many tokens: tensor cores

// A tile of BM x 128 results a block; S of B rows at the end.
template <class T, class LOADER, int BM = 128>
__device__ __forceinline__ void mma_tile(const MmaParams& p) {
  DYNAMIC_SHARED(unsigned char, memory);
  const Epilogue& epilogue = p.epilogue;
  i64 tiles_m = (epilogue.tokens + BM - 1) / BM;
  i64 first_m = blockIdx.x % tiles_m * BM, first_n = blockIdx.x / tiles_m * BN;
  float* tile = reinterpret_cast<float*>(memory);
  {
    Tiles<T, LOADER, BM, 2> matmul;
    matmul.multiply(reinterpret_cast<T*>(memory), static_cast<const T*>(p.x), epilogue.tokens, p.ldx, first_m,
                     static_cast<const T*>(p.w), p.ldw, p.codes, p.rows, first_n, 0, p.depth, p.depth);
    __syncthreads();  // the stages are free
    matmul.visit([&](int row, int col, float a, float b) {
      float two[2] = {a, b};
      store<2>(tile + sum_at(p.block, row, col), two);
    });
  }
  __syncthreads();
  float gain = p.gain;
  if constexpr (!IS_NO_LOADER<LOADER>) {
    gain *= transform_factor(p.transform, p.block);
    transform_sums<BM>(p.block, p.transform, tile);
  }
  auto adjust = [&](i64 token, i64, auto& v) {
    float factor = p.absmax ? gain * token_scale(p.absmax[token]) : gain;
#pragma unroll
    for (float& value : v) value *= factor;
  };
  store_tile<BM>(tile, p.block, first_m, p.column + first_n, min(p.column + p.rows, epilogue.cols), epilogue, adjust);
}

#define MMA(name, T, ...) \
  KERNEL(linear_mma_##name, 256, RESIDENT)(MmaParams_PARAMETERS) { \
    const MmaParams p = MmaParams_VALUES; \
    mma_tile<T, __VA_ARGS__>(p); \
  }
MMA(codes, f16, RunLoader)
MMA(codes_64, f16, RunLoader, 64)
MMA(f16, f16, NoLoader)
MMA(bf16, bf16, NoLoader)

// parts[split, token, row] of 64 tokens x 128 rows a block; splits of `each` values of k.
KERNEL(linear_mma_parts, 256, RESIDENT)(SplitKParams_PARAMETERS) {
  const SplitKParams p = SplitKParams_VALUES;
  constexpr int BM = 64;
  DYNAMIC_SHARED(f16, stages);
  SplitPlace place(p.rows, BN, p.splits);
  i64 begin = place.split * p.each, end = min(begin + p.each, p.codes.cols);
  Tiles<f16, RunLoader, BM, 2> matmul;
  matmul.multiply(stages, static_cast<const f16*>(p.x), p.tokens, p.ldx, place.group * BM, nullptr, 0, p.codes, p.rows,
                   place.first_row, begin, end, p.codes.cols);
  matmul.visit([&](int row, int col, float a, float b) {
    i64 token = place.group * BM + row, out = place.first_row + col;
    if (token < p.tokens && out < p.rows) {  // ld is even: there is room for one more
      float two[2] = {a, b};
      store<2>(p.parts + (place.split * p.tokens + token) * p.ld + out, two);
    }
  });
}

// --- many tokens: float

constexpr int FM = 64, FN = 64, FK = 16, PITCH = FM + 4;

// 8 values of a row from `col` on, as float, zeros beyond `cols`.
__device__ __forceinline__ void load_eight(const void* p, int type, int wide, i64 row, i64 rows, i64 col, i64 cols,
                                           i64 ld, float (&v)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = 0.0f;
  if (row >= rows) return;
  if (wide) {
    if (col < cols) load_any<8>(p, type, row * ld + col, v);
  } else {
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {
      float one[1] = {};
      if (col + i < cols) load_any<1>(p, type, row * ld + col + i, one);
#pragma unroll
      for (int n = 0; n < 8; ++n) v[n] = n == i ? one[0] : v[n];
    }
  }
}

KERNEL(linear_ffma, 128)(FfmaParams_PARAMETERS) {
  const FfmaParams p = FfmaParams_VALUES;
  __shared__ float4 storage[FM * FN / 4];
  float* memory = reinterpret_cast<float*>(storage);  // a tile of x and one of W, k by k; then the sums
  float* tile_x = memory;
  float* tile_w = memory + FK * PITCH;
  i64 tokens = p.epilogue.tokens, rows = p.rows, depth = p.depth;
  i64 tiles_m = (tokens + FM - 1) / FM;
  i64 first_m = blockIdx.x % tiles_m * FM, first_n = blockIdx.x / tiles_m * FN;
  int row = threadIdx.x / 2, k0 = threadIdx.x % 2 * 8;
  int m0 = threadIdx.x / 16 * 8, n0 = threadIdx.x % 16 * 4;
  float sums[8][4] = {}, next_x[8], next_w[8];
  load_eight(p.x, p.x_type, p.x_wide, first_m + row, tokens, k0, depth, depth, next_x);
  load_eight(p.w, p.w_type, p.w_wide, first_n + row, rows, k0, depth, p.ldw, next_w);
  for (i64 k = 0; k < depth; k += FK) {
    __syncthreads();  // the tiles are free
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      tile_x[(k0 + i) * PITCH + row] = next_x[i];
      tile_w[(k0 + i) * PITCH + row] = next_w[i];
    }
    __syncthreads();
    if (k + FK < depth) {
      load_eight(p.x, p.x_type, p.x_wide, first_m + row, tokens, k + FK + k0, depth, depth, next_x);
      load_eight(p.w, p.w_type, p.w_wide, first_n + row, rows, k + FK + k0, depth, p.ldw, next_w);
    }
#pragma unroll
    for (int i = 0; i < FK; ++i) {
      float a[8], b[4];
      load<8>(tile_x + i * PITCH + m0, a);
      load<4>(tile_w + i * PITCH + n0, b);
#pragma unroll
      for (int m = 0; m < 8; ++m) {
#pragma unroll
        for (int n = 0; n < 4; ++n) sums[m][n] = fmaf(a[m], b[n], sums[m][n]);
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < 8; ++m) store<4>(memory + (m0 + m) * FN + n0, sums[m]);
  __syncthreads();
  auto write = [&](auto& v, int at) {
    constexpr int N = sizeof v / sizeof v[0];
    i64 token = first_m + at / FN, col = first_n + at % FN;
    if (token >= tokens || col >= rows) return;
#pragma unroll
    for (int n = 0; n < N; ++n) v[n] = p.gain * memory[at + n];
    store_results(p.epilogue, token, p.column + col, v);
  };
  if (p.epilogue.wide) {
    for (int i = threadIdx.x * 8; i < FM * FN; i += 8 * blockDim.x) {
      float v[8];
      write(v, i);
    }
  } else {
    for (int i = threadIdx.x; i < FM * FN; i += blockDim.x) {
      float v[1];
      write(v, i);
    }
  }
}

// W = gain * (S_r C S_c^T + sum_k p_k Phi_k), block by block; for vectors W = gain * (C S_c^T + sum_k p_k Phi_k), for
// columns W = gain * S_r C.
//
// Arrays     Codes of C (rows_pad, cols_pad), see codes.cuh; basis: f16 (row blocks, blocks, 8), vectors
//            (rows, blocks, 5), or null; out: (rows, cols) float, f16 or bf16, row-major. Rows first, first + 1, ...
//            are decoded, or of vectors the rows `ids` (int64, or int32; a row of NaN where there is none). starts:
//            (rows, blocks + 1), sparse codes only.
// Ownership  A block has 4, 2 or 1 tiles of B = 32, 64 or 128 side by side in shared memory. Its threads fill them from
//            the codes, runs of 32 codes a thread or an entry a lane; then a thread has a column, then a row, of 32 or 64
//            values in registers (two threads for 128) and transforms it by a fast algorithm; then all write rows out.
//            decode_plain: no transform, no basis, dense and grid codes: no shared memory, a warp a part of a row, a lane 4
//            times 16 bytes of out.
//            decode_starts: sparse codes only, before the others: a warp goes over the index of a row and writes where
//            its entries begin in each block, so that tiles can be decoded in any order. (A warp that decoded a whole
//            row would leave the transform of columns to a second pass over memory.)
// Launch     128 threads, 256 for B = 128; grid (tiles), in strides of the grid
// Shared     4 B B bytes a tile: 16, 32, 64 KB
// Bytes      Codes, scales and basis once, out once. starts: 8 bytes a row and block, written and read, and the index
//            read once more.
// Accuracy   float. The DCT is a product of rotations and sums (orthogonal, so errors do not grow), the wavelets are
//            their filters. Some 10 operations a value and direction for either, where S itself would take B.
//
// Sources: Plonka and Tasche 2005, "Fast and numerically stable algorithms for discrete cosine transforms"; for the
// wavelets see FORMAT.md.
#include "basis.cuh"
#include "division.cuh"
#include "tiles.cuh"
#include "decode_params.h"

// Where a tile is transformed, bits of `sides`: a matrix has both.
constexpr int ALONG_ROWS = 1, DOWN_COLUMNS = 2;

// Rows `first` on of out, from the tiles of block columns J on. source(r): stored row of local row r.
template <int B, int VEC, class RowOf>
__device__ __forceinline__ void store_tiles(const DecodeParams& p, const float* tiles, i64 first, int rows,
                                            i64 block_col, float factor, RowOf source) {
  int matrix = p.sides & DOWN_COLUMNS;
  i64 blocks = p.codes.cols / B;
  constexpr int CHUNKS = B * TILES<B> / VEC;
  for (int i = threadIdx.x; i < B * CHUNKS; i += blockDim.x) {
    int r = i / CHUNKS, col = i % CHUNKS * VEC;
    i64 at = block_col * B + col;
    if (r >= rows || at >= p.cols) continue;
    const float* tile = tiles + col / B * (B * B);
    float v[VEC];
#pragma unroll
    for (int k = 0; k < VEC; k += 4) {
      if constexpr (VEC == 1) {
        v[0] = tile[tile_at<B>(r, col % B)];
      } else {
        float four[4];
        load<4>(tile + tile_at<B>(r, col % B + k), four);
#pragma unroll
        for (int n = 0; n < 4; ++n) v[k + n] = four[n];
      }
    }
#pragma unroll
    for (int k = 0; k < VEC; ++k) v[k] *= factor;
    if (p.with_basis) {
      i64 row = source(r), j = block_col + col / B;
      if (row < 0) row = 0;  // the values are NaN already
      if (matrix) {
        float weights[8];
        load<8>(p.basis + ((row / B) * blocks + j) * 8, weights);
        Axis y(static_cast<int>(row % B), B);
#pragma unroll
        for (int k = 0; k < VEC; ++k) v[k] += p.gain * basis_value(weights, Axis(col % B + k, B), y);
      } else {
        const f16* weights = p.basis + (row * blocks + j) * 5;
#pragma unroll
        for (int k = 0; k < VEC; ++k) v[k] += p.gain * basis_value(weights, Axis(col % B + k, B));
      }
    }
    store_any<VEC>(p.out, p.type, (first + r) * p.cols + at, v);
  }
}

template <int B>
__device__ __forceinline__ void decode_tiles(const DecodeParams& p) {
  DYNAMIC_SHARED(float, tiles);
  i64 blocks = p.codes.cols / B;
  i64 per_row = (blocks + TILES<B> - 1) / TILES<B>;
  i64 count = (p.rows + B - 1) / B * per_row;
  float factor = transform_factor(p.transform, B);
  factor = p.gain * (p.sides == (ALONG_ROWS | DOWN_COLUMNS) ? factor * factor : factor);
  int matrix = p.sides & DOWN_COLUMNS;
  constexpr int LINES = B * TILES<B>;
  int line = threadIdx.x % LINES, part = threadIdx.x / LINES;
  float* own = tiles + line / B * (B * B);
  for (i64 w = blockIdx.x; w < count; w += gridDim.x) {
    i64 row_of_tiles = quotient(w, p.by_pieces), top = row_of_tiles * B;
    i64 block_col = (w - row_of_tiles * per_row) * TILES<B>;
    i64 left = p.rows - top;
    int rows = left < B ? static_cast<int>(left) : B;
    // all B rows of a matrix are stored, and needed
    int stored = matrix ? B : rows;
    auto source = [&](int r) { return stored_row(p.numbers, top + r); };
    load_tiles<B>(p.codes, p.starts + top * (blocks + 1), stored, block_col, tiles, source);
    __syncthreads();
    if (p.transform != NO_TRANSFORM) {
#pragma unroll 1
      for (int side = DOWN_COLUMNS; side >= ALONG_ROWS; --side) {  // one copy of the code for both directions
        if (p.sides & side) synthesise<B>(p.transform, {own, line % B, side == DOWN_COLUMNS}, true, part);
      }
    }
    if (!p.wide) {
      store_tiles<B, 1>(p, tiles, top, rows, block_col, factor, source);
    } else if (p.type == TYPE_F32) {
      store_tiles<B, 4>(p, tiles, top, rows, block_col, factor, source);
    } else {
      store_tiles<B, 8>(p, tiles, top, rows, block_col, factor, source);
    }
    __syncthreads();  // the tiles are free again
  }
}

// One block a multiprocessor: with the bound's default the compiler saves registers, and spills.
#define ENTRY(B, threads) \
  KERNEL(decode_##B, threads, 1)(DecodeParams_PARAMETERS) { \
    const DecodeParams p = DecodeParams_VALUES; \
    decode_tiles<B>(p); \
  }
ENTRY(32, 128)
ENTRY(64, 128)
ENTRY(128, 256)

// The words of a plane that quads 2 pair and 2 pair + 1 of a run are in, as bytes of codes.
template <int WIDTH>
__device__ __forceinline__ void plane_pair(const u32* plane, int bits, int pair, u32 (&out)[2]) {
  constexpr u32 MASK = 0x01010101u * ((1u << WIDTH) - 1u);
  uint2 two;
  if constexpr (WIDTH == 1) {
    two.x = two.y = plane[0];
  } else if (bits % 2 == 0) {
    two = *reinterpret_cast<const uint2*>(plane + 2 * pair % WIDTH);
  } else {
    two.x = plane[2 * pair % WIDTH];
    two.y = plane[2 * pair % WIDTH + 1];
  }
  out[0] = out[0] << WIDTH | (two.x >> (2 * pair / WIDTH * WIDTH) & MASK);
  out[1] = out[1] << WIDTH | (two.y >> ((2 * pair + 1) / WIDTH * WIDTH) & MASK);
}

// VEC codes of a run from quad `quad` on, as floats.
template <int VEC>
__device__ __forceinline__ void load_codes(const u32* run, int bits, int quad, float (&v)[VEC]) {
  if (VEC == 8 && bits <= 8) {
    u32 bytes[2] = {};
    if (bits & 8) plane_pair<8>(run, bits, quad / 2, bytes);
    if (bits & 4) plane_pair<4>(run, bits, quad / 2, bytes);
    if (bits & 2) plane_pair<2>(run + (bits & 4), bits, quad / 2, bytes);
    if (bits & 1) plane_pair<1>(run + (bits & 6), bits, quad / 2, bytes);
#pragma unroll
    for (int i = 0; i < VEC; ++i) v[i] = byte_value(bytes[i / 4], i % 4);
  } else {
#pragma unroll
    for (int q = 0; q < VEC / 4; ++q) {
      float four[4];
      unpack_quad(run, bits, quad + q, four);
#pragma unroll
      for (int i = 0; i < 4; ++i) v[q * 4 + i] = four[i];
    }
  }
}

// Where the lane of a warp that decodes a part of a row reads and writes. What it reads lies in every step at the same
// place of a run, STEP columns on.
struct PlainPart {
  const u32* runs;
  const f16* scales;
  int group, quad;  // columns of a scale; first quad in the run
  i64 col, to;      // first column, and its place in out
  int left;         // columns of the row from there on
};

// Up to STEPS times VEC coefficients: 16 bytes of out each. WHOLE: all of them are columns of the row, so that no branch
// keeps one load from following another.
template <int STEPS, int VEC, bool WHOLE>
__device__ __forceinline__ void decode_part(const DecodeParams& p, const PlainPart& at) {
  constexpr int STEP = WARP * VEC;
  const Codes& c = p.codes;
  float scale[STEPS], v[STEPS][VEC];
#pragma unroll
  for (int k = 0; k < STEPS; ++k) {
    if (WHOLE || k * STEP < at.left) {
      scale[k] = p.gain * to_float(at.scales[k * STEP / at.group]);
      load_codes<VEC>(at.runs + k * (STEP / RUN) * c.bits, c.bits, at.quad, v[k]);
    }
  }
#pragma unroll
  for (int k = 0; k < STEPS; ++k) {
    if (!WHOLE && k * STEP >= at.left) return;
#pragma unroll
    for (int q = 0; q < VEC; q += 4) {
      float four[4] = {v[k][q], v[k][q + 1], v[k][q + 2], v[k][q + 3]};
      scale_quad(c, scale[k], at.col + k * STEP + q, four);
#pragma unroll
      for (int i = 0; i < 4; ++i) v[k][q + i] = four[i];
    }
    if (p.wide) {
      store_any<VEC>(p.out, p.type, at.to + k * STEP, v[k]);
    } else {
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        float one[1] = {v[k][i]};
        if (WHOLE || k * STEP + i < at.left) store_any<1>(p.out, p.type, at.to + k * STEP + i, one);
      }
    }
  }
}

// A warp decodes PART columns of a row.
template <int VEC>
__device__ __forceinline__ void decode_parts(const DecodeParams& p) {
  constexpr int STEPS = 4, PART = STEPS * WARP * VEC;
  const Codes& c = p.codes;
  bool grid = c.kind == CODES_GRID;
  int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
  i64 parts = (p.cols + PART - 1) / PART, scales = grid ? 1 : (c.cols + c.group - 1) / c.group;
  for (i64 w = static_cast<i64>(blockIdx.x) * warps + threadIdx.x / WARP; w < p.rows * parts;
       w += static_cast<i64>(gridDim.x) * warps) {
    i64 row = quotient(w, p.by_pieces), col = (w - row * parts) * PART + lane * VEC, to = row * p.cols + col;
    i64 source = stored_row(p.numbers, row);
    int left = static_cast<int>(min(p.cols - col, static_cast<i64>(PART)));
    if (source < 0) {
#pragma unroll 1
      for (int k = 0; k < left; k += WARP * VEC) {
#pragma unroll 1
        for (int i = 0; i < VEC && k + i < left; ++i) {
          float none[1] = {NOT_A_NUMBER};
          store_any<1>(p.out, p.type, to + k + i, none);
        }
      }
      continue;
    }
    PlainPart at = {row_runs(c, source) + col / RUN * c.bits, c.scale + source * scales + (grid ? 0 : col / c.group),
                    grid ? PART : c.group, lane * VEC % RUN / 4, col, to, left};
    if (left > (STEPS - 1) * WARP * VEC + VEC - 1) {
      // hot: part
      decode_part<STEPS, VEC, true>(p, at);
    } else {
      decode_part<STEPS, VEC, false>(p, at);
    }
  }
}

KERNEL(decode_plain, 256)(DecodeParams_PARAMETERS) {
  const DecodeParams p = DecodeParams_VALUES;
  if (p.type == TYPE_F32) {
    decode_parts<4>(p);
  } else {
    decode_parts<8>(p);
  }
}

// starts of the stored rows first, first + 1, ..., or ids; a warp a row.
KERNEL(decode_starts, 256)(StartsParams_PARAMETERS) {
  const StartsParams p = StartsParams_VALUES;
  int warps = blockDim.x / WARP;
  i64 blocks = p.codes.cols / p.block;
  for (i64 row = static_cast<i64>(blockIdx.x) * warps + threadIdx.x / WARP; row < p.rows;
       row += static_cast<i64>(gridDim.x) * warps) {
    i64 source = stored_row(p.numbers, row);
    if (source >= 0) find_starts(p.codes, source, p.block, p.starts + row * (blocks + 1));
  }
}

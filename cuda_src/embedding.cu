// y[i,:] = W[ids[i],:]: rows of a table, decoding only what is asked for. No such row: NaN.
//
// Arrays     ids: (n) int64 or int32; out: (n, cols), row-major.
//            embedding_rows: W dense, of the type of out, copied in units of 2, 4 or 16 bytes.
//            embedding_<B>: W in B x B blocks, see decode.cu; starts: (rows_pad, blocks + 1), sparse codes only.
//            Vectors decode row by row anyway: their launches are those of decode.cu.
// Ownership  embedding_rows: a thread a unit. embedding_<B>: a block one id and the 4, 2 or 1 tiles of B = 32, 64, 128
//            side by side that hold a part of its row, transformed as in decode.cu.
// Launch     embedding_rows: 256 threads; embedding_<B>: 128, 256 for B = 128; grid (units, or tiles), in strides
// Shared     embedding_<B>: 16, 32, 64 KB
// Bytes      embedding_rows: the rows once, out once. embedding_<B>: the codes of the block row that the row is in
//            (of transform `none`: of the row), out once.
// Accuracy   as decode.cu
#include "basis.cuh"
#include "division.cuh"
#include "tiles.cuh"
#include "embedding_params.h"

template <class U>
__device__ __forceinline__ void copy_rows(const CopyRowsParams& p, U none) {
  i64 stride = static_cast<i64>(gridDim.x) * blockDim.x;
  for (i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; i < p.count * p.units; i += stride) {
    i64 row = stored_row(p.numbers, i / p.units);
    static_cast<U*>(p.out)[i] = row < 0 ? none : static_cast<const U*>(p.table)[row * p.units + i % p.units];
  }
}

KERNEL(embedding_rows, 256)(CopyRowsParams_PARAMETERS) {
  const CopyRowsParams p = CopyRowsParams_VALUES;
  if (p.unit == 4) {
    copy_rows(p, make_uint4(0x7fff7fffu, 0x7fff7fffu, 0x7fff7fffu, 0x7fff7fffu));  // NaN in every float type
  } else if (p.unit == 2) {
    copy_rows(p, u32{0x7fff7fffu});
  } else {
    copy_rows(p, u16{0x7fff});
  }
}

template <int B>
__device__ __forceinline__ void decode_row(const EmbeddingParams& p) {
  DYNAMIC_SHARED(float, tiles);
  i64 blocks = p.codes.cols / B;
  i64 per_row = (blocks + TILES<B> - 1) / TILES<B>;
  float factor = transform_factor(p.transform, B);
  factor *= p.gain * factor;
  constexpr int LINES = B * TILES<B>;
  int line = threadIdx.x % LINES, part = threadIdx.x / LINES;
  float* own = tiles + line / B * (B * B);
  for (i64 w = blockIdx.x; w < p.count * per_row; w += gridDim.x) {
    i64 i = quotient(w, p.by_pieces), block_col = (w - i * per_row) * TILES<B>;
    i64 id = stored_row(p.numbers, i), top = id / B * B;
    if (id < 0) top = 0;
    int row = id < 0 ? 0 : static_cast<int>(id - top);
    bool whole = p.transform != NO_TRANSFORM;  // else one row of the tile is enough, its first
    if (!whole) {
      top += row;
      row = 0;
    }
    const uint2* own_starts = p.starts + top * (blocks + 1);
    load_tiles<B>(p.codes, own_starts, whole ? B : 1, block_col, tiles, [=](int r) { return top + r; });
    __syncthreads();
    if (whole) {
#pragma unroll 1
      for (int column = 1; column >= 0; --column) {
        synthesise<B>(p.transform, {own, line % B, column == 1}, true, part);  // all rows take no longer than one
      }
    }
    i64 col = block_col * B + line;
    if (part == 0 && col < p.cols) {
      float v[1] = {factor * tiles[line / B * (B * B) + tile_at<B>(row, line % B)]};
      if (p.with_basis) {
        float weights[8];
        i64 at = id < 0 ? 0 : id;
        load<8>(p.basis + (at / B * blocks + col / B) * 8, weights);
        v[0] += p.gain * basis_value(weights, Axis(line % B, B), Axis(static_cast<int>(at % B), B));
      }
      if (id < 0) v[0] = NOT_A_NUMBER;
      store_any<1>(p.out, p.type, i * p.cols + col, v);
    }
    __syncthreads();  // the tiles are free again
  }
}

// One block a multiprocessor, as in decode.cu.
#define ENTRY(B, threads) \
  KERNEL(embedding_##B, threads, 1)(EmbeddingParams_PARAMETERS) { \
    const EmbeddingParams p = EmbeddingParams_VALUES; \
    decode_row<B>(p); \
  }
ENTRY(32, 128)
ENTRY(64, 128)
ENTRY(128, 256)

// Tiles of coefficients in shared memory, unpacked from codes (decode and embedding).
#include "codes.cuh"
#include "transforms.cuh"

// The sparse coefficients of block column J of a row into row `r` of the tile; one warp, whole.
template <int B>
__device__ __forceinline__ void load_sparse_row(const Codes& c, const uint2* starts, i64 row, i64 block_col, int r,
                                                float* tile) {
  int lane = threadIdx.x % WARP;
  if (c.index_kind != INDEX_DELTA) {
    i64 at = row * c.cols + block_col * B;  // of the first coefficient, were all stored
    i64 e = at;
    if (c.index_kind == INDEX_BITMAP) e = c.row_start[row] + starts[block_col].x;
#pragma unroll
    for (int k = 0; k < B; k += WARP) {
      u32 word = c.index_kind == INDEX_FULL ? ALL_LANES : reinterpret_cast<const u32*>(c.index)[(at + k) / 32];
      bool stored = word >> lane & 1u;
      float v = stored ? entry_value(c, e + __popc(word & ((1u << lane) - 1u))) : 0.0f;
      tile[tile_at<B>(r, k + lane)] = v;
      e += __popc(word);
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < B; k += WARP) tile[tile_at<B>(r, k + lane)] = 0.0f;
  __syncwarp();
  uint2 start = starts[block_col];
  i64 begin = c.row_start[row];
  int column = static_cast<int>(start.y), end = static_cast<int>(starts[block_col + 1].x);
  for (int first = static_cast<int>(start.x); first < end; first += WARP) {
    int e = first + lane;
    int step = e < end && e != static_cast<int>(start.x) ? c.index[begin + e] + 1 : 0;
    int at = column + warp_prefix(step);
    if (e < end) tile[tile_at<B>(r, at)] = entry_value(c, begin + e);
    column = __shfl_sync(ALL_LANES, at, WARP - 1);
  }
}

// Threads of a block that decodes tiles, and tiles side by side of it: 128 columns.
template <int B>
constexpr int TILE_THREADS = B == 128 ? 256 : 128;
template <int B>
constexpr int TILES = B == 32 ? 4 : B == 64 ? 2 : 1;

// TILES<B> tiles side by side: coefficients of `rows` stored rows (those that row_of gives) from block column J on.
// Zeros below them and beyond the last block column, NaN where row_of gives -1. Whole warps. `starts` of local row r:
// starts + r * (blocks + 1). Of dense and grid codes a thread takes whole runs, all loaded before the first is unpacked; a
// warp's are those of 8 rows, whose 64 bytes it reads, and whose chunks of a tile lie in different banks.
template <int B, class RowOf>
__device__ __forceinline__ void load_tiles(const Codes& c, const uint2* starts, int rows, i64 block_col, float* tiles,
                                           RowOf row_of) {
  i64 blocks = c.cols / B;
  if (c.kind == CODES_SPARSE) {
    int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    for (int i = threadIdx.x / WARP; i < B * TILES<B>; i += warps) {
      int r = i / TILES<B>, tile = i % TILES<B>;
      i64 row = r < rows && block_col + tile < blocks ? row_of(r) : 0;
      if (r < rows && block_col + tile < blocks && row >= 0) {
        load_sparse_row<B>(c, starts + r * (blocks + 1), row, block_col + tile, r, tiles + tile * B * B);
      } else {
#pragma unroll
        for (int k = 0; k < B; k += WARP) tiles[tile * B * B + tile_at<B>(r, k + lane)] = row < 0 ? NOT_A_NUMBER : 0.0f;
      }
    }
    return;
  }
  constexpr int RUNS = B * TILES<B> / RUN, EACH = B * RUNS / TILE_THREADS<B>;
  static_assert(RUNS == 4, "a warp takes the runs of 8 rows");
  u32 words[EACH][RUN_WORDS] = {};
  float scale[EACH];  // of what is not stored 0 or NaN, and so are its coefficients
  i64 first[EACH];    // column; any for those
  auto place = [](int k, int& r, int& col) {
    int i = k * TILE_THREADS<B> + static_cast<int>(threadIdx.x);
    r = i / WARP * 8 + i % 8;
    col = i / 8 % RUNS * RUN;
  };
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    int r, col;
    place(k, r, col);
    i64 row = r < rows && block_col * B + col < c.cols ? row_of(r) : 0;
    scale[k] = row < 0 ? NOT_A_NUMBER : 0.0f;
    first[k] = 0;
    if (r < rows && block_col * B + col < c.cols && row >= 0) {
      first[k] = block_col * B + col;
      load_run(row_runs(c, row) + first[k] / RUN * c.bits, c.bits, words[k]);
      scale[k] = scale_at(c, row, first[k]);
    }
  }
  // hot: unpack_tiles
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    int r, col;
    place(k, r, col);
    float* tile = tiles + col / B * (B * B);
#pragma unroll
    for (int quad = 0; quad < RUN / 4; ++quad) {
      float v[4];
      unpack_quad(words[k], c.bits, quad, v);
      scale_quad(c, scale[k], first[k] + quad * 4, v);
      store<4>(tile + tile_at<B>(r, col % B + quad * 4), v);
    }
  }
}

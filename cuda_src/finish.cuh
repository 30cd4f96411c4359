// The end of a matmul whose sums over k are split over blocks, in the same launch: the last block of a tile of results to
// arrive adds the parts of all, in the order of the splits, transforms them by S, and applies bias, activation, residual.
#include "linear.cuh"
#include "finish_params.h"

#ifndef RBE_HOST

// 16 bytes that another block has written, from the second-level cache: that of a multiprocessor may hold older ones.
__device__ __forceinline__ uint4 load_from_blocks(const float* p) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

// The 128 bytes around p will be read.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

#endif  // RBE_HOST

// The codes of the columns begin ... end - 1 of `count` rows are on their way to the second-level cache while x^ is made.
__device__ __forceinline__ void prefetch_codes(const Codes& c, i64 first_row, int count, i64 rows, i64 begin, i64 end) {
  int bytes = static_cast<int>((end - begin) / RUN) * c.bits * 4, lines = (bytes + 127) / 128;
  for (int i = threadIdx.x; i < count * lines; i += blockDim.x) {
    i64 row = first_row + i / lines;
    if (row < rows) prefetch(reinterpret_cast<const char*>(row_runs(c, row) + begin / RUN * c.bits) + i % lines * 128);
  }
}

// Whether this block is the last of `blocks` to arrive, which all parts are then visible to. All threads call it; the
// counter is 0 before the first block arrives and after the last one, whose increment wraps it. It counts every arrival:
// launches that overlap by mistake (two streams, one workspace) leave 0 as well, where a store of 0 would lose those
// between the count and the store, and every later launch would be wrong.
__device__ __forceinline__ bool is_last_block(u32* counter, int blocks) {
  __shared__ u32 before;
  __threadfence();  // each thread's parts, before the block is counted
  __syncthreads();
  u32 last = static_cast<u32>(blocks) - 1;
  if (threadIdx.x == 0) before = atomicInc(counter, last);
  __syncthreads();
  if (before != last) return false;
  __threadfence();
  return true;
}

// The place of a sum in a tile of lines of `block` rows, the lines of a token one after another.
__device__ __forceinline__ int line_at(int block, int rows, int token, int row) {
  return tile_at(block, token * (rows / block) + row / block, row % block);
}

// tile = the sums over all splits of parts (splits, all_tokens, ld), of `tokens` tokens and `rows` rows; with `row_scale`
// of integers, times that; `last_row` has the last of these scales.
template <bool INTEGERS>
__device__ __forceinline__ void add_parts(const float* parts, int splits, i64 all_tokens, i64 ld, i64 first_token, int tokens,
                                          i64 first_row, int rows, int block, const f16* row_scale, i64 last_row,
                                          float* tile) {
  i64 apart = all_tokens * ld;
  for (int i = threadIdx.x * 4; i < tokens * rows; i += blockDim.x * 4) {
    int token = i / rows, row = i % rows;
    float sum[4] = {};
    if (first_row + row < ld) {
      const float* part = parts + (first_token + token) * ld + first_row + row;
      int exact[4] = {};
#pragma unroll 4
      for (int s = 0; s < splits; ++s) {
        uint4 v = load_from_blocks(part + s * apart);
        u32 four[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          if (INTEGERS) {
            exact[n] += static_cast<int>(four[n]);
          } else {
            sum[n] += __uint_as_float(four[n]);
          }
        }
      }
      if constexpr (INTEGERS) {
#pragma unroll
        for (int n = 0; n < 4; ++n) sum[n] = static_cast<float>(exact[n]) * to_float(row_scale[min(first_row + row + n, last_row)]);
      }
    }
    store<4>(tile + line_at(block, rows, token, row), sum);
  }
}

// What the sums are multiplied by, before or after S as `transform_lines` computes it.
__device__ __forceinline__ float finish_factor(const Finish& p) { return p.gain * transform_factor(p.transform, p.block); }

// The results of a tile of sums of `tokens` tokens and `rows` rows; adjust(token, row, v) changes what the transform gives.
// Sums as large as x must have finish_factor before S, which else may be infinite where the results are not.
template <int THREADS, class F>
__device__ __forceinline__ void finish_tile(const Finish& p, float* tile, i64 first_token, int tokens, i64 first_row, int rows,
                                            F adjust) {
  __syncthreads();  // the tile is complete
  transform_lines<false, THREADS>(p.block, p.transform, tile, tokens * (rows / p.block));
  auto write = [&](auto& v, int i) {
    constexpr int N = sizeof v / sizeof v[0];
    i64 token = first_token + i / rows, col = first_row + i % rows;
    if (token >= p.epilogue.tokens || col >= p.epilogue.cols) return;
#pragma unroll
    for (int n = 0; n < N; ++n) v[n] = tile[line_at(p.block, rows, i / rows, i % rows + n)];
    adjust(token, col, v);
    store_results(p.epilogue, token, col, v);
  };
  if (p.epilogue.wide) {
    for (int i = threadIdx.x * 8; i < tokens * rows; i += THREADS * 8) {
      float v[8];
      write(v, i);
    }
  } else {
    for (int i = threadIdx.x; i < tokens * rows; i += THREADS) {
      float v[1];
      write(v, i);
    }
  }
}

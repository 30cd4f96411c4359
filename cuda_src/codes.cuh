// Compressed weights: stored codes to coefficients (FORMAT.md, sections 3 and 4).
#include "reduce.cuh"
#include "vector_io.cuh"
#include "codes_params.h"

constexpr int RUN = 32;  // codes that are packed together
constexpr int CODES_DENSE = 0, CODES_GRID = 1, CODES_SPARSE = 2;
constexpr int INDEX_FULL = 0, INDEX_BITMAP = 1, INDEX_DELTA = 2;

// Byte i of a word as a float: the mantissa of 2^23 + byte.
__device__ __forceinline__ float byte_value(u32 word, int i) {
  return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440u | i)) - 8388608.0f;
}

// The bits of codes 4 quad ... 4 quad + 3 in the plane of WIDTH bits, a code to a byte.
template <int WIDTH>
__device__ __forceinline__ u32 plane_quad(const u32* plane, int quad) {
  constexpr u32 MASK = 0x01010101u * ((1u << WIDTH) - 1u);
  return plane[quad % WIDTH] >> (quad / WIDTH * WIDTH) & MASK;
}

// Codes 4 quad ... 4 quad + 3 of a run of `bits`-bit codes, a code to a byte; of wider ones `high` has the topmost 8 bits
// and `low` the others. The run may be memory or registers.
__device__ __forceinline__ void quad_bytes(const u32* run, int bits, int quad, u32& low, u32& high) {
  high = low = 0;
  if (bits & 8) {
    high = plane_quad<8>(run, quad);
    run += 8;
  }
  if (bits & 4) {
    low = plane_quad<4>(run, quad);
    run += 4;
  }
  if (bits & 2) {
    low = low << 2 | plane_quad<2>(run, quad);
    run += 2;
  }
  if (bits & 1) low = low << 1 | plane_quad<1>(run, quad);
  if (bits == 8) low = high;
}
// The same as floats.
__device__ __forceinline__ void unpack_quad(const u32* run, int bits, int quad, float (&u)[4]) {
  u32 low, high;
  quad_bytes(run, bits, quad, low, high);
  if (bits > 8) {
    float weight = static_cast<float>(1 << (bits - 8));
#pragma unroll
    for (int i = 0; i < 4; ++i) u[i] = fmaf(byte_value(high, i), weight, byte_value(low, i));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) u[i] = byte_value(low, i);
  }
}

constexpr int RUN_WORDS = 12;  // of the widest codes

// The words of a run, in accesses of up to 16 bytes, as runs are aligned. Where `bits` is a constant all are in flight
// before the first is used.
__device__ __forceinline__ void load_run(const u32* run, int bits, u32 (&w)[RUN_WORDS]) {
  if (bits % 4 == 0) {
#pragma unroll
    for (int i = 0; i < RUN_WORDS; i += 4) {
      if (i < bits) {
        CHECK_ALIGNED(run, 16);
        uint4 four = *reinterpret_cast<const uint4*>(run + i);
        w[i] = four.x;
        w[i + 1] = four.y;
        w[i + 2] = four.z;
        w[i + 3] = four.w;
      }
    }
  } else if (bits % 2 == 0) {
#pragma unroll
    for (int i = 0; i < RUN_WORDS; i += 2) {
      if (i < bits) {
        CHECK_ALIGNED(run, 8);
        uint2 two = *reinterpret_cast<const uint2*>(run + i);
        w[i] = two.x;
        w[i + 1] = two.y;
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < RUN_WORDS; ++i) {
      if (i < bits) w[i] = run[i];
    }
  }
}

// q - sign(q) * shrink
__device__ __forceinline__ float shrunk(float q, float shrink) {
  return q > 0.0f ? q - shrink : q < 0.0f ? q + shrink : 0.0f;
}

// Dense and grid codes: where the runs of a row begin.
__device__ __forceinline__ const u32* row_runs(const Codes& c, i64 row) {
  return reinterpret_cast<const u32*>(c.value) + row * (c.cols / RUN) * c.bits;
}
// The scale of column `col` of a row; one for the codes of a run.
__device__ __forceinline__ float scale_at(const Codes& c, i64 row, i64 col) {
  if (c.kind == CODES_GRID) return to_float(c.scale[row]);
  return to_float(c.scale[row * ((c.cols + c.group - 1) / c.group) + col / c.group]);
}
// The codes of columns col ... col + 3 as coefficients; the scale is that of scale_at.
__device__ __forceinline__ void scale_quad(const Codes& c, float scale, i64 col, float (&v)[4]) {
  if (c.kind == CODES_DENSE) {
    // scale * (v - middle), rounded once: the product with `middle` is exact, of 12 + 11 digits, as `scale` is an f16, or
    // one times the gain, which is a power of two (FORMAT.md)
    float middle = 0.5f * static_cast<float>((1 << c.bits) - 1), shift = -scale * middle;
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = fmaf(scale, v[i], shift);
  } else {
    float middle = static_cast<float>(1 << (c.bits - 1)), step[4];
    load<4>(c.col_scale + col, step);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = scale * step[i] * shrunk(v[i] - middle, c.offset);
  }
}

// Four coefficients of a row from column `col`, a multiple of 4, on; dense and grid codes.
__device__ __forceinline__ void load_quad(const Codes& c, i64 row, i64 col, float (&v)[4]) {
  unpack_quad(row_runs(c, row) + col / RUN * c.bits, c.bits, static_cast<int>(col % RUN) / 4, v);
  scale_quad(c, scale_at(c, row, col), col, v);
}

// The value of entry e of sparse codes. Groups are of 32, 64 or 128 entries, found without a division of 64 bits.
__device__ __forceinline__ float entry_value(const Codes& c, i64 e) {
  if (c.bits == 32) return reinterpret_cast<const float*>(c.value)[e];
  if (c.bits == 16) return to_float(reinterpret_cast<const f16*>(c.value)[e]);
  const unsigned char* plane = c.value + e / RUN * (4 * c.bits);
  int k = static_cast<int>(e % RUN);
  int u = 0;
#pragma unroll
  for (int width = 8; width > 0; width >>= 1) {
    if (c.bits & width) {
      u = u << width | (plane[k % (4 * width)] >> (k / (4 * width) * width) & ((1 << width) - 1));
      plane += 4 * width;
    }
  }
  int half = 1 << (c.bits - 1);
  int m = u >= half ? u - half : half - 1 - u;
  float v = fmaf(to_float(c.scale[(e >> 5) >> (c.group >> 6)]), static_cast<float>(m) + 0.5f, c.offset);
  return u >= half ? v : -v;
}

// Where the entries of block column J of a row begin: x, counted from the row's first, and in which column of the
// block the first of them stands: y. `starts` of a row has one more element behind the last block.

// Writes the `starts` of a stored row; one warp, whole. cols / block + 1 elements.
__device__ __forceinline__ void find_starts(const Codes& c, i64 row, int block, uint2* starts) {
  int lane = threadIdx.x % WARP;
  int blocks = static_cast<int>(c.cols / block);
  if (c.index_kind == INDEX_FULL) {
    for (int j = lane; j <= blocks; j += WARP) starts[j] = make_uint2(static_cast<u32>(j * block), 0);
    return;
  }
  int carry = 0;
  if (c.index_kind == INDEX_BITMAP) {
    const u32* words = reinterpret_cast<const u32*>(c.index) + row * (c.cols / 32);
    int count = static_cast<int>(c.cols / 32), each = block / 32;
    for (int first = 0; first < count; first += WARP) {
      int at = first + lane;
      int own = at < count ? __popc(words[at]) : 0;
      int sum = warp_prefix(own);
      if (at < count && at % each == 0) starts[at / each] = make_uint2(static_cast<u32>(carry + sum - own), 0);
      carry += __shfl_sync(ALL_LANES, sum, WARP - 1);
    }
    if (lane == 0) starts[blocks] = make_uint2(static_cast<u32>(carry), 0);
    return;
  }
  i64 begin = c.row_start[row];
  int count = static_cast<int>(c.row_start[row + 1] - begin);
  int column = -1, done = 0;  // of the last entry; blocks whose start is known
  for (int first = 0; first < count; first += WARP) {
    int e = first + lane;
    int sum = column + warp_prefix(e < count ? c.index[begin + e] + 1 : 0);
    int own = sum / block;
    int before = __shfl_up_sync(ALL_LANES, own, 1);
    int from = lane == 0 ? done : before + 1;
    if (e < count) {
      for (int j = from; j <= own; ++j) starts[j] = make_uint2(static_cast<u32>(e), static_cast<u32>(sum % block));
    }
    column = __shfl_sync(ALL_LANES, sum, WARP - 1);
    done = column < 0 ? 0 : column / block + 1;
  }
  for (int j = done + lane; j <= blocks; j += WARP) starts[j] = make_uint2(static_cast<u32>(count), 0);
}

// The stored row of row i. A number that is not of 0 ... stored - 1 gives -1.
__device__ __forceinline__ i64 stored_row(const RowNumbers& numbers, i64 i) {
  if (!numbers.ids) return numbers.first + i;
  i64 row = numbers.wide ? static_cast<const i64*>(numbers.ids)[i] : static_cast<const int*>(numbers.ids)[i];
  return row >= 0 && row < numbers.stored ? row : -1;
}

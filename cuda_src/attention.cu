// o[i] = sum_j softmax_j(scale * q[i].k[j] + mask[i,j]) v[j] over the keys j that query i sees; none: zeros.
//
// Arrays     q, out (batch, seq_q, heads, head_dim), k, v (batch, seq_k, heads / group, head_dim) of T, last axis
//            contiguous, the others of any stride (in elements). mask (batch, heads, seq_q, seq_k) of any strides:
//            float (added) or bytes (0 hides), see MASK_... lengths (batch): keys from there on are not seen. lse
//            (batch, heads, seq_q) float, contiguous: log sum_j exp(score). The last three may be null.
//            Packed, with cu_q, cu_k (batch + 1): q, out (total_q, heads, head_dim), k, v (total_k, heads / group,
//            head_dim), lse (heads, total_q), no lengths; sequence b has rows cu[b] .. cu[b + 1], and the first rows and
//            columns of mask (batch, heads, mask_queries, columns).
//            Capped, c tanh(scale * q[i].k[j] / c) stands for scale * q[i].k[j]: a constant of the kernel, c is not.
//            With off = seq_k - seq_q, query i sees keys i + off - left .. i + off + right; a negative limit is none.
// Ownership  A block of 4 warps owns a tile of queries of one head and goes through the tiles of keys that any
//            of them sees; maximum m, sum l and output o of a query are rescaled as the tiles go by, so that no score
//            is ever stored. f16, bf16: a warp owns 32 queries (16 where D = 256), a quad of lanes four (two) rows of
//            them in the fragments of mma; the weights are packed where they lie into the left side of p v.
//            float: 16 lanes share M / 8 queries. A warp leaves out the tiles that its queries do not see, and looks
//            at limits only in the tiles that they cut, at a mask in all.
// Launch     block (128); grid (tiles of M queries * heads, batch up to 65535, the rest of the batch); the last tile
//            comes first, since it has the most keys under a causal limit. Rows are D = 32, 64, 96, 128 or 256 wide,
//            with zeros from head_dim on. Packed: grid ((total_q / M + batch) * heads), from shapes alone; a block
//            searches its sequence in cu_q, and has nothing to do where that has fewer tiles than places for them.
// Shared     tiles of M queries, N keys and N values:          D =    32     64     96    128    256
//              f16, bf16: (M + 2 N) D 2 bytes,               M, N  128,64 128,64 128,64 128,48  64,32
//              float: (M + 2 N) D 4 + M (N + 4) 4 bytes,     M, N   64,64  64,48  64,32  48,32  24,16
//            at most 64 KiB. Chunks of 16 bytes stand at their place xor their row, so that those of a column of
//            8 rows lie in 8 different groups of banks.
// Bytes      reads q once, k and v once for every tile of queries (from L2 where a head's keys fit), writes out once;
//            4 seq_q seq_k head_dim float operations a head, half of that where causal.
// Accuracy   float scores, sums and outputs; weights round to T before p v, as does the result. exp2 to 2 ulp. Scores of
//            any size float can hold: only differences are exponentiated.
//
// A value that is not finite turns 0 * v into NaN also for the queries that do not see it, or whose weight
// underflows. Such rows end as NaN with a finite sum; they are computed once more, key by key, by `repair`.
//
// Next steps would be wgmma (sm_90a): K and V tiles by the bulk copy engine into the 128-byte swizzle, a warpgroup
// of producers with an mbarrier a stage, S = Q K^T from shared memory and P V from registers; and, for few queries,
// several blocks a head, whose parts `lse` can bring together.
//
// Sources: Dao 2023, "FlashAttention-2"; Milakov and Gimelshein 2018, "Online normalizer calculation for softmax".
#include "attention.cuh"

// --- f16 and bf16: tensor cores ----------------------------------------------------------------------------

// Two rows of a fragment, 8 apart, += a times the fragment (b0, b1).
template <class T>
__device__ __forceinline__ void multiply(float (&c)[2], float (&below)[2], const u32 (&a)[4], u32 b0, u32 b1) {
  float sum[4] = {c[0], c[1], below[0], below[1]};
  const u32 b[2] = {b0, b1};
  mma_16x8x16<T>(sum, a, b);
  c[0] = sum[0];
  c[1] = sum[1];
  below[0] = sum[2];
  below[1] = sum[3];
}

// TILES tiles of 16 queries a warp, KEYS keys at a time. Q_STAYS: queries stay in shared memory, and keys and
// values have one tile each, copied in turn while the other is worked on. Otherwise queries are in registers,
// and keys and values have two tiles each: the next are copied while this one is worked on.
template <class T, int D, int TILES, int KEYS, bool Q_STAYS>
__device__ __forceinline__ void attend_halves(const AttentionParams& a) {
  constexpr int VEC = VECTOR<T>;
  constexpr int OWN = 16 * TILES;    // queries of a warp
  constexpr int ROWS = WARPS * OWN;  // of the block
  constexpr int STAGE = 2 * KEYS * D;
  static_assert(Q_STAYS || ROWS == 2 * KEYS, "queries begin in the second stage");
  const Problem<T> p = problem_of<T, ROWS>(a, blockIdx.x);
  if (p.none) return;
  int row0 = p.row0;
  using Tiles = Copy<T, D>;
  DYNAMIC_SHARED(T, shared);
  T* const q_tile = shared + (Q_STAYS ? 0 : STAGE);
  T* const stages = shared + (Q_STAYS ? ROWS * D : 0);

  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int g = lane / 4, t = lane % 4;
  int start = p.first_key(row0), end = p.end_key(min(row0 + ROWS, p.seq_q) - 1);
  int own0 = row0 + warp * OWN < p.seq_q ? row0 + warp * OWN : -1;  // the warp's queries, if there are any

  Tiles::template begin<ROWS>(q_tile, p.q + row0 * p.q_row, p.q_row, p.seq_q - row0, p.head_dim, p.aligned);
  if constexpr (!Q_STAYS) cp_async_commit();
  Tiles::template begin<KEYS>(stages, p.k + start * p.k_row, p.k_row, end - start, p.head_dim, p.aligned);
  if constexpr (!Q_STAYS) {
    Tiles::template begin<KEYS>(stages + KEYS * D, p.v + start * p.v_row, p.v_row, end - start, p.head_dim, p.aligned);
  }
  cp_async_commit();

  // Where a lane's row of four 8 x 8 matrices is, of columns 16 k on: ldmatrix gives two neighbouring registers the two
  // halves of a fragment, which are 16 columns of 8 keys, but 8 columns of 16 queries or values
  auto fragments_at = [&](int row, int chunk) {
    int at = row * D, turned = place<T, D>(row, chunk);
    return [=](int k) { return at + ((turned ^ (2 * k & SPREAD<T, D>)) + (2 * k & ~SPREAD<T, D>)) * VEC; };
  };
  auto fragment = fragments_at(lane % 16, lane / 16);
  auto key_fragment = fragments_at(lane / 16 * 8 + lane % 8, lane / 8 % 2);

  u32 q[Q_STAYS ? 1 : D / 16][TILES][4];
  if constexpr (!Q_STAYS) {
    cp_async_wait<1>();
    __syncthreads();
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
#pragma unroll
      for (int i = 0; i < TILES; ++i) ldmatrix(q[k][i], q_tile + (warp * OWN + i * 16) * D + fragment(k));
    }
  }

  constexpr int LINES = 2 * TILES;  // of a lane: its rows of the fragments, 8 queries apart
  float o[LINES][D / 8][2] = {};    // [row][8 values][2 of them]
  float m[LINES], l[LINES];
#pragma unroll
  for (int r = 0; r < LINES; ++r) {
    m[r] = MINUS_INF;
    l[r] = 0.0f;
  }

  int stage = 0;
#pragma unroll 1
  // hot: tiles
  for (int j0 = start; j0 < end; j0 += KEYS) {
    T* k_tile = stages + stage * STAGE;
    T* v_tile = k_tile + KEYS * D;
    int next = j0 + KEYS;
    cp_async_wait<0>();
    __syncthreads();  // the tile is there, and the one before it no longer needed
    if constexpr (Q_STAYS) {
      Tiles::template begin<KEYS>(v_tile, p.v + j0 * p.v_row, p.v_row, end - j0, p.head_dim, p.aligned);
    } else {
      stage ^= 1;
      if (next < end) {
        T* tile = stages + stage * STAGE;
        Tiles::template begin<KEYS>(tile, p.k + next * p.k_row, p.k_row, end - next, p.head_dim, p.aligned);
        Tiles::template begin<KEYS>(tile + KEYS * D, p.v + next * p.v_row, p.v_row, end - next, p.head_dim, p.aligned);
      }
    }
    cp_async_commit();

    // what all queries of the warp see, and what any of them sees
    int own = same(own0), own_last = own + OWN - 1;
    bool seen = own >= 0 && next > p.first_key(own) && j0 < p.end_key(own_last);
    bool whole = !p.scaled() && j0 >= p.first_key(own_last) && next <= p.end_key(own);

    float s[LINES][KEYS / 8][2];
    if (seen) {
#pragma unroll
      for (int r = 0; r < LINES; ++r) {
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) s[r][n][0] = s[r][n][1] = 0.0f;
      }
#pragma unroll
      // hot: scores
      for (int k = 0; k < D / 16; ++k) {
        u32 a[TILES][4];
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
          if constexpr (Q_STAYS) {
            ldmatrix(a[i], q_tile + (warp * OWN + i * 16) * D + fragment(k));
          } else {
#pragma unroll
            for (int e = 0; e < 4; ++e) a[i][e] = q[k][i][e];
          }
        }
#pragma unroll
        for (int n = 0; n < KEYS / 16; ++n) {
          u32 b[4];
          ldmatrix(b, k_tile + n * 16 * D + key_fragment(k));
#pragma unroll
          for (int i = 0; i < TILES; ++i) {
            multiply<T>(s[2 * i][2 * n], s[2 * i + 1][2 * n], a[i], b[0], b[1]);
            multiply<T>(s[2 * i][2 * n + 1], s[2 * i + 1][2 * n + 1], a[i], b[2], b[3]);
          }
        }
      }
    }
    if constexpr (Q_STAYS) {
      cp_async_wait<0>();
      __syncthreads();  // the values are there, and the keys no longer needed
      if (next < end) {
        Tiles::template begin<KEYS>(k_tile, p.k + next * p.k_row, p.k_row, end - next, p.head_dim, p.aligned);
      }
      cp_async_commit();
    }
    if (seen) {
      if (!whole) mask_scores<8>(p, own + g, j0 + 2 * t, s);
      // hot: weights
      weigh<4>(p, s, m, l, [&](int r, float factor) {
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          o[r][n][0] *= factor;
          o[r][n][1] *= factor;
        }
      });
#pragma unroll
      // hot: values
      for (int k = 0; k < KEYS / 16; ++k) {
        u32 a[TILES][4];
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float(&pair)[2] = s[2 * i + e % 2][2 * k + e / 2];
            a[i][e] = pack<T>(pair[0], pair[1]);
          }
        }
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
          u32 b[4];
          ldmatrix_transposed(b, v_tile + k * 16 * D + fragment(n));
#pragma unroll
          for (int i = 0; i < TILES; ++i) {
            multiply<T>(o[2 * i][2 * n], o[2 * i + 1][2 * n], a[i], b[0], b[1]);
            multiply<T>(o[2 * i][2 * n + 1], o[2 * i + 1][2 * n + 1], a[i], b[2], b[3]);
          }
        }
      }
    }
  }
  cp_async_wait<0>();
  __syncthreads();  // all of the shared memory is free: the outputs first, then a Row of every query

  write_outputs<T, D, ROWS>(a, shared, warp * OWN, o, m, l);
}

// --- float: fused multiply and add -------------------------------------------------------------------------

// M of the block's ROWS queries, from r0 on, and KEYS keys at a time. 16 lanes share M / 8 queries: of the products
// each lane has those with every 16th key, of the outputs every 16th group of 4 (or 2) columns.
template <class T, int D, int M, int KEYS, int ROWS>
__device__ __forceinline__ void attend_floats(const AttentionParams& a, int r0) {
  constexpr int LANES = 16;
  constexpr int GROUPS = THREADS / LANES;
  constexpr int OWN = M / GROUPS;   // queries of a thread: group, group + 8, ...
  constexpr int COUNT = KEYS / LANES;
  constexpr int PITCH = KEYS + 4;   // of the weights: two groups of a warp read different banks
  constexpr int WIDE = D % 64 == 0 ? 4 : 2;
  constexpr int SLICES = D / LANES / WIDE;
  using Tiles = Copy<T, D, float>;
  const Problem<T> p = problem_of<T, ROWS>(a, blockIdx.x);
  if (p.none) return;
  int row0 = p.row0 + r0;
  DYNAMIC_SHARED(float, q_tile);
  float* const k_tile = q_tile + M * D;
  float* const v_tile = k_tile + KEYS * D;
  float* const weights = v_tile + KEYS * D;

  int group = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  int last = min(row0 + M, p.seq_q) - 1;
  int start = p.first_key(row0), end = p.end_key(last);
  int all_low = p.first_key(last), all_high = p.end_key(row0);

  Tiles::template begin<M>(q_tile, p.q + row0 * p.q_row, p.q_row, p.seq_q - row0, p.head_dim, p.aligned);
  Tiles::template begin<KEYS>(k_tile, p.k + start * p.k_row, p.k_row, end - start, p.head_dim, p.aligned);
  cp_async_commit();

  float o[OWN][SLICES][WIDE] = {};
  float m[OWN], l[OWN];
#pragma unroll
  for (int r = 0; r < OWN; ++r) {
    m[r] = MINUS_INF;
    l[r] = 0.0f;
  }

#pragma unroll 1
  // hot: float tiles
  for (int j0 = start; j0 < end; j0 += KEYS) {
    int next = j0 + KEYS;
    cp_async_wait<0>();
    __syncthreads();  // the keys are there, and the values before them no longer needed
    Tiles::template begin<KEYS>(v_tile, p.v + j0 * p.v_row, p.v_row, end - j0, p.head_dim, p.aligned);
    cp_async_commit();

    float s[OWN][COUNT][1] = {};
#pragma unroll 2
    // hot: float scores
    for (int chunk = 0; chunk < D / 4; ++chunk) {
      float b[COUNT][4];
#pragma unroll
      for (int n = 0; n < COUNT; ++n) {
        load<4>(k_tile + (lane + n * LANES) * D + place<float, D>(lane, chunk) * 4, b[n]);
      }
#pragma unroll
      for (int r = 0; r < OWN; ++r) {
        float a[4];
        load<4>(q_tile + (group + r * GROUPS) * D + place<float, D>(group, chunk) * 4, a);
#pragma unroll
        for (int n = 0; n < COUNT; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) s[r][n][0] = fmaf(a[e], b[n][e], s[r][n][0]);
        }
      }
    }
    bool whole = !p.scaled() && j0 >= all_low && next <= all_high;
    if (!whole) mask_scores<LANES>(p, same(row0 + group), j0 + lane, s);
    weigh<LANES>(p, s, m, l, [&](int r, float factor) {
#pragma unroll
      for (int c = 0; c < SLICES; ++c) {
#pragma unroll
        for (int e = 0; e < WIDE; ++e) o[r][c][e] *= factor;
      }
    });
#pragma unroll
    for (int r = 0; r < OWN; ++r) {
#pragma unroll
      for (int n = 0; n < COUNT; ++n) weights[(group + r * GROUPS) * PITCH + lane + n * LANES] = s[r][n][0];
    }
    cp_async_wait<0>();
    __syncthreads();  // the values are there, and the keys no longer needed
    if (next < end) {
      Tiles::template begin<KEYS>(k_tile, p.k + next * p.k_row, p.k_row, end - next, p.head_dim, p.aligned);
    }
    cp_async_commit();
#pragma unroll 2
    // hot: float values
    for (int j = 0; j < KEYS; j += 4) {
      float a[OWN][4];
#pragma unroll
      for (int r = 0; r < OWN; ++r) load<4>(weights + (group + r * GROUPS) * PITCH + j, a[r]);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
#pragma unroll
        for (int c = 0; c < SLICES; ++c) {
          int d = (c * LANES + lane) * WIDE;
          float b[WIDE];
          load<WIDE>(v_tile + (j + e) * D + place<float, D>(j + e, d / 4) * 4 + d % 4, b);
#pragma unroll
          for (int r = 0; r < OWN; ++r) {
#pragma unroll
            for (int w = 0; w < WIDE; ++w) o[r][c][w] = fmaf(a[r][e], b[w], o[r][c][w]);
          }
        }
      }
    }
  }
  cp_async_wait<0>();
  __syncthreads();  // all of the shared memory is free: a Row of every query

  Row* const rows = reinterpret_cast<Row*>(q_tile);
  auto warp_row = [](int k) { return threadIdx.x / WARP * 2 + k % 2 + k / 2 * GROUPS; };  // of its two groups
  bool odd = false;
  const Problem<T> again = problem_of<T, ROWS>(a, same(blockIdx.x));  // rather than keep it in registers
  row0 = again.row0 + r0;
#pragma unroll
  for (int r = 0; r < OWN; ++r) {
    float sum = l[r];
#pragma unroll
    for (int offset = 1; offset < LANES; offset *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, offset);
    float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    int row = group + r * GROUPS;
    bool inside = row0 + row < again.seq_q, nan = false;
    T* to = again.out + (row0 + row) * again.out_row;
#pragma unroll
    for (int c = 0; c < SLICES; ++c) {
      int d = (c * LANES + lane) * WIDE;
#pragma unroll
      for (int e = 0; e < WIDE; ++e) {
        o[r][c][e] *= inverse;
        nan = nan || o[r][c][e] != o[r][c][e];
      }
      if (inside && again.aligned & ALIGNED_OUTPUT) {
        if (d < again.head_dim) store<WIDE>(to + d, o[r][c]);
      } else if (inside) {
#pragma unroll
        for (int e = 0; e < WIDE; ++e) {
          if (d + e < again.head_dim) to[d + e] = from_float<T>(o[r][c][e]);
        }
      }
    }
    nan = (__ballot_sync(ALL_LANES, nan) >> (threadIdx.x % WARP / LANES * LANES) & 0xffff) && sum == sum && inside;
    odd = odd || nan;
    if (lane == 0) rows[row] = {m[r], sum, nan};
  }
  __syncwarp();
  if (a.lse) {
    int k = threadIdx.x % WARP, row = warp_row(k);
    if (k < 2 * OWN && row0 + row < again.seq_q) again.lse[row0 + row] = log_sum(again, rows[row].m, rows[row].l);
  }
  if (__any_sync(ALL_LANES, odd)) {
#pragma unroll 1
    for (int k = 0; k < 2 * OWN; ++k) {
      int row = warp_row(k);
      if (rows[row].odd) repair<T, D>(again, row0 + row);
    }
  }
}

// --- entry points ------------------------------------------------------------------------------------------

// M and KEYS are of the float products, where tensor cores lack the type: in the shared memory of the others.
template <class T, int D, int TILES, int KEYS, bool Q_STAYS, int FLOAT_M, int FLOAT_KEYS>
__device__ __forceinline__ void attend(const AttentionParams& a) {
  if constexpr (TENSOR_CORES<T>) {
    attend_halves<T, D, TILES, KEYS, Q_STAYS>(a);
  } else {
    constexpr int ROWS = WARPS * 16 * TILES;
    constexpr int BYTES = (ROWS + 2 * KEYS) * D * sizeof(T);
    static_assert((FLOAT_M + 2 * FLOAT_KEYS) * D * 4 + FLOAT_M * (FLOAT_KEYS + 4) * 4 <= BYTES, "shared memory");
    const Problem<T> p = problem_of<T, ROWS>(a, blockIdx.x);
    int left = p.none ? 0 : min(p.seq_q - p.row0, ROWS);
#pragma unroll 1
    for (int r = 0; r < left; r += FLOAT_M) {
      attend_floats<T, D, FLOAT_M, FLOAT_KEYS, ROWS>(a, r);
      __syncthreads();
    }
  }
}
template <class T, int D, int M, int KEYS>
__device__ __forceinline__ void attend(const AttentionParams& a) {
  attend_floats<T, D, M, KEYS, M>(a, 0);
}

#define ENTRY(name, T, blocks, ...)                                                                          \
  KERNEL(name, 128, blocks)(AttentionParams_PARAMETERS) { \
    const AttentionParams p = AttentionParams_VALUES; \
    attend<T, __VA_ARGS__>(p);                                                                                \
  }

// attention_<type>_<D>: head_dim up to D. `blocks` a multiprocessor bound the registers.
#define HALVES(type, T, D, blocks, ...) ENTRY(attention_##type##_##D, T, blocks, D, __VA_ARGS__)
#define FLOATS(D, blocks, M, KEYS) ENTRY(attention_f32_##D, float, blocks, D, M, KEYS)
#define ALL_HALVES(type, T)                    \
  HALVES(type, T, 32, 3, 2, 64, true, 32, 16)  \
  HALVES(type, T, 64, 2, 2, 64, false, 32, 32) \
  HALVES(type, T, 96, 2, 2, 64, true, 32, 32)  \
  HALVES(type, T, 128, 2, 2, 48, true, 32, 32) \
  HALVES(type, T, 256, 2, 1, 32, true, 16, 16)

ALL_HALVES(f16, f16)
ALL_HALVES(bf16, bf16)
FLOATS(32, 2, 64, 64)
FLOATS(64, 2, 64, 48)
FLOATS(96, 2, 64, 32)
FLOATS(128, 2, 48, 32)
FLOATS(256, 2, 24, 16)

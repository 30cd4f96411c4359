// attention on Hopper: o[i] = sum_j softmax_j(scale * q[i].k[j]) v[j] over the keys j that query i sees.
//
// Arrays     those of attention.cu, half types, head_dim up to 128, every row of q, k, v and out whole chunks of 16 bytes; with
//            lengths, limits and packed sequences, without a mask, a cap or a scale that is not positive (MASK_NONE).
// Ownership  A block of W warpgroups owns 64 W queries of one head, and goes through the tiles of KEYS keys that any of them
//            sees. A warp has 16 queries, and of their scores and outputs what mma.sync would give it: scores become weights
//            and are packed where they lie, and are then the left side of p v. While the weights of a tile are computed, p v
//            of the tile before runs: sums are rescaled when that is done.
// Launch     block (128 W); grid as of attention.cu, of tiles of 64 W queries. sm_90a.
// Shared     queries, and two tiles of keys and of values, in panels of 64 columns (wgmma.cuh), D = 64 or 128 columns with zeros
//            from head_dim on: (64 W + 4 KEYS) D 2 bytes, and 1024 so that panels can begin at multiples of that:
//                          D    W   KEYS     bytes
//                         64    3    128    91,136
//                        128    2    128   164,864
// Bytes      q once, k and v once for every tile of queries (from L2 where a head's keys fit), out once;
//            4 seq_q seq_k head_dim float operations a head, half of that where causal.
// Accuracy   as of attention.cu: float scores, sums and outputs; weights round to T before p v.
//
// Not run on a GPU yet. Next steps would be tiles by the bulk copy engine, with an mbarrier each in the place of a barrier for
// all, and warpgroups that take turns, so that one computes weights while another has the tensor cores.
//
// Sources: Shah et al. 2024, "FlashAttention-3"; those of attention.cu.
#include "attention.cuh"
#include "wgmma.cuh"

// Begins the copy of `rows` rows to a tile of ROWS rows by all of THREADS; zeros beyond them and beyond head_dim.
template <class T, int D, int ROWS, int THREADS_OF_BLOCK>
__device__ __forceinline__ void begin_panels(T* tile, const T* source, i64 stride, int rows, int head_dim) {
  constexpr int VEC = VECTOR<T>;
  constexpr int LANES = PANEL / VEC;
  constexpr int STEP = THREADS_OF_BLOCK / LANES;
  static_assert(STEP % 8 == 0, "a thread keeps its place in the swizzle");
  int thread = same(static_cast<int>(threadIdx.x));
  int first = thread / LANES, lane = thread % LANES;
  const T* from = source + first * stride + lane * VEC;
  T* to = tile + first * PANEL + (lane ^ first % 8) * VEC;
#pragma unroll
  for (int r = 0; r < ROWS; r += STEP) {
    if (ROWS % STEP == 0 || first + r < ROWS) {
#pragma unroll
      for (int c = 0; c < D; c += PANEL) {
        cp_async_16(to + c * ROWS + r * PANEL, from + c, first + r < rows && c + lane * VEC < head_dim);
      }
    }
    from += STEP * stride;
  }
}

template <class T, int D, int WARPGROUPS, int KEYS>
__device__ __forceinline__ void attend(const AttentionParams& a) {
  constexpr int OWN = 64;                 // queries of a warpgroup
  constexpr int ROWS = WARPGROUPS * OWN;  // of the block
  constexpr int BLOCK = WARPGROUPS * 128;
  constexpr int TILE = KEYS * D;
  constexpr u32 BYTES = sizeof(T);
  Problem<T> p = problem_of<T, ROWS>(a, blockIdx.x);
  if (p.none) return;
  p.mask_kind = MASK_NONE;  // as it is: known to the compiler
  DYNAMIC_SHARED(T, memory);
  T* const q_tile = memory + (SWIZZLE_BYTES - shared_address(memory) % SWIZZLE_BYTES) % SWIZZLE_BYTES / BYTES;
  T* const k_tiles = q_tile + ROWS * D;
  T* const v_tiles = k_tiles + 2 * TILE;

  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int g = lane / 4, t = lane % 4;
  int start = p.first_key(p.row0), end = p.end_key(min(p.row0 + ROWS, p.seq_q) - 1);

  auto begin_keys = [&](int j0, int stage) {
    begin_panels<T, D, KEYS, BLOCK>(k_tiles + stage * TILE, p.k + j0 * p.k_row, p.k_row, end - j0, p.head_dim);
  };
  auto begin_values = [&](int j0, int stage) {
    begin_panels<T, D, KEYS, BLOCK>(v_tiles + stage * TILE, p.v + j0 * p.v_row, p.v_row, end - j0, p.head_dim);
  };
  // The copies begun before are there for wgmma, and tiles that earlier matmuls read are free.
  auto arrived = [] {
    cp_async_wait<0>();
    fence_proxy_async();
    __syncthreads();
  };

  u32 q_at = shared_address(q_tile) + warp / 4 * OWN * PANEL_ROW;
  u32 k_at = shared_address(k_tiles), v_at = shared_address(v_tiles);
  float s[2][KEYS / 8][2];
  float o[2][D / 8][2] = {};
  u32 weights[KEYS / 16][4];
  float m[2] = {MINUS_INF, MINUS_INF}, l[2] = {0.0f, 0.0f};
  float factor[2];

  auto issue_scores = [&](int stage) {
#pragma unroll
    for (int c = 0; c < D; c += 16) {
      u32 within = c % PANEL * BYTES;
      u64 of_q = rows_descriptor(q_at + c / PANEL * ROWS * PANEL_ROW + within);
      u64 of_k = rows_descriptor(k_at + stage * (TILE * BYTES) + c / PANEL * KEYS * PANEL_ROW + within);
      wgmma_rows<T>(s, of_q, of_k, c > 0);
    }
    wgmma_commit();
  };
  auto issue_values = [&](int stage) {
#pragma unroll
    for (int k = 0; k < KEYS / 16; ++k) {
      u32 at = v_at + stage * (TILE * BYTES) + k * 16 * PANEL_ROW;
      wgmma_columns<T>(o, weights[k], columns_descriptor<KEYS>(at));
    }
    wgmma_commit();
  };
  // The scores of a tile become weights; factor: what sums before are to be multiplied by. False: the warp sees none of the keys.
  auto weigh_scores = [&](int j0) {
    int own = same(p.row0 + warp * 16), own_last = own + 15;
    bool whole = j0 >= p.first_key(own_last) && j0 + KEYS <= p.end_key(own);
    bool seen = whole || (j0 < p.end_key(own_last) && j0 + KEYS > p.first_key(own));
    factor[0] = factor[1] = 1.0f;
    if (seen) {
      // hot: masked
      if (!whole) mask_scores<8>(p, own + g, j0 + 2 * t, s);
      weigh<4>(p, s, m, l, [&](int r, float by) { factor[r] = by; });
    }
    return seen;
  };
  auto pack_weights = [&](bool seen) {
    // hot: unseen
    if (!seen) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) s[r][n][0] = s[r][n][1] = 0.0f;
      }
    }
#pragma unroll
    for (int k = 0; k < KEYS / 16; ++k) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float(&pair)[2] = s[e % 2][2 * k + e / 2];
        weights[k][e] = pack<T>(pair[0], pair[1]);
      }
    }
  };

  if (start < end) {
    begin_panels<T, D, ROWS, BLOCK>(q_tile, p.q + p.row0 * p.q_row, p.q_row, p.seq_q - p.row0, p.head_dim);
    begin_keys(start, 0);
    cp_async_commit();
    arrived();
    begin_values(start, 0);
    if (start + KEYS < end) begin_keys(start + KEYS, 1);
    cp_async_commit();
    wgmma_fence();
    issue_scores(0);
    wgmma_wait<0>();
    settled(s);
    pack_weights(weigh_scores(start));

    int stage = 0;  // of the values that wait for their weights
#pragma unroll 1
    // hot: tiles
    for (int j0 = start + KEYS; j0 < end; j0 += KEYS) {
      arrived();
      begin_values(j0, stage ^ 1);
      if (j0 + KEYS < end) begin_keys(j0 + KEYS, stage);
      cp_async_commit();
      wgmma_fence();
      issue_scores(stage ^ 1);
      issue_values(stage);
      wgmma_wait<1>();
      settled(s);
      bool seen = weigh_scores(j0);
      wgmma_wait<0>();
      settled(o);
      settled(weights);
      // hot: outputs rescaled
      if (__any_sync(ALL_LANES, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
          for (int n = 0; n < D / 8; ++n) {
            o[r][n][0] *= factor[r];
            o[r][n][1] *= factor[r];
          }
        }
      }
      pack_weights(seen);
      stage ^= 1;
    }
    arrived();
    wgmma_fence();
    issue_values(stage);
    wgmma_wait<0>();
    settled(o);
  }
  __syncthreads();  // all of the shared memory is free
  write_outputs<T, D, ROWS>(a, q_tile, warp * 16, o, m, l);
}

#define ENTRY(type, T, D, threads, keys)                                                   \
  KERNEL(attention_wgmma_##type##_##D, threads, 1)(AttentionParams_PARAMETERS) {           \
    const AttentionParams p = AttentionParams_VALUES;                                      \
    attend<T, D, threads / 128, keys>(p);                                                  \
  }

// attention_wgmma_<type>_<D>: head_dim up to D.
ENTRY(f16, f16, 64, 384, 128)
ENTRY(f16, f16, 128, 256, 128)
ENTRY(bf16, bf16, 64, 384, 128)
ENTRY(bf16, bf16, 128, 256, 128)

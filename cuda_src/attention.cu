// o[i] = sum_j softmax_j(scale * q[i].k[j] + mask[i,j]) v[j] over the keys j that query i sees; none: zeros.
//
// Arrays     q, out (batch, seq_q, heads, head_dim), k, v (batch, seq_k, heads / group, head_dim) of T, last axis
//            contiguous, the others of any stride (in elements). mask (batch, heads, seq_q, seq_k) of any strides:
//            float (added) or bytes (0 hides), see MASK_... lengths (batch): keys from there on are not seen. lse
//            (batch, heads, seq_q) float, contiguous: log sum_j exp(score). The last three may be null.
//            Packed, with cu_q, cu_k (batch + 1): q, out (total_q, heads, head_dim), k, v (total_k, heads / group,
//            head_dim), lse (heads, total_q), no mask, no lengths; sequence b has rows cu[b] .. cu[b + 1].
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
// Accuracy   float scores, sums and outputs; weights round to T before p v, as does the result. exp2 to 2 ulp.
//
// A value that is not finite turns 0 * v into NaN also for the queries that do not see it, or whose weight
// underflows. Such rows end as NaN with a finite sum; they are computed once more, key by key, by `repair`.
//
// Next steps would be wgmma (sm_90a): K and V tiles by the bulk copy engine into the 128-byte swizzle, a warpgroup
// of producers with an mbarrier a stage, S = Q K^T from shared memory and P V from registers; and, for few queries,
// several blocks a head, whose parts `lse` can bring together.
//
// Sources: Dao 2023, "FlashAttention-2"; Milakov and Gimelshein 2018, "Online normalizer calculation for softmax".
#include "async_copy.cuh"
#include "mma.cuh"
#include "vector_io.cuh"
#include "attention_params.h"

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * WARP;
static_assert(THREADS == 128, "the launch bounds below are numbers");
constexpr float LOG2_E = 1.44269504f;
constexpr float LN_2 = 0.693147181f;
constexpr float TINY = 1.17549435e-38f;  // the smallest normal float

// What becomes of the products q.k; as rbe_gpu/gpu/attention.py passes it.
constexpr int MASK_NONE = 0;    // nothing: `scale` has log2(e) in it and is positive
constexpr int MASK_SCALED = 1;  // times scale
constexpr int MASK_ADDED = 2;   // times scale, plus the mask (float)
constexpr int MASK_KEEP = 3;    // times scale, -inf where the mask (bytes) is 0

// Rows that can be copied and stored in chunks of 16 bytes: bits of `aligned`.
constexpr int ALIGNED_INPUT = 1;
constexpr int ALIGNED_OUTPUT = 2;

// v, through a shuffle that changes nothing: a compiler that knew that v is the same for every tile would compute
// all that follows from it before the first tile, and keep it in registers or spill it.
template <class V>
__device__ __forceinline__ V same(V v) {
  return __shfl_sync(ALL_LANES, v, threadIdx.x % WARP);
}

// One head of one sequence, of which a block has a tile of queries: its rows, its mask, and what each query sees.
template <class T>
struct Problem {
  const T *q, *k, *v;
  T* out;
  const char* mask;
  float* lse;
  i64 q_row, k_row, v_row, out_row;
  i64 mask_row, mask_key;  // in bytes
  float scale;
  int seq_q, length, off, head_dim, left, right, mask_kind, mask_queries, aligned;
  int row0;   // the block's first query
  bool none;  // nothing to do

  // Query i sees the keys from first_key(i) up to, but not including, end_key(i). Both grow with i.
  __device__ __forceinline__ int first_key(int i) const {
    return left < 0 ? 0 : within(static_cast<i64>(i) + off - left);
  }
  __device__ __forceinline__ int end_key(int i) const {
    return right < 0 ? length : within(static_cast<i64>(i) + off + right + 1);
  }
  __device__ __forceinline__ int within(i64 j) const { return j < 0 ? 0 : j < length ? static_cast<int>(j) : length; }

  // Scores are held in units of log2 where nothing is added to them, so that exp2 takes one fma of them
  __device__ __forceinline__ bool scaled() const { return mask_kind != MASK_NONE; }
  __device__ __forceinline__ float unit() const { return scaled() ? LOG2_E : 1.0f; }
};

__device__ __forceinline__ int cut(i64 v, int most) { return v < 0 ? 0 : v < most ? static_cast<int>(v) : most; }

// Packed sequences are found without knowing their lengths on the host. Tiles of sequence b have the slots slot_of(b)
// and on, up to those of b + 1: enough for tiles of ROWS queries, and at most one more, total / ROWS + batch in all.
template <int ROWS>
__device__ __forceinline__ i64 slot_of(const i64* cu, i64 b) {
  return cu[b] / ROWS + b;
}

// The last sequence with slot_of(b) <= slot: a warp looks at 32 places at once. All lanes.
template <int ROWS>
__device__ __forceinline__ i64 sequence_of(const i64* cu, i64 batch, int slot) {
  i64 low = 0;
  for (i64 end = batch; end - low > 1;) {
    i64 step = (end - low + WARP - 1) / WARP;
    i64 b = low + threadIdx.x % WARP * step;
    int before = __popc(__ballot_sync(ALL_LANES, b < end && slot_of<ROWS>(cu, b) <= slot));
    low += (before > 1 ? before - 1 : 0) * step;
    end = min(end, low + step);
  }
  return low;
}

// The work of block `x` of a row of the grid, in tiles of ROWS queries.
template <class T, int ROWS>
__device__ __forceinline__ Problem<T> problem_of(const AttentionParams& a, int x) {
  Problem<T> p;
  i64 b, first_q = 0, first_k = 0;
  int h, tile, tiles, seq_k = a.seq_k;
  p.seq_q = a.seq_q;
  p.lse = a.lse;
  if (a.cu_seqlens_q) {
    int slots = a.seq_q / ROWS + static_cast<int>(a.batch), slot = x % slots;
    h = x / slots;
    b = sequence_of<ROWS>(a.cu_seqlens_q, a.batch, slot);
    first_q = cut(a.cu_seqlens_q[b], a.seq_q);
    first_k = cut(a.cu_seqlens_k[b], a.seq_k);
    p.seq_q = cut(a.cu_seqlens_q[b + 1], a.seq_q) - static_cast<int>(first_q);
    seq_k = max(cut(a.cu_seqlens_k[b + 1], a.seq_k) - static_cast<int>(first_k), 0);
    tiles = (p.seq_q + (ROWS - 1)) / ROWS;
    tile = tiles - 1 - static_cast<int>(slot - slot_of<ROWS>(a.cu_seqlens_q, b));
    p.none = tile < 0 || tile >= tiles;
    p.lse += static_cast<i64>(h) * a.seq_q + first_q;
    b = 0;
  } else {
    b = blockIdx.y + static_cast<i64>(gridDim.y) * blockIdx.z;
    tiles = (a.seq_q + (ROWS - 1)) / ROWS;
    tile = tiles - 1 - x % tiles;
    h = x / tiles;
    p.none = b >= a.batch;
    p.lse += (b * a.num_heads + h) * a.seq_q;
  }
  int shared_head = h / a.group;
  p.q = static_cast<const T*>(a.q) + b * a.q_batch_stride + first_q * a.q_row_stride + h * a.q_head_stride;
  p.k = static_cast<const T*>(a.k) + b * a.k_batch_stride + first_k * a.k_row_stride + shared_head * a.k_head_stride;
  p.v = static_cast<const T*>(a.v) + b * a.v_batch_stride + first_k * a.v_row_stride + shared_head * a.v_head_stride;
  p.out = static_cast<T*>(a.out) + b * a.out_batch_stride + first_q * a.out_row_stride + h * a.out_head_stride;
  p.mask = static_cast<const char*>(a.mask) + b * a.mask_batch_stride + h * a.mask_head_stride;
  p.q_row = a.q_row_stride;
  p.k_row = a.k_row_stride;
  p.v_row = a.v_row_stride;
  p.out_row = a.out_row_stride;
  p.mask_row = a.mask_row_stride;
  p.mask_key = a.mask_key_stride;
  p.scale = a.scale;
  p.off = seq_k - p.seq_q;
  p.length = a.lengths && !p.none ? cut(a.lengths[b], seq_k) : seq_k;
  p.head_dim = a.head_dim;
  p.left = a.window_left;
  p.right = a.window_right;
  p.mask_kind = a.mask_kind;
  p.mask_queries = a.seq_q;  // of p.seq_q, but no register: there is no mask where sequences are packed
  p.aligned = a.alignment;
  p.row0 = tile * ROWS;
  return p;
}

// --- tiles in shared memory: rows of D values, chunks of 16 bytes ------------------------------------------

// Bits of the row that take part in the place of a chunk.
template <class T, int D>
constexpr int SPREAD = D / VECTOR<T> % 8 == 0 ? 7 : 3;

// Where chunk `chunk` of row `row` stands: ldmatrix reads it of 8 rows at once, and 8 chunks fill the 32 banks.
template <class T, int D>
__device__ __forceinline__ int place(int row, int chunk) {
  return chunk ^ (SPREAD<T, D> == 7 ? row & 7 : row >> 1 & 3);
}

// How the threads of a block copy rows of T to a tile of S (T, or float): LANES neighbours a row.
template <class T, int D, class S = T>
struct Copy {
  static constexpr int VEC = VECTOR<S>;
  static constexpr int CHUNKS = D / VEC;
  static constexpr int LANES = CHUNKS % 8 == 0 ? 8 : 4;
  static constexpr int STEP = THREADS / LANES;

  // Begins the copy of `rows` rows to a tile of ROWS rows; zeros beyond them and beyond head_dim.
  template <int ROWS>
  static __device__ __forceinline__ void begin(S* tile, const T* source, i64 stride, int rows, int head_dim,
                                               int aligned) {
    int thread = same(static_cast<int>(threadIdx.x));
    int first = thread / LANES, lane = thread % LANES;
    const T* from = source + first * stride + lane * VEC;
    S* to = tile + first * D + place<S, D>(first, lane) * VEC;  // the same place STEP rows further on
    if (aligned & ALIGNED_INPUT) {
#pragma unroll
      for (int r = 0; r < ROWS; r += STEP) {
        if (ROWS % STEP == 0 || first + r < ROWS) {
#pragma unroll
          for (int c = 0; c < CHUNKS; c += LANES) {
            bool inside = first + r < rows && (c + lane) * VEC < head_dim;
            if constexpr (sizeof(S) == sizeof(T)) {
              cp_async_16(to + r * D + c * VEC, from + c * VEC, inside);
            } else {
              float v[VEC] = {};
              if (inside) load<VEC>(from + c * VEC, v);
              store<VEC>(to + r * D + c * VEC, v);
            }
          }
        }
        from += STEP * stride;
      }
    } else {
#pragma unroll 1
      for (int r = 0; first + r < ROWS; r += STEP, from += STEP * stride) {
#pragma unroll 1
        for (int c = 0; c < CHUNKS; c += LANES) {
#pragma unroll 1
          for (int i = c * VEC; i < (c + 1) * VEC; ++i) {
            bool inside = first + r < rows && lane * VEC + i < head_dim;
            to[r * D + i] = inside ? from_float<S>(to_float(from[i])) : S{};
          }
        }
      }
    }
  }
};

// --- scores and weights ------------------------------------------------------------------------------------

// A score with the mask's value at `at`.
template <class T>
__device__ __forceinline__ float masked(const Problem<T>& p, float s, const char* at) {
  bool add = p.mask_kind == MASK_ADDED;
  u32 bits = add ? *reinterpret_cast<const u32*>(at) : *reinterpret_cast<const unsigned char*>(at);
  return add ? s + __uint_as_float(bits) : bits ? s : MINUS_INF;
}

// s[r][n][e] belongs to query `query` + 8 r and key `key` + n * STEP + e. One branch for all rows each: branches in
// every row take the compiler ten times as long.

// The mask, where query and key exist.
template <int STEP, class T, int ROWS, int COUNT, int PAIR>
__device__ __forceinline__ void read_mask(const Problem<T>& p, int query, int key, float (&s)[ROWS][COUNT][PAIR]) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    i64 step = same(p.mask_key);
    int i = query + 8 * r, keys = (i < p.mask_queries ? p.length : 0) - key;
    const char* from = p.mask + i * p.mask_row + key * step;
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
      const char* next = from;
#pragma unroll
      for (int e = 0; e < PAIR; ++e) {
        if (n * STEP + e < keys) s[r][n][e] = masked(p, s[r][n][e], next);
        next += step;
      }
      from += STEP * step;
    }
  }
}

// The products q.k become scores: scaled, the mask added, -inf where the query does not see the key.
template <int STEP, class T, int ROWS, int COUNT, int PAIR>
__device__ __forceinline__ void mask_scores(const Problem<T>& p, int query, int key,
                                            float (&s)[ROWS][COUNT][PAIR]) {
  if (p.scaled()) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int n = 0; n < COUNT; ++n) {
#pragma unroll
        for (int e = 0; e < PAIR; ++e) s[r][n][e] *= p.scale;
      }
    }
    if (p.mask_kind != MASK_SCALED) read_mask<STEP>(p, query, key, s);
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    int i = query + 8 * r;
    int low = p.first_key(i) - key, high = p.end_key(i) - key;
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
#pragma unroll
      for (int e = 0; e < PAIR; ++e) {
        int j = n * STEP + e;
        s[r][n][e] = j >= low && j < high ? s[r][n][e] : MINUS_INF;
      }
    }
  }
}

// What the exponentials of a row are relative to: its maximum, or 0 where all of its scores are -inf.
__device__ __forceinline__ float base_of(float m) { return m == MINUS_INF ? 0.0f : m; }

// The scores become weights, and m and l of every row go on; shrink(r, factor) scales the outputs so far.
// `LANES` neighbouring lanes share a row; l is each lane's own part.
template <int LANES, class T, int ROWS, int COUNT, int PAIR, class Shrink>
__device__ __forceinline__ void weigh(const Problem<T>& p, float (&s)[ROWS][COUNT][PAIR], float (&m)[ROWS],
                                      float (&l)[ROWS], Shrink shrink) {
  bool scaled = p.scaled();
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    float top = s[r][0][0];
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
#pragma unroll
      for (int e = 0; e < PAIR; ++e) top = fmaxf(top, s[r][n][e]);
    }
#pragma unroll
    for (int offset = 1; offset < LANES; offset *= 2) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, offset));
    top = fmaxf(m[r], scaled ? top : top * p.scale);
    float factor = exp2f((m[r] - base_of(top)) * (scaled ? LOG2_E : 1.0f));
    m[r] = top;
    l[r] *= factor;
    shrink(r, factor);
  }
  if (scaled) {  // the difference first: a mask may add numbers that only differences can bear
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int n = 0; n < COUNT; ++n) {
#pragma unroll
        for (int e = 0; e < PAIR; ++e) s[r][n][e] -= base_of(m[r]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    float less = scaled ? 0.0f : base_of(m[r]), sum = 0.0f;
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
#pragma unroll
      for (int e = 0; e < PAIR; ++e) {
        s[r][n][e] = exp2f(fmaf(s[r][n][e], scaled ? LOG2_E : p.scale, -less));
        sum += s[r][n][e];
      }
    }
    l[r] += sum;
  }
}

// log sum_j exp(score_j)
template <class T>
__device__ __forceinline__ float log_sum(const Problem<T>& p, float m, float l) {
  if (m == MINUS_INF) return l == l ? MINUS_INF : l;
  return (p.scaled() ? m : m * LN_2) + log2f(l) * LN_2;
}

// The output of query i by one warp, key by key; its maximum m is known. A key that is seen has a weight above 0,
// however small, so that an infinite value counts.
template <class T, int D>
__device__ __forceinline__ void repair(const Problem<T>& p, int i, float m) {
  int lane = threadIdx.x % WARP;
  int low = p.first_key(i), high = p.end_key(i);
  float base = base_of(m), l = 0.0f;
  const T* q = p.q + i * p.q_row;
  float sum[D / WARP] = {};
#pragma unroll 1
  for (int j0 = low; j0 < high; j0 += WARP) {
    int j = j0 + lane;
    float weight = 0.0f;
    if (j < high) {
      const T* k = p.k + j * p.k_row;
      float s = 0.0f;
#pragma unroll 1
      for (int d = 0; d < p.head_dim; ++d) s = fmaf(to_float(q[d]), to_float(k[d]), s);
      s *= p.scale;
      if (p.mask_kind > MASK_SCALED) s = masked(p, s, p.mask + i * p.mask_row + j * p.mask_key);
      if (s != MINUS_INF) weight = fmaxf(exp2f((s - base) * p.unit()), TINY);
    }
#pragma unroll 1
    for (int source = 0; source < WARP; ++source) {
      float w = __shfl_sync(ALL_LANES, weight, source);
      l += w;
      if (w > 0.0f) {
        const T* v = p.v + (j0 + source) * p.v_row;
#pragma unroll
        for (int c = 0; c < D / WARP; ++c) {
          int d = c * WARP + lane;
          if (d < p.head_dim) sum[c] = fmaf(w, to_float(v[d]), sum[c]);
        }
      }
    }
  }
  float inverse = l == 0.0f ? 0.0f : 1.0f / l;
#pragma unroll
  for (int c = 0; c < D / WARP; ++c) {
    int d = c * WARP + lane;
    if (d < p.head_dim) p.out[i * p.out_row + d] = from_float<T>(sum[c] * inverse);
  }
}

// What a warp keeps of a query, in shared memory; odd: the output holds NaN that the weights do not.
struct Row {
  float m, l;
  int odd;
};

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

  // the lane's row of the fragments that ldmatrix loads, and the places of chunk 2 k + lane / 16 of it
  int at = lane % 16 * D;
  int turned = place<T, D>(lane % 8, lane / 16);
  auto fragment = [&](int k) {
    return at + ((turned ^ (2 * k & SPREAD<T, D>)) + (2 * k & ~SPREAD<T, D>)) * VEC;
  };

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
          ldmatrix(b, k_tile + n * 16 * D + fragment(k));
#pragma unroll
          for (int i = 0; i < TILES; ++i) {
            multiply<T>(s[2 * i][2 * n], s[2 * i + 1][2 * n], a[i], b[0], b[2]);
            multiply<T>(s[2 * i][2 * n + 1], s[2 * i + 1][2 * n + 1], a[i], b[1], b[3]);
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
      weigh<4>(p, s, m, l, [&](int r, float factor) {
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          o[r][n][0] *= factor;
          o[r][n][1] *= factor;
        }
      });
#pragma unroll
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

  T* const out_tile = shared;
  Row* const rows = reinterpret_cast<Row*>(shared + ROWS * D);
  bool odd = false;
#pragma unroll
  for (int r = 0; r < LINES; ++r) {
    float sum = l[r];
    sum += __shfl_xor_sync(ALL_LANES, sum, 1);
    sum += __shfl_xor_sync(ALL_LANES, sum, 2);
    float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    int row = warp * OWN + 8 * r + g;
    bool nan = false;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      float low = o[r][n][0] * inverse, high = o[r][n][1] * inverse;
      nan = nan || low != low || high != high;
      *reinterpret_cast<u32*>(out_tile + row * D + place<T, D>(row, n) * VEC + 2 * t) = pack<T>(low, high);
    }
    nan = (__ballot_sync(ALL_LANES, nan) >> (lane & ~3) & 15) && sum == sum;
    odd = odd || nan;
    if (t == 0) rows[row] = {m[r], sum, nan};
  }
  __syncwarp();
  const Problem<T> again = problem_of<T, ROWS>(a, same(blockIdx.x));  // rather than keep it in registers
  row0 = again.row0;
  if (a.lse) {
    int row = warp * OWN + lane;
    if (lane < OWN && row0 + row < again.seq_q) again.lse[row0 + row] = log_sum(again, rows[row].m, rows[row].l);
  }
  constexpr int LANES = D / VEC % 8 == 0 ? 8 : 4;
#pragma unroll 1
  for (int r = lane / LANES; r < OWN; r += WARP / LANES) {
    int row = warp * OWN + r;
    if (row0 + row >= again.seq_q) break;
    T* to = again.out + (row0 + row) * again.out_row;
#pragma unroll 1
    for (int chunk = lane % LANES; chunk * VEC < again.head_dim; chunk += LANES) {
      const T* from = out_tile + row * D + place<T, D>(row, chunk) * VEC;
      if (again.aligned & ALIGNED_OUTPUT) {
        *reinterpret_cast<uint4*>(to + chunk * VEC) = *reinterpret_cast<const uint4*>(from);
      } else {
        for (int e = 0; e < VEC && chunk * VEC + e < again.head_dim; ++e) to[chunk * VEC + e] = from[e];
      }
    }
  }
  if (__any_sync(ALL_LANES, odd)) {
    __syncwarp();
#pragma unroll 1
    for (int r = warp * OWN; r < (warp + 1) * OWN && row0 + r < again.seq_q; ++r) {
      if (rows[r].odd) repair<T, D>(again, row0 + r, rows[r].m);
    }
  }
}

// --- float: products by fused multiply and add -------------------------------------------------------------

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
  for (int j0 = start; j0 < end; j0 += KEYS) {
    int next = j0 + KEYS;
    cp_async_wait<0>();
    __syncthreads();  // the keys are there, and the values before them no longer needed
    Tiles::template begin<KEYS>(v_tile, p.v + j0 * p.v_row, p.v_row, end - j0, p.head_dim, p.aligned);
    cp_async_commit();

    float s[OWN][COUNT][1] = {};
#pragma unroll 2
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
      if (rows[row].odd) repair<T, D>(again, row0 + row, rows[row].m);
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
  extern "C" __global__ void __launch_bounds__(128, blocks) name(AttentionParams_PARAMETERS) { \
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

// What the kernels of attention share: the tile of queries that a block has, tiles in shared memory, scores, softmax as
// the tiles go by, and the repair of rows that end as NaN.
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
constexpr int MASK_SCALED = 1;  // times scale; where `capped`, c tanh(that / c), c = softcap, here and below
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
  float scale, softcap, cap_unit;
  int seq_q, length, off, head_dim, left, right, mask_kind, mask_queries, aligned, capped;
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

  // Whether scores are scaled before the maximum is sought: they are capped, a mask is added, or the order changes.
  // Otherwise they are the products q.k, and exp2 takes one fma of them. unit: log2 of the weight of a score of 1
  __device__ __forceinline__ bool scaled() const { return mask_kind != MASK_NONE; }
  __device__ __forceinline__ float unit() const { return scaled() ? LOG2_E : scale; }
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
  p.capped = a.capped;
  p.softcap = a.softcap;
  p.cap_unit = a.cap_unit;
  p.mask_queries = a.mask_queries;  // rows that the mask has: of packed sequences those of the longest
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

// c tanh(s / c). For half types 1 - 2 / (exp(2x) + 1) is tanh x, to 2^-22: scores then are off by about as much as one
// of c is, and fewer registers are needed: tanhf and divisions spill 32 bytes of f16 at D = 128.
template <class T>
__device__ __forceinline__ float cap_score(const Problem<T>& p, float s) {
  float c = p.softcap;
  if constexpr (sizeof(T) == 4) return c * tanhf(s * (1.0f / c));
  return fmaf(-2.0f * c, reciprocal(exp2f(s * p.cap_unit) + 1.0f), c);
}

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
    if (p.capped) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
#pragma unroll
        for (int n = 0; n < COUNT; ++n) {
#pragma unroll
          for (int e = 0; e < PAIR; ++e) s[r][n][e] = cap_score(p, s[r][n][e]);
        }
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

// m of a row, or 0 where all of its scores so far are -inf.
__device__ __forceinline__ float base_of(float m) { return m == MINUS_INF ? 0.0f : m; }

// A row's exponentials are relative to m: its maximum, or up to 2^SLACK below it, so that most tiles rescale nothing.
// s and m are what the products became (times scale where `scaled`), and `unit` makes units of log2 of them. One fma a
// score: exp2(s * unit - less), less = m * unit. But less is rounded: by 2^-24 of its size, which at 1e9 is beyond all
// exponents of float. So where it is far from 0, and where a mask has been added, m is subtracted first.
constexpr float SLACK = 8.0f;
constexpr float FAR = 1024.0f;

__device__ __forceinline__ bool far(bool scaled, float less) { return scaled || !(fabsf(less) <= FAR); }

// The scores become weights, and m and l of every row go on; shrink(r, factor) scales the outputs so far.
// `LANES` neighbouring lanes share a row; l is each lane's own part.
template <int LANES, class T, int ROWS, int COUNT, int PAIR, class Shrink>
__device__ __forceinline__ void weigh(const Problem<T>& p, float (&s)[ROWS][COUNT][PAIR], float (&m)[ROWS],
                                      float (&l)[ROWS], Shrink shrink) {
  bool scaled = p.scaled(), moved = false;
  float unit = p.unit();
  float next[ROWS], less[ROWS];
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
    bool moves = (top - m[r]) * unit > SLACK;  // not where both are the same infinity
    next[r] = moves ? top : m[r];
    moved = moved || moves;
  }
  // hot: rescale
  if (__any_sync(ALL_LANES, moved)) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float base = base_of(next[r]), to = base * unit;
      float factor = exp2f(far(scaled, to) ? (m[r] - base) * unit : m[r] * unit - to);
      if (m[r] == next[r]) factor = 1.0f;  // exactly: `to` is rounded, and the fma that it goes into is not
      m[r] = next[r];
      l[r] *= factor;
      shrink(r, factor);
    }
  }
  bool apart = false;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    less[r] = base_of(m[r]) * unit;
    apart = apart || far(scaled, less[r]);
  }
  // hot: far
  if (apart) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      bool first = far(scaled, less[r]);
      float base = first ? base_of(m[r]) : 0.0f;
      less[r] = first ? 0.0f : less[r];
#pragma unroll
      for (int n = 0; n < COUNT; ++n) {
#pragma unroll
        for (int e = 0; e < PAIR; ++e) s[r][n][e] -= base;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
#pragma unroll
      for (int e = 0; e < PAIR; ++e) {
        s[r][n][e] = exp2f(fmaf(s[r][n][e], unit, -less[r]));
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
  return (p.scaled() ? m : m * (p.scale * LN_2)) + log2f(l) * LN_2;
}

// The score of query i and key j, in the units of `weigh`.
template <class T>
__device__ __forceinline__ float score_of(const Problem<T>& p, int i, int j) {
  const T* q = p.q + i * p.q_row;
  const T* k = p.k + j * p.k_row;
  float s = 0.0f;
#pragma unroll 1
  for (int d = 0; d < p.head_dim; ++d) s = fmaf(to_float(q[d]), to_float(k[d]), s);
  if (!p.scaled()) return s;
  s *= p.scale;
  if (p.capped) s = cap_score(p, s);
  return p.mask_kind == MASK_SCALED ? s : masked(p, s, p.mask + i * p.mask_row + j * p.mask_key);
}

// The output of query i by one warp, key by key. A key that is seen has a weight above 0, however small, so that an
// infinite value counts. Sums here round otherwise than on tensor cores, so that the maximum is sought anew: at scores
// of 1e9 and more the other one may be off by all exponents of float.
template <class T, int D>
__device__ __forceinline__ void repair(const Problem<T>& p, int i) {
  int lane = threadIdx.x % WARP;
  int low = p.first_key(i), high = p.end_key(i);
  float top = MINUS_INF, l = 0.0f;
#pragma unroll 1
  for (int j = low + lane; j < high; j += WARP) top = fmaxf(top, score_of(p, i, j));
#pragma unroll
  for (int offset = 1; offset < WARP; offset *= 2) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, offset));
  float base = base_of(top);
  float sum[D / WARP] = {};
#pragma unroll 1
  for (int j0 = low; j0 < high; j0 += WARP) {
    int j = j0 + lane;
    float weight = 0.0f;
    if (j < high) {
      float s = score_of(p, i, j);
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

// The end of a warp's 8 LINES queries, of a tile of ROWS: from row `first` of it on, where all of the shared memory is free.
// A lane has rows 8 r + lane / 4 and, of each 8 columns, two. Outputs go through shared memory, where the Rows are behind
// them; then lse, and rows that end as NaN once more.
template <class T, int D, int ROWS, int LINES>
__device__ __forceinline__ void write_outputs(const AttentionParams& a, T* shared, int first,
                                              const float (&o)[LINES][D / 8][2], const float (&m)[LINES],
                                              const float (&l)[LINES]) {
  constexpr int VEC = VECTOR<T>;
  constexpr int OWN = 8 * LINES;
  int lane = threadIdx.x % WARP;
  int g = lane / 4, t = lane % 4;
  Row* const rows = reinterpret_cast<Row*>(shared + ROWS * D);
  bool odd = false;
#pragma unroll
  for (int r = 0; r < LINES; ++r) {
    float sum = l[r];
    sum += __shfl_xor_sync(ALL_LANES, sum, 1);
    sum += __shfl_xor_sync(ALL_LANES, sum, 2);
    float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    int row = first + 8 * r + g;
    bool nan = false;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      float low = o[r][n][0] * inverse, high = o[r][n][1] * inverse;
      nan = nan || low != low || high != high;
      *reinterpret_cast<u32*>(shared + row * D + place<T, D>(row, n) * VEC + 2 * t) = pack<T>(low, high);
    }
    nan = (__ballot_sync(ALL_LANES, nan) >> (lane & ~3) & 15) && sum == sum;
    odd = odd || nan;
    if (t == 0) rows[row] = {m[r], sum, nan};
  }
  __syncwarp();
  const Problem<T> p = problem_of<T, ROWS>(a, same(blockIdx.x));  // again, rather than keep it in registers
  int row0 = p.row0;
  if (a.lse) {
    int row = first + lane;
    if (lane < OWN && row0 + row < p.seq_q) p.lse[row0 + row] = log_sum(p, rows[row].m, rows[row].l);
  }
  constexpr int LANES = D / VEC % 8 == 0 ? 8 : 4;
#pragma unroll 1
  for (int r = lane / LANES; r < OWN; r += WARP / LANES) {
    int row = first + r;
    if (row0 + row >= p.seq_q) break;
    T* to = p.out + (row0 + row) * p.out_row;
#pragma unroll 1
    for (int chunk = lane % LANES; chunk * VEC < p.head_dim; chunk += LANES) {
      const T* from = shared + row * D + place<T, D>(row, chunk) * VEC;
      if (p.aligned & ALIGNED_OUTPUT) {
        *reinterpret_cast<uint4*>(to + chunk * VEC) = *reinterpret_cast<const uint4*>(from);
      } else {
        for (int e = 0; e < VEC && chunk * VEC + e < p.head_dim; ++e) to[chunk * VEC + e] = from[e];
      }
    }
  }
  if (__any_sync(ALL_LANES, odd)) {
    __syncwarp();
#pragma unroll 1
    for (int r = first; r < first + OWN && row0 + r < p.seq_q; ++r) {
      if (rows[r].odd) repair<T, D>(p, row0 + r);
    }
  }
}

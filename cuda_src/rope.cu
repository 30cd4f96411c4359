// y[a] = x[a] c[j] - x[b] s[j], y[b] = x[b] c[j] + x[a] s[j], c = cos[p], s = sin[p], for pair j of every head.
//
// Arrays     x, out: (tokens, num_heads, head_dim) T, row-major; out may be x. cos, sin: (max_positions, half) float.
//            positions: (tokens) int64 (wide) or int32, clamped to 0 ... max_positions - 1; or null: token % seq.
//            Pair j is (a, b) = (j, j + half), _interleaved (2j, 2j + 1), j < half. Features from 2 half on are copied,
//            where there are units for them: not if out is x
// Ownership  A thread has a unit of a head: pairs that are 16 bytes of x, or twice 16 bytes if they are halves; or 16
//            bytes to copy. _single: one pair, or one element to copy
// Launch     blocks of 256 threads, units in strides of the grid: first the pairs of a head, then what is copied
// Shared     none
// Bytes      reads x once, writes out once: 2 sizeof(T) per element; the rows of cos and sin come from the caches for
//            all heads of a token but the first
// Accuracy   two roundings in float, then one to T; what is copied keeps its bits
//
// Source: Su et al. 2021, "RoFormer: enhanced transformer with rotary position embedding".
#include "elementwise.cuh"
#include "rope_params.h"

// (a, b) = PAIRS pairs of a head; x points to the first of them.
template <int PAIRS, bool INTERLEAVED, class T>
__device__ __forceinline__ void load_pairs(const T* x, i64 half, float (&a)[PAIRS], float (&b)[PAIRS]) {
  if constexpr (!INTERLEAVED) {
    load<PAIRS>(x, a);
    load<PAIRS>(x + half, b);
  } else if constexpr (PAIRS == 1) {  // of any alignment
    a[0] = to_float(x[0]);
    b[0] = to_float(x[1]);
  } else {
    float v[2 * PAIRS];
    load<2 * PAIRS>(x, v);
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) a[i] = v[2 * i], b[i] = v[2 * i + 1];
  }
}

template <int PAIRS, bool INTERLEAVED, class T>
__device__ __forceinline__ void store_pairs(T* out, i64 half, const float (&a)[PAIRS], const float (&b)[PAIRS]) {
  if constexpr (!INTERLEAVED) {
    store<PAIRS>(out, a);
    store<PAIRS>(out + half, b);
  } else if constexpr (PAIRS == 1) {
    out[0] = from_float<T>(a[0]);
    out[1] = from_float<T>(b[0]);
  } else {
    float v[2 * PAIRS];
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) v[2 * i] = a[i], v[2 * i + 1] = b[i];
    store<2 * PAIRS>(out, v);
  }
}

// The row of cos and sin of a token.
__device__ __forceinline__ i64 position(const RopeParams& p, i64 token) {
  if (!p.positions) return token - quotient(token, p.by_seq) * p.seq;
  i64 at = p.wide ? static_cast<const i64*>(p.positions)[token] : static_cast<const int*>(p.positions)[token];
  return at < 0 ? 0 : at < p.max_positions ? at : p.max_positions - 1;
}

template <class T, bool INTERLEAVED, bool SINGLE>
__device__ __forceinline__ void rope(const RopeParams& p) {
  constexpr int VEC = SINGLE ? 1 : VECTOR<T>;  // elements of an access
  constexpr int PAIRS = SINGLE ? 1 : INTERLEAVED ? VEC / 2 : VEC;
  for (i64 unit = first_chunk(); unit < p.count; unit += chunk_stride()) {
    i64 head = quotient(unit, p.by_units), at = unit - head * p.units;
    const T* x = static_cast<const T*>(p.x) + head * p.head_dim;
    T* out = static_cast<T*>(p.out) + head * p.head_dim;
    i64 j = at * PAIRS;
    if (j < p.half) {
      i64 row = position(p, quotient(head, p.by_heads)) * p.half + j;
      i64 first = INTERLEAVED ? 2 * j : j;
      float a[PAIRS], b[PAIRS], c[PAIRS], s[PAIRS];
      load_pairs<PAIRS, INTERLEAVED>(x + first, p.half, a, b);
      load<PAIRS>(p.cos + row, c);
      load<PAIRS>(p.sin + row, s);
#pragma unroll
      for (int i = 0; i < PAIRS; ++i) {
        float turned = a[i] * c[i] - b[i] * s[i];
        b[i] = b[i] * c[i] + a[i] * s[i];
        a[i] = turned;
      }
      store_pairs<PAIRS, INTERLEAVED>(out + first, p.half, a, b);
    } else {
      i64 rest = 2 * p.half + (at - p.half / PAIRS) * VEC;
      if constexpr (SINGLE) {
        out[rest] = x[rest];
      } else {
        CHECK_ALIGNED(x + rest, VECTOR_BYTES);
        *reinterpret_cast<uint4*>(out + rest) = *reinterpret_cast<const uint4*>(x + rest);
      }
    }
  }
}

#define ENTRY(name, T, INTERLEAVED, SINGLE) \
  KERNEL(name, 256)(RopeParams_PARAMETERS) { \
    const RopeParams p = RopeParams_VALUES; \
    rope<T, INTERLEAVED, SINGLE>(p); \
  }
#define ENTRIES(type, T) \
  ENTRY(rope_##type, T, false, false) \
  ENTRY(rope_##type##_single, T, false, true) \
  ENTRY(rope_##type##_interleaved, T, true, false) \
  ENTRY(rope_##type##_interleaved_single, T, true, true)

ENTRIES(f32, float)
ENTRIES(f16, f16)
ENTRIES(bf16, bf16)

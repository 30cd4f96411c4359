// y[i] = x[i] / (1 - p) + residual[i] where word i % 4 of Philox4x32-10 block offset + i / 4 is at least floor(p 2^32),
// else residual[i].
//
// Arrays     x, residual, out: (count) T; residual may be null; out may be either
// Ownership  a thread has a chunk of 16 bytes (4 float or 8 half values: one or two Philox blocks), read and written
//            at once, or element by element (_single)
// Launch     blocks of 256 threads, chunks in strides of the grid
// Shared     none
// Bytes      reads x and residual once, writes out once: 2 or 3 sizeof(T) per element
// Accuracy   the mask is exact, the same on every backend; a product and a sum in float
//
// Source: Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
#include "elementwise.cuh"
#include "dropout_params.h"

constexpr u32 PHILOX_M0 = 0xd2511f53u;
constexpr u32 PHILOX_M1 = 0xcd9e8d57u;
constexpr u32 PHILOX_W0 = 0x9e3779b9u;
constexpr u32 PHILOX_W1 = 0xbb67ae85u;
constexpr int PHILOX_ROUNDS = 10;

// The four words of the block with counter `counter`.
__device__ __forceinline__ void philox(u64 counter, u64 seed, u32* words) {
  u32 c0 = static_cast<u32>(counter), c1 = static_cast<u32>(counter >> 32), c2 = 0, c3 = 0;
  u32 k0 = static_cast<u32>(seed), k1 = static_cast<u32>(seed >> 32);
#pragma unroll
  for (int round = 0; round < PHILOX_ROUNDS; ++round) {
    u64 p0 = static_cast<u64>(PHILOX_M0) * c0, p1 = static_cast<u64>(PHILOX_M1) * c2;
    c0 = static_cast<u32>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<u32>(p1);
    c2 = static_cast<u32>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<u32>(p0);
    k0 += PHILOX_W0;
    k1 += PHILOX_W1;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

template <class T, bool ALIGNED>
__device__ __forceinline__ void dropout(const DropoutParams& p) {
  constexpr int VEC = VECTOR<T>;
  const T* x = static_cast<const T*>(p.x);
  const T* residual = static_cast<const T*>(p.residual);
  T* out = static_cast<T*>(p.out);
  i64 count = p.count;
  u64 threshold = p.threshold;
  for (i64 chunk = first_chunk(); chunk * VEC < count; chunk += chunk_stride()) {
    i64 at = chunk * VEC;
    u32 words[VEC];
#pragma unroll
    for (int i = 0; i < VEC; i += 4) philox(p.offset + static_cast<u64>((at + i) / 4), p.seed, words + i);
    if (ALIGNED && at + VEC <= count) {
      float v[VEC];
      load<VEC>(x + at, v);
#pragma unroll
      for (int i = 0; i < VEC; ++i) v[i] = words[i] >= threshold ? v[i] * p.factor : 0.0f;
      if (residual) {
        float r[VEC];
        load<VEC>(residual + at, r);
#pragma unroll
        for (int i = 0; i < VEC; ++i) v[i] += r[i];
      }
      store<VEC>(out + at, v);
    } else {
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        if (at + i < count) {
          float v = words[i] >= threshold ? to_float(x[at + i]) * p.factor : 0.0f;
          out[at + i] = from_float<T>(residual ? v + to_float(residual[at + i]) : v);
        }
      }
    }
  }
}

#define ENTRY(name, T, ALIGNED) \
  KERNEL(name, 256)(DropoutParams_PARAMETERS) { \
    const DropoutParams p = DropoutParams_VALUES; \
    dropout<T, ALIGNED>(p); \
  }
#define ENTRIES(type, T) \
  ENTRY(dropout_##type, T, true) \
  ENTRY(dropout_##type##_single, T, false)

ENTRIES(f32, float)
ENTRIES(f16, f16)
ENTRIES(bf16, bf16)

// Vectors of elements between memory and float registers, up to 16 bytes at a time.
#include "types.cuh"

constexpr int VECTOR_BYTES = 16;  // the widest access of one thread

// Elements of T in one 16-byte access: 4 of float, 8 of the half types.
template <class T>
constexpr int VECTOR = VECTOR_BYTES / static_cast<int>(sizeof(T));

template <int BYTES>
struct Words;
template <>
struct Words<4> {
  using type = u32;
};
template <>
struct Words<8> {
  using type = uint2;
};
template <>
struct Words<16> {
  using type = uint4;
};

// v = p[0 .. N-1], in accesses of up to 16 bytes. p is aligned to N elements, or to 16 bytes where that is less.
template <int N, class T>
__device__ __forceinline__ void load(const T* p, float (&v)[N]) {
  if constexpr (N * sizeof(T) < 4 || N % 2 == 1) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = to_float(p[i]);
  } else {
    constexpr int BYTES = N * sizeof(T) < VECTOR_BYTES ? N * sizeof(T) : VECTOR_BYTES;
    constexpr int EACH = BYTES / static_cast<int>(sizeof(T));
    using W = typename Words<BYTES>::type;
    CHECK_ALIGNED(p, BYTES);
#pragma unroll
    for (int k = 0; k < N / EACH; ++k) {
      W word = reinterpret_cast<const W*>(p)[k];
      const u32* part = reinterpret_cast<const u32*>(&word);
      if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < EACH; ++i) v[k * EACH + i] = __uint_as_float(part[i]);
      } else {
#pragma unroll
        for (int i = 0; i < EACH / 2; ++i) unpack<T>(part[i], v[k * EACH + 2 * i], v[k * EACH + 2 * i + 1]);
      }
    }
  }
}

// p[0 .. N-1] = v, as `load`.
template <int N, class T>
__device__ __forceinline__ void store(T* p, const float (&v)[N]) {
  if constexpr (N * sizeof(T) < 4 || N % 2 == 1) {
#pragma unroll
    for (int i = 0; i < N; ++i) p[i] = from_float<T>(v[i]);
  } else {
    constexpr int BYTES = N * sizeof(T) < VECTOR_BYTES ? N * sizeof(T) : VECTOR_BYTES;
    constexpr int EACH = BYTES / static_cast<int>(sizeof(T));
    using W = typename Words<BYTES>::type;
    CHECK_ALIGNED(p, BYTES);
#pragma unroll
    for (int k = 0; k < N / EACH; ++k) {
      W word;
      u32* part = reinterpret_cast<u32*>(&word);
      if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < EACH; ++i) part[i] = __float_as_uint(v[k * EACH + i]);
      } else {
#pragma unroll
        for (int i = 0; i < EACH / 2; ++i) part[i] = pack<T>(v[k * EACH + 2 * i], v[k * EACH + 2 * i + 1]);
      }
      reinterpret_cast<W*>(p)[k] = word;
    }
  }
}

// v = p[at .. at + N-1] of a vector along the columns (a gain, a bias), whose dtype is `type`: for N > 1 float or T,
// for N = 1 any of the three, so that kernels that take elements one by one serve every mixture. The branch is the
// same for all threads.
template <int N, class T>
__device__ __forceinline__ void load_vector(const void* p, int type, i64 at, float (&v)[N]) {
  if constexpr (N == 1) {
    u32 bits = type == TYPE_F32 ? static_cast<const u32*>(p)[at] : static_cast<const u16*>(p)[at];
    float wide = __uint_as_float(type == TYPE_F32 ? bits : bits << 16);
    v[0] = type == TYPE_F16 ? f16_value(static_cast<u16>(bits)) : wide;
  } else if (sizeof(T) == sizeof(float) || type == TYPE_F32) {
    load<N>(static_cast<const float*>(p) + at, v);
  } else {
    load<N>(static_cast<const T*>(p) + at, v);
  }
}

// v = p[at .. at + N-1] of an array whose dtype is one of TYPE_...; the branch is the same for all threads.
template <int N>
__device__ __forceinline__ void load_any(const void* p, int type, i64 at, float (&v)[N]) {
  if (type == TYPE_F32) {
    load<N>(static_cast<const float*>(p) + at, v);
  } else if (type == TYPE_F16) {
    load<N>(static_cast<const f16*>(p) + at, v);
  } else {
    load<N>(static_cast<const bf16*>(p) + at, v);
  }
}

// p[at .. at + N-1] = v of such an array.
template <int N>
__device__ __forceinline__ void store_any(void* p, int type, i64 at, const float (&v)[N]) {
  if (type == TYPE_F32) {
    store<N>(static_cast<float*>(p) + at, v);
  } else if (type == TYPE_F16) {
    store<N>(static_cast<f16*>(p) + at, v);
  } else {
    store<N>(static_cast<bf16*>(p) + at, v);
  }
}

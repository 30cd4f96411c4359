// The host build's stand-in for what only a GPU has: the names of CUDA that the sources use, and the wrappers
// of types.cuh, async_copy.cuh and mma.cuh in plain C++. Included by types.cuh under RBE_HOST.
#pragma once

#include <algorithm>
#include <cmath>
#include <tuple>
#include <type_traits>
#include <utility>

#include "fibers.hpp"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static __attribute__((section("rbe_shared")))

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#define threadIdx (rbe_host::block.current->index)
#define blockIdx (rbe_host::block.block_index)
#define blockDim (rbe_host::block.block_dim)
#define gridDim (rbe_host::block.grid_dim)

#define DYNAMIC_SHARED(T, name) T* const name = reinterpret_cast<T*>(rbe_host::dynamic_shared)

#define CHECK_ALIGNED(p, bytes)                                                                    \
  do {                                                                                             \
    if (reinterpret_cast<uintptr_t>(p) % (bytes))                                                  \
      RBE_FAIL("thread %d makes a misaligned access of %d bytes in %s:%d", rbe_host::block.current->id, \
               static_cast<int>(bytes), __FILE__, __LINE__);                                       \
  } while (0)

// The place of a call, as default arguments.
#define RBE_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// --- barriers and warp operations --------------------------------------------------------------------------

inline void __syncthreads(RBE_HERE) { rbe_host::barrier({file, line}); }

inline void __syncwarp(unsigned mask = 0xffffffffu, RBE_HERE) {
  rbe_host::warp_operation({file, line}, mask, nullptr, [](void**, unsigned) {});
}

inline void __threadfence() {}
inline void __threadfence_block() {}

namespace rbe_host {

// Every lane of the mask receives the value of the lane that it names.
template <class T>
T exchange(Where where, unsigned mask, T value, int source) {
  struct Operands {
    T value, result;
    int source, id;
  } mine{value, value, source, block.current->id};
  warp_operation(where, mask, &mine, [where](void** lanes, unsigned named) {
    for (int i = 0; i < LANES; ++i) {
      if (!(named >> i & 1)) continue;
      Operands* o = static_cast<Operands*>(lanes[i]);
      if (!(named >> o->source & 1)) {
        RBE_FAIL("thread %d reads from lane %d, which is not in the mask 0x%08x, in %s:%d", o->id, o->source,
                 named, where.file, where.line);
      }
      o->result = static_cast<Operands*>(lanes[o->source])->value;
    }
  });
  return mine.result;
}

inline int lane() { return block.current->id % LANES; }

}  // namespace rbe_host

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, RBE_HERE) {
  int base = rbe_host::lane() & ~(width - 1);
  return rbe_host::exchange({file, line}, mask, value, base + (source & (width - 1)));
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, RBE_HERE) {
  int lane = rbe_host::lane(), from = lane ^ bits;
  return rbe_host::exchange({file, line}, mask, value, from >= (lane & ~(width - 1)) + width ? lane : from);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32, RBE_HERE) {
  int lane = rbe_host::lane(), from = lane - delta;
  return rbe_host::exchange({file, line}, mask, value, from < (lane & ~(width - 1)) ? lane : from);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32, RBE_HERE) {
  int lane = rbe_host::lane(), from = lane + delta;
  return rbe_host::exchange({file, line}, mask, value, from >= (lane & ~(width - 1)) + width ? lane : from);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, RBE_HERE) {
  struct Operands {
    int predicate;
    unsigned votes;
  } mine{predicate, 0};
  rbe_host::warp_operation({file, line}, mask, &mine, [](void** lanes, unsigned named) {
    unsigned votes = 0;
    for (int i = 0; i < rbe_host::LANES; ++i) {
      if (named >> i & 1 && static_cast<Operands*>(lanes[i])->predicate) votes |= 1u << i;
    }
    for (int i = 0; i < rbe_host::LANES; ++i) {
      if (named >> i & 1) static_cast<Operands*>(lanes[i])->votes = votes;
    }
  });
  return mine.votes;
}

inline int __any_sync(unsigned mask, int predicate, RBE_HERE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}

inline int __all_sync(unsigned mask, int predicate, RBE_HERE) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}

// Blocks and threads run one at a time, so plain arithmetic is atomic.
template <class T>
T atomicAdd(T* p, std::common_type_t<T> v) {
  T old = *p;
  *p = static_cast<T>(old + v);
  return old;
}
inline unsigned atomicInc(unsigned* p, unsigned last) {
  unsigned old = *p;
  *p = old >= last ? 0 : old + 1;
  return old;
}
template <class T>
T atomicMax(T* p, std::common_type_t<T> v) {
  T old = *p;
  if (v > old) *p = v;
  return old;
}

inline uint4 load_from_blocks(const float* p) { return *reinterpret_cast<const uint4*>(p); }
inline void prefetch(const void*) {}

// --- arithmetic --------------------------------------------------------------------------------------------

using std::max;
using std::min;

template <class To, class From>
inline To rbe_bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To r;
  memcpy(&r, &v, sizeof r);
  return r;
}
inline unsigned __float_as_uint(float v) { return rbe_bits<unsigned>(v); }
inline int __float_as_int(float v) { return rbe_bits<int>(v); }
inline float __uint_as_float(unsigned v) { return rbe_bits<float>(v); }
inline float __int_as_float(int v) { return rbe_bits<float>(v); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t(a) * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(static_cast<unsigned>(v)) : 32; }
inline int __float2int_rn(float v) { return static_cast<int>(std::nearbyint(v)); }
inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }
// A whole ulp off unless v is a power of two, as it may be on a GPU; no subnormal results.
inline float reciprocal(float v) {
  float r = 1.0f / v;
  if (!(fabsf(r) >= 0x1p-126f)) return r != r ? r : copysignf(0.0f, r);
  int exponent;
  return frexpf(fabsf(v), &exponent) == 0.5f || !std::isfinite(r) ? r : nextafterf(r, 2.0f * r);
}
template <class T>
inline T __ldg(const T* p) {
  return *p;
}

inline float cospif(float v) { return static_cast<float>(std::cos(3.14159265358979323846 * v)); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  uint64_t bytes = uint64_t(b) << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) r |= static_cast<unsigned>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return r;
}

inline float f16_value(unsigned short bits) { return static_cast<float>(rbe_bits<_Float16>(bits)); }
inline unsigned short f16_bits(float v) { return rbe_bits<unsigned short>(static_cast<_Float16>(v)); }
inline unsigned short bf16_bits(float v) {
  unsigned b = __float_as_uint(v);
  return (b & 0x7fffffffu) > 0x7f800000u ? 0x7fff : static_cast<unsigned short>((b + 0x7fffu + (b >> 16 & 1)) >> 16);
}
inline float rbe_bf16_value(unsigned short bits) { return __uint_as_float(unsigned(bits) << 16); }
inline void unpack_f16(unsigned word, float& low, float& high) {
  low = f16_value(static_cast<unsigned short>(word));
  high = f16_value(static_cast<unsigned short>(word >> 16));
}
inline unsigned pack_f16(float low, float high) { return f16_bits(low) | unsigned(f16_bits(high)) << 16; }
inline unsigned pack_bf16(float low, float high) { return bf16_bits(low) | unsigned(bf16_bits(high)) << 16; }

// Sums and products of two f16 are exact in double, and so are products to which a third is added but for ties.
template <class F>
inline unsigned rbe_f16x2(F f) {
  unsigned short half[2];
  for (int i = 0; i < 2; ++i) half[i] = rbe_bits<unsigned short>(static_cast<_Float16>(f(16 * i)));
  return half[0] | unsigned(half[1]) << 16;
}
inline double rbe_half_of(unsigned word, int shift) { return f16_value(static_cast<unsigned short>(word >> shift)); }
inline unsigned add_f16x2(unsigned a, unsigned b) {
  return rbe_f16x2([&](int s) { return rbe_half_of(a, s) + rbe_half_of(b, s); });
}
inline unsigned mul_f16x2(unsigned a, unsigned b) {
  return rbe_f16x2([&](int s) { return rbe_half_of(a, s) * rbe_half_of(b, s); });
}
inline unsigned fma_f16x2(unsigned a, unsigned b, unsigned c) {
  return rbe_f16x2([&](int s) { return rbe_half_of(a, s) * rbe_half_of(b, s) + rbe_half_of(c, s); });
}
inline unsigned clamp_f16x2(unsigned a, unsigned limit) {
  return rbe_f16x2([&](int s) {
    return std::fmin(std::fmax(rbe_half_of(a, s), -rbe_half_of(limit, s)), rbe_half_of(limit, s));
  });
}

// --- asynchronous copies: done at the wait, so that a forgotten wait shows -----------------------------------
// Meanwhile the target holds NaN, so that one that is still read shows too.

namespace rbe_host {

inline void undefine(void* shared) {
  memset(shared, POISON, 16);
  if (!async_shared.empty()) memset(&async_shared[static_cast<char*>(shared) - dynamic_shared], POISON, 16);
}

}  // namespace rbe_host

inline void cp_async_16(void* shared, const void* global, bool valid = true, RBE_HERE) {
  rbe_host::Fiber* f = rbe_host::block.current;
  if (!rbe_host::is_shared(shared, 16) || reinterpret_cast<uintptr_t>(shared) % 16 ||
      (valid && reinterpret_cast<uintptr_t>(global) % 16)) {
    RBE_FAIL("thread %d: cp_async_16 in %s:%d needs 16-byte aligned addresses, the first in shared memory", f->id,
             file, line);
  }
  rbe_host::undefine(shared);
  f->copies.push_back({f->copy_groups, {shared, valid ? global : nullptr}});
}

inline void cp_async_commit() { ++rbe_host::block.current->copy_groups; }

template <int GROUPS>
inline void cp_async_wait() {
  rbe_host::Fiber* f = rbe_host::block.current;
  size_t done = 0;
  for (; done < f->copies.size() && f->copies[done].first < f->copy_groups - GROUPS; ++done) {
    const rbe_host::Copy& c = f->copies[done].second;
    if (c.from) {
      *static_cast<uint4*>(c.to) = *static_cast<const uint4*>(c.from);
    } else {
      *static_cast<uint4*>(c.to) = {};
    }
    f->not_fenced.push_back(c.to);
  }
  f->copies.erase(f->copies.begin(), f->copies.begin() + static_cast<long>(done));
}

// --- tensor cores ------------------------------------------------------------------------------------------

namespace rbe_host {

template <int N>
void load_matrices(Where where, unsigned (&fragment)[N], const void* row, bool transposed) {
  static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4 matrices");
  struct Operands {
    const unsigned short* row;
    unsigned* fragment;
    int id;
  } mine{static_cast<const unsigned short*>(row), fragment, block.current->id};
  warp_operation(where, 0xffffffffu, &mine, [where, transposed](void** lanes, unsigned) {
    for (int i = 0; i < 8 * N; ++i) {
      Operands* o = static_cast<Operands*>(lanes[i]);
      if (!is_shared(o->row, 16) || reinterpret_cast<uintptr_t>(o->row) % 16) {
        RBE_FAIL("thread %d: ldmatrix in %s:%d needs a 16-byte aligned row in shared memory", o->id, where.file,
                 where.line);
      }
    }
    for (int m = 0; m < N; ++m) {
      auto at = [&](int r, int c) { return unsigned(static_cast<Operands*>(lanes[8 * m + r])->row[c]); };
      for (int i = 0; i < LANES; ++i) {
        int g = i / 4, t = 2 * (i % 4);
        static_cast<Operands*>(lanes[i])->fragment[m] =
            transposed ? at(t, g) | at(t + 1, g) << 16 : at(g, t) | at(g, t + 1) << 16;
      }
    }
  });
}

using Value = float (*)(unsigned short);

// c (16 x 8) += a (16 x 16) b (16 x 8), each lane bringing its fragments.
inline void multiply_tiles(Where where, float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], Value value) {
  struct Operands {
    float* c;
    const unsigned *a, *b;
  } mine{c, a, b};
  warp_operation(where, 0xffffffffu, &mine, [value](void** lanes, unsigned) {
    float full_a[16][16], full_b[16][8];
    for (int i = 0; i < LANES; ++i) {
      const Operands* o = static_cast<Operands*>(lanes[i]);
      int g = i / 4, t = 2 * (i % 4);
      for (int half = 0; half < 2; ++half) {
        for (int r = 0; r < 4; ++r) {
          full_a[g + 8 * (r % 2)][t + 8 * (r / 2) + half] = value(static_cast<unsigned short>(o->a[r] >> 16 * half));
        }
        for (int r = 0; r < 2; ++r) {
          full_b[t + 8 * r + half][g] = value(static_cast<unsigned short>(o->b[r] >> 16 * half));
        }
      }
    }
    for (int i = 0; i < LANES; ++i) {
      float* out = static_cast<Operands*>(lanes[i])->c;
      for (int r = 0; r < 4; ++r) {
        int row = i / 4 + 8 * (r / 2), col = 2 * (i % 4) + r % 2;
        float sum = 0.0f;
        for (int k = 0; k < 16; ++k) sum += full_a[row][k] * full_b[k][col];
        out[r] += sum;
      }
    }
  });
}

// d = c + a b of int8, a: (16, 32), b: (32, 8), each lane bringing its fragments; sums modulo 2^32.
inline void multiply_bytes(Where where, int (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const int (&c)[4]) {
  struct Operands {
    int* d;
    const unsigned *a, *b;
    const int* c;
  } mine{d, a, b, c};
  warp_operation(where, 0xffffffffu, &mine, [](void** lanes, unsigned) {
    int full_a[16][32], full_b[32][8];
    for (int i = 0; i < LANES; ++i) {
      const Operands* o = static_cast<Operands*>(lanes[i]);
      int g = i / 4, t = 4 * (i % 4);
      for (int byte = 0; byte < 4; ++byte) {
        for (int r = 0; r < 4; ++r) {
          full_a[g + 8 * (r % 2)][t + 16 * (r / 2) + byte] = static_cast<signed char>(o->a[r] >> 8 * byte);
        }
        for (int r = 0; r < 2; ++r) full_b[t + 16 * r + byte][g] = static_cast<signed char>(o->b[r] >> 8 * byte);
      }
    }
    for (int i = 0; i < LANES; ++i) {
      Operands* o = static_cast<Operands*>(lanes[i]);
      for (int r = 0; r < 4; ++r) {
        int row = i / 4 + 8 * (r / 2), col = 2 * (i % 4) + r % 2;
        unsigned sum = static_cast<unsigned>(o->c[r]);
        for (int k = 0; k < 32; ++k) sum += static_cast<unsigned>(full_a[row][k] * full_b[k][col]);
        o->d[r] = static_cast<int>(sum);
      }
    }
  });
}

}  // namespace rbe_host

template <int N>
void ldmatrix(unsigned (&fragment)[N], const void* row, RBE_HERE) {
  rbe_host::load_matrices<N>({file, line}, fragment, row, false);
}

template <int N>
void ldmatrix_transposed(unsigned (&fragment)[N], const void* row, RBE_HERE) {
  rbe_host::load_matrices<N>({file, line}, fragment, row, true);
}

inline void mma_16x8x16_f16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], RBE_HERE) {
  rbe_host::multiply_tiles({file, line}, c, a, b, &f16_value);
}

inline void mma_16x8x16_bf16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], RBE_HERE) {
  rbe_host::multiply_tiles({file, line}, c, a, b, &rbe_bf16_value);
}

inline void mma_16x8x32_s8(int (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const int (&c)[4], RBE_HERE) {
  rbe_host::multiply_bytes({file, line}, d, a, b, c);
}

// The first quarter of those fragments: of a 8 rows, of both 16 values of k.
inline void mma_8x8x16_s8(int& d0, int& d1, unsigned a, unsigned b, int c0, int c1, RBE_HERE) {
  int sums[4] = {c0, c1, 0, 0};
  const unsigned rows[4] = {a, 0, 0, 0}, cols[2] = {b, 0};
  rbe_host::multiply_bytes({file, line}, sums, rows, cols, sums);
  d0 = sums[0];
  d1 = sums[1];
}

#include "wgmma.hpp"

// --- entry points ------------------------------------------------------------------------------------------

namespace rbe_host {

template <class T>
constexpr const char* type_code() {
  if constexpr (std::is_pointer_v<T>) return "P";
  else if constexpr (std::is_same_v<T, float>) return "f4";
  else if constexpr (std::is_same_v<T, int>) return "i4";
  else if constexpr (std::is_same_v<T, unsigned>) return "u4";
  else if constexpr (std::is_same_v<T, long long>) return "i8";
  else if constexpr (std::is_same_v<T, unsigned long long>) return "u8";
  else static_assert(!sizeof(T), "a kernel's parameters are pointers, float, int, u32, i64 or u64");
}

// A kernel called with pointers to its arguments, as a driver does.
template <auto F>
struct Call;
template <class... A, void (*F)(A...)>
struct Call<F> {
  template <size_t... I>
  static void with(void* const* args, std::index_sequence<I...>) {
    F(*static_cast<std::remove_const_t<A>*>(args[I])...);
  }
  static void run(void* const* args) { with(args, std::index_sequence_for<A...>()); }
  static const char* parameters() {
    static char text[8 * sizeof...(A) + 1] = "";
    if (!text[0]) ((strcat(text, type_code<A>()), strcat(text, " ")), ...);
    return text;
  }
};

struct Entry {
  const char* name;
  Body body;
  const char* parameters;
  int bounds;  // threads of a block, __launch_bounds__
};

}  // namespace rbe_host

#define RBE_ENTRY(name, bounds) {#name, &rbe_host::Call<&name>::run, rbe_host::Call<&name>::parameters(), bounds}

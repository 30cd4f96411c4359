// Types, conversions between them, and what the host build replaces. Every other header includes this one.
//
// No CUDA header is needed: half types are bit patterns, and their conversions are PTX. Under RBE_HOST the same sources
// are compiled by a C++ compiler for the tests; then "device.hpp" of the host build defines the wrappers of what only a
// GPU has (barriers, shuffles, shared memory, cp.async, ldmatrix, mma.sync), with threads as fibers.
//
// A kernel is declared KERNEL(name, launch bounds)(parameters) { ... }. The text of a module on a GPU has every kernel of
// a source and compiles one (rbe_gpu/gpu/_source.py: ONE_KERNEL); the others are templates that nothing instantiates.
//
// Rules for kernels: every thread of a block reaches every barrier; every lane named by a mask reaches the
// shuffle; offsets into arrays are i64; sums are float.

#ifdef ONE_KERNEL  // CHOSEN_<name> is a comma and extern "C" for the one that is compiled
#define KERNEL_LINKAGE(...) KERNEL_SECOND(__VA_ARGS__)
#define KERNEL_SECOND(chosen, linkage, ...) linkage
#define KERNEL(name, ...) \
  KERNEL_LINKAGE(CHOSEN_##name, template <int>, ) __global__ void __launch_bounds__(__VA_ARGS__) name
#else
#define KERNEL(name, ...) extern "C" __global__ void __launch_bounds__(__VA_ARGS__) name
#endif

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

struct f16 {
  u16 bits;
};
struct bf16 {
  u16 bits;
};

constexpr int WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;
constexpr float MINUS_INF = __builtin_bit_cast(float, 0xff800000u);
constexpr float LOWEST = -3.402823466e+38f;  // the smallest finite float
constexpr float NOT_A_NUMBER = __builtin_bit_cast(float, 0x7fffffffu);

// The dtype of an array that may differ from x's (gains, biases), as the launchers pass it.
constexpr int TYPE_F32 = 0;
constexpr int TYPE_F16 = 1;
constexpr int TYPE_BF16 = 2;

#ifdef RBE_HOST
#include "device.hpp"
#else

#if __CUDA_ARCH__ < 750
#error "compute capability 7.5 or newer is needed"
#endif

// declared once: inside functions its linkage would be that of each function
extern __shared__ __align__(16) unsigned char rbe_dynamic_shared[];

// name: T*, the dynamic shared memory of the launch, 16-byte aligned
#define DYNAMIC_SHARED(T, name) T* const name = reinterpret_cast<T*>(rbe_dynamic_shared)

// On the host: an error unless p is a multiple of `bytes`.
#define CHECK_ALIGNED(p, bytes)

__device__ __forceinline__ u32 shared_address(const void* p) {
  return static_cast<u32>(__cvta_generic_to_shared(p));
}

// 1 / v to 1 ulp, in one instruction where a division takes ten and a branch: 0 where |v| is above 2^126.
__device__ __forceinline__ float reciprocal(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

// --- half types: f16 and bf16 to float and back, rounding to nearest even ---------------------------------

__device__ __forceinline__ float f16_value(u16 bits) {
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
  return v;
}

__device__ __forceinline__ u16 f16_bits(float v) {
  u16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
  return h;
}

__device__ __forceinline__ u16 bf16_bits(float v) {
#if __CUDA_ARCH__ >= 800
  u16 h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(v));
  return h;
#else
  u32 b = __float_as_uint(v);
  return v != v ? 0x7fff : static_cast<u16>((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
#endif
}

// Two f16 in a word, the lower half first.
__device__ __forceinline__ void unpack_f16(u32 word, float& low, float& high) {
  asm("{\n .reg .b16 l, h;\n mov.b32 {l, h}, %2;\n cvt.f32.f16 %0, l;\n cvt.f32.f16 %1, h;\n}"
      : "=f"(low), "=f"(high)
      : "r"(word));
}

__device__ __forceinline__ u32 pack_f16(float low, float high) {
#if __CUDA_ARCH__ >= 800
  u32 word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return f16_bits(low) | static_cast<u32>(f16_bits(high)) << 16;
#endif
}

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
#if __CUDA_ARCH__ >= 800
  u32 word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return bf16_bits(low) | static_cast<u32>(bf16_bits(high)) << 16;
#endif
}

// Two f16 at once, each result rounded once.
__device__ __forceinline__ u32 add_f16x2(u32 a, u32 b) {
  u32 sum;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
}
__device__ __forceinline__ u32 mul_f16x2(u32 a, u32 b) {
  u32 product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}
__device__ __forceinline__ u32 fma_f16x2(u32 a, u32 b, u32 c) {
  u32 sum;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
}
// a where it lies in -limit ... limit, else the nearer of both
__device__ __forceinline__ u32 clamp_f16x2(u32 a, u32 limit) {
#if __CUDA_ARCH__ >= 800
  asm("min.f16x2 %0, %0, %1;" : "+r"(a) : "r"(limit));
  asm("max.f16x2 %0, %0, %1;" : "+r"(a) : "r"(limit ^ 0x80008000u));
  return a;
#else
  float low, high, low_limit, high_limit;
  unpack_f16(a, low, high);
  unpack_f16(limit, low_limit, high_limit);
  return pack_f16(fminf(fmaxf(low, -low_limit), low_limit), fminf(fmaxf(high, -high_limit), high_limit));
#endif
}

#endif  // RBE_HOST

// --- conversions -------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float v) { return v; }

__device__ __forceinline__ float to_float(f16 h) { return f16_value(h.bits); }

__device__ __forceinline__ float to_float(bf16 h) { return __uint_as_float(static_cast<u32>(h.bits) << 16); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float v) {
  return {f16_bits(v)};
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float v) {
  return {bf16_bits(v)};
}

// Exact, subnormal values included: a plain conversion takes them for 0 under -ftz=true.
__device__ __forceinline__ double to_double(float v) {
  u32 bits = __float_as_uint(v);
  if (bits & 0x7f800000u) return v;
  double magnitude = static_cast<double>(bits & 0x7fffffu) * 0x1p-149;
  return bits >> 31 ? -magnitude : magnitude;
}

// Two values of T (f16 or bf16) in a word, the lower half first.
template <class T>
__device__ __forceinline__ void unpack(u32 word, float& low, float& high);
template <>
__device__ __forceinline__ void unpack<f16>(u32 word, float& low, float& high) {
  unpack_f16(word, low, high);
}
template <>
__device__ __forceinline__ void unpack<bf16>(u32 word, float& low, float& high) {
  low = __uint_as_float(word << 16);
  high = __uint_as_float(word & 0xffff0000u);
}

template <class T>
__device__ __forceinline__ u32 pack(float low, float high);
template <>
__device__ __forceinline__ u32 pack<f16>(float low, float high) {
  return pack_f16(low, high);
}
template <>
__device__ __forceinline__ u32 pack<bf16>(float low, float high) {
  return pack_bf16(low, high);
}

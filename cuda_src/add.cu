// y[i] = x[i] + residual[i].
//
// Arrays     x, residual, out: (count) T; out may be either
// Ownership  a thread has a chunk of 16 bytes, or one element (_single)
// Launch     blocks of 256 threads, chunks in strides of the grid
// Shared     none
// Bytes      reads x and residual once, writes out once: 3 sizeof(T) per element
// Accuracy   one sum in float, rounded to T
#include "elementwise.cuh"
#include "add_params.h"

template <class T, int VEC>
__device__ __forceinline__ void add(const AddParams& p) {
  const T* x = static_cast<const T*>(p.x);
  const T* residual = static_cast<const T*>(p.residual);
  T* out = static_cast<T*>(p.out);
  i64 count = p.count;
  for (i64 chunk = first_chunk(); chunk * VEC < count; chunk += chunk_stride()) {
    i64 at = chunk * VEC;
    if (at + VEC > count) {  // the last elements
      for (; at < count; ++at) out[at] = from_float<T>(to_float(x[at]) + to_float(residual[at]));
      return;
    }
    float v[VEC], r[VEC];
    load<VEC>(x + at, v);
    load<VEC>(residual + at, r);
#pragma unroll
    for (int i = 0; i < VEC; ++i) v[i] += r[i];
    store<VEC>(out + at, v);
  }
}

#define ENTRY(name, T, VEC) \
  KERNEL(name, 256)(AddParams_PARAMETERS) { \
    const AddParams p = AddParams_VALUES; \
    add<T, VEC>(p); \
  }
#define ENTRIES(type, T) \
  ENTRY(add_##type, T, VECTOR<T>) \
  ENTRY(add_##type##_single, T, 1)

ENTRIES(f32, float)
ENTRIES(f16, f16)
ENTRIES(bf16, bf16)

// Arrays taken as one run of elements, in chunks of VEC: VECTOR<T> where all arrays are 16-byte aligned and rows,
// where they matter, are a multiple of it; else 1. Chunks in strides of the grid.
#include "division.cuh"
#include "vector_io.cuh"
#include "elementwise_params.h"

__device__ __forceinline__ i64 first_chunk() {
  return static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ __forceinline__ i64 chunk_stride() { return static_cast<i64>(gridDim.x) * blockDim.x; }

// out[i] = f(x[i] + bias[i % cols]) for i < count; bias may be null, then count need be no multiple of VEC.
template <class T, int VEC, class F>
__device__ __forceinline__ void map_elements(const ElementwiseParams& p, F f) {
  const T* x = static_cast<const T*>(p.x);
  T* out = static_cast<T*>(p.out);
  for (i64 chunk = first_chunk(); chunk * VEC < p.count; chunk += chunk_stride()) {
    i64 at = chunk * VEC;
    if (at + VEC > p.count) {  // the last elements of an array without rows
      for (; at < p.count; ++at) out[at] = from_float<T>(f(to_float(x[at])));
      return;
    }
    float v[VEC];
    load<VEC>(x + at, v);
    if (p.bias) {
      float b[VEC];
      load_vector<VEC, T>(p.bias, p.bias_type, at - quotient(chunk, p.by_cols) * p.cols, b);
#pragma unroll
      for (int i = 0; i < VEC; ++i) v[i] += b[i];
    }
#pragma unroll
    for (int i = 0; i < VEC; ++i) v[i] = f(v[i]);
    store<VEC>(out + at, v);
  }
}

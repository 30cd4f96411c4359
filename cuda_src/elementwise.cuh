// Arrays taken as one run of elements, in chunks of VEC: VECTOR<T> where all arrays are 16-byte aligned and rows,
// where they matter, are a multiple of it; else 1. Chunks in strides of the grid.
#include "vector_io.cuh"

// The divisor d as a product: n / d = high(n * factor) >> shift for n < 2^63; factor 0 stands for d = 1.
// Source: Granlund and Montgomery 1994, "Division by invariant integers using multiplication".
struct Divider {
  u64 factor;
  int shift;
  __device__ __forceinline__ i64 quotient(i64 n) const {
    return factor ? static_cast<i64>(__umul64hi(static_cast<u64>(n), factor) >> shift) : n;
  }
};

__device__ __forceinline__ i64 first_chunk() {
  return static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ __forceinline__ i64 chunk_stride() { return static_cast<i64>(gridDim.x) * blockDim.x; }

// out[i] = f(x[i] + bias[i % cols]) for i < count; bias may be null, then count need be no multiple of VEC.
// by_cols divides by the chunks of a row.
template <class T, int VEC, class F>
__device__ __forceinline__ void map_elements(const T* x, const void* bias, int bias_type, T* out, i64 count, i64 cols,
                                             Divider by_cols, F f) {
  for (i64 chunk = first_chunk(); chunk * VEC < count; chunk += chunk_stride()) {
    i64 at = chunk * VEC;
    if (at + VEC > count) {  // the last elements of an array without rows
      for (; at < count; ++at) out[at] = from_float<T>(f(to_float(x[at])));
      return;
    }
    float v[VEC];
    load<VEC>(x + at, v);
    if (bias) {
      float b[VEC];
      load_vector<VEC, T>(bias, bias_type, at - by_cols.quotient(chunk) * cols, b);
#pragma unroll
      for (int i = 0; i < VEC; ++i) v[i] += b[i];
    }
#pragma unroll
    for (int i = 0; i < VEC; ++i) v[i] = f(v[i]);
    store<VEC>(out + at, v);
  }
}

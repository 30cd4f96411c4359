// y = gate / (1 + exp(-gate)) * up, x + bias = [gate | up] along the last axis.
//
// Arrays     x: (rows, 2 cols) T, row-major: cols gates, then cols ups; out: (rows, cols) T, no memory shared with x.
//            bias: (2 cols) of bias_type, or null
// Ownership  a thread has a chunk of 16 bytes of out, or one element (_single)
// Launch     blocks of 256 threads, chunks in strides of the grid
// Shared     none
// Bytes      reads x once, writes out once: 3 sizeof(T) per element of out; the bias comes from the caches
// Accuracy   expf to 2 ulp, then five roundings, two of them of x + bias
//
// Source: Shazeer 2020, "GLU variants improve transformer".
#include "activations.cuh"
#include "elementwise.cuh"

template <class T, int VEC>
__device__ __forceinline__ void swiglu(const ElementwiseParams& p) {
  for (i64 chunk = first_chunk(); chunk * VEC < p.count; chunk += chunk_stride()) {
    i64 row = quotient(chunk, p.by_cols);
    i64 col = chunk * VEC - row * p.cols;
    const T* gates = static_cast<const T*>(p.x) + 2 * row * p.cols + col;
    float gate[VEC], up[VEC];
    load<VEC>(gates, gate);
    load<VEC>(gates + p.cols, up);
    if (p.bias) {
      float b[VEC];
      load_vector<VEC, T>(p.bias, p.bias_type, col, b);
#pragma unroll
      for (int i = 0; i < VEC; ++i) gate[i] += b[i];
      load_vector<VEC, T>(p.bias, p.bias_type, p.cols + col, b);
#pragma unroll
      for (int i = 0; i < VEC; ++i) up[i] += b[i];
    }
#pragma unroll
    for (int i = 0; i < VEC; ++i) up[i] *= Silu()(gate[i]);
    store<VEC>(static_cast<T*>(p.out) + chunk * VEC, up);
  }
}

#define ENTRY(name, T, VEC)                                                                            \
  extern "C" __global__ void __launch_bounds__(256) name(ElementwiseParams_PARAMETERS) { \
    const ElementwiseParams p = ElementwiseParams_VALUES; \
    swiglu<T, VEC>(p);                                                                                  \
  }
#define ENTRIES(type, T)                     \
  ENTRY(swiglu_##type, T, VECTOR<T>)         \
  ENTRY(swiglu_##type##_single, T, 1)

ENTRIES(f32, float)
ENTRIES(f16, f16)
ENTRIES(bf16, bf16)

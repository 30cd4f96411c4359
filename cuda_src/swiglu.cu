// y = gate / (1 + exp(-gate)) * up, x + bias = [gate | up] along the last axis.
//
// Arrays     x: (rows, 2 cols) T, row-major: cols gates, then cols ups; out: (rows, cols) T, no memory shared with x.
//            bias: (2 cols) of bias_type, or null
// Ownership  a thread has a chunk of 16 bytes of out, or one element (_single)
// Launch     blocks of 256 threads, chunks in strides of the grid
// Shared     none
// Bytes      reads x once, writes out once: 3 sizeof(T) per element of out; the bias comes from the caches
// Accuracy   expf to 2 ulp, the reciprocal to 1 ulp, then six roundings, two of them of x + bias
//
// Source: Shazeer 2020, "GLU variants improve transformer".
#include "elementwise.cuh"

// Below a gate of -87, where 1 + exp(-gate) is exp(-gate) in float and near its largest number, exp(-87) is split off and
// multiplied into up: a large or infinite up counts however small silu(gate) is. Below -174 as at -174; 0 at -Inf.
__device__ __forceinline__ float gated(float gate, float up) {
  constexpr float SPLIT = -87.0f, EXP_SPLIT = 1.6458115e-38f;  // a normal number, which -ftz=true keeps
  float t = gate < -174.0f ? -174.0f : gate;
  bool split = t < SPLIT;
  float factor = gate < LOWEST ? 0.0f : split ? EXP_SPLIT : 1.0f;
  return t * (factor * up * reciprocal((split ? 0.0f : 1.0f) + expf((split ? SPLIT : 0.0f) - t)));  // of at most 2^126
}

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
    for (int i = 0; i < VEC; ++i) up[i] = gated(gate[i], up[i]);
    store<VEC>(static_cast<T*>(p.out) + chunk * VEC, up);
  }
}

#define ENTRY(name, T, VEC) \
  KERNEL(name, 256)(ElementwiseParams_PARAMETERS) { \
    const ElementwiseParams p = ElementwiseParams_VALUES; \
    swiglu<T, VEC>(p); \
  }
#define ENTRIES(type, T) \
  ENTRY(swiglu_##type, T, VECTOR<T>) \
  ENTRY(swiglu_##type##_single, T, 1)

ENTRIES(f32, float)
ENTRIES(f16, f16)
ENTRIES(bf16, bf16)

// y = t/2 (1 + erf(t / sqrt 2)), or t/2 (1 + tanh(sqrt(2/pi) (t + 0.044715 t^3))), t = x + bias.
//
// Arrays     x, out: (rows, cols) T, row-major; out may be x. bias: (cols) of bias_type, or null
// Ownership  a thread has a chunk of 16 bytes, or one element (_single)
// Launch     blocks of 256 threads, chunks in strides of the grid
// Shared     none
// Bytes      reads x once, writes out once: 2 sizeof(T) per element; the bias comes from the caches
// Accuracy   the erf form to 6e-7 of its size + 5e-8 (activations.cuh). The tanh form is computed as
//            t / (1 + exp(-2 sqrt(2/pi) (t + 0.044715 t^3))), the same function with one exponential: expf to 2 ulp, the
//            reciprocal to 1 ulp, then four roundings.
//
// Source: Hendrycks and Gimpel 2016, "Gaussian error linear units".
#include "activations.cuh"
#include "elementwise.cuh"

#define ENTRY(name, T, VEC, Function) \
  KERNEL(name, 256)(ElementwiseParams_PARAMETERS) { \
    const ElementwiseParams p = ElementwiseParams_VALUES; \
    map_elements<T, VEC>(p, Function()); \
  }
#define ENTRIES(type, T) \
  ENTRY(gelu_##type##_erf, T, VECTOR<T>, GeluErf) \
  ENTRY(gelu_##type##_erf_single, T, 1, GeluErf) \
  ENTRY(gelu_##type##_tanh, T, VECTOR<T>, GeluTanh) \
  ENTRY(gelu_##type##_tanh_single, T, 1, GeluTanh)

ENTRIES(f32, float)
ENTRIES(f16, f16)
ENTRIES(bf16, bf16)

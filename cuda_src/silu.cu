// y = t / (1 + exp(-t)), t = x + bias.
//
// Arrays     x, out: (rows, cols) T, row-major; out may be x. bias: (cols) of bias_type, or null
// Ownership  a thread has a chunk of 16 bytes, or one element (_single)
// Launch     blocks of 256 threads, chunks in strides of the grid
// Shared     none
// Bytes      reads x once, writes out once: 2 sizeof(T) per element; the bias comes from the caches
// Accuracy   expf to 2 ulp, the reciprocal to 1 ulp, then two roundings. exp overflows to Inf from 88.7 on, so a t below
//            -88.7 gives 0; the exact value is under 3e-37 there.
//
// Source: Elfwing, Uchibe and Doya 2017, "Sigmoid-weighted linear units".
#include "activations.cuh"
#include "elementwise.cuh"

#define ENTRY(name, T, VEC) \
  KERNEL(name, 256)(ElementwiseParams_PARAMETERS) { \
    const ElementwiseParams p = ElementwiseParams_VALUES; \
    map_elements<T, VEC>(p, Silu()); \
  }
#define ENTRIES(type, T) \
  ENTRY(silu_##type, T, VECTOR<T>) \
  ENTRY(silu_##type##_single, T, 1)

ENTRIES(f32, float)
ENTRIES(f16, f16)
ENTRIES(bf16, bf16)

// Activation functions of a float. -Inf gives 0, where the formula would give NaN; NaN stays.
#include "types.cuh"

struct Relu {
  __device__ __forceinline__ float operator()(float t) const { return t < 0.0f ? 0.0f : t; }
};

// t / (1 + exp(-t)), 0 where t is below -88.7
struct Silu {
  __device__ __forceinline__ float operator()(float t) const {
    t = t < LOWEST ? LOWEST : t;
    return t / (1.0f + expf(-t));
  }
};

// t/2 (1 + erf(t / sqrt 2))
struct GeluErf {
  __device__ __forceinline__ float operator()(float t) const {
    constexpr float INVERSE_SQRT_2 = 0.70710678118654752f;
    t = t < LOWEST ? LOWEST : t;  // -Inf * 0 would be NaN
    float half = 0.5f * t;
    return fmaf(half, erff(t * INVERSE_SQRT_2), half);
  }
};

// t/2 (1 + tanh(sqrt(2/pi) (t + 0.044715 t^3))) = t / (1 + exp(-2 sqrt(2/pi) (t + 0.044715 t^3)))
struct GeluTanh {
  __device__ __forceinline__ float operator()(float t) const {
    constexpr float LINEAR = -1.5957691216057308f;  // -2 sqrt(2/pi)
    constexpr float CUBIC = -1.5957691216057308f * 0.044715f;
    t = t < LOWEST ? LOWEST : t;
    return t / (1.0f + expf(t * fmaf(t * t, CUBIC, LINEAR)));
  }
};

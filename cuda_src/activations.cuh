// Activation functions of a float. -Inf gives 0, where the formula would give NaN; NaN stays.
#include "types.cuh"

struct Relu {
  __device__ __forceinline__ float operator()(float t) const { return t < 0.0f ? 0.0f : t; }
};

// t / (1 + exp(-t)), 0 where t is below -88.7; by a quarter of the divisor, whose reciprocal is a normal number up to there
struct Silu {
  __device__ __forceinline__ float operator()(float t) const {
    t = t < LOWEST ? LOWEST : t;
    return 0.25f * t * reciprocal(fmaf(expf(-t), 0.25f, 0.25f));
  }
};

// t/2 (1 + erf(t / sqrt 2)) = t Phi(t), from Phi(-|t|) = 2^p(|t|): a polynomial p that was fitted to log2 of it up to 13.2,
// weighted by the error of t Phi(t), which stays below 6e-7 of its size + 5e-8; beyond, p goes on falling. One
// exponential, no cases, and no cancellation where t < 0, which 1 + erf has.
struct GeluErf {
  __device__ __forceinline__ float operator()(float t) const {
    constexpr float C[] = {-1.0f, -1.1511157751083374f, -0.45910751819610596f, -0.05280217155814171f,
                           0.007480853237211704f, -0.00042667065281420946f, -8.225536294048652e-05f,
                           2.2346759578795172e-05f, -2.335590806978871e-06f, 1.1853322234856023e-07f,
                           -2.390748488068084e-09f};
    t = t < LOWEST ? LOWEST : t;  // -Inf * 0 would be NaN
    float a = fabsf(t), p = C[10];
#pragma unroll
    for (int k = 9; k >= 0; --k) p = fmaf(p, a, C[k]);
    float tail = exp2f(p);
    return t * (t < 0.0f ? tail : 1.0f - tail);
  }
};

// t/2 (1 + tanh(sqrt(2/pi) (t + 0.044715 t^3))) = t / (1 + exp(-2 sqrt(2/pi) (t + 0.044715 t^3)))
struct GeluTanh {
  __device__ __forceinline__ float operator()(float t) const {
    constexpr float LINEAR = -1.5957691216057308f;  // -2 sqrt(2/pi)
    constexpr float CUBIC = -1.5957691216057308f * 0.044715f;
    t = t < LOWEST ? LOWEST : t;
    return t * reciprocal(1.0f + expf(t * fmaf(t * t, CUBIC, LINEAR)));
  }
};

// The basis functions of a block (FORMAT.md, section 6).
#include "types.cuh"

// The coordinate of a block's row or column, and the functions of it that the basis is made of.
struct Axis {
  float t, square, cos_1, cos_2;

  __device__ __forceinline__ Axis() {}
  __device__ __forceinline__ Axis(int i, int block) {
    t = fmaf(2.0f / static_cast<float>(block - 1), static_cast<float>(i), -1.0f);
    square = t * t;
    cos_1 = cospif(t);
    cos_2 = fmaf(2.0f * cos_1, cos_1, -1.0f);
  }
};

// sum_k p_k Phi_k at (x, y): the 8 functions of a matrix.
__device__ __forceinline__ float basis_value(const float (&p)[8], const Axis& x, const Axis& y) {
  float d2 = x.square + y.square;  // never 0: a block has no middle
  float sum = fmaf(p[1], d2 * rsqrtf(d2), fmaf(p[2], d2, p[0]));
  sum = fmaf(p[3], x.cos_1, fmaf(p[4], y.cos_1, sum));
  sum = fmaf(p[5], x.cos_2, fmaf(p[6], y.cos_2, sum));
  return fmaf(p[7] * x.cos_1, y.cos_1, sum);
}

// The 5 functions of vectors.
__device__ __forceinline__ float basis_value(const f16* p, const Axis& x) {
  float sum = fmaf(to_float(p[1]), fabsf(x.t), to_float(p[0]));
  return fmaf(to_float(p[2]), x.square, fmaf(to_float(p[3]), x.cos_1, fmaf(to_float(p[4]), x.cos_2, sum)));
}

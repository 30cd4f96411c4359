// Division by a number that is known at the launch.
#include "types.cuh"
#include "division_params.h"

// n / d by a product: high(n * factor) >> shift for n < 2^63; factor 0 stands for d = 1.
// Source: Granlund and Montgomery 1994, "Division by invariant integers using multiplication".
__device__ __forceinline__ i64 quotient(i64 n, const Divider& by) {
  return by.factor ? static_cast<i64>(__umul64hi(static_cast<u64>(n), by.factor) >> by.shift) : n;
}

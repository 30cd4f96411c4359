// Sums, maxima and prefix sums over the lanes of a warp and the threads of a block.
#include "types.cuh"

constexpr int MAX_WARPS = 32;  // of a block

// A team is the threads that share a row: a part of a warp (1, 2, 4, ... 32 lanes), or the whole block (a
// multiple of 32 threads). Values are float or double. Every thread of the block calls these, with equal `team`; every thread of a team
// gets the same bits. With teams of more than a warp each call has two barriers.

struct Add {
  static constexpr float IDENTITY = 0.0f;
  template <class V>
  __device__ __forceinline__ V operator()(V a, V b) const {
    return a + b;
  }
};
struct Max {  // NaN is passed over
  static constexpr float IDENTITY = MINUS_INF;
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Each v[i] reduced over the `width` (a power of two) lanes that the lane belongs to.
template <class V, class Op, int N>
__device__ __forceinline__ void warp_reduce(V (&v)[N], int width, Op op) {
  for (int offset = width >> 1; offset > 0; offset >>= 1) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = op(v[i], __shfl_xor_sync(ALL_LANES, v[i], offset));
  }
}

template <class V, class Op, int N>
__device__ __forceinline__ void team_reduce(V (&v)[N], int team, Op op) {
  if (team <= WARP) {
    warp_reduce(v, team, op);
    return;
  }
  __shared__ V partial[N][MAX_WARPS];
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  warp_reduce(v, WARP, op);
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) partial[i][warp] = v[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = lane < team / WARP ? partial[i][lane] : Op::IDENTITY;
  warp_reduce(v, WARP, op);
  __syncthreads();  // `partial` is free again
}

template <class V>
__device__ __forceinline__ V team_sum(V v, int team) {
  V one[1] = {v};
  team_reduce(one, team, Add());
  return one[0];
}

__device__ __forceinline__ float team_max(float v, int team) {
  float one[1] = {v};
  team_reduce(one, team, Max());
  return one[0];
}

__device__ __forceinline__ float warp_sum(float v) {
  float one[1] = {v};
  warp_reduce(one, WARP, Add());
  return one[0];
}

__device__ __forceinline__ float warp_max(float v) {
  float one[1] = {v};
  warp_reduce(one, WARP, Max());
  return one[0];
}

// A float sum of very many values that keeps what each addition rounds off (Knuth's two-sum).
struct LongSum {
  float high = 0.0f;
  float low = 0.0f;

  __device__ __forceinline__ void add(float v) {
    float sum = high + v;
    float from_v = sum - high;
    low += (high - (sum - from_v)) + (v - from_v);
    high = sum;
  }
  __device__ __forceinline__ void scale(float factor) {
    high *= factor;
    low *= factor;
  }
  // `low` is NaN once `high` is infinite
  __device__ __forceinline__ float value() const { return low == low ? high + low : high; }
};

// Each lane's sum of v over itself and the lanes before it.
__device__ __forceinline__ int warp_prefix(int v) {
  int lane = threadIdx.x % WARP;
#pragma unroll
  for (int step = 1; step < WARP; step <<= 1) {
    int before = __shfl_up_sync(ALL_LANES, v, step);
    if (lane >= step) v += before;
  }
  return v;
}

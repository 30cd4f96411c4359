// c[i,j] = sum_k a[i,k] b[k,j]: the wrappers around cp.async, ldmatrix and mma.sync at work. For tests.
//
// Arrays     a: (32, depth) T, depth a multiple of 8; b: (8, depth), or (depth, 8) where b_by_rows; c: (32, 8) float
// Ownership  one block of two warps, each 16 rows of c; steps of 16 along depth, the next one under way
// Shared     two stages of a (32 x 24: rows of 48 bytes) and b (8 x 24, or 16 x 8)
#include "async_copy.cuh"
#include "elementwise.cuh"
#include "mma.cuh"
#include "reduce.cuh"
#include "vector_io.cuh"

constexpr int STEP = 16;
constexpr int PITCH = 24;
constexpr int STAGE = 32 * PITCH + 8 * PITCH;  // values

template <class T>
__device__ void load_stage(T* stage, const T* a, const T* b, int depth, int k0, int b_by_rows) {
  T* tile_b = stage + 32 * PITCH;
  int thread = threadIdx.x;
  int row = thread / 2, k = 8 * (thread % 2);
  cp_async_16(stage + row * PITCH + k, a + static_cast<i64>(row) * depth + k0 + k, k0 + k < depth);
  if (thread < 16) {
    if (b_by_rows) {
      cp_async_16(tile_b + thread * 8, b + static_cast<i64>(k0 + thread) * 8, k0 + thread < depth);
    } else {
      cp_async_16(tile_b + row * PITCH + k, b + static_cast<i64>(row) * depth + k0 + k, k0 + k < depth);
    }
  }
  cp_async_commit();
}

template <class T, bool SHUFFLES>
__device__ void product(const T* a, const T* b, float* c, int depth, int b_by_rows) {
  DYNAMIC_SHARED(T, stages);
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  float sums[4] = {};
  load_stage(stages, a, b, depth, 0, b_by_rows);
  for (int k0 = 0, turn = 0; k0 < depth; k0 += STEP, turn ^= 1) {
    if (k0 + STEP < depth) {
      load_stage(stages + (turn ^ 1) * STAGE, a, b, depth, k0 + STEP, b_by_rows);
    } else {
      cp_async_commit();  // an empty group, so that one wait serves all steps
    }
    cp_async_wait<1>();
    __syncthreads();
    const T* tile_a = stages + turn * STAGE;
    const T* tile_b = tile_a + 32 * PITCH;
    u32 fragment_a[4], fragment_b[2];
    // lanes 0-7, 8-15, 16-23, 24-31 address rows 0-7 and 8-15 of k 0-7, then of k 8-15
    ldmatrix(fragment_a, tile_a + (16 * warp + lane % 16) * PITCH + 8 * (lane / 16));
    if (b_by_rows) {
      ldmatrix_transposed(fragment_b, tile_b + lane % 16 * 8);
    } else {
      ldmatrix(fragment_b, tile_b + lane % 8 * PITCH + 8 * (lane / 8 % 2));
    }
    if constexpr (SHUFFLES) {
      mma_by_shuffles<T>(sums, fragment_a, fragment_b);
    } else {
      mma_16x8x16<T>(sums, fragment_a, fragment_b);
    }
    __syncthreads();
  }
  float* out = c + (16 * warp + lane / 4) * 8 + 2 * (lane % 4);
  out[0] = sums[0];
  out[1] = sums[1];
  out[64] = sums[2];
  out[65] = sums[3];
}

#define ENTRY(name, T, SHUFFLES)                                                                               \
  extern "C" __global__ void __launch_bounds__(64) name(const T* a, const T* b, float* c, int depth, int b_by_rows) { \
    product<T, SHUFFLES>(a, b, c, depth, b_by_rows);                                                           \
  }
ENTRY(product_f16, f16, false)
ENTRY(product_bf16, bf16, false)
ENTRY(product_shuffles_f16, f16, true)
ENTRY(product_shuffles_bf16, bf16, true)

// out[t] = what thread t receives by each kind of warp operation from the lanes' values x; width 8 in the second half.
extern "C" __global__ void exchange(const float* x, float* out, int count) {
  int t = threadIdx.x;
  float v = x[t];
  out[t] = __shfl_sync(ALL_LANES, v, 5);
  out[count + t] = __shfl_xor_sync(ALL_LANES, v, 9);
  out[2 * count + t] = __shfl_up_sync(ALL_LANES, v, 3);
  out[3 * count + t] = __shfl_down_sync(ALL_LANES, v, 3);
  out[4 * count + t] = __shfl_sync(ALL_LANES, v, 5, 8);
  out[5 * count + t] = __shfl_xor_sync(ALL_LANES, v, 3, 8);
  out[6 * count + t] = __shfl_up_sync(ALL_LANES, v, 3, 8);
  out[7 * count + t] = __shfl_down_sync(ALL_LANES, v, 3, 8);
  out[8 * count + t] = static_cast<float>(__popc(__ballot_sync(ALL_LANES, v > 0.0f)));
  float half = 0.0f;
  if (t % WARP < 16) {  // a part of the warp alone
    half = __shfl_xor_sync(0xffffu, v, 1);
  }
  __syncwarp();
  out[9 * count + t] = half;
}

// out[t] = the sum and the maximum of x over the team of thread t.
extern "C" __global__ void __launch_bounds__(1024) reduce(const float* x, float* sums, float* tops) {
  int t = threadIdx.y * blockDim.x + threadIdx.x;
  sums[t] = team_sum(x[t], blockDim.x);
  tops[t] = team_max(x[t], blockDim.x);
}

// out = a as T and back, by the scalar conversions and by the packed ones (pairs).
template <class T>
__device__ void convert(const float* a, T* scalar, T* packed, float* back, int count) {
  for (int i = 2 * threadIdx.x; i < count; i += 2 * blockDim.x) {
    float pair[2] = {a[i], a[i + 1]};
    scalar[i] = from_float<T>(pair[0]);
    scalar[i + 1] = from_float<T>(pair[1]);
    store<2>(packed + i, pair);
    load<2>(packed + i, pair);
    back[i] = pair[0];
    back[i + 1] = to_float(scalar[i + 1]);
  }
}
extern "C" __global__ void convert_f16(const float* a, f16* scalar, f16* packed, float* back, int count) {
  convert<f16>(a, scalar, packed, back, count);
}
extern "C" __global__ void convert_bf16(const float* a, bf16* scalar, bf16* packed, float* back, int count) {
  convert<bf16>(a, scalar, packed, back, count);
}

// sum[0] = x[0] + x[1] + ... one by one, compensated.
extern "C" __global__ void long_sum(const float* x, float* sum, i64 count) {
  LongSum total;
  for (i64 i = 0; i < count; ++i) total.add(x[i]);
  sum[0] = total.value();
}

// out[i] = x[i] / d
extern "C" __global__ void divide(const i64* x, i64* out, i64 count, Divider_PARAMETERS) {
  const Divider by = Divider_VALUES;
  for (i64 i = 0; i < count; ++i) out[i] = quotient(x[i], by);
}

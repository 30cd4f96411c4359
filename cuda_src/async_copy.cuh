// Asynchronous copies from global to shared memory (cp.async).
#include "types.cuh"

#ifndef RBE_HOST

// 16 bytes; both addresses are multiples of 16. Where `valid` is false zeros are written and nothing is read.
// The bytes are there for this thread after cp_async_wait, for the others after a barrier behind it.
// Compute capability 7.5 has no such copy and waits at once.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid = true) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(shared) = valid ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
#endif
}

// Closes the group of the copies begun since the last commit.
__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the last GROUPS committed groups of this thread are in flight.
template <int GROUPS>
__device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
#endif
}

#endif  // RBE_HOST

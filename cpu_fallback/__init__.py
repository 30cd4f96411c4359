"""CPU kernels (Numba): one file per op, the vector intrinsics in `simd`, the compiler flags in `_jit`."""

"""CPU kernels (Numba): one file per op, vector intrinsics in `simd` and `simd_math`, compiler flags in `_jit`."""

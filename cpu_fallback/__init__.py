"""CPU kernels (Numba): one file per op, vector intrinsics in `simd` and `simd_math`, compiler flags in `_jit`."""

from . import isa as isa  # first: RBE_ISA selects what every kernel of the process is compiled for

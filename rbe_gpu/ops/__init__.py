"""The ops: validate the arguments once, then call the backend of the arrays.

Every function takes NumPy arrays, or CuPy arrays, or compressed weights of either, and runs on their device. GPU
arrays of other libraries (PyTorch, JAX) are used without a copy; the result is a CuPy array. On a GPU, kernels are
launched on CuPy's current stream, without synchronisation. Activations are C-contiguous float32, float16 or bfloat16
(`ml_dtypes.bfloat16`) arrays; accumulation is in float32 or better. `out=` receives the result and is returned; for
the elementwise ops and the norms it may be the input. `workspace=` keeps scratch memory between calls.

Wrong shapes raise a `ValueError`, wrong array types, dtypes and devices a `TypeError`, a GPU out of memory a
`MemoryError`; the messages name the fix. `rbe_gpu.reference` defines each op.
"""

from ._attention import attention
from ._checks import ACTIVATIONS
from ._elementwise import add, dropout, gelu, silu, swiglu
from ._matmul import decode, embedding, linear
from ._rope import rope
from ._rows import l2_normalize, layer_norm, mean_pool, rms_norm, softmax

__all__ = [
    "ACTIVATIONS",
    "add",
    "attention",
    "decode",
    "dropout",
    "embedding",
    "gelu",
    "l2_normalize",
    "layer_norm",
    "linear",
    "mean_pool",
    "rms_norm",
    "rope",
    "silu",
    "softmax",
    "swiglu",
]

"""The ops: validate once, then hand over to the backend of the arrays.

Every function takes NumPy arrays, or CuPy arrays, or compressed weights over either, and runs where they are; an
array of another library on a GPU (PyTorch, JAX) is taken without a copy, and the result is a CuPy array. On a GPU
work is queued on CuPy's current stream and nothing waits for it. Activations are float32, float16 or bfloat16
(`ml_dtypes.bfloat16`), C-contiguous, and sums are taken in float32 or better. `out=`
receives the result and is returned; it may be the input itself for the elementwise ops and the norms.
`workspace=` keeps scratch memory between calls.

Wrong shapes are a `ValueError`, wrong array types, dtypes and devices a `TypeError`, a GPU without room a
`MemoryError`; all name the fix.
`rbe_gpu.reference` gives each op's exact meaning.
"""

from ._attention import attention
from ._checks import ACTIVATIONS
from ._elementwise import add, dropout, gelu, silu, swiglu
from ._matmul import decode, embedding, linear
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
    "silu",
    "softmax",
    "swiglu",
]

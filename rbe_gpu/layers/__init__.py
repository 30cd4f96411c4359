"""Layers: weights, compressed or dense, with the op that runs on them.

Plain classes. A weight is a NumPy or CuPy array, an `RBEMatrix` or an `RBEVectors`; `from_dense` compresses it. Every
layer takes `out=` and `workspace=`; with both, a second call with the same shapes allocates nothing. All layers of a
model can share one `Workspace`: each takes its scratch memory under its own names, and needs it only during a call. A
workspace belongs to one thread at a time.
"""

from __future__ import annotations

from .attention import RBEAttention
from .dropout import RBEDropout
from .embedding import RBEEmbedding
from .ffn import RBEFFN
from .kv_cache import KVCache, KVLayer
from .norm import RBELayerNorm, RBERMSNorm
from .rbe_linear import RBELinear
from .rotary import RBERotary

__all__ = [
    "RBEFFN",
    "KVCache",
    "KVLayer",
    "RBEAttention",
    "RBEDropout",
    "RBEEmbedding",
    "RBELayerNorm",
    "RBELinear",
    "RBERMSNorm",
    "RBERotary",
]

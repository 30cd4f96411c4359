"""Layers: weights, compressed or dense, with the op that runs on them.

Plain classes. A weight is a NumPy array, an `RBEMatrix` or an `RBEVectors`; `from_dense` compresses it. Every
layer is called with `out=` and `workspace=`; when both are given, a second call with the same shapes
allocates nothing. One `Workspace` serves all layers of a model: each layer takes its scratch under its own
name, and gives it back when the call returns. A workspace belongs to one thread at a time.
"""

from __future__ import annotations

from .attention import RBEAttention
from .dropout import RBEDropout
from .embedding import RBEEmbedding
from .ffn import RBEFFN
from .norm import RBELayerNorm, RBERMSNorm
from .rbe_linear import RBELinear

__all__ = [
    "RBEFFN",
    "RBEAttention",
    "RBEDropout",
    "RBEEmbedding",
    "RBELayerNorm",
    "RBELinear",
    "RBERMSNorm",
]

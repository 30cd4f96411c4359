"""rbe_gpu: transformer layers on NumPy and CuPy arrays, with weights stored as RBE blocks.

>>> import rbe_gpu as rbe
>>> m = rbe.compress(weight, grade="A")      # RBEMatrix
>>> y = rbe.linear(x, m, bias)               # x W^T + b
>>> model = rbe.load("minilm.rbe.safetensors")
>>> vectors = model.embed(["first text", "second text"])
"""

from __future__ import annotations

from pathlib import Path as _Path

# In a checkout, cuda_src/, cpu_fallback/ and reports/ stand beside this folder; in a wheel, inside it.
if not (_Path(__file__).parent / "cpu_fallback").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

from .blocks import DenseCodes, ErrorReport, RBEMatrix, RBEVectors, SparseCodes, error_report
from .cache import PanelCache
from .encode import GRADES, compress
from .ops import (
    attention,
    decode,
    dropout,
    embedding,
    gelu,
    layer_norm,
    linear,
    rms_norm,
    silu,
    softmax,
    swiglu,
)
from .workspace import Workspace

__version__ = "0.1.0"

__all__ = [
    "GRADES",
    "DenseCodes",
    "ErrorReport",
    "PanelCache",
    "RBEMatrix",
    "RBEVectors",
    "SparseCodes",
    "Workspace",
    "attention",
    "compress",
    "decode",
    "dropout",
    "embedding",
    "error_report",
    "gelu",
    "layer_norm",
    "linear",
    "rms_norm",
    "silu",
    "softmax",
    "swiglu",
]

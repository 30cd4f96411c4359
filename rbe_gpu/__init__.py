"""rbe_gpu: transformer layers on NumPy and CuPy arrays, with weights stored as RBE blocks.

>>> import rbe_gpu as rbe
>>> m = rbe.compress(weight, grade="A")      # RBEMatrix
>>> y = rbe.linear(x, m, bias)               # x W^T + b
>>> model = rbe.load("minilm.rbe.safetensors")
>>> vectors = model.embed(["first text", "second text"])
"""

from __future__ import annotations

import os as _os
from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING
from typing import Any as _Any

# In a checkout, cuda_src/, cpu_fallback/ and reports/ stand beside this folder; in a wheel, inside it.
if not (_Path(__file__).parent / "cpu_fallback").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

# OpenBLAS's idle threads spin for some 25 ms, on the cores that the next kernel wants: an encoder forward on 2
# cores took 0.59 s, and 0.30 s with this. It is read when NumPy is loaded; to import NumPy first, set it outside.
_os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

from .blocks import ErrorReport, RBEMatrix, RBEVectors, error_report
from .cache import PanelCache
from .codecs import DenseCodes, GridCodes, SparseCodes
from .container import FormatError, load_file, save_file
from .encode import GRADES, compress
from .layers import (
    RBEFFN,
    RBEAttention,
    RBEDropout,
    RBEEmbedding,
    RBELayerNorm,
    RBELinear,
    RBERMSNorm,
)
from .matmul import PreparedInput, prepare_input
from .ops import (
    add,
    attention,
    decode,
    dropout,
    embedding,
    gelu,
    l2_normalize,
    layer_norm,
    linear,
    mean_pool,
    rms_norm,
    silu,
    softmax,
    swiglu,
)
from .threads import get_num_threads, set_num_threads
from .workspace import Workspace

if TYPE_CHECKING:
    from . import evaluate
    from .models.calibrate import calibrate
    from .models.compress import compress_model
    from .models.load import load
    from .transfer import to

__version__ = "0.1.0"

# Whole models need the tokenizers library; the ops and layers do not, and load without it.
_LAZY = {
    "calibrate": ".models.calibrate",
    "compress_model": ".models.compress",
    "load": ".models.load",
    "to": ".transfer",
}


def __getattr__(name: str) -> _Any:
    if name == "evaluate":  # a module: its functions are agreement, retrieval and evaluate
        return _import_module(".evaluate", __name__)
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_import_module(_LAZY[name], __name__), name)
    globals()[name] = value
    return value


__all__ = [
    "GRADES",
    "RBEFFN",
    "DenseCodes",
    "ErrorReport",
    "FormatError",
    "GridCodes",
    "PanelCache",
    "PreparedInput",
    "RBEAttention",
    "RBEDropout",
    "RBEEmbedding",
    "RBELayerNorm",
    "RBELinear",
    "RBEMatrix",
    "RBERMSNorm",
    "RBEVectors",
    "SparseCodes",
    "Workspace",
    "add",
    "attention",
    "calibrate",
    "compress",
    "compress_model",
    "decode",
    "dropout",
    "embedding",
    "error_report",
    "evaluate",
    "gelu",
    "get_num_threads",
    "l2_normalize",
    "layer_norm",
    "linear",
    "load",
    "load_file",
    "mean_pool",
    "prepare_input",
    "rms_norm",
    "save_file",
    "set_num_threads",
    "silu",
    "softmax",
    "swiglu",
    "to",
]

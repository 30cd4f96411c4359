"""rbe_gpu: transformer layers on NumPy and CuPy arrays, with weights stored as RBE blocks.

>>> import rbe_gpu as rbe
>>> m = rbe.compress(weight, grade="A")      # RBEMatrix
>>> y = rbe.linear(x, m, bias)               # x W^T + b
>>> model = rbe.load("minilm.rbe.safetensors")
>>> vectors = model.embed(["first text", "second text"])

Public names are imported when they are first used: `import rbe_gpu` alone loads neither NumPy nor Numba.
"""

from __future__ import annotations

import os as _os
from importlib import import_module as _import_module

from . import forks as _forks  # noqa: F401  notes forks from here on

# In a checkout, cuda_src/, cpu_fallback/ and reports/ stand beside this folder; in a wheel, inside it.
_here = _os.path.dirname(_os.path.abspath(__file__))
if not _os.path.isdir(_os.path.join(_here, "cpu_fallback")):
    __path__.append(_os.path.dirname(_here))

# OpenBLAS's idle threads spin for some 25 ms, on the cores that the next kernel wants: an encoder forward on 2
# cores took 0.59 s, and 0.30 s with this. It is read when NumPy is loaded; to import NumPy first, set it outside.
_os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

TYPE_CHECKING = False  # type checkers take it for true; typing itself is not needed here
if TYPE_CHECKING:
    from . import evaluate
    from .blocks import ErrorReport, RBEMatrix, RBEVectors, error_report
    from .cache import PanelCache
    from .codecs import DenseCodes, GridCodes, SparseCodes
    from .container import FormatError, load_file, save_file
    from .encode import GRADES, compress
    from .layers import (
        RBEFFN,
        KVCache,
        RBEAttention,
        RBEDropout,
        RBEEmbedding,
        RBELayerNorm,
        RBELinear,
        RBERMSNorm,
        RBERotary,
    )
    from .matmul import PreparedInput, prepare_input
    from .models.calibrate import calibrate
    from .models.compress import compress_model
    from .models.load import load
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
        rope,
        silu,
        softmax,
        swiglu,
    )
    from .profiler import Profile, profile
    from .threads import get_num_threads, set_num_threads
    from .train.distill import distill
    from .transfer import to
    from .workspace import Workspace

__version__ = "0.1.0"

# The module of each public name; `tests/test_public_names.py` compares this with the imports above.
_MODULES = {
    "blocks": "ErrorReport RBEMatrix RBEVectors error_report",
    "cache": "PanelCache",
    "codecs": "DenseCodes GridCodes SparseCodes",
    "container": "FormatError load_file save_file",
    "encode": "GRADES compress",
    "layers": "KVCache RBEAttention RBEDropout RBEEmbedding RBEFFN RBELayerNorm RBELinear RBERMSNorm RBERotary",
    "matmul": "PreparedInput prepare_input",
    "models.calibrate": "calibrate",
    "models.compress": "compress_model",
    "models.load": "load",
    "ops": "add attention decode dropout embedding gelu l2_normalize layer_norm linear mean_pool rms_norm rope "
    "silu softmax swiglu",
    "profiler": "Profile profile",
    "threads": "get_num_threads set_num_threads",
    "train.distill": "distill",
    "transfer": "to",
    "workspace": "Workspace",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    if name == "evaluate" or name in _MODULES:  # modules: rbe_gpu.evaluate.retrieval, rbe_gpu.ops.linear
        return _import_module(f".{name}", __name__)
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "GRADES",
    "RBEFFN",
    "DenseCodes",
    "ErrorReport",
    "FormatError",
    "GridCodes",
    "KVCache",
    "PanelCache",
    "PreparedInput",
    "Profile",
    "RBEAttention",
    "RBEDropout",
    "RBEEmbedding",
    "RBELayerNorm",
    "RBELinear",
    "RBEMatrix",
    "RBERMSNorm",
    "RBERotary",
    "RBEVectors",
    "SparseCodes",
    "Workspace",
    "add",
    "attention",
    "calibrate",
    "compress",
    "compress_model",
    "decode",
    "distill",
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
    "profile",
    "rms_norm",
    "rope",
    "save_file",
    "set_num_threads",
    "silu",
    "softmax",
    "swiglu",
    "to",
]

"""llama.cpp's own quantisers, through the shared libraries of `llama-cpp-python`.

Three variants, all with an importance matrix (the mean square of each column of a layer's input, over calibration
text) unless the setting says otherwise:

- a mixture (Q4_K_M, ...): `llama_model_quantize` makes the whole file and chooses a type per tensor. The word table
  gets Q8_0: llama.cpp takes it for the output layer's twin, gives it Q6_K, and rows of 384 fall back from that;
- `pure`: the same with one type for every matrix, the word table too, as far as rows allow;
- `across rows`: `ggml_quantize_chunk` on joined rows (see `gguf_file`), so that types with blocks of 256 weights show
  what they can do. Types that need an importance matrix get one of ones for the word table.

llama.cpp multiplies with activations quantised to 8 bits; here the decoded weights run in float32, which is kinder
(by 2e-4 of cosine at Q8_0).
"""

from __future__ import annotations

import ctypes
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rbe_gpu.models import corpus

from ...harness.baselines import F32, NumpyBert, gelu, layer_norm
from .gguf_file import baseline_of, name_of, package, write
from .source import WORDS, Baseline, Source

CALIBRATION_TEXTS = 256
_AT_ONCE = 32
#: mixtures that llama-quantize makes; those of `PLAIN` without an importance matrix too
MIXTURES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q4_0", "Q3_K_M", "Q2_K", "IQ2_M")
PLAIN = ("Q4_K_M",)
PURE = ("Q4_0", "IQ4_NL", "Q2_K", "IQ2_XXS")
ACROSS = (
    "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K",
    "IQ2_S", "IQ2_XXS", "IQ1_M", "IQ1_S",
)  # fmt: skip


def importance(source: Source, texts: list[str]) -> dict[str, F32]:
    """Mean square of each input column of every linear layer over the tokens of texts: weight -> (columns,) float32.

    This is what `llama-imatrix` collects.
    """
    model = NumpyBert(source.folder)
    texts = sorted(texts, key=len)
    sums: dict[str, NDArray[np.float64]] = {}
    tokens = 0
    for start in range(0, len(texts), _AT_ONCE):
        ids, lengths = source.folder.batch(texts[start : start + _AT_ONCE])
        activations: dict[str, F32] = {}
        model.hidden(ids, lengths, activations)
        real = np.arange(ids.shape[1]) < lengths[:, None]
        tokens += int(lengths.sum())
        for i in range(source.config["num_hidden_layers"]):
            for name, rows in _inputs(source, activations, i).items():
                squares = np.square(rows[real].astype(np.float64)).sum(axis=0)
                sums[name] = sums[name] + squares if name in sums else squares
    return {name: (s / tokens).astype(np.float32) for name, s in sums.items()}


def _inputs(source: Source, activations: dict[str, F32], index: int) -> dict[str, F32]:
    """What each linear weight of a layer reads, (texts, tokens, columns)."""
    at, w = f"encoder.layer.{index}.", source.tensors
    x, heads = activations[f"{index}.x"], activations[f"{index}.attended"]
    attended = heads @ w[at + "attention.output.dense.weight"].T + w[at + "attention.output.dense.bias"] + x
    norm = at + "attention.output.LayerNorm."
    attended = layer_norm(
        attended, w[norm + "weight"], w[norm + "bias"], source.config["layer_norm_eps"], out=attended
    )
    return {
        **{f"{at}attention.self.{n}.weight": x for n in ("query", "key", "value")},
        f"{at}attention.output.dense.weight": heads,
        f"{at}intermediate.dense.weight": attended,
        f"{at}output.dense.weight": gelu(activations[f"{index}.middle"]),
    }


@cache
def _ggml() -> Any:
    """llama-cpp-python's libggml-base, for the quantiser of one matrix."""
    spec = find_spec("llama_cpp")
    assert spec is not None, "asked for only where the package is installed"
    assert spec.submodule_search_locations is not None
    folder = Path(next(iter(spec.submodule_search_locations))) / "lib"
    libraries = sorted(folder.glob("*ggml-base*"))
    if not libraries:
        raise FileNotFoundError(f"{folder} has no ggml-base library; reinstall llama-cpp-python")
    library = ctypes.CDLL(str(libraries[0]))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    return library


def quantise(matrix: F32, kind: str, columns: F32 | None) -> NDArray[np.uint8]:
    """One matrix through `ggml_quantize_chunk`.

    matrix : (rows, columns) float32
    columns : the importance of each column, or None

    Returns (rows, bytes of a row) uint8.
    """
    gguf, library = package(), _ggml()
    number = gguf.GGMLQuantizationType[kind]
    if columns is None and library.ggml_quantize_requires_imatrix(int(number)):
        columns = np.ones(matrix.shape[1], np.float32)
    matrix = np.ascontiguousarray(matrix, np.float32)
    out = np.empty(gguf.quant_shape_to_byte_shape(matrix.shape, number), np.uint8)
    written = library.ggml_quantize_chunk(
        int(number),
        matrix.ctypes.data,
        out.ctypes.data,
        0,
        *matrix.shape,
        None if columns is None else np.ascontiguousarray(columns, np.float32).ctypes.data,
    )
    if written != out.nbytes:
        raise RuntimeError(f"ggml_quantize_chunk wrote {written} bytes of {kind}, needs {out.nbytes}")
    return out


@cache
def _llama() -> tuple[Any, Any]:
    """The module `llama_cpp`, its log silenced, and the log callback, which must live as long as it is set."""
    llama_cpp = import_module("llama_cpp")
    silent = llama_cpp.llama_log_callback(lambda level, message, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    return llama_cpp, silent


def mixture(dense: Path, out: Path, name: str, columns: Mapping[str, F32] | None, pure: bool = False) -> None:
    """llama.cpp's file of a mixture ("Q4_K_M") from a GGUF file, of what its weights decode to.

    columns : importance of each column by llama.cpp's names of the weights, or None

    Raises
    ------
    RuntimeError : llama.cpp refused
    """
    llama_cpp, _ = _llama()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    params.nthread = 1
    params.pure = pure
    params.allow_requantize = True
    if columns is not None:
        values = [(label.encode(), np.ascontiguousarray(c, np.float32)) for label, c in columns.items()]
        table = (llama_cpp.llama_model_imatrix_data * (len(values) + 1))()
        for row, (label, value) in zip(table, values, strict=False):
            row.name, row.size = label, value.size
            row.data = value.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = table
    failed = llama_cpp.llama_model_quantize(str(dense).encode(), str(out).encode(), ctypes.byref(params))
    if failed:
        raise RuntimeError(f"llama.cpp did not make a {name} file of {dense} (code {failed})")


def baselines(source: Source, version: str) -> Iterator[Baseline]:
    """Mixtures, pure files, and types across rows."""
    columns = importance(source, corpus.calibration(CALIBRATION_TEXTS))
    labelled = {name_of(package(), source, name): c for name, c in columns.items()}
    jobs = [
        *((name, True, False) for name in MIXTURES),
        *((name, False, False) for name in PLAIN),
        *((name, True, True) for name in PURE),
    ]
    with tempfile.TemporaryDirectory() as folder:
        dense, out = Path(folder) / "float.gguf", Path(folder) / "quantised.gguf"
        write(dense, source, {})
        for name, known, pure in jobs:
            start = time.perf_counter()
            mixture(dense, out, name, labelled if known else None, pure)
            seconds = time.perf_counter() - start
            setting = name + " pure" * pure + " without imatrix" * (not known)
            yield baseline_of(out, source, "llama.cpp", version, setting, seconds)
        for kind in ACROSS:
            start = time.perf_counter()
            types = dict.fromkeys((*source.linears, WORDS), kind)

            def across(name: str, matrix: F32, kind: str) -> NDArray[np.uint8]:
                known = columns.get(name)
                repeats = None if known is None else np.tile(known, matrix.shape[1] // known.size)
                return quantise(matrix, kind, repeats)

            write(out, source, types, across, across=True)
            seconds = time.perf_counter() - start
            yield baseline_of(out, source, "llama.cpp", version, f"{kind} across rows", seconds)

"""OpenVINO's CPU plugin, on the graph that ONNX Runtime runs: in float32, and in int8 as NNCF quantises it.

`nncf.quantize` (for transformers) measures the ranges of activations on texts, here docstrings of Python's library,
and quantises the inputs and weights of matmuls to int8, and the tables.
"""

from __future__ import annotations

import logging
import os
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from rbe_gpu.models import corpus

from ..quantizers import Source
from ..quantizers.onnx_runtime import GraphEncoder

FLOAT32, INT8 = "openvino float32", "openvino int8 (nncf)"
#: texts that NNCF measures ranges on, its own default
_SUBSET = 300


def read(graph: Path) -> Any:
    """An ONNX file as OpenVINO's model."""
    return import_module("openvino").Core().read_model(str(graph))


def quantised(model: Any, source: Source) -> Any:
    """The model in int8; takes a minute or more."""
    os.environ.setdefault("NNCF_CI", "1")  # else it reports its use over the network
    nncf = import_module("nncf")
    logging.getLogger("nncf").setLevel(logging.ERROR)
    inputs = [_inputs(source.folder.batch([text])[0]) for text in corpus.calibration(_SUBSET)]
    return nncf.quantize(
        model, nncf.Dataset(inputs), model_type=nncf.ModelType.TRANSFORMER, subset_size=_SUBSET
    )


def _inputs(ids: np.ndarray[Any, Any]) -> dict[str, Any]:
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def file_bytes(model: Any) -> int:
    """Bytes of the files that hold the model: weights (.bin) and graph (.xml)."""
    with TemporaryDirectory() as scratch:
        import_module("openvino").save_model(model, f"{scratch}/model.xml", compress_to_fp16=False)
        return sum(path.stat().st_size for path in Path(scratch).iterdir())


def encoder(model: Any, source: Source, batch_size: int, threads: int) -> GraphEncoder:
    """The model compiled for the CPU.

    Float arithmetic stays in float32: on processors with bfloat16 the plugin would take that by itself.
    """
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = import_module("openvino").Core().compile_model(model, "CPU", settings)
    return GraphEncoder(lambda inputs: np.asarray(compiled(inputs)[0]), source, batch_size)

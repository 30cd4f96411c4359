"""The encoders that people run instead of a compressed file: ONNX Runtime, OpenVINO, PyTorch, and static embeddings.

They run as their users run them, in batches of 32 texts of similar length; ONNX Runtime quantises the activations of
its int8 model with one range for the whole batch, so that its vectors depend on the batch. Bytes are those of all
files that a user needs, the tokenizer's included.

Static embeddings are model2vec's (van Dongen and Tulkens 2024): a vector for every token, the dense model's vector of
the token alone after a principal component analysis, weighted by the token's rank; a text is the mean of its tokens.
They are distilled once, and cut to the first dimensions that fit into so many bytes, as int8. Their vectors lie in
another space than the dense model's: of the measures of quality only recall compares.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from ...harness.baselines import F32, TorchBert, torch_or_none
from ...harness.row_names import BATCH
from ..quantizers import Encoder, Source, onnx_runtime
from . import openvino

ONNX, ONNX_INT8 = "onnxruntime float32", "onnxruntime dynamic int8 per channel + words"
TORCH = "pytorch float32"
STATIC = "model2vec"
STATIC_STEP = 8  # dimensions: files of nearly the same size share a model
#: what to give pip, by the first word of a provider
REQUIREMENTS = {
    "onnxruntime": "onnx onnxruntime",
    "openvino": "onnx openvino nncf",
    "pytorch": "torch",
    STATIC: "model2vec[distill,quantization]",
}


class Peer(NamedTuple):
    """An encoder of another project.

    Attributes
    ----------
    name : the provider of its rows
    nbytes : of all files that it needs
    encoder : embeds a list of texts of any length
    tool : name and version of the distribution
    same_space : whether its vectors compare with the dense model's
    """

    name: str
    nbytes: int
    encoder: Encoder
    tool: str
    same_space: bool = True


class InBatches:
    """An encoder that computes all texts of a call at once, a batch of the longest first at a time."""

    def __init__(self, encoder: Encoder, source: Source, batch_size: int = BATCH) -> None:
        self._encoder, self._tokenizer, self._batch_size = encoder, source.folder.tokenizer, batch_size

    def embed(self, texts: list[str]) -> F32:
        """Unit vectors, (len(texts), hidden_size) float32."""
        lengths = np.array([len(e.ids) for e in self._tokenizer.encode_batch(texts)])
        order = np.argsort(-lengths, kind="stable")
        parts = np.split(order, range(self._batch_size, len(order), self._batch_size))
        vectors = np.concatenate([self._encoder.embed([texts[i] for i in part]) for part in parts])
        return np.asarray(vectors[np.argsort(order)])


def dense_bytes(source: Source) -> int:
    """Bytes of the dense model: its weights and its tokenizer."""
    return source.folder.weights_file.stat().st_size + tokenizer_bytes(source)


def tokenizer_bytes(source: Source) -> int:
    """Bytes of tokenizer.json, which files without a vocabulary need beside them."""
    return (source.folder.path / "tokenizer.json").stat().st_size


def absent() -> list[str]:
    """The tools that are not installed, as in `REQUIREMENTS`."""
    modules = {
        "onnxruntime": ("onnx", "onnxruntime"),
        "openvino": ("onnx", "openvino", "nncf"),
        "pytorch": ("torch",),
        STATIC: (STATIC, "sklearn"),
    }
    return [tool for tool, names in modules.items() if any(find_spec(n) is None for n in names)]


def transformers(source: Source, threads: int) -> Iterator[Peer]:
    """ONNX Runtime and OpenVINO in float32 and in int8, and PyTorch, those of them that are installed."""
    missing, more = absent(), tokenizer_bytes(source)
    with TemporaryDirectory() as scratch:
        dense, int8 = Path(scratch) / "dense.onnx", Path(scratch) / "int8.onnx"
        if find_spec("onnx") is not None:
            import_module("onnx").save(onnx_runtime.graph(source), dense)
        if "onnxruntime" not in missing:
            tool = f"onnxruntime {version('onnxruntime')}"
            onnx_runtime.dynamic(tables=True, per_channel=True)(dense, int8)
            for name, file in ((ONNX, dense), (ONNX_INT8, int8)):
                session = onnx_runtime.Session(file, source, BATCH, threads)
                yield Peer(name, file.stat().st_size + more, session, tool)
        if "openvino" not in missing:
            tool = f"openvino {version('openvino')}"
            model = openvino.read(dense)
            for name, made in ((openvino.FLOAT32, model), (openvino.INT8, openvino.quantised(model, source))):
                encoder = openvino.encoder(made, source, BATCH, threads)
                yield Peer(name, openvino.file_bytes(made) + more, encoder, tool)
    if "pytorch" not in missing:
        torch = torch_or_none()
        batched = InBatches(TorchBert(source.folder, torch), source)
        yield Peer(TORCH, dense_bytes(source), batched, f"torch {torch.__version__}")


# --- static embeddings ----------------------------------------------------------------------------------------


class _Static:
    """A model of model2vec."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def embed(self, texts: list[str]) -> F32:
        """Unit vectors, (len(texts), dimensions) float32."""
        return np.asarray(self._model.encode(texts), np.float32)


def distil_static(folder: Path, out: Path) -> None:
    """Distil the model into static embeddings of all dimensions, float32, in the folder `out`; minutes."""
    distillation = import_module("model2vec.distill")
    distillation.distill(str(folder), pca_dims="auto", quantize_to="float32").save_pretrained(out)


def _folder_bytes(folder: Path) -> int:
    """Bytes of the files that model2vec loads: weights, tokenizer and config."""
    return sum(path.stat().st_size for path in folder.glob("*") if path.suffix in (".safetensors", ".json"))


def static(folder: Path, nbytes: int) -> Peer | None:
    """The embeddings that `distil_static` left in `folder`, as int8 with the most dimensions that fit into so many
    bytes, in steps of STATIC_STEP; None where no step does.
    """
    model = import_module(STATIC).StaticModel
    words, most = model.from_pretrained(folder).embedding.shape
    with TemporaryDirectory() as scratch:

        def cut(dimensions: int) -> tuple[Any, int]:
            made = model.from_pretrained(folder, dimensionality=dimensions, quantize_to="int8")
            made.save_pretrained(scratch)
            return made, _folder_bytes(Path(scratch))

        rest = cut(1)[1] - words + 64  # the file's header has another length with another number of digits
        dimensions = min(most, (nbytes - rest) // words // STATIC_STEP * STATIC_STEP)
        if dimensions < 1:
            return None
        made, size = cut(dimensions)
    name = f"{STATIC} int8, {dimensions} dimensions"
    return Peer(name, size, _Static(made), f"{STATIC} {version(STATIC)}", same_space=False)

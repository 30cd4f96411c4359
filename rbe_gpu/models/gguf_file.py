"""Decoder models in GGUF, llama.cpp's format: weights as float32, with the config of Hugging Face's checkpoint."""

from __future__ import annotations

import mmap
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .checkpoint import check_finite
from .gguf_config import check_keys, config_of, tensors_of
from .gguf_header import Tensor, read_header
from .gguf_tokenizer import tokenizer_json

#: types of tensors that `gguf.quants.dequantize` decodes
TYPES = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    *("TQ1_0", "TQ2_0", "MXFP4"),
)
_SMALLEST = 24  # bytes of a header without keys and tensors


class Entry(NamedTuple):
    """One array of a GGUF file; start and stop count from the file's first byte, and are those of its blocks."""

    dtype: str  # as safetensors spells it: "F32", what the blocks decode to
    shape: tuple[int, ...]
    start: int
    stop: int


class GGUFFile:
    """A decoder in a GGUF file, mapped into memory, its header checked in full. It reads as a `MappedFile`.

    Names, shapes and values of arrays are those of Hugging Face's checkpoint: rows of q and k that llama.cpp
    interleaves are put back into halves, and a Gemma's norms are w, not 1 + w. A file must not be truncated or
    rewritten in place while it is mapped.

    Parameters
    ----------
    path : the file

    Attributes
    ----------
    path : Path
    entries : dict[str, Entry] in the order of the file, such as "model.layers.0.self_attn.q_proj.weight"
    metadata : dict[str, Any] without lists of more than 4096 items, such as the vocabulary
    config : as config.json of a model folder (`gguf_config.config_of`)
    header_bytes : all before the tensors
    file_bytes : the size of the file

    Raises
    ------
    OSError
        The file cannot be opened.
    ImportError
        The gguf package is not installed.
    ValueError
        It is not a GGUF file of a supported model, or it is damaged; the message names the file and the key or
        tensor.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._gguf = _package()
        self.path = Path(path)
        where = str(self.path)
        if not stat.S_ISREG(os.stat(self.path).st_mode):
            raise ValueError(f"{where}: not a regular file")
        with open(self.path, "rb") as file:
            self.file_bytes = os.fstat(file.fileno()).st_size
            if self.file_bytes < _SMALLEST:
                raise ValueError(f"{where}: {self.file_bytes} bytes are too few for a GGUF file")
            self._map = mmap.mmap(file.fileno(), self.file_bytes, access=mmap.ACCESS_READ)
        types, blocks = self._gguf.GGMLQuantizationType, self._gguf.GGML_QUANT_SIZES
        sizes = {int(types[name]): (name, *blocks[types[name]]) for name in TYPES}
        self.header = read_header(self._map, where, sizes)
        check_keys(self.header)
        self.config = config_of(self.header)
        self._parts = tensors_of(self.header, self.config)
        self.header_bytes = self.header.data_start
        self.metadata = {
            key: value for key, value in self.header.metadata.items() if not isinstance(value, tuple)
        }
        self.entries = {}
        for name, part in self._parts.items():
            tensor = self.header.tensors[part.name]
            self.entries[name] = Entry("F32", part.shape, tensor.start, tensor.stop)
        scaling = self.config["rope_scaling"]
        if scaling is not None and scaling["rope_type"] == "factors":
            factors = self._decoded("rope_freqs.weight", self.header.tensors["rope_freqs.weight"])
            if not (factors > 0).all():
                raise ValueError(f"{where}: tensor rope_freqs.weight holds numbers that are not positive")
            scaling["factors"] = factors.tolist()

    def array(self, name: str) -> NDArray[np.float32]:
        """The array of this name, decoded: float32, C-contiguous, new on every call.

        Raises
        ------
        ValueError
            It holds NaN or Inf; the message names the tensor.
        """
        part = self._parts[name]
        a = self._decoded(part.name, self.header.tensors[part.name])
        if part.heads:  # rows of a head: (pairs, 2) -> (2, pairs)
            a = a.reshape(part.heads, -1, 2, *a.shape[1:]).swapaxes(1, 2).reshape(part.shape)
        return a - np.float32(1) if part.minus_one else a

    def _decoded(self, name: str, tensor: Tensor) -> NDArray[np.float32]:
        kind = self._gguf.GGMLQuantizationType[tensor.kind]
        stored = np.frombuffer(self._map, np.uint8, tensor.stop - tensor.start, tensor.start)
        rows = stored.reshape(*tensor.shape[:-1], -1)
        try:
            with np.errstate(all="ignore"):  # of blocks with a scale of Inf or NaN, which are refused below
                a = self._gguf.quants.dequantize(rows, kind)
        except Exception as error:  # of a type that this version of gguf does not decode
            raise ValueError(f"{self.path}: tensor {name} of type {tensor.kind}: {error}") from error
        if a.shape != tensor.shape or a.dtype != np.float32:
            raise ValueError(
                f"{self.path}: tensor {name} of type {tensor.kind} decodes to {a.dtype} {a.shape}"
            )
        check_finite(a, name, self.path)
        # float32 is a view of the file
        return np.array(a) if not a.flags.owndata or not a.flags.writeable else np.ascontiguousarray(a)


@dataclass(frozen=True)
class GGUFModel:
    """What a GGUF file holds.

    Attributes
    ----------
    file : the weights
    config : as config.json of a model folder
    tokenizer : a tokenizer.json; None: the file has no vocabulary
    chat_template : the Jinja template of a chat; None: it has none
    """

    file: GGUFFile
    config: dict[str, Any]
    tokenizer: bytes | None
    chat_template: str | None


def read_gguf(path: str | os.PathLike[str]) -> GGUFModel:
    """Read a decoder model from a GGUF file: llama (also Mistral and SmolLM2), qwen2, qwen3 or gemma3.

    Every key of the metadata is honoured, has no effect, or is refused (docs/models.md). Only the header is read;
    weights are decoded by `GGUFFile.array`.

    Raises
    ------
    OSError, ImportError, ValueError
        As `GGUFFile`.
    """
    file = GGUFFile(path)
    template = file.header.metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{file.path}: key tokenizer.chat_template is not a text, or too long a one")
    return GGUFModel(file, file.config, tokenizer_json(file.header, file.config), template)


def _package() -> Any:
    """The module gguf."""
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise ImportError("GGUF files need the gguf package; pip install 'rbe-gpu[gguf]'") from error
    return gguf

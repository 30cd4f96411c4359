"""The dense model that every quantiser gets, and what comes back from one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from rbe_gpu.models.bert import BertEncoder
from rbe_gpu.models.bert_tensors import tensor_shapes
from rbe_gpu.models.encoders import canonical_name
from rbe_gpu.models.folder import read_folder
from rbe_gpu.models.load import open_checkpoint, read_weights
from rbe_gpu.models.tokenizer import read_tokenizer

from ...harness.baselines import F32, Folder

WORDS = "embeddings.word_embeddings.weight"
POSITIONS = "embeddings.position_embeddings.weight"
TYPES = "embeddings.token_type_embeddings.weight"


class Encoder(Protocol):
    """What turns texts into sentence vectors."""

    def embed(self, texts: list[str]) -> F32:
        """Unit vectors, (len(texts), hidden_size) float32."""
        ...


@dataclass(frozen=True)
class Baseline:
    """One quantiser at one setting, its bytes, and the model that it leaves.

    Attributes
    ----------
    tool, version, setting : e.g. "bitsandbytes", "0.50.2", "nf4"
    linear_bytes : all that is stored for the weights of the encoder's linear layers: codes, scales, zeros, codebooks
    weights : how many weights those layers have
    file_bytes : the whole file
    whole : the encoder with all that is in the file
    linear : the encoder with only the linear layers replaced, all else float32; None where another setting
        has the same linear layers already
    file_bytes_float32 : the whole file where what the tool leaves alone stays float32 rather than float16;
        None where the tool's own format says in which type it is stored
    tokenizer_bytes : of `file_bytes`, those of the vocabulary; 0 where the file has none
    seconds : what quantising the linear layers and the tables took, on one thread where the tool lets choose
    note : what a reader of the figures has to know
    """

    tool: str
    version: str
    setting: str
    linear_bytes: int
    weights: int
    file_bytes: int
    whole: Encoder
    linear: Encoder | None = None
    file_bytes_float32: int | None = None
    tokenizer_bytes: int = 0
    seconds: float = 0.0
    note: str = ""

    @property
    def name(self) -> str:
        """As tables and plots call it."""
        return f"{self.tool} {self.setting}"

    @property
    def bits_per_weight(self) -> float:
        """8 linear_bytes / weights."""
        return 8 * self.linear_bytes / self.weights


class Source:
    """A model folder as quantisers see it: float32 tensors by name, and an encoder over changed ones.

    Only tensors that sentence vectors depend on are here: the pooler's dense layer is left out of every file.

    Raises
    ------
    ValueError : the model is not a BERT, or does not pool by the mean
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Folder(folder)
        self.config = self.folder.config
        stored = {
            canonical_name(name): tensor for name, tensor in read_weights(open_checkpoint(folder)).items()
        }
        self.tensors: dict[str, F32] = {
            name: np.asarray(stored[name], np.float32) for name, _ in tensor_shapes(self.config)
        }
        self.linears: tuple[str, ...] = tuple(
            name
            for name, shape in tensor_shapes(self.config)
            if name.startswith("encoder.") and len(shape) == 2
        )
        self.weights = sum(self.tensors[name].size for name in self.linears)

    def encoder(self, replaced: Mapping[str, F32]) -> BertEncoder:
        """The dense encoder of this project with some tensors replaced: only weights differ.

        Raises
        ------
        KeyError : a name that the model does not have
        """
        if unknown := [name for name in replaced if name not in self.tensors]:
            raise KeyError(f"the model has no {', '.join(unknown)}")
        path = self.folder.path
        settings = read_folder(path)
        if settings.tokenizer is None:
            raise FileNotFoundError(f"{path} has no tokenizer.json")
        return BertEncoder(
            {**self.tensors, **replaced},
            self.config,
            read_tokenizer(settings.tokenizer, path / "tokenizer.json"),
            **settings.stored,
        )

    def only_linears(self, replaced: Mapping[str, F32]) -> BertEncoder:
        """The same with no more than the linear layers of `replaced`."""
        return self.encoder({name: replaced[name] for name in self.linears})

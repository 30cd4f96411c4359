"""The checkpoint that is compressed: a model folder, a GGUF file, or a bare safetensors file, mapped into memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..container import METADATA_KEY
from ..json_checks import quoted
from ..mapped import MappedFile
from .architectures import architecture, is_gguf, read_gguf_folder, read_model_folder
from .dense_modules import check_dense, tensor_names
from .folder import FolderSettings
from .gguf_file import GGUFFile
from .load import open_weights
from .stored_tokenizer import MAX_BYTES, stored_tokenizer
from .tensor_views import TensorViews
from .tokenizer import read_tokenizer

FLOATS = ("F64", "F32", "F16", "BF16")
_SHOWN = 5  # names in a note
WeightFile = MappedFile | GGUFFile | TensorViews


@dataclass(frozen=True)
class Source:
    """A mapped checkpoint.

    Attributes
    ----------
    path : the folder or file
    files : name of a tensor -> the file that contains it; of a model those that it reads
    config : what the compressed file says of the model: model_type, config and other settings; {} of a bare file
    tokenizer : as a model file holds it, or None
    notes : limitations of the result
    nbytes : of the files
    """

    path: Path
    files: Mapping[str, WeightFile]
    config: dict[str, Any]
    tokenizer: NDArray[np.uint8] | None
    notes: tuple[str, ...]
    nbytes: int

    def entry(self, name: str) -> Any:
        return self.files[name].entries[name]

    def canonical(self, name: str) -> str:
        """The model's own name of a tensor of the checkpoint; of a bare file the name itself."""
        config = self.config.get("config")
        return name if config is None else architecture(config).canonical_name(name)


def open_source(path: Path) -> Source:
    """Map a checkpoint, checked as `load` does: the result can be loaded.

    Raises
    ------
    OSError
        A file is missing.
    ValueError
        It is no checkpoint, or no supported model.
    """
    files: Mapping[str, WeightFile]
    if path.is_dir():
        settings = read_model_folder(path)
        made = architecture(settings.config)
        made.check_config(settings.config)
        made.check_stored({"config": settings.config, **settings.stored}, path)
        files = open_weights(settings, FLOATS, read_only=True)
        return _model(path, settings, files, settings.weights / "tokenizer.json")
    if path.is_file() and is_gguf(path):
        settings, weights = read_gguf_folder(path)
        architecture(settings.config).check_stored({"config": settings.config, **settings.stored}, path)
        return _model(path, settings, dict.fromkeys(weights.entries, weights), path)
    file = MappedFile(path, read_only=True)
    if METADATA_KEY in file.metadata:
        raise ValueError(f"{path} is compressed already; compress the checkpoint that it was made from")
    return Source(path, dict.fromkeys(file.entries, file), {}, None, (), file.file_bytes)


def _model(
    path: Path, settings: FolderSettings, files: Mapping[str, WeightFile], tokenizer_path: Path
) -> Source:
    config = settings.config
    made = architecture(config)
    made.check_tensors({name: tuple(file.entries[name].shape) for name, file in files.items()}, config)
    model = {"model_type": config.get("model_type"), "config": config, **settings.stored}
    files, unread = _split(files, settings)
    tokenizer, notes = None, []
    if unread:
        notes.append(f"left out, because the model does not read them: {_listed(unread)}")
    text = settings.tokenizer
    if text is not None:
        if len(text) > MAX_BYTES:
            raise ValueError(
                f"{tokenizer_path} has {len(text)} bytes; a model file holds {MAX_BYTES} at most"
            )
        read_tokenizer(text, tokenizer_path)
        try:
            tokenizer = stored_tokenizer(text)
        except ValueError as error:
            raise ValueError(f"{tokenizer_path}: {error}; remove added tokens that no text has") from None
    else:
        notes.append(f"{path} has no tokenizer.json: the result can run on token ids, but not on text")
    nbytes = sum(file.file_bytes for file in {f.path: f for f in files.values()}.values())
    return Source(path, files, model, tokenizer, tuple(notes), nbytes)


def _split(
    files: Mapping[str, WeightFile], settings: FolderSettings
) -> tuple[dict[str, WeightFile], list[str]]:
    """The tensors that the model reads, and the names of other weights: those of poolers and heads."""
    made = architecture(settings.config)
    read = {name for name, _ in made.tensor_shapes(settings.config)}
    for i, dense in enumerate(settings.stored.get("dense", ())):
        read |= tensor_names(check_dense(dense), i).keys()
    used = {name: file for name, file in files.items() if made.canonical_name(name) in read}
    others = files.keys() - used.keys()
    return used, sorted(name for name in others if files[name].entries[name].dtype in FLOATS)


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(quoted, names[:_SHOWN]))
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown

"""load: a model from a folder, a compressed file or the Hugging Face Hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..container import load_file
from ..json_checks import quoted
from ..mapped import MappedFile
from .architectures import (
    Architecture,
    Model,
    architecture,
    embeds,
    encodes,
    generates,
    is_gguf,
    read_gguf_folder,
    read_model_folder,
)
from .bert import DTYPES, BertEncoder
from .checkpoint import FLOATS, check_finite, check_names
from .decoder import Decoder
from .dense_modules import PREFIX, check_dense, check_tensors, tensor_names
from .folder import FolderSettings
from .json_files import present, read_json
from .locate import find_model
from .settings import shown
from .stored_tokenizer import take_tokenizer
from .tensor_views import Part, TensorFile, TensorViews
from .text_embedder import TextEmbedder
from .tokenizer import check_ids, read_tokenizer


def load(
    source: str | Path, cache_bytes: int = 0, dtype: str = "float32", activations: str | None = None
) -> Model:
    """Load a model.

    Parameters
    ----------
    source : one of
        a folder with config.json and model.safetensors (single or sharded; float32, float16 or bfloat16),
        tokenizer.json, and the files of sentence-transformers if present; weights stay memory-mapped;
        a decoder in GGUF (`pip install rbe-gpu[gguf]`), whose weights are decoded to float32;
        a `.rbe.safetensors` file written by `rbe-gpu compress`;
        a model of the Hugging Face Hub, such as "hf://sentence-transformers/all-MiniLM-L6-v2", with "@REVISION"
        behind it to pin one (`pip install rbe-gpu[hub]`). No other name is looked up on the network.
    cache_bytes : memory for decoded panels of compressed weights; 0: none are cached. See `BertEncoder`.
    dtype : of the hidden states (and of dense weights, if it is a half type): "float32", "float16" or "bfloat16"
    activations : "int8" rounds the inputs of all linear layers to int8 (`rbe_gpu.linear`), which needs compressed
        weights; "float" of none; None of those that a calibrated file names, because they lose little by it

    Returns
    -------
    BertEncoder, Decoder or, of a decoder that makes vectors of texts, DecoderEmbedder

    Raises
    ------
    FileNotFoundError, NotADirectoryError
        There is no such file or folder, or a file is missing in the folder.
    ValueError
        The files are invalid, or the model is not supported.
    """
    path = find_model(source)
    read = load_folder if path.is_dir() else load_gguf if is_gguf(path) else load_compressed
    return read(path, cache_bytes, dtype, activations)


def load_embedder(
    source: str | Path, cache_bytes: int = 0, dtype: str = "float32", activations: str | None = None
) -> TextEmbedder:
    """`load` of a model that makes vectors of texts; a ValueError for any other."""
    return embeds(load(source, cache_bytes, dtype, activations), source)


def load_encoder(
    source: str | Path, cache_bytes: int = 0, dtype: str = "float32", activations: str | None = None
) -> BertEncoder:
    """`load` of a BERT encoder; a ValueError for any other model."""
    return encodes(load(source, cache_bytes, dtype, activations), source)


def load_decoder(
    source: str | Path, cache_bytes: int = 0, dtype: str = "float32", activations: str | None = None
) -> Decoder:
    """`load` of a model that generates text; a ValueError for any other."""
    return generates(load(source, cache_bytes, dtype, activations), source)


# --- a model folder -----------------------------------------------------------------------------------


def _int8_activations(
    made: Architecture,
    activations: str | None,
    config: Mapping[str, Any],
    tensors: Mapping[str, Any],
    measured: Any = (),
) -> dict[str, Collection[str]]:
    """`int8_activations` of a model, as the caller or else the file says; nothing for none."""
    if activations not in (None, "int8", "float"):
        raise ValueError(f'activations={activations!r}; use "int8", "float" or None')
    if not isinstance(measured, list | tuple) or not all(isinstance(name, str) for name in measured):
        raise ValueError("int8_activations is not a list of names")
    names = measured
    if activations == "int8":
        # a config may name any number of layers: no more than there are tensors for
        made.check_tensors({name: tuple(tensor.shape) for name, tensor in tensors.items()}, config)
        names = tuple(made.linear_weights(config))
    return {"int8_activations": names} if names and activations != "float" else {}


def load_folder(
    folder: Path, cache_bytes: int = 0, dtype: str = "float32", activations: str | None = None
) -> Model:
    """A dense model from a local folder, its weights memory-mapped."""
    settings = read_model_folder(folder)
    made = architecture(settings.config)
    made.check_config(settings.config)
    stored = {"config": settings.config, **settings.stored}
    made.check_stored(stored, folder)
    tokenizer = settings.tokenizer
    tensors = read_weights(open_weights(settings))
    model: Model = made.model(
        tensors,
        stored,
        None if tokenizer is None else read_tokenizer(tokenizer, settings.weights / "tokenizer.json"),
        cache_bytes,
        dtype,
        **_int8_activations(made, activations, settings.config, tensors),
    )
    return model


def read_weights(files: Mapping[str, TensorFile]) -> dict[str, np.ndarray[Any, Any]]:
    """The float tensors of files, memory-mapped.

    files : of each tensor, as of `open_checkpoint`

    Raises
    ------
    ValueError
        A weight holds NaN or Inf; the message names the tensor.
    """
    tensors = {}
    for name, file in files.items():
        if file.entries[name].dtype in FLOATS:
            tensor = file.array(name)
            check_finite(tensor, name, file.path)
            # the format allows unaligned payloads, the kernels do not
            tensors[name] = tensor if tensor.flags.aligned else tensor.copy()
    return tensors


def open_weights(
    settings: FolderSettings, floats: tuple[str, ...] = FLOATS, read_only: bool = False
) -> dict[str, MappedFile | TensorViews]:
    """The file of every tensor of a model, by name: those of the checkpoint, perhaps in parts, and of Dense modules.

    floats : as of `open_checkpoint`
    """
    made = architecture(settings.config)
    stored = open_checkpoint(
        settings.weights, floats, read_only, lambda name: made.unread(name, settings.config)
    )
    files: dict[str, MappedFile | TensorViews] = {**stored}
    parts = made.parts(stored, settings.config)
    if parts is not None:
        of_file: dict[Path, dict[str, Part]] = {}
        for name, part in parts.items():
            of_file.setdefault(stored[part.name].path, {})[name] = part
        files = {}
        for of_one in of_file.values():
            file = stored[next(iter(of_one.values())).name]
            files |= dict.fromkeys(of_one, TensorViews(file, of_one))
    dense = [check_dense(described) for described in settings.stored.get("dense", ())]
    for i, folder in enumerate(settings.dense):
        for name, file in open_checkpoint(folder, floats, read_only).items():
            here = name.replace("linear.", f"{PREFIX}{i}.", 1)
            if here not in tensor_names(dense[i], i):
                raise ValueError(
                    f"{file.path} has the tensor {name!r}, which a Dense module with these settings has not"
                )
            if here in files:
                raise ValueError(
                    f"{settings.weights} has a tensor {here!r}, which is the name of a Dense module's"
                )
            files[here] = TensorViews(file, {here: Part(name)})
    shapes = {name: file.entries[name].shape for name, file in files.items()}
    check_tensors(shapes, dense)
    return files


def open_checkpoint(
    folder: Path,
    floats: tuple[str, ...] = FLOATS,
    read_only: bool = False,
    unread: Callable[[str], bool] = lambda name: False,
) -> dict[str, MappedFile]:
    """The mapped file of every tensor of a folder, by name.

    floats : dtypes of weights that are accepted
    unread : whether a tensor of that name is no weight, and left out
    """
    files = {name: file for name, file in _files(folder, read_only) if not unread(name)}
    dtypes: dict[Path, dict[str, str]] = {}
    for name, file in files.items():
        dtypes.setdefault(file.path, {})[name] = file.entries[name].dtype
    for path, of_file in dtypes.items():
        check_names(of_file, path, floats)
    return files


def _files(folder: Path, read_only: bool) -> Iterator[tuple[str, MappedFile]]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if present(single):
        file = MappedFile(single, read_only=read_only)
        yield from dict.fromkeys(file.entries, file).items()
        return
    if not present(index):
        raise FileNotFoundError(
            f"{folder} has no model.safetensors; convert other checkpoints with the safetensors library first"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map")
    opened: dict[str, MappedFile] = {}
    for name, shard in weight_map.items():
        if (
            not isinstance(shard, str)
            or not shard
            or not shard.isprintable()
            or len(os.fsencode(shard)) > 255
            or Path(shard).name != shard
        ):
            raise ValueError(f"{index} names {shown(shard)}; shards are files of the same folder")
        if shard not in opened:
            if not present(folder / shard):
                raise FileNotFoundError(f"{folder} has no {shard}, which {index.name} names")
            opened[shard] = MappedFile(folder / shard, read_only=read_only)
        if name not in opened[shard].entries:
            raise ValueError(
                f"{folder / shard} has no tensor {quoted(name)}, which {index.name} places there"
            )
        yield name, opened[shard]


# --- a GGUF file --------------------------------------------------------------------------------------


def load_gguf(
    path: Path,
    cache_bytes: int = 0,
    dtype: str = "float32",
    activations: str | None = None,
    held: Callable[[NDArray[Any]], NDArray[Any]] = lambda tensor: tensor,
) -> Model:
    """A decoder from a GGUF file, its weights decoded to float32, or to a half type `dtype`.

    held : called with each decoded weight, returns the array that the model holds
    """
    settings, file = read_gguf_folder(path)
    made = architecture(settings.config)
    half = None if dtype == "float32" else DTYPES.get(dtype)
    tensors = {}
    for name in file.entries:
        tensor = file.array(name)
        tensors[name] = held(tensor if half is None or tensor.ndim < 2 else tensor.astype(half))
    model: Model = made.model(
        tensors,
        {"config": settings.config, **settings.stored},
        None if settings.tokenizer is None else read_tokenizer(settings.tokenizer, path),
        cache_bytes,
        dtype,
        **_int8_activations(made, activations, settings.config, tensors),
    )
    return model


# --- a compressed file --------------------------------------------------------------------------------


def load_compressed(
    path: Path, cache_bytes: int = 0, dtype: str = "float32", activations: str | None = None
) -> Model:
    """A model from a `.rbe.safetensors` file, with the tokenizer that it holds."""
    tensors, stored = load_file(path)
    config = stored.get("config") if isinstance(stored, dict) else None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds tensors but no model; read it with rbe_gpu.load_file")
    made = architecture(config)
    made.check_config(config)
    text = take_tokenizer(tensors, path)
    made.check_stored(stored, path)
    tokenizer = None if text is None else _tokenizer(*text, config)
    model: Model = made.model(
        tensors,
        stored,
        tokenizer,
        cache_bytes,
        dtype,
        **_int8_activations(made, activations, config, tensors, stored.get("int8_activations", ())),
    )
    return model


def _tokenizer(text: bytes, where: str, config: Mapping[str, Any]) -> Any:
    check_ids(text, config, where)
    return read_tokenizer(text, where)

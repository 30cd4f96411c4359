"""load: a model from a folder, a Hugging Face id or a compressed file."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from ..blocks import RBEBlocks
from ..container import load_file
from ..mapped import MappedFile
from .bert import BertEncoder, check_config

_FLOATS = ("F32", "F16", "BF16")
_MAX_TOKENIZER = 64 << 20  # bytes of tokenizer.json after decompression
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES = ("*.json", "*.safetensors", "vocab.txt")
_HUB_SKIP = ("onnx/*", "openvino/*")


class Architecture(NamedTuple):
    """How a model of one `model_type` is made.

    Attributes
    ----------
    check_config : raises a ValueError for a config.json that `model` does not support
    model : (tensors, config, tokenizer, pooling, normalize, max_seq_length, cache_bytes, dtype), as `BertEncoder`
    """

    check_config: Callable[[Mapping[str, Any]], None]
    model: Callable[..., BertEncoder]


#: by model_type of config.json
ARCHITECTURES = {"bert": Architecture(check_config, BertEncoder)}


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a config.json names."""
    model_type = config.get("model_type", "bert")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise ValueError(f"config.json has model_type {model_type!r}; supported: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[model_type]


def load(source: str | Path, cache_bytes: int = 0, dtype: str = "float32") -> BertEncoder:
    """Load a model.

    Parameters
    ----------
    source : one of
        a folder with config.json and model.safetensors (single or sharded; float32, float16 or bfloat16),
        tokenizer.json, and the files of sentence-transformers if present; weights stay memory-mapped;
        a `.rbe.safetensors` file written by `rbe-gpu compress`;
        a Hugging Face id such as "sentence-transformers/all-MiniLM-L6-v2" (`pip install rbe-gpu[hub]`).
    cache_bytes : memory for decoded panels of compressed weights; 0: none are cached. See `BertEncoder`.
    dtype : of the hidden states (and of dense weights, if it is a half type): "float32", "float16" or "bfloat16"

    Raises
    ------
    FileNotFoundError, NotADirectoryError
        There is no such file or folder, or a file is missing in the folder.
    ValueError
        The files are invalid, or the model is not supported.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return load_folder(path, cache_bytes, dtype)
    if path.is_file():
        return load_compressed(path, cache_bytes, dtype)
    name = str(source)
    if not _HUB_ID.fullmatch(name) or name.endswith((".safetensors", ".json", ".bin")):
        raise FileNotFoundError(
            f"{name} does not exist; pass a model folder, a .rbe.safetensors file or a hub id"
        )
    return load_folder(download(name), cache_bytes, dtype)


def download(name: str) -> Path:
    """The folder of a model of the Hugging Face Hub, from the local cache or the network."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(
            f"{name} is no file or folder here; to download it from the Hugging Face Hub, "
            "pip install rbe-gpu[hub]"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_SKIP))
    except Exception as error:  # the hub raises errors of several libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"{name} is no file or folder here, and downloading it from the Hugging Face Hub failed: {reason}"
        ) from error


# --- a model folder -----------------------------------------------------------------------------------


def load_folder(folder: Path, cache_bytes: int = 0, dtype: str = "float32") -> BertEncoder:
    """A dense model from a local folder, its weights memory-mapped."""
    config = read_json(folder / "config.json", "it is not a model folder")
    made = architecture(config)
    made.check_config(config)
    pooling, normalize = read_modules(folder)
    tokenizer = folder / "tokenizer.json"
    return made.model(
        read_checkpoint(folder),
        config,
        Tokenizer.from_file(str(tokenizer)) if tokenizer.is_file() else None,
        pooling,
        normalize,
        read_max_seq_length(folder, config),
        cache_bytes,
        dtype,
    )


def read_json(path: Path, missing: str = "it is needed") -> dict[str, Any]:
    """A JSON object from a file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}; {missing}")
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, needs an object")
    return value


def read_modules(folder: Path) -> tuple[dict[str, Any] | None, bool]:
    """Pooling config and normalization of modules.json. Without the file: mean pooling, normalized."""
    path = folder / "modules.json"
    if not path.is_file():
        return None, True
    try:
        modules = json.loads(path.read_text("utf-8"))
        steps = [(str(m["type"]).rpartition(".")[2], str(m["path"])) for m in modules]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a list of modules: {error!r}") from None
    pooling, normalize = None, False
    for kind, where in steps:
        if kind == "Pooling":
            pooling = read_json(folder / where / "config.json")
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise ValueError(
                f"{path} has a {kind} module; only Transformer, Pooling and Normalize are supported"
            )
    return pooling, normalize


def read_max_seq_length(folder: Path, config: dict[str, Any]) -> int:
    """Length to truncate texts to: of sentence_bert_config.json, tokenizer_config.json, or all positions."""
    positions = int(config["max_position_embeddings"])
    for file, key in (
        ("sentence_bert_config.json", "max_seq_length"),
        ("tokenizer_config.json", "model_max_length"),
    ):
        if (folder / file).is_file():
            value = read_json(folder / file).get(key)
            if isinstance(value, int | float) and value >= 1:
                return min(int(value), positions)
    return positions


def read_checkpoint(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """A folder's float tensors, memory-mapped: model.safetensors, or the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        return map_safetensors(single)
    if not index.is_file():
        raise FileNotFoundError(
            f"{folder} has no model.safetensors; checkpoints in other formats are not read (convert it with "
            "safetensors first)"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map")
    shards: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
    tensors = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{index} names {file!r}; shards are files of the same folder")
        if file not in shards:
            if not (folder / file).is_file():
                raise FileNotFoundError(f"{folder} has no {file}, which {index.name} names")
            shards[file] = map_safetensors(folder / file)
        if name in shards[file]:
            tensors[name] = shards[file][name]
    return tensors


def map_safetensors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The float32, float16 and bfloat16 tensors of a safetensors file, as views of the mapped file."""
    file = MappedFile(path)
    tensors = {}
    for name, entry in file.entries.items():
        if entry.dtype in _FLOATS:
            tensor = file.array(name)
            # the format allows unaligned payloads, the kernels do not
            tensors[name] = tensor if tensor.flags.aligned else tensor.copy()
    return tensors


# --- a compressed file --------------------------------------------------------------------------------


def load_compressed(path: Path, cache_bytes: int = 0, dtype: str = "float32") -> BertEncoder:
    """A model from a `.rbe.safetensors` file, with the tokenizer that it holds."""
    tensors, stored = load_file(path)
    config = stored.get("config") if isinstance(stored, dict) else None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds tensors but no model; read it with rbe_gpu.load_file")
    made = architecture(config)
    packed = tensors.pop("tokenizer.json.zlib", None)
    return made.model(
        tensors,
        config,
        None if packed is None else _tokenizer(packed, path),
        stored.get("pooling"),
        bool(stored.get("normalize", True)),
        stored.get("max_seq_length"),
        cache_bytes,
        dtype,
    )


def _tokenizer(packed: RBEBlocks | np.ndarray[Any, Any], path: Path) -> Any:
    """The tokenizer of a compressed file: zlib of tokenizer.json, as a uint8 array."""
    if isinstance(packed, RBEBlocks) or packed.dtype != np.uint8:
        raise ValueError(f"{path}: tokenizer.json.zlib is not an array of uint8")
    stream = zlib.decompressobj()
    try:
        text = stream.decompress(packed.tobytes(), _MAX_TOKENIZER)
    except zlib.error as error:
        raise ValueError(f"{path}: tokenizer.json.zlib is damaged: {error}") from None
    if not stream.eof:
        raise ValueError(f"{path}: tokenizer.json.zlib is cut off, or larger than {_MAX_TOKENIZER >> 20} MiB")
    try:
        return Tokenizer.from_str(text.decode("utf-8"))
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{path}: tokenizer.json.zlib holds no tokenizer: {error}") from None

"""The models that load: one `Architecture` for each `model_type`, and what load, compress and eval ask of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from . import bert_tensors, decoder_tensors, decoders, dense_modules, encoders
from .bert import BertEncoder
from .bert_config import check_config
from .decoder import Decoder
from .decoder_embedder import DecoderEmbedder
from .decoder_folder import read_decoder_folder, read_embedding_decoder
from .folder import FolderSettings, check_extra, check_pooling, read_folder, weights_folder
from .generate import sampling_of
from .gguf_file import GGUFFile, read_gguf
from .json_files import present, read_json
from .tensor_views import Part
from .text_embedder import TextEmbedder

#: what `rbe_gpu.load` returns
Model = BertEncoder | Decoder | DecoderEmbedder


class Architecture(NamedTuple):
    """How a model of one `model_type` is read and made.

    Attributes
    ----------
    check_config : raises a ValueError for a config.json that is not supported
    model : called with tensors, stored (config and the other settings, as a compressed file holds them), tokenizer,
        cache_bytes and dtype, and by name int8_activations where there are some
    check_tensors : raises a ValueError if tensors with these names and shapes are not those of a config
    check_stored : raises a ValueError for settings other than the config that are not supported; called with all
        settings, config among them, and where they are from
    linear_weights : canonical names of the weights of linear layers, of a config.json
    tensor_shapes : canonical name and shape of every tensor that is read, of a config.json
    canonical_name : of the name of a tensor in a checkpoint
    parts : of the names of a checkpoint's tensors and a config.json: what they are here (`decoder_tensors.parts_of`)
    unread : whether a tensor of a checkpoint with that name is no weight, of a config.json
    """

    check_config: Callable[[Mapping[str, Any]], object]
    model: Callable[..., Any]
    check_tensors: Callable[[Mapping[str, tuple[int, ...]], Mapping[str, Any]], object] = (
        lambda shapes, config: None
    )
    check_stored: Callable[[Mapping[str, Any], object], object] = lambda stored, where: None
    linear_weights: Callable[[Mapping[str, Any]], Iterable[str]] = lambda config: ()
    tensor_shapes: Callable[[Mapping[str, Any]], Iterable[tuple[str, tuple[int, ...]]]] = lambda config: ()
    canonical_name: Callable[[str], str] = lambda name: name
    parts: Callable[[Iterable[str], Mapping[str, Any]], dict[str, Part] | None] = lambda names, config: None
    unread: Callable[[str, Mapping[str, Any]], bool] = lambda name, config: False


_EXTRA = ("prompts", "default_prompt_name", "truncate_dim")


def _dense(stored: Mapping[str, Any], where: object) -> tuple[dense_modules.DenseSettings, ...]:
    """The settings of the Dense modules behind the pooling of a model."""
    config = stored["config"]
    names = decoders.with_llama_names if _is_decoder(config) else encoders.with_bert_names
    hidden = names(config)["hidden_size"]
    modes, _ = check_pooling(stored.get("pooling"))
    return dense_modules.check_all(stored.get("dense"), hidden * len(modes), where)


def _encoder(
    tensors: Mapping[str, Any],
    stored: Mapping[str, Any],
    tokenizer: Any,
    cache_bytes: int,
    dtype: str,
    int8_activations: Collection[str] = (),
) -> BertEncoder:
    return BertEncoder(
        tensors,
        stored["config"],
        tokenizer,
        stored.get("pooling"),
        bool(stored.get("normalize", True)),
        stored.get("max_seq_length"),
        cache_bytes,
        dtype,
        int8_activations=int8_activations,
        copy_tokenizer=False,
        dense=dense_modules.dense_modules(_dense(stored, "the model"), tensors),
        **{name: stored[name] for name in _EXTRA if name in stored},
    )


def _check_encoder(stored: Mapping[str, Any], where: object) -> None:
    check_extra(**{name: stored[name] for name in _EXTRA if name in stored}, where=where)
    check_pooling(stored.get("pooling"))
    _dense(stored, where)


def _decoder(
    tensors: Mapping[str, Any],
    stored: Mapping[str, Any],
    tokenizer: Any,
    cache_bytes: int,
    dtype: str,
    int8_activations: Collection[str] = (),
) -> Decoder | DecoderEmbedder:
    decoder = Decoder(
        tensors,
        stored["config"],
        tokenizer,
        cache_bytes,
        dtype,
        int8_activations,
        stored.get("chat_template"),
        stored.get("generation"),
        stored.get("special_tokens"),
    )
    if "pooling" not in stored:
        return decoder
    return DecoderEmbedder(
        decoder,
        stored["pooling"],
        bool(stored.get("normalize", True)),
        stored.get("max_seq_length"),
        copy_tokenizer=False,
        dense=dense_modules.dense_modules(_dense(stored, "the model"), tensors),
        **{name: stored[name] for name in _EXTRA if name in stored},
    )


def _check_decoder(stored: Mapping[str, Any], where: object) -> None:
    for name, kind, needs in (
        ("chat_template", str, "a text"),
        ("generation", Mapping, "an object"),
        ("special_tokens", Mapping, "an object"),
    ):
        if not isinstance(stored.get(name), kind | None):
            raise ValueError(f"{where} has {name}, which is not {needs}")
    special = stored.get("special_tokens") or {}
    if not all(isinstance(token, str) for token in special.values()):
        raise ValueError(f"{where} has special_tokens, which are not texts")
    sampling_of(stored.get("generation") or {}, ())
    if "pooling" in stored:
        _check_encoder(stored, where)
    elif "dense" in stored:
        raise ValueError(f"{where} has dense without pooling")
    elif not decoders.decoder_config(stored["config"]).causal:
        raise ValueError(
            f"{where} has attention in both directions (use_bidirectional_attention): such a model makes vectors of "
            "texts, and needs modules.json"
        )


_ENCODER = Architecture(
    check_config,
    _encoder,
    bert_tensors.check_tensors,
    _check_encoder,
    bert_tensors.linear_weights,
    bert_tensors.tensor_shapes,
    encoders.canonical_name,
)
_DECODER = Architecture(
    decoders.decoder_config,
    _decoder,
    decoder_tensors.check_tensors,
    _check_decoder,
    decoder_tensors.linear_weights,
    lambda config: decoder_tensors.tensor_shapes(decoders.decoder_config(config)),
    decoder_tensors.canonical_name,
    decoder_tensors.parts_of,
    decoder_tensors.is_unread,
)
#: by model_type of config.json
ARCHITECTURES = {**dict.fromkeys(encoders.ENCODERS, _ENCODER), **dict.fromkeys(decoders.DECODERS, _DECODER)}


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a config.json names.

    Raises
    ------
    ValueError : no such model is supported
    """
    model_type = config.get("model_type", "bert")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        shown_type = str(model_type)[:60]
        raise ValueError(f"config.json has model_type {shown_type!r}; supported: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[model_type]


def read_model_folder(folder: Path) -> FolderSettings:
    """Read and check all settings of a folder: of sentence-transformers, of an encoder or of a decoder.

    Raises
    ------
    FileNotFoundError
        A file is missing.
    ValueError
        A file is invalid, or a setting is not supported; the message names the file and the key.
    """
    config = read_json(weights_folder(folder) / "config.json", "it is not a model folder")
    if not _is_decoder(config) or decoders.DECODERS[config["model_type"]].encoder:
        return read_folder(folder)
    if present(folder / "modules.json"):
        return read_embedding_decoder(folder, config)
    return read_decoder_folder(folder, config)


def _is_decoder(config: Mapping[str, Any]) -> bool:
    model_type = config.get("model_type")
    return isinstance(model_type, str) and model_type in decoders.DECODERS


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF does."""
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def read_gguf_folder(path: Path) -> tuple[FolderSettings, GGUFFile]:
    """The settings of a decoder in GGUF, as of a folder, and its weights."""
    model = read_gguf(path)
    stored = {} if model.chat_template is None else {"chat_template": model.chat_template}
    decoders.decoder_config(model.config)
    return FolderSettings(path, model.config, model.tokenizer, stored), model.file


def embeds(model: Model, source: object) -> TextEmbedder:
    """A model that makes vectors of texts; a ValueError for any other."""
    if not isinstance(model, TextEmbedder):
        raise ValueError(
            f"{source} is a decoder, which makes no vectors of texts; it generates text (rbe-gpu generate)"
        )
    return model


def encodes(model: Model, source: object, what: str = "this") -> BertEncoder:
    """A BERT encoder; a ValueError for any other model. what : for the message, what it is needed for"""
    if isinstance(model, DecoderEmbedder):
        model_type = model.decoder.settings.model_type
        kind = f"a {model_type} encoder" if decoders.DECODERS[model_type].encoder else "a decoder"
        raise ValueError(f"{source} makes vectors with {kind}, which {what} does not take")
    return cast(BertEncoder, embeds(model, source))


def generates(model: Model, source: object) -> Decoder:
    """A model that generates text; a ValueError for any other."""
    if not isinstance(model, Decoder):
        raise ValueError(f"{source} generates no text; it makes vectors of texts (rbe-gpu embed)")
    return model

"""The settings of a model folder, as sentence-transformers reads them (table: `settings.FILES`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from ..json_checks import quoted
from .decoders import with_llama_names
from .dense_modules import check_dense
from .json_files import present, read_json, read_json_list, read_optional
from .settings import REFUSED_FILES, check_keys, fail, shown
from .tokenizer import tokenizer_json

#: files of the Transformer module's settings; the first that is there and not empty is read
_TRANSFORMER_FILES = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
_LIBRARY = "sentence_transformers."


@dataclass(frozen=True)
class FolderSettings:
    """What the files of a model folder say.

    Attributes
    ----------
    weights : the folder with config.json and the checkpoint: the folder itself, or that of its Transformer module
    config : config.json
    tokenizer : tokenizer.json with the settings of the other files in it (`tokenizer.tokenizer_json`), or None
    stored : all other settings, as a compressed file holds them: of an encoder pooling (1_Pooling/config.json; None
        without modules.json: the mean), normalize (whether modules.json has a Normalize module), max_seq_length
        (tokens that texts are truncated to), and what few models have, dense (2_Dense/config.json of every Dense
        module), prompts, default_prompt_name and truncate_dim; of a decoder chat_template and generation
        (generation_config.json)
    dense : the folders of the Dense modules, which hold their weights
    """

    weights: Path
    config: dict[str, Any]
    tokenizer: bytes | None
    stored: dict[str, Any] = field(default_factory=dict)
    dense: tuple[Path, ...] = ()


class TextSettings(NamedTuple):
    """What files of sentence-transformers say: as `FolderSettings`, and whether texts are lower-cased."""

    weights: Path
    stored: dict[str, Any]
    lower: bool
    dense: tuple[Path, ...]


def read_folder(folder: Path) -> FolderSettings:
    """Read and check all settings of an encoder's folder. Without modules.json: the mean, not normalised.

    Raises
    ------
    FileNotFoundError
        config.json, or a file that modules.json names, is missing.
    ValueError
        A file is invalid, or a setting is not supported; the message names the file and the key.
    """
    config = read_json(weights_folder(folder) / "config.json", "it is not a model folder")
    weights, stored, lower, dense = read_text_settings(folder, config)
    tokenizer_config = read_optional(weights / "tokenizer_config.json")
    check_keys(tokenizer_config, "tokenizer_config.json", weights / "tokenizer_config.json")
    tokenizer = tokenizer_json(weights, config, tokenizer_config, lower)
    return FolderSettings(weights, config, tokenizer, stored, dense)


def read_text_settings(folder: Path, config: dict[str, Any]) -> TextSettings:
    """The settings of a folder that are those of every text embedder; as `read_folder`."""
    for name, reason in REFUSED_FILES.items():
        if os.path.lexists(folder / name):
            raise ValueError(f"{folder / name}: {reason}")
    modules = _Modules(folder, None, False, {})
    settings: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    if present(folder / "modules.json"):
        modules = _read_modules(folder)
        for name in _TRANSFORMER_FILES:
            settings = read_optional(modules.weights / name)
            if settings:
                check_keys(settings, "sentence_bert_config.json", modules.weights / name)
                break
        extra = _read_extra(folder)
        if modules.dense:
            extra["dense"] = list(modules.dense.values())
    weights = modules.weights
    lower = settings.get("do_lower_case", False)
    if lower not in (True, False, None):
        fail(weights / "sentence_bert_config.json", "do_lower_case", lower, "true or false")
    tokenizer_config = read_optional(weights / "tokenizer_config.json")
    stored = {
        "pooling": modules.pooling,
        "normalize": modules.normalize,
        "max_seq_length": _max_seq_length(weights, config, tokenizer_config, settings),
        **extra,
    }
    return TextSettings(weights, stored, bool(lower), tuple(modules.dense))


def weights_folder(folder: Path) -> Path:
    """Where a model folder has config.json and the checkpoint: itself, or the folder of its Transformer module."""
    return _read_modules(folder).weights if present(folder / "modules.json") else folder


# --- modules.json -------------------------------------------------------------------------------------


class _Modules(NamedTuple):
    """What modules.json says.

    Attributes
    ----------
    weights : the folder of the Transformer module
    pooling : the settings of the Pooling module, or None
    normalize : whether there is a Normalize module
    dense : settings of the Dense modules by folder, in their order
    """

    weights: Path
    pooling: dict[str, Any] | None
    normalize: bool
    dense: dict[Path, dict[str, Any]]


def _read_modules(folder: Path) -> _Modules:
    path = folder / "modules.json"
    modules = read_json_list(path)
    kinds: list[str] = []
    names: set[Any] = set()
    weights, pooling, dense = folder, {}, {}
    for module in modules:
        check_keys(module, "modules.json", path)
        for name in ("type", "path"):
            if not isinstance(module.get(name), str):
                fail(path, name, module.get(name), "a text")
        if not isinstance(module.get("name", ""), str):
            fail(path, "name", module["name"], "a text")
        if module.get("name") in names:
            raise ValueError(f"{path} has two modules with the name {shown(module.get('name'))}")
        names.add(module.get("name", len(names)))
        kind = module["type"].rpartition(".")[2]
        if not module["type"].startswith(_LIBRARY):
            raise ValueError(f"{path} has the module {quoted(module['type'])}, whose code is not run")
        place = folder / _relative(module["path"], path)
        if kind == "Transformer":
            weights = place
        elif kind == "Pooling":
            pooling = read_json(place / "config.json")
            check_pooling(pooling, place / "config.json")
        elif kind == "Normalize":
            settings = read_optional(place / "config.json") if module["path"] else {}
            check_keys(settings, "2_Normalize/config.json", place / "config.json")
        elif kind == "Dense":
            if place in dense:
                raise ValueError(f"{path} has two Dense modules in {quoted(module['path'])}")
            dense[place] = read_json(place / "config.json")
            check_dense(dense[place], place / "config.json")
        elif kind != "Dropout":  # does nothing outside of training
            raise ValueError(
                f"{path} has the module {quoted(kind)}; only Transformer, Pooling, Dense, Normalize and Dropout are "
                "supported"
            )
        kinds.append(kind)
    behind = [kind for kind in kinds[2:] if kind != "Dropout"]
    ordered = (
        sorted(behind, key=("Dense", "Normalize").index) if set(behind) <= {"Dense", "Normalize"} else None
    )
    if kinds[:2] != ["Transformer", "Pooling"] or behind != ordered:
        raise ValueError(
            f"{path} has the modules {', '.join(kinds) or 'of no model'}; needs Transformer, Pooling, and then only "
            "Dense before Normalize, and Dropout"
        )
    return _Modules(weights, pooling, "Normalize" in kinds, dense)


def _relative(name: str, path: Path) -> PurePosixPath:
    windows = PureWindowsPath(name)
    if windows.anchor or ".." in windows.parts or not name.isprintable():
        fail(path, "path", name, "a folder inside the model's")
    return PurePosixPath(*windows.parts)


# --- pooling ------------------------------------------------------------------------------------------

#: key of older files -> mode, in the order of concatenation
POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
MODES = tuple(POOLING.values())


def check_pooling(pooling: Any, where: object = "the pooling config") -> tuple[tuple[str, ...], bool]:
    """The modes of a 1_Pooling/config.json, in the order of concatenation, and whether prompts are pooled too.

    ("mean",) for None, as for a file that enables no mode.
    """
    if pooling is None:
        return ("mean",), True
    if not isinstance(pooling, Mapping):
        raise ValueError(f"{where} is a {type(pooling).__name__}, expected an object")
    if not pooling:
        raise ValueError(f"{where} turns on no mode; set pooling_mode to one of {', '.join(MODES)}")
    check_keys(pooling, "1_Pooling/config.json", where)
    for name in (*POOLING, "include_prompt"):
        if type(pooling.get(name, False)) is not bool:
            fail(where, name, pooling[name], "true or false")
    if "pooling_mode" in pooling:
        value = pooling["pooling_mode"]
        modes = tuple(value) if isinstance(value, list) else (value,)
        if not modes or not all(isinstance(mode, str) and mode in MODES for mode in modes):
            fail(where, "pooling_mode", value, f"one or several of {', '.join(MODES)}")
    else:
        modes = tuple(mode for name, mode in POOLING.items() if pooling.get(name, False)) or ("mean",)
    return modes, pooling.get("include_prompt", True)


# --- lengths, prompts and dimensions ------------------------------------------------------------------


def _max_seq_length(
    weights: Path, config: Mapping[str, Any], tokenizer_config: Mapping[str, Any], settings: Mapping[str, Any]
) -> int | None:
    """The first of sentence_bert_config.json and tokenizer_config.json that names a length, within the positions."""
    positions = with_llama_names(config).get("max_position_embeddings")
    if type(positions) is not int:
        return None  # refused by the check of config.json
    for file, name, value in (
        ("sentence_bert_config.json", "max_seq_length", settings.get("max_seq_length")),
        ("tokenizer_config.json", "model_max_length", tokenizer_config.get("model_max_length")),
        ("tokenizer_config.json", "max_len", tokenizer_config.get("max_len")),
    ):
        if value is None:
            continue
        # transformers writes 1e30 for "no limit"
        if type(value) not in (int, float) or not value >= 1 or value != value // 1:
            fail(weights / file, name, value, "a positive integer")
        return int(min(value, positions))
    return positions


def _read_extra(folder: Path) -> dict[str, Any]:
    """The settings of config_sentence_transformers.json that it sets."""
    path = folder / "config_sentence_transformers.json"
    settings = read_optional(path)
    check_keys(settings, "config_sentence_transformers.json", path)
    extra = {name: settings.get(name) for name in ("prompts", "default_prompt_name", "truncate_dim")}
    prompts = check_extra(**extra, where=path)
    if not any(prompts.values()) and not extra["default_prompt_name"]:
        extra["prompts"] = None
    return {name: value for name, value in extra.items() if value is not None}


def check_extra(
    prompts: Any = None,
    default_prompt_name: Any = None,
    truncate_dim: Any = None,
    where: object = "the model",
) -> dict[str, str]:
    """The prompts of a model by name, of which "query" and "document" are always there, perhaps empty.

    Raises
    ------
    ValueError
        One of the settings is invalid.
    """
    if prompts is not None and not isinstance(prompts, Mapping):
        fail(where, "prompts", prompts, "an object of texts by name")
    checked = {"query": "", "document": ""}
    for name, text in (prompts or {}).items():
        if not isinstance(name, str) or not isinstance(text, str | None):
            fail(where, f"prompts[{shown(name)}]", text, "a text")
        checked[name] = text or ""
    if default_prompt_name is not None and default_prompt_name not in list(checked):
        fail(where, "default_prompt_name", default_prompt_name, f"one of {', '.join(map(quoted, checked))}")
    if truncate_dim is not None and (type(truncate_dim) is not int or truncate_dim < 1):
        fail(where, "truncate_dim", truncate_dim, "a positive integer")
    return checked

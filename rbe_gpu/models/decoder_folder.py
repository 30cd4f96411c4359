"""The settings of a decoder's folder, as transformers reads them (tables: `decoder_settings`)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .decoder_settings import TOKENIZER_CLASSES
from .folder import FolderSettings, read_text_settings
from .json_files import present, read_json, read_optional
from .settings import REFUSED_FILES, check_keys, fail, shown
from .tokenizer import check_ids
from .tokenizer_bounds import check_text

_TEMPLATE = "chat_template.jinja"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def read_decoder_folder(folder: Path, config: dict[str, Any]) -> FolderSettings:
    """Read and check all settings of a folder whose config.json is `config`.

    Raises
    ------
    ValueError
        A file is invalid, or a setting is not supported; the message names the file and the key.
    """
    for name, reason in REFUSED_FILES.items():
        if os.path.lexists(folder / name):
            raise ValueError(f"{folder / name}: {reason}")
    where = folder / "tokenizer_config.json"
    tokenizer_config = read_optional(where)
    check_keys(tokenizer_config, "tokenizer_config.json (decoders)", where)
    stored: dict[str, Any] = {}
    template = _chat_template(folder, tokenizer_config, where)
    if template is not None:
        special = {name: _content(tokenizer_config.get(name)) for name in _SPECIAL}
        stored["chat_template"] = template
        stored["special_tokens"] = {name: token for name, token in special.items() if isinstance(token, str)}
    path = folder / "generation_config.json"
    generation = {key: value for key, value in read_optional(path).items() if value is not None}
    check_keys(generation, path.name, path)
    if generation:
        stored["generation"] = generation
    return FolderSettings(
        folder, config, _tokenizer_json(folder, config, tokenizer_config, where), stored=stored
    )


def read_embedding_decoder(folder: Path, config: dict[str, Any]) -> FolderSettings:
    """Read and check all settings of a folder of sentence-transformers whose Transformer module is a decoder.

    Raises
    ------
    FileNotFoundError, ValueError
        As `folder.read_folder`.
    """
    weights, stored, lower, dense = read_text_settings(folder, config)
    if lower:
        raise ValueError(
            f"{weights / 'sentence_bert_config.json'} has do_lower_case=true, which decoders do not have"
        )
    settings = read_decoder_folder(weights, config)
    where = weights / "tokenizer_config.json"
    side = read_optional(where).get("truncation_side", "right")
    if side != "right":
        fail(where, "truncation_side", side, '"right"')
    return FolderSettings(weights, config, settings.tokenizer, stored, dense)


def _chat_template(folder: Path, tokenizer_config: Mapping[str, Any], where: Path) -> str | None:
    if present(folder / _TEMPLATE):
        return (folder / _TEMPLATE).read_text("utf-8")
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several by name: transformers takes the default one
        entries = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = entries[-1].get("template") if entries else None
    if not isinstance(template, str | None):
        fail(where, "chat_template", template, "a text")
    return template


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _tokenizer_json(
    folder: Path, config: Mapping[str, Any], tokenizer_config: Mapping[str, Any], where: Path
) -> bytes | None:
    """tokenizer.json as it is, with the tokens that the other file names in it."""
    path = folder / "tokenizer.json"
    if not present(path):
        return None
    name = (
        tokenizer_config.get("tokenizer_class") or config.get("tokenizer_class") or "PreTrainedTokenizerFast"
    )
    if not isinstance(name, str) or name.removesuffix("Fast") not in TOKENIZER_CLASSES:
        fail(where, "tokenizer_class", name, f"one of {', '.join(TOKENIZER_CLASSES)}")
    text = path.read_bytes()
    check_text(text, path)
    stored = read_json(path)
    check_keys(stored, "tokenizer.json", path)
    check_ids(text, config, path)
    entries = stored.get("added_tokens") or []
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("content"), str) for entry in entries
    ):
        fail(path, "added_tokens", entries, "a list of tokens")
    added = {entry["content"] for entry in entries}
    for key in (*_SPECIAL, "additional_special_tokens", "extra_special_tokens"):
        value = tokenizer_config.get(key)
        values = list(value.values()) if isinstance(value, dict) and "content" not in value else value
        for token in values if isinstance(values, list) else [values]:
            _check_added(_content(token), added, key, path.name, where)
    declared = tokenizer_config.get("added_tokens_decoder") or {}
    if not isinstance(declared, dict):
        fail(where, "added_tokens_decoder", declared, "an object of tokens by id")
    for token in declared.values():
        _check_added(_content(token), added, "added_tokens_decoder", path.name, where)
    for key, at in (("add_bos_token", 0), ("add_eos_token", -1)):
        _check_end(stored, tokenizer_config, key, at, where)
    return text


def _check_added(token: Any, added: set[str], key: str, file: str, where: Path) -> None:
    """Refuse a token at which transformers splits texts, and tokenizer.json does not."""
    if token is None:
        return
    if not isinstance(token, str):
        fail(where, key, token, "a token")
    if token not in added:
        raise ValueError(f"{where} has {key} {shown(token)}, which is not in added_tokens of {file}")


def _check_end(
    stored: Mapping[str, Any], tokenizer_config: Mapping[str, Any], key: str, at: int, where: Path
) -> None:
    """Refuse add_bos_token and add_eos_token where tokenizer.json does otherwise."""
    wanted = tokenizer_config.get(key)
    if wanted is None:
        return
    if type(wanted) is not bool:
        fail(where, key, wanted, "true or false")
    steps = _template_steps(stored.get("post_processor"))
    adds = bool(steps) and "SpecialToken" in steps[at]
    if adds is not wanted:
        fail(where, key, wanted, f"{json.dumps(adds)}, as the post_processor of tokenizer.json has it")


def _template_steps(processor: Any) -> list[Any]:
    if not isinstance(processor, dict):
        return []
    several = processor.get("processors")
    for step in several if isinstance(several, list) else ():
        steps = _template_steps(step)
        if steps:
            return steps
    single = processor.get("single")
    return [step for step in single if isinstance(step, dict)] if isinstance(single, list) else []

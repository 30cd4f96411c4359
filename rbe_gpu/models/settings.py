"""The files of a model folder, and the check of their keys.

`FILES` joins the tables of `encoder_settings` and `decoder_settings`; `docs/models.md` shows it. The readers are
those of sentence-transformers 6.2 and transformers 5.24. A key is honoured, has no effect on vectors, or is refused;
so is a key that is not listed, because it may change them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from ..json_checks import quoted
from . import decoder_settings
from .encoder_settings import (
    BERT_CONFIG,
    DENSE,
    DISTILBERT_CONFIG,
    MODULES,
    MPNET_CONFIG,
    NORMALIZE,
    POOLING,
    ROBERTA_CONFIG,
    SENTENCE_BERT,
    SENTENCE_TRANSFORMERS,
    SPECIAL_TOKENS,
    TOKENIZER,
    TOKENIZER_CONFIG,
)
from .setting_key import Key

#: file -> key -> what it does
FILES: dict[str, dict[str, Key]] = {
    "modules.json": MODULES,
    "config.json": BERT_CONFIG,
    "config.json (roberta)": ROBERTA_CONFIG,
    "config.json (mpnet)": MPNET_CONFIG,
    "config.json (distilbert)": DISTILBERT_CONFIG,
    **decoder_settings.CONFIGS,
    "generation_config.json": decoder_settings.GENERATION,
    "sentence_bert_config.json": SENTENCE_BERT,
    "config_sentence_transformers.json": SENTENCE_TRANSFORMERS,
    "1_Pooling/config.json": POOLING,
    "2_Dense/config.json": DENSE,
    "2_Normalize/config.json": NORMALIZE,
    "tokenizer.json": TOKENIZER,
    "tokenizer_config.json": TOKENIZER_CONFIG,
    "tokenizer_config.json (decoders)": decoder_settings.TOKENIZER_CONFIG,
    "special_tokens_map.json": SPECIAL_TOKENS,
}

#: files of a model folder without keys, or whose presence is what matters
OTHER_FILES = {
    "model.safetensors, model.safetensors.index.json and its shards": "the weights: float32, float16 or bfloat16",
    "vocab.txt": "where there is no tokenizer.json: the vocabulary of a BertTokenizer",
    "added_tokens.json": "its tokens must be in tokenizer.json; not read beside `added_tokens_decoder`",
    "adapter_config.json": "refused: adapters are not supported; merge them into the weights",
    "quantize_config.json, quant_config.json": "refused: the checkpoint is quantised",
    "all others": "not read",
}
REFUSED_FILES = {
    "adapter_config.json": "adapters are not supported; merge them into the weights",
    "quantize_config.json": "the checkpoint is quantised; use the weights that it was quantised from",
    "quant_config.json": "the checkpoint is quantised; use the weights that it was quantised from",
}


def config_table(config: Mapping[str, Any]) -> str:
    """The key of FILES for a config.json of a supported `model_type`."""
    model_type = str(config.get("model_type", "bert"))
    same_keys = {"bert": "", "xlm-roberta": " (roberta)", "camembert": " (roberta)"}
    return "config.json" + same_keys.get(model_type, f" ({model_type})")


def shown(value: Any) -> str:
    """A value of a file for a message: JSON, one line, short."""
    text = json.dumps(value) if not isinstance(value, str) else quoted(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def same(a: Any, b: Any) -> bool:
    """Whether two JSON values are equal, `true` and 1 being different."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def check_keys(settings: Mapping[str, Any], file: str, where: object = None) -> None:
    """Refuse keys of a file that are not listed, and values that are not supported.

    Parameters
    ----------
    file : a key of FILES
    where : the path for messages; None: `file`

    Raises
    ------
    ValueError
        It names the file, the key and its value.
    """
    keys = FILES[file]
    where = where or file
    for name, value in settings.items():
        key = keys.get(name)
        if key is None:
            if "config.json" in file and "tokenizer" not in file and name.startswith("_"):
                continue  # of transformers itself: the path it was loaded from and the like
            raise ValueError(
                f"{where} has an unknown key {quoted(name)}, which may change the results; remove it if it does not"
            )
        if key.accepted is not None and not any(same(value, accepted) for accepted in key.accepted):
            given = f"{name} {value[:60]!r}" if isinstance(value, str) else f"{name}={shown(value)}"
            raise ValueError(f"{where} has {given}: {key.effect}")


def fail(where: object, name: str, value: Any, needs: str) -> NoReturn:
    """Refuse a value: "FILE has KEY=VALUE; needs ..."."""
    raise ValueError(f"{where} has {name}={shown(value)}; needs {needs}")


# --- the table of docs/models.md ----------------------------------------------------------------------


_COLUMNS = "| file | key | vectors | |"


def table(
    files: Mapping[str, Mapping[str, Key]] = FILES,
    others: Mapping[str, str] = OTHER_FILES,
    columns: str = _COLUMNS,
) -> str:
    """Keys by file as Markdown, those with the same effect in one row.

    Parameters
    ----------
    others : files without keys, and what they are for
    columns : the first line
    """
    return "\n".join(_lines(files, others, columns))


def _lines(files: Mapping[str, Mapping[str, Key]], others: Mapping[str, str], columns: str) -> Iterator[str]:
    yield columns
    yield "|---|---|---|---|"
    for file, keys in files.items():
        rows: dict[Key, list[str]] = {}
        for name, key in keys.items():
            rows.setdefault(_hashable(key), []).append(f"`{name}`")
        for key, names in rows.items():
            yield f"| {file} | {', '.join(names)} | {_kind(key)} | {key.effect} |"
    for file, effect in others.items():
        yield f"| {file} | | | {effect} |"


def _hashable(key: Key) -> Key:
    accepted = key.accepted
    return key._replace(accepted=None if accepted is None else tuple(json.dumps(a) for a in accepted))


def _kind(key: Key) -> str:
    if key.honoured:
        return "honoured"
    return "no effect" if key.accepted is None else f"refused unless {', '.join(key.accepted)}"

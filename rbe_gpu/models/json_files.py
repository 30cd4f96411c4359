"""JSON files of a model folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NoReturn

from ..json_checks import MAX_DEPTH, FormatError, check_cost, check_tree, failure

__all__ = ["present", "read_json", "read_json_list", "read_optional"]

_TOKENIZER = "tokenizer.json"


def present(path: Path) -> bool:
    """Whether a folder has a file.

    Raises
    ------
    ValueError
        The name is there, but is a folder, a pipe or a link that leads to no file, as an incomplete download leaves
        it: what the file says is not to be ignored.
    """
    if path.is_file():
        return True
    if os.path.lexists(path):
        raise ValueError(f"{path} is not a regular file, or a link to a file that is missing")
    return False


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no value of JSON")


def _read(path: Path) -> Any:
    """The value of a file.

    Not `json_checks.parse_json`: transformers writes integers of 31 digits. The vocabulary of a multilingual
    tokenizer.json is beyond its bound on memory; `tokenizer_bounds.check_text` has another one.
    """
    try:
        text = path.read_text("utf-8")
        if path.name != _TOKENIZER:
            check_cost(text, path.stat().st_size, failure(str(path)))
        value = json.loads(text, parse_constant=_constant)
    except RecursionError:
        raise ValueError(f"{path} is not JSON: its JSON is nested too deeply") from None
    except FormatError:
        raise
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"{path} is not JSON: it is nested more than {MAX_DEPTH} deep")
        parts = (
            item.values() if type(item) is dict else item for item in level if type(item) in (dict, list)
        )
        level, depth = [child for part in parts for child in part if type(child) in (dict, list)], depth + 1
    if "\\u" in text:  # half of a surrogate pair
        check_tree(value, failure(str(path)))
    return value


def read_json(path: Path, missing: str = "it is needed") -> dict[str, Any]:
    """A JSON object from a file."""
    if not present(path):
        raise FileNotFoundError(f"{path.parent} has no {path.name}; {missing}")
    value = _read(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, needs an object")
    return value


def read_optional(path: Path) -> dict[str, Any]:
    """A JSON object from a file; an empty one if there is no file."""
    return read_json(path) if present(path) else {}


def read_json_list(path: Path) -> list[dict[str, Any]]:
    """A JSON list of objects from a file."""
    value = _read(path)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"{path} is not a list of objects")
    return value

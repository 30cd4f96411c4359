"""Strict JSON, and checks of what it holds. The text is untrusted input: any defect is a `FormatError`."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import isfinite
from typing import Any, NoReturn

MAX_DEPTH = 64  # nesting of the JSON
# What parsing takes, measured with CPython 3.10 to 3.13: at most 123 bytes for each bracket, comma and colon (a
# dict of short keys, with the list of pairs that it is made from), and this many bytes beyond four times the file
_MARK_BYTES = 128
_SPARE_BYTES = 48 << 20

Fail = Callable[[str], NoReturn]  # raises FormatError with the message


class FormatError(ValueError):
    """A file that is not what `FORMAT.md` describes. The message is one line with the file and the tensor."""


def quoted(name: str) -> str:
    """A name from a file for a message: printable ASCII, one line, at most 100 characters."""
    text = json.dumps(name[:100])
    return text if len(text) <= 100 and len(name) <= 100 else text[:96] + '..."'


def failure(where: str | Callable[[], str]) -> Fail:
    """Raise FormatError with a message behind `where`; a function is called when there is something to say."""

    def fail(message: str) -> NoReturn:
        raise FormatError(f"{where if isinstance(where, str) else where()}: {message}")

    return fail


def check_tree(value: Any, fail: Fail, texts: bool = True) -> None:
    """Refuse nesting deeper than MAX_DEPTH, and, with `texts`, text that UTF-8 cannot encode."""
    level, depth = [value], 0
    inside = (dict, list, tuple, str) if texts else (dict, list, tuple)  # a writer's tuples become lists
    while level:
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += [child for child in item.values() if isinstance(child, inside)]
                if texts:
                    inner += item
            elif isinstance(item, list | tuple):
                # by types, subclasses too, which a writer may have: 0.6 ms for 30,000 texts; one by one 2.4
                if any(issubclass(kind, inside) for kind in set(map(type, item))):
                    inner += [child for child in item if isinstance(child, inside)]
            elif texts and isinstance(item, str):
                try:
                    item.encode("utf-8")
                except UnicodeEncodeError:
                    fail("the JSON holds half of a surrogate pair")
        if depth >= MAX_DEPTH and any(isinstance(item, dict | list | tuple) for item in level):
            fail(f"the JSON is nested more than {MAX_DEPTH} deep")
        level, depth = inner, depth + 1


def check_length(length: int, file_bytes: int, fail: Fail, beside: int = 0) -> None:
    """Refuse a JSON text that `check_cost` refuses for its length alone, before it is copied."""
    if 4 * length + beside > 4 * file_bytes + _SPARE_BYTES:
        fail(f"the JSON has {length} characters: too many for a file of {file_bytes} bytes")


def check_cost(text: str | bytes, file_bytes: int, fail: Fail, beside: int = 0) -> None:
    """Refuse a JSON text whose parsing could take more than 4 * file_bytes + 64 MB.

    An empty list has 2 characters and takes 72 bytes, so the text of a small file could fill the memory. The
    header of a file with weights is far from this bound.

    beside : bytes that are held while it is parsed
    """
    if isinstance(text, str):
        plain = text.isascii() and "\\u" not in text
        marks = sum(text.count(mark) for mark in "[{,:")
    else:
        plain = text.isascii() and b"\\u" not in text
        marks = sum(text.count(mark) for mark in b"[{,:")
    width = 1 if plain else 4  # bytes of a character of a str
    # the text as bytes twice (the mapped file and a copy), as str, and its strings once more
    if (2 + 2 * width) * len(text) + _MARK_BYTES * marks + beside > 4 * file_bytes + _SPARE_BYTES:
        fail(
            f"the JSON has {len(text)} characters, {marks} of them brackets, commas and colons: too many for a "
            f"file of {file_bytes} bytes"
        )


def parse_json(text: str | bytes, where: str, file_bytes: int, beside: int = 0) -> Any:
    """Strict JSON: UTF-8, no duplicate key, no NaN, no huge integer, no deep nesting; else `FormatError`.

    file_bytes : size of the file that the text is from, which bounds the memory for it (`check_cost`)
    beside : bytes that are held meanwhile
    """
    fail = failure(where)
    check_cost(text, file_bytes, fail, beside)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            seen: set[str] = set()
            for key, _ in items:
                if key in seen:
                    fail(f"the key {quoted(key)} appears twice")
                seen.add(key)
        return result

    def integer(digits: str) -> int:
        return int(digits) if len(digits) <= 20 else fail(f"the number {digits[:20]}... is too large")

    def constant(name: str) -> NoReturn:
        fail(f"{name} is not JSON")

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        escapes = "\\u" in text  # only these make half a surrogate pair
        value = json.loads(text, object_pairs_hook=pairs, parse_int=integer, parse_constant=constant)
    except FormatError:
        raise
    except RecursionError:
        fail("the JSON is nested too deeply")
    except MemoryError:
        fail("the JSON does not fit into memory")
    except ValueError as error:
        fail(f"not valid JSON ({' '.join(str(error).split())[:120]})")
    del text
    check_tree(value, fail, texts=escapes)
    return value


def dump_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def json_fields(value: Any, names: tuple[str, ...], what: str, fail: Fail) -> list[Any]:
    """The values of a JSON object that has exactly these keys."""
    if type(value) is not dict:
        fail(f"{what} is not a JSON object")
    for name in names:
        if name not in value:
            fail(f"{what} has no {quoted(name)}")
    for name in value:
        if name not in names:
            fail(f"{what} has an unknown entry {quoted(name)}")
    return [value[name] for name in names]


def json_integer(value: Any, low: int, high: int, what: str, fail: Fail) -> int:
    if type(value) is not int:  # bool is an int to isinstance
        fail(f"{what} is not an integer")
    if not low <= value <= high:
        fail(f"{what}={value} is not between {low} and {high}")
    return value


def json_number(value: Any, what: str, fail: Fail) -> float:
    if type(value) not in (int, float) or not isfinite(value):
        fail(f"{what} is not a finite number")
    return float(value)


def json_choice(value: Any, choices: tuple[Any, ...], what: str, fail: Fail) -> Any:
    if type(value) is not type(choices[0]) or value not in choices:
        shown = f"a {type(value).__name__}" if isinstance(value, dict | list) else str(value)[:40]
        shown = quoted(value) if isinstance(value, str) else shown
        fail(f"{what}={shown} is not one of {', '.join(map(str, choices))}")
    return value

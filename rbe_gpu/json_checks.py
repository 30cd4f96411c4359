"""Strict JSON, and checks of what it holds. The text is untrusted input: any defect is a `FormatError`."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import isfinite
from typing import Any, NoReturn

MAX_DEPTH = 64  # nesting of the JSON

Fail = Callable[[str], NoReturn]  # raises FormatError with the message


class FormatError(ValueError):
    """A file that is not what `FORMAT.md` describes. The message is one line with the file and the tensor."""


def quoted(name: str) -> str:
    """A name from a file for a message: printable ASCII, one line, at most 100 characters."""
    text = json.dumps(name)
    return text if len(text) <= 100 else text[:96] + '..."'


def failure(where: str) -> Fail:
    def fail(message: str) -> NoReturn:
        raise FormatError(f"{where}: {message}")

    return fail


def check_tree(value: Any, fail: Fail) -> None:
    """Refuse nesting deeper than MAX_DEPTH, and text that UTF-8 cannot encode."""
    pending = [(value, 0)]
    while pending:
        item, depth = pending.pop()
        if isinstance(item, str):
            try:
                item.encode("utf-8")
            except UnicodeEncodeError:
                fail("the JSON holds half of a surrogate pair")
        elif isinstance(item, dict | list):
            if depth >= MAX_DEPTH:
                fail(f"the JSON is nested more than {MAX_DEPTH} deep")
            pending += [(child, depth + 1) for child in item]
            if isinstance(item, dict):
                pending += [(child, depth + 1) for child in item.values()]


def parse_json(text: str | bytes, where: str) -> Any:
    """Strict JSON: UTF-8, no duplicate key, no NaN, no huge integer, no deep nesting; else `FormatError`."""
    fail = failure(where)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            keys = [key for key, _ in items]
            fail(f"the key {quoted(next(k for k in keys if keys.count(k) > 1))} appears twice")
        return result

    def integer(digits: str) -> int:
        return int(digits) if len(digits) <= 20 else fail(f"the number {digits[:20]}... is too large")

    def constant(name: str) -> NoReturn:
        fail(f"{name} is not JSON")

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        value = json.loads(text, object_pairs_hook=pairs, parse_int=integer, parse_constant=constant)
    except FormatError:
        raise
    except RecursionError:
        fail("the JSON is nested too deeply")
    except MemoryError:
        fail("the JSON does not fit into memory")
    except ValueError as error:
        fail(f"not valid JSON ({' '.join(str(error).split())[:120]})")
    check_tree(value, fail)
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
        shown = quoted(value) if isinstance(value, str) else str(value)[:40]
        fail(f"{what}={shown} is not one of {', '.join(map(str, choices))}")
    return value

"""Mutations that keep most of an input valid, so that it reaches the checks behind the first one.

A safetensors file is changed in its JSON, in the JSON that the description holds as text, in its payload, or as
bytes; its lengths are put right most of the time.
"""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

Bytes = Callable[[bytes, int], bytes]  # libFuzzer's own mutation: (data, largest size) -> data

NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 7, 8, 16, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 384, 1000, 1024, 65535, 65536),
    *(2**24, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30),
    *(0.0, -0.0, 0.5, 1e-12, 1e-300, 1e300, 1e400, float("nan")),
)
OTHERS: tuple[Any, ...] = (
    None,
    True,
    False,
    "",
    "a",
    "\ud800",
    "\x00",
    "x" * 300,
    [],
    {},
    [0],
    [[0]],
    {"": 0},
)
#: of normalisers, patterns and tokens
_TEXTS = (
    "",
    " ",
    "  ",
    "a",
    "aa",
    "A",
    "\u2581",
    "\u00e9",
    "\u0301",
    "\U0001f600",
    "\u4e00",
    "\0",
    "\n",
    "x" * 300,
)
_LARGEST_NODE = 2000  # places of a JSON value that are listed


def _keys(container: Any) -> Any:
    return list(container) if isinstance(container, dict) else range(len(container))


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """(container, key) of values in a JSON value, up to a number of them."""
    waiting = [value]
    while waiting and len(found) < _LARGEST_NODE:
        container = waiting.pop()
        for key in _keys(container):
            found.append((container, key))
            if isinstance(container[key], dict | list):
                waiting.append(container[key])
    return found


def mutate_json(value: Any, rng: random.Random, like: tuple[str, ...] = ()) -> Any:
    """One to three changes of a JSON value. `like`: words to write."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = _places(value, []) if isinstance(value, dict | list) else []
        if not places:
            return copy.deepcopy(rng.choice(NUMBERS + OTHERS))
        container, key = rng.choice(places)
        old = container[key]
        kind = rng.randrange(9)
        if kind == 0 and isinstance(container, dict):
            del container[key]
        elif kind == 1:
            other, other_key = rng.choice(places)
            container[key] = copy.deepcopy(other[other_key]) if other_key in _keys(other) else None
        elif kind == 2 and isinstance(container, list):
            container.insert(key, old)
        elif kind == 3 and isinstance(container, dict):
            container[rng.choice((*like, "", "a", str(key) + "x"))] = container.pop(key)
        elif kind == 4 and isinstance(old, int) and not isinstance(old, bool):
            container[key] = old + rng.choice((-2, -1, 1, 2, 8, 64, -64))
        elif kind == 5 and like:
            container[key] = rng.choice(like)
        elif kind == 6 and isinstance(old, str):
            at = rng.randrange(len(old) + 1)
            container[key] = (
                old[:at]
                + rng.choice(("", "0", "\ud800", "\n", " ", "é", "\U0001f600"))
                + old[at + rng.randrange(3) :]
            )
        else:
            container[key] = copy.deepcopy(rng.choice(NUMBERS if rng.random() < 0.6 else OTHERS))
    return value


def mutate_values(value: Any, rng: random.Random, like: tuple[str, ...]) -> Any:
    """One change that keeps the types of a JSON value, so that a strict parser takes most of them."""
    places = _places(value, []) if isinstance(value, dict | list) else []
    places = [(c, k) for c, k in places if c[k] is not None and not isinstance(c[k], dict)]
    if not places:
        return value
    container, key = rng.choice(places)
    old = container[key]
    if isinstance(old, bool):
        container[key] = not old
    elif isinstance(old, int):
        container[key] = rng.choice((0, 1, 2, 3, 7, 100, 2**20, max(0, old - 1), old + 1))
    elif isinstance(old, float):
        container[key] = rng.choice((0.0, -1.0, 1e-30, -1e30, 1e300, -old))
    elif isinstance(old, str):
        container[key] = rng.choice((*like, *_TEXTS, old * 2, old[:1], old[1:]))
    elif old:
        a, b = rng.randrange(len(old)), rng.randrange(len(old))
        kind = rng.randrange(3)
        if kind == 0:
            old[a], old[b] = old[b], old[a]
        elif kind == 1:
            old.insert(a, copy.deepcopy(old[b]))
        else:
            del old[a]
    return value


def dumps(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode("utf-8", "surrogatepass")


def mutate_text(
    raw: bytes, rng: random.Random, own: Bytes, like: tuple[str, ...] = (), keep_types: float = 0.0
) -> bytes:
    """A JSON file: changed as JSON, or as bytes. keep_types : how often only by `mutate_values`"""
    if rng.random() < 0.8:
        change = mutate_values if rng.random() < keep_types else mutate_json
        try:
            return dumps(change(json.loads(raw), rng, like))
        except (ValueError, RecursionError):
            pass
    return own(raw, len(raw) + 200)


def mutate_safetensors(raw: bytes, rng: random.Random, own: Bytes, like: tuple[str, ...] = ()) -> bytes:
    """A safetensors file: its header, its description, its payload, its length, or any bytes."""
    kind = rng.random()
    if len(raw) < 8 or kind < 0.05:
        return own(raw, len(raw) + 200)
    (length,) = struct.unpack("<Q", raw[:8])
    length = min(length, len(raw) - 8)
    header, payload = raw[8 : 8 + length], raw[8 + length :]
    if kind < 0.3:
        payload = own(payload, len(payload) + (0 if rng.random() < 0.8 else 100))
    else:
        try:
            value = json.loads(header)
            description = json.loads(value["__metadata__"]["rbe"]) if kind < 0.7 else None
        except (ValueError, TypeError, KeyError, RecursionError):
            header = own(header, len(header) + 200)
        else:
            if description is None:
                value = mutate_json(value, rng, like)
            else:
                value["__metadata__"]["rbe"] = json.dumps(mutate_json(description, rng, like))
            header = dumps(value)
            header += b" " * (-len(header) % 8)
    length = (
        len(header) if rng.random() < 0.97 else rng.choice((0, 1, len(header) + 1, 2**63, 2**64 - 1, 10**8))
    )
    return struct.pack("<Q", length) + header + payload


#: Of lengths, counts, offsets and types in a GGUF file.
_WORDS = (
    0,
    1,
    2,
    3,
    4,
    6,
    8,
    9,
    13,
    31,
    32,
    33,
    64,
    255,
    256,
    65535,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63,
    2**64 - 1,
)


def mutate_gguf(raw: bytes, rng: random.Random, own: Bytes, like: tuple[str, ...] = ()) -> bytes:
    """A GGUF file: mostly what is in front of its tensors, of which no more is known here than where texts may be."""
    kind = rng.randrange(10)
    header = max(raw.rfind(b".weight"), 24) + 64  # the last name of a tensor, its shape, type and offset
    if kind == 0 or len(raw) < 64:
        return own(raw, len(raw) + 200)
    if kind == 1:
        at = rng.randrange(len(raw))
        return raw[:at] + own(raw[at : at + 64], 64) + raw[at + 64 :]
    if kind == 2:
        return raw[: rng.randrange(len(raw))]
    at = rng.randrange(4, min(header, len(raw)) - 8)
    if kind <= 5:
        size = rng.choice((4, 8))
        value = rng.choice(_WORDS)
        if rng.random() < 0.5:  # near to what is there
            value = int.from_bytes(raw[at : at + size], "little") + rng.choice((-8, -1, 1, 8, 256))
        return raw[:at] + (value % (1 << 8 * size)).to_bytes(size, "little") + raw[at + size :]
    if kind == 6:
        other, length = rng.randrange(min(header, len(raw)) - 8), rng.randrange(1, 40)
        return raw[:at] + raw[other : other + length] + raw[at + length :]
    # a text, with its length: another one of `like`, or changed
    for _ in range(64):
        at = rng.randrange(24, min(header, len(raw)) - 8)
        length = int.from_bytes(raw[at : at + 8], "little")
        if 0 < length < 64 and raw[at + 8 : at + 8 + length].isascii():
            old = raw[at + 8 : at + 8 + length]
            new = rng.choice(like).encode() if like and rng.random() < 0.5 else own(old, 64)
            return raw[:at] + struct.pack("<Q", len(new)) + new + raw[at + 8 + length :]
    return own(raw, len(raw) + 200)


def pack(files: dict[str, bytes]) -> bytes:
    """Several files as one input: name, length, bytes."""
    return b"".join(
        struct.pack("<BI", len(name.encode()), len(raw)) + name.encode() + raw for name, raw in files.items()
    )


def unpack(data: bytes) -> dict[str, bytes]:
    """The files of an input, as far as they are whole."""
    files, at = {}, 0
    while at + 5 <= len(data):
        name_length, length = struct.unpack_from("<BI", data, at)
        name = data[at + 5 : at + 5 + name_length].decode("utf-8", "replace")
        at += 5 + name_length
        files[name] = data[at : at + length]
        at += length
    return files

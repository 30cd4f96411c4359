"""Small files that could cost much: time and memory before a refusal are linear in the file's size."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from rbe_gpu.container import FormatError, load_file, save_file

from .bounded import limit, readings

SIZES = (400_000, 1_600_000, 6_000_000)  # of a header: the first ones are parsed, then refused


def header_file(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def filled(size: int, start: str, piece: str | Callable[[int], str], end: str) -> str:
    """A text of `size` characters: start, as many pieces as fit, end."""
    if isinstance(piece, str):
        return start + piece * ((size - len(start) - len(end)) // len(piece)) + end
    parts, used = [], len(start) + len(end)
    for i in count():
        parts.append(piece(i))
        used += len(parts[-1])
        if used > size:
            return start + "".join(parts) + end
    raise AssertionError


def in_description(text: str) -> str:
    root = f'{{"version": 1, "tensors": {{}}, "config": {text}}}'
    return json.dumps({"__metadata__": {"rbe": root}}, ensure_ascii=False)


ENTRY = '{"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}'
HEADERS: dict[str, Callable[[int], str | bytes]] = {
    "keys and the first twice": lambda n: filled(n, '{"dup": 0,', lambda i: f'"k{i}": 0,', '"dup": 1}'),
    "keys and the last twice": lambda n: filled(n, "{", lambda i: f'"k{i}": 0,', '"a": 0, "a": 1}'),
    "lists": lambda n: filled(n, '{"a": [', "[],", "0]}"),
    "lists of one": lambda n: filled(n, '{"a": [', "[0],", "0]}"),
    "objects": lambda n: filled(n, '{"a": [', "{},", "0]}"),
    "objects of one": lambda n: filled(n, '{"a": [', '{"b":0},', "0]}"),
    "small integers": lambda n: filled(n, '{"a": [', "1,", "0]}"),
    "integers": lambda n: filled(n, '{"a": [', "999,", "0]}"),
    "fractions": lambda n: filled(n, '{"a": [', "1.5,", "0]}"),
    "texts": lambda n: filled(n, '{"a": [', lambda i: f'"{i:x}",', "0]}"),
    "short keys": lambda n: filled(n, "{", lambda i: f'"{i:x}":0,', '"a": 0}'),
    "keys of an object in a list": lambda n: filled(n, '{"a": [{', lambda i: f'"{i:x}":0,', '"z": 0}]}'),
    "nested as deep as the parser goes": lambda n: filled(n, '{"a": [', "[" * 500 + "]" * 500 + ",", "0]}"),
    "opening brackets": lambda n: "{" + '"a":[' + "[" * n,
    "opening braces": lambda n: '{"a":' * (n // 5),
    "a long name": lambda n: '{"' + "a" * n + '": 0}',
    "a long name of four-byte characters": lambda n: '{"' + "\U0001f600" * (n // 4) + '": 0}',
    "a long name with one four-byte character": lambda n: '{"' + "a" * n + '\U0001f600": 0}',
    "a long name with one escape": lambda n: '{"' + "a" * n + '\\ud83d\\ude00": 0}',
    "half a surrogate pair at the end of a long text": lambda n: '{"a": "' + "a" * n + '\\ud83d"}',
    "a long number": lambda n: '{"a": ' + "9" * n + "}",
    "a long fraction": lambda n: '{"a": 0.' + "3" * n + "}",
    "spaces": lambda n: "{" + " " * n,
    "empty arrays": lambda n: filled(n, "{", lambda i: f'"{i}": {ENTRY},', f'"a": {ENTRY}}}'),
    "lists in the description": lambda n: in_description(filled(n, "[", "[],", "0]")),
    "texts in the description": lambda n: in_description(filled(n, "[", lambda i: f'"{i:x}",', "0]")),
    "escapes in the description": lambda n: in_description('{"a": "' + "\\" * (n // 2) + '"'),
    "dense tensors without an array": lambda n: json.dumps(
        {
            "__metadata__": {
                "rbe": '{"version": 1, "config": {}, "tensors": '
                + filled(n, "{", lambda i: f'"{i}":{{"kind":"dense"}},', '"a":{"kind":"dense"}}')
                + "}"
            }
        }
    ),
}


def check(files: list[Path], seconds: Callable[[int], float]) -> None:
    """Every file is refused, within `limit` and `seconds(size of the file)`."""
    faults = []
    for file, reading in zip(files, readings("load_file", files), strict=True):
        size = file.stat().st_size
        if reading.message is None:
            faults.append(f"{file.name}: accepted")
        elif not reading.message.startswith("FormatError"):
            faults.append(f"{file.name}: {reading.message}")
        if reading.nbytes > limit(file):
            faults.append(f"{file.name}: {reading.nbytes >> 20} MB for {size} bytes")
        if reading.seconds > seconds(size):
            faults.append(f"{file.name}: {reading.seconds:.1f} s for {size} bytes")
    assert not faults


def test_headers(tmp_path: Path) -> None:
    files = []
    for name, make in HEADERS.items():
        for size in SIZES:
            files.append(tmp_path / f"{name}, {size}")
            files[-1].write_bytes(header_file(make(size)))
    # at most 1.9 s on a machine with seven other processes; one key twice among 20,000 took 16 s before
    check(files, lambda size: 5 + 1e-6 * size)


def test_many_small_tensors_load(tmp_path: Path) -> None:
    """What the bound on a header allows: far more tensors than a model has."""
    tensors = {f"encoder.layer.{i}.output.LayerNorm.weight": np.ones(4, np.float32) for i in range(10_000)}
    save_file(tmp_path / "a", tensors)
    assert len(load_file(tmp_path / "a")[0]) == 10_000


def test_the_writer_refuses_a_header_that_a_reader_refuses(tmp_path: Path) -> None:
    tensors = {str(i): np.ones(1, np.uint8) for i in range(40_000)}
    with pytest.raises(FormatError, match="brackets, commas and colons: too many for a file"):
        save_file(tmp_path / "a", tensors)
    assert not list(tmp_path.iterdir())

"""Every place where the reader refuses a file is reached by a hostile file."""

from __future__ import annotations

import ast
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import pytest
import zstandard

from rbe_gpu import container
from rbe_gpu.container import FormatError, load_file

from ..test_file_limits import MOST, REFUSED, Grid, file_of, frame
from .parts import CAP, Parts, packed, valid_bytes
from .reader_rules import RULES
from .test_reader import ENTRIES, HEADERS, VALUES, at, leaves

PACKAGE = Path(container.__file__).parent
MODULES = (
    "container",
    "mapped",
    "stored",
    "json_checks",
    *(f"codecs/{p.stem}" for p in PACKAGE.glob("codecs/*.py")),
)
#: functions whose refusals need more than a file of bytes
ELSEWHERE = {
    ("container", "add"): "the writer's: tests/test_container.py",
    ("codecs/grid", "check_read_back"): "the writer's: tests/test_grid.py",
    ("json_checks", "check_length"): "of stored tokenizers: tests/hostile/test_tokenizer_memory.py",
}
NO_MEMORY = "does not fit into memory"  # refused by no file: see the last test
Place = tuple[str, int]


def _is_refusal(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return getattr(node.func, "id", getattr(node.func, "attr", "")) in ("fail", "_fail")
    return isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and (
        getattr(node.exc.func, "id", "") in ("FormatError", "StreamError")
    )  # fmt: skip


def refusals() -> dict[Place, tuple[range, str]]:
    """(module, first line) -> lines and function of each call of `fail` and each `raise` of the reader's modules."""
    places = {}
    for module in MODULES:
        text = (PACKAGE / f"{module}.py").read_text("utf-8")
        tree = ast.parse(text)
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for function in functions:  # inner ones come later
            for node in ast.walk(function):
                if _is_refusal(node) and NO_MEMORY not in (ast.get_source_segment(text, node) or ""):
                    lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                    places[module, node.lineno] = (lines, function.name)
    return {
        place: what
        for place, what in places.items()
        if what[1] != "fail" and (place[0], what[1]) not in ELSEWHERE
    }


def files() -> Iterator[tuple[bytes, int]]:
    """Files and how much they may decode to: those of the other tests."""
    raw = valid_bytes()
    for wrong in (raw[:0], raw[:7], raw[:200], raw + b"\0", b"\xff" * 7 + b"\x7f" + raw[8:], bytes(4096)):
        yield wrong, CAP
    yield packed('{"a": [' + "[]," * 1_200_000 + "[]]}"), CAP
    for text in HEADERS.values():
        yield packed(text), CAP
    for damage in RULES.values():
        parts = Parts()
        damage(parts)
        yield parts.join(), CAP
    long = Grid(MOST // 64, 32, 1)
    long.stream = frame([(0, 32), (0, MOST // 2)])  # one window
    yield file_of(long), 1 << 40
    yield REFUSED["512M zeros"](), 1 << 40
    for part in ("header", "description"):
        for path in leaves(getattr(Parts(), part)):
            if path[0] == "config" or (part == "header" and path[0] not in ENTRIES):
                continue
            for value in VALUES:
                parts = Parts()
                at(getattr(parts, part), path[:-1])[path[-1]] = value
                yield parts.join(), CAP
            parts = Parts()
            del at(getattr(parts, part), path[:-1])[path[-1]]
            yield parts.join(), CAP


def _lines(error: BaseException) -> Iterator[Place]:
    """Where an error and those that it was made of were raised."""
    seen: BaseException | None = error
    while seen is not None:
        step: TracebackType | None = seen.__traceback__
        while step is not None:
            path = Path(step.tb_frame.f_code.co_filename)
            if path.is_relative_to(PACKAGE):
                yield str(path.relative_to(PACKAGE).with_suffix("")), step.tb_lineno
            step = step.tb_next
        seen = seen.__context__


def test_every_refusal_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = refusals()
    assert len(left) > 70
    path = tmp_path / "evil"
    path.mkdir()

    def refused(most: int) -> None:
        with pytest.raises(FormatError) as error:
            load_file(path, max_decoded_bytes=most)
        reached = set(_lines(error.value))
        for place, (lines, _) in list(left.items()):
            if any((place[0], line) in reached for line in lines):
                del left[place]

    refused(CAP)  # a folder
    path.rmdir()
    before = container._FREE_BYTES
    for raw, most in files():
        path.write_bytes(raw)
        # once more as a file that would take much memory: its streams are checked before anything of them is kept
        for free in (before, -(1 << 62)):
            monkeypatch.setattr(container, "_FREE_BYTES", free)
            with contextlib.suppress(pytest.fail.Exception):  # a value that may be there
                refused(most)
        if not left:
            return
    pytest.fail("no hostile file reaches " + ", ".join(f"{m}.py:{line}" for m, line in sorted(left)))


def test_memory_that_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(valid_bytes())

    def full(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(json, "loads", full)
        with pytest.raises(FormatError, match="the JSON does not fit into memory"):
            load_file(path)
    monkeypatch.setattr(zstandard, "ZstdDecompressor", full)
    with pytest.raises(FormatError, match="stream: the frame does not fit into memory"):
        load_file(path)

"""Docstrings of this project as reStructuredText.

They are plain text in NumPy's sections, where `name : words` describes a parameter: equations keep their stars and
bars, and the words become a description, not a type.
"""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

_CODE = re.compile(r"(`+[^`]+`+)")
_SPECIAL = re.compile(r"[*|\\]|(?<=\w)_(?!\w)")
_DESCRIBED = re.compile(r"(\*{0,2}\w[\w*, ]*) : (.*)")
_SECTIONS = {"Parameters", "Attributes"}


def _escaped(line: str) -> str:
    """A line with what reStructuredText would take for markup escaped, but for code."""
    if line.lstrip().startswith(">>>"):
        return line
    parts = _CODE.split(line)
    parts[::2] = [_SPECIAL.sub(r"\\\g<0>", part) for part in parts[::2]]
    return "".join(parts)


def prepare(app: Sphinx, what: str, name: str, value: object, options: Any, lines: list[str]) -> None:
    section, made = "", []
    for i, line in enumerate(lines):
        if i + 1 < len(lines) and re.fullmatch(r"-{3,}", lines[i + 1]):
            section = line
        described = _DESCRIBED.fullmatch(line) if section in _SECTIONS else None
        if described:
            made += [described[1], f"    {_escaped(described[2])}"]
        else:
            made.append(_escaped(line))
    lines[:] = made


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", prepare, priority=400)  # before napoleon
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""What the README has GPU users run works, on the stand-in for CuPy; its twin shows the same code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .host import capture

ROOT = Path(__file__).parent.parent


def code(name: str, heading: str) -> str:
    """The first Python block of a section."""
    text = (ROOT / name).read_text(encoding="utf-8")
    section = text[text.index(f"## {heading}\n") :]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_lines_for_gpu_users_run(capsys: pytest.CaptureFixture[str]) -> None:
    with capture.installed():
        exec(compile(code("README.md", "GPU users"), "README.md", "exec"), {})
    assert capsys.readouterr().out == "(64, 1536) (2, 384)\n"


def test_the_korean_readme_shows_the_same_lines() -> None:
    assert code("README.ko.md", "GPU 사용자") == code("README.md", "GPU users")

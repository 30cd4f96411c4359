"""`rbe-gpu report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from .command import refused, run


def test_report_calls_the_reports(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rbe_gpu.reports import run as reports

    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(reports, "main", lambda **options: calls.append(options))
    assert run("report", "--out", tmp_path / "r", "--quick").exit_code == 0
    assert run("report", "--out", tmp_path / "r", "--model", model_folder).exit_code == 0
    assert calls == [
        {"out": tmp_path / "r", "quick": True, "model": None, "wide_model": None},
        {"out": tmp_path / "r", "quick": False, "model": model_folder, "wide_model": None},
    ]


def test_report_without_its_packages_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for blocked, names in ((["jinja2"], "jinja2"), (["matplotlib", "jinja2"], "matplotlib and jinja2")):
        with monkeypatch.context() as patch:
            for name in blocked:
                patch.setitem(sys.modules, name, None)
            for further in ((), ("--quality",)):
                result = run("report", "--out", tmp_path / "r", *further)
                refused(result, f"the report needs {names}: pip install 'rbe-gpu[report]'")
    assert not (tmp_path / "r").exists()

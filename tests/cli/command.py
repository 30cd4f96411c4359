"""Running the `rbe-gpu` command in tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from rbe_gpu import cli

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}


def run(*arguments: Any, stdin: bytes | None = None) -> Result:
    """Run the command in this process; an exception other than SystemExit fails the test."""
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def process(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command in a subprocess."""
    command = [sys.executable, "-m", "rbe_gpu.cli", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=ENV, timeout=300, check=False, **options
    )


def refused(result: Any, *fragments: str) -> None:
    """Exit code 1, one line on stderr with these fragments, nothing on stdout."""
    code = result.exit_code if isinstance(result, Result) else result.returncode
    assert code == 1, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("rbe-gpu: ")
    assert result.stderr.count("\n") == 1
    for fragment in fragments:
        assert fragment in result.stderr

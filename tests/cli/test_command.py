"""The command as a whole: help, usage errors, and a model from compression to embeddings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

import rbe_gpu
from tests import real
from tests.test_compress_model import cut_tensors, dense_bytes

from .command import ENV, process, run


def test_compress_inspect_embed_as_processes(tmp_path: Path, model_folder: Path) -> None:
    out, vectors = tmp_path / "m.rbe.safetensors", tmp_path / "v.npy"
    done = process("compress", model_folder, "-o", out, "--ratio", 4, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no bar where there is no terminal
    summary = json.loads(done.stdout)
    assert summary["file_bytes"] == out.stat().st_size <= dense_bytes(cut_tensors()) / 4
    assert summary["ratio"] >= 4

    done = process("inspect", out, "--json")
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    assert info["file_bytes"] == summary["file_bytes"]
    assert info["config"]["model_type"] == "bert"

    (tmp_path / "t.txt").write_text("\n".join(real.texts()[:5]) + "\n", "utf-8")
    done = process("embed", out, tmp_path / "t.txt", "-o", vectors, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["texts"] == 5
    assert np.load(vectors).shape == (5, 96)
    assert sorted(os.listdir(tmp_path)) == ["m.rbe.safetensors", "t.txt", "v.npy"]


def test_help_is_fast_and_loads_nothing_heavy() -> None:
    script = (
        "import sys\nfrom rbe_gpu.cli import app\nfrom typer.testing import CliRunner\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "heavy = {'numba', 'llvmlite', 'tokenizers', 'torch', 'cupy', 'matplotlib', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENV, check=True)
    assert done.stdout == "[]\n"


def test_version_and_help() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"rbe-gpu {rbe_gpu.__version__}\n")
    result = run("--help")
    assert result.exit_code == 0
    for name in ("compress", "inspect", "embed", "generate", "eval", "report", "warmup", "info"):
        assert name in result.stdout
        assert run(name, "--help").exit_code == 0


def test_no_command_prints_the_help() -> None:
    result = run()
    assert result.exit_code == 2
    assert "Usage" in result.stdout
    assert result.stderr == "rbe-gpu: no command is given; see rbe-gpu --help\n"

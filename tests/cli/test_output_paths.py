"""Output paths of commands: pipes, links, standard output."""

from __future__ import annotations

import io
import json
import os
import stat
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rbe_gpu.container import load_file

from .command import ENV, process, refused, run


@pytest.fixture
def embed(tmp_path: Path, model_file: Path) -> list[Any]:
    (tmp_path / "t.txt").write_text("one\ntwo\n")
    return ["embed", model_file, tmp_path / "t.txt"]


@pytest.fixture
def compress(model_folder: Path) -> list[Any]:
    return ["compress", model_folder, "--codes", "dense-int6"]


def through(pipe: Path, *arguments: Any) -> bytes:
    """What a command writes to a named pipe."""
    content = []
    reader = threading.Thread(target=lambda: content.append(pipe.read_bytes()))
    reader.start()
    result = run(*arguments, "-o", pipe)
    assert result.exit_code == 0, result.stderr
    reader.join()
    assert stat.S_ISFIFO(pipe.lstat().st_mode)
    return content[0]


def test_a_pipe(tmp_path: Path, embed: list[Any], compress: list[Any], model_file: Path) -> None:
    """Nothing of it is replaced, so that --force is not needed; it does no harm."""
    os.mkfifo(tmp_path / "pipe")
    for options in ([], ["-f"]):
        vectors = np.load(io.BytesIO(through(tmp_path / "pipe", *embed, *options)))
        assert vectors.shape == (2, 96)
        assert through(tmp_path / "pipe", *compress, *options) == model_file.read_bytes()


def test_a_link(tmp_path: Path, embed: list[Any], compress: list[Any], model_file: Path) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    for command in (embed, compress):
        refused(run(*command, "-o", tmp_path / "link"), "link exists; pass --force to replace it")
        assert run(*command, "-o", tmp_path / "link", "-f").exit_code == 0
        assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == model_file.read_bytes()
    (tmp_path / "loop").symlink_to("loop")
    for command in (embed, compress):
        refused(run(*command, "-o", tmp_path / "loop", "-f"), "loop: Too many levels of symbolic links")


@pytest.mark.parametrize("out", ["-", "/dev/stdout"])
def test_standard_output(
    out: str, tmp_path: Path, embed: list[Any], compress: list[Any], model_file: Path
) -> None:
    import subprocess
    import sys

    for command, said in ((embed, "2 x 96 float32"), (compress, "times smaller than float32")):
        arguments = [sys.executable, "-m", "rbe_gpu.cli", *map(str, command), "-o", out]
        done = subprocess.run(arguments, capture_output=True, env=ENV, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert said in done.stderr.decode()  # what is said does not go into the file
        if command is embed:
            assert np.load(io.BytesIO(done.stdout)).shape == (2, 96)
        else:
            assert done.stdout == model_file.read_bytes()
        result = run(*command, "-o", out, "--json")
        assert result.exit_code == 2
        assert "--json and --out: both go to standard output; name a file" in result.stderr


def test_a_failed_write_names_the_file(tmp_path: Path, embed: list[Any], compress: list[Any]) -> None:
    resource = pytest.importorskip("resource")

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (800, 800))

    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "file"
    for command in (embed, compress):
        done = process(*command, "-o", out, preexec_fn=small_files)
        refused(done, f"{out}: File too large")
        assert not list((tmp_path / "out").iterdir())


def test_a_pipe_whose_reader_has_gone(tmp_path: Path, embed: list[Any]) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = threading.Thread(target=lambda: os.close(os.open(tmp_path / "pipe", os.O_RDONLY)))
    reader.start()
    done = process(*embed, "-o", tmp_path / "pipe")
    reader.join()
    assert done.returncode in (0, 1)  # two vectors fit into the pipe before it is closed
    assert "Traceback" not in done.stderr


def test_tune_follows_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rbe_gpu.cpu_fallback import matmul_costs

    (tmp_path / "real").mkdir()
    (tmp_path / "costs.json").symlink_to("real/costs.json")
    monkeypatch.setenv("RBE_GPU_COSTS", str(tmp_path / "costs.json"))
    matmul_costs.store(matmul_costs.MatmulCosts(call=1.0))
    assert (tmp_path / "costs.json").is_symlink()
    assert json.loads((tmp_path / "real" / "costs.json").read_text())["call"] == 1.0
    assert matmul_costs.costs().call == 1.0
    monkeypatch.undo()
    matmul_costs.costs.cache_clear()


def test_the_file_is_that_of_the_command_line(tmp_path: Path, compress: list[Any]) -> None:
    """A dangling link: the file is made where it leads."""
    (tmp_path / "link").symlink_to("target")
    assert run(*compress, "-o", tmp_path / "link").exit_code == 0
    assert load_file(tmp_path / "target")[0]
    assert (tmp_path / "link").is_symlink()

"""`rbe-gpu compress`: results, error messages, and which files remain."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import Result

from rbe_gpu.container import describe, load_file
from tests import real
from tests.test_compress_model import TOKENIZER_ARRAY, cut_tensors, make_model, write_safetensors

from .command import ENV, process, refused, run


def test_compress_for_people(tmp_path: Path, model_folder: Path) -> None:
    out = tmp_path / "m.rbe.safetensors"
    result = run("compress", model_folder, "-o", out, "--codes", "dense-int4", "--block", 32, "--no-basis")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    assert "embeddings.word_embeddings.weight" in result.stdout
    assert "2200x96" in result.stdout
    assert "times smaller than float32" in result.stdout
    info = describe(out)
    assert {t.block for t in info.tensors if t.kind != "dense"} == {32}
    assert not any(t.basis for t in info.tensors)


def test_compress_json(tmp_path: Path, model_folder: Path) -> None:
    out = tmp_path / "m"
    arguments = ("--density", 0.2, "--codes", "sparse-int4", "--transform", "dwt-haar", "--basis", "--json")
    result = run("compress", model_folder, "-o", out, *arguments)
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    rows = {row["name"]: row for row in summary["tensors"]}
    assert set(rows) == {t.name for t in describe(out).tensors} - {TOKENIZER_ARRAY}
    row = rows["encoder.layer.0.intermediate.dense.weight"]
    assert (row["kind"], row["codes"], row["shape"]) == ("matrix", "sparse-int4", [160, 96])
    assert 0 < row["relative_error"] < 1
    assert summary["file_bytes"] == out.stat().st_size
    assert {t.transform for t in describe(out).tensors if t.kind != "dense"} == {"dwt-haar"}


def test_compress_a_bare_file_with_three_axes(tmp_path: Path) -> None:
    w = np.ascontiguousarray(real.layer(0, "output.dense.weight")[:96, :96])
    write_safetensors(tmp_path / "in.safetensors", {"w": w, "conv": w.reshape(96, 32, 3)})
    result = run("compress", tmp_path / "in.safetensors", "-o", tmp_path / "out", "--grade", "B")
    assert result.exit_code == 0, result.stderr
    np.testing.assert_array_equal(load_file(tmp_path / "out")[0]["conv"], w.reshape(96, 32, 3))


def test_a_model_without_tokenizer_is_noted(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    result = run("compress", folder, "-o", tmp_path / "out", "--codes", "dense-int4")
    assert result.exit_code == 0
    assert result.stderr.startswith("rbe-gpu: note: ")
    assert "no tokenizer.json" in result.stderr


def test_compress_refusals(tmp_path: Path, model_folder: Path) -> None:
    def compress(source: Path, *options: Any, out: Path = tmp_path / "out") -> Result:
        return run("compress", source, "-o", out, *(options or ("--codes", "dense-int4")))

    refused(compress(tmp_path / "absent"), "absent does not exist")
    refused(compress(tmp_path), "has no config.json; it is not a model folder")
    (tmp_path / "text").write_text("hello, this is not a safetensors file")
    refused(compress(tmp_path / "text"), "text: not a safetensors file")
    (tmp_path / "empty").touch()
    refused(compress(tmp_path / "empty"), "0 bytes are too few")
    whole = (model_folder / "model.safetensors").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    refused(compress(tmp_path / "cut"), "cut: array ")
    refused(compress(model_folder, "--ratio", "1000"), "highest reachable ratio is below")
    refused(compress(model_folder, out=tmp_path / "no" / "out"), "no does not exist; make it first")
    refused(compress(model_folder, out=tmp_path), "is a folder; name a file")
    assert sorted(os.listdir(tmp_path)) == ["cut", "empty", "text"]


def test_nan_weights_are_named(tmp_path: Path) -> None:
    tensors = cut_tensors()
    name = "encoder.layer.0.attention.self.value.weight"
    tensors[name] = np.where(np.arange(96) == 5, np.float32(np.nan), tensors[name])
    folder = make_model(tmp_path / "m", tensors)
    done = process("compress", folder, "-o", tmp_path / "out", "--codes", "dense-int4")
    refused(done, f"tensor {name} holds NaN or Inf")
    assert os.listdir(tmp_path) == ["m"]


def test_an_existing_output_stays_without_force(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "out").write_text("precious")
    arguments = ("compress", model_folder, "-o", tmp_path / "out", "--codes", "dense-int3")
    refused(run(*arguments), "out exists; pass --force to replace it")
    assert (tmp_path / "out").read_text() == "precious"
    assert run(*arguments, "--force").exit_code == 0
    assert describe(tmp_path / "out").version == 2


def test_a_disk_that_cannot_be_written(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the system says reaches the user: here a full disk, at the last step."""

    def full(_: int) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "out"))

    monkeypatch.setattr(os, "fsync", full)
    refused(run("compress", model_folder, "-o", tmp_path / "out", "--codes", "dense-int3"), "No space left")
    assert os.listdir(tmp_path) == []
    monkeypatch.undo()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write anywhere
    refused(run("compress", model_folder, "-o", tmp_path / "out", "--codes", "dense-int3"), "no permission")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(tmp_path: Path, how: signal.Signals) -> None:
    """Stopped while it works: exit code 130, one line, no file."""
    w = real.layer(0, "intermediate.dense.weight")
    write_safetensors(tmp_path / "in", {f"w{i}": w for i in range(40)})
    command = [
        sys.executable,
        "-m",
        "rbe_gpu.cli",
        "compress",
        tmp_path / "in",
        "-o",
        tmp_path / "out",
        "--grade",
        "A",
    ]
    with subprocess.Popen(
        command,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a suite that runs in the background ignores SIGINT, and its children would too
        preexec_fn=lambda: signal.signal(how, signal.SIG_DFL),
    ) as running:
        deadline = time.monotonic() + 60
        # the nameless temporary file is open once tensors are being written
        while not any(str(tmp_path) in t and "deleted" in t for t in open_files(running.pid)):
            assert time.monotonic() < deadline
            assert running.poll() is None
            time.sleep(0.05)
        running.send_signal(how)
        stdout, stderr = running.communicate(timeout=60)
    assert running.returncode == 130
    assert stdout == ""
    assert stderr == "rbe-gpu: interrupted; nothing was written\n"
    assert os.listdir(tmp_path) == ["in"]


def open_files(pid: int) -> list[str]:
    """What the descriptors of a process point to."""
    found = []
    for handle in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(os.readlink(handle))
        except OSError:  # closed in between
            continue
    return found

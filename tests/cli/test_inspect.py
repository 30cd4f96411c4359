"""`rbe-gpu inspect`."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

from rbe_gpu.container import save_file

from .command import process, refused, run


def test_inspect(model_file: Path) -> None:
    result = run("inspect", model_file)
    assert result.exit_code == 0, result.stderr
    assert "encoder.layer.0.attention.self.query.weight" in result.stdout
    assert "dense-int6" in result.stdout
    assert "format version 2" in result.stdout
    assert "model bert" in result.stdout
    info = json.loads(run("inspect", model_file, "--json").stdout)
    assert info["version"] == 2
    assert {t["kind"] for t in info["tensors"]} == {"matrix", "vectors", "dense"}
    assert info["header_bytes"] + sum(t["bytes"] for t in info["tensors"]) == info["file_bytes"]


def test_inspect_refusals(tmp_path: Path, model_file: Path, model_folder: Path) -> None:
    refused(run("inspect", tmp_path / "absent"), "absent: No such file or directory")
    refused(run("inspect", tmp_path), "not a regular file")
    refused(run("inspect", model_folder / "model.safetensors"), "without RBE weights")
    refused(run("inspect", model_folder / "config.json"), "not a safetensors file")
    raw = bytearray(model_file.read_bytes())
    (tmp_path / "cut").write_bytes(raw[:-1])
    refused(run("inspect", tmp_path / "cut"), "cut")
    (n,) = struct.unpack("<Q", raw[:8])
    entries = json.loads(raw[8 : 8 + n])
    name = "encoder.layer.0.output.dense.weight"
    begin = 8 + n + entries[f"{name}.scale"]["data_offsets"][0]
    raw[begin : begin + 2] = b"\x00\x7e"
    (tmp_path / "nan").write_bytes(raw)
    refused(process("inspect", tmp_path / "nan"), f'tensor "{name}": scale holds NaN or Inf')


def test_inspect_is_not_fooled_by_names(tmp_path: Path) -> None:
    """Control characters and markup in names reach no terminal."""
    save_file(tmp_path / "a", {"\x1b[2J[red]x[/nope]\n": np.zeros(3, np.float32)}, {"model_type": "\x1b[31m"})
    result = run("inspect", tmp_path / "a")
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    assert "\\u001b[2J[red]x[/nope]\\n" in result.stdout

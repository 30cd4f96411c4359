"""`rbe-gpu embed`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from rbe_gpu.container import save_file
from rbe_gpu.models.load import load
from tests import real

from .command import refused, run


def test_embed_lines(tmp_path: Path, model_file: Path) -> None:
    lines = ["first text", "", "Ünïcode, too", *real.texts()[:7]]
    expected = load(model_file).embed(lines)
    for text in ("\n".join(lines), "\n".join(lines) + "\n", "\ufeff" + "\r\n".join(lines) + "\r\n"):
        (tmp_path / "t.txt").write_bytes(text.encode())
        result = run(
            "embed", model_file, tmp_path / "t.txt", "-o", tmp_path / "v.npy", "--batch-size", 4, "-f"
        )
        assert result.exit_code == 0, result.stderr
        vectors = np.load(tmp_path / "v.npy")
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(
            vectors, expected, atol=1e-5
        )  # batches of another size sum in another order
    assert "10 x 96 float32" in result.stdout


def test_embed_from_standard_input(tmp_path: Path, model_file: Path) -> None:
    result = run("embed", model_file, "-", "-o", tmp_path / "v.npy", "--json", stdin=b"one\ntwo\n")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["texts"] == 2
    assert json.loads(result.stdout)["embedding_size"] == 96


def test_int8_activations(tmp_path: Path) -> None:
    """A file of 8-bit codes, of which no layer is named: as it is, and with all layers rounded."""
    model, texts = tmp_path / "m.rbe.safetensors", tmp_path / "t.txt"
    done = run(
        "compress", real.MODEL_DIR, "-o", model, "--codes", "dense-int8", "--transform", "none", "--no-basis"
    )
    assert done.exit_code == 0, done.stderr
    texts.write_text("\n".join(real.texts()[:3]))
    vectors = {}
    for activations in ("int8", "float", None):
        option = () if activations is None else ("--activations", activations)
        result = run("embed", model, texts, "-o", tmp_path / "v.npy", "-f", *option)
        assert result.exit_code == 0, result.stderr
        vectors[activations] = np.load(tmp_path / "v.npy")
    np.testing.assert_array_equal(vectors[None], vectors["float"])
    cosines = (vectors["int8"] * vectors["float"]).sum(axis=1)
    assert cosines.min() > 0.97
    assert cosines.max() < 0.99999
    refusal = run("embed", real.MODEL_DIR, texts, "-o", tmp_path / "v.npy", "-f", "--activations", "int8")
    refused(refusal, "takes no int8 activations: ", "the weight is dense")


def test_embed_nothing(tmp_path: Path, model_file: Path) -> None:
    (tmp_path / "t.txt").touch()
    result = run("embed", model_file, tmp_path / "t.txt", "-o", tmp_path / "v.npy")
    assert result.exit_code == 0, result.stderr
    assert np.load(tmp_path / "v.npy").shape == (0, 96)


def test_embed_refusals(tmp_path: Path, model_file: Path, model_folder: Path) -> None:
    (tmp_path / "t.txt").write_text("text\n")
    (tmp_path / "latin").write_bytes("Köln".encode("latin1"))
    out = tmp_path / "v.npy"
    refused(run("embed", model_file, tmp_path / "absent", "-o", out), "absent: No such file")
    refused(run("embed", model_file, tmp_path / "latin", "-o", out), "latin is not UTF-8 text (byte 1)")
    refused(
        run("embed", tmp_path / "absent.rbe.safetensors", tmp_path / "t.txt", "-o", out), "does not exist"
    )
    refused(
        run("embed", model_folder / "config.json", tmp_path / "t.txt", "-o", out), "not a safetensors file"
    )
    refused(run("embed", model_file, tmp_path / "t.txt", "-o", tmp_path / "no" / "v"), "make it first")
    save_file(tmp_path / "bare", {"a": np.zeros(3, np.float32)})
    refused(run("embed", tmp_path / "bare", tmp_path / "t.txt", "-o", out), "no model")
    out.write_text("precious")
    refused(run("embed", model_file, tmp_path / "t.txt", "-o", out), "exists; pass --force")
    assert out.read_text() == "precious"

"""The table of quantised decoders: files of this project, and the importance matrix for llama.cpp."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from rbe_gpu.reports.quality import decoders

from rbe_gpu.models.compress import compress_model
from rbe_gpu.models.load import load_decoder

from .architectures.decoder_cases import write_with_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_with_tokenizer(tmp_path_factory.mktemp("decoders") / "model")


def test_a_table_of_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for codes in ("dense-int8", "dense-int4"):
        files.append(tmp_path / f"{codes}.rbe.safetensors")
        compress_model(folder, files[-1], codes=codes, transform="none")
    (tmp_path / "t.txt").write_text("some text of words\nand another line\n" * 8)
    arguments = [
        folder,
        *files,
        "--texts",
        tmp_path / "t.txt",
        "--tool",
        "llama.cpp",
        "--csv",
        tmp_path / "rows",
    ]
    assert decoders.main(list(map(str, arguments))) == 0
    said = capsys.readouterr().out
    assert "dense " in said
    # one of the two: the package, or a file that it reads
    assert "llama.cpp is not installed" in said or "llama.cpp quantises GGUF files only" in said
    with open(tmp_path / "rows", newline="") as rows:
        wide, narrow = csv.DictReader(rows)
    assert (wide["name"], narrow["name"]) == ("dense-int8", "dense-int4")
    assert int(narrow["bytes"]) == files[1].stat().st_size < int(wide["bytes"])
    assert 0 < float(wide["kl"]) < float(narrow["kl"])
    assert float(narrow["bits_per_weight"]) == pytest.approx(
        32 * int(narrow["bytes"]) / load_decoder(folder).dense_nbytes
    )


def test_importance(folder: Path) -> None:
    """Of the first layer's projections by their definition; the results of the model are the same."""
    dense, recorded = load_decoder(folder), load_decoder(folder)
    texts = ["some text of words", "and another line"]
    columns = decoders.importance(recorded, texts, window=16)
    ids = np.asarray(dense.token_ids("\n\n".join(texts)), np.int64)
    table = np.asarray(dense.word_embeddings.weight, np.float64)
    x = table[ids]
    norm = np.asarray(dense.layers[0].norms[0].weight, np.float64)
    h = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + dense.settings.eps) * norm
    for part in ("attn_q", "attn_k", "attn_v"):
        np.testing.assert_allclose(columns[f"blk.0.{part}.weight"], (h**2).mean(axis=0), rtol=1e-4)
    assert len(columns) == 7 * dense.settings.num_layers
    assert {value.dtype for value in columns.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(recorded.forward(ids[None]), dense.forward(ids[None]))

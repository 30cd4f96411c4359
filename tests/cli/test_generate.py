"""`rbe-gpu generate`, and `rbe-gpu eval` of decoders."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rbe_gpu.models.load import load
from tests import real

from .command import process, refused, run


@pytest.fixture(scope="module")
def decoder_file(decoder_folder: Path) -> Path:
    out = decoder_folder.parent / "m.rbe.safetensors"
    result = run("compress", decoder_folder, "-o", out, "--codes", "dense-int8", "--transform", "none")
    assert result.exit_code == 0, result.stderr
    return out


def test_text_on_standard_output_and_figures_beside_it(decoder_folder: Path) -> None:
    want = load(decoder_folder).generate("the thing", 12)[0]
    result = run("generate", decoder_folder, "the thing", "-n", 12)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "the thing" + want.text + "\n"
    assert re.fullmatch(
        rf"rbe-gpu: {want.prompt_tokens} \+ {len(want.ids)} tokens \((length|eos)\); loaded in [\d.]+ s, "
        r"first text after [\d.]+ s, then [\d.]+ tokens/s\n",
        result.stderr,
    )
    again = run("generate", decoder_folder, "-n", 12, stdin=b"the thing\n")
    assert again.stdout == result.stdout


def test_json(decoder_file: Path) -> None:
    options = ("-n", 6, "--temperature", 1.5, "--top-k", 40, "--top-p", 0.9, "--seed", 5, "--json")
    result = run("generate", decoder_file, "and then", *options)
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    want = load(decoder_file).generate("and then", 6, temperature=1.5, top_k=40, top_p=0.9, seed=5)[0]
    assert facts["text"] == want.text
    assert list(facts) == [
        *("text", "prompt_tokens", "new_tokens", "reason", "load_seconds", "first_token_seconds"),
        "tokens_per_second",
    ]
    assert (facts["prompt_tokens"], facts["new_tokens"], facts["reason"]) == (
        want.prompt_tokens, len(want.ids), want.reason,
    )  # fmt: skip


def test_chat_and_stop(decoder_folder: Path) -> None:
    model = load(decoder_folder)
    want = model.chat([{"role": "user", "content": "hello"}], 20)
    result = run("generate", decoder_folder, "hello", "--chat", "-n", 20)
    assert result.stdout == want.text + "\n"
    cut = next(c for c in want.text[3:] if c.isprintable())
    result = run("generate", decoder_folder, "hello", "--chat", "-n", 20, "--stop", cut, "--json")
    facts = json.loads(result.stdout)
    assert facts["text"] == want.text[: want.text.index(cut)]
    assert facts["reason"] == "stop"


def test_a_prompt_that_is_too_long(decoder_folder: Path) -> None:
    refused(run("generate", decoder_folder, "word " * 300), "tokens, the model has 200 positions")


def test_commands_of_encoders_refuse_a_decoder(
    tmp_path: Path, decoder_folder: Path, decoder_file: Path
) -> None:
    texts = tmp_path / "t.txt"
    texts.write_text("some text\n" * 12, "utf-8")
    for model in (decoder_folder, decoder_file):
        refused(run("embed", model, texts, "-o", tmp_path / "v.npy"), "is a decoder, which makes no vectors")
        refused(run("warmup", model, "--arch", 90), "is a decoder, which makes no vectors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.txt"]


def test_warmup(decoder_folder: Path, decoder_file: Path) -> None:
    for model in (decoder_folder, decoder_file):
        facts = json.loads(run("warmup", model, "--cpu", "--json").stdout)
        assert facts["device"] == "cpu"
        assert facts["second_batch_seconds"] > 0


def test_eval(tmp_path: Path, decoder_folder: Path, decoder_file: Path, model_file: Path) -> None:
    texts = tmp_path / "t.txt"
    texts.write_text("\n".join(real.texts()[:3]) + "\n", "utf-8")
    done = run("eval", decoder_file, "--texts", texts, "--json")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["against"] == str(decoder_folder)
    dense, compressed = result["dense"], result["compressed"]
    assert dense["tokens"] == compressed["tokens"] > 100
    assert (dense["kl"], dense["top_1"]) == (0.0, 1.0)
    assert 0 < compressed["kl"] < 0.1
    assert compressed["perplexity"] == pytest.approx(dense["perplexity"], rel=0.05)
    assert compressed["ratio"] == pytest.approx(dense["bytes"] / decoder_file.stat().st_size)
    shown = run("eval", decoder_file, "--texts", texts)
    assert "KL divergence from dense, mean" in shown.stdout
    refused(run("eval", decoder_file, "--against", real.MODEL_DIR), "generates no text; it makes vectors")


def test_calibrate(tmp_path: Path, decoder_folder: Path) -> None:
    """Of few texts, which are compared with plain compression."""
    texts, out = tmp_path / "t.txt", tmp_path / "c"
    texts.write_text("some text of a few words\n" * 12, "utf-8")
    result = run("compress", decoder_folder, "-o", out, "--ratio", 4, "--calibrate", texts, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["ratio"] >= 4
    assert run("generate", out, "some", "-n", 3).exit_code == 0


def test_gguf_from_compression_to_text(tmp_path: Path) -> None:
    """SmolLM2 in processes of their own, as a user runs them."""
    out = tmp_path / "smollm2.rbe.safetensors"
    done = process(
        "compress", real.smollm2(), "-o", out, "--codes", "dense-int5", "--transform", "none", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ratio"] > 5.5
    done = process("generate", out, "The capital of France is", "-n", 8)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The capital of France is Paris")

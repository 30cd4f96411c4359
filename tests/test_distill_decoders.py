"""Training of small decoders: whole runs, the files that come out, and the command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu.evaluate_decoders import evaluate_decoders, log_softmax
from rbe_gpu.models import corpus
from rbe_gpu.models.compress import compress_model
from rbe_gpu.models.int8_choice import int8_parts, int8_windows, predicted
from rbe_gpu.models.load import load_decoder
from rbe_gpu.train.distill import distill

from . import gguf_files, real
from .architectures.decoder_cases import write_with_tokenizer
from .cli.command import refused, run
from .test_distill import Interrupt, spied

pytest.importorskip("torch", reason="training needs PyTorch, which `make test` installs with the baselines")
pytestmark = pytest.mark.filterwarnings("ignore:calibrating on:UserWarning")  # bytes are few different tokens

from rbe_gpu.train import checkpoint, prediction_task  # noqa: E402
from rbe_gpu.train import held_out as held  # noqa: E402
from rbe_gpu.train.measures import Divergence  # noqa: E402
from rbe_gpu.train.prediction_task import PredictionTask  # noqa: E402

RATIO = 6.0
OPTIONS: dict[str, Any] = {"ratio": RATIO, "batch_size": 8, "max_tokens": 64}


@pytest.fixture(scope="module", autouse=True)
def _calibrated() -> Iterator[None]:
    """Start files are calibrated, also where plain ones would be better: bytes are few different tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "held_out", lambda count: [])
        yield


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(real.texts()[:400])


def _model(path: Path, texts: list[str], **settings: Any) -> tuple[Path, Path]:
    """A model folder of one layer with random weights, and a calibrated file of it."""
    folder = write_with_tokenizer(path / "model", num_hidden_layers=1, **settings)
    compress_model(folder, path / "start", ratio=RATIO, calibrate=texts[:60])
    return folder, path / "start"


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> tuple[Path, Path]:
    return _model(tmp_path_factory.mktemp("tied"), texts)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> tuple[Path, Path]:
    return _model(tmp_path_factory.mktemp("untied"), texts, tie_word_embeddings=False)


def _train(model: tuple[Path, Path], texts: list[str], out: Path, **options: Any) -> Any:
    return distill(model[0], texts, out=out, start=model[1], **{**OPTIONS, "steps": 6, **options})


def test_training_lowers_the_divergence_at_equal_bytes(
    tied: tuple[Path, Path], texts: list[str], tmp_path: Path
) -> None:
    seen: list[Any] = []
    summary = _train(tied, texts, tmp_path / "out", steps=120, progress=seen.append)
    assert summary.file_bytes == (tmp_path / "out").stat().st_size <= summary.dense_bytes / RATIO
    assert summary.result.tokens == summary.start.tokens > 1000
    assert summary.result.kl < summary.start.kl
    assert summary.result.top_1 > summary.start.top_1
    # of text that had no part in it; the model has 200 positions
    some, dense = list(real.texts()[1000:1040]), load_decoder(tied[0])
    trained, before = (
        evaluate_decoders(load_decoder(path), dense, some, window=128).compressed
        for path in (tmp_path / "out", tied[1])
    )
    assert trained.kl < 0.92 * before.kl
    assert trained.top_1 > before.top_1
    assert [point[0] for point in summary.curve] == [0, 100, 120]
    assert summary.curve[-1][3].kl < summary.curve[0][3].kl
    assert isinstance(seen[-1].training, Divergence)
    assert seen[-1].best == max((point[3] for point in summary.curve), key=lambda measure: measure.score)


def test_the_first_point_of_the_curve_is_the_start_file(
    untied: tuple[Path, Path], texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the logits of both models on the held-out windows; its output matrix is not the dense one."""
    read = spied(monkeypatch)
    summary = _train(untied, texts, tmp_path / "out", steps=1)
    dense, start = load_decoder(untied[0]), load_decoder(untied[1]).with_int8_activations(())
    assert np.abs(np.asarray(start.head.decode()) - np.asarray(dense.head)).max() > 0.01
    kl, same = [], []
    for window in read[0][1]:
        p, q = (log_softmax(model.logits(window[None])[0]) for model in (dense, start))
        kl.append((np.exp(p) * (p - q)).sum(1))
        same.append(p.argmax(1) == q.argmax(1))
    first = summary.curve[0][3]
    assert first.kl == pytest.approx(np.concatenate(kl).mean(), rel=1e-3)
    assert first.top_1 == pytest.approx(np.concatenate(same).mean(), abs=0.002)


def test_the_file_has_int8_activations_where_they_cost_little(
    tied: tuple[Path, Path], texts: list[str], tmp_path: Path
) -> None:
    held_out = texts[:40]
    summary = _train(tied, texts, tmp_path / "out", held_out=held_out)
    assert not summary.is_start
    dense, trained = load_decoder(tied[0]), load_decoder(tmp_path / "out")
    plain = trained.with_int8_activations(())
    windows = int8_windows(PredictionTask(dense).sequences(held_out, 256))
    logs = list(predicted(dense, windows))
    names = int8_parts(plain, windows, lambda: logs)
    assert sorted(trained.int8_activations) == sorted(names)
    assert names


def test_a_size_just_below_the_estimate(tied: tuple[Path, Path], texts: list[str], tmp_path: Path) -> None:
    """The state that was chosen exceeds it by some bytes: the file is coarser by as little."""
    free = _train(tied, texts, tmp_path / "free", steps=100, ratio=None, file_bytes=40_000)
    estimate = free.curve[-1][2]
    assert free.file_bytes > estimate  # names of weights with int8 activations, and facts
    tight = _train(tied, texts, tmp_path / "out", steps=100, ratio=None, file_bytes=round(estimate) - 5)
    assert tight.file_bytes == (tmp_path / "out").stat().st_size < estimate
    assert not tight.is_start
    assert tight.result.kl < tight.start.kl


def test_no_file_is_worse_than_a_start_that_fits(
    tied: tuple[Path, Path], texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def far_too_coarse(tensors: dict[str, Any], grids: Any, *rest: Any) -> bool:
        for name, grid in grids.items():
            grid.coarsen(3.0)
            tensors[name] = grid.stored()
        return True

    monkeypatch.setattr("rbe_gpu.train.distill._coarsen", far_too_coarse)
    summary = _train(tied, texts, tmp_path / "out", ratio=5.5)
    assert summary.is_start
    assert summary.result == summary.start
    assert (tmp_path / "out").read_bytes() == tied[1].read_bytes()
    assert summary.file_bytes == tied[1].stat().st_size
    size = tied[1].stat().st_size - 1
    smaller = _train(tied, texts, tmp_path / "out", ratio=None, file_bytes=size)
    assert not smaller.is_start  # the start file does not fit
    assert smaller.result.kl > smaller.start.kl


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupt_or_error_after_the_last_step_loses_nothing(
    error: type[BaseException],
    tied: tuple[Path, Path],
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _train(tied, texts, tmp_path / "a")

    def stop(*_: Any) -> Any:
        raise error

    for part in ("int8_activations", "quality"):
        with monkeypatch.context() as patch:
            patch.setattr(PredictionTask, part, stop)
            with pytest.raises(error):
                _train(tied, texts, tmp_path / part)
        assert (tmp_path / part).exists() == (part == "quality")  # it is written before it is measured
        resumed = _train(tied, texts, tmp_path / part, resume=True, progress=stop)  # no step is left
        assert resumed.steps == 6
        assert (tmp_path / part).read_bytes() == (tmp_path / "a").read_bytes()
        assert not checkpoint.path_for(tmp_path / part).exists()


def test_held_out_texts_are_not_trained_on(
    tied: tuple[Path, Path], texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = spied(monkeypatch)
    tokenizer = load_decoder(tied[0]).tokenizer
    one = "\n\n".join(texts)
    _train(tied, texts, tmp_path / "a", steps=1)
    _train(tied, texts, tmp_path / "b", steps=1, held_out=texts[:40])
    _train(tied, [one], tmp_path / "c", steps=1)
    for trained, held_out in read:
        left, right = (tokenizer.decode(np.concatenate(windows)) for windows in (trained, held_out))
        parts = [part for part in right.split("\n\n") if len(part) > 60]
        assert len(parts) > 5
        assert not [part for part in parts if part in left]
        assert len(left) > 8 * len(right)


def test_two_runs_and_a_resumed_one_give_the_same_file(
    untied: tuple[Path, Path], texts: list[str], tmp_path: Path
) -> None:
    first = _train(untied, texts, tmp_path / "a")
    assert not first.interrupted
    stopped = _train(untied, texts, tmp_path / "c", progress=Interrupt(3))
    assert (stopped.interrupted, stopped.steps) == (True, 3)
    load_decoder(tmp_path / "c")  # the best so far, a whole file
    with pytest.raises(
        ValueError, match="of a run with another batch size, tokens, precision, learning rate or seed"
    ):
        _train(untied, texts, tmp_path / "c", resume=True, max_tokens=65)
    steps: list[int] = []
    _train(untied, texts, tmp_path / "c", resume=True, progress=lambda s: steps.append(s.step))
    assert steps == [4, 5, 6]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()
    assert not checkpoint.path_for(tmp_path / "c").exists()
    smaller = _train(untied, texts, tmp_path / "d", seed=1, ratio=6.5)
    assert smaller.ratio >= 6.5
    assert load_decoder(tmp_path / "d").generate(["def "], 4)[0].ids


def test_bfloat16_matmuls_train_the_same_model(
    tied: tuple[Path, Path], texts: list[str], tmp_path: Path
) -> None:
    losses = []
    for precision in ("float32", "bfloat16"):
        seen: list[Any] = []
        _train(tied, texts, tmp_path / precision, steps=4, precision=precision, progress=seen.append)
        losses.append([status.loss for status in seen])
    assert losses[0] != losses[1]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.02)


def test_windows_begin_as_the_tokenizer_begins_texts(tied: tuple[Path, Path]) -> None:
    model = load_decoder(tied[0])
    task = PredictionTask(model)
    some = ["one text", "", "another one, which is longer"]
    ids = model.token_ids("\n\n".join(some))
    windows = task.sequences(some, 10)
    assert np.concatenate(windows).tolist() == ids
    assert [len(window) for window in windows[:-1]] == [10] * (len(windows) - 1)
    assert task.sequences([], 10) == task.sequences(["a"], 10) == []
    assert len(task.sequences(["a" * 500], 1000)[0]) == model.settings.max_positions == 200

    from tokenizers import processors

    model.tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 7)])
    windows = task.sequences(some, 10)
    assert {int(window[0]) for window in windows} == {7}
    assert np.concatenate([window[1:] for window in windows]).tolist() == ids
    assert max(map(len, windows)) == 10


def test_texts_are_tokenized_in_pieces(
    tied: tuple[Path, Path], texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut before a space between words, or before any space, or anywhere; the ids are those of the whole."""
    model = load_decoder(tied[0])
    some = [*texts[:60], "x" * 5000, "a\n.\n" * 300, "", *texts[60:90]]
    whole = model.token_ids("\n\n".join(some))
    for size in (50, 1000, 4097):
        monkeypatch.setattr(prediction_task, "_PIECE", size)
        pieces = list(prediction_task._pieces(some))
        assert "".join(pieces) == "\n\n".join(some)
        assert max(map(len, pieces)) <= size
        assert np.concatenate(PredictionTask(model).sequences(some, 64)).tolist() == whole

    from tokenizers import processors

    model.tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 7), ("</s>", 8)]
    )
    windows = PredictionTask(model).sequences(some, 64)
    assert np.concatenate([window[1:] for window in windows]).tolist() == [*whole, 8]


def test_the_default_held_out_texts_are_counted_in_tokens() -> None:
    def words(text: str) -> list[int]:
        return [0] * len(text.split())

    def tokens(texts: list[str]) -> int:
        return sum(len(words(text)) for text in texts)

    for count, length in ((1, 12_000), (5, 3000), (21, 2000), (3000, 40), (40, 30_000)):
        texts = [" ".join(f"{i:04}.{k:05}" for k in range(length)) for i in range(count)]
        trained, held_out = held.by_tokens(texts, words, 640)
        assert tokens(trained) + tokens(held_out) == count * length
        assert sorted(" ".join([*held_out, *trained]).split()) == sorted(" ".join(texts).split())
        expected = min(max(count * length / 16, 640), 16_384)
        assert 0.9 * expected < tokens(held_out) < 1.1 * expected
        again, other = held.by_tokens(texts[::-1], words, 640)
        assert (sorted(again), other) == (sorted(trained), held_out)
    assert held.bounded(texts[:1], words) == texts[:1]
    assert 0.9 * 32_768 < tokens(held.bounded(texts, words)) < 1.1 * 32_768
    assert held.by_tokens([], words, 640) == ([], [])
    assert held.by_tokens([""], words, 640)[1] == []


def test_windows_that_choose_int8_parts_are_few() -> None:
    for count in range(1, 40):
        windows = int8_windows([np.zeros(256)] * count)
        assert min(count, 5) <= len(windows) <= 8
        assert {len(window) for window in windows} == {128}


def test_a_gguf_file_is_calibrated_and_trained(texts: list[str], tmp_path: Path) -> None:
    """Without a start file."""
    model = gguf_files.small(tmp_path / "m.gguf", "qwen3")
    out = tmp_path / "out" / "m.rbe.safetensors"
    out.parent.mkdir()
    summary = distill(model, texts[:160], out=out, ratio=5.0, steps=2, max_tokens=64, batch_size=4)
    assert summary.ratio >= 5
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert load_decoder(out).settings == load_decoder(model).settings


def test_errors(tied: tuple[Path, Path], texts: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"

    def refuses(match: str, model: tuple[Path, Path] = tied, some: list[str] = texts, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            _train(model, some, out, **options)

    refuses("batch_size=0 is too small; use 1 or more", batch_size=0)
    refuses("max_tokens=1 is too small; use 2 or more", max_tokens=1)
    refuses(r"sequences of 64 tokens, too few to train on; pass text for 64 or more", some=texts[:30])
    refuses("held-out texts of 5 tokens are too short to choose a state on; pass 512", held_out=["hello"])
    refuses("the highest reachable ratio is below", ratio=1000)
    refuses("is not a model folder or GGUF file", model=(tied[1], tied[1]))
    compress_model(tied[0], tmp_path / "plain", ratio=4)
    refuses("only grid codes .* start from a calibrated file", model=(tied[0], tmp_path / "plain"))
    other = write_with_tokenizer(tmp_path / "other", num_hidden_layers=1, rms_norm_eps=1e-6)
    refuses("is not of this model", model=(other, tied[1]))
    (other / "tokenizer.json").unlink()
    (other / "tokenizer_config.json").unlink()
    refuses("has no tokenizer.json", model=(other, tied[1]))
    assert not out.exists()


def test_the_command(tied: tuple[Path, Path], texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("\n".join(texts), "utf-8")
    training = ("--texts", tmp_path / "texts", "--ratio", RATIO, "--steps", 2)
    command = ("distill", tied[0], "--start", tied[1], *training)
    options = ("--max-tokens", 64)
    result = run(*command, *options, "-o", tmp_path / "a")
    assert result.exit_code == 0, result.stderr
    assert "mean KL" in result.stdout
    assert "same most probable token" in result.stdout
    assert "cosine" not in result.stdout
    result = run(*command, *options, "-o", tmp_path / "b", "--json")
    facts = json.loads(result.stdout)
    assert facts["result"].keys() == {"tokens", "perplexity", "kl", "kl_p99", "top_1"}
    assert facts["curve"][0].keys() == {"steps", "minutes", "bytes", "held_out_kl", "held_out_top_1"}
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    refused(run(*command, "-o", tmp_path / "c", "--batch-size", 1000), "too few to train on")
    assert not (tmp_path / "c").exists()
    assert rbe.load(tmp_path / "a").settings.tied

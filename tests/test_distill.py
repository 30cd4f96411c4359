"""Training of a small encoder: the forward pass, the grids, the loop, and the files that come out."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import rbe_gpu as rbe
from rbe_gpu.codecs import GridCodes
from rbe_gpu.models.compress import compress_model
from rbe_gpu.models.load import load_folder
from rbe_gpu.train.distill import LEARNING_RATE, distill, start_path

from . import real
from .cli.command import refused, run
from .test_compress_model import cut_tensors, make_model

torch = pytest.importorskip(
    "torch", reason="training needs PyTorch, which `make test` installs with the baselines"
)

from rbe_gpu.models.bert import BertEncoder  # noqa: E402
from rbe_gpu.models.encoders import canonical_name  # noqa: E402
from rbe_gpu.train import checkpoint, interrupts, loop, objective, schedule  # noqa: E402
from rbe_gpu.train.batches import Batches, in_order, padded  # noqa: E402
from rbe_gpu.train.measures import Cosine  # noqa: E402
from rbe_gpu.train.pooling import Pooling  # noqa: E402
from rbe_gpu.train.quantizer import Grid  # noqa: E402
from rbe_gpu.train.rate import Rate  # noqa: E402
from rbe_gpu.train.student import Student  # noqa: E402
from rbe_gpu.train.trainer import RowAdam, Step, Trainer  # noqa: E402

from .architectures.cases import CONFIGS, weights  # noqa: E402
from .architectures.test_states import RECORDED  # noqa: E402

RATIO = 20.0
OPTIONS: dict[str, Any] = {"ratio": RATIO, "batch_size": 8, "max_tokens": 24}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(real.texts()[:160])


def random_tensors() -> dict[str, np.ndarray]:
    """Of the shapes of the small model. Its own weights, cut, give all texts nearly one vector."""
    rng = np.random.default_rng(11)
    tensors = {}
    for name, a in cut_tensors().items():
        if a.ndim == 2 and a.dtype == np.float32:
            tensors[name] = rng.normal(0, a.shape[1] ** -0.5, a.shape).astype(np.float32)
        else:
            gain = "LayerNorm.weight" in name
            tensors[name] = np.ones_like(a) if gain else a if a.dtype != np.float32 else np.zeros_like(a)
    return tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("distill") / "model", random_tensors())


@pytest.fixture(scope="module")
def start(folder: Path, texts: list[str]) -> Path:
    out = folder.parent / "start.rbe.safetensors"
    compress_model(folder, out, ratio=RATIO, calibrate=texts)
    return out


# --- the student ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pooling", ["mean", "max", "cls", "lasttoken", "weightedmean", "mean_sqrt_len_tokens"]
)
@pytest.mark.parametrize("prompt", ["", "a query: "])
def test_the_forward_pass_is_that_of_the_encoder(folder: Path, pooling: str, prompt: str) -> None:
    model = load_folder(folder)
    model.pooling = (pooling, "mean")
    model.include_prompt, model.truncate_dim = False, 40
    model.prompts, model.default_prompt_name = {"p": prompt}, "p"
    some = ["one", *real.texts()[:6]]
    sequences = model.token_ids(some, prompt)
    student = Student.of(model)
    weights = {n: torch.from_numpy(np.array(w, np.float32)) for n, w in model.tensors().items()}
    batch = padded(sequences, "cpu")
    words = weights["embeddings.word_embeddings.weight"][batch.ids]
    states = student.states(weights, words, batch.text)
    lengths = np.array([len(s) for s in sequences])
    expected = model.forward(batch.ids.numpy(), lengths, all_hidden_states=True)
    assert len(states) == len(expected) == 2
    for ours, encoder in zip(states, expected, strict=True):
        # sums of 96 and 160 float32 products of values near 1, in another order
        np.testing.assert_allclose(ours[batch.text].numpy(), encoder[batch.text.numpy()], atol=1e-5)
    vectors = Pooling.of(model).vectors(states[-1], batch.text, {}).numpy()
    np.testing.assert_allclose(vectors, model.embed(some, normalize=True), atol=1e-5)


# --- grids ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_forward_pass_of_other_encoders(name: str) -> None:
    shapes = {key: tuple(shape) for key, shape in json.loads(str(RECORDED[f"{name}.shapes"])).items()}
    model = BertEncoder(weights(shapes), CONFIGS[name])
    tensors = {canonical_name(key): torch.from_numpy(value) for key, value in weights(shapes).items()}
    ids = torch.from_numpy(np.random.RandomState(2).randint(2, 48, (3, 20)))  # without tokens of padding
    lengths = torch.tensor([20, 7, 1])
    text = torch.arange(20) < lengths[:, None]
    *_, states = Student.of(model).states(tensors, tensors["embeddings.word_embeddings.weight"][ids], text)
    want = model.forward(ids.numpy(), lengths.numpy())
    assert np.abs(states.numpy() - want)[text.numpy()].max() <= 1e-5 * np.abs(want).max()


def _stored(kind: str, transform: str, rows: int, cols: int, shrink: float = 0.0) -> Any:
    rng = np.random.default_rng(3)
    block = 32
    rows_pad = -(-rows // block) * block if kind == "matrix" else rows
    cols_pad = -(-cols // block) * block
    q = rng.integers(-3, 4, (rows_pad, cols_pad))
    row_scale, col_scale = rng.uniform(0.5, 2, rows_pad), rng.uniform(0.5, 2, cols_pad)
    codes = GridCodes.from_integers(q, row_scale, col_scale, shrink)
    make = rbe.RBEMatrix if kind == "matrix" else rbe.RBEVectors
    return make((rows, cols), block, transform, 0.125, None, codes)


GRIDS = [
    ("matrix", "none", 70, 96, 0.0),
    ("matrix", "dct", 70, 50, 0.0),
    ("vectors", "dct", 33, 50, 0.0),
    ("vectors", "none", 5, 32, 0.125),
    ("matrix", "dwt-bior3.1", 64, 64, 0.0),
]


@pytest.mark.parametrize(("kind", "transform", "rows", "cols", "shrink"), GRIDS)
def test_a_grid_starts_as_its_file_and_is_stored_as_it_is(
    kind: str, transform: str, rows: int, cols: int, shrink: float
) -> None:
    stored = _stored(kind, transform, rows, cols, shrink)
    decoded = stored.decode()
    noise = np.random.default_rng(4).normal(0, 0.05, decoded.shape).astype(np.float32)
    grid = Grid(stored, decoded + noise, "cpu")
    np.testing.assert_allclose(grid.weight().detach().numpy(), decoded, atol=2e-6)
    np.testing.assert_array_equal(grid.stored().codes.value, stored.codes.value)
    before = grid.integers()
    with torch.no_grad():
        grid.latents.add_(0.3)
        grid.factor.add_(0.1)
    trained = grid.stored()
    assert (grid.integers() != before).any()
    np.testing.assert_allclose(grid.weight().detach().numpy(), trained.decode(), atol=2e-6)
    if kind == "vectors":
        index = torch.tensor([rows - 1, 0])
        taken = grid.rows(index, grid.latents[index]).detach().numpy()
        np.testing.assert_allclose(taken, trained.decode()[[rows - 1, 0]], atol=2e-6)


def test_the_gradient_of_rounding_is_one() -> None:
    stored = _stored("matrix", "none", 32, 32)
    grid = Grid(stored, stored.decode(), "cpu")
    grid.latents.requires_grad_()
    grid.weight().sum().backward()
    codes = stored.codes
    scales = codes.row_scale.astype(np.float32)[:, None] * codes.col_scale.astype(np.float32) * stored.gain
    np.testing.assert_allclose(grid.latents.grad.numpy(), scales, rtol=1e-6)
    column_sums = stored.decode().sum(axis=0)  # d w / d log s = w
    np.testing.assert_allclose(grid.factor.grad.numpy(), column_sums, rtol=1e-4, atol=1e-4)


def test_a_coarser_step_takes_fewer_bytes_and_moves_no_latent() -> None:
    stored = _stored("matrix", "none", 128, 128)
    grid = Grid(stored, stored.decode(), "cpu")
    before = (grid.latents * grid.factor.exp()).numpy(force=True)
    rate = Rate({"w": grid}, 10_000)
    assert rate.file_bytes() == pytest.approx(10_000)
    bits = rate.bits(10_000)
    grid.coarsen(2.0)
    np.testing.assert_allclose((grid.latents * grid.factor.exp()).numpy(force=True), before, rtol=1e-6)
    assert rate.bits(rate.file_bytes()) < bits - 0.6  # of 2.8: a bit less is the limit for fine steps
    assert grid.stored().nbytes < stored.nbytes


def test_only_grid_codes_are_trained() -> None:
    weight = np.random.default_rng(1).normal(size=(64, 64)).astype(np.float32)
    with pytest.raises(ValueError, match="codes are dense-int4, and only grid codes"):
        Grid(rbe.compress(weight, codes="dense-int4"), weight, "cpu")


# --- batches, loss, schedule ----------------------------------------------------------------------------


def _sequences(count: int) -> list[Any]:
    rng = np.random.default_rng(2)
    return [np.full(rng.integers(3, 20), i, np.int32) for i in range(count)]


def test_an_epoch_has_every_text_once_and_the_next_another_order() -> None:
    sequences = _sequences(64)
    batches = Batches(sequences, 4, 5, "cpu")
    epochs = [[int(i) for step in range(n, n + 16) for i in batches.at(step).ids[:, 0]] for n in (0, 16)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(64))
    assert epochs[0] != epochs[1]
    again, other = Batches(sequences, 4, 5, "cpu"), Batches(sequences, 4, 6, "cpu")
    assert torch.equal(again.at(17).ids, batches.at(17).ids)  # whatever was asked before
    assert not all(torch.equal(other.at(s).ids, batches.at(s).ids) for s in range(16))


def test_batches_are_of_similar_length() -> None:
    batches = Batches(_sequences(640), 8, 0, "cpu")
    filled = np.mean([float(batches.at(step).text.float().mean()) for step in range(80)])
    assert filled > 0.85  # 0.58 in random batches
    index = [i for part, _ in in_order(_sequences(20), 8, "cpu") for i in part]
    assert sorted(index) == list(range(20))


def test_the_loss() -> None:
    u = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    v = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    x = [torch.ones(2, 3, 2)]
    text = torch.ones(2, 3, dtype=torch.bool)
    assert objective.loss(u, x, u, x, text).total == 0
    result = objective.loss(u, [2 * x[0]], v, x, text)
    # cosines 1 and 0; (2 - 1)^2 / 1^2; similarities 0 for 1 in two of four pairs
    assert result.cosine == 0.5
    assert result.states == 1
    assert float(result.total) == pytest.approx(3 * 0.5 + 1 + 5 * 0.5)
    text[:, 2] = False
    padding = [torch.cat([x[0][:, :2], torch.full((2, 1, 2), 9.0)], dim=1)]
    assert objective.loss(u, padding, u, x, text).total == 0


def test_the_size_falls_from_start_to_end_and_the_rate_to_zero() -> None:
    sizes = [schedule.target_bytes(done, 1000.0, 400.0) for done in np.linspace(0, 1, 101)]
    assert sizes[0] == pytest.approx(998)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[50] == sizes[-1] == pytest.approx(0.998 * 400)
    assert schedule.target_bytes(0.0, 300.0, 400.0) == pytest.approx(0.998 * 400)  # a small start may grow
    rates = [schedule.learning_rate(1000, done, True) for done in np.linspace(0, 1, 101)]
    assert rates[:50] == [1.0] * 50
    assert rates[50:] == sorted(rates[50:], reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    assert schedule.learning_rate(0, 0.0, True) < 0.05
    assert schedule.step_factor(2.0, 1.0) == 1.03
    assert schedule.step_factor(1.0, 2.0) == 1.0
    assert schedule.step_factor(1.01, 1.0) == pytest.approx(2**0.01)


class _Scripted:
    """A trainer whose cosine on held-out texts is that of a function of the steps done."""

    def __init__(self, cosine: Any) -> None:
        self.grids: dict[str, Any] = {}
        self._cosine, self._steps = cosine, 0

    def held_out(self) -> Cosine:
        return Cosine(float(self._cosine(self._steps)))

    def step(self, index: int, rate: float) -> Any:
        self._steps = index + 1
        return Step(0.0, Cosine(0.0))

    def snapshot(self) -> int:
        return self._steps

    def restore(self, best: int) -> None:
        self._steps = best


@pytest.mark.parametrize(
    ("cosine", "steps", "best"),
    [
        (lambda n: 0.9 if n == 0 else 0.8 + n / 1e5, 8000, 0),  # below the start for long, and rising
        (lambda n: 0.9 if n == 0 else 0.88 + n / 1e5, 8000, 8000),
        (
            lambda n: 0.9 - n / 1e6,
            5900,
            0,
        ),  # never better: 15 evaluations after the rate is half of its height
    ],
)
def test_training_that_gains_no_more_ends_when_the_rate_has_fallen(
    cosine: Any, steps: int, best: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = SimpleNamespace(fixed=0.0, file_bytes=lambda: 1000.0, bits=lambda _: 1.0)
    monkeypatch.setattr(loop, "Rate", lambda *_: size)
    monkeypatch.setattr(checkpoint, "write", lambda *_: None)
    trainer = _Scripted(cosine)
    one = loop.Loop(trainer, 1000, 1000, 8000, None, tmp_path / "checkpoint", {})
    one.run(None)
    one.finish()
    assert one.steps == steps
    assert trainer.snapshot() == best


def test_adam_of_rows_is_adam() -> None:
    rng = torch.Generator().manual_seed(1)
    rows = torch.randn(6, 4, generator=rng)
    dense = rows.clone().requires_grad_()
    adam = torch.optim.Adam([dense], lr=LEARNING_RATE, betas=(0.9, 0.98), eps=1e-12)
    lazy = RowAdam(rows)
    untouched = rows[5].clone()
    for _ in range(5):
        gradient = torch.randn(6, 4, generator=rng)
        dense.grad = gradient
        adam.step()
        lazy.update(rows, torch.arange(5), gradient[:5], LEARNING_RATE)
    torch.testing.assert_close(rows[:5], dense.detach()[:5])
    assert torch.equal(rows[5], untouched)


def test_an_interrupt_waits_for_the_end_of_a_step() -> None:
    done = []

    @interrupts.held()
    def step() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        done.append("step")

    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored where a shell runs this behind itself
    try:
        with pytest.raises(KeyboardInterrupt):
            step()
        assert done == ["step"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


# --- whole runs -----------------------------------------------------------------------------------------


class Interrupt:
    """A progress callback that interrupts after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, status: Any) -> None:
        if status.step == self.step:
            raise KeyboardInterrupt


def spied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Any], list[Any]]]:
    """The training and the held-out sequences of every Trainer that is made from now on."""
    read: list[tuple[list[Any], list[Any]]] = []
    init = Trainer.__init__

    def noting(
        self: Trainer, task: Any, tensors: Any, fixed: Any, trained: Any, held_out: Any, *rest: Any
    ) -> None:
        read.append((list(trained), list(held_out)))
        init(self, task, tensors, fixed, trained, held_out, *rest)

    monkeypatch.setattr(Trainer, "__init__", noting)
    return read


def _train(folder: Path, texts: list[str], start: Path, out: Path, **options: Any) -> Any:
    return distill(folder, texts, out=out, start=start, **{**OPTIONS, "steps": 6, **options})


def test_two_runs_and_a_resumed_one_give_the_same_file(
    folder: Path, texts: list[str], start: Path, tmp_path: Path
) -> None:
    first = _train(folder, texts, start, tmp_path / "a")
    assert first.file_bytes == (tmp_path / "a").stat().st_size <= first.dense_bytes / RATIO
    assert not first.interrupted
    _train(folder, texts, start, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    stopped = _train(folder, texts, start, tmp_path / "c", progress=Interrupt(3))
    assert stopped.interrupted
    assert stopped.steps == 3
    assert rbe.load(tmp_path / "c").embed(["a text"]).shape == (1, 96)  # the best so far, a whole file
    path = checkpoint.path_for(tmp_path / "c")
    with pytest.raises(ValueError, match="of a run with another texts"):
        _train(folder, texts[:-1], start, tmp_path / "c", resume=True)
    with pytest.raises(
        ValueError, match="of a run with another batch size, tokens, precision, learning rate or seed"
    ):
        _train(folder, texts, start, tmp_path / "c", resume=True, seed=1)
    steps = []
    resumed = _train(
        folder, texts, start, tmp_path / "c", resume=True, progress=lambda s: steps.append(s.step)
    )
    assert steps == [4, 5, 6]
    assert resumed.steps == 6
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()
    assert not path.exists()
    assert not first.is_start
    _train(folder, texts, start, tmp_path / "d", seed=1)
    assert (tmp_path / "d").read_bytes() != (tmp_path / "a").read_bytes()
    _train(folder, texts, start, tmp_path / "e", learning_rate=0.02)
    assert (tmp_path / "e").read_bytes() != (tmp_path / "a").read_bytes()


def test_training_gains_at_the_same_size(folder: Path, start: Path, tmp_path: Path) -> None:
    """On many texts: on 160, the integers learn the texts, and others lose by it."""
    seen: list[Any] = []
    many = list(real.texts()[:1200])
    summary = _train(folder, many, start, tmp_path / "out", steps=300, batch_size=16, progress=seen.append)
    assert summary.file_bytes <= summary.dense_bytes / RATIO
    dense = rbe.load(folder)
    # as short as what was trained on; they had no part in it
    some = [text[:80] for text in real.texts()[2000:2064]]
    trained, before = (
        1 - float((rbe.load(path).embed(some) * dense.embed(some)).sum(1).mean())
        for path in (tmp_path / "out", start)
    )
    assert trained < 0.95 * before  # 0.72 measured; after 200 steps 0.87 or 1.01, by the rounding of sums
    assert [s.step for s in seen] == list(range(1, 301))
    assert [point[0] for point in summary.curve] == [0, 100, 200, 300]


def test_training_goes_down_to_a_smaller_size(
    folder: Path, texts: list[str], start: Path, tmp_path: Path
) -> None:
    smaller = _train(folder, texts, start, tmp_path / "out", steps=100, ratio=22)
    assert smaller.ratio >= 22
    assert rbe.load(tmp_path / "out").embed(["a text"]).shape == (1, 96)


def test_bfloat16_matmuls_train_the_same_model(
    folder: Path, texts: list[str], start: Path, tmp_path: Path
) -> None:
    seen: dict[str, list[Any]] = {"float32": [], "bfloat16": []}
    for precision, statuses in seen.items():
        _train(
            folder,
            texts,
            start,
            tmp_path / precision,
            steps=40,
            precision=precision,
            progress=statuses.append,
        )
    exact, rounded = (np.array([s.loss for s in statuses]) for statuses in seen.values())
    assert (exact != rounded).all()
    # factors of 8 bits: a product is off by 2^-9, a sum of 96 of them by less
    np.testing.assert_allclose(rounded, exact, rtol=0.01)


def test_without_a_start_file_the_model_is_calibrated(folder: Path, texts: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = distill(folder, texts, out=out, steps=1, **OPTIONS)
    assert summary.ratio >= RATIO
    assert os.listdir(tmp_path) == ["out"]


def test_a_start_file_that_another_run_left_is_not_taken(
    folder: Path, texts: list[str], start: Path, tmp_path: Path
) -> None:
    left = start_path(tmp_path / "out")
    left.write_bytes(b"of a run with other texts")
    with pytest.raises(rbe.FormatError):
        distill(folder, texts, out=tmp_path / "out", steps=1, resume=True, **OPTIONS)
    distill(folder, texts, out=tmp_path / "out", steps=1, **OPTIONS)
    assert os.listdir(tmp_path) == ["out"]


def test_held_out_texts_are_not_trained_on(
    folder: Path, texts: list[str], start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = spied(monkeypatch)
    whole = {"steps": 1, "max_tokens": 128}  # the first words of two texts may be the same
    _train(folder, texts, start, tmp_path / "a", **whole)
    _train(folder, texts, start, tmp_path / "b", held_out=texts[:20], **whole)
    for trained, held_out in read:
        assert len(held_out) >= 11
        assert not {s.tobytes() for s in trained} & {s.tobytes() for s in held_out}
    assert [len(held_out) for _, held_out in read] == [12, 20]
    assert [len(trained) for trained, _ in read] == [len(texts) - 12, len(texts) - 20]


def test_memory_that_pytorch_does_not_get(
    folder: Path, texts: list[str], start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's own errors: of the CPU, and the class of those of a GPU."""
    wanted: list[Any] = [lambda: torch.empty(1 << 55, dtype=torch.uint8), None, None]
    wanted[1:] = [
        _raising(torch.cuda.OutOfMemoryError("CUDA out of memory.")),
        _raising(RuntimeError("a size")),
    ]
    for step, error in zip(wanted, (MemoryError, MemoryError, RuntimeError), strict=True):
        monkeypatch.setattr(Trainer, "step", lambda self, index, rate, step=step: step())
        with pytest.raises(error) as caught:
            _train(folder, texts, start, tmp_path / "out")
        if error is MemoryError:
            assert "use less than batch_size=8, or than max_tokens=24" in str(caught.value)
            assert "allocate" in str(caught.value) or "CUDA out of memory." in str(caught.value)


def _raising(error: Exception) -> Any:
    def step() -> Any:
        raise error

    return step


def test_a_gpu_that_there_is_not(
    folder: Path, texts: list[str], start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(device: str, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            _train(folder, texts, start, tmp_path / "out", device=device)

    for device in ("cpu:3", "cuda:", "cuda:-1", "cuda:x", "cudax"):
        refuses(device, 'use "cpu" or "cuda"')
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refuses("cuda:7", "device='cuda:7', but PyTorch sees no GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refuses("cuda:7", "device='cuda:7', but the last GPU that PyTorch sees is cuda:1")


def test_errors(folder: Path, texts: list[str], start: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def refuses(match: str, model: Path = folder, some: list[str] = texts, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            distill(model, some, out=out, **{**OPTIONS, "steps": 2, "start": start, **options})

    refuses("give one of ratio= or file_bytes=", ratio=None)
    refuses("give one of ratio= or file_bytes=", file_bytes=1000)
    refuses("give one of minutes= or steps=", minutes=1.0)
    refuses("ratio=-1 is not a positive number", ratio=-1)
    refuses("batch_size=1 is too small", batch_size=1)
    refuses("max_tokens=2 leaves no room", max_tokens=2)
    refuses('device="?.tpu', device="tpu")
    refuses("precision='int8'; use one of", precision="int8")
    refuses("learning_rate=0 is not above 0", learning_rate=0)
    refuses("learning_rate=nan is not above 0", learning_rate=float("nan"))
    refuses("different texts with a token are too few", some=texts[:40])
    refuses("different texts with a token are too few", some=[" " * (i + 1) for i in range(200)])
    refuses("5 held-out texts are too few", held_out=texts[:5])
    refuses("the highest reachable ratio is below", ratio=1000)
    refuses("is not a model folder", model=start)
    compress_model(folder, tmp_path / "plain", ratio=4)
    refuses("only grid codes .* start from a calibrated file", start=tmp_path / "plain")
    shutil.copytree(folder, tmp_path / "other")
    config = (tmp_path / "other" / "config.json").read_text()
    (tmp_path / "other" / "config.json").write_text(
        config.replace('"layer_norm_eps": 1e-12', '"layer_norm_eps": 1e-6')
    )
    refuses("is not of this model", model=tmp_path / "other")
    checkpoint.path_for(out).write_bytes(b"no checkpoint")
    refuses("is no checkpoint", resume=True)
    assert not out.exists()


def test_without_pytorch(
    folder: Path, texts: list[str], start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"pip install 'rbe-gpu\[train\]'"):
        _train(folder, texts, start, tmp_path / "out")
    (tmp_path / "texts").write_text("\n".join(texts))
    options = ("--ratio", 8, "--steps", 1, "--texts", tmp_path / "texts")
    refused(run("distill", folder, "-o", tmp_path / "out", *options), "pip install 'rbe-gpu[train]'")


# --- the command ----------------------------------------------------------------------------------------


def test_the_command(folder: Path, texts: list[str], start: Path, tmp_path: Path) -> None:
    for name, part in (("one", texts[:80]), ("two", texts[80:])):
        (tmp_path / name).write_text("\n".join(part))
    out = tmp_path / "out.rbe.safetensors"
    command = (
        "distill",
        folder,
        "-o",
        out,
        "--ratio",
        RATIO,
        "--steps",
        2,
        "--batch-size",
        8,
        "--max-tokens",
        24,
    )
    result = run(*command, "--start", start, "--texts", tmp_path / "one", "--texts", tmp_path / "two")
    assert result.exit_code == 0, result.stderr
    assert "2 steps in" in result.stdout
    assert rbe.load(out).embed(["a text"]).shape == (1, 96)
    again = run(*command, "--start", start, "--texts", tmp_path / "one")
    refused(again, "exists; pass --force")
    refused(
        run(*command, "--force", "--start", tmp_path / "none", "--texts", tmp_path / "one"), "is not a file"
    )


@pytest.mark.parametrize(
    "options", [("--steps", 1), ("--ratio", 8), ("--ratio", 8, "--bytes", 9, "--steps", 1)]
)
def test_the_command_wants_one_size_and_one_length(folder: Path, tmp_path: Path, options: Any) -> None:
    result = run("distill", folder, "-o", tmp_path / "out", "--texts", folder / "config.json", *options)
    assert result.exit_code == 2
    assert "give one of them" in result.stderr

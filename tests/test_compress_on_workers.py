"""compress_model on workers: the bytes of one process."""

from __future__ import annotations

import os
import pickle
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rbe_gpu.cluster import TaskPool
from rbe_gpu.models import compress_tasks, corpus
from rbe_gpu.models.allocation import Weight
from rbe_gpu.models.calibrate import calibrate
from rbe_gpu.models.compress import CompressSummary, compress_model
from rbe_gpu.models.encoder_probes import stages_of
from rbe_gpu.models.encoder_stages import linear_weight
from rbe_gpu.models.load import load, load_decoder, load_embedder, load_encoder
from rbe_gpu.models.parts_folder import PartsFolder
from rbe_gpu.models.scratch import Scratch
from rbe_gpu.models.sensitivity import Measurements, MeasurementsOnWorkers, sums_of
from rbe_gpu.models.source import open_source
from rbe_gpu.threads import get_num_threads, set_num_threads
from tests import gguf_files, real
from tests.architectures.decoder_cases import write_with_tokenizer
from tests.architectures.test_embedders import MODERNBERT
from tests.architectures.test_embedders import folder as embedder_folder
from tests.small_cluster import executing, worker_of_threads, workers
from tests.test_compress_model import cut_tensors, make_model


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with workers(2) as client:
        yield client


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("compress") / "minilm-cut")


def both(folder: Path, tmp_path: Path, client: Any, **target: Any) -> CompressSummary:
    """Compress on workers and in one process; the bytes and the summaries are the same."""
    out, expected = tmp_path / "m.rbe.safetensors", tmp_path / "expected.rbe.safetensors"
    summary = compress_model(folder, out, client=client, **target)
    one = compress_model(folder, expected, **target)
    assert out.read_bytes() == expected.read_bytes()
    assert summary.rows == one.rows
    assert summary.relative_error == one.relative_error
    assert sorted(os.listdir(tmp_path)) == ["expected.rbe.safetensors", "m.rbe.safetensors"]
    return summary


@pytest.mark.parametrize(
    "target",
    [{"grade": "B"}, {"ratio": 3.0}, {"ratio": 3.0, "codes": "dense-int4"}, {"density": 0.3}],
    ids=["grade", "ratio", "ratio-dense", "density"],
)
def test_the_bytes_of_one_process(folder: Path, tmp_path: Path, client: Any, target: dict[str, Any]) -> None:
    both(folder, tmp_path, client, **target)


def test_minilm(tmp_path: Path, client: Any) -> None:
    summary = both(real.MODEL_DIR, tmp_path, client, codes="dense-int4", transform="none", basis=False)
    assert sum(row.kind != "dense" for row in summary.rows) > 30


def test_calibrated(folder: Path, tmp_path: Path, client: Any) -> None:
    """Of texts in two batches, whose sums are added up in order."""
    texts = real.texts()[:100]
    tokens = sum(map(len, load_embedder(folder).token_ids(texts)))
    assert 4096 < tokens < 8192
    both(folder, tmp_path, client, ratio=3.0, calibrate=texts)


def test_two_threads_of_a_worker_measure_the_same(folder: Path, decoder: Decoder, tmp_path: Path) -> None:
    """The model's scratch memory is that of one thread, so tasks of a worker's threads must not overlap."""
    model, texts = load_encoder(folder), real.texts()[:32]
    alone = Measurements(model)
    geometries = alone.geometries(texts, "none", lambda name: 64, Scratch())
    weights = [
        Weight.of_matrix(name, partial(linear_weight, linear), geometries[name])
        for layer in stages_of(model)
        for name, linear in layer.linears.items()
    ]
    expected = {name: measure() for name, measure in alone.sensitivities(weights, texts)}
    with worker_of_threads(2) as client, PartsFolder(client, open_source(folder), tmp_path / "m") as parts:
        on_workers = MeasurementsOnWorkers(model, parts)
        for _ in range(8):
            measured = {name: measure() for name, measure in on_workers.sensitivities(weights, texts)}
            assert measured == expected
        decoder.compressed(tmp_path / "decoder" / "m", client)


def test_a_killed_run_of_workers_leaves_nothing(folder: Path, tmp_path: Path, client: Any) -> None:
    """Nor does one that is stopped while workers write."""

    def stop(*_: Any) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        compress_model(folder, tmp_path / "m", codes="dense-int4", client=client, progress=stop)
    assert os.listdir(tmp_path) == []


def test_a_task_of_a_stopped_run_writes_nothing(folder: Path, tmp_path: Path, client: Any) -> None:
    """A task that its run could not end goes on while another run writes the same file."""
    source = open_source(folder)
    with PartsFolder(client, source, tmp_path / "m") as stopped:
        pass
    name = next(name for name in sorted(source.files) if name.endswith("query.weight"))
    part = stopped.path / "000000.safetensors"
    task = compress_tasks._Task(stopped.source, stopped.files, name, {"codes": "dense-int4"}, str(part))
    with PartsFolder(client, source, tmp_path / "m") as parts:
        with pytest.raises(FileNotFoundError):
            compress_tasks._encode_part(task)
        assert os.listdir(parts.path) == []
    assert os.listdir(tmp_path) == []


def test_what_a_killed_run_leaves_goes(folder: Path, tmp_path: Path, client: Any) -> None:
    left = tmp_path / ".m.parts" / "0123456789abcdef"
    left.mkdir(parents=True)
    (left / "000000.safetensors").write_bytes(b"x")
    with PartsFolder(client, open_source(folder), tmp_path / "m") as parts:
        assert not left.exists()
        assert os.listdir(parts.path) == []


def test_a_killed_worker(folder: Path, tmp_path: Path, client: Any) -> None:
    """A worker is killed while tasks run; others repeat them, and the bytes stay those of one process."""
    killed: list[str] = []

    def kill(*_: Any) -> None:
        busy = [worker for worker, keys in client.run_on_scheduler(executing).items() if keys]
        if busy and not killed:
            killed.append(busy[0])
            os.kill(client.run(os.getpid)[busy[0]], signal.SIGKILL)

    compress_model(folder, tmp_path / "m", grade="B", client=client, progress=kill)
    compress_model(folder, tmp_path / "expected", grade="B")
    assert killed
    assert (tmp_path / "m").read_bytes() == (tmp_path / "expected").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["expected", "m"]
    client.wait_for_workers(2, timeout=60)


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the tasks and results that pass through the scheduler."""
    sizes = []
    submit, result = TaskPool.submit, TaskPool.result

    def noted_submit(self: TaskPool, function: Any, task: Any) -> Any:
        sizes.append(len(pickle.dumps(task)))
        return submit(self, function, task)

    def noted_result(self: TaskPool, future: Any) -> Any:
        value = result(self, future)
        sizes.append(len(pickle.dumps(value)))
        return value

    monkeypatch.setattr(TaskPool, "submit", noted_submit)
    monkeypatch.setattr(TaskPool, "result", noted_result)
    return sizes


def test_weights_and_codes_do_not_pass_through_the_scheduler(
    folder: Path, tmp_path: Path, client: Any, messages: list[int]
) -> None:
    """Tasks and their results are a few names and numbers."""
    compress_model(folder, tmp_path / "m", ratio=3.0, calibrate=real.texts()[:24], client=client)
    compress_model(folder, tmp_path / "n", codes="dense-int4", client=client)
    assert len(messages) > 20
    assert max(messages) < 2000


def test_bad_weights(folder: Path, tmp_path: Path, client: Any) -> None:
    tensors = cut_tensors()
    name = next(name for name in tensors if name.endswith("query.weight"))
    tensors[name][3, 4] = np.nan
    make_model(tmp_path / "bad", tensors)
    with pytest.raises(ValueError, match=r"query\.weight holds NaN"):
        compress_model(tmp_path / "bad", tmp_path / "m", codes="dense-int4", client=client)
    assert os.listdir(tmp_path) == ["bad"]


def test_a_pipe_is_no_place_for_workers(folder: Path, tmp_path: Path, client: Any) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="workers need a folder"):
        compress_model(folder, tmp_path / "pipe", codes="dense-int4", client=client)


# --- calibrated decoders ------------------------------------------------------------------------------

#: 4,000 tokens of the tokenizers of bytes here: 20 windows of 200, in three batches
WORDS = [text[:100] for text in corpus.calibration(60) if len(text) >= 100][:40]
few_tokens = pytest.mark.filterwarnings("ignore:calibrating on:UserWarning")


class Decoder(NamedTuple):
    """A folder, and the bytes of its file, compressed and calibrated in one process with one thread."""

    source: Path
    expected: bytes

    def compressed(self, out: Path, client: Any, **options: Any) -> None:
        """On workers; the bytes are those of one process, and nothing else is left."""
        out.parent.mkdir(exist_ok=True)
        calibrated(self.source, out, client=client, **options)
        assert out.read_bytes() == self.expected
        assert os.listdir(out.parent) == [out.name]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """A layer of float16 weights, and a table that makes the logits."""
    path = tmp_path_factory.mktemp("decoder")
    source = write_with_tokenizer(path / "model", np.float16, num_hidden_layers=1)
    summary = calibrated(source, path / "m")
    assert sum(row.codes.startswith("grid") for row in summary.rows) == 8
    return Decoder(source, (path / "m").read_bytes())


def calibrated(source: Path, out: Path, **options: Any) -> CompressSummary:
    """A calibrated file, although it gains little: there is no text to compare it with a plain one."""
    with pytest.MonkeyPatch.context() as patch, one_thread(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "calibrating on", UserWarning)
        patch.setattr(corpus, "held_out", lambda count: [])
        return compress_model(source, out, ratio=4.0, block=32, calibrate=WORDS, **options)


@contextmanager
def one_thread() -> Iterator[None]:
    before = get_num_threads()
    set_num_threads(1)
    try:
        yield
    finally:
        set_num_threads(before)


def test_a_decoder_and_a_killed_worker(
    decoder: Decoder, tmp_path: Path, client: Any, messages: list[int]
) -> None:
    """A worker is killed while sensitivities are measured. Windows, geometries and sums are in files."""
    killed: list[str] = []

    def kill(stage: str, *_: Any) -> None:
        if stage == "sensitivity" and not killed:
            killed.extend(w for w, keys in client.run_on_scheduler(executing).items() if keys)
            for worker in killed[:1]:
                os.kill(client.run(os.getpid)[worker], signal.SIGKILL)

    decoder.compressed(tmp_path / "m", client, progress=kill)
    assert killed
    assert len(messages) == 2 * (3 + 8)
    assert max(messages) < 2000
    client.wait_for_workers(2, timeout=60)


def test_a_decoder_goes_on(
    decoder: Decoder, tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sensitivities that an interrupted run has measured are not measured again."""
    measured: list[str] = []
    sensitivities = MeasurementsOnWorkers.sensitivities

    def noted(self: Any, weights: Any, inputs: Any) -> Any:
        measured.extend(weight.name for weight in weights)
        return sensitivities(self, weights, inputs)

    def interrupt(stage: str, done: int, _: int) -> None:
        if (stage, done) == ("sensitivity", 5):
            raise KeyboardInterrupt

    monkeypatch.setattr(MeasurementsOnWorkers, "sensitivities", noted)
    with pytest.raises(KeyboardInterrupt):
        decoder.compressed(tmp_path / "m", client, progress=interrupt)
    assert os.listdir(tmp_path) == [".m.journal"]
    assert len(measured) == 8
    decoder.compressed(tmp_path / "m", client, resume=True)
    assert len(measured) == 8 + 3


@few_tokens
@pytest.mark.parametrize(
    "make",
    [
        lambda path: gguf_files.small(path, "qwen3", head=True),
        lambda path: embedder_folder(MODERNBERT, path),
    ],
    ids=["GGUF with a matrix of the logits", "ModernBERT"],
)
def test_what_is_measured_of_a_decoder(make: Callable[[Path], Path], tmp_path: Path, client: Any) -> None:
    """Geometries and sensitivities, to the bit."""
    source = make(tmp_path / "model")
    model = load(source)
    with one_thread(), PartsFolder(client, open_source(source), tmp_path / "m") as parts:
        one, other = (
            calibrate(model, WORDS, block=32, parts=p)  # type: ignore[call-overload]
            for p in (None, parts)
        )
        assert {os.path.splitext(name)[1] for name in os.listdir(parts.path)} == {".json"}
    assert one.sensitivity == other.sensitivity
    assert len(one.sensitivity) > 8
    for name, weight in one._weights.items():
        expected, measured = weight.geometry, other._weights[name].geometry
        assert (expected is None) == (measured is None)
        if expected is not None:
            np.testing.assert_array_equal(measured.order, expected.order)
            np.testing.assert_array_equal(measured.upper, expected.upper)
            np.testing.assert_array_equal(measured.step, expected.step)


def test_sums_of_a_decoder(decoder: Decoder, tmp_path: Path, client: Any) -> None:
    """Of every batch and layer, in order, to the bit; files go when they are read."""
    model = load_decoder(decoder.source)
    inputs = [list(range(1, 9 + i)) for i in range(20)]
    sums = sums_of(model, inputs)
    assert sums.count == 3
    with one_thread(), PartsFolder(client, open_source(decoder.source), tmp_path / "m") as parts:
        here = Measurements(model)._batches(sums, inputs)
        there = MeasurementsOnWorkers(model, parts)._batches(sums, inputs)
        for one, other in zip(here, there, strict=True):
            for layer, measured in zip(one, other, strict=True):
                assert layer.keys() == measured.keys()
                for stage in layer:
                    for expected, value in zip(layer[stage], measured[stage], strict=True):
                        np.testing.assert_array_equal(value, expected)
        assert [name for name in os.listdir(parts.path) if name.endswith(".pickle")] == []


@few_tokens
def test_refusals_of_decoders(decoder: Decoder, tmp_path: Path, client: Any) -> None:
    """As in one process, and nothing is left."""
    target = {"ratio": 4.0, "client": client}
    with pytest.raises(ValueError, match="fewer than two tokens"):
        compress_model(decoder.source, tmp_path / "m", calibrate=["x"], **target)
    assert os.listdir(tmp_path) == []
    bad = write_with_tokenizer(tmp_path / "bad", num_hidden_layers=1)
    tensors = load_file(bad / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = np.nan
    save_file(tensors, bad / "model.safetensors")
    with pytest.raises(ValueError, match=r"up_proj\.weight holds NaN"):
        compress_model(bad, tmp_path / "m", calibrate=WORDS, **target)
    assert os.listdir(tmp_path) == ["bad"]

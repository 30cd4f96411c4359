"""compress_model on workers: the bytes of one process."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rbe_gpu.cluster import TaskPool
from rbe_gpu.models import compress_tasks
from rbe_gpu.models.allocation import Weight
from rbe_gpu.models.compress import CompressSummary, compress_model
from rbe_gpu.models.encoder_probes import stages_of
from rbe_gpu.models.encoder_stages import linear_weight
from rbe_gpu.models.load import load_embedder, load_encoder
from rbe_gpu.models.parts_folder import PartsFolder
from rbe_gpu.models.scratch import Scratch
from rbe_gpu.models.sensitivity import Measurements, MeasurementsOnWorkers
from rbe_gpu.models.source import open_source
from tests import real
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


def test_two_threads_of_a_worker_measure_the_same(folder: Path, tmp_path: Path) -> None:
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


def test_weights_and_codes_do_not_pass_through_the_scheduler(
    folder: Path, tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks and their results are a few names and numbers."""
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
    compress_model(folder, tmp_path / "m", ratio=3.0, calibrate=real.texts()[:24], client=client)
    compress_model(folder, tmp_path / "n", codes="dense-int4", client=client)
    assert len(sizes) > 20
    assert max(sizes) < 2000


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

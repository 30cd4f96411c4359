"""`rbe-gpu embed` and `compress` with --scheduler."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distributed
import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest

import rbe_gpu.cluster
from rbe_gpu.cluster import ClusterError, check_workers, connect, connected, run_tasks, tasks
from rbe_gpu.cluster import workers as checks
from rbe_gpu.embed_files import embed_files
from tests import real
from tests.small_cluster import workers

from .command import ENV, refused, run

NOBODY = "tcp://127.0.0.1:9"


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with workers(1) as client:
        yield client


@pytest.fixture
def address(client: Any) -> str:
    return str(client.scheduler.address)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(real.texts()[:9]) + "\n")
    return path


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "TIMEOUT", 1.0)


def test_embed(tmp_path: Path, texts: Path, model_file: Path, address: str) -> None:
    result = run("embed", model_file, texts, "-o", tmp_path / "out", "--scheduler", address, "--json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert (printed["texts"], printed["shards"], printed["embedding_size"]) == (9, 1, 96)
    assert run("embed", model_file, texts, "-o", tmp_path / "v.npy").exit_code == 0
    one, shard = tmp_path / "v.npy", tmp_path / "out" / "00000-0000000.npy"
    assert shard.read_bytes() == one.read_bytes()
    again = ("embed", model_file, texts, "-o", tmp_path / "out", "--scheduler", address)
    refused(run(*again), "holds vectors; pass --resume to continue, or --force to replace them")
    refused(run(*again, "--resume", "--batch-size", 8), "is of a run with another batch size")
    result = run(*again, "--resume")
    assert "9 x 96 float32 in 1 shards, 1 of them from before" in result.stdout, result.stderr


def test_compress(tmp_path: Path, model_folder: Path, address: str) -> None:
    for name, options in (("a", ("--scheduler", address)), ("b", ())):
        done = run("compress", model_folder, "-o", tmp_path / name, "--codes", "dense-int4", *options)
        assert done.exit_code == 0, done.stderr
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_decoder_and_no_text(tmp_path: Path, decoder_folder: Path, texts: Path, address: str) -> None:
    texts.write_text("x\n")
    result = run(
        "compress", decoder_folder, "-o", tmp_path / "out", "--ratio", 2, "--calibrate", texts,
        "--scheduler", address,
    )  # fmt: skip
    refused(result, "the texts have fewer than two tokens; there is nothing to predict")
    assert os.listdir(tmp_path) == ["texts.txt"]


# --- schedulers and workers that are not as they should be -------------------------------------------


def embeds(tmp_path: Path, texts: Path, model_file: Path, address: str, *options: Any) -> Any:
    """The result of a command that leaves nothing behind."""
    result = run("embed", model_file, texts, "-o", tmp_path / "out", "--scheduler", address, *options)
    assert os.listdir(tmp_path) == ["texts.txt"]
    return result


@pytest.mark.usefixtures("impatient")
def test_no_scheduler(tmp_path: Path, texts: Path, model_file: Path, model_folder: Path) -> None:
    refused(embeds(tmp_path, texts, model_file, NOBODY), f"no scheduler answers at {NOBODY}")
    result = run("compress", model_folder, "-o", tmp_path / "m", "--grade", "B", "--scheduler", NOBODY)
    refused(result, f"no scheduler answers at {NOBODY}")
    assert os.listdir(tmp_path) == ["texts.txt"]


@pytest.fixture
def empty_scheduler() -> Iterator[str]:
    options = {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": "127.0.0.1:0"}
    with distributed.SpecCluster({}, {"cls": distributed.Scheduler, "options": options}) as cluster:
        yield str(cluster.scheduler_address)


@pytest.mark.usefixtures("impatient")
def test_no_workers(tmp_path: Path, texts: Path, model_file: Path, empty_scheduler: str) -> None:
    refused(
        embeds(tmp_path, texts, model_file, empty_scheduler), "has no workers; start some: dask worker tcp:"
    )


def test_a_worker_without_the_package(
    tmp_path: Path, texts: Path, model_file: Path, empty_scheduler: str
) -> None:
    start = "import sys; sys.modules['rbe_gpu'] = None; from distributed.cli.dask_worker import main; main()"
    options = (
        "--no-nanny",
        "--no-dashboard",
        "--nthreads",
        "1",
        "--local-directory",
        str(tmp_path.parent / "w"),
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", start, empty_scheduler, *options], stderr=subprocess.DEVNULL
    )
    try:
        refused(
            embeds(tmp_path, texts, model_file, empty_scheduler), "worker tcp://", "has no rbe_gpu", "install"
        )
    finally:
        worker.terminate()
        worker.wait()


def test_a_worker_of_another_version(
    tmp_path: Path, texts: Path, model_file: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "__version__", "9.9.9")
    refused(
        embeds(tmp_path, texts, model_file, address),
        "the process of this run 9.9.9; install the same version",
    )


def test_a_worker_of_another_version_that_joins_later(
    tmp_path: Path, texts: Path, model_file: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`check_workers` has not seen it, and a task says so."""
    monkeypatch.setattr(tasks, "__version__", "9.9.9")
    with pytest.raises(
        ClusterError, match=r"worker tcp://.* has rbe_gpu .*, the process of this run 9\.9\.9; install"
    ):
        embed_files(client, model_file, [texts], tmp_path / "out")
    assert os.listdir(tmp_path) == ["texts.txt"]


def test_workers_that_die_in_a_task(client: Any) -> None:
    """A task that ends four workers ends the run, and the next run finds a worker."""
    with pytest.raises(ClusterError, match=r"4 workers died in the same task, the last one tcp://.*memory"):
        list(run_tasks(client, os._exit, [1]))
    client.wait_for_workers(1, timeout=60)
    assert [result for _, result in run_tasks(client, abs, [-3])] == [3]


def test_a_file_that_a_worker_does_not_see(tmp_path: Path, client: Any) -> None:
    """A file of this process alone: one of its descriptors. And one of another size there."""
    (tmp_path / "file").write_text("text")
    with open(tmp_path / "file") as file:
        here = Path(f"/proc/self/fd/{os.dup2(file.fileno(), 700)}")
    try:
        with pytest.raises(ClusterError, match=r"worker tcp://.* on .*: /proc/self/fd/700: No such file"):
            check_workers(client, [here])
    finally:
        os.close(700)
    answer = client.run(checks.state, [(str(tmp_path / "file"), 5)], [])
    (problem,) = {state["problem"] for state in answer.values()}
    assert problem.endswith("/file has 4 bytes there and 5 here; workers read the same shared paths")
    with pytest.raises(ClusterError, match="is no folder that can be written"):
        check_workers(client, folders=[tmp_path / "absent"])


def test_another_processor_is_a_warning(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "platform", lambda: {"processor": ["another"]})
    with pytest.warns(RuntimeWarning, match="the last bits of its results"):
        check_workers(client)


def test_without_the_extra(
    tmp_path: Path, texts: Path, model_file: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    refused(embeds(tmp_path, texts, model_file, "local"), "pip install 'rbe-gpu[cluster]'")
    result = run("compress", model_folder, "-o", tmp_path / "m", "--grade", "B", "--scheduler", "local")
    refused(result, "pip install 'rbe-gpu[cluster]'")
    assert os.listdir(tmp_path) == ["texts.txt"]


def test_without_a_gpu(
    tmp_path: Path, texts: Path, model_file: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    refused(embeds(tmp_path, texts, model_file, "local", "--device", "cuda"), "no NVIDIA GPU is visible here")


def test_a_lost_scheduler() -> None:
    """The scheduler ends while a task runs."""
    with connected("local", 1) as client:
        results = run_tasks(client, time.sleep, [0.0, 30.0])
        next(results)
        client.cluster.close()
        with pytest.raises(ClusterError, match="the connection to the scheduler was lost"):
            next(results)


def test_a_column_that_is_not_there(tmp_path: Path, texts: Path, model_file: Path, address: str) -> None:
    table = tmp_path.parent / f"{tmp_path.name}.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), table)
    result = embeds(tmp_path, table, model_file, address)
    refused(result, f"rbe-gpu: {table} has no column 'text'; it has 'body'")
    assert embeds(tmp_path, table, model_file, address, "--field", "n").exit_code == 1
    result = run("embed", model_file, table, "-o", tmp_path / "o", "--scheduler", address, "--field", "body")
    assert result.exit_code == 0, result.stderr


def test_a_model_that_makes_no_vectors(
    tmp_path: Path, texts: Path, decoder_folder: Path, address: str
) -> None:
    refused(
        embeds(tmp_path, texts, decoder_folder, address), f"{decoder_folder} is a decoder, which makes no"
    )


# --- interrupts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--force", "rbe-gpu: interrupted; nothing was written\n"),
        ("--resume", "rbe-gpu: interrupted; the finished part is kept: continue with --resume\n"),
    ],
)
def test_interrupt_before_the_run(
    tmp_path: Path,
    texts: Path,
    model_file: Path,
    address: str,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    message: str,
) -> None:
    """The vectors that are there are another run's if they would have been replaced."""
    command = ("embed", model_file, texts, "-o", tmp_path / "out", "--scheduler", address)
    assert run(*command).exit_code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rbe_gpu.cluster, "connected", interrupt)
    result = run(*command, option)
    assert (result.exit_code, result.stderr) == (130, message)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_interrupt_and_resume(tmp_path: Path, model_file: Path) -> None:
    """The finished shards are kept, no worker stays, and the run goes on."""
    texts, out = tmp_path / "t.txt", tmp_path / "out"
    texts.write_text("a few words\n" * 20 * 1024)
    command = [
        *(sys.executable, "-m", "rbe_gpu.cli", "embed", model_file, texts, "-o", out),
        *("--scheduler", "local", "--workers", "1", "--shard-texts", "1024"),
    ]
    with subprocess.Popen(
        [*map(str, command)],
        env=ENV,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which `cmd &` ignores
    ) as process:
        while len(list(out.glob("0*.npy"))) < 2 and process.poll() is None:
            time.sleep(0.02)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert error == "rbe-gpu: interrupted; the finished part is kept: continue with --resume\n"
    assert children
    assert not psutil.wait_procs(children, timeout=20)[1]
    finished = len((out / "shards.jsonl").read_text().splitlines())
    assert 1 <= finished < 20
    result = run(*command[3:], "--resume", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["resumed_shards"] == finished
    vectors = np.concatenate([np.load(path) for path in sorted(out.glob("0*.npy"))])
    assert vectors.shape == (20 * 1024, 96)
    assert (vectors == vectors[0]).all()

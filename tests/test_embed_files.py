"""embed_files: shards of many files on workers that die, and runs that are continued."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import threading
import time
import tracemalloc
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from rbe_gpu.cluster import TaskPool, connect, run_tasks
from rbe_gpu.embed_files import embed_files, worker
from rbe_gpu.embed_files.folder import OutputFolder
from rbe_gpu.embed_files.text_files import check_columns, check_texts, shards, windows
from rbe_gpu.embed_files.worker import Job, embed_shard, model_digest
from rbe_gpu.models.compress import compress_model
from rbe_gpu.models.load import load_embedder
from rbe_gpu.transfer import to
from tests import real
from tests.host import capture
from tests.small_cluster import executing, workers
from tests.test_compress_model import make_model

WINDOW = 1024


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with workers(3) as client:
        yield client


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small compressed model: the last bits of its vectors depend on the texts of a batch."""
    folder = make_model(tmp_path_factory.mktemp("embed") / "minilm-cut")
    out = folder.with_name("m.rbe.safetensors")
    compress_model(folder, out, codes="dense-int6")
    return out


def words(count: int) -> list[str]:
    """Short texts of real words."""
    text = " ".join(real.texts()).split()
    return [" ".join(text[i * 3 % 997 :][: 2 + i % 5]) for i in range(count)]


def write(folder: Path, texts: list[str]) -> list[Path]:
    """The texts in three files, of all kinds."""
    folder.mkdir(exist_ok=True)
    a, b = len(texts) // 2, len(texts) * 3 // 4
    lines, objects, table = folder / "a.txt", folder / "b.jsonl", folder / "c.parquet"
    lines.write_text("\n".join(texts[:a]) + "\n", encoding="utf-8")
    objects.write_text("".join(json.dumps({"id": 1, "text": t}) + "\n" for t in texts[a:b]))
    columns = pyarrow.table({"n": list(range(len(texts) - b)), "text": texts[b:]})
    pyarrow.parquet.write_table(columns, table, row_group_size=700)
    return [lines, objects, table]


def read_shards(folder: Path, names: list[str]) -> Iterator[np.ndarray]:
    """The vectors (rows, columns) float32 of shards by file name."""
    for name in names:
        path = folder / name
        if path.suffix == ".npy":
            yield np.load(path)
        else:
            column = pyarrow.parquet.read_table(path).column("vector").combine_chunks()
            yield column.flatten().to_numpy().reshape(-1, column.type.list_size)


def of_file(folder: Path, number: int) -> np.ndarray:
    """The vectors of the file of that number."""
    names = sorted(p.name for p in folder.glob(f"{number:05d}-*"))
    return np.concatenate(list(read_shards(folder, names)))


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "shards.jsonl").read_text().splitlines()]


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    """What tells that a shard was not written again."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.glob("0*")}


# --- vectors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_the_bits_of_one_process(tmp_path: Path, client: Any, model: Path, format: str) -> None:
    texts = words(2 * WINDOW + 700)
    files = write(tmp_path / "texts", texts)
    summary = embed_files(client, model, files, tmp_path / "out", format=format, shard_texts=1)
    one = load_embedder(model)
    a, b = len(texts) // 2, len(texts) * 3 // 4
    for number, part in enumerate((texts[:a], texts[a:b], texts[b:])):
        np.testing.assert_array_equal(of_file(tmp_path / "out", number), one.embed(part))
    assert (summary.texts, summary.columns, summary.shards, summary.resumed) == (len(texts), 96, 4, 0)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["complete"]
    assert manifest["texts"] == len(texts)
    for record in log(tmp_path / "out"):
        content = (tmp_path / "out" / record["file"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (record["bytes"], record["sha256"])


def test_minilm(tmp_path: Path, client: Any) -> None:
    texts = real.texts()[:24]
    files = write(tmp_path / "texts", texts)
    embed_files(client, real.MODEL_DIR, files, tmp_path / "out")
    one = load_embedder(real.MODEL_DIR)
    for number, part in enumerate((texts[:12], texts[12:18], texts[18:])):
        np.testing.assert_array_equal(of_file(tmp_path / "out", number), one.embed(part))


def test_rows_of_parquet_shards(tmp_path: Path, client: Any, model: Path) -> None:
    files = write(tmp_path / "texts", words(2 * WINDOW + 20))
    embed_files(client, model, files[:1], tmp_path / "out", format="parquet", shard_texts=1)
    embed_files(client, model, files[:1], tmp_path / "plain")
    table = pyarrow.parquet.read_table(tmp_path / "out/00000-0000001.parquet")
    assert table.column("row").to_pylist() == list(range(WINDOW, WINDOW + 10))
    assert table.schema.metadata[b"texts"] == str(files[0]).encode()
    np.testing.assert_array_equal(of_file(tmp_path / "out", 0), of_file(tmp_path / "plain", 0))


# --- a killed worker ----------------------------------------------------------------------------------


def test_a_killed_worker_repeats_only_its_task(tmp_path: Path, client: Any, model: Path) -> None:
    """One of three worker processes is killed while all of them embed."""
    texts = words(10 * WINDOW)
    (tmp_path / "t.txt").write_text("\n".join(texts) + "\n")
    out = tmp_path / "out"
    killed: dict[str, Any] = {}

    def kill() -> None:
        while len(list(out.glob("0*"))) < 3:
            time.sleep(0.005)
        pids = client.run(os.getpid)
        running = client.run_on_scheduler(executing)
        where = next(worker for worker, keys in running.items() if keys and worker in pids)
        os.kill(pids[where], signal.SIGKILL)
        killed.update(keys=running[where], finished=identities(out))

    thread = threading.Thread(target=kill)
    thread.start()
    summary = embed_files(client, model, [tmp_path / "t.txt"], out, shard_texts=1)
    thread.join()
    assert killed["keys"]
    assert 3 <= len(killed["finished"]) < 10
    assert killed["finished"].items() <= identities(out).items()
    assert summary.shards == len(log(out)) == 10
    assert {r["file"] for r in log(out)} == {p.name for p in out.glob("0*")}
    np.testing.assert_array_equal(of_file(out, 0), load_embedder(model).embed(texts))
    client.wait_for_workers(3, timeout=60)


def test_a_task_of_a_stopped_run_writes_nothing(tmp_path: Path, model: Path) -> None:
    """A task that its run could not end goes on while another run, of another model, writes the same folder."""
    folder = make_model(tmp_path / "minilm-cut")
    (tmp_path / "t.txt").write_text("one\ntwo\n")
    (shard,) = shards([tmp_path / "t.txt"], WINDOW, "text")
    with pytest.raises(Stop), OutputFolder(tmp_path / "out", {"model": "a"}, False, False) as stopped:
        raise Stop
    with OutputFolder(tmp_path / "out", {"model": "b"}, False, True) as out:
        with pytest.raises(FileNotFoundError):
            embed_shard((job_of(folder, stopped.run), shard))
        out.add(embed_shard((job_of(model, out.run), shard)))
        with pytest.raises(FileNotFoundError):
            embed_shard((job_of(folder, stopped.run), shard))
        out.complete({})
    np.testing.assert_array_equal(of_file(tmp_path / "out", 0), load_embedder(model).embed(["one", "two"]))
    assert sorted(os.listdir(tmp_path / "out")) == ["00000-0000000.npy", "manifest.json", "shards.jsonl"]


def test_a_shard_of_a_stopped_run_is_not_taken(tmp_path: Path, model: Path) -> None:
    """What a task wrote that ended after its run was killed goes with the next run."""
    (tmp_path / "t.txt").write_text("one\ntwo\n")
    (shard,) = shards([tmp_path / "t.txt"], WINDOW, "text")
    with pytest.raises(Stop), OutputFolder(tmp_path / "out", {"model": "a"}, False, False) as killed:
        raise Stop
    killed.run.mkdir(parents=True)
    embed_shard((job_of(model, killed.run), shard))
    with OutputFolder(tmp_path / "out", {"model": "b"}, False, False) as out:
        assert not killed.run.exists()
        assert os.listdir(out.run) == []


def test_a_task_that_runs_twice(tmp_path: Path, model: Path) -> None:
    """As when a worker dies before its result arrives."""
    (tmp_path / "t.txt").write_text("one\ntwo\n")
    (shard,) = shards([tmp_path / "t.txt"], WINDOW, "text")
    first = embed_shard((job_of(model, tmp_path), shard))
    content = (tmp_path / first["file"]).read_bytes()
    assert embed_shard((job_of(model, tmp_path), shard)) == first
    assert (tmp_path / first["file"]).read_bytes() == content


def job_of(model: Path, folder: Path, device: str = "cpu") -> Job:
    return Job(str(model), model_digest(model), str(folder), "npy", device, "text", None, 32, "")


# --- runs that are continued --------------------------------------------------------------------------


class Stop(Exception):
    pass


def stopped_run(client: Any, model: Path, texts: Path, out: Path, after: int) -> None:
    """A run that is stopped when some shards are finished."""
    count = 0

    def stop(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == after:
            raise Stop

    with pytest.raises(Stop):
        embed_files(client, model, [texts], out, shard_texts=1, progress=stop)


def test_resume(tmp_path: Path, client: Any, model: Path) -> None:
    texts = words(4 * WINDOW)
    (tmp_path / "t.txt").write_text("\n".join(texts) + "\n")
    out = tmp_path / "out"
    stopped_run(client, model, tmp_path / "t.txt", out, 2)
    finished = {record["file"] for record in log(out)}
    assert len(finished) == 2
    kept = {name: i for name, i in identities(out).items() if name in finished}
    with open(out / "shards.jsonl", "a") as file:
        file.write('{"file": "00000-000')  # a line that was cut off
    summary = embed_files(client, model, [tmp_path / "t.txt"], out, shard_texts=1, resume=True)
    assert (summary.shards, summary.resumed, summary.texts) == (4, 2, len(texts))
    assert kept.items() <= identities(out).items()
    np.testing.assert_array_equal(of_file(out, 0), load_embedder(model).embed(texts))
    assert len(log(out)) == 4


def test_texts_that_are_gone(tmp_path: Path, client: Any, model: Path) -> None:
    """A file that has lost whole shards since the run that is resumed."""
    source, out = tmp_path / "t.txt", tmp_path / "out"
    lines = words(2 * WINDOW)
    source.write_text("\n".join(lines) + "\n")
    embed_files(client, model, [source], out, shard_texts=1)
    before = identities(out)
    source.write_text("\n".join(lines[:WINDOW]) + "\n")
    with pytest.raises(ValueError, match=r"t\.txt has changed since the run"):
        embed_files(client, model, [source], out, shard_texts=1, resume=True)
    assert identities(out) == before
    source.write_text("\n".join(lines) + "\n")
    summary = embed_files(client, model, [source], out, shard_texts=1, resume=True)
    assert (summary.texts, summary.resumed) == (2 * WINDOW, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_name": "typo"}, "the model has no prompt 'typo'"),
        ({"activations": "int7"}, "activations='int7'"),
        ({"format": "csv"}, "format='csv'; use npy or parquet"),
        ({"device": "gpu"}, "device='gpu'; use cpu or cuda"),
        ({"model": "bad"}, "bad.*config"),
        ({"texts": "bad.parquet"}, "is no Parquet file"),
        ({"texts": "latin.txt"}, "line 3 is not UTF-8 text"),
        ({"texts": "bad.jsonl"}, "line 2 has no string 'text'"),
        ({"texts": "null.parquet"}, "row 2 of the column 'text' is null"),
        ({"texts": "half.jsonl"}, r"texts 1 to 2 of .*half\.jsonl: texts\[1\] is not valid Unicode"),
        ({"prompt": "\udcff "}, "the prompt is not valid Unicode"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_force_removes_nothing_for_a_run_that_cannot_start(
    tmp_path: Path, client: Any, model: Path, options: dict[str, Any], message: str
) -> None:
    (tmp_path / "t.txt").write_text("one\ntwo\n")
    out = tmp_path / "out"
    embed_files(client, model, [tmp_path / "t.txt"], out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    shutil.copytree(make_model(tmp_path / "good"), tmp_path / "bad")
    (tmp_path / "bad" / "config.json").write_text('{"model_type": "none such"}')
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "latin.txt").write_bytes(b"one\ntwo\nn\xe9e\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"texts": "two"}\n')
    (tmp_path / "half.jsonl").write_text('{"text": "one"}\n{"text": "\\ud800 a"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", None]}), tmp_path / "null.parquet")
    options = dict(options)
    source, of_model = tmp_path / options.pop("texts", "t.txt"), tmp_path / options.pop("model", model)
    with pytest.raises((ValueError, OSError), match=message):
        embed_files(client, of_model, [source], out, force=True, **options)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_all_texts_are_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a row group of a Parquet file holds many shards."""
    files = write(tmp_path / "texts", words(4 * 3000))
    read = 0
    iter_batches = pyarrow.parquet.ParquetFile.iter_batches

    def counting(*arguments: Any, **options: Any) -> Iterator[Any]:
        nonlocal read
        for batch in iter_batches(*arguments, **options):
            read += len(batch)
            yield batch

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", counting)
    check_texts(files, "text")
    assert read == 3000
    with open(files[1], "a") as lines:
        lines.write('"\\udfff"\n')
    with pytest.raises(
        ValueError, match=r"texts 2049 to 3001 of .*b\.jsonl: texts\[952\] is not valid Unicode"
    ):
        check_texts(files, "text")


def test_refusals_of_folders(tmp_path: Path, client: Any, model: Path) -> None:
    source, out = tmp_path / "t.txt", tmp_path / "out"
    source.write_text("\n".join(words(2 * WINDOW)) + "\n")
    stopped_run(client, model, source, out, 1)
    finished = {record["file"] for record in log(out)}
    before = {name: i for name, i in identities(out).items() if name in finished}
    with pytest.raises(FileExistsError, match="holds vectors; continue with resume"):
        embed_files(client, model, [source], out)
    for other, option in (
        ("batch size", {"batch_size": 16}),
        ("prompt", {"prompt": "a "}),
        ("format", {"format": "parquet"}),
    ):
        with pytest.raises(ValueError, match=f"of a run with another {other}"):
            embed_files(client, model, [source], out, shard_texts=1, resume=True, **option)  # type: ignore[arg-type]
    source.write_text("another\n" + source.read_text())
    with pytest.raises(ValueError, match="has changed since the run"):
        embed_files(client, model, [source], out, shard_texts=1, resume=True)
    assert before.items() <= identities(out).items()
    summary = embed_files(client, model, [source], out, force=True)
    assert (summary.shards, summary.resumed) == (1, 0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("x")
    with pytest.raises(FileExistsError, match="a folder of other files"):
        embed_files(client, model, [source], tmp_path / "other", force=True)
    assert os.listdir(tmp_path / "other") == ["file"]


@pytest.mark.parametrize(
    "line",
    [
        b'{"file": "00000-0000000.npy", "bytes": 3}\n',
        b"[]\n",
        b"nonsense\n",
        b'{"file": "../x"}\n',
        b"[" * 9999 + b"\n",
    ],
    ids=["keys", "list", "text", "path", "depth"],
)
def test_a_damaged_log(tmp_path: Path, line: bytes) -> None:
    with OutputFolder(tmp_path / "out", {}, False, False) as out:
        out.complete({})
    (tmp_path / "out" / "shards.jsonl").write_bytes(line)
    with (
        pytest.raises(ValueError, match=r"shards\.jsonl: line 1 is not one that this version wrote"),
        OutputFolder(tmp_path / "out", {}, True, False),
    ):
        pass
    assert (tmp_path / "out" / "shards.jsonl").read_bytes() == line


# --- bad texts ----------------------------------------------------------------------------------------


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table([pyarrow.array(["x"]), pyarrow.array(["y"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(ValueError, match=r"a\.parquet has 2 columns 'text'"):
        check_columns([path], "text")


def bad_parquet(path: Path, **columns: Any) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\n\xff\n", "line 2 is not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', "line 2 has no string 'text'"),
        ("a.jsonl", b'{"text": "x"}\nnonsense\n', "line 2 is not JSON"),
        ("a.parquet", b"PAR1 no", "is no Parquet file"),
        ("a.parquet", {"other": ["x"]}, "has no column 'text'; it has 'other'"),
        ("a.parquet", {"text": [1, 2]}, "the column 'text' holds int64, not strings"),
        ("a.parquet", {"text": ["x", None]}, "row 2 of the column 'text' is null"),
        (
            "a.parquet",
            {"text": pyarrow.array([b"x", b"\xff"]).view(pyarrow.string())},
            "a.parquet: the column 'text' cannot be read: 'utf-8' codec",
        ),
    ],
)
def test_bad_texts(tmp_path: Path, client: Any, model: Path, name: str, content: Any, message: str) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        bad_parquet(tmp_path / name, **content)
    with pytest.raises(ValueError, match=message):
        embed_files(client, model, [tmp_path / name], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_column(tmp_path: Path, client: Any, model: Path) -> None:
    path = tmp_path / "a.parquet"
    bad_parquet(path, text=words(3000))
    raw = bytearray(path.read_bytes())
    raw[4:200] = bytes(196)
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="the column 'text' cannot be read"):
        embed_files(client, model, [path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- cutting ------------------------------------------------------------------------------------------


def test_shards_are_the_lines_of_a_file(tmp_path: Path) -> None:
    """Whatever ends lines, and wherever the reads of a file end."""
    lines = ["\ufefffirst", "", "two\r", "ünï", "x" * (3 << 20), "last"]
    for end, tail in (("\n", ""), ("\n", "\n"), ("\r\n", "\r\n"), ("\n", "\nno end")):
        (tmp_path / "t.txt").write_bytes((end.join(lines) + tail).encode())
        expected = ("\ufefffirst" + end + end.join(lines[1:]) + tail).encode().decode("utf-8-sig")
        wanted = expected.replace("\r\n", "\n").split("\n")
        wanted = wanted[:-1] if wanted[-1] == "" else wanted
        for rows in (1, 2, 4, 100):
            cut = list(shards([tmp_path / "t.txt"], rows, "text"))
            texts = [text for shard in cut for window in windows(shard, "text", 2) for text in window]
            assert texts == wanted
            assert [shard.rows for shard in cut[:-1]] == [rows] * (len(cut) - 1)
            assert sum(shard.part for shard in cut) == pytest.approx(1)
    (tmp_path / "t.txt").write_bytes(b"")
    assert not list(shards([tmp_path / "t.txt"], 5, "text"))


# --- memory -------------------------------------------------------------------------------------------


def test_a_file_is_cut_in_little_memory(tmp_path: Path) -> None:
    """A file of 60 MB takes no more memory to cut than its 1 MiB reads, and its texts a window at a time."""
    line = b"some words of a text that says little\n"
    (tmp_path / "t.txt").write_bytes(line * (60_000_000 // len(line)))
    tracemalloc.start()
    try:
        last = deque(shards([tmp_path / "t.txt"], 500_000, "text"), maxlen=1)[0]
        for _ in windows(last, "text", WINDOW):
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


def test_tasks_under_way_are_bounded(client: Any) -> None:
    """Of 200 tasks, no more than two for each thread of the workers are taken before their results are."""
    taken = done = most = 0

    def tasks() -> Iterator[int]:
        nonlocal taken, most
        for i in range(200):
            taken += 1
            most = max(most, taken - done)
            yield i

    for _, result in run_tasks(client, _square, tasks()):
        assert result == _**2
        done += 1
    assert done == 200
    assert 3 <= most <= TaskPool(client).window() + 1 == 7


def _square(i: int) -> int:
    return i * i


# --- one process for each GPU -------------------------------------------------------------------------


def test_each_worker_has_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rotation of dask-cuda: every worker sees all devices, its own first."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5a,0")
    environments = connect.worker_environments(3, "cuda")
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments] == ["2,GPU-5a,0", "GPU-5a,0,2", "0,2,GPU-5a"]
    assert connect.visible_devices({"CUDA_VISIBLE_DEVICES": "1,-1,0"}) == ["1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(connect.ClusterError, match="no NVIDIA GPU is visible"):
        connect.worker_environments(2, "cuda")
    assert all("CUDA_VISIBLE_DEVICES" not in e for e in connect.worker_environments(2, "cpu"))


def test_workers_see_their_gpu_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    with connect.connected("local", device="cuda") as client:
        client.wait_for_workers(2, timeout=60)
        seen = client.run(os.getenv, "CUDA_VISIBLE_DEVICES")
    assert sorted(seen.values()) == ["1,3", "3,1"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,1"


def test_a_worker_computes_on_its_gpu(tmp_path: Path, model: Path) -> None:
    """On the stand-in for CuPy: the vectors of the model on that device."""
    (tmp_path / "t.txt").write_text("\n".join(words(3)))
    job = job_of(model, tmp_path, "cuda")
    (shard,) = shards([tmp_path / "t.txt"], WINDOW, "text")
    with capture.installed():
        record = embed_shard((job, shard))
        expected = to(load_embedder(model), "cuda").embed(words(3))
    worker._loaded.clear()
    np.testing.assert_array_equal(np.load(tmp_path / record["file"]), expected)
    np.testing.assert_allclose(expected, load_embedder(model).embed(words(3)), atol=1e-3)

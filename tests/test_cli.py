"""The command: exit codes, what goes to which stream, and what is left on the disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import rbe_gpu
from rbe_gpu import cli, machine, registry
from rbe_gpu.container import describe, load_file, save_file
from rbe_gpu.models.load import load
from tests import real
from tests.test_compress_model import TOKENIZER_ARRAY, cut_tensors, dense_bytes, make_model, write_safetensors

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}


def run(*arguments: Any, stdin: bytes | None = None) -> Result:
    """The command in this process. Anything but a clean exit is a failure of the test."""
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def process(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own."""
    command = [sys.executable, "-m", "rbe_gpu.cli", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=ENV, timeout=120, check=False, **options
    )


def refused(result: Any, *fragments: str) -> None:
    """Exit code 1, one line on stderr with these fragments, nothing on stdout."""
    code = result.exit_code if isinstance(result, Result) else result.returncode
    assert code == 1, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("rbe-gpu: ")
    assert result.stderr.count("\n") == 1
    for fragment in fragments:
        assert fragment in result.stderr


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("cli") / "minilm-cut")


@pytest.fixture(scope="module")
def model_file(model_folder: Path) -> Path:
    out = model_folder.parent / "m.rbe.safetensors"
    result = run("compress", model_folder, "-o", out, "--codes", "dense-int6")
    assert result.exit_code == 0, result.stderr
    return out


# --- the whole way ------------------------------------------------------------------------------------


def test_compress_inspect_embed_as_processes(tmp_path: Path, model_folder: Path) -> None:
    out, vectors = tmp_path / "m.rbe.safetensors", tmp_path / "v.npy"
    done = process("compress", model_folder, "-o", out, "--ratio", 4, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no bar where there is no terminal
    summary = json.loads(done.stdout)
    assert summary["file_bytes"] == out.stat().st_size <= dense_bytes(cut_tensors()) / 4
    assert summary["ratio"] >= 4

    done = process("inspect", out, "--json")
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    assert info["file_bytes"] == summary["file_bytes"]
    assert info["config"]["model_type"] == "bert"

    (tmp_path / "t.txt").write_text("\n".join(real.texts()[:5]) + "\n", "utf-8")
    done = process("embed", out, tmp_path / "t.txt", "-o", vectors, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["texts"] == 5
    assert np.load(vectors).shape == (5, 96)
    assert sorted(os.listdir(tmp_path)) == ["m.rbe.safetensors", "t.txt", "v.npy"]


def test_help_is_fast_and_loads_nothing_heavy() -> None:
    script = (
        "import sys\nfrom rbe_gpu.cli import app\nfrom typer.testing import CliRunner\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "heavy = {'numba', 'llvmlite', 'tokenizers', 'torch', 'cupy', 'matplotlib', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENV, check=True)
    assert done.stdout == "[]\n"


def test_version_and_help() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"rbe-gpu {rbe_gpu.__version__}\n")
    result = run("--help")
    assert result.exit_code == 0
    for name in ("compress", "inspect", "embed", "report", "warmup", "info"):
        assert name in result.stdout
        assert run(name, "--help").exit_code == 0


# --- compress -----------------------------------------------------------------------------------------


def test_compress_for_people(tmp_path: Path, model_folder: Path) -> None:
    out = tmp_path / "m.rbe.safetensors"
    result = run("compress", model_folder, "-o", out, "--codes", "dense-int4", "--block", 32, "--no-basis")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    assert "embeddings.word_embeddings.weight" in result.stdout
    assert "2200x96" in result.stdout
    assert "times smaller than float32" in result.stdout
    info = describe(out)
    assert {t.block for t in info.tensors if t.kind != "dense"} == {32}
    assert not any(t.basis for t in info.tensors)


def test_compress_json(tmp_path: Path, model_folder: Path) -> None:
    out = tmp_path / "m"
    arguments = ("--kept", 0.2, "--codes", "sparse-int4", "--transform", "dwt-haar", "--basis", "--json")
    result = run("compress", model_folder, "-o", out, *arguments)
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    rows = {row["name"]: row for row in summary["tensors"]}
    assert set(rows) == {t.name for t in describe(out).tensors} - {TOKENIZER_ARRAY}
    row = rows["encoder.layer.0.intermediate.dense.weight"]
    assert (row["kind"], row["codes"], row["shape"]) == ("matrix", "sparse-int4", [160, 96])
    assert 0 < row["relative_error"] < 1
    assert summary["file_bytes"] == out.stat().st_size
    assert {t.transform for t in describe(out).tensors if t.kind != "dense"} == {"dwt-haar"}


def test_compress_a_bare_file_with_three_axes(tmp_path: Path) -> None:
    w = np.ascontiguousarray(real.layer(0, "output.dense.weight")[:96, :96])
    write_safetensors(tmp_path / "in.safetensors", {"w": w, "conv": w.reshape(96, 32, 3)})
    result = run("compress", tmp_path / "in.safetensors", "-o", tmp_path / "out", "--grade", "B")
    assert result.exit_code == 0, result.stderr
    np.testing.assert_array_equal(load_file(tmp_path / "out")[0]["conv"], w.reshape(96, 32, 3))


def test_a_model_without_tokenizer_is_noted(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    result = run("compress", folder, "-o", tmp_path / "out", "--codes", "dense-int4")
    assert result.exit_code == 0
    assert result.stderr.startswith("rbe-gpu: note: ")
    assert "no tokenizer.json" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("compress",),
        ("compress", "m"),
        ("compress", "m", "-o", "out"),
        ("compress", "m", "-o", "out", "--grade", "A", "--ratio", "4"),
        ("compress", "m", "-o", "out", "--ratio", "much"),
        ("compress", "m", "-o", "out", "--grade", "A", "--fast"),
        ("inspect",),
        ("embed", "m", "t"),
        ("embed", "m", "t", "-o", "v", "--batch-size", "0"),
        ("unheard-of",),
        ("--unheard-of",),
    ],
)
def test_wrong_usage_is_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr
    assert os.listdir(tmp_path) == []


def test_no_command_prints_the_help() -> None:
    assert "Usage" in run().output


def test_compress_refusals(tmp_path: Path, model_folder: Path) -> None:
    def compress(source: Path, *options: Any, out: Path = tmp_path / "out") -> Result:
        return run("compress", source, "-o", out, *(options or ("--codes", "dense-int4")))

    refused(compress(tmp_path / "absent"), "absent does not exist")
    refused(compress(tmp_path), "has no config.json; it is not a model folder")
    (tmp_path / "text").write_text("hello, this is not a safetensors file")
    refused(compress(tmp_path / "text"), "text: not a safetensors file")
    (tmp_path / "empty").touch()
    refused(compress(tmp_path / "empty"), "0 bytes are too few")
    whole = (model_folder / "model.safetensors").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    refused(compress(tmp_path / "cut"), "cut: array ")
    refused(compress(model_folder, "--grade", "Z"), "unknown grade 'Z'; use one of S, A, B, C")
    refused(compress(model_folder, "--ratio", "-1"), "ratio=-1.0 is not a positive number")
    refused(compress(model_folder, "--ratio", "1000"), "highest reachable ratio is below")
    refused(compress(model_folder, "--grade", "A", "--block", "48"), "block=48")
    refused(compress(model_folder, "--grade", "A", "--transform", "fft"), "unknown transform 'fft'")
    refused(compress(model_folder, "--codes", "dense-int77"), "unknown codes 'dense-int77'")
    refused(compress(model_folder, out=tmp_path / "no" / "out"), "no does not exist; make it first")
    refused(compress(model_folder, out=tmp_path), "is a folder; name a file")
    assert sorted(os.listdir(tmp_path)) == ["cut", "empty", "text"]


def test_nan_weights_are_named(tmp_path: Path) -> None:
    tensors = cut_tensors()
    name = "encoder.layer.0.attention.self.value.weight"
    tensors[name] = np.where(np.arange(96) == 5, np.float32(np.nan), tensors[name])
    folder = make_model(tmp_path / "m", tensors)
    done = process("compress", folder, "-o", tmp_path / "out", "--codes", "dense-int4")
    refused(done, f"tensor {name} holds NaN or Inf")
    assert os.listdir(tmp_path) == ["m"]


def test_an_existing_output_stays_without_force(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "out").write_text("precious")
    arguments = ("compress", model_folder, "-o", tmp_path / "out", "--codes", "dense-int3")
    refused(run(*arguments), "out exists; pass --force to replace it")
    assert (tmp_path / "out").read_text() == "precious"
    assert run(*arguments, "--force").exit_code == 0
    assert describe(tmp_path / "out").version == 1


def test_a_disk_that_cannot_be_written(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the system says reaches the user: here a full disk, at the last step."""

    def full(_: int) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "out"))

    monkeypatch.setattr(os, "fsync", full)
    refused(run("compress", model_folder, "-o", tmp_path / "out", "--codes", "dense-int3"), "No space left")
    assert os.listdir(tmp_path) == []
    monkeypatch.undo()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write anywhere
    refused(run("compress", model_folder, "-o", tmp_path / "out", "--codes", "dense-int3"), "no permission")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(tmp_path: Path, how: signal.Signals) -> None:
    """Stopped while it works: exit code 130, one line, no file."""
    w = real.layer(0, "intermediate.dense.weight")
    write_safetensors(tmp_path / "in", {f"w{i}": w for i in range(40)})
    command = [
        sys.executable,
        "-m",
        "rbe_gpu.cli",
        "compress",
        tmp_path / "in",
        "-o",
        tmp_path / "out",
        "--grade",
        "A",
    ]
    with subprocess.Popen(
        command,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a suite that runs in the background ignores SIGINT, and its children would too
        preexec_fn=lambda: signal.signal(how, signal.SIG_DFL),
    ) as running:
        deadline = time.monotonic() + 60
        # the nameless temporary file is open once tensors are being written
        while not any(str(tmp_path) in t and "deleted" in t for t in open_files(running.pid)):
            assert time.monotonic() < deadline
            assert running.poll() is None
            time.sleep(0.05)
        running.send_signal(how)
        stdout, stderr = running.communicate(timeout=60)
    assert running.returncode == 130
    assert stdout == ""
    assert stderr == "rbe-gpu: interrupted; nothing was written\n"
    assert os.listdir(tmp_path) == ["in"]


def open_files(pid: int) -> list[str]:
    """What the descriptors of a process point to."""
    found = []
    for handle in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(os.readlink(handle))
        except OSError:  # closed in between
            continue
    return found


# --- inspect ------------------------------------------------------------------------------------------


def test_inspect(model_file: Path) -> None:
    result = run("inspect", model_file)
    assert result.exit_code == 0, result.stderr
    assert "encoder.layer.0.attention.self.query.weight" in result.stdout
    assert "dense-int6" in result.stdout
    assert "format version 1" in result.stdout
    assert "model bert" in result.stdout
    info = json.loads(run("inspect", model_file, "--json").stdout)
    assert info["version"] == 1
    assert {t["kind"] for t in info["tensors"]} == {"matrix", "vectors", "dense"}
    assert info["header_bytes"] + sum(t["bytes"] for t in info["tensors"]) == info["file_bytes"]


def test_inspect_refusals(tmp_path: Path, model_file: Path, model_folder: Path) -> None:
    refused(run("inspect", tmp_path / "absent"), "absent: No such file or directory")
    refused(run("inspect", tmp_path), "not a regular file")
    refused(run("inspect", model_folder / "model.safetensors"), "without RBE weights")
    refused(run("inspect", model_folder / "config.json"), "not a safetensors file")
    raw = bytearray(model_file.read_bytes())
    (tmp_path / "cut").write_bytes(raw[:-1])
    refused(run("inspect", tmp_path / "cut"), "cut")
    (n,) = struct.unpack("<Q", raw[:8])
    entries = json.loads(raw[8 : 8 + n])
    name = "encoder.layer.0.output.dense.weight"
    begin = 8 + n + entries[f"{name}.scale"]["data_offsets"][0]
    raw[begin : begin + 2] = b"\x00\x7e"
    (tmp_path / "nan").write_bytes(raw)
    refused(process("inspect", tmp_path / "nan"), f'tensor "{name}": scale holds NaN or Inf')


def test_inspect_is_not_fooled_by_names(tmp_path: Path) -> None:
    """Control characters and markup in names reach no terminal."""
    save_file(tmp_path / "a", {"\x1b[2J[red]x[/nope]\n": np.zeros(3, np.float32)}, {"model_type": "\x1b[31m"})
    result = run("inspect", tmp_path / "a")
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    assert "\\u001b[2J[red]x[/nope]\\n" in result.stdout


def test_a_closed_pipe_is_no_traceback(model_file: Path) -> None:
    command = f"{sys.executable} -m rbe_gpu.cli inspect {model_file} --json | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=ENV, check=True)
    assert done.stdout == "{"
    assert "Traceback" not in done.stderr


# --- embed --------------------------------------------------------------------------------------------


def test_embed_lines(tmp_path: Path, model_file: Path) -> None:
    lines = ["first text", "", "Ünïcode, too", *real.texts()[:7]]
    expected = load(model_file).embed(lines)
    for text in ("\n".join(lines), "\n".join(lines) + "\n", "\ufeff" + "\r\n".join(lines) + "\r\n"):
        (tmp_path / "t.txt").write_bytes(text.encode())
        result = run(
            "embed", model_file, tmp_path / "t.txt", "-o", tmp_path / "v.npy", "--batch-size", 4, "-f"
        )
        assert result.exit_code == 0, result.stderr
        vectors = np.load(tmp_path / "v.npy")
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(
            vectors, expected, atol=1e-5
        )  # batches of another size sum in another order
    assert "10 x 96 float32" in result.stdout


def test_embed_from_standard_input(tmp_path: Path, model_file: Path) -> None:
    result = run("embed", model_file, "-", "-o", tmp_path / "v.npy", "--json", stdin=b"one\ntwo\n")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["texts"] == 2
    assert json.loads(result.stdout)["embedding_size"] == 96


def test_embed_nothing(tmp_path: Path, model_file: Path) -> None:
    (tmp_path / "t.txt").touch()
    result = run("embed", model_file, tmp_path / "t.txt", "-o", tmp_path / "v.npy")
    assert result.exit_code == 0, result.stderr
    assert np.load(tmp_path / "v.npy").shape == (0, 96)


def test_embed_refusals(tmp_path: Path, model_file: Path, model_folder: Path) -> None:
    (tmp_path / "t.txt").write_text("text\n")
    (tmp_path / "latin").write_bytes("Köln".encode("latin1"))
    out = tmp_path / "v.npy"
    refused(run("embed", model_file, tmp_path / "absent", "-o", out), "absent: No such file")
    refused(run("embed", model_file, tmp_path / "latin", "-o", out), "latin is not UTF-8 text (byte 1)")
    refused(
        run("embed", tmp_path / "absent.rbe.safetensors", tmp_path / "t.txt", "-o", out), "does not exist"
    )
    refused(
        run("embed", model_folder / "config.json", tmp_path / "t.txt", "-o", out), "not a safetensors file"
    )
    refused(run("embed", model_file, tmp_path / "t.txt", "-o", tmp_path / "no" / "v"), "make it first")
    save_file(tmp_path / "bare", {"a": np.zeros(3, np.float32)})
    refused(run("embed", tmp_path / "bare", tmp_path / "t.txt", "-o", out), "no model")
    out.write_text("precious")
    refused(run("embed", model_file, tmp_path / "t.txt", "-o", out), "exists; pass --force")
    assert out.read_text() == "precious"


# --- eval ---------------------------------------------------------------------------------------------


def write_texts(path: Path, count: int) -> Path:
    path.write_text("\n\n".join(real.texts()[:count]) + "\n", "utf-8")
    return path


def test_eval_finds_the_dense_model_beside_the_file(model_file: Path, model_folder: Path) -> None:
    result = run("eval", model_file, "--documents", 60, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert list(found) == ["file", "against", "texts", "python", "seconds", "dense", "compressed"]
    assert (found["file"], found["against"]) == (str(model_file), str(model_folder))
    assert found["texts"] == "docstrings"
    for name in ("dense", "compressed"):
        sizes = ["file_bytes", "ratio", "resident_bytes", "cache_bytes"]
        assert list(found[name]) == [*sizes, "agreement", "retrieval"]
        assert list(found[name]["agreement"]) == [
            *("texts", "cosine_mean", "cosine_p1", "cosine_min", "overlap_at_10")
        ]
        assert list(found[name]["retrieval"]) == ["queries", "documents", "recall_at_1", "recall_at_10"]
        assert found[name]["agreement"]["texts"] == 512
        assert found[name]["retrieval"]["documents"] == 60
    dense, compressed = found["dense"], found["compressed"]
    assert dense["file_bytes"] == (model_folder / "model.safetensors").stat().st_size
    assert compressed["file_bytes"] == model_file.stat().st_size
    assert compressed["ratio"] == dense["file_bytes"] / compressed["file_bytes"]
    assert dense["ratio"] == 1.0
    assert compressed["resident_bytes"] == load(model_file).nbytes < dense["resident_bytes"]
    assert dense["cache_bytes"] == compressed["cache_bytes"] == 0  # nothing was decoded
    assert dense["agreement"]["cosine_min"] == pytest.approx(1.0, abs=1e-12)
    assert dense["agreement"]["overlap_at_10"] == 1.0
    assert 0.9 < compressed["agreement"]["cosine_mean"] < 1.0


def test_eval_on_a_file_of_texts(tmp_path: Path, model_file: Path, model_folder: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "elsewhere")
    texts = write_texts(tmp_path / "t.txt", 16)  # blank lines between them are no texts
    arguments = ("eval", model_file, "--against", tmp_path / "elsewhere", "--texts", texts, "--no-retrieval")
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    for words in ("file ", "times smaller", "weights in memory", "cosine to dense, 1st percentile", "top-10"):
        assert words in result.stdout
    assert f"16 texts ({texts});" in result.stdout
    assert f"dense: {tmp_path / 'elsewhere'}\n" in result.stdout
    assert "recall" not in result.stdout
    found = json.loads(run(*arguments, "--json").stdout)
    assert found["against"] == str(tmp_path / "elsewhere")
    assert found["texts"] == str(texts)
    assert found["dense"]["retrieval"] is found["compressed"]["retrieval"] is None


def test_eval_shows_retrieval(tmp_path: Path, model_file: Path) -> None:
    texts = write_texts(tmp_path / "t.txt", 11)
    result = run("eval", model_file, "--texts", texts, "--documents", 60)
    assert result.exit_code == 0, result.stderr
    for words in ("recall@1 ", "recall@10", "queries among 60 documents"):
        assert words in result.stdout


def test_eval_knows_a_source_by_its_config_and_bytes(
    tmp_path: Path, model_file: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, texts = tmp_path / "a" / "m.rbe.safetensors", write_texts(tmp_path / "t.txt", 12)
    file.parent.mkdir()
    shutil.copy(model_file, file)
    arguments = ("eval", file, "--texts", texts, "--no-retrieval")
    monkeypatch.chdir(tmp_path)
    nbytes = (model_folder / "model.safetensors").stat().st_size
    absent = f"(minilm-cut, {nbytes} bytes) is neither beside it nor here; pass its folder or hub id"
    refused(run(*arguments), absent)
    impostor = tmp_path / "a" / "minilm-cut"  # of that name, but another model
    shutil.copytree(model_folder, impostor)
    with open(impostor / "model.safetensors", "ab") as weights:
        weights.write(b"\0")
    refused(run(*arguments), absent)
    (impostor / "model.safetensors").unlink()
    refused(run(*arguments), absent)
    shutil.copytree(model_folder, tmp_path / "minilm-cut")  # where the command runs
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["against"] == "minilm-cut"


def test_eval_finds_the_installed_package(tmp_path: Path) -> None:
    out = tmp_path / "m.rbe.safetensors"
    tensors, config = {}, {"config": real.config()}
    config["source"] = {"name": real.MODEL_DIR.name, "bytes": real.WEIGHTS.stat().st_size}
    save_file(out, tensors, config)
    assert cli._source_folder(out) == real.MODEL_DIR


def test_eval_counts_all_shards(tmp_path: Path) -> None:
    for name, size in (("a", 100), ("b", 23)):
        (tmp_path / name).write_bytes(b"\0" * size)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a", "y": "b", "z": "a"}}))
    assert cli._checkpoint_bytes(tmp_path) == 123
    index.write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        cli._checkpoint_bytes(tmp_path)


def test_eval_refusals(tmp_path: Path, model_file: Path, model_folder: Path) -> None:
    texts = write_texts(tmp_path / "t.txt", 12)

    def evaluated(file: Path, *more: Any) -> Result:
        return run("eval", file, "--texts", texts, "--no-retrieval", *more)

    refused(evaluated(tmp_path / "absent"), "absent does not exist")
    refused(evaluated(model_folder), "is a folder; name a .rbe.safetensors file")
    refused(evaluated(model_folder / "model.safetensors"), "without RBE weights")
    refused(evaluated(model_folder / "config.json"), "not a safetensors file")
    refused(evaluated(model_file, "--against", model_file), "is a file; --against takes the folder")
    refused(evaluated(model_file, "--against", tmp_path / "no"), "no does not exist; pass a model folder")
    refused(evaluated(model_file, "--against", real.MODEL_DIR), "vectors of 96 values, the dense one of 384")
    for name, what in (("absent", "No such file"), ("empty", "holds no text"), ("few", "too few")):
        (tmp_path / "empty").write_text(" \n\n")
        (tmp_path / "few").write_text("one\ntwo\n")
        refused(run("eval", model_file, "--texts", tmp_path / name, "--no-retrieval"), what)
    refused(run("eval", model_file, "--texts", texts, "--documents", 5), "5 documents are too few")
    assert run("eval", model_file, "--documents", 60, "--no-retrieval").exit_code == 2


def test_eval_refuses_a_model_that_reads_otherwise(
    tmp_path: Path, model_file: Path, model_folder: Path
) -> None:
    """Another tokenizer, no tokenizer, and a file that is no model or names no source."""
    texts = write_texts(tmp_path / "t.txt", 12)
    other = shutil.copytree(model_folder, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text("utf-8"))
    tokenizer["normalizer"]["lowercase"] = False
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    arguments = ("--texts", texts, "--no-retrieval", "--against", other)
    refused(run("eval", model_file, *arguments), "as different tokens", "another tokenizer")
    (other / "tokenizer.json").unlink()
    refused(run("eval", model_file, *arguments), "the model has no tokenizer")
    tensors, config = load_file(model_file)
    save_file(tmp_path / "unnamed", tensors, {k: v for k, v in config.items() if k != "source"})
    refused(run("eval", tmp_path / "unnamed", *arguments[:3]), "does not say what it was made from")
    save_file(tmp_path / "up", tensors, {**config, "source": {"name": "../other", "bytes": 1}})
    refused(run("eval", tmp_path / "up", *arguments[:3]), "does not say what it was made from")
    save_file(tmp_path / "bare", {"a": np.zeros(3, np.float32)})
    refused(run("eval", tmp_path / "bare", *arguments), "no model")


def test_docstrings_to_calibrate_on_are_never_those_that_eval_reads() -> None:
    from rbe_gpu.models import corpus

    used = cli._calibration_texts("docstrings")
    assert len(used) == cli.CALIBRATION_TEXTS
    task = corpus.retrieval()
    asked = {*task.queries, *(task.documents[i] for i in task.answers)}
    assert not set(used) & (asked | set(corpus.held_out()))


# --- report and info ----------------------------------------------------------------------------------


def test_report_calls_the_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rbe_gpu.reports import run as reports

    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(reports, "main", lambda **options: calls.append(options))
    assert run("report", "--out", tmp_path / "r", "--quick").exit_code == 0
    assert run("report", "--out", tmp_path / "r", "--model", tmp_path).exit_code == 0
    assert calls == [
        {"out": tmp_path / "r", "quick": True, "model": None},
        {"out": tmp_path / "r", "quick": False, "model": tmp_path},
    ]


def test_report_without_its_packages_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for blocked, names in ((["jinja2"], "jinja2"), (["matplotlib", "jinja2"], "matplotlib and jinja2")):
        with monkeypatch.context() as patch:
            for name in blocked:
                patch.setitem(sys.modules, name, None)
            for further in ((), ("--quality",)):
                result = run("report", "--out", tmp_path / "r", *further)
                refused(result, f"rbe-gpu report needs {names}: pip install 'rbe-gpu[report]'")
    assert not (tmp_path / "r").exists()


def test_info() -> None:
    result = run("info", "--json")
    assert result.exit_code == 0, result.stderr
    info = json.loads(result.stdout)
    assert info["rbe_gpu"] == rbe_gpu.__version__
    assert info["cpu"]["threads"] == os.cpu_count()
    assert info["versions"]["numpy"] == np.__version__
    assert info["numba_threads"] >= 1
    assert isinstance(info["missing"], list)
    assert bool(info["gpus"]) or any("CPU" in line for line in info["missing"])
    assert {*info["kernels"]["ops"], *info["kernels"]["without"]} == set(registry.OPS)
    shown = run("info")
    assert shown.exit_code == 0
    for word in ("CPU", "SIMD", "numpy", "GPU", "CUDA kernels", "softmax", "sm_75 and newer"):
        assert word in shown.stdout


def gpu(capability: tuple[int, int] = (9, 0), cuda: str = "13.0") -> dict[str, Any]:
    major, minor = capability
    return {
        "name": "GPU",
        "memory_bytes": 80 * 10**9,
        "free_bytes": 60 * 10**9,
        "compute_capability": f"{major}.{minor}",
        "architecture": f"sm_{major}{minor}",
        "supported": capability >= (7, 5),
        "driver": "580.1",
        "cuda": cuda,
    }


def cupy_state(**given: Any) -> dict[str, Any]:
    state = {
        "works": True,
        "devices": 1,
        "cuda": "13.2",
        "nvrtc": "13.2",
        "architectures": [75, 90],
        "errors": {},
    }
    return state | given


def shown_info(
    monkeypatch: pytest.MonkeyPatch, gpus: list[dict[str, Any]], cupy: dict[str, Any], no_gpu: str = ""
) -> tuple[str, str]:
    """What `info` prints, and its lines of what is missing."""
    monkeypatch.setattr(machine, "gpus", lambda: (gpus, no_gpu))
    monkeypatch.setattr(machine, "cupy_state", lambda: cupy)
    result = run("info")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    assert json.loads(run("info", "--json").stdout)["gpus"] == gpus
    return result.stdout, "\n".join(machine.collect()["missing"])


def test_info_of_a_gpu_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, missing = shown_info(monkeypatch, [gpu()], cupy_state())
    for words in (
        "GPU, 60.00 GB free of 80.00 GB, compute capability 9.0, driver 580.1, CUDA 13.0",
        "kernels for sm_90: compiled when first called",
        "13.2, NVRTC 13.2",
        "sm_75 sm_90",
    ):
        assert words in shown
    assert "GPU" not in missing


@pytest.mark.parametrize(("cuda", "extra"), [("13.0", "cuda13"), ("12.8", "cuda12")])
def test_info_without_cupy_says_what_to_install(
    cuda: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = cupy_state(works=False, errors={"import": "CuPy is not installed"})
    _, missing = shown_info(monkeypatch, [gpu(cuda=cuda)], state)
    assert f"CuPy is not installed, so CuPy arrays cannot be used: pip install 'rbe-gpu[{extra}]'" in missing


def test_info_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, missing = shown_info(monkeypatch, [], cupy_state(devices=0), "no NVIDIA driver answers (NVML)")
    assert "no NVIDIA driver answers (NVML): everything runs on the CPU; for a GPU" in missing
    assert "pip install 'rbe-gpu[cuda13]'" in missing
    assert "pip install 'rbe-gpu[cuda13]'" in shown  # not cut off


def test_info_of_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, missing = shown_info(monkeypatch, [gpu((7, 0))], cupy_state())
    assert "kernels for sm_70: not supported" in shown
    assert "GPU 0 (GPU) has compute capability 7.0; the kernels need 7.5 or newer" in missing


def test_info_of_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = {"devices": "cudaErrorInsufficientDriver", "nvrtc": "libnvrtc.so.13 is not there"}
    state = cupy_state(devices=0, nvrtc=None, architectures=[], errors=errors)
    shown, missing = shown_info(monkeypatch, [gpu(cuda="12.4")], state)
    assert "reaches no GPU (cudaErrorInsufficientDriver); the driver has CUDA 12.4" in missing
    assert "pip install 'rbe-gpu[cuda12]', or a newer driver" in missing
    assert "CuPy finds no NVRTC" in missing
    assert "compiles for" in shown


def test_state_of_a_cupy_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert machine.cupy_state()["errors"] == {"import": "CuPy is not installed"}

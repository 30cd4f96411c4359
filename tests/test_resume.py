"""Calibrated compression that is interrupted or killed, and resumed: the same bytes, and nothing done twice."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rbe_gpu import output
from rbe_gpu.container import load_file
from rbe_gpu.models import calibrate, compress, sensitivity
from rbe_gpu.models.compress import compress_model
from rbe_gpu.models.journal import Journal, digest

from . import kills
from .cli.command import refused, run
from .test_compress_model import make_model

RATIO, TEXTS = kills.RATIO, kills.texts()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("resume") / "model")


@pytest.fixture(scope="module")
def whole(folder: Path) -> bytes:
    """The file of a run without interruption."""
    out = folder.parent / "whole.rbe.safetensors"
    compress_model(folder, out, ratio=RATIO, calibrate=TEXTS)
    assert names(folder.parent) == ["model", out.name]
    return out.read_bytes()


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


class Interrupted:
    """Interrupts the run after the n-th result is kept, and counts what is computed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = -1
        self.computed: Counter[str] = Counter()
        for method in ("tensors", "value"):
            monkeypatch.setattr(Journal, method, self._wrapped(getattr(Journal, method)))

    def _wrapped(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def keep(journal: Journal, name: str, make: Callable[[], Any]) -> Any:
            def counted() -> Any:
                self.computed[name] += 1
                return make()

            before = sum(self.computed.values())
            result = method(journal, name, counted)
            if sum(self.computed.values()) > before:
                self.left -= 1
                if self.left == 0:
                    raise KeyboardInterrupt
            return result

        return keep


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Interrupted:
    return Interrupted(monkeypatch)


def test_interrupts(folder: Path, whole: bytes, tmp_path: Path, interrupted: Interrupted) -> None:
    """After every second result; each is computed once, in all runs together."""
    out = tmp_path / "a"
    runs = 0
    while True:
        interrupted.left = 2
        runs += 1
        try:
            compress_model(folder, out, ratio=RATIO, calibrate=TEXTS, resume=True)
            break
        except KeyboardInterrupt:
            assert names(tmp_path) == [".a.journal"]
    assert out.read_bytes() == whole
    assert names(tmp_path) == ["a"]
    results = interrupted.computed
    assert set(results.values()) == {1}
    assert len(results) == 8 + 1 + 8  # sensitivities, the plan, weights
    assert runs == -(-len(results) // 2)


def test_without_resume_everything_is_computed_again(
    folder: Path, whole: bytes, tmp_path: Path, interrupted: Interrupted
) -> None:
    interrupted.left = 12
    with pytest.raises(KeyboardInterrupt):
        compress_model(folder, tmp_path / "a", ratio=RATIO, calibrate=TEXTS)
    compress_model(folder, tmp_path / "a", ratio=RATIO, calibrate=TEXTS)
    assert (tmp_path / "a").read_bytes() == whole
    assert names(tmp_path) == ["a"]
    assert max(interrupted.computed.values()) == 2


def test_what_makes_another_run(folder: Path, tmp_path: Path, interrupted: Interrupted) -> None:
    out = tmp_path / "a"
    interrupted.left = 10
    with pytest.raises(KeyboardInterrupt):
        compress_model(folder, out, ratio=RATIO, calibrate=TEXTS)
    arguments: dict[str, Any] = {"ratio": RATIO, "calibrate": TEXTS, "resume": True}
    other = make_model(tmp_path / "model")
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace('"layer_norm_eps": 1e-12', '"layer_norm_eps": 1e-05'))
    assert (other / "config.json").read_text() != config
    for source, change, named in (
        (folder, {"calibrate": TEXTS[1:]}, "texts"),
        (folder, {"calibrate": [*TEXTS[:-1], TEXTS[-1] + "."]}, "texts"),
        (folder, {"ratio": 7.0}, "ratio, transform or block"),
        (folder, {"transform": "dct"}, "ratio, transform or block"),
        (other, {}, "model"),
    ):
        with pytest.raises(
            ValueError, match=rf"\.a\.journal is of a run with another {named}; without resume"
        ):
            compress_model(source, out, **{**arguments, **change})
        assert names(tmp_path) == [".a.journal", "model"]
    compress_model(folder, out, **arguments)
    assert max(interrupted.computed.values()) == 1


def test_other_code_of_the_same_version(
    folder: Path, tmp_path: Path, interrupted: Interrupted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkout has one version number, whatever was changed or renamed in it."""
    copies = [tmp_path / "code" / str(i) / package.name for i, package in enumerate(compress._packages())]
    for package, copy in zip(compress._packages(), copies, strict=True):
        shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__", "precompiled"))
    monkeypatch.setattr(compress, "_packages", lambda: copies)
    out = tmp_path / "a"
    arguments: dict[str, Any] = {"ratio": RATIO, "calibrate": TEXTS}
    interrupted.left = 10
    with pytest.raises(KeyboardInterrupt):
        compress_model(folder, out, **arguments)
    for file in (copies[0] / "models" / "load.py", copies[1] / "isa.py"):
        code = file.read_bytes()
        file.write_bytes(code[:-1] + b" ")
        with pytest.raises(
            ValueError, match="is of a run with another version; without resume it is replaced"
        ):
            compress_model(folder, out, resume=True, **arguments)
        file.write_bytes(code)
        renamed = file.rename(file.with_name(f"{file.stem}_.py"))  # between the same neighbours
        with pytest.raises(
            ValueError, match="is of a run with another version; without resume it is replaced"
        ):
            compress_model(folder, out, resume=True, **arguments)
        renamed.rename(file)
    compress_model(folder, out, resume=True, **arguments)
    assert max(interrupted.computed.values()) == 1


def test_the_digest_of_code_reads_each_file_once(tmp_path: Path) -> None:
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    (inner / "a.py").write_text("1")
    (inner / "a.txt").write_text("1")
    whole = compress._code_digest([tmp_path / "outer"])
    assert whole == compress._code_digest([tmp_path / "outer", inner]) == digest(["outer/inner/a.py", b"1"])


def test_an_error_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(calibrate, "affine_fit", fails)
    with pytest.raises(OSError, match="No space left"):
        compress_model(folder, tmp_path / "a", ratio=RATIO, calibrate=TEXTS)
    assert names(tmp_path) == []


def test_an_interrupt_before_the_first_result_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sensitivity, "geometry", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compress_model(folder, tmp_path / "a", ratio=RATIO, calibrate=TEXTS)
    assert names(tmp_path) == []


def test_a_journal_that_another_process_has(folder: Path, whole: bytes, tmp_path: Path) -> None:
    """A second run keeps nothing, and may not resume."""
    (tmp_path / ".a.journal").mkdir()
    with open(tmp_path / ".a.journal" / "lock", "wb") as held:
        output.lock(held.fileno())
        with pytest.raises(BlockingIOError, match=r"another process is writing .*\.a\.journal"):
            compress_model(folder, tmp_path / "a", ratio=RATIO, calibrate=TEXTS, resume=True)
        compress_model(folder, tmp_path / "a", ratio=RATIO, calibrate=TEXTS)
        assert names(tmp_path / ".a.journal") == ["lock"]
    assert (tmp_path / "a").read_bytes() == whole


def test_a_damaged_journal(folder: Path, tmp_path: Path, interrupted: Interrupted) -> None:
    for file, message in (
        ("values.json", "is not JSON .*remove the folder"),
        ("identity.json", "remove the folder"),
    ):
        interrupted.left = 3
        with pytest.raises(KeyboardInterrupt):
            compress_model(folder, tmp_path / "a", ratio=RATIO, calibrate=TEXTS)
        (tmp_path / ".a.journal" / file).write_text("[")
        with pytest.raises(ValueError, match=message):
            compress_model(folder, tmp_path / "a", ratio=RATIO, calibrate=TEXTS, resume=True)


def test_resume_is_for_calibrated_runs(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="resume= goes with calibrate="):
        compress_model(folder, tmp_path / "a", ratio=RATIO, resume=True)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="resume= goes with texts to calibrate on, and an output file"):
        compress_model(folder, tmp_path / "pipe", ratio=RATIO, calibrate=TEXTS, resume=True)
    assert run("compress", folder, "-o", tmp_path / "a", "--ratio", 6, "--resume").exit_code == 2


def test_the_command(folder: Path, whole: bytes, tmp_path: Path, interrupted: Interrupted) -> None:
    (tmp_path / "t.txt").write_text("\n".join(" ".join(text.split()) for text in TEXTS))
    command = ("compress", folder, "-o", tmp_path / "a", "--ratio", RATIO, "--calibrate", tmp_path / "t.txt")
    interrupted.left = 12
    assert run(*command).exit_code == 130
    refused(run(*command[:-1], folder / "modules.json", "--resume"), "is of a run with another texts")
    assert run(*command, "--resume").exit_code == 0
    assert max(interrupted.computed.values()) == 1
    assert load_file(tmp_path / "a")[0].keys() == load_file(folder.parent / "whole.rbe.safetensors")[0].keys()


def test_values_keep_their_types(tmp_path: Path) -> None:
    made = [{"a": np.float32(0.1), "b": np.float64(0.1)}, {"items": 0.1}, {}]
    for _ in range(2):
        with contextlib.suppress(KeyboardInterrupt), Journal(tmp_path / "a", {}, True) as journal:
            value = journal.value("x", lambda: made)
            assert value == made
            assert [type(v) for v in value[0].values()] == [np.float32, np.float64]
            assert type(value[1]["items"]) is float
            raise KeyboardInterrupt


def test_kills() -> None:
    """SIGKILL at random moments: `python -m tests.kills` has a hundred."""
    kills.in_a_process("--runs", "5", "--seed", "1")

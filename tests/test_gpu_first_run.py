"""The GPU check within a time limit and offline: its plan, what it carries, what it writes, and a rehearsal of it
without a GPU, in an environment with few packages.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from rbe_gpu.reports.gpu import check, deliver, pack, plan, stage, wheels
from rbe_gpu.reports.gpu.stage import Result
from rbe_gpu.reports.harness import rows, token_ids
from rbe_gpu.reports.harness.baselines import Folder

from . import real
from .host import listed_packages, rehearsal
from .test_compress_model import make_model

ROOT = Path(__file__).parent.parent
MOST_FILES, MOST_BYTES = 8, 16 << 20  # that such a machine gives back
CARRIED = 64 << 20  # that it takes: the folder and the checkout
FIRST = [name for name, s in plan.STAGES.items() if s.first]
FURTHER = [name for name, s in plan.STAGES.items() if not s.first]
#: what a machine with a GPU has; rehearsed with these and what they require, as far as they are installed
PACKAGES = ("cupy-cuda13x", "numba", "numpy", "torch", "triton", "matplotlib", "pytest")


# --- the plan -----------------------------------------------------------------------------------------


def budgets(names: list[str], seconds: float, used: float = 1.0) -> dict[str, float]:
    """What each stage is given where all use this part of what they are given."""
    given = {}
    for i, name in enumerate(names):
        given[name] = plan.budget(names[i:], seconds)
        seconds -= used * given[name]
    return given


def test_a_first_run_gives_every_stage_its_share() -> None:
    assert plan.FIRST_RUN == 545
    given = budgets(list(plan.STAGES), 545)
    assert {name: given[name] for name in FIRST} == {name: plan.STAGES[name].share for name in FIRST}
    assert given["launch"] == 20
    assert given["conformance"] == 130
    assert sum(given[n] for n in ("attention", "wgmma", "linear", "bandwidth", "decode")) in (335, 340)
    assert given["encoder"] == 60
    assert all(given[name] < plan.LEAST for name in FURTHER)


def test_less_time_is_less_for_all_alike() -> None:
    given = budgets(list(plan.STAGES), 545 / 2)
    for name in FIRST:
        assert given[name] == pytest.approx(plan.STAGES[name].share / 2)


def test_time_that_a_stage_leaves_goes_to_those_behind_it() -> None:
    given = budgets(FIRST, 545, used=0.5)
    assert given["launch"] == 20
    assert given["conformance"] == 140
    assert all(given[name] >= plan.STAGES[name].share for name in FIRST)


def test_with_more_time_everything_runs() -> None:
    most = sum(s.most for s in plan.STAGES.values())
    assert budgets(list(plan.STAGES), most) == {name: s.most for name, s in plan.STAGES.items()}
    given = budgets(list(plan.STAGES), 1000)
    assert all(given[name] >= s.share for name, s in plan.STAGES.items())


def test_a_second_command_gives_further_stages_their_shares() -> None:
    assert budgets(["minilm", "sanitizer"], 150) == {"minilm": 50, "sanitizer": 100}


# --- what is carried ----------------------------------------------------------------------------------


def repacked(out: Path) -> None:
    """The installed distributions of `pack.PACKAGES` as wheels: those of a machine like this one."""
    out.mkdir()
    for name in pack.PACKAGES:
        dist = metadata.distribution(name)
        with ZipFile(out / f"{dist.name.replace('-', '_')}-{dist.version}-py3-none-any.whl", "w") as wheel:
            for file in dist.files or ():
                if ".." not in file.parts and file.suffix != ".pyc":
                    wheel.write(str(file.locate()), str(file))


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model of four layers, cut from MiniLM's."""
    folder = tmp_path_factory.mktemp("carried")
    pack.pack(make_model(folder / "model", layers=4), folder / "packed", repacked)
    return folder / "packed"


def test_a_packed_folder_needs_no_tokenizer(carried: Path) -> None:
    assert not (carried / "tokenizer.json").exists()
    assert token_ids.model_folder(carried) == carried
    folder, source = Folder(carried), Folder(carried.parent / "model")
    assert folder.tokenizer is None
    tables = [np.float16(one.tensor(pack.WORDS)) for one in (folder, source)]
    assert len(tables[0]) == folder.config["vocab_size"] < len(tables[1])
    used = set()
    for kind, count in token_ids.COUNTS.items():
        texts = [one.text_ids(kind, count) for one in (folder, source)]
        assert list(map(len, texts[0])) == list(map(len, texts[1]))
        for ours, theirs in zip(*texts, strict=True):
            np.testing.assert_array_equal(tables[0][ours], tables[1][theirs])
            used |= set(ours)
    assert used | {0} == set(range(len(tables[0])))
    (ids, lengths), states = pack.stored_states(carried) or pytest.fail("no states")
    assert len(ids) == pack.TEXTS
    assert lengths.max() <= pack.TOKENS
    assert [s.shape for s in states] == [(*ids.shape, 96)] * 5
    np.testing.assert_array_equal(
        folder.tensor("embeddings.LayerNorm.weight"), np.float16(source.tensor("embeddings.LayerNorm.weight"))
    )


def test_a_folder_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "LIMIT", 1e5)
    with pytest.raises(ValueError, match=r"MB, more than 0; pack a smaller model"):
        pack.pack(make_model(tmp_path / "model"), tmp_path / "packed", lambda out: None)


def test_minilm_and_the_checkout_fit_on_the_machine() -> None:
    """MiniLM in float16 with the rows of its texts, room for states, ids and wheels (2.7 MB), all tracked files."""
    room = 4e6
    source = Folder(real.MODEL_DIR)
    rows = {
        i for kind, count in token_ids.COUNTS.items() for one in source.text_ids(kind, count) for i in one
    }
    whole = real.weight(pack.WORDS)
    model = sum(a.size * 2 for a in map(real.weight, real.weight_names()))
    model -= 2 * whole.shape[1] * (len(whole) - len(rows | {0}))
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    tracked = sum(
        (ROOT / n).stat().st_size for n in listed.decode().split("\0") if n and (ROOT / n).is_file()
    )
    assert model + room <= pack.LIMIT
    assert model + room + tracked <= CARRIED


def test_wheels_are_asked_for_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(pack.subprocess, "run", lambda command, check: commands.append(command))
    pack.fetch(tmp_path, "3.13")
    (command,) = commands
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "--python-version=3.13", f"--dest={tmp_path}"} <= set(command)
    assert {c.split("==")[0] for c in command if "==" in c} == set(pack.PACKAGES)


def wheel(folder: Path, module: str) -> None:
    with ZipFile(folder / f"{module}-1.0-py3-none-any.whl", "w") as held:
        held.writestr(f"{module}.py", "value = 'of the wheel'")
        held.writestr(f"{module}-1.0.dist-info/METADATA", "")


def test_wheels_provide_what_is_missing_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for module in ("numpy", "module_of_no_machine"):
        wheel(tmp_path, module)
    assert wheels.provide(tmp_path, tmp_path / "site") == ["module_of_no_machine"]
    assert not (tmp_path / "site" / "numpy.py").exists()
    script = "import numpy, module_of_no_machine as m; print(m.value, numpy.__version__)"
    printed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert printed.split() == ["of", "the", "wheel", np.__version__]
    assert wheels.provide(tmp_path / "none", tmp_path / "site") == []


# --- what is handed over ------------------------------------------------------------------------------


def test_results_are_handed_over_while_the_run_goes_on(tmp_path: Path) -> None:
    scratch, kept, out = (tmp_path / name for name in ("scratch", "rows", "out"))
    for folder in (scratch, kept, out):
        folder.mkdir()
    (kept / "cpu.csv").write_text("of before\n")
    with deliver.Delivery(
        scratch, kept, out, lambda results: f"{len(results)} so far", period=0.02
    ) as delivery:
        assert (out / deliver.SUMMARY).read_text() == "0 so far\n"
        Result("decode", scratch / "decode.json").say("a case")
        (scratch / "decode.log").write_bytes(b"x" * (3 * deliver.LOG_BYTES))
        (kept / "gpu.csv").write_text("a row\n")
        end = time.monotonic() + 60
        while not (out / "gpu.csv").exists():  # a cut-off here loses nothing of these
            assert time.monotonic() < end
            time.sleep(0.01)
        (one,) = json.loads((out / deliver.RESULTS).read_text())
        assert (one["stage"], one["lines"], one["status"]) == ("decode", ["a case"], stage.STOPPED)
        delivery.finish([{"stage": "decode"}, {"stage": "linear"}])
    assert (out / deliver.SUMMARY).read_text() == "2 so far\n"
    assert sorted(p.name for p in out.iterdir()) == ["gpu.csv", "logs.zip", "results.json", "summary.txt"]
    with ZipFile(out / deliver.LOGS) as logs:
        assert [(i.filename, i.file_size) for i in logs.infolist()] == [("decode.log", deliver.LOG_BYTES)]
    assert deliver.PERIOD <= 20


def test_a_run_that_is_terminated_hands_over_and_leaves_no_stage_running(tmp_path: Path) -> None:
    script = f'''
import sys
from rbe_gpu.reports.gpu import check, plan
body = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(os.getpid(), child.pid, flush=True)
time.sleep(600)
"""
check._command = lambda name, options: [sys.executable, "-c", body]
check.run_all.__defaults__ = (check._command, *check.run_all.__defaults__[1:])
sys.exit(check.main(["--quick", "--only", "decode", "--out", {str(tmp_path)!r}]))
'''
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    run = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    while "=== decode" not in (line := run.stdout.readline()):
        assert line, "the run ended"
    time.sleep(3.0)
    run.send_signal(signal.SIGTERM)
    run.stdout.close()
    assert run.wait(60) != 0
    with ZipFile(tmp_path / deliver.LOGS) as logs:
        text = logs.read("decode.log").decode()
    assert text, "the stage had not started"
    for pid in map(int, text.split()):  # the stage, and what it had started
        with suppress(FileNotFoundError):
            assert "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


# --- the rehearsal ------------------------------------------------------------------------------------


def test_the_command_starts_without_the_packages_that_it_carries() -> None:
    """Until `wheels.provide` has run, nothing but the standard library and this package is imported."""
    script = f"""
import sys
for name in ("numpy", *{sorted(listed_packages.refused(("pip",)))!r}):
    if name != "rbe_gpu":
        sys.modules.setdefault(name, None)
import rbe_gpu.reports.gpu.check
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


def test_rehearsal(carried: Path, tmp_path: Path) -> None:
    """Every stage, with only the packages of such a machine, from the folder that is carried there."""
    place = tmp_path / "environment"
    place.mkdir()
    environment = listed_packages.environment(place, PACKAGES)
    environment["PYTHONPATH"] += os.pathsep + str(ROOT)
    refused = subprocess.run([sys.executable, "-c", "import ml_dtypes"], env=environment, capture_output=True)
    assert b"No module named 'ml_dtypes'" in refused.stderr
    out = tmp_path / "out"
    command = [sys.executable, "-m", "rbe_gpu.reports.gpu.check", "--rehearse", "--jobs", "1"]
    done = subprocess.run(
        [*command, "--model", str(carried), "--out", str(out), "--commit", "abc"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((out / deliver.RESULTS).read_text())
    assert {one["stage"]: one["status"] for one in results} == dict.fromkeys(plan.STAGES, stage.PASSED)
    summary = (out / deliver.SUMMARY).read_text().splitlines()
    needed = summary[0].removeprefix(f"Not installed here, imported from {carried.name}: ").split(", ")
    assert {n.replace("_", "-") for n in needed} == {n.replace("_", "-") for n in pack.PACKAGES}
    assert summary[1].startswith("A REHEARSAL without a GPU")
    files = list(out.iterdir())
    assert len(files) <= MOST_FILES
    assert sum(f.stat().st_size for f in files) <= MOST_BYTES
    measured = rows.read_rows(out / rehearsal.FILE)
    assert {(r.backend, r.device, r.commit) for r in measured} == {(rehearsal.BACKEND, rehearsal.NAME, "abc")}
    assert {r.op for r in measured} >= {"attention", "linear", "decode", "softmax", "model"}
    assert not [r for r in check.rows_of(out) if r.backend == "cuda"]
    assert not (check.RESULTS / rehearsal.FILE).exists()

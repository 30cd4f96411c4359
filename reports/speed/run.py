"""Measure speed, memory and size in this process, stage after stage, and write the page from their rows."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from rbe_gpu import machine, output
from rbe_gpu.models import corpus

from ..harness import mpnet, row_names
from ..harness.inputs import Inputs
from ..harness.noise import Watch
from ..harness.process import say
from ..harness.rows import Results, Row, Session, append_rows, read_rows
from . import compression, original, page, panel_cache, roofline, utilisation
from .cases import DENSE, ONNX, OPS, OURS, TORCH, attention, model
from .compression import Setting
from .processes import Processes, installed

#: Moves the bar of a stage to a share of its work.
Move = Callable[[float], None]


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


class Stage(NamedTuple):
    """A part of the report: its name on the terminal, and the function that measures its rows."""

    name: str
    measure: Callable[[Move], Iterable[Row]]


def measure(
    out: Path, folder: Path, threads: int, quick: bool, console: Console, wide: Path | None = None
) -> None:
    """Measure speed and memory and write the page, in this process; the environment has set the threads.

    wide : as `wide_model` of `rbe_gpu.reports.run.main`
    """
    started = time.perf_counter()
    if TORCH not in installed():
        console.print("PyTorch is not installed: the report compares with NumPy alone.")
    session, inputs = Session.here(threads), Inputs(folder)
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        wide = wide or mpnet.installed(scratch)
        processes = stack.enter_context(Processes(folder, threads, quick, wide=wide))
        results = scratch / page.FILE  # an earlier report stays whole until this one is
        run = _SpeedRun(folder, inputs, session, quick, console, wide, scratch, processes)

        def write(move: Move) -> tuple[()]:
            page.write(read_rows(results), out, quick)
            output.write_text(out / page.FILE, results.read_text(encoding="utf-8"))
            return ()

        stages = [*run.stages(), Stage("plots and page", write)]
        progress = stack.enter_context(_progress(console))
        overall = progress.add_task("report", total=len(stages))
        for stage in stages:
            task = progress.add_task(stage.name, total=None)

            def move(share: float, task: Any = task) -> None:
                progress.update(task, total=1.0, completed=share)

            append_rows(results, list(stage.measure(move)))
            move(1.0)
            progress.stop_task(task)
            progress.advance(overall)
    minutes, seconds = divmod(int(time.perf_counter() - started), 60)
    print(f"{out / 'index.html'} written in {minutes} min {seconds} s; its rows are in {out / page.FILE}.")


def _progress(console: Console) -> Progress:
    """One bar for the report, and one for each stage."""
    return Progress(
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description:<34}"),
        BarColumn(28),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        console=console,
    )


class _SpeedRun:
    """The stages of a report in their order, and what later ones need of earlier ones.

    Parameters
    ----------
    wide : the folder of all-mpnet-base-v2, if it is there
    scratch : a folder that is removed after the run
    """

    def __init__(
        self,
        folder: Path,
        inputs: Inputs,
        session: Session,
        quick: bool,
        console: Console,
        wide: Path | None,
        scratch: Path,
        processes: Processes,
    ) -> None:
        self.folder, self.inputs, self.session = folder, inputs, session
        self.quick, self.console = quick, console
        self.wide, self.scratch, self.processes = wide, scratch, processes
        self.budget = RunBudget.of(quick)
        self.watch = Watch(lambda: (os.getpid(), *processes.pids), self.budget.patience)
        self.settings = compression.QUICK_SETTINGS if quick else compression.ALL_SETTINGS
        self.files: dict[Setting | None, Path] = {None: folder}
        self.encoders: dict[str, Any] = {}  # by provider: dense ones, and ours that may cache decoded weights
        self.lean: dict[str, Any] = {}  # ours without a cache; slow, so fewer rounds are timed

    def stages(self) -> list[Stage]:
        on_gpu, no_gpu = gpu_state()
        least = self.budget.least
        stages = [
            Stage("compile the kernels", self._compile),
            Stage("read the texts, run the dense model", self._run_dense),
            Stage("check it against the baselines", self._check_baselines),
        ]
        for setting in self.settings:
            stages.append(Stage(f"compress: {setting.name}", partial(self._compress, setting)))
            stages.append(Stage(f"quality: {setting.name}", partial(self._quality, setting)))
        for case, encoders, rounds in (
            (row_names.MODEL, self.encoders, least), (row_names.MODEL_LEAN, self.lean, max(2, least - 2)),
        ):  # fmt: skip
            stages.append(Stage(f"time of {case}", partial(self._time_encoders, case, encoders, rounds)))
        stages.append(Stage("cores and memory over time", self._watch_cores))
        if on_gpu or no_gpu is not None:
            stages.append(Stage("GPU over time", partial(self._watch_gpu, no_gpu)))
        stages.append(Stage("sizes of the panel cache", self._panel_cache))
        stages.append(Stage("bandwidth and matmul rates", self._roofline))
        stages += [Stage(f"op: {op}", partial(self._op, op)) for op in OPS]
        stages.append(Stage("memory of long attention", self._attention_memory))
        stages.append(Stage("memory of whole processes", self._process_memory))
        stages.append(Stage("memory of the weights", self._weight_memory))
        if self.wide is not None and not self.quick:
            stages.append(Stage(f"memory of {mpnet.NAME}", partial(self._wide_memory, self.wide)))
        return stages

    # --- quality and size -------------------------------------------------------------------------------------

    def _compile(self, move: Move) -> tuple[()]:
        compression.warm_up(self.inputs.weight(0, "attention.self.query"))
        return ()

    def _run_dense(self, move: Move) -> Iterator[Row]:
        self.texts = corpus.held_out(self.budget.texts)
        self.dense = self.encoders[DENSE] = self.lean[DENSE] = self.processes.load_encoder(DENSE, self.folder)
        self.dense_vectors = self.dense.embed(self.texts)
        size = (self.folder / "model.safetensors").stat().st_size
        yield self.session.row("model", "dense", OURS, "file_bytes", "B", float(size))
        unrelated = compression.unrelated_cosine(self.dense_vectors)
        shape = f"{len(self.texts)} texts"
        yield self.session.row("model", "dense", OURS, "unrelated_cosine", "", unrelated, shape=shape)

    def _check_baselines(self, move: Move) -> Iterable[Row]:
        baselines = self.processes.baseline_encoders()
        if ONNX not in baselines:
            self.console.print("ONNX Runtime (onnxruntime and onnx) is not installed and is not measured.")
        self.encoders |= baselines
        return model.compare(self.dense, baselines, self.texts[: row_names.BATCH], self.session)

    def _compress(self, setting: Setting, move: Move) -> Iterable[Row]:
        file = self.scratch / f"{setting.name.replace(' ', '-')}.rbe.safetensors"
        self.files[setting] = file
        return compression.encode(
            self.folder, file, setting, self.session, lambda _, done, total: move(done / total)
        )

    def _quality(self, setting: Setting, move: Move) -> Iterator[Row]:
        file, provider = self.files[setting], f"{OURS} {setting.name}"
        yield from compression.weight_rows(self.inputs.folder, file, setting, self.session)
        move(0.3)
        encoder = self.encoders[provider] = self.processes.load_encoder(provider, file, 1 << 40)
        vectors = encoder.embed(self.texts)
        yield from compression.vector_rows(self.dense_vectors, vectors, setting.name, self.session)
        self.lean[provider] = self.processes.load_encoder(f"{provider}, lean", file)
        self.lean[provider].embed(self.texts[:1])

    # --- speed ------------------------------------------------------------------------------------------------

    def _time_encoders(self, case: str, encoders: dict[str, Any], rounds: int, move: Move) -> list[Row]:
        finished = count(1)

        def on_round() -> None:
            move(min(next(finished), rounds - 0.1) / rounds)

        seconds = self.budget.batch_seconds
        return self.watch.measure(
            lambda: model.times(self.inputs, case, encoders, self.session, seconds, rounds, on_round)
        )

    def _watch_cores(self, move: Move) -> Iterable[Row]:
        texts = model.batch(self.inputs, corpus.held_out(512))
        return utilisation.measure(self.dense, texts, self.budget.watched, self.session)

    def _watch_gpu(self, no_gpu: str | None, move: Move) -> list[Row]:
        """no_gpu : why a GPU that is here cannot be measured"""
        if no_gpu is None:
            texts, seconds = corpus.held_out(512), self.budget.watched
            rows = utilisation.try_gpu(self.processes, self.folder, texts, seconds, self.session)
            no_gpu = utilisation.gpu_reason(Results(rows))
        else:
            rows = [utilisation.gpu_not_measured(no_gpu, self.session)]
        if no_gpu is not None:
            say(self.console, f"The GPU is not measured: {no_gpu}")
        return rows

    def _panel_cache(self, move: Move) -> list[Row]:
        self.processes.forget_encoders()
        setting, budget = Setting(grade="B"), self.budget
        return self.watch.measure(
            lambda: panel_cache.measure(
                self.files[setting], setting.name, self.inputs, self.session, budget.batch_seconds, budget.least,
                self.quick,
            )
        )  # fmt: skip

    def _roofline(self, move: Move) -> list[Row]:
        return self.watch.measure(lambda: roofline.measure(self.inputs, self.session, self.quick))

    def _op(self, op: str, move: Move) -> Iterator[Row]:
        for case in self.processes.cases(op):
            timed = partial(
                self.processes.measure, case, self.session, self.budget.case_seconds, self.budget.least
            )
            yield from self.watch.measure(timed)

    # --- memory -----------------------------------------------------------------------------------------------

    def _attention_memory(self, move: Move) -> Iterable[Row]:
        return attention.memory(self.inputs, self.session, self.scratch, self.quick)

    def _process_memory(self, move: Move) -> Iterable[Row]:
        return model.process_peaks(self.inputs, self.session, self.processes.libraries, self.scratch)

    def _weight_memory(self, move: Move) -> Iterable[Row]:
        settings = (compression.FAST, *(() if self.quick else (compression.SETTINGS[2], None)))
        return model.memory(self.inputs, self.session, {s: self.files[s] for s in settings}, self.scratch)

    def _wide_memory(self, wide: Path, move: Move) -> Iterable[Row]:
        texts = self.texts[: row_names.BATCH]
        return original.measure(wide, texts, self.scratch, self.processes, self.session)


def gpu_state() -> tuple[bool, str | None]:
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

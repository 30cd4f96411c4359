"""`rbe-gpu distill`: train a compressed model to say what the dense one says."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._errors import about, fail, printable, usage, writes
from ._files import Force, check_output
from ._inputs import check_apart, check_model, read_texts
from ._options import number
from ._output import Json, escaped, new_table, print_json, show, size
from ._signals import INTERRUPTED, cleaning_up

if TYPE_CHECKING:
    from ..train.distill import DistillSummary
    from ..train.loop import TrainingStatus

_LINE_SECONDS = 60.0  # between two lines of progress where standard error is no terminal


def command(
    source: Annotated[
        Path, typer.Argument(readable=False, help="The folder of the dense model, or its GGUF file.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write: NAME.rbe.safetensors.")],
    texts: Annotated[
        list[Path],
        typer.Option(readable=False, help="Text to train on, one per line; may be given repeatedly."),
    ],
    ratio: Annotated[
        float | None,
        typer.Option(
            callback=number(1.0),
            help="Minimum compression ratio: float32 bytes of the model / bytes of the file.",
        ),
    ] = None,
    nbytes: Annotated[
        int | None, typer.Option("--bytes", min=1, help="Maximum size of the file in bytes.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(callback=number(above=True), help="Training time in minutes.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, max=10**9, help="Number of training steps, instead of --minutes.")
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            help="A calibrated or trained file of this model to start from. Default: calibrate it on the texts.",
        ),
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            help="Held-out texts that select the best state. Default: a sixteenth of the texts, at most 256, or some "
            "16,384 tokens of a model that generates text.",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, max=10**6, help="Texts, or windows, per training step. Default: 32 texts, 8 windows."
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=2,
            max=10**6,
            help="Tokens of a text at most, or of the windows of a model that generates text. Default: 96, 256.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Seed of the order of the texts.")] = 0,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda or cuda:N.")] = "cpu",
    precision: Annotated[
        str | None,
        typer.Option(help="float32 or bfloat16 matmuls. Default: float32 on the CPU, else bfloat16."),
    ] = None,
    learning_rate: Annotated[
        float, typer.Option(help="Learning rate of the integers, in quantisation steps per training step.")
    ] = 0.01,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a run that was interrupted or killed.")
    ] = False,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Train a compressed model on text to a size, so that its vectors, or predictions, are those of the dense model.

    Needs PyTorch: pip install 'rbe-gpu[train]'. Ctrl-C ends training with the best file so far; --resume goes on.
    """
    for one, other in (("--ratio", "--bytes"), ("--minutes", "--steps")):
        values = {"--ratio": ratio, "--bytes": nbytes, "--minutes": minutes, "--steps": steps}
        if (values[one] is None) == (values[other] is None):
            usage("give one of them", one, other)
    if not os.path.lexists(source):
        fail(f"{source} does not exist")
    check_model(str(source))
    if start is not None and not start.is_file():
        fail(f"{start} is not a file; name a .rbe.safetensors file to start from")
    out = check_output(out, force or resume)
    for path in (*texts, *([] if held_out is None else [held_out])):
        check_apart(out, source, path)
    writes(out)
    lines = [line for path in texts for line in read_texts(path)]
    others = None if held_out is None else read_texts(held_out)
    try:
        import torch  # noqa: F401
    except ImportError:
        fail("training needs PyTorch; pip install 'rbe-gpu[train]'")
    from ..threads import get_num_threads
    from ..train.distill import distill

    get_num_threads()  # imports Numba before there is anything to clean up
    with cleaning_up(), about(source), _progress() as (calibrating, training):
        summary = distill(
            source,
            lines,
            out=out,
            ratio=ratio,
            file_bytes=nbytes,
            minutes=minutes,
            steps=steps,
            start=start,
            held_out=others,
            batch_size=batch_size,
            max_tokens=max_tokens,
            seed=seed,
            device=device,
            precision=precision,
            learning_rate=learning_rate,
            resume=resume,
            progress=training,
            calibration_progress=calibrating,
        )
    if as_json:
        print_json(_as_dict(summary))
    else:
        _show(summary)
    if summary.interrupted:
        print(
            f"rbe-gpu: {printable(str(out))} has the best state so far; continue with --resume",
            file=sys.stderr,
        )
        raise typer.Exit(INTERRUPTED)


def _line(status: TrainingStatus) -> str:
    best = "" if status.best is None else f", best {status.best}"
    return (
        f"step {status.step}: loss {status.loss:.4f}, {status.training} in training, {status.held_out} held out"
        f"{best}; {status.bits:.2f} bits, {size(round(status.file_bytes))}"
    )


@contextmanager
def _progress() -> Iterator[tuple[Callable[[str, int, int], None], Callable[[TrainingStatus], None]]]:
    """Live progress of calibration and of training on a terminal; elsewhere a line a minute of training."""
    import time

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(bar_width=20), TextColumn("{task.percentage:.0f}% {task.description}"))
    said = time.monotonic()
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=1.0)

        def calibrating(name: str, done: int, total: int) -> None:
            bar.update(
                task, completed=done / total, description="calibrating: " + escaped(name).replace("[", "(")
            )

        def training(status: TrainingStatus) -> None:
            nonlocal said
            bar.update(task, completed=status.done, description=_line(status))
            if not console.is_terminal and time.monotonic() - said >= _LINE_SECONDS:
                said = time.monotonic()
                left = f"{status.seconds_left / 60:.0f} min left"
                print(f"rbe-gpu: {_line(status)}, {left}", file=sys.stderr, flush=True)

        yield calibrating, training


def _as_dict(summary: DistillSummary) -> dict[str, Any]:
    return {
        **asdict(summary),
        "path": str(summary.path),
        "ratio": summary.ratio,
        "curve": [
            {
                "steps": steps,
                "minutes": minutes,
                "bytes": round(nbytes),
                **{f"held_out_{name}": value for name, value in measure._asdict().items()},
            }
            for steps, minutes, nbytes, measure in summary.curve
        ],
    }


def _show(summary: DistillSummary) -> None:
    from ..evaluate_decoders import Prediction

    if isinstance(summary.result, Prediction):
        on = f"{summary.result.tokens} held-out tokens"
        table = new_table("file", ">mean KL", ">99th percentile", ">same most probable token", ">perplexity")
    else:
        on = f"{summary.result.texts} held-out texts"
        table = new_table("file", ">mean cosine", ">1st percentile", ">top-10 overlap")
    for name, quality in (("start", summary.start), ("trained", summary.result)):
        values: tuple[float, ...]
        if isinstance(quality, Prediction):
            values = quality.kl, quality.kl_p99, quality.top_1, quality.perplexity
        else:
            values = quality.cosine_mean, quality.cosine_p1, quality.overlap_at_10
        *first, last = values
        table.add_row(name, *(f"{value:.4f}" for value in first), f"{last:.3f}")
    show(
        table,
        f"on {on}; {summary.steps} steps in {summary.minutes:.1f} minutes",
        f"{summary.path}: {size(summary.file_bytes)}, {summary.ratio:.2f} times smaller than float32"
        + (
            ", with the tensors of the start file: the trained ones were no better"
            if summary.is_start
            else ""
        ),
    )

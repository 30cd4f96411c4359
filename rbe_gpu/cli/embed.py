"""`rbe-gpu embed`: a file of texts -> a .npy file of embeddings; with --scheduler, files -> a folder of shards."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from . import _embed_files
from ._cluster import Scheduler, Workers, check_cluster
from ._compiling import compiling
from ._errors import about, fail, printable, usage, writes
from ._files import Force, check_output, message_stream, save_npy
from ._inputs import check_apart, check_model, read_lines
from ._output import Json, print_json
from ._signals import cleaning_up


def command(
    model: Annotated[
        str,
        typer.Argument(metavar="FILE", help="A .rbe.safetensors file, a model folder or hf://OWNER/NAME."),
    ],
    texts: Annotated[
        list[Path],
        typer.Argument(
            readable=False,
            help="A UTF-8 file, one text per line; - for stdin. With --scheduler: .txt, .jsonl and .parquet files, "
            "or folders of them.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="The .npy file to write, one row per line; - for stdout. With --scheduler: the folder.",
        ),
    ],
    batch_size: Annotated[int, typer.Option(min=1, max=10**6, help="Texts per batch.")] = 32,
    prompt_name: Annotated[
        str | None,
        typer.Option(
            help="The model's prompt to put before each line. Default: the model's default, if it has one."
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="A text to put before each line; '' for none, whatever the model says.")
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(
            metavar="int8|float",
            help="int8: quantise the inputs of all linear layers; float: of none. Default: as the file says.",
        ),
    ] = None,
    scheduler: Scheduler = None,
    workers: Workers = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="cpu|cuda", help="With --scheduler: where workers compute. Default: cpu."),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(metavar="npy|parquet", help="With --scheduler: format of the shards. Default: npy."),
    ] = None,
    field: Annotated[
        str | None,
        typer.Option(
            help="With --scheduler: the field of JSON lines, or column of Parquet files, that holds the text. "
            "Default: text."
        ),
    ] = None,
    shard_texts: Annotated[
        int | None,
        typer.Option(min=1, max=10**9, help="With --scheduler: texts per shard. Default: 8192."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="With --scheduler: continue a run to the same folder.")
    ] = False,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Embed each line of a text file; row i of the output is the embedding of line i.

    With --scheduler: embed files of texts on several processes or machines, into a folder of shards.
    """
    if prompt is not None and prompt_name is not None:
        usage("give one of them", "--prompt", "--prompt-name")
    if activations not in (None, "int8", "float"):
        usage("use int8 or float", "--activations")
    only_with_scheduler = {
        "--workers": workers,
        "--device": device,
        "--format": format,
        "--field": field,
        "--shard-texts": shard_texts,
        "--resume": resume or None,
    }
    check_cluster(scheduler, workers, only_with_scheduler)
    check_model(model)
    if scheduler is not None:
        _embed_files.run(
            model,
            texts,
            out,
            scheduler=scheduler,
            workers=workers,
            device=device or "cpu",
            format=format or "npy",
            field=field or "text",
            shard_texts=shard_texts,
            batch_size=batch_size,
            prompt_name=prompt_name,
            prompt=prompt,
            activations=activations,
            resume=resume,
            force=force,
            as_json=as_json,
        )
        return
    if len(texts) > 1:
        usage("one file without --scheduler", "TEXTS")
    _embed_file(model, texts[0], out, batch_size, prompt_name, prompt, activations, as_json, force)


def _embed_file(
    model: str,
    texts: Path,
    out: Path,
    batch_size: int,
    prompt_name: str | None,
    prompt: str | None,
    activations: str | None,
    as_json: bool,
    force: bool,
) -> None:
    out = check_output(out, force)
    messages = message_stream(out)
    if as_json and messages is not sys.stdout:
        usage("both go to standard output; name a file", "--json", "--out")
    check_apart(out, Path(model).expanduser(), texts)
    writes(out)
    lines = read_lines(texts)
    import rich

    from ..models.load import load_embedder

    rich.reconfigure(stderr=True)
    start = time.perf_counter()
    with about(model), compiling(model, activations):
        encoder = load_embedder(model, activations=activations)
        loaded = time.perf_counter()
        vectors = encoder.embed(
            lines,
            batch_size=batch_size,
            show_progress=sys.stderr.isatty(),
            prompt_name=prompt_name,
            prompt=prompt,
        )
    _check_finite(vectors, model, str(texts))
    seconds = time.perf_counter() - loaded
    with cleaning_up():
        save_npy(out, vectors)
    rate = len(lines) / seconds if lines and seconds > 0 else 0.0
    if as_json:
        print_json(
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
        shape = f"{len(lines)} x {vectors.shape[1]} float32"
        print(f"{printable(str(out))}: {shape}, {seconds:.2f} s, {rate:.0f} texts/s", file=messages)


def _check_finite(vectors: Any, model: str, texts: str) -> None:
    """Refuse embeddings that hold NaN or Inf: of weights that overflow, since those of a folder are finite."""
    import numpy as np

    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        fail(f"{model}: the embedding of line {int(np.argmin(finite)) + 1} of {texts} holds NaN or Inf")

"""`rbe-gpu embed`: a file of texts -> a .npy file of embeddings."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from ._errors import errors_on_one_line, fail
from ._files import Force, check_output, message_stream, read_lines, save_npy
from ._output import Json, print_json


def command(
    model: Annotated[str, typer.Argument(metavar="FILE", help="A .rbe.safetensors file or a model folder.")],
    texts: Annotated[
        Path, typer.Argument(readable=False, help="A UTF-8 file, one text per line; - for stdin.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The .npy file to write, one row per line; - for stdout.")
    ],
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per batch.")] = 32,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Embed each line of a text file; row i of the output is the embedding of line i."""
    with errors_on_one_line():
        out = check_output(out, force)
        messages = message_stream(out)
        if as_json and messages is not sys.stdout:
            fail("--json and the vectors both go to standard output; name a file")
        lines = read_lines(texts)
        import rich

        from ..models.load import load

        rich.reconfigure(stderr=True)
        start = time.perf_counter()
        encoder = load(model)
        loaded = time.perf_counter()
        vectors = encoder.embed(lines, batch_size=batch_size, show_progress=sys.stderr.isatty())
        seconds = time.perf_counter() - loaded
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
            line = f"{out}: {len(lines)} x {vectors.shape[1]} float32, {seconds:.2f} s, {rate:.0f} texts/s"
            print(line, file=messages)

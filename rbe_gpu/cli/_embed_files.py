"""`rbe-gpu embed --scheduler`: files of texts -> a folder of shards."""

from __future__ import annotations

import time
from pathlib import Path

from ._errors import MANIFEST, fail, printable, usage, writes_folder
from ._output import print_json, progress_bar
from ._signals import cleaning_up


def run(
    model: str,
    texts: list[Path],
    out: Path,
    *,
    scheduler: str,
    workers: int | None,
    device: str,
    format: str,
    field: str,
    shard_texts: int | None,
    batch_size: int,
    prompt_name: str | None,
    prompt: str | None,
    activations: str | None,
    resume: bool,
    force: bool,
    as_json: bool,
) -> None:
    for option, value, known in (
        ("--device", device, ("cpu", "cuda")),
        ("--format", format, ("npy", "parquet")),
    ):
        if value not in known:
            usage(f"use {' or '.join(known)}", option)
    if resume and force:
        usage("give one of them", "--resume", "--force")
    if any(str(path) == "-" for path in (*texts, out)):
        fail("standard input and output are not shared with workers; name files and a folder")
    if (out / MANIFEST).is_file() and not (resume or force):
        fail(f"{out} holds vectors; pass --resume to continue, or --force to replace them")
    from ..cluster import connected
    from ..embed_files import SHARD_TEXTS, embed_files, text_files
    from ..models.locate import find_model
    from ..threads import get_num_threads

    text_files(texts)  # both before any process is started
    find_model(model)
    get_num_threads()  # imports Numba before there is anything to clean up
    writes_folder(out, force)
    start = time.perf_counter()
    with (
        cleaning_up(),
        progress_bar("embedding") as progress,
        connected(scheduler, workers, device) as client,
    ):
        summary = embed_files(
            client,
            model,
            texts,
            out,
            format=format,
            field=field,
            shard_texts=SHARD_TEXTS if shard_texts is None else shard_texts,
            batch_size=batch_size,
            prompt_name=prompt_name,
            prompt=prompt,
            activations=activations,
            device=device,
            resume=resume,
            force=force,
            progress=progress,
        )
    seconds = time.perf_counter() - start
    if as_json:
        print_json(
            {
                "out": str(out),
                "texts": summary.texts,
                "embedding_size": summary.columns,
                "shards": summary.shards,
                "resumed_shards": summary.resumed,
                "seconds": seconds,
            }
        )
    else:
        resumed = f", {summary.resumed} of them from before" if summary.resumed else ""
        shape = f"{summary.texts} x {summary.columns or 0} float32"
        print(f"{printable(str(out))}: {shape} in {summary.shards} shards{resumed}, {seconds:.2f} s")

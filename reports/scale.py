"""`python -m rbe_gpu.reports.scale`: what running on workers costs, in processor time, for docs/scale.md.

Processor time of all processes and not time on a clock: the rows then depend little on what else the machine does.
Of the model: all-MiniLM-L6-v2. Texts: the first words of docstrings of Python's library, short ones, so that costs of
workers are not lost in those of the encoder.
"""

from __future__ import annotations

import tempfile
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rbe_gpu.cluster import LOCAL, connected, run_tasks
from rbe_gpu.embed_files import embed_files
from rbe_gpu.embed_files.text_files import shards, windows
from rbe_gpu.embed_files.worker import write_shard
from rbe_gpu.models.compress import compress_model
from rbe_gpu.models.corpus import docstrings
from rbe_gpu.models.load import load_embedder
from rbe_gpu.models.locate import model_folder
from rbe_gpu.models.text_embedder import window_of
from rbe_gpu.threads import set_num_threads

TASKS = 2000
SHARDS = 8
WINDOW = window_of(32)
TEXTS = 4 * WINDOW
WORDS = 6
CODES: dict[str, Any] = {"codes": "dense-int4", "transform": "none", "basis": False}


def processor_seconds(function: Callable[[], Any]) -> float:
    """Of this process, which holds the client and a local scheduler."""
    start = time.process_time()
    function()
    return time.process_time() - start


class Measured:
    """Processor seconds of this process and of the workers during a call."""

    def __init__(self, client: Any, function: Callable[[], Any]) -> None:
        before = sum(client.run(time.process_time).values())
        self.here = processor_seconds(function)
        self.workers = sum(client.run(time.process_time).values()) - before


def row(what: str, seconds: float, unit: str) -> None:
    scale, name = (1e6, "us") if seconds < 1e-3 else (1e3, "ms") if seconds < 1 else (1.0, "s")
    print(f"| {what} | {seconds * scale:.3g} {name} | {unit} |", flush=True)


def texts() -> list[str]:
    every = (" ".join(text.split()[:WORDS]) for docstring in docstrings() for text in docstring)
    distinct = list(dict.fromkeys(every))[:TEXTS]
    if len(distinct) < TEXTS:
        raise ValueError(f"Python's library has {len(distinct)} texts here; {TEXTS} are needed")
    return distinct


def measure_files(folder: Path, lines: list[str]) -> None:
    """What every text costs besides its vector, on either side."""
    large = folder / "large.txt"
    large.write_text("\n".join(lines * 300) + "\n", encoding="utf-8")
    cut: list[Any] = []
    seconds = processor_seconds(lambda: cut.extend(shards([large], 8 * WINDOW, "text")))
    size = large.stat().st_size
    row("cut a file of lines, with its digests", seconds / size * 1e9, "GB, client")
    taken = processor_seconds(lambda: [None for _ in windows(cut[0], "text", WINDOW)])
    row("read a text from a file of lines", taken / cut[0].rows, "text, worker")
    model = load_embedder(model_folder())
    vectors = model.embed(lines[:WINDOW])
    row(
        "embed it (MiniLM, dense)", processor_seconds(lambda: model.embed(lines)) / len(lines), "text, worker"
    )

    of_shard = cut[0]
    many = np.tile(vectors, (of_shard.rows // WINDOW, 1))

    def write(path: Path) -> None:
        for _ in range(SHARDS):
            write_shard(path, many, of_shard)

    for ending in (".npy", ".parquet"):
        path = folder / f"v{ending}"
        write_shard(path, many, of_shard)  # imports what it needs
        seconds = processor_seconds(partial(write, path))
        row(
            f"write its vector (384 float32) to {ending}, with SHA-256",
            seconds / (SHARDS * len(many)),
            "text, worker",
        )


def main() -> None:
    set_num_threads(1)
    print("| what | processor time | for each |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = texts()
        measure_files(folder, lines)
        (folder / "t.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        alone = processor_seconds(lambda: compress_model(model_folder(), folder / "alone", **CODES))
        for count in (1, 2):
            with connected(LOCAL, count) as client:
                client.wait_for_workers(count, timeout=120)
                of = f", {count} worker{'s' * (count > 1)}"

                def run_all(client: Any = client) -> None:
                    deque(run_tasks(client, abs, range(TASKS)), maxlen=0)

                tasks = Measured(client, run_all)
                row(f"a task that does nothing{of}", tasks.here / TASKS, "task, client and scheduler")
                row(f"a task that does nothing{of}", tasks.workers / TASKS, "task, worker")

                def embed(client: Any = client, out: Path = folder / f"out{count}") -> None:
                    embed_files(client, model_folder(), [folder / "t.txt"], out, shard_texts=WINDOW)

                first = Measured(client, embed)
                row(f"embed {TEXTS} texts, models loaded first{of}", first.workers, "run, workers")
                row(f"embed {TEXTS} texts{of}", first.here, "run, client and scheduler")

                def compress(client: Any = client, out: Path = folder / f"c{count}") -> None:
                    compress_model(model_folder(), out, client=client, **CODES)

                of_tensors = Measured(client, compress)
                row(f"compress MiniLM{of}", of_tensors.workers, "run, workers")
                row(f"compress MiniLM{of}", of_tensors.here, "run, client and scheduler")
        row("compress MiniLM, one process", alone, "run")


if __name__ == "__main__":
    main()

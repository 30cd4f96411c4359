"""embed_files: vectors of files of texts, shard by shard, on the workers of a scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..cluster import check_workers, run_tasks
from ..models.locate import find_model
from ..models.text_embedder import window_of
from ..models.tokenizer import check_unicode
from .folder import MANIFEST, OutputFolder
from .text_files import Shard, check_columns, check_texts, parquet, shards, text_files
from .worker import Job, embed_shard, load_model, model_digest

SHARD_TEXTS = 8192
FORMATS, DEVICES = ("npy", "parquet"), ("cpu", "cuda")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EmbedSummary:
    """The result of `embed_files`.

    Attributes
    ----------
    path : the folder
    texts, columns : of all vectors; columns is None where there are no texts
    shards : how many, of which `resumed` were there from an earlier run
    """

    path: Path
    texts: int
    columns: int | None
    shards: int
    resumed: int


def embed_files(
    client: Any,
    model: str | Path,
    texts: Sequence[str | Path],
    out: str | Path,
    *,
    format: str = "npy",
    field: str = "text",
    shard_texts: int = SHARD_TEXTS,
    batch_size: int = 32,
    prompt_name: str | None = None,
    prompt: str | None = None,
    activations: str | None = None,
    device: str = "cpu",
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> EmbedSummary:
    """Embed files of texts on the workers of a scheduler, into a folder (`rbe_gpu.embed_files.folder`).

    The vectors of a file are bit for bit those of `embed` of all its texts in one process, on the same kind of
    processor and device. Each worker loads the model once. Of the texts, no more than the shards that are under way
    are in memory, two for each thread of the workers; they do not pass through the scheduler.

    Parameters
    ----------
    client : a `distributed.Client` (`rbe_gpu.cluster.connected`)
    model : as of `rbe_gpu.load`, at a path that all workers can read
    texts : files .txt (a text on each line), .jsonl or .parquet, or folders of them, at paths that workers can read
    out : a folder that all workers can write
    format : of the shards, "npy" or "parquet"
    field : of JSON lines, or column of Parquet files, that holds the text
    shard_texts : texts of a shard, rounded up to whole windows of `embed` (`window_of`)
    batch_size, prompt_name, prompt : as of `embed`
    activations : as of `rbe_gpu.load`
    device : "cpu", or "cuda" for the first GPU that each worker sees
    resume : continue a run to the same folder
    force : replace what another run left in the folder. All texts are read first: vectors are not removed for a file
        that cannot be read
    progress : called after each shard with its name, the bytes of the files done, and of all

    Raises
    ------
    OSError
        A file is missing; `ClusterError`: workers or the scheduler.
    ValueError
        A file is not what its name says, has changed since the run that is resumed, or that run had other settings;
        an option is not one of those above, the model has no such prompt, or a prompt or text is not valid Unicode.
    """
    for name, value, known in (("format", format, FORMATS), ("device", device, DEVICES)):
        if value not in known:
            raise ValueError(f"{name}={value!r}; use {' or '.join(known)}")
    if format == "parquet":
        parquet()
    path = find_model(model).absolute()
    files = text_files([Path(text) for text in texts])
    rows = -(-shard_texts // window_of(batch_size)) * window_of(batch_size)
    check_columns(files, field)
    digest = model_digest(path)
    # before the folder: with force, that removes the vectors of another run
    prompt = load_model(str(path), activations).resolve_prompt(prompt, prompt_name)
    check_unicode([], prompt)
    settings = {
        "rbe_gpu": __version__,
        "model": {"path": str(path), "sha256": digest},
        "texts": [str(file) for file in files],
        "format": format,
        "field": field,
        "texts of a shard": rows,
        "batch size": batch_size,
        "prompt": prompt,
        "activations": activations,
        "device": device,
    }
    folders = [Path(out).absolute()] if Path(out).is_dir() else []
    check_workers(client, [*([path] if path.is_file() else []), *files], folders)
    if force and not resume and (Path(out) / MANIFEST).exists():
        check_texts(files, field)
    with OutputFolder(Path(out), settings, resume, force) as folder:
        check_workers(client, folders=[folder.run])
        job = Job(str(path), digest, str(folder.run), format, device, field, activations, batch_size, prompt)
        counts = _Counts(files, progress)
        tasks = ((job, shard) for shard in _missing(shards(files, rows, field), folder, counts))
        with closing(run_tasks(client, embed_shard, tasks)) as results:
            for (_, shard), record in results:
                folder.add(record)
                counts.add(shard, record)
        result = {"texts": counts.texts, "columns": counts.columns, "shards": counts.shards}
        folder.complete(result)
    return EmbedSummary(folder.path, counts.texts, counts.columns, counts.shards, counts.resumed)


class _Counts:
    def __init__(self, files: Sequence[Path], progress: Progress | None) -> None:
        self.texts = self.shards = self.resumed = 0
        self.columns: int | None = None
        self._size = {str(file): file.stat().st_size for file in files}
        self._total, self._done = sum(self._size.values()), 0.0
        self._progress = progress

    def add(self, shard: Shard, record: dict[str, Any]) -> None:
        self.texts += record["rows"]
        self.shards += 1
        self.columns = record["columns"]
        # of a Parquet file only the rows of a shard are known
        self._done += shard.part * self._size[shard.path]
        if self._progress is not None:
            self._progress(Path(shard.path).name, min(round(self._done), self._total), self._total)


def _missing(cut: Iterator[Shard], folder: OutputFolder, counts: _Counts) -> Iterator[Shard]:
    """The shards that are not finished."""
    finished = dict(folder.finished)
    for shard in cut:
        record = finished.pop(shard.name, None)
        if record is None:
            yield shard
        elif (record["texts_sha256"], record["rows"]) != (shard.digest, shard.rows):
            raise _changed(shard.path, folder)
        else:
            counts.resumed += 1
            counts.add(shard, record)
    for record in finished.values():  # of texts that are there no more
        raise _changed(record["texts"], folder)


def _changed(texts: str, folder: OutputFolder) -> ValueError:
    return ValueError(f"{texts} has changed since the run that {folder.path} is of")

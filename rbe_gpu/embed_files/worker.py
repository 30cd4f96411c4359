"""What a worker does: load the model once, and embed shards."""

from __future__ import annotations

import hashlib
import io
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from .. import output
from ..models.load import load_embedder
from ..models.text_embedder import TextEmbedder, window_of
from ..transfer import to
from .text_files import Shard, parquet, windows

_MODEL_FILES = (".json", ".safetensors", ".txt")
F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Job:
    """What all shards of a run share.

    Attributes
    ----------
    model : path of a file or folder, which all workers can read; `digest` of what it holds
    folder : of this run, where shards are written (`OutputFolder.run`)
    format : "npy" or "parquet"
    device : "cpu" or "cuda"
    field : of JSON lines and Parquet files
    activations, batch_size : as of `rbe_gpu.load` and `embed`
    prompt : what is put before each text, "" for nothing
    """

    model: str
    digest: str
    folder: str
    format: str
    device: str
    field: str
    activations: str | None
    batch_size: int
    prompt: str


def model_digest(path: Path) -> str:
    """SHA-256 of a model file, or of the names and contents of a folder's model files."""
    if path.is_file():
        return _file_digest(path)
    whole = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.suffix in _MODEL_FILES and p.is_file()):
        whole.update(f"{file.relative_to(path).as_posix()} {_file_digest(file)}\n".encode())
    return whole.hexdigest()


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


_lock = threading.Lock()
_loaded: dict[tuple[str, ...], TextEmbedder] = {}


def _model(job: Job) -> TextEmbedder:
    """The model of a job: loaded by the first task of this process, until a job with another one comes."""
    key = (job.model, job.digest, job.device, str(job.activations))
    with _lock:
        if key not in _loaded:
            _loaded.clear()
            if model_digest(Path(job.model)) != job.digest:
                raise ValueError(f"{job.model} is another model on a worker than where the run was started")
            _loaded[key] = to(load_model(job.model, job.activations), job.device)
        return _loaded[key]


def load_model(path: str, activations: str | None) -> TextEmbedder:
    """`load_embedder`; a ValueError names the model."""
    try:
        return load_embedder(path, activations=activations)
    except (ValueError, RecursionError) as error:
        message = str(error)
        raise ValueError(message if path in message else f"{path}: {message}") from None


def embed_shard(task: tuple[Job, Shard]) -> dict[str, Any]:
    """Embed a shard and write its file. Returns the line of the log.

    Raises
    ------
    FileNotFoundError
        The run has ended, and its folder is gone.
    """
    job, shard = task
    path = Path(job.folder) / f"{shard.name}.{job.format}"
    vectors = _vectors(job, shard)
    nbytes, digest = write_shard(path, vectors, shard)
    return {
        "file": path.name,
        "texts": shard.path,
        "first": shard.first,
        "rows": shard.rows,
        "bytes": nbytes,
        "columns": vectors.shape[1],
        "sha256": digest,
        "texts_sha256": shard.digest,
    }


def _vectors(job: Job, shard: Shard) -> F32:
    """Vectors (rows, columns) of a shard, those of one `embed` of all texts of its file."""
    model = _model(job)
    out: F32 | None = None
    done = 0
    for texts in windows(shard, job.field, window_of(job.batch_size)):
        try:
            vectors = model.embed(texts, job.batch_size, prompt=job.prompt)
        except ValueError as error:
            lines = f"texts {shard.first + done + 1} to {shard.first + done + len(texts)}"
            raise ValueError(f"{job.model}, {lines} of {shard.path}: {error}") from None
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            number = shard.first + done + int(np.argmin(finite)) + 1
            raise ValueError(f"{job.model}: the embedding of text {number} of {shard.path} holds NaN or Inf")
        if out is None:
            out = np.empty((shard.rows, vectors.shape[1]), np.float32)
        out[done : done + len(texts)] = vectors
        done += len(texts)
    if out is None or done != shard.rows:
        raise ValueError(f"{shard.path} has changed while it was read, or is another file on a worker")
    return out


# --- files of vectors ---------------------------------------------------------------------------------


def write_shard(path: Path, vectors: F32, shard: Shard) -> tuple[int, str]:
    """Write the vectors (rows, columns) of a shard; the bytes of the file and their SHA-256."""
    with output.replacing(path) as file:
        hashing = _Hashing(file)
        _WRITERS[path.suffix](cast(BinaryIO, hashing), vectors, shard)
    return hashing.bytes, hashing.digest.hexdigest()


class _Hashing(io.RawIOBase):
    """A binary file to write; the number and SHA-256 of its bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.bytes, self.digest = 0, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._file.write(view)
        self.digest.update(view)
        self.bytes += view.nbytes
        return view.nbytes


def _write_npy(file: BinaryIO, vectors: F32, shard: Shard) -> None:
    output.write_npy(file, vectors)


def _write_parquet(file: BinaryIO, vectors: F32, shard: Shard) -> None:
    """Columns `row` (int64, the number of the text in its file, from 0) and `vector` (a list of float32)."""
    import pyarrow

    columns = {
        "row": pyarrow.array(np.arange(shard.first, shard.first + shard.rows)),
        "vector": pyarrow.FixedSizeListArray.from_arrays(
            pyarrow.array(vectors.reshape(-1)), vectors.shape[1]
        ),
    }
    table = pyarrow.table(columns, metadata={"texts": shard.path})
    parquet().write_table(table, file, compression="none", use_dictionary=False, write_statistics=["row"])


_WRITERS = {".npy": _write_npy, ".parquet": _write_parquet}

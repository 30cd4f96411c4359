"""Files of texts, cut into shards without reading a file whole: lines (.txt), JSON lines (.jsonl) and Parquet.

A shard is a run of texts of one file: bytes of a file of lines, rows of a Parquet file. The process that cuts reads a
file of lines once, for the ends of its lines and a digest of each shard; workers read the shards again.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..models.tokenizer import check_unicode

#: the kind of a file by the ending of its name
KINDS = {".txt": "lines", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}
_READ = 1 << 20
_LONGEST = 64 << 20  # bytes of a line; a longer one is no text
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Shard:
    """Texts of one file that are embedded together.

    Attributes
    ----------
    name : of the file of vectors, without its ending
    path, kind : the file of texts, and its value in `KINDS`
    first, rows : the number of its first text in the file, from 0, and of its texts
    start, stop : bytes of a file of lines; of a Parquet file 0 and its size
    digest : SHA-256 of those bytes; of a Parquet file, of its footer
    part : of the file, between 0 and 1
    """

    name: str
    path: str
    kind: str
    first: int
    rows: int
    start: int
    stop: int
    digest: str
    part: float


def text_files(paths: Sequence[Path]) -> list[Path]:
    """Files of texts by absolute path: those of `paths`, and of folders all that end as `KINDS` has it, sorted.

    Raises
    ------
    FileNotFoundError
        There is no such file, or none in a folder.
    ValueError
        The name has another ending.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in KINDS and p.is_file())
            if not inside:
                raise FileNotFoundError(f"{path} has no file of texts ({', '.join(KINDS)})")
            files += inside
        elif not path.is_file():
            raise FileNotFoundError(f"{path} does not exist, or is no regular file")
        elif path.suffix.lower() not in KINDS:
            raise ValueError(
                f"{path} has none of the endings {', '.join(KINDS)}, which say how texts are stored"
            )
        else:
            files.append(path)
    return [path.absolute() for path in files]


def check_columns(files: Sequence[Path], field: str) -> None:
    """A ValueError for a Parquet file without a column `field` of strings. Reads the footers of the files."""
    for path in files:
        if KINDS[path.suffix.lower()] == "parquet":
            _opened(path, field).close()


def shards(files: Sequence[Path], rows: int, field: str) -> Iterator[Shard]:
    """The shards of files in order, of `rows` texts each, the last one of a file fewer.

    Memory: one MiB of a file at a time.

    Raises
    ------
    ValueError
        A line is longer than 64 MiB; a file is no Parquet file with a column `field` of strings.
    """
    for number, path in enumerate(files):
        kind = KINDS[path.suffix.lower()]
        cut = _parquet_shards(path, rows, field) if kind == "parquet" else _line_shards(path, rows)
        for index, values in enumerate(cut):
            yield Shard(f"{number:05d}-{index:07d}", str(path), kind, *values)


#: first, rows, start, stop, digest, part
_Cut = Iterator[tuple[int, int, int, int, str, float]]


def _line_shards(path: Path, rows: int) -> _Cut:
    size = max(path.stat().st_size, 1)
    first = count = start = position = 0
    line_start = 0
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_READ):
            ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + 1
            done = used = 0  # ends and bytes of the chunk that belong to finished shards
            while len(ends) - used >= rows - count:
                used += rows - count
                stop = int(ends[used - 1])
                digest.update(chunk[done:stop])
                end = position + stop
                yield first, rows, start, end, digest.hexdigest(), (end - start) / size
                first, count, start, done = first + rows, 0, end, stop
                digest = hashlib.sha256()
            count += len(ends) - used
            digest.update(chunk[done:])
            if len(ends):
                line_start = position + int(ends[-1])
            position += len(chunk)
            if position - line_start > _LONGEST:
                raise ValueError(f"{path}: line {first + count + 1} is longer than {_LONGEST >> 20} MiB")
    if position > line_start:  # a last line without its end
        count += 1
    if count:
        yield first, count, start, position, digest.hexdigest(), (position - start) / size


# --- Parquet ------------------------------------------------------------------------------------------


def parquet() -> Any:
    """The module `pyarrow.parquet`; an ImportError that says what to install."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError("Parquet files need pyarrow: pip install 'rbe-gpu[cluster]'") from None
    return pyarrow.parquet


def _opened(path: Path, field: str) -> Any:
    """A Parquet file with a column `field` of strings."""
    import pyarrow

    try:
        file = parquet().ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is no Parquet file: {_line(error)}") from None
    names = file.schema_arrow.names
    if field not in names:
        raise ValueError(f"{path} has no column {field!r}; it has {', '.join(map(repr, names))}")
    if names.count(field) > 1:
        raise ValueError(f"{path} has {names.count(field)} columns {field!r}")
    of_column = file.schema_arrow.field(field).type
    types = pyarrow.types
    if types.is_dictionary(of_column):
        of_column = of_column.value_type
    if not (types.is_string(of_column) or types.is_large_string(of_column)):
        raise ValueError(f"{path}: the column {field!r} holds {of_column}, not strings")
    return file


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _parquet_shards(path: Path, rows: int, field: str) -> _Cut:
    with _opened(path, field) as file:
        total, groups = file.metadata.num_rows, file.metadata.serialized_size
    size = path.stat().st_size
    with open(path, "rb") as raw:  # the footer, which says where every value is, and "PAR1" behind its length
        raw.seek(size - groups - 8)
        digest = hashlib.sha256(raw.read()).hexdigest()
    for first in range(0, total, rows):
        count = min(rows, total - first)
        yield first, count, 0, size, digest, count / total


def _parquet_texts(shard: Shard, field: str) -> Iterator[str]:
    import pyarrow

    path = Path(shard.path)
    with _opened(path, field) as file:
        starts = np.cumsum([0] + [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
        last = shard.first + shard.rows
        groups = [i for i in range(file.num_row_groups) if starts[i] < last and starts[i + 1] > shard.first]
        row = int(starts[groups[0]])
        try:
            for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=[field]):
                inside = slice(max(shard.first - row, 0), max(min(last - row, len(batch)), 0))
                for i, text in enumerate(batch.column(0)[inside].to_pylist(), row + inside.start):
                    if text is None:
                        raise ValueError(f"{path}: row {i + 1} of the column {field!r} is null")
                    yield text
                row += len(batch)
                if row >= last:
                    return
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: the column {field!r} cannot be read: {_line(error)}") from None


# --- texts of a shard ---------------------------------------------------------------------------------


def windows(shard: Shard, field: str, texts: int) -> Iterator[list[str]]:
    """The texts of a shard, `texts` at a time.

    Raises
    ------
    OSError
        The file cannot be read.
    ValueError
        It has changed since it was cut, a line is not UTF-8 or not JSON with a string `field`, or a column cannot be
        read.
    """
    read = _parquet_texts(shard, field) if shard.kind == "parquet" else _line_texts(shard, field)
    while window := list(islice(read, texts)):
        yield window


def check_texts(files: Sequence[Path], field: str) -> None:
    """Read all texts of files, each row group of a Parquet file once.

    Raises
    ------
    OSError, ValueError
        As `shards` and `windows`; or a text is not valid Unicode, which no tokenizer takes.
    """
    for shard in shards(files, sys.maxsize, field):  # one for each file
        done = 0
        for texts in windows(shard, field, 1024):
            try:
                check_unicode(texts, "")
            except ValueError as error:
                raise ValueError(
                    f"texts {done + 1} to {done + len(texts)} of {shard.path}: {error}"
                ) from None
            done += len(texts)


def _line_texts(shard: Shard, field: str) -> Iterator[str]:
    path = shard.path
    text_of: Callable[[str, int], str] = (
        (lambda line, number: _json_text(line, field, f"{path}: line {number}"))
        if shard.kind == "json"
        else (lambda line, number: line)
    )
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(shard.start)
        for number in range(shard.first + 1, shard.first + shard.rows + 1):
            raw = file.readline(shard.stop - file.tell())
            digest.update(raw)
            if number == 1:
                raw = raw.removeprefix(_BOM)
            line = raw.removesuffix(b"\n").removesuffix(b"\r") if raw.endswith(b"\n") else raw
            try:
                decoded = line.decode("utf-8")
            except UnicodeDecodeError:
                raise ValueError(f"{path}: line {number} is not UTF-8 text") from None
            yield text_of(decoded, number)
    if digest.hexdigest() != shard.digest:
        raise ValueError(f"{path} has changed while it was read, or is another file on a worker")


def _json_text(line: str, field: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(f"{where} is not JSON") from None
    text = value.get(field) if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise ValueError(f"{where} has no string {field!r}")
    return text

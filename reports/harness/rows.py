"""Results as rows: a row is one measurement, a results file is a CSV of rows. Plots and pages read nothing else."""

from __future__ import annotations

import csv
import datetime
import io
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from rbe_gpu import __version__, machine, output

PACKAGES = ("numpy", "numba", "llvmlite", "ml_dtypes", "tokenizers", "safetensors", "torch", "onnxruntime")


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes
    ----------
    p20, p50, p80 : percentiles over `runs`; equal where runs is 1
    noise : how much longer an idle spin took around the case than at its fastest, as a share; None: not measured
    others : share of the time of all cores that other processes took during the case; None: not measured
    """

    op: str
    case: str
    backend: str
    provider: str
    shape: str
    dtype: str
    threads: int
    metric: str
    unit: str
    p20: float
    p50: float
    p80: float
    runs: int
    device: str
    versions: str
    commit: str
    timestamp: str
    noise: float | None = None
    others: float | None = None

    @property
    def disturbed(self) -> bool:
        """Whether another process took more than `DISTURBED` of the machine, or the spin was as much slower."""
        return max(self.noise or 0.0, self.others or 0.0) > DISTURBED


DISTURBED = 0.1
COLUMNS = tuple(f.name for f in fields(Row))
#: of files written before the noise of the machine was measured
OLDER_COLUMNS = COLUMNS[: COLUMNS.index("noise")]


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Append rows to a CSV file, all or none: the file is replaced. A new file gets the header line."""
    place = output.destination(path)
    if place.through:
        raise OSError(f"{path} is not a file that rows can be read from again; name another one")
    before = place.path.read_text(encoding="utf-8") if place.path.exists() else ""
    added = io.StringIO()
    writer = csv.DictWriter(added, COLUMNS, lineterminator="\n")
    if before and tuple(next(csv.reader([before.partition("\n")[0]]))) == OLDER_COLUMNS:
        rows, before = [*read_rows(place.path), *rows], ""
    if not before:
        writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    output.write_text(path, before + added.getvalue())


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file.

    Raises
    ------
    ValueError
        Its columns are not those of `Row`, or a line has other values.
    """
    types: dict[str, Callable[[str], Any]] = dict.fromkeys(COLUMNS, str)
    types |= {"threads": int, "runs": int, "p20": float, "p50": float, "p80": float}
    types |= dict.fromkeys(("noise", "others"), lambda text: float(text) if text else None)
    rows = []
    with path.open(newline="", encoding="utf-8", errors="replace") as f:
        reader = csv.DictReader(f, strict=True)
        try:
            columns = tuple(reader.fieldnames or ())
            if columns not in (COLUMNS, OLDER_COLUMNS):
                raise ValueError(
                    f"{path} is not a results file: its columns are {str(reader.fieldnames)[:200]}"
                )
            for record in reader:
                try:
                    rows.append(Row(*(types[name](record[name]) for name in columns)))
                except (TypeError, ValueError) as error:
                    raise ValueError(
                        f"{path}, line {reader.line_num} is not a row of results: {error}"
                    ) from None
        except csv.Error as error:
            raise ValueError(f"{path} is not a results file: {error}") from None
    return rows


def of_cpu(rows: Sequence[Row]) -> Sequence[Row]:
    """The rows whose device is the processor; all where there is none, as a page of a GPU alone has it."""
    return [r for r in rows if r.backend == "cpu"] or rows


class Results:
    """Look up rows by op, case, provider and metric. What was not measured is None."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = tuple(rows)
        self._rows = {(r.op, r.case, r.provider, r.metric): r for r in self.rows}

    def one(self, op: str, case: str, provider: str, metric: str) -> Row | None:
        """The row, or None; the last one where it was measured more than once."""
        return self._rows.get((op, case, provider, metric))

    def value(self, op: str, case: str, provider: str, metric: str) -> float | None:
        """The median of the row, or None."""
        row = self.one(op, case, provider, metric)
        return None if row is None else row.p50

    def cases(self, op: str) -> list[str]:
        """The cases of an op, in the order they were measured."""
        return list(dict.fromkeys(r.case for r in self.rows if r.op == op))

    def providers(self, op: str, case: str, metric: str) -> list[str]:
        """The providers that have this metric in a case, in the order they were measured."""
        return list(
            dict.fromkeys(r.provider for r in self.rows if (r.op, r.case, r.metric) == (op, case, metric))
        )


# --- the run that rows come from --------------------------------------------------------------------------


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as CSV with these columns; the file appears complete or not at all."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, columns)
    writer.writeheader()
    writer.writerows(rows)
    output.write_text(path, table.getvalue())


def own_cores() -> list[int]:
    """The cores that this process may run on, by number."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return [*range(os.cpu_count() or 1)]


def usable_cores() -> int:
    """How many cores this process may run on."""
    return len(own_cores())


def device() -> str:
    """Processor, architecture, cores and system, in one line."""
    return f"{machine.cpu_name()} ({platform.machine()}, {usable_cores()} cores, {platform.system()})"


def versions() -> str:
    """Versions of Python and of the packages that compute, `name version` separated by commas."""
    installed = [f"python {platform.python_version()}", f"rbe-gpu {__version__}"]
    for name in PACKAGES:
        try:
            installed.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(installed)


def commit() -> str:
    """The commit of the checkout that holds this file, `+` when it has changes; "" outside a checkout."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # an installed copy may lie in an environment inside the checkout of another project
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


@dataclass(frozen=True)
class Session:
    """What all rows of one run share."""

    threads: int
    device: str
    versions: str
    commit: str
    timestamp: str
    backend: str = "cpu"

    @classmethod
    def here(cls, threads: int) -> Session:
        """A run on this machine's processor, now."""
        now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        return cls(threads, device(), versions(), commit(), now)

    def row(
        self,
        op: str,
        case: str,
        provider: str,
        metric: str,
        unit: str,
        values: float | Iterable[float],
        *,
        shape: str = "",
        dtype: str = "float32",
    ) -> Row:
        """One row from one value or from the values of several runs."""
        runs = np.atleast_1d(np.asarray(values if isinstance(values, float | int) else list(values), float))
        if not runs.size:
            raise ValueError(
                f"{op}/{case}/{provider}: no {metric} was measured; a row needs at least one value"
            )
        p20, p50, p80 = (float(v) for v in np.percentile(runs, (20, 50, 80)))
        return Row(
            op, case, self.backend, provider, shape, dtype, self.threads, metric, unit, p20, p50, p80, len(runs),
            self.device, self.versions, self.commit, self.timestamp,
        )  # fmt: skip

"""What a run writes: at most four small files and one of rows for each GPU, written again every few seconds.

A run that is cut off then loses only what came after the last time.
"""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

from rbe_gpu import output

from . import stage

PERIOD = 15.0  # seconds
LOG_BYTES = 200_000  # of the end of each log
SUMMARY, RESULTS, LOGS = "summary.txt", "results.json", "logs.zip"


class Delivery:
    """`with Delivery(...):` writes at its beginning, every `PERIOD` seconds, and at its end.

    Parameters
    ----------
    scratch : folder of the stages' results and logs
    rows : folder of the CSV files of rows
    out : folder of what is handed over
    summary : makes the text of summary.txt from the stages' results
    """

    def __init__(
        self,
        scratch: Path,
        rows: Path,
        out: Path,
        summary: Callable[[list[dict[str, Any]]], str],
        period: float = PERIOD,
    ) -> None:
        self._scratch, self._rows, self._out = scratch, rows, out
        self._summary, self._period = summary, period
        self._before = {path: path.stat().st_mtime_ns for path in rows.glob("*.csv")}
        self._lock, self._end = threading.Lock(), threading.Event()
        self._final: list[dict[str, Any]] | None = None
        self._thread = threading.Thread(target=self._repeat, daemon=True)

    def finish(self, results: list[dict[str, Any]]) -> None:
        """Hand over these results from now on: what the run knows of its stages, also of those that did not start."""
        self._final = results

    def __enter__(self) -> Delivery:
        self.write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self.write()

    def _repeat(self) -> None:
        while not self._end.wait(self._period):
            try:
                self.write()
            except OSError as error:  # a full disk must not end the run
                print(f"the results so far cannot be written: {error}", file=sys.stderr, flush=True)

    def write(self) -> None:
        """Write everything there is so far."""
        with self._lock:
            results = list(self._results()) if self._final is None else self._final
            output.write_text(self._out / RESULTS, json.dumps(results, indent=1))
            output.write_text(self._out / SUMMARY, self._summary(results) + "\n")
            self._write_logs()
            for path in self._rows.glob("*.csv"):
                if path.parent != self._out and self._before.get(path) != path.stat().st_mtime_ns:
                    output.write_text(self._out / path.name, path.read_text(encoding="utf-8"))

    def _results(self) -> Iterable[dict[str, Any]]:
        for path in sorted(self._scratch.glob("*.json"), key=lambda p: p.stat().st_ctime_ns):
            one = stage.read(path)
            if one is not None and "stage" in one:
                yield one

    def _write_logs(self) -> None:
        held = io.BytesIO()
        with ZipFile(held, "w", ZIP_DEFLATED) as logs:
            for path in sorted(self._scratch.glob("*.log")):
                logs.writestr(path.name, path.read_bytes()[-LOG_BYTES:])
        with output.replacing(self._out / LOGS) as file:
            file.write(held.getvalue())

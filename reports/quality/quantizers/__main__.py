"""Print a table of all quantisers: bytes, and cosine of the sentence vectors to the dense model's."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from rbe_gpu.models import corpus
from rbe_gpu.models.locate import model_folder

from ...harness.baselines import F32
from ...harness.rows import write_table
from . import TOOLS, Baseline, Encoder, Source, baselines, missing

_COLUMNS = (
    "tool", "version", "setting", "bits_per_weight", "linear_bytes", "file_bytes", "file_bytes_float32",
    "tokenizer_bytes", "linear_mean", "linear_p1", "whole_mean", "whole_p1", "quantise_s", "note",
)  # fmt: skip


def cosines(dense: F32, encoder: Encoder, texts: list[str]) -> tuple[float, float]:
    """Mean and 1st percentile of the cosines between the encoder's vectors and the dense model's."""
    cosines = (dense.astype(np.float64) * encoder.embed(texts)).sum(axis=1)
    return float(cosines.mean()), float(np.percentile(cosines, 1))


def row(b: Baseline, dense: F32, texts: list[str]) -> dict[str, Any]:
    """A baseline's line of the table."""
    whole = cosines(dense, b.whole, texts)
    linear = (
        (None, None)
        if b.linear is None
        else whole
        if b.linear is b.whole
        else cosines(dense, b.linear, texts)
    )
    values = (
        b.tool, b.version, b.setting, b.bits_per_weight, b.linear_bytes, b.file_bytes,
        b.file_bytes_float32, b.tokenizer_bytes, *linear, *whole, b.seconds, b.note,
    )  # fmt: skip
    return dict(zip(_COLUMNS, values, strict=True))


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m rbe_gpu.reports.quality.quantizers", description=__doc__)
    parser.add_argument("--model", type=Path, help="a model folder; default: the installed MiniLM")
    parser.add_argument("--texts", type=int, default=512, help="held-out texts (default: 512)")
    parser.add_argument("--tool", action="append", choices=[t.name for t in TOOLS], help="only this one")
    parser.add_argument("--csv", type=Path, help="write the rows there too")
    options = parser.parse_args(arguments)
    folder = model_folder(options.model)
    texts = corpus.held_out(options.texts)
    dense = Source(folder).encoder({}).embed(texts)
    rows = []
    print(f"{'':44}{'bits/':>7} {'file':>11}  {'linear layers only':^17}  {'whole file':^17}")
    print(f"{'':44}{'weight':>7} {'bytes':>11}  {'mean':>8} {'1%':>8}  {'mean':>8} {'1%':>8} {'seconds':>8}")
    start = time.perf_counter()
    for b in baselines(folder, options.tool):
        values = row(b, dense, texts)
        rows.append(values)
        figures = " ".join(_number(values[c], ">8.4f") for c in _COLUMNS[8:10])
        wholes = " ".join(_number(values[c], ">8.4f") for c in _COLUMNS[10:12])
        print(
            f"{b.name:44}{b.bits_per_weight:7.3f} {b.file_bytes:11,}  {figures:>17}  {wholes:>17} {b.seconds:8.1f}",
            flush=True,
        )
    for name, command in missing(options.tool).items():
        print(f"{name} is not installed: {command}")
    print(f"{len(rows)} settings, {len(texts)} texts, {time.perf_counter() - start:.0f} s")
    if options.csv:
        write_table(options.csv, _COLUMNS, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`rbe-gpu eval` of decoders: perplexity, and how closely the predictions are those of the dense one."""

from __future__ import annotations

import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._errors import about
from ._output import new_table, progress_bar, show, size

if TYPE_CHECKING:
    from ..models.decoder import Decoder

TEXTS = 256  # held-out docstrings


def evaluate(model: Decoder, dense: Decoder, lines: list[str], file: Path, source: str) -> dict[str, Any]:
    """Compare two decoders on texts; without any on held-out docstrings of Python's library."""
    from ..evaluate_decoders import WINDOW, evaluate_decoders
    from ..models import corpus

    texts = lines or corpus.held_out(TEXTS)
    window = min(WINDOW, dense.settings.max_positions)
    start = time.perf_counter()
    with progress_bar("evaluating") as progress, about(f"{file} and {source}"):
        evaluation = evaluate_decoders(model, dense, texts, window=window, progress=progress)
    dense_bytes = dense.dense_nbytes
    return {
        "file": str(file),
        "against": source,
        "python": platform.python_version(),
        "seconds": time.perf_counter() - start,
        "dense": {"bytes": dense_bytes, "resident_bytes": dense.nbytes, **asdict(evaluation.dense)},
        "compressed": {
            "bytes": file.stat().st_size,
            "ratio": dense_bytes / file.stat().st_size,
            "resident_bytes": model.nbytes,
            **asdict(evaluation.compressed),
        },
    }


def print_result(result: dict[str, Any], texts: str) -> None:
    """One column per model and one row per metric."""
    table = new_table("", ">dense", ">compressed")
    dense, compressed = result["dense"], result["compressed"]
    table.add_row("weights as float32, file", size(dense["bytes"]), size(compressed["bytes"]))
    table.add_row("times smaller", "1.00", f"{compressed['ratio']:.2f}")
    table.add_row("weights in memory", *(size(c["resident_bytes"]) for c in (dense, compressed)))
    table.add_row("perplexity", *(f"{c['perplexity']:.3f}" for c in (dense, compressed)))
    for name, key in (
        ("KL divergence from dense, mean", "kl"),
        ("KL divergence, 99th percentile", "kl_p99"),
        ("same most probable token", "top_1"),
    ):
        table.add_row(name, *(f"{c[key]:.4f}" for c in (dense, compressed)))
    show(
        table,
        f"{compressed['tokens']} tokens of {texts}; {result['seconds']:.1f} s",
        f"dense: {result['against']}",
        f"compressed: {result['file']}",
    )

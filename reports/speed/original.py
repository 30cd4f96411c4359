"""What the system that this project succeeds reported of itself, beside what was measured here on 768-wide weights.

Its figures were not measured here: times on a machine of its own, memory without saying of what model or block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from rbe_gpu.blocks import RBEMatrix
from rbe_gpu.container import load_file
from rbe_gpu.models.compress import compress_model

from ..harness import mpnet
from ..harness.measure import OURS
from ..harness.page import Table, columns
from ..harness.row_names import BATCH, DENSE, WIDE
from ..harness.rows import Results, Row, Session
from ..harness.text import MISSING, fixed, megabytes, seconds
from .cases import ORIGINAL_TIME, dropout, linear
from .processes import Processes

OP = "original"
HELD, BYTES, COSINE, BLOCK, STORED = (
    "weights_held",
    "file_bytes",
    "cosine_mean",
    "block_bytes",
    "block_stored",
)
RATIO = 73  # 438 MB to 6 MB, the larger of the original's compressed sizes
COMPRESSED = f"{OURS} ratio {RATIO}"
NO_BUFFER = ", no out="


def measure(
    folder: Path, texts: list[str], scratch: Path, processes: Processes, session: Session
) -> Iterator[Row]:
    """Rows of the bytes of the dense model, one compressed to 6 MB and a block of it, and of its vectors' cosine.

    folder : of all-mpnet-base-v2
    texts : that vectors are compared on
    """
    shape = f"{len(texts)} texts"

    def row(provider: str, metric: str, unit: str, value: float) -> Row:
        return session.row(OP, mpnet.NAME, provider, metric, unit, float(value), shape=shape)

    dense = processes.load_encoder(DENSE, folder)
    vectors = dense.embed(texts)
    yield row(DENSE, HELD, "B", dense.held_bytes() or 0)
    yield row(DENSE, BYTES, "B", (folder / "model.safetensors").stat().st_size)
    file = scratch / f"{mpnet.NAME}.rbe.safetensors"
    compress_model(folder, file, ratio=RATIO)
    small = processes.load_encoder(COMPRESSED, file)
    yield row(COMPRESSED, COSINE, "", float((vectors * small.embed(texts)).sum(axis=1).mean()))
    yield row(COMPRESSED, HELD, "B", small.held_bytes() or 0)
    yield row(COMPRESSED, BYTES, "B", file.stat().st_size)
    processes.forget_encoders()
    weight = next(t for t in load_file(file)[0].values() if isinstance(t, RBEMatrix))
    yield row(COMPRESSED, BLOCK, "B", 4 * weight.block**2)
    yield row(COMPRESSED, STORED, "B", weight.nbytes * weight.block**2 / (weight.rows * weight.cols))


# --- the table --------------------------------------------------------------------------------------------

#: op, its times with an output buffer and without
_TIMES = (("linear", "768 x 768 layer", linear.ORIGINAL), ("dropout", "dropout", dropout.ORIGINAL))


def table(results: Results) -> Table:
    """Every figure of the original system, and what was measured here of the same kind."""
    made = Table(
        "The original system and this one",
        columns("figure", ("original system", "n"), ("here", "n key"), ("measured on", "words")),
        css="encodes",
    )
    for op, name, originals in _TIMES:
        for original, buffer in zip(originals, ("with an output buffer", "without"), strict=True):
            rows = [
                r
                for r in results.rows
                if (r.op, r.metric) == (op, ORIGINAL_TIME)
                and r.provider.endswith(NO_BUFFER) is (buffer == "without")
            ]
            took = results.value(op, rows[-1].case, rows[-1].provider, "time") if rows else None
            made.add(
                f"{name}, {buffer}", seconds(original), seconds(took),
                f"{rows[-1].case}, {rows[-1].provider}" if rows else "",
            )  # fmt: skip

    def value(provider: str, metric: str) -> float | None:
        return results.value(OP, mpnet.NAME, provider, metric)

    def about(figure: float | None, words: Callable[[float], str]) -> str:
        return "" if figure is None else words(figure)

    made.add(
        "dense model, hidden size 768", "about 300 MB", megabytes(value(DENSE, HELD)),
        about(value(DENSE, BYTES), lambda size: f"{mpnet.NAME}, weights in memory; file {megabytes(size)}"),
    )  # fmt: skip
    cosine, held = value(COMPRESSED, COSINE), value(COMPRESSED, HELD)
    made.add(
        "compressed model", "3 to 6 MB", megabytes(value(COMPRESSED, BYTES)),
        about(
            cosine, lambda mean: f"file at ratio {RATIO}, {megabytes(held)} in memory; mean cosine {fixed(mean)} on "
            f"{BATCH} texts",
        ),
    )  # fmt: skip
    block = value(COMPRESSED, BLOCK)
    made.add(
        "a block", "64 KB", MISSING if block is None else f"{block:.0f} B",
        about(value(COMPRESSED, STORED), lambda size: f"a decoded block, float32; {size:.0f} B stored"),
    )  # fmt: skip
    return made


def reason(results: Results) -> str | None:
    """Why figures were not measured; None where all were."""
    if any(r.op == OP for r in results.rows):
        return None
    if any(r.case.endswith(WIDE) for r in results.rows):
        return f"the memory of {mpnet.NAME} is left out of a quick run"
    return f"{mpnet.NAME} was not there; {mpnet.INSTALL}, or pass its folder as --wide-model"
